"""The graphs of a run, and the inputs that they get: one real sample to compare and time with, many to calibrate on.

Graphs and calibration inputs lie in the run's folder; what is there is not made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import data, files, judgement, onnx_graph, program, registry, rewriting, samplers, serial
from edgegen import graph as layers
from edgegen.errors import ModelError
from edgegen.nn import cached, diffusion
from edgegen.run import Run, model_key
from edgegen.types import Graph, Model, Stage, Target

CACHED_LATENTS = 8  # whose way a partial graph is calibrated on: many steps of few images


def export(run: Run, model: Model, name: str) -> Graph:
    """The model's ONNX graph (from the run's folder when it is there), compared with the torch module on real input.

    With cached blocks, a full graph and a partial one.
    """
    out, settings = run.folder / "graphs" / f"{name.replace(' ', '_')}.onnx", samplers.of(model.options)
    identity = ["export", name, model_key(model)]
    if settings is None or not samplers.cached(settings):
        graph = _exported(run, model.stage, out, identity, lambda graph: feeds(run, graph))
        return dataclasses.replace(graph, preprocessing=model.preprocessing, sampler=settings)
    try:
        full, partial = cached.stages(model.stage, settings)
    except ValueError as error:
        raise ModelError(f"{model.name}: {error}; set the sampler's cache_every to 1") from error
    identity.append(files.key(settings))
    graph = _exported(run, full, out, identity, lambda graph: feeds(run, graph))
    between, samples = out.with_name(f"{out.stem}.partial.onnx"), out.with_name(f"{out.stem}.samples")
    if not samples.exists():
        found = cached.runs(model.stage.module, settings)
        latents = _latents(run, feeds(run, graph)[graph.inputs[0].name], CACHED_LATENTS)
        _write_inputs(samples, samplers.trajectory(
            settings, found, latents, run.request.calibration_images, naive=run.request.calibration == "naive"
        ))  # fmt: skip
    told = lambda graph: judgement.partial_feeds(dataclasses.replace(graph, samples=samples))  # noqa: E731
    beside = _exported(run, partial, between, [*identity, "partial"], told)
    return dataclasses.replace(graph, sampler=settings, partial=dataclasses.replace(beside, samples=samples))


def _exported(
    run: Run, stage: Stage, out: Path, identity: list[str], given: Callable[[Graph], dict[str, np.ndarray]]
) -> Graph:
    """One stage as a graph, compared with its module on what `given` says."""

    def work() -> Any:
        run.progress("export", out.stem, 0.0)
        graph = onnx_graph.to_onnx(stage, out, opset=run.target.opset)
        if stage.module is not None:
            onnx_graph.parity(stage, graph, given(graph))
            if wants_program(run.target):
                graph = dataclasses.replace(graph, program=program.save(stage, out.with_suffix(".pt2")))
        return serial.to_json(graph)

    graph = serial.from_json(Graph, run.log.once(files.key(*identity), work))
    if not graph.onnx.exists():
        onnx_graph.to_onnx(folded(stage), out, opset=run.target.opset)
    if graph.program is not None and not graph.program.exists():
        program.save(folded(stage), graph.program)
    return graph


def folded(stage: Stage) -> Stage:
    """The stage with weights that parametrizations and hooks compute (weight norm, spectral norm) as plain weights."""
    if stage.module is None:
        return stage
    module = layers.clone(stage.module)
    return dataclasses.replace(stage, module=module) if rewriting.fold_module(module) else stage


def wants_program(target: Target) -> bool:
    """Whether a runtime of the target converts from a torch program."""
    return any(getattr(registry.module("runtimes", name), "NEEDS_PROGRAM", False) for name in target.runtimes)


def feeds(run: Run, graph: Graph) -> dict[str, np.ndarray]:
    """One real sample in every input; random values only under --latency-only without data, and in further inputs."""
    spec = graph.inputs[0]
    samples = run.data.test if run.data.test is not None else run.data.calibration
    if samples is None:
        shape = tuple(int(d) for d in spec.shape)
        low, high = spec.value_range or (-1.0, 1.0)
        values = np.random.default_rng(run.request.seed).uniform(low, high, shape).astype(np.float32)
    else:
        values = samples[0].input[None].astype(np.float32)
    settings = samplers.of(run.model.options)
    if settings is not None:
        return samplers.feeds(settings, values)
    return {spec.name: values, **layers.example_feeds(graph.inputs[1:], run.request.seed)}


def calibration_folder(run: Run) -> Path:
    """The calibration samples as one memory-mappable .npy an input; random only under --latency-only."""
    folder = run.folder / "calibration"
    spec = run.model.stage.inputs[0]
    file = folder / f"{spec.name}.npy"
    if not file.exists():
        if samplers.of(run.model.options) is not None:
            _write_trajectory(run, folder)
        elif run.data.calibration is None:
            _write_inputs(folder, {name: np.concatenate([value] * 4) for name, value in run.bench.feeds.items()})
        else:
            count = min(run.request.calibration_images, len(run.data.calibration))
            more = layers.example_feeds(run.model.stage.inputs[1:], run.request.seed, count)
            if more:
                _write_inputs(folder, more)
            data.write_calibration(run.data.calibration, folder, spec.name, count)
    return folder


def _write_trajectory(run: Run, folder: Path) -> None:
    """Inputs of a denoiser along its own way from noise to image (under --calibration naive: at its first step)."""
    settings, count = samplers.of(run.model.options), run.request.calibration_images
    if settings is None:
        return
    latents = _latents(run, run.bench.feeds["sample"], min(count, 32))
    runner = diffusion.runner(run.model.stage.module)
    found = samplers.trajectory(settings, runner, latents, count, naive=run.request.calibration == "naive")
    _write_inputs(folder, found)


def _latents(run: Run, otherwise: np.ndarray, count: int) -> np.ndarray:
    """The first latents of the calibration data, or what there is without any."""
    if run.data.calibration is None:
        return otherwise
    return np.stack([run.data.calibration[i].input for i in range(min(count, len(run.data.calibration)))])


def _write_inputs(folder: Path, found: Mapping[str, np.ndarray]) -> None:
    """One .npy file an input."""
    with files.whole(folder) as temporary:
        temporary.mkdir(parents=True)
        for name, values in found.items():
            np.save(temporary / f"{name}.npy", values, allow_pickle=False)
