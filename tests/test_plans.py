"""quantize and cast write plans; what they say about layers follows from the plan; which runtimes they are for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgegen import run, summary, targets
from edgegen.errors import RecipeError
from edgegen.passes.cast import cast
from edgegen.passes.quantize import quantize
from edgegen.request import Request
from edgegen.types import Job, Model, PrecisionPlan, Target

JOB = Job(Target("testbed", "", ("onnxruntime",), precisions=("fp32", "fp16", "bf16", "int8")))


def test_quantize_plans_every_layer(conv_chain: Model):
    result = quantize(conv_chain, JOB)
    assert result.model.plan == PrecisionPlan("int8", "", "fp32")
    assert result.changed == {"0": "int8", "3": "int8", "6": "int8", "10": "int8"}
    assert result.skipped == {}
    assert result.notes == {"formats": ["u8s8", "s8s8"], "weights": ["int8"]}


def test_one_format_is_named_in_the_plan(conv_chain: Model):
    assert quantize(conv_chain, JOB, formats=("s8s8",), rest="bf16").model.plan == PrecisionPlan("int8", "s8s8", "bf16")


@pytest.mark.parametrize("name", ["0", "0/Conv"])
def test_a_layer_left_in_float_is_named_by_layer_or_node(conv_chain: Model, name: str):
    result = quantize(conv_chain, JOB, float_layers=(name,))
    assert result.model.plan.float_layers == ("0/Conv",)
    assert result.skipped == {"0": "named in float_layers"}
    assert "0" not in result.changed


def test_types_left_in_float(conv_chain: Model):
    result = quantize(conv_chain, JOB, float_types=("Gemm", "MatMul"))
    assert result.model.plan.float_types == ("Gemm", "MatMul")
    assert result.skipped == {"10": "Gemm is in float_types"}


def test_a_linear_layer_needs_its_type(conv_chain: Model):
    with pytest.raises(RecipeError, match="'10' may become two kinds of node; say 10/Gemm or 10/MatMul"):
        quantize(conv_chain, JOB, float_layers=("10",))


def test_a_misspelt_layer_gets_the_near_match(depthwise_generator: Model):
    with pytest.raises(RecipeError, match="no layer 'pointwis' in depthwise_generator, did you mean 'pointwise'"):
        quantize(depthwise_generator, JOB, float_layers=("pointwis",))


def test_a_target_without_int8_refuses(conv_chain: Model):
    job = Job(Target("plain", "", ("onnxruntime",), precisions=("fp32",)))
    with pytest.raises(RecipeError, match="precision: target plain has no int8; it has: fp32"):
        quantize(conv_chain, job)


def test_cast_plans_and_says_when_nothing_changes(conv_chain: Model):
    result = cast(conv_chain, JOB, precision="bf16")
    assert result.model.plan == PrecisionPlan("bf16")
    assert set(result.changed.values()) == {"bf16"}
    again = cast(result.model, JOB, precision="bf16")
    assert again.changed == {}
    assert set(again.skipped.values()) == {"is bf16 already"}


def test_cast_back_to_fp32_needs_no_listing(conv_chain: Model):
    half = dataclasses.replace(conv_chain, plan=PrecisionPlan("fp16"))
    job = Job(Target("plain", "", ("onnxruntime",), precisions=("int8",)))
    assert cast(half, job, precision="fp32").model.plan == PrecisionPlan()


@pytest.mark.parametrize("thorough", [False, True])
def test_slow_runtimes_are_tried_when_thorough_and_named_when_not(
    thorough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    request = Request(model="cifar_resnet", out=tmp_path / "out", latency_only=True, thorough=thorough)
    opened = run.open_run(request, run.quiet)
    slow = targets.load("cpu").thorough_runtimes
    assert slow == ("litert", "executorch")
    assert opened.target.runtimes == ("onnxruntime", "openvino", *(slow if thorough else ()))
    told = {name for name, why in summary.untried(opened).items() if "--thorough" in why}
    assert told == (set() if thorough else set(slow))
