"""The teacher of a run: its FP32 build, and what that gives on both held-out parts, from which quality is judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import quality, registry
from edgegen.candidates import Candidate
from edgegen.errors import DataError
from edgegen.quality import Evaluation
from edgegen.run import Run
from edgegen.types import PrecisionPlan


@dataclass(frozen=True)
class Evaluations:
    """`select` decides, `test` reports (and can only reject)."""

    select: Evaluation
    test: Evaluation


def evaluations(run: Run, floats: list[Candidate]) -> Evaluations | None:
    """Collect the teacher's outputs on both held-out parts; None under --latency-only.

    Raises:
        DataError: the feature extractor is unknown, its weights are not here, or it gives no maps where images are
            compared in pairs.
    """
    if run.data.select is None:
        return None
    teacher = teacher_build(run, floats)
    features = quality.features(run.model, run.request.features)

    def on(part: str, dataset: Any, others: Any) -> Evaluation:
        outputs = _collected(run, teacher, dataset, part)
        real = dataset.real_images if getattr(dataset, "source", None) is not None else None
        fresh = _collected(run, teacher, others, f"fresh-{part}") if others is not None and real is None else None
        return Evaluation(run.model, dataset, outputs, run.request.seed, features, real, fresh)

    fresh = run.data.fresh or (None, None)
    select = on("select", run.data.select, fresh[0])
    if run.model.task not in ("classification", "unconditional"):  # known now, not after every pass was trained
        shape = np.load(select.teacher, mmap_mode="r", allow_pickle=False).shape[1:]
        if why := registry.module("metrics", "perceptual").lacks_maps(features, shape):
            raise DataError(why)
    return Evaluations(select, on("test", run.data.test, fresh[1]))


def teacher_build(run: Run, floats: list[Candidate]) -> Candidate:
    """The FP32 build whose outputs are the teacher's; built in ONNX Runtime when the target's runtimes have none."""
    for candidate in floats:
        if candidate.artifact is not None and not candidate.verdict and candidate.graph.plan.precision == "fp32":
            return candidate
    return run.bench.build("original", floats[0].graph, "onnxruntime", PrecisionPlan(), None)


def _collected(run: Run, teacher: Candidate, dataset: Any, part: str) -> Path:
    out = run.folder / "outputs" / f"teacher-{part}.npy"
    return out if out.exists() else run.bench.outputs(teacher, dataset, out)
