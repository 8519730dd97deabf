"""Every built-in generator: compressed (a pass or two, a few steps of distillation, INT8) and built for every runtime.

    python benchmarks/generators.py [--only NAME ...] [--runtime NAME ...] [--limit SECONDS] [--table]

Networks are made small by their configuration, so that two cores do; weights are random where none are shipped. So a
row says whether the way through the house is open and the file computes what torch does, and nothing about quality.

ok: built, run (in the runtime, or in the twin where it cannot run here), outputs as torch's: FP32 and FP16 within
TOLERANCE of the peak; INT8 with less noise than half the signal (root mean square), else noisy. refused: operator,
layer and cure were named before any work. wrong: other outputs. failed: an error while building. crashed: the process
died, or ran over its time or memory. Results are kept after each cell, and a second call goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conditions
from generators_table import RUNTIMES, places_of, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "generators.json"
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "int8": 0.5}
SECONDS, MEMORY = 600.0, 8 << 30  # of one build, or one run
SAMPLES, SEED = 8, 0
SHIPPED = {path.stem for path in (ROOT / "edgegen" / "models" / "weights").glob("*.safetensors")}


@dataclasses.dataclass(frozen=True)
class Case:
    """A generator in a small size, and what makes it smaller."""

    passes: tuple[tuple[str, dict[str, Any]], ...]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] | None = None  # where it does not follow from the configuration


PRUNED = (("prune_channels", {"ratio": 0.4}),)
STYLE = {"latent": 64, "style": 64, "layers": 4}
IMAGE = (1, 3, 64, 64)
CASES = {
    "dcgan": Case(PRUNED),
    "cgan": Case(PRUNED, {"width": 64}),
    "sagan": Case(PRUNED, {"size": 32, "latent": 32, "classes": 10, "width": 32, "attention": 16}),
    "sagan_cifar": Case(PRUNED),
    "stylegan2": Case((("substitute_modconv", {}),), {**STYLE, "size": 64, "width": 64}),
    "mobile_stylegan": Case(PRUNED, {**STYLE, "widths": [64, 64, 64, 32]}),
    "styleswin": Case(PRUNED, {"widths": [64, 64, 64], "style": 64, "layers": 2}, (1, 64)),
    "fastgan": Case(PRUNED, {"size": 64, "latent": 64, "width": 16}, (1, 64)),
    "pix2pix": Case(PRUNED, {"width": 16, "levels": 6}, IMAGE),
    "pix2pix_paint": Case(PRUNED),
    "cyclegan": Case(PRUNED, {"width": 16, "blocks": 3}, IMAGE),
    "ugatit": Case(PRUNED, {"width": 16, "blocks": 2, "size": 64}, IMAGE),
    "animegan": Case(PRUNED, {"width": 16}, IMAGE),
    "edsr": Case(PRUNED),
    "rlfn": Case(PRUNED, {}, IMAGE),
    "taesd": Case(PRUNED, {"width": 32, "blocks": 2}, (1, 4, 8, 8)),
    "ddpm_unet": Case(PRUNED),
    "ddpm_cifar": Case(PRUNED),
    "dit": Case((("prune_blocks", {"ratio": 0.34}),), {"layers": 3, "heads": 2}),
    "sinddm": Case(PRUNED, {"channels": 1, "width": 32}, (1, 1, 32, 32)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- inside the process


def load(name: str) -> Any:
    """The generator, with its own weights or random ones."""
    from edgegen import loading
    from edgegen.records import ModelOptions

    case = CASES[name]
    options = ModelOptions(config=case.config, input_shape=case.shape, seed=SEED)
    return loading.load_model(name, options=options, latency_only=name not in SHIPPED)


def job(model: Any) -> Any:
    """What passes may look at: no data."""
    from edgegen.types import Job, Target

    target = Target("generators", "", RUNTIMES, precisions=("fp32", "int8"), channel_multiple={"int8": 8}, threads=1)
    return Job(target, teacher=model, threads=1, seed=SEED)


def compress(model: Any, passes: tuple[tuple[str, dict[str, Any]], ...]) -> tuple[Any, dict[str, Any]]:
    """(the smaller network after a few steps of distillation, what was done to it)."""
    from edgegen import graph, registry

    work, made, told = job(model), model, []
    before = graph.cost(model.stage.module, inputs_of(model, 1)[0])
    for name, options in (*passes, ("distill", {"steps": 10, "batch": 2, "precision": "fp32"})):
        begun = time.monotonic()
        result = getattr(registry.module("passes", name), name)(made, work, **options)
        made = result.model
        told.append({"pass": name, "options": options, "changed": len(result.changed), "skipped": len(result.skipped),
                     "why": Counter(result.skipped.values()).most_common(2),
                     "seconds": round(time.monotonic() - begun, 1)})  # fmt: skip
    after = graph.cost(made.stage.module, inputs_of(model, 1)[0])
    return made, {
        "weights": "shipped" if not model.options.get("latency_only") else "random", "passes": told,
        "macs_before": before.macs, "macs_after": after.macs, "params_before": before.params,
        "params_after": after.params,
    }  # fmt: skip


def inputs_of(model: Any, count: int) -> list[tuple[Any, ...]]:
    """Made-up inputs of one sample each: latents, smooth images, or a denoiser's noised ones."""
    from edgegen.passes import _lessons

    return _lessons.some_inputs(model, job(model), count)[0]


def cells(name: str, places: list[str]) -> Iterator[dict[str, Any]]:
    """The facts of the network, then a cell for each place, a "runtime precision"."""
    import numpy as np

    from edgegen import graph, onnx_graph, program

    original = load(name)
    model, facts = compress(original, CASES[name].passes)
    samples = inputs_of(original, SAMPLES)
    names = [spec.name for spec in model.stage.inputs]
    wanted = [out.numpy() for out in graph.outputs(model.stage.module, samples[0])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "calibration").mkdir()
        for place, key in enumerate(names):
            np.save(folder / "calibration" / f"{key}.npy", np.concatenate([sample[place] for sample in samples]))
        begun = time.monotonic()
        made = onnx_graph.to_onnx(model.stage, folder / "model.onnx")
        made = dataclasses.replace(made, program=program.save(model.stage, folder / "model.pt2"))
        yield {"facts": {**facts, "export_seconds": round(time.monotonic() - begun, 1)}}
        feeds = {key: value.numpy() for key, value in zip(names, samples[0], strict=True)}
        for place in places:
            begun = time.monotonic()
            cell = build(made, feeds, wanted, *place.split(), folder)
            yield {"place": place, **cell, "seconds": round(time.monotonic() - begun, 1)}


def build(made: Any, feeds: Any, wanted: Any, runtime: str, precision: str, folder: Path) -> dict[str, Any]:
    """One cell: cures, then build and run in worker processes."""
    import numpy as np

    from edgegen import errors, measuring, registry, rewriting
    from edgegen.devices import local
    from edgegen.types import Target

    target = Target("generators", "", (runtime,), precisions=("fp32", "fp16", "bf16", "int8"), threads=1)
    plans = registry.module("runtimes", runtime).plans(target, local.cpu_flags())
    fitting = (plan for plan in plans if plan.precision == precision)
    plan = min(fitting, key=lambda plan: plan.ranges != "minmax", default=None)  # averages cut off rare bright values
    if plan is None:
        return {"status": "not offered", "why": f"{runtime} builds {', '.join(dict.fromkeys(p.label for p in plans))}"}
    limits = measuring.Limits(SECONDS, MEMORY)
    try:
        made = dataclasses.replace(made, plan=plan)
        cured = rewriting.cures(made, runtime, target, feeds=feeds, out=folder / f"{runtime}.onnx")
        rewrites = sorted(cured.changed)
        if cured.problems:
            told = [dataclasses.asdict(problem) for problem in cured.problems]
            return {"status": "refused", "problems": told[:5], "rewrites": rewrites}
        calibration = folder / "calibration" if precision == "int8" else None
        artifact = measuring.build_isolated(cured.graph, folder / f"{runtime}-{precision}", runtime=runtime,
                                            calibration=calibration, target=target, limits=limits)  # fmt: skip
        with measuring.Worker(artifact, limits) as worker:
            found = worker.run(feeds)
    except errors.Unsupported as error:
        return {"status": "refused", "why": " ".join(str(error).split())[:400]}
    except errors.EdgegenError as error:
        gone = any(word in str(error) for word in ("crashed", "signal", "limit"))
        return {"status": "crashed" if gone else "failed", "why": " ".join(str(error).split())[:400]}
    sides = zip(made.outputs, wanted, strict=True)
    error = max(difference(found[spec.name], right, precision) for spec, right in sides)
    bad = "noisy" if precision == "int8" and np.isfinite(error) else "wrong"
    return {"status": "ok" if error <= TOLERANCE[precision] else bad, "difference": float(f"{error:.3g}"),
            "plan": plan.label, "bytes": artifact.size_bytes, "rewrites": rewrites}  # fmt: skip


def difference(found: Any, wanted: Any, precision: str) -> float:
    """The largest difference as a share of the peak; for INT8 the root mean square, as a share of the output's."""
    import numpy as np

    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    apart, right = found.astype(np.float64) - wanted, wanted.astype(np.float64)
    if precision == "int8":
        return float(np.sqrt(np.square(apart).mean() / max(np.square(right).mean(), 1e-24)))
    return float(np.abs(apart).max() / max(np.abs(right).max(), 1e-12))


# ----------------------------------------------------------------------------------------------------- the other side


def attempt(name: str, places: list[str]) -> Iterator[dict[str, Any]]:
    """What a process of `cells` tells, line by line; the last one says why it ended early, if it did."""
    command = [sys.executable, "-W", "ignore", __file__, "--try", name, *places]
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True, start_new_session=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=pump, args=(process.stdout, lines), daemon=True).start()
        try:
            while (line := lines.get(timeout=3 * SECONDS)) is not None:
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.wait()
            words.seek(0)
            last = (words.read().strip().splitlines() or [""])[-1][:300]
            if code:
                yield {"ended": signal.Signals(-code).name if code < 0 else last}
        except queue.Empty:
            yield {"ended": f"no end after {3 * SECONDS:g} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()


def pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    """Lines as they come, and None at the end."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def sweep(name: str, runtimes: list[str], floats: bool = False) -> None:
    """Fill the row of one generator; a process that dies is a result, and the next place gets a new one."""
    places = [place for runtime in runtimes for place in places_of(runtime)[: 1 if floats else 2]]
    while left := [place for place in places if place not in rows().get(name, {}).get("cells", {})]:
        for told in attempt(name, left):
            with changed(name) as row:
                missing = [place for place in left if place not in row["cells"]]
                row.pop("failed", None)
                if "facts" in told:
                    row |= told["facts"]
                elif "place" in told:
                    row["cells"][told.pop("place")] = told
                    words = [str(told[key]) for key in ("status", "difference", "why", "seconds") if key in told]
                    print(f"{name} {missing[0]}: {', '.join(words)}", flush=True)
                elif "passes" in row:
                    row["cells"].update({place: {"status": "crashed", "why": told["ended"]} for place in missing[:1]})
                else:  # it came to no runtime at all
                    row["failed"] = told["ended"]
        if "failed" in rows()[name]:
            return


def rows() -> dict[str, dict[str, Any]]:
    """Generators done so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["generators"] if RESULTS.is_file() else {}


@contextmanager
def changed(name: str) -> Iterator[dict[str, Any]]:
    """A row to change in place; the results are written at the end. Several processes may do so at once."""
    from edgegen import files

    folder = os.open(RESULTS.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        made = rows()
        row = made.setdefault(name, {"cells": {}})
        yield row
        row["date"] = time.strftime("%Y-%m-%d")
        files.write_json(RESULTS, {**conditions.conditions(), "samples": SAMPLES, "seed": SEED, "generators": made})
        files.write_text(RESULTS.with_suffix(".md"), table(made, CASES))
    finally:
        os.close(folder)


def main() -> None:
    """Fill the cells that are not done yet, or one process' (--try), or only write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--runtime", nargs="*", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new generator is begun")
    parser.add_argument("--floats", action="store_true", help="no INT8")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--try", dest="attempt", nargs="+", default=None)
    options = parser.parse_args()
    if options.attempt:
        for told in cells(options.attempt[0], options.attempt[1:]):
            print("\n" + json.dumps(told), flush=True)
        return
    begun = time.monotonic()
    for name in options.only:
        if not options.table and time.monotonic() - begun <= options.limit:
            sweep(name, options.runtime, options.floats)
    from edgegen import files

    files.write_text(RESULTS.with_suffix(".md"), table(rows(), CASES))


if __name__ == "__main__":
    main()
