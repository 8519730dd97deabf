"""Export, cost, FP16 and Q/DQ of ONNX graphs: closed forms first, then what the files really contain."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_tiny
from onnx import TensorProto, helper, numpy_helper

from edgegen import errors, onnx_fp16, onnx_graph, onnx_qdq
from edgegen.types import Graph, PrecisionPlan, Stage, TensorSpec

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # FP32: sums in another order
IMAGE = TensorSpec("input", (1, 3, 16, 16))


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def onnx_file(
    path: Path, nodes: list[Any], weights: dict[str, Any], inputs: dict[str, Any], outputs: list[str]
) -> Path:
    """A hand-made ONNX file; output shapes are left to inference."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), path)
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def graph_of(path: Path, *inputs: TensorSpec) -> Graph:
    return Graph("hand", path, inputs, (TensorSpec("output", ()),))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Stage, Graph]]:
    """The three tiny models, with the output of a module that is left in training mode exactly as it was."""
    found = {}
    for name in ("conv_chain", "residual", "depthwise_generator"):
        stage = make_tiny(name).stage
        found[name] = (stage, onnx_graph.to_onnx(stage, tmp_path_factory.mktemp(name) / "graph.onnx"))
    return found


# ---------------------------------------------------------------------------------------------------------- cost


@dataclasses.dataclass(frozen=True)
class Counted:
    """A node, the shapes of its input and weight, and its MACs by hand."""

    op: str
    attributes: dict[str, Any]
    given: tuple[int, ...]
    weight: tuple[int, ...]
    macs: int


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Counted("Conv", {"strides": [2, 2], "pads": [1, 1, 1, 1]}, (1, 3, 8, 8), (5, 3, 3, 3),
                             5 * 4 * 4 * 3 * 9), id="conv, stride 2"),
        pytest.param(Counted("Conv", {"group": 6}, (2, 6, 8, 8), (6, 1, 3, 3), 2 * 6 * 6 * 6 * 9), id="depthwise"),
        pytest.param(Counted("ConvTranspose", {"strides": [2, 2]}, (1, 4, 5, 5), (4, 3, 2, 2),
                             25 * 4 * 3 * 4), id="transposed"),
        pytest.param(Counted("ConvTranspose", {"group": 2}, (1, 4, 5, 5), (4, 3, 2, 2), 25 * 4 * 3 * 4), id="grouped"),
        pytest.param(Counted("Gemm", {"transB": 1}, (7, 11), (13, 11), 7 * 11 * 13), id="gemm"),
        pytest.param(Counted("Gemm", {"transA": 1}, (11, 7), (11, 13), 7 * 11 * 13), id="gemm, first transposed"),
        pytest.param(Counted("MatMul", {}, (2, 5, 7), (7, 3), 2 * 5 * 7 * 3), id="matmul"),
    ],
)  # fmt: skip
def test_macs_are_those_of_the_closed_form(case: Counted, tmp_path: Path) -> None:
    node = helper.make_node(case.op, ["input", "w"], ["output"], name="only", **case.attributes)
    path = onnx_file(tmp_path / "a.onnx", [node], {"w": random(*case.weight)}, {"input": case.given}, ["output"])
    found = onnx_graph.cost(path)
    assert (found.macs, found.params) == (case.macs, int(np.prod(case.weight)))
    assert [(layer.name, layer.op, layer.weight) for layer in found.layers] == [("only", case.op, "w")]


def test_cost_of_a_network_is_the_sum_by_hand(exported: Any) -> None:
    graph = exported["conv_chain"][1]
    by_hand = {"0/Conv": 16 * 256 * 27, "3/Conv": 32 * 64 * 144, "6/Conv": 32 * 64 * 288, "10/Gemm": 320}
    assert {layer.name: layer.macs for layer in onnx_graph.cost(graph.onnx).layers} == by_hand
    assert graph.macs == sum(by_hand.values())
    assert graph.params == 16 * 28 + 32 * 145 + 32 * 289 + 330  # batch norms are inside weights and biases


def test_cost_asks_for_static_shapes(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["input", "w"], ["output"], name="only")
    path = onnx_file(tmp_path / "a.onnx", [node], {"w": random(4, 3, 3, 3)}, {"input": ["n", 3, 8, 8]}, ["output"])
    with pytest.raises(ValueError, match="Conv 'only': shape of 'input' is not static"):
        onnx_graph.cost(path)


# -------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", ["conv_chain", "residual", "depthwise_generator"])
def test_export_answers_as_torch_does(name: str, exported: Any) -> None:
    stage, graph = exported[name]
    feeds = [{"input": np.random.default_rng(i).random((1, 3, 16, 16), dtype=np.float32)} for i in range(3)]
    found = onnx_graph.parity(stage, graph, feeds, **TOLERANCE)
    assert 0 <= found.max_abs < 1e-4
    assert "BatchNormalization" not in ops(graph.onnx)
    assert [o.shape for o in graph.outputs] == [o.shape for o in stage.outputs]


@pytest.mark.parametrize("factor", [2.0, 0.0], ids=["doubled", "zeros"])
def test_parity_can_fail(factor: float, exported: Any, tmp_path: Path) -> None:
    stage, graph = exported["residual"]
    model = onnx.load(graph.onnx)
    last = model.graph.node[-1]
    for tensor in model.graph.initializer:
        if tensor.name in last.input:
            tensor.CopyFrom(numpy_helper.from_array(factor * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    wrong = dataclasses.replace(graph, onnx=tmp_path / "wrong.onnx")
    with pytest.raises(errors.RuntimeFailed, match=r"main: output 'output' of the ONNX file differs from the model by"):
        onnx_graph.parity(stage, wrong, {"input": random(1, 3, 16, 16)}, atol=1e-2, rtol=0.4)


def test_nodes_are_named_after_modules(exported: Any) -> None:
    names = [node.name for node in onnx.load(exported["residual"][1].onnx).graph.node]
    assert names == [
        "0/Conv", "1.conv1/Conv", "1.act/Relu", "1.conv2/Conv", "1/Add",
        "2.conv1/Conv", "2.act/Relu", "2.conv2/Conv", "2/Add", "3/Conv",
    ]  # fmt: skip


def test_same_module_same_bytes(exported: Any, tmp_path: Path) -> None:
    for name, (_, graph) in exported.items():
        again = onnx_graph.to_onnx(make_tiny(name).stage, tmp_path / f"{name}.onnx")
        assert again.sha256 == graph.sha256


def test_file_tells_nothing_about_its_making(exported: Any) -> None:
    model = onnx.load(exported["conv_chain"][1].onnx)
    text = re.sub(rb"[^ -~]+", b"\n", model.SerializeToString())
    assert b"torch" not in text and b".py" not in text
    assert (model.producer_name, model.producer_version, list(model.metadata_props)) == ("edgegen", "", [])


def test_export_leaves_modes_and_weights_as_they_were(exported: Any, tmp_path: Path) -> None:
    stage = make_tiny("conv_chain").stage
    stage.module.train()
    stage.module[1].eval()
    before = {name: value.clone() for name, value in stage.module.state_dict().items()}
    graph = onnx_graph.to_onnx(stage, tmp_path / "graph.onnx")
    assert graph.sha256 == exported["conv_chain"][1].sha256  # exported in eval mode
    assert [part.training for part in stage.module] == [i != 1 for i in range(len(stage.module))]
    assert all(before[name].equal(value) for name, value in stage.module.state_dict().items())


def network(kind: str) -> Any:
    import torch
    from torch import nn

    class Shared(nn.Module):
        """One LayerNorm and one linear used twice, GELU between, attention by matrix products of activations."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            for _ in range(2):
                x = x + nn.functional.gelu(self.mix(self.norm(x)))
            return x + torch.softmax(x @ x.transpose(1, 2), -1) @ x

    class Style(nn.Module):
        """Reflection padding, affine InstanceNorm, nearest upsampling, transposed convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.pad, self.conv, self.norm = (
                nn.ReflectionPad2d(1),
                nn.Conv2d(3, 8, 3),
                nn.InstanceNorm2d(8, affine=True),
            )
            self.up, self.deconv = nn.Upsample(scale_factor=2), nn.ConvTranspose2d(8, 3, 2, 2)

        def forward(self, x: Any) -> Any:
            return self.deconv(self.up(torch.relu(self.norm(self.conv(self.pad(x))))))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"shared": Shared, "style": Style}[kind]().eval()


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    spec = TensorSpec("input", (1, 4, 8))
    stage = Stage("shared", network("shared"), (spec,), (TensorSpec("output", (1, 4, 8)),))
    graph = onnx_graph.to_onnx(stage, tmp_path / "a.onnx")
    onnx_graph.parity(stage, graph, {"input": random(1, 4, 8)}, **TOLERANCE)
    shapes = [tuple(t.dims) for t in onnx.load(graph.onnx).graph.initializer]
    assert shapes.count((8, 8)) == 1
    assert graph.macs == 2 * 4 * 8 * 8 + 2 * 4 * 4 * 8
    names = [layer.name for layer in onnx_graph.cost(graph.onnx).layers]
    assert names == ["mix/MatMul", "mix/MatMul_1", "/MatMul", "/MatMul_1"]


def test_gelu_is_fused_by_onnx_runtime(tmp_path: Path) -> None:
    import onnxruntime

    spec = TensorSpec("input", (1, 4, 8))
    stage = Stage("shared", network("shared"), (spec,), (TensorSpec("output", (1, 4, 8)),))
    graph = onnx_graph.to_onnx(stage, tmp_path / "a.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(graph.onnx), options)
    assert "Erf" in ops(graph.onnx)
    assert "Erf" not in ops(tmp_path / "optimized.onnx")


def test_torch_export_program_is_exported(tmp_path: Path) -> None:
    import torch

    stage = make_tiny("residual").stage
    program = torch.export.export(stage.module, (torch.zeros(1, 3, 16, 16),)).module()
    loaded = dataclasses.replace(stage, module=program)
    graph = onnx_graph.to_onnx(loaded, tmp_path / "a.onnx")
    onnx_graph.parity(stage, graph, {"input": random(1, 3, 16, 16)}, **TOLERANCE)


def test_impossible_exports_are_one_line(tmp_path: Path) -> None:
    stage, out = make_tiny("residual").stage, tmp_path / "a.onnx"
    free = dataclasses.replace(stage, inputs=(TensorSpec("input", ("n", 3, 16, 16)),))
    with pytest.raises(errors.ModelError, match=r"main: shape of input 'input' must be fixed to export, got \('n'"):
        onnx_graph.to_onnx(free, out)
    grey = dataclasses.replace(stage, inputs=(TensorSpec("input", (1, 1, 16, 16)),))
    with pytest.raises(errors.ModelError, match=r"main: cannot be exported to ONNX: [^\n]*$"):
        onnx_graph.to_onnx(grey, out)
    small = dataclasses.replace(stage, outputs=(TensorSpec("output", (1, 3, 8, 8)),))
    with pytest.raises(errors.ModelError, match=r"output 'output' is \(1, 3, 16, 16\), its record says \(1, 3, 8, 8\)"):
        onnx_graph.to_onnx(small, out)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ from file


def test_onnx_file_becomes_static_and_simple(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "one", "zero", "zero", "one"], ["b"], name="norm"),
        helper.make_node("Shape", ["b"], ["s"]),
        helper.make_node("Reshape", ["b", "s"], ["output"]),
    ]
    weights = {"w": random(4, 3, 3, 3), "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32)}
    path = onnx_file(tmp_path / "a.onnx", nodes, weights, {"input": ["n", 3, "h", "w"]}, ["output"])
    stage = Stage("file", None, (IMAGE,), (TensorSpec("output", (1, 4, 14, 14)),), path)
    graph = onnx_graph.to_onnx(stage, tmp_path / "out.onnx")
    assert (ops(graph.onnx), graph.macs) == (["Conv"], 4 * 14 * 14 * 27)
    onnx_graph.parity(stage, graph, {"input": random(1, 3, 16, 16)}, atol=1e-4, rtol=1e-4)


def test_bad_onnx_files_are_one_line(exported: Any, tmp_path: Path) -> None:
    stage, graph = exported["residual"]
    half, empty, text = tmp_path / "half.onnx", tmp_path / "empty.onnx", tmp_path / "text.onnx"
    whole = graph.onnx.read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    text.write_text("this is no network")
    for path in (half, empty, text, tmp_path / "absent.onnx"):
        with pytest.raises(errors.ModelError, match=rf"{path.name}: not a valid ONNX model \([^\n]*\)$"):
            onnx_graph.to_onnx(dataclasses.replace(stage, module=None, onnx=path), tmp_path / "out.onnx")
    other = dataclasses.replace(stage, module=None, onnx=graph.onnx, inputs=(TensorSpec("image", (1, 3, 16, 16)),))
    with pytest.raises(errors.ModelError, match=r"its inputs are \['input'\], asked for \['image'\]"):
        onnx_graph.to_onnx(other, tmp_path / "out.onnx")
    misfit = dataclasses.replace(stage, module=None, onnx=graph.onnx, inputs=(TensorSpec("input", (1, 5, 16, 16)),))
    with pytest.raises(errors.ModelError, match=r"Conv '0/Conv' takes 3 channels, its input has 5"):
        onnx_graph.to_onnx(misfit, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


# ----------------------------------------------------------------------------------------------------------- fp16


def test_fp16_has_half_weights_and_whole_ends(exported: Any, tmp_path: Path) -> None:
    stage, graph = exported["residual"]
    half = onnx_graph.to_fp16(graph, tmp_path / "half.onnx")
    model = onnx.load(half.onnx)
    assert {t.data_type for t in model.graph.initializer} == {TensorProto.FLOAT16}
    assert {e.type.tensor_type.elem_type for e in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}
    assert half.plan == PrecisionPlan("fp16")
    assert half.onnx.stat().st_size < 0.65 * graph.onnx.stat().st_size
    onnx_graph.parity(stage, half, {"input": random(1, 3, 16, 16)}, atol=0, rtol=4e-3)
    assert onnx_graph.to_fp16(graph, tmp_path / "again.onnx").sha256 == half.sha256


def test_fp16_keeps_normalisation_and_named_layers_whole(tmp_path: Path) -> None:
    stage = Stage("style", network("style"), (IMAGE,), (TensorSpec("output", (1, 3, 64, 64)),))
    graph = onnx_graph.to_onnx(stage, tmp_path / "a.onnx")
    plan = PrecisionPlan("fp16", float_layers=("conv/Conv",))
    half = onnx_graph.to_fp16(dataclasses.replace(graph, plan=plan), tmp_path / "half.onnx")
    kinds = {t.name: t.data_type for t in onnx.load(half.onnx).graph.initializer}
    for node in onnx.load(half.onnx).graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "InstanceNormalization"):
            wanted = TensorProto.FLOAT16 if node.op_type == "ConvTranspose" else TensorProto.FLOAT
            assert {kinds[name] for name in node.input[1:]} == {wanted}, node.name
    onnx_graph.parity(stage, half, {"input": random(1, 3, 16, 16)}, atol=0, rtol=1e-2)


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["input", "big"], ["output"], name="m")
    path = onnx_file(tmp_path / "a.onnx", [node], {"big": np.array([1e6], np.float32)}, {"input": [1, 4]}, ["output"])
    with pytest.raises(errors.ModelError, match=r"weight 'big' reaches 1e\+06, FP16 ends at 65504"):
        onnx_fp16.to_fp16(graph_of(path, TensorSpec("input", (1, 4))), tmp_path / "out.onnx")


# ------------------------------------------------------------------------------------------------------------ qdq


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    np.save(folder / "input.npy", np.random.default_rng(1).random((8, 3, 16, 16), dtype=np.float32))
    return folder


def scales(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_ranges_are_minimum_and_maximum_of_the_samples(calibration: Path, tmp_path: Path) -> None:
    node = helper.make_node("Neg", ["input"], ["output"], name="n")
    path = onnx_file(tmp_path / "a.onnx", [node], {}, {"input": [1, 3, 16, 16]}, ["output"])
    low, high = (float(f(np.load(calibration / "input.npy"))) for f in (np.min, np.max))
    found = onnx_qdq.ranges(graph_of(path, IMAGE), calibration, ["input", "output"])
    assert found == {"input": (low, high), "output": (-high, -low)}


def test_batches_are_cut_from_the_samples(calibration: Path) -> None:
    feeds = list(onnx_qdq.calibration_feeds((TensorSpec("input", (3, 3, 16, 16)),), calibration))
    assert [feed["input"].shape for feed in feeds] == [(3, 3, 16, 16)] * 2
    assert np.array_equal(feeds[1]["input"], np.load(calibration / "input.npy")[3:6])
    with pytest.raises(errors.DataError, match="8 calibration samples do not fill a batch of 9"):
        list(onnx_qdq.calibration_feeds((TensorSpec("input", (9, 3, 16, 16)),), calibration))


@pytest.mark.parametrize("placement", onnx_qdq.PLACEMENTS)
@pytest.mark.parametrize("form", onnx_qdq.FORMATS)
def test_scales_are_those_of_the_format(
    form: str, placement: str, exported: Any, calibration: Path, tmp_path: Path
) -> None:
    stage, graph = exported["residual"]
    plan = PrecisionPlan("int8", form)
    quantized = onnx_graph.insert_qdq(
        graph, tmp_path / "q.onnx", calibration=calibration, plan=plan, placement=placement
    )
    held = scales(quantized.onnx)
    samples = np.load(calibration / "input.npy")
    step = samples.max() / 127 if form == "s8s8" else (samples.max() - 0) / 255
    assert held["input_scale"] == pytest.approx(step, rel=1e-5)
    points = [value for name, value in held.items() if name.endswith("_zero_point") and "bias" not in name]
    if form == "s8s8":
        assert all(not value.any() and value.dtype == np.int8 for value in points)
    weight = scales(graph.onnx)["1.conv1.weight"]
    per_channel = np.abs(weight).max(axis=(1, 2, 3)) / 127
    assert held["1.conv1.weight_scale"] == pytest.approx(per_channel, rel=1e-5)
    restored = held["1.conv1.weight_quantized"] * held["1.conv1.weight_scale"][:, None, None, None]
    assert np.abs(restored - weight).max() <= per_channel.max() / 2 + 1e-7
    onnx_graph.parity(stage, quantized, {"input": samples[:1]}, atol=0, rtol=0.2)
    assert quantized.plan == plan


def test_tensorrt_placement_leaves_biases_and_results_float(exported: Any, calibration: Path, tmp_path: Path) -> None:
    plan = PrecisionPlan("int8", "s8s8", rest="fp16")
    stage, graph = exported["residual"]
    wide = onnx_graph.insert_qdq(graph, tmp_path / "q.onnx", calibration=calibration, plan=plan, placement="tensorrt")
    model = onnx.load(wide.onnx)
    assert not [t.name for t in model.graph.initializer if t.data_type == TensorProto.INT32]
    assert model.graph.node[-1].op_type == "Conv"  # the graph's output is not rounded to 8 bits
    half = onnx_graph.to_fp16(wide, tmp_path / "half.onnx")
    kinds = {t.data_type for t in onnx.load(half.onnx).graph.initializer}
    assert kinds == {TensorProto.INT8, TensorProto.FLOAT16}
    onnx_graph.parity(stage, half, {"input": np.load(calibration / "input.npy")[:1]}, atol=0, rtol=0.2)


def test_style_network_keeps_normalisation_between_float(calibration: Path, tmp_path: Path) -> None:
    stage = Stage("style", network("style"), (IMAGE,), (TensorSpec("output", (1, 3, 64, 64)),))
    model = onnx.load(onnx_graph.to_onnx(stage, tmp_path / "a.onnx").onnx)
    plan = PrecisionPlan("int8", "u8s8")
    assert onnx_qdq.quantized_nodes(model, plan) == ["conv/Conv"]
    assert onnx_qdq.quantized_nodes(model, plan, placement="tensorrt") == ["conv/Conv", "deconv/ConvTranspose"]


def test_gelu_is_not_cut_by_qdq(calibration: Path, tmp_path: Path) -> None:
    spec = TensorSpec("input", (1, 4, 8))
    stage = Stage("shared", network("shared"), (spec,), (TensorSpec("output", (1, 4, 8)),))
    graph = onnx_graph.to_onnx(stage, tmp_path / "a.onnx")
    np.save(tmp_path / "input.npy", random(8, 4, 8))
    plan = PrecisionPlan("int8", "u8s8")
    assert onnx_qdq.quantized_nodes(onnx.load(graph.onnx), plan) == [
        "mix/MatMul", "mix/MatMul_1", "/MatMul", "/MatMul_1",
    ]  # fmt: skip
    quantized = onnx_graph.insert_qdq(graph, tmp_path / "q.onnx", calibration=tmp_path, plan=plan)
    onnx_graph.parity(stage, quantized, {"input": np.load(tmp_path / "input.npy")[:1]}, atol=0, rtol=0.1)


def test_unusable_requests_are_refused(exported: Any, calibration: Path, tmp_path: Path) -> None:
    graph, out = exported["conv_chain"][1], tmp_path / "q.onnx"
    plan = PrecisionPlan("int8", "u8s8")
    with pytest.raises(errors.UsageError, match="unknown Q/DQ format 'u4'; there are: u8s8, s8s8"):
        onnx_graph.insert_qdq(graph, out, calibration=calibration, plan=PrecisionPlan("int8", "u4"))
    with pytest.raises(errors.UsageError, match="unknown Q/DQ placement 'moon'; there are: onnxruntime, tensorrt"):
        onnx_graph.insert_qdq(graph, out, calibration=calibration, plan=plan, placement="moon")
    once = onnx_graph.insert_qdq(graph, out, calibration=calibration, plan=plan)
    with pytest.raises(errors.RuntimeFailed, match="the graph is already quantized"):
        onnx_graph.insert_qdq(once, tmp_path / "r.onnx", calibration=calibration)


MEMORY = """
import re, sys
from pathlib import Path
from edgegen import onnx_qdq
from edgegen.types import Graph, TensorSpec
folder = Path(sys.argv[1])
graph = Graph("memory", folder / "a.onnx", (TensorSpec("input", (1, 3, 256, 256)),), ())
peaks = []
for calibration in (folder / "few", folder / "many"):
    onnx_qdq.ranges(graph, calibration, [f"t{i}" for i in range(8)])
    # not ru_maxrss: a new process starts with its parent's
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
print(*peaks)
"""


def test_calibration_memory_does_not_grow_with_samples(tmp_path: Path) -> None:
    """Eight convolutions of 16 channels at 256x256: 32 MiB of activations a sample, 64 samples, a few MiB of growth."""
    nodes = [
        helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"c{i}", pads=[1, 1, 1, 1]) for i in range(8)
    ]
    nodes[0].input[0] = "input"
    nodes.insert(0, helper.make_node("Abs", ["input"], ["t0"], name="a"))
    weights = {f"w{i}": random(16, 3 if i == 0 else 16, 3, 3) / 12 for i in range(8)}
    onnx_file(tmp_path / "a.onnx", nodes, weights, {"input": [1, 3, 256, 256]}, ["t8"])
    for name, count in (("few", 2), ("many", 64)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "input.npy", np.ones((count, 3, 256, 256), np.float32))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    few, many = (int(word) for word in done.stdout.split())
    page_cache_of_the_samples = 64 * 3 * 256 * 256 * 4  # memory-mapped pages count as resident, and can be dropped
    assert many - few < page_cache_of_the_samples + 32 * 2**20
    assert many < 2**30
