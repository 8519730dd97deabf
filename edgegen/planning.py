"""What `compress` would do, with predicted time, memory and disk, from one forward pass timed now. Nothing is written.

The figures are predictions from counted work, right to a factor of about three at best, not measurements: builds and
timing rounds take what FLOAT_S, INT8_S and ROUND_S say on any machine, training and scoring scale with the forward pass
that was timed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import files, finishing, graph, recipe, registry, streams, targets, training
from edgegen.request import Request, check_out
from edgegen.run import FINAL_ROUNDS, SCREEN_ROUNDS, Run, open_run
from edgegen.types import Model, TensorSpec

FLOAT_S, INT8_S = 2.0, 6.0
"""Seconds of one build in its worker process, without and with calibration; large networks take longer."""
LOAD_S = 1.5
"""Seconds in which a worker process starts, loads a build and warms up."""
ROUND_S = 0.25
"""Seconds of one timing round of one build: 0.15 s of running, settling, and the clock's own."""
BASE_BYTES = 800_000_000
"""Resident size of a process that has torch, the exporter and the libraries of metrics loaded."""
LOG_BYTES = 300_000
"""The run's log with every sample of its timings, and the report."""
INT8_SHARE = 0.3
"""Size of an INT8 build against the network's."""
BACKWARD = 3.0
"""A training step takes this many forward passes of its batch (Kaplan et al., 2020, arXiv:2001.08361, section 2.1)."""
_TRAINS = ("steps", "epochs")


@dataclass(frozen=True)
class Step:
    """One part of the run: what it does, and its predicted seconds."""

    name: str
    text: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The parts in order; memory (of the largest process) and disk in bytes; what could not be predicted."""

    model: str
    target: str
    out: str
    steps: tuple[Step, ...]
    memory_bytes: int
    disk_bytes: int
    unknown: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Predicted seconds of all parts."""
        return sum(step.seconds for step in self.steps)


def plan(request: Request) -> Plan:
    """The plan of a request, after every check that `compress` itself makes first.

    Raises:
        UsageError: as `compress` would.
    """
    check_out(request.out or _default_out(request), request.resume)
    # A run that was interrupted has its folder; opening for resuming leaves it as it is.
    return plan_of(open_run(dataclasses.replace(request, resume=True), lambda step, text, fraction: None))


def plan_of(run: Run) -> Plan:
    """The plan of a run that is open."""
    batches = [batch for group in recipe.groups(run.recipe) for step in group if (batch := _batch(step))]
    forward, activations = _forward(run.model, bool(batches))
    steps, unknown = _steps(run, forward)
    counts = [len(part) for part in (run.data.select, run.data.test) if part is not None]
    size = _state_bytes(run.model)
    floats, quantized = (len(run.bench.plans(quantized=kind)) for kind in (False, True))
    copies = 1 + floats + INT8_SHARE * quantized * any(step.name == "quantize" for step in run.recipe.steps)
    networks = 1 + len(recipe.groups(run.recipe))
    data = 4 * (sum(counts) * _elements(run.model.stage.outputs[0]) + _calibration(run))
    trains, batch = bool(batches), max(batches, default=1)
    # weights, their gradients and the optimizer's two moments; activations of a batch are kept for the way back
    memory = size * (4 if trains else 1) + activations * (2 * batch if trains else 1) + BASE_BYTES
    return Plan(run.model.name, run.target.name, str(run.out), tuple(steps), memory,
                round(networks * copies * size) + data + LOG_BYTES, tuple(unknown))  # fmt: skip


def _default_out(request: Request) -> Path:
    return Path("out") / f"{Path(request.model.split(':')[-1]).stem}-{targets.load(request.target).name}"


def used(run: Run, seconds: float) -> dict[str, Any]:
    """What a run took, in the figures of `Plan`: the largest process so far, and what lies in the run's folder now."""
    disk = files.tree_size(run.folder)[1]
    return {"seconds": round(seconds, 1), "memory_bytes": _largest_process(), "disk_bytes": disk}


def _largest_process() -> int:
    """Largest resident size of this process, or of one that it started and that has ended, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    largest = [unit * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    with contextlib.suppress(OSError):  # Linux counts in what the parent had when it started this process
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        largest[0] = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return max(largest)


def _forward(model: Model, trains: bool) -> tuple[float, int]:
    """(seconds of one forward pass of one sample, bytes of all its activations); zeros for a network without torch.

    trains: in the precision of training.
    """
    module = model.stage.module
    if module is None:
        return 0.0, 0
    import torch

    sizes: list[int] = []

    def count(_: Any, __: Any, output: Any) -> None:
        sizes.append(output.numel() * output.element_size() if isinstance(output, torch.Tensor) else 0)

    feeds = [
        torch.zeros([int(size) for size in spec.shape], dtype=getattr(torch, spec.dtype)) for spec in model.stage.inputs
    ]
    leaves = [part for part in module.modules() if not list(part.children())]
    precision = training.resolve_precision("auto") if trains else "fp32"
    with torch.no_grad(), training.autocast(precision):
        with graph.hooked(part.register_forward_hook(count) for part in leaves):
            module(*feeds)
        times: list[float] = []
        while len(times) < 3 or (len(times) < 8 and sum(times) < 1.0):  # the least of them: others may run too
            began = time.perf_counter()
            module(*feeds)
            times.append(time.perf_counter() - began)
    return min(times), sum(sizes)


def _steps(run: Run, forward: float) -> tuple[list[Step], list[str]]:
    floats, quantized = (len(run.bench.plans(quantized=kind)) for kind in (False, True))
    groups = recipe.groups(run.recipe)
    networks = 1 + len(groups)
    scored = sum(len(part) for part in (run.data.select, run.data.test) if part is not None)
    found = [Step("export", f"{run.model.name} to ONNX, compared with torch", 5.0)]
    found.append(Step("baseline", f"{floats} unquantized builds, timed in turns", _timed(run, floats, FLOAT_S)))
    if scored:
        found.append(Step("teacher", f"outputs on {scored} held-out samples", scored * forward))
    unknown = []
    left = 1.0  # share of the MACs that the student has left
    for number, group in enumerate(groups, 1):
        for step in group:
            seconds, why = _pass(step.name, dict(step.options), forward, left)
            ratio = _options(step.name).get("ratio") if "ratio" not in step.options else step.options["ratio"]
            if step.name.startswith("prune") and isinstance(ratio, float):
                left *= (1.0 - ratio) ** 2
            unknown += [f"{step.name}: {why}"] if why else []
            options = ", ".join(f"{key} {value}" for key, value in step.told.items())
            found.append(Step(f"{number} {step.name}", options or "default options", seconds))
        found.append(Step(f"{number} judge", f"{floats} builds of it, timed and scored", _timed(run, floats, FLOAT_S)))
    if quantized and any(step.name == "quantize" for step in run.recipe.steps):
        count = quantized * networks
        text = f"{count} INT8 builds, timed; those inside the budget are scored"
        found.append(Step("quantize", text, _timed(run, count, INT8_S) + scored * forward))
    rounds = 3 * FINAL_ROUNDS * ROUND_S if run.bench.measures else 0.0
    found.append(Step("final", "baseline, reference and choice timed long; bundle, golden outputs, report", rounds + 5))
    found += _finishing(run, scored * forward / 2, sum(step.seconds for step in found))
    return found, unknown


def _finishing(run: Run, scoring: float, so_far: float) -> list[Step]:
    """What is measured of the choice at the end."""
    found, (count, _) = [], streams.split(run.target.threads)
    if run.bench.here and not run.bench.device and count > 1:
        found.append(Step("throughput", f"baseline and choice, {count} at once", 2 * (count * LOAD_S + 5 * ROUND_S)))
    if any(step.name == "quantize" for step in run.recipe.steps) and run.data.test is not None:
        whole = len(finishing.SHARES) * (INT8_S + scoring)
        allowed = math.inf if run.request.thorough else finishing.allowed(so_far)
        told = "if INT8 is chosen: it again from fewer calibration samples"
        found.append(Step("calibration curve", told, min(whole, allowed)))
    return found


def _timed(run: Run, builds: int, each: float) -> float:
    return builds * (each + (SCREEN_ROUNDS * ROUND_S if run.bench.measures else 0.0))


def _pass(name: str, options: dict[str, Any], forward: float, left: float) -> tuple[float, str]:
    """(predicted seconds of a pass, why they are not known)."""
    settings = {**_options(name), **options}
    length = next((settings[key] for key in _TRAINS if isinstance(settings.get(key), int) and settings[key] > 0), 0)
    if not length:
        return 2.0, "" if name.startswith(("prune", "cast", "quantize", "fold")) else "its time is not predicted"
    batch = int(settings.get("batch", 8) or 8)
    # the student forward and back, the teacher forward
    return length * batch * forward * (BACKWARD * left + 1.0), ""


def _options(name: str) -> dict[str, Any]:
    """The options of a pass with their defaults."""
    registry.check("passes", name)
    return dict(recipe.options_of(name))


def _batch(step: recipe.Step) -> int:
    """Samples in a training step of a pass that trains, else 0."""
    settings = {**_options(step.name), **step.options}
    trains = any(isinstance(settings.get(key), int) for key in _TRAINS)
    return int(settings.get("batch", 8) or 8) if trains else 0


def _state_bytes(model: Model) -> int:
    if model.stage.module is None:
        return model.stage.onnx.stat().st_size if model.stage.onnx is not None else 0
    return sum(value.numel() * value.element_size() for value in model.stage.module.state_dict().values())


def _elements(spec: TensorSpec) -> int:
    return math.prod(int(size) for size in spec.shape if isinstance(size, int | np.integer))


def _calibration(run: Run) -> int:
    """Numbers in the calibration samples that are written down."""
    if run.data.calibration is None:
        return 0
    count = min(len(run.data.calibration), run.request.calibration_images)
    return count * sum(_elements(spec) for spec in run.model.stage.inputs)
