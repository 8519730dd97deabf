"""A fake runtime: y = 2 x, and every way to misbehave. `options["do"]` at load and run, the plan's format at build."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgegen import errors, files
from edgegen.types import Artifact, Graph, Inspection, Problem, Target

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Refuses what the plan's format names `refuse`."""
    return [Problem("Fold", "body", "use Cast")] if graph.plan.format == "refuse" else []


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Write a JSON file; misbehave as `graph.plan.format` says."""
    with files.whole(out) as folder:
        folder.mkdir()
        (folder / "model.fake").write_text(json.dumps({"target": target.name, "calibration": str(calibration)}))
        misbehave(graph.plan.format)
    return Artifact("fake", out / "model.fake", (out / "model.fake",), graph.plan, 1, graph.inputs, graph.outputs,
                    {"threads": target.threads})


@contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Doubles its inputs, after "sleep_ms" of sleep and "ms" of work; "do" comes after "after" runs."""
    misbehave(str(artifact.options.get("load", "")))
    calls = 0

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += 1
        if calls > int(artifact.options.get("after", 0)):
            misbehave(str(artifact.options.get("do", "")))
        time.sleep(float(artifact.options.get("sleep_ms", 0)) / 1000)
        end = time.perf_counter() + float(artifact.options.get("ms", 0)) / 1000
        while time.perf_counter() < end:
            pass
        return {"y/out": feeds["x"] * 2, "calls": np.full((len(feeds["x"]), 1), calls)}

    yield run


def inspect(artifact: Artifact) -> Inspection:
    """A fixed answer."""
    return Inspection({"conv": "int8"}, 0.5, 0.25)


def misbehave(how: str) -> None:
    """Do what `how` names; nothing for an empty string."""
    if how == "segv":
        sys.stderr.write("about to fall\n")
        sys.stderr.flush()
        ctypes.string_at(0)
    elif how == "hang":
        time.sleep(600)
    elif how == "eat":
        hoard = []
        while True:
            hoard.append(np.ones(2**21))  # 16 MiB, touched
            time.sleep(0.005)
    elif how == "child eats":
        code = "x = b'1' * (400 << 20); import time; time.sleep(600)"
        subprocess.run([sys.executable, "-c", code], check=True)
    elif how == "raise":
        raise ArithmeticError("no such kernel")
    elif how == "usage":
        raise errors.MissingExtra("fakelib", "to fake", "fake")
    elif how == "exit":
        os._exit(3)
    elif how == "print":
        print("printed by python")
        os.write(1, b"written by a library\n")
        warnings.warn("and a warning", stacklevel=1)
