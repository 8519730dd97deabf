"""A network that multiplies by an embedding's table: the product belongs to no layer."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="passes need the extra `torch`")

from edgegen import loading, registry
from edgegen.records import ModelOptions
from edgegen.types import Job, Target

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "options"), [
    ("correct_bias", {"samples": 2}), ("quantize_aware", {"steps": 2, "batch": 2, "samples": 2}),
])  # fmt: skip
def test_layers_beside_it_are_still_looked_at(name: str, options: dict[str, int]):
    model = loading.load_model("cgan", options=ModelOptions(config={"width": 16}), latency_only=True)
    job = Job(Target("t", "", ("onnxruntime",), precisions=("fp32", "int8")), teacher=model, threads=1)
    result = getattr(registry.module("passes", name), name)(model, job, **options)
    assert {"l1.0", "conv_blocks.2"} <= set(result.changed) | set(result.skipped)  # it failed before any was looked at
