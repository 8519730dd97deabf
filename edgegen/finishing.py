"""What is measured once, when the choice has been made: throughput, and quality by the size of the calibration set.

Neither decides anything, so both are bounded: throughput takes seconds, the curve a share of the time of its run.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import files, samplers, serial, streams
from edgegen.candidates import Candidate
from edgegen.errors import RuntimeFailed
from edgegen.final import Curve, Final
from edgegen.latency import not_measured
from edgegen.quality import Evaluation
from edgegen.run import Run
from edgegen.run_graphs import calibration_folder
from edgegen.teacher import Evaluations
from edgegen.types import Measurement

SLOWEST_MS = 300.0
"""Of a run: five rounds of three runs of each stream shall take seconds."""
SHARES = (8, 4, 2)
"""The curve has the whole calibration set, and an eighth, a quarter and a half of it."""
CURVE_SECONDS, CURVE_SHARE = 5.0, 0.05
"""What the curve may take: so many seconds, or that share of what the run took, whichever is more."""
TO_THE_TEACHER = ("PSNR to the teacher", "agreement")
"""Calibration moves the build away from its teacher, which these see first."""


def finished(run: Run, final: Final, found: Evaluations | None, seconds: float) -> Final:
    """`final` with throughput and calibration curve; seconds: that the run took so far."""
    rates = throughput(run, final)
    return dataclasses.replace(final, throughput=rates, curve=calibration_curve(run, final.chosen, found, seconds))


def throughput(run: Run, final: Final) -> dict[str, Measurement]:
    """Label -> images a second with several streams at once, of the baseline and of the chosen build."""
    rows = list({c.label: c for c in (final.baseline, final.chosen)}.values())
    reason = _no_throughput(run, final, rows)
    if reason:
        missing = dataclasses.replace(not_measured("throughput", "1/s", reason, {}), direction="higher")
        return {c.label: missing for c in rows}
    run.progress("throughput", f"{streams.split(run.target.threads)[0]} at once", 0.0)

    def work() -> dict[str, Any]:
        artifacts = [c.artifact for c in rows if c.artifact is not None]
        found = streams.throughput(
            artifacts, run.bench.feeds, threads=run.target.threads, seed=run.request.seed, limits=run.bench.limits
        )
        return {c.label: serial.to_json(one) for c, one in zip(rows, found, strict=True)}

    found = run.log.once(files.key("throughput", [c.key for c in rows]), work)
    return {c.label: _per_image(serial.from_json(Measurement, found[c.label]), c) for c in rows}


def _no_throughput(run: Run, final: Final, rows: list[Candidate]) -> str:
    """Why throughput is not measured; empty when it can be."""
    if not run.bench.here or run.bench.device:
        return "runs at once are measured on this machine only"
    count, _ = streams.split(run.target.threads)
    if count < 2:
        return "the target has one thread, so nothing runs beside another"
    if any(c.artifact is None or c.artifact.partial is not None for c in rows):
        return "with cached blocks two networks take turns"
    slowest = max(_run_ms(c) for c in rows)
    if not slowest <= SLOWEST_MS:
        return f"one run takes {slowest:.0f} ms, and this is measured up to {SLOWEST_MS:.0f} ms"
    needed, free = count * sum(final.memory.get(c.label, 0) for c in rows), _free_bytes()
    if free and needed > free / 2:
        return f"{count} processes of each build need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return ""


def _run_ms(candidate: Candidate) -> float:
    """Milliseconds of one run of the network; NaN where it was not timed."""
    latency = candidate.latency
    return math.nan if latency is None else float(latency.conditions.get("ms_per_run", latency.value))


def _free_bytes() -> int:
    """Memory that new processes may have; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def _per_image(found: Measurement, candidate: Candidate) -> Measurement:
    """Images instead of runs of a denoiser."""
    settings = candidate.graph.sampler
    if settings is None or found.status != "measured":
        return found
    calls = samplers.calls(settings)[0]
    interval = found.interval and (found.interval[0] / calls, found.interval[1] / calls)
    return dataclasses.replace(
        found, value=found.value / calls, interval=interval, samples=tuple(rate / calls for rate in found.samples),
        conditions={**found.conditions, "nfe": calls},
    )  # fmt: skip


def calibration_curve(run: Run, chosen: Candidate, found: Evaluations | None, seconds: float) -> Curve:
    """The chosen build made again from fewer calibration samples, and scored on the same held-out samples.

    Args:
        seconds: that the run took so far; the curve takes at most a share of it, unless --thorough was given.
    """
    plan = chosen.graph.plan
    if plan.precision != "int8":
        return Curve(reason="the result holds no INT8 layers that were calibrated")
    if plan.scales:
        return Curve(reason="the ranges of this result were learned, not calibrated")
    if found is None or chosen.graph.partial is not None:
        return Curve(reason="no quality was measured" if found is None else "with cached blocks there are two sets")
    folder = calibration_folder(run)
    total = min(len(np.load(file, mmap_mode="r", allow_pickle=False)) for file in sorted(folder.glob("*.npy")))
    sizes = sorted({total // share for share in SHARES} - {0, total})
    if not sizes:
        return Curve(reason="there is one sample to calibrate on")
    limit = math.inf if run.request.thorough else allowed(seconds)
    key = files.key("calibration curve", chosen.key, str(folder), run.request.thorough)
    told = run.log.once(key, lambda: _points(run, chosen, found.test, (folder, sizes), limit))
    points = [(int(size), serial.from_json(Measurement, one)) for size, one in told["points"]]
    return Curve((*points, (total, _figure(chosen.figures))) if points else (), told["reason"])


def allowed(seconds: float) -> float:
    """Seconds that the curve of a run of so many may take."""
    return max(CURVE_SECONDS, CURVE_SHARE * seconds)


def _points(
    run: Run, chosen: Candidate, evaluation: Evaluation, samples: tuple[Path, list[int]], limit: float
) -> dict[str, Any]:
    folder, sizes = samples
    points: list[tuple[int, Any]] = []
    only = _figure(chosen.figures).name
    spent, last = 0.0, chosen.build_s
    for place, size in enumerate(sizes):
        if spent + last > limit:
            left = ", ".join(map(str, sizes[place:]))
            return {"points": points, "reason": f"{left} samples are left out: each point takes {last:.0f} s, and the "
                    f"curve may take {limit:.0f} s of this run (--thorough takes the time)"}  # fmt: skip
        run.progress("calibration curve", f"{size} samples", place / len(sizes))
        began = time.monotonic()
        graph, plan = chosen.graph, chosen.graph.plan
        made = run.bench.build(chosen.of, graph, chosen.runtime, plan, _fewer(folder, size))
        try:
            if made.artifact is None:
                raise RuntimeFailed(made.reason)
            with tempfile.TemporaryDirectory(dir=run.folder) as scratch:
                outputs = run.bench.outputs(made, evaluation.data, Path(scratch) / "outputs.npy")
                points.append((size, serial.to_json(_figure(evaluation.figures(outputs, only, graph.sampler)))))
        except RuntimeFailed as error:
            return {"points": points, "reason": f"with {size} samples: {error}"}
        last = time.monotonic() - began
        spent += last
    run.progress("calibration curve", f"{len(sizes)} smaller sets", 1.0)
    return {"points": points, "reason": ""}


def _fewer(folder: Path, size: int) -> Path:
    """A calibration folder with `size` of the samples, evenly spread: a denoiser's are in the order of its steps."""
    out = folder.with_name(f"{folder.name}-{size}")
    if not out.exists():
        with files.whole(out) as temporary:
            temporary.mkdir(parents=True)
            for file in sorted(folder.glob("*.npy")):
                rows = np.load(file, mmap_mode="r", allow_pickle=False)
                chosen = np.linspace(0, len(rows) - 1, size).round().astype(int)
                np.save(temporary / file.name, rows[chosen], allow_pickle=False)
    return out


def _figure(figures: tuple[Measurement, ...]) -> Measurement:
    return next((one for name in TO_THE_TEACHER for one in figures if one.name == name), figures[0])
