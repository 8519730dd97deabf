"""Exporting small networks and building them: once, into the cache folder, in one worker process a runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edgegen import errors, files, isolation, onnx_graph, program, registry, rewriting, serial
from edgegen.types import Artifact, Graph, Stage, Target

Build = Callable[[Graph, Path], Artifact]


def home() -> Path:
    """Where exports and builds are kept."""
    return files.cache_folder() / "probes"


def export(make: Callable[[], Stage], folder: Path, runtimes: Sequence[str]) -> Graph:
    """A stage as ONNX, and as a torch program where a runtime converts from one; what is there is kept.

    make: gives the stage; not called when all is there.
    """
    told = folder / "graph.json"
    if told.is_file():
        graph = serial.from_json(Graph, json.loads(told.read_text(encoding="utf-8")))
    else:
        graph = onnx_graph.to_onnx(make(), folder / "model.onnx")
        files.write_json(told, serial.to_json(graph))
    if not any(getattr(registry.module("runtimes", name), "NEEDS_PROGRAM", False) for name in runtimes):
        return graph
    file = folder / "model.pt2"
    if not file.is_file():
        program.save(make(), file)
    return dataclasses.replace(graph, program=file)


def feeds_of(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Normally distributed inputs."""
    rng = np.random.default_rng(seed)
    return {s.name: rng.standard_normal(tuple(int(d) for d in s.shape)).astype(np.float32) for s in graph.inputs}


@contextlib.contextmanager
def building(runtime: str, target: Target, limits: isolation.Limits) -> Iterator[Build]:
    """Yield build(graph with its plan, out) -> Artifact: all in one worker process, and in a new one where that dies.

    A graph that the runtime refuses is cured by exact rewrites, where there are any. A build that is there is kept.
    """
    held: list[isolation.Process] = []

    def once(graph: Graph, out: Path, calibration: Path | None) -> Artifact:
        if not held:
            held.append(isolation.Process(runtime, limits))
        try:
            reply = held[0].request(
                "build", module=f"edgegen.runtimes.{runtime}", graph=serial.to_json(graph), out=str(out),
                calibration=str(calibration) if calibration else None, target=serial.to_json(target),
            )  # fmt: skip
        except errors.Unsupported:
            raise
        except errors.RuntimeFailed:
            held.pop().kill()
            raise
        return serial.from_json(Artifact, reply["artifact"])

    def build(graph: Graph, out: Path) -> Artifact:
        told = out.with_name(out.name + ".json")
        if told.is_file():
            return serial.from_json(Artifact, json.loads(told.read_text(encoding="utf-8")))
        calibration = _calibration(graph, out.parent) if graph.plan.precision == "int8" else None
        made, _ = rewriting.built(
            lambda taken: once(taken, out, calibration), graph, runtime, target,
            feeds=feeds_of(graph), out=out.with_suffix(".cured"),
        )  # fmt: skip
        files.write_json(told, serial.to_json(made))
        return made

    try:
        yield build
    finally:
        for process in held:
            process.close()


def _calibration(graph: Graph, folder: Path) -> Path:
    """Four random samples an input: only latency is measured here."""
    for spec in graph.inputs:
        file = folder / "calibration" / f"{spec.name}.npy"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            stack = [feeds_of(graph, seed)[spec.name] for seed in range(4)]
            np.save(file, np.concatenate(stack), allow_pickle=False)
    return folder / "calibration"
