"""Export and cost of ONNX graphs: closed forms first, then what the files really contain."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from conftest import make_tiny
from onnx import helper, numpy_helper
from onnx_by_hand import IMAGE, network, onnx_file, ops, random

from edgegen import errors, onnx_graph
from edgegen.types import Stage, TensorSpec

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # FP32: sums in another order


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


@pytest.mark.parametrize(("indices", "kind"), [((0, 1, 2, 3), "Reshape"), ((0, 1, 3, 2), "Gather"), ((0, 1), "Gather")])
def test_a_gather_of_everything_in_order_is_a_reshape(indices: tuple[int, ...], kind: str) -> None:
    made = helper.make_model(helper.make_graph(
        [helper.make_node("Gather", ["input", "indices"], ["output"])], "g",
        [helper.make_tensor_value_info("input", 1, [4])],
        [helper.make_tensor_value_info("output", 1, [len(indices), 1])],
        [numpy_helper.from_array(np.array(indices)[:, None], "indices")],
    ), opset_imports=[helper.make_opsetid("", 18)])  # fmt: skip
    found = onnx_graph.simplify(made)
    assert [node.op_type for node in found.graph.node] == [kind]
    x = np.random.default_rng(0).random(4, dtype=np.float32)
    answer = onnx.reference.ReferenceEvaluator(found).run(None, {"input": x})[0]
    assert np.array_equal(answer[:, 0], x[list(indices)])


def test_torch_export_program_is_exported(tmp_path: Path) -> None:
    import torch

    stage = make_tiny("residual").stage
    program = torch.export.export(stage.module, (torch.zeros(1, 3, 16, 16),)).module()
    loaded = dataclasses.replace(stage, module=program)
    graph = onnx_graph.to_onnx(loaded, tmp_path / "a.onnx")
    assert onnx_graph.parity(stage, graph, {"input": random(1, 3, 16, 16)}, **TOLERANCE).max_abs < 1e-4


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
