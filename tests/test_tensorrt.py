"""TensorRT without TensorRT: the files that are built for it, and the rules of Q/DQ that they keep."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from conftest import TINY, make_tiny
from onnx import TensorProto, numpy_helper

from edgegen import errors, onnx_graph, serial, targets
from edgegen.runtimes import _tensorrt_opset, _tensorrt_qdq, _tensorrt_rules, onnxruntime, tensorrt
from edgegen.types import Artifact, Graph, PrecisionPlan, Stage, Target, TensorSpec

ORIN, NANO, XAVIER = (targets.load(f"jetson-{name}") for name in ("orin-nano", "nano", "xavier-nx"))
INT8 = PrecisionPlan("int8", "s8s8", rest="fp16")
TOLERANCE = {"fp32": 1e-4, "fp16": 4e-3, "int8": 0.2}  # as in test_runtimes.py
CASES = [(target, plan) for target in (ORIN, XAVIER, NANO) for plan in tensorrt.plans(target, frozenset())]


@dataclasses.dataclass(frozen=True)
class Exported:
    graph: Graph
    calibration: Path
    image: np.ndarray
    wanted: np.ndarray


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    import torch

    found = {}
    for name in TINY:
        folder = tmp_path_factory.mktemp(name)
        stage = make_tiny(name).stage
        samples = np.random.default_rng(0).random((8, 3, 16, 16), dtype=np.float32)
        np.save(folder / "input.npy", samples)
        with torch.no_grad():
            wanted = stage.module(torch.from_numpy(samples[:1])).numpy()
        found[name] = Exported(onnx_graph.to_onnx(stage, folder / "graph.onnx"), folder, samples[:1], wanted)
    return found


def built(source: Exported, plan: PrecisionPlan, target: Target, out: Path) -> Artifact:
    graph = dataclasses.replace(source.graph, plan=plan)
    return tensorrt.build(graph, out, calibration=source.calibration, target=target)


def run(artifact: Artifact, image: np.ndarray) -> np.ndarray:
    with tensorrt.load(artifact) as runner:
        return runner({"input": image})["output"]


# ------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("target", "plan"), CASES, ids=[f"{t.name}-{p.precision}" for t, p in CASES])
def test_files_keep_the_rules_the_numbers_and_the_promise(
    name: str, target: Target, plan: PrecisionPlan, exported: dict[str, Exported], tmp_path: Path
) -> None:
    source = exported[name]
    assert tensorrt.supports(source.graph, target) == []
    artifact = built(source, plan, target, tmp_path / "out")
    model = onnx.load(artifact.path)
    assert _tensorrt_opset.current(model) <= (target.release.opset if target.release else 0)
    assert _tensorrt_rules.lint(model, target) == []
    got, peak = run(artifact, source.image), np.abs(source.wanted).max()
    assert np.abs(got - source.wanted).max() <= TOLERANCE[plan.precision] * peak
    found = tensorrt.inspect(artifact)
    assert set(found.layers.values()) == {plan.precision}
    assert found.int8_macs_share == found.int8_weight_share == (plan.precision == "int8")
    assert artifact.size_bytes == sum(file.stat().st_size for file in artifact.files)
    assert {file.name for file in artifact.files} == {"model.onnx", "build.json", "build_engine.py", "build_engine.sh"}
    promise = json.loads((tmp_path / "out" / "build.json").read_text())
    assert promise["layers"] == dict(found.layers)
    assert promise["weak"] == (target is not ORIN)
    assert serial.from_json(Artifact, serial.to_json(artifact)) == artifact


def test_plans_keep_to_what_the_target_has() -> None:
    assert [plan.precision for plan in tensorrt.plans(NANO, frozenset())] == ["fp32", "fp16"]
    assert [plan.precision for plan in tensorrt.plans(ORIN, frozenset())] == ["fp32", "fp16", "int8"]


def test_int8_is_not_built_for_the_jetson_nano(exported: dict[str, Exported], tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=r"tensorrt cannot build int8 .*it can build: fp32, fp16"):
        built(exported["residual"], INT8, NANO, tmp_path / "out")
    graph = dataclasses.replace(exported["residual"].graph, plan=INT8)
    with pytest.raises(errors.UsageError, match="needs calibration data"):
        tensorrt.build(graph, tmp_path / "out", calibration=None, target=ORIN)
    assert not (tmp_path / "out").exists()


def test_the_same_input_gives_the_same_bytes(exported: dict[str, Exported], tmp_path: Path) -> None:
    pair = [built(exported["residual"], INT8, ORIN, tmp_path / name) for name in "ab"]
    assert [file.read_bytes() for file in pair[0].files] == [file.read_bytes() for file in pair[1].files]


def test_kept_layers_are_fp16_and_their_sums_are_not_half_quantized(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    """conv2 in float: the sum behind it reads the float skip again, where the quantizer had put a Q/DQ pair."""
    kept = dataclasses.replace(INT8, float_layers=("1.conv2/Conv",))
    artifact = built(exported["residual"], kept, ORIN, tmp_path / "out")
    assert tensorrt.inspect(artifact).layers["1.conv2/Conv"] == "fp16"
    model = onnx.load(artifact.path)
    producers = {name: node for node in model.graph.node for name in node.output}
    made = {node.name: {producers[i].op_type for i in node.input if i in producers}
            for node in model.graph.node if node.op_type == "Add"}  # fmt: skip
    assert "DequantizeLinear" not in made["1/Add"]
    assert made["2/Add"] == {"DequantizeLinear", "Conv"}  # the sum joins the INT8 convolution before it


def test_the_twin_is_the_same_file_in_onnx_runtime(exported: dict[str, Exported], tmp_path: Path) -> None:
    artifact = built(exported["residual"], INT8, ORIN, tmp_path / "out")
    twin = tensorrt.twin(artifact)
    assert (twin.runtime, twin.path, twin.plan) == ("onnxruntime", artifact.path, artifact.plan)
    with onnxruntime.load(twin) as runner:
        assert np.array_equal(runner({"input": exported["residual"].image})["output"],
                              run(artifact, exported["residual"].image))  # fmt: skip


def test_a_transposed_convolution_with_groups_stays_in_float(tmp_path: Path) -> None:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.ConvTranspose2d(8, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2, groups=4)).eval()
    stage = Stage("up", module, (TensorSpec("input", (1, 8, 4, 4)),), (TensorSpec("output", (1, 8, 16, 16)),))
    graph = dataclasses.replace(onnx_graph.to_onnx(stage, tmp_path / "graph.onnx"), plan=INT8)
    np.save(tmp_path / "input.npy", np.random.default_rng(0).random((4, 8, 4, 4), dtype=np.float32))
    artifact = tensorrt.build(graph, tmp_path / "out", calibration=tmp_path, target=ORIN)
    assert tensorrt.inspect(artifact).layers == {"0/ConvTranspose": "int8", "1/ConvTranspose": "fp16"}
    axes = {a.i for node in onnx.load(artifact.path).graph.node if node.name.startswith("0.weight")
            for a in node.attribute if a.name == "axis"}  # fmt: skip
    assert axes == {1}


def test_an_fp16_overflow_is_kept_in_fp32(tmp_path: Path) -> None:
    """Calibration reaches the FP16 build too: what overflows there is promised, and written, as fp32."""
    import torch
    from torch import nn

    module = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 3, 1, bias=False)).eval()
    with torch.no_grad():
        module[0].weight.fill_(5e4)
        module[1].weight.fill_(1e-4)
    stage = Stage("loud", module, (TensorSpec("input", (1, 3, 4, 4)),), (TensorSpec("output", (1, 3, 4, 4)),))
    graph = dataclasses.replace(onnx_graph.to_onnx(stage, tmp_path / "graph.onnx"), plan=PrecisionPlan("fp16"))
    np.save(tmp_path / "input.npy", np.ones((2, 3, 4, 4), np.float32))
    with pytest.raises(errors.RuntimeFailed, match=r"promised fp16, layers are .'fp32'"):
        tensorrt.build(graph, tmp_path / "out", calibration=tmp_path, target=ORIN)


# ------------------------------------------------------------------------------------------------- rules of Q/DQ


def qdq(
    *, zero: int = 0, kind: type = np.int8, scale: Any = 0.1, axis: int = 0, weight: tuple[int, ...] = (4, 3, 3, 3),
    op: str = "Conv", bias: bool = False, plain: str = "", opset: int = 18, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    """One weighted layer with Q/DQ around it; `scale` is the weight's; `plain`: operand left without Q/DQ."""
    shape = {"Conv": (1, 3, 8, 8), "ConvTranspose": (1, weight[0], 8, 8)}.get(op, (1, weight[0]))
    if op == "Gemm" and attributes.get("transB"):
        shape = (1, weight[1])
    scales = np.atleast_1d(np.float32(scale))
    made = [numpy_helper.from_array(np.array(0.1, np.float32), "x_scale"),
            numpy_helper.from_array(np.array(zero, kind), "x_zero"),
            numpy_helper.from_array(scales if scales.size > 1 else scales[0], "w_scale"),
            numpy_helper.from_array(np.zeros(scales.shape if scales.size > 1 else (), np.int8), "w_zero"),
            numpy_helper.from_array(np.ones(weight, np.int8), "w_int"),
            numpy_helper.from_array(np.ones(weight, np.float32), "w_float")]  # fmt: skip
    nodes = [
        oh.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], "x/Q"),
        oh.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], "x/DQ"),
        oh.make_node("DequantizeLinear", ["w_int", "w_scale", "w_zero"], ["w_dq"], "w/DQ", axis=axis),
    ]
    inputs = ["x" if plain == "input" else "x_dq", "w_float" if plain == "weight" else "w_dq"]
    if bias:
        made += [numpy_helper.from_array(np.ones(weight[0], np.int8), "b_int")]
        nodes.append(oh.make_node("DequantizeLinear", ["b_int", "x_scale", "x_zero"], ["b"], "b/DQ"))
        inputs.append("b")
    nodes.append(oh.make_node(op, inputs, ["y"], "layer", **attributes))
    start = oh.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = oh.make_graph(nodes, "g", [start], [oh.make_tensor_value_info("y", TensorProto.FLOAT, None)], made)
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=8)


def told(model: onnx.ModelProto, target: Target = ORIN) -> list[str]:
    return [f"{p.op} {p.layer}: {p.rewrite}" for p in _tensorrt_rules.lint(model, target)]


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        pytest.param(qdq(zero=3), "QuantizeLinear x/Q: quantize symmetrically", id="zero point"),
        pytest.param(qdq(zero=128, kind=np.uint8), "QuantizeLinear x/Q: quantize to INT8, it is UINT8", id="unsigned"),
        pytest.param(qdq(scale=0.0), "DequantizeLinear w/DQ: its scale must be positive and finite, .* 0", id="zero"),
        pytest.param(qdq(scale=-1.0), "DequantizeLinear w/DQ: its scale must be positive .* -1", id="negative"),
        pytest.param(qdq(scale=np.inf), "DequantizeLinear w/DQ: its scale must be positive", id="infinite"),
        pytest.param(qdq(scale=np.nan), "DequantizeLinear w/DQ: its scale must be positive", id="nan"),
        pytest.param(qdq(scale=[0.1] * 3, axis=1), "Conv layer: put .* axis 0, .* axis 1", id="axis of Conv"),
        pytest.param(qdq(scale=[0.1] * 3, axis=0), "Conv layer: give its weight 4 scales, .* there are 3", id="count"),
        pytest.param(qdq(scale=[0.1] * 3, axis=0, weight=(3, 4, 2, 2), op="ConvTranspose"),
                     "ConvTranspose layer: put .* axis 1, .* axis 0", id="axis of ConvTranspose"),
        pytest.param(qdq(scale=[0.1] * 2, axis=1, weight=(4, 2, 2, 2), op="ConvTranspose", group=2),
                     "ConvTranspose layer: give the weight of a transposed convolution with groups one", id="groups"),
        pytest.param(qdq(scale=[0.1] * 6, axis=0, weight=(6, 5), op="Gemm"), "Gemm layer: put .* axis 1", id="Gemm"),
        pytest.param(qdq(scale=[0.1] * 6, axis=0, weight=(6, 5), op="MatMul"), "MatMul .* axis 1", id="MatMul"),
        pytest.param(qdq(plain="input"), "Conv layer: quantize its input too", id="input left"),
        pytest.param(qdq(plain="weight"), "Conv layer: quantize its weight too", id="weight left"),
        pytest.param(qdq(bias=True), "Conv layer: keep its bias in float", id="bias"),
        pytest.param(qdq(opset=21), "graph : is in opset 21, the parser of TensorRT 10.3 takes up to 20", id="opset"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named_with_its_cure(model: onnx.ModelProto, rule: str) -> None:
    assert any(re.match(rule, line) for line in told(model)), told(model)


@pytest.mark.parametrize(
    "model",
    [
        qdq(), qdq(scale=[0.1] * 4), qdq(scale=[0.1] * 4, axis=1, weight=(3, 4, 2, 2), op="ConvTranspose"),
        qdq(weight=(4, 2, 2, 2), op="ConvTranspose", group=2), qdq(scale=[0.1] * 5, axis=1, weight=(6, 5), op="Gemm"),
        qdq(scale=[0.1] * 6, weight=(6, 5), op="Gemm", transB=1),
        qdq(scale=[0.1] * 5, axis=-1, weight=(6, 5), op="MatMul"),
    ],
)  # fmt: skip
def test_what_keeps_the_rules_is_not_told(model: onnx.ModelProto) -> None:
    assert told(model) == []


def test_scales_in_fp16_need_opset_19_and_pairs_stay_pairs() -> None:
    model = qdq(opset=18)
    scale = next(t for t in model.graph.initializer if t.name == "x_scale")
    scale.CopyFrom(numpy_helper.from_array(np.array(0.1, np.float16), "x_scale"))
    assert any("needs opset 19, the file is in 18" in line for line in told(model))
    model = qdq()
    model.graph.node.append(oh.make_node("Identity", ["x_q"], ["z"], "reader"))
    assert "QuantizeLinear x/Q: let its result go through DequantizeLinear only" in told(model)
    model.graph.node[1].input[0] = "w_int"
    assert not any("follow a QuantizeLinear" in line for line in told(model))
    model = qdq()
    model.graph.input.append(oh.make_tensor_value_info("loose", TensorProto.INT8, (1, 3, 8, 8)))
    model.graph.node[1].input[0] = "loose"
    assert any("let it follow a QuantizeLinear" in line for line in told(model))


@pytest.mark.parametrize(("other", "right"), [("y", True), ("x_dq", True), ("x", False)])
def test_a_sum_reads_int8_on_both_sides_or_on_none(other: str, right: bool) -> None:
    """x_dq + (the INT8 layer's result or a quantized tensor) is right, x_dq + float is not."""
    model = qdq(weight=(3, 3, 1, 1))
    model.graph.node.append(oh.make_node("Add", ["x_dq", other], ["sum"], "sum"))
    assert (told(model) == []) == right
    if not right:
        _tensorrt_qdq.settle(model)
        assert told(model) == []
        assert list(model.graph.node[-1].input) == ["x", "x"]


def test_weights_as_floats_behind_q_and_dq_are_the_same_integers() -> None:
    rng = np.random.default_rng(0)
    model = qdq(scale=rng.uniform(1e-4, 1, 4).astype(np.float32), opset=17)
    integers = rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    next(t for t in model.graph.initializer if t.name == "w_int").CopyFrom(numpy_helper.from_array(integers, "w_int"))
    feeds = {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}
    before = session(model).run(None, feeds)[0]
    _tensorrt_qdq.pair_weights(model)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))
    assert told(model, XAVIER) == []
    assert numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w_int")).dtype == np.float32
    model.graph.output.append(oh.make_tensor_value_info("w_int/Q", TensorProto.INT8, integers.shape))
    after, stored = session(model).run(None, feeds)
    assert np.array_equal(stored, integers)
    assert np.allclose(before, after, rtol=1e-6, atol=1e-6)


def session(model: onnx.ModelProto) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
