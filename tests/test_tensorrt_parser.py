"""What TensorRT's parser and the DLA take, known without a device; older operator sets compute the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from onnx import TensorProto, numpy_helper
from test_tensorrt import qdq, session

from edgegen import targets
from edgegen.runtimes import _tensorrt_opset, _tensorrt_parser, tensorrt
from edgegen.types import Graph, Target, TensorSpec

ORIN, NANO, XAVIER, AGX = (targets.load(f"jetson-{name}") for name in ("orin-nano", "nano", "xavier-nx", "agx-orin"))

def net(
    *nodes: onnx.NodeProto, shape: tuple[int, ...] = (2, 6, 5, 4), opset: int = 18, out: int = 1, **constants: Any
) -> onnx.ModelProto:
    made = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    start = oh.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    ends = [oh.make_tensor_value_info(f"y{i}" if out > 1 else "y", TensorProto.FLOAT, None) for i in range(out)]
    graph = oh.make_graph(list(nodes), "g", [start], ends, made)
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.checker.check_model(inferred)
    return inferred


def node(op: str, inputs: str = "x", outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return oh.make_node(op, inputs.replace("-", "").split(" "), outputs.split(), f"the/{op}", **attributes)


SCALE = {"scale": np.linspace(0.5, 1.5, 4, dtype=np.float32), "bias": np.linspace(-1, 1, 4, dtype=np.float32)}


@pytest.mark.parametrize(
    ("model", "opset"),
    [
        pytest.param(net(node("ReduceMean", "x axes", keepdims=0), axes=np.array([2, 3])), 13, id="ReduceMean"),
        pytest.param(net(node("ReduceMax")), 13, id="ReduceMax of everything"),
        pytest.param(net(node("Split", "x", "y0 y1 y2", axis=1, num_outputs=3), out=3), 13, id="Split"),
        pytest.param(net(node("Pad", "x pads zero axes"), pads=np.array([1, 2, 0, 3]), zero=np.float32(2),
                         axes=np.array([-1, 1])), 13, id="Pad"),
        pytest.param(net(node("Reshape", "x to", allowzero=1), to=np.array([2, -1])), 13, id="Reshape"),
        pytest.param(net(node("LayerNormalization", "x scale bias", axis=-1, epsilon=1e-3), **SCALE), 13, id="norm"),
        pytest.param(net(node("LayerNormalization", "x scale", axis=3), scale=SCALE["scale"]), 17, id="norm at 17"),
        pytest.param(net(node("HardSwish")), 13, id="HardSwish"),
        pytest.param(net(node("Reciprocal")), 13, id="Reciprocal"),
        pytest.param(net(node("Mish")), 13, id="Mish"),
        pytest.param(net(node("Gelu"), opset=20), 13, id="Gelu"),
        pytest.param(net(node("Gelu", approximate="tanh"), opset=20), 17, id="Gelu by tanh"),
        pytest.param(net(node("AveragePool", kernel_shape=[2, 2], dilations=[1, 1]), opset=19), 13, id="AveragePool"),
        pytest.param(net(node("Cast", to=TensorProto.FLOAT, saturate=1), opset=19), 13, id="Cast"),
        pytest.param(net(node("Resize", "x - scales", mode="linear", antialias=0),
                         scales=np.array([1, 1, 2, 2], np.float32)), 13, id="Resize"),
    ],
)  # fmt: skip
def test_an_older_operator_set_computes_the_same(model: onnx.ModelProto, opset: int) -> None:
    refused = _tensorrt_parser.refused(NANO if opset == 13 else XAVIER)
    before = model.SerializeToString()
    lowered, problems = _tensorrt_opset.lower(model, opset, refused)
    assert problems == []
    assert model.SerializeToString() == before
    onnx.checker.check_model(lowered)
    assert _tensorrt_opset.current(lowered) == opset
    assert not refused & {n.op_type for n in lowered.graph.node}
    feeds = {"x": np.random.default_rng(0).uniform(0.5, 2, (2, 6, 5, 4)).astype(np.float32)}
    for a, b in zip(session(model).run(None, feeds), session(lowered).run(None, feeds), strict=True):
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)
        assert not np.allclose(2 * a + 1, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "op", "cure"),
    [
        pytest.param(net(node("GridSample", "x grid"), grid=np.zeros((2, 5, 4, 2), np.float32)), "GridSample",
                     "opset 13, which has no GridSample", id="absent"),
        pytest.param(net(node("ReduceMean", "x axes", noop_with_empty_axes=1), axes=np.array([], np.int64)),
                     "ReduceMean", "opset 13 does not have", id="attribute"),
        pytest.param(net(node("Resize", "x - scales", mode="linear", antialias=1),
                         scales=np.array([1, 1, 0.5, 0.5], np.float32)), "Resize", "antialias", id="antialias"),
    ],
)  # fmt: skip
def test_what_cannot_be_lowered_is_told(model: onnx.ModelProto, op: str, cure: str) -> None:
    _, problems = _tensorrt_opset.lower(model, 13, ())
    assert [(p.op, p.layer) for p in problems] == [(op, f"the/{op}")]
    assert cure in problems[0].rewrite


def graph_of(model: onnx.ModelProto, folder: Path) -> Graph:
    onnx.save(model, folder / "net.onnx")
    return Graph("net", folder / "net.onnx", (TensorSpec("x", (2, 6, 5, 4)),), (TensorSpec("y", ()),))


@pytest.mark.parametrize(
    ("model", "target", "problem"),
    [
        pytest.param(net(node("Det"), shape=(2, 3, 3)), ORIN, "Det", id="never"),
        pytest.param(net(node("GridSample", "x grid"), grid=np.zeros((2, 5, 4, 2), np.float32)), NANO, "GridSample",
                     id="not in 8.2"),
        pytest.param(net(node("GridSample", "x grid"), grid=np.zeros((2, 5, 4, 2), np.float32)), XAVIER, "",
                     id="in 8.5"),
        pytest.param(net(node("LayerNormalization", "x scale bias"), **SCALE), XAVIER, "", id="rewritten for 8.5"),
        pytest.param(net(node("Resize", "x - scales", mode="cubic"), scales=np.array([1, 1, 2, 2], np.float32)), ORIN,
                     "Resize", id="cubic"),
        pytest.param(net(node("MaxPool", "x", "y i", kernel_shape=[2, 2])), ORIN, "MaxPool", id="indices"),
        pytest.param(net(node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])), ORIN, "MaxPool", id="dilated"),
        pytest.param(net(node("HardSwish")), NANO, "", id="rewritten for 8.2"),
    ],
)  # fmt: skip
def test_supports_knows_the_parser_of_the_target(
    model: onnx.ModelProto, target: Target, problem: str, tmp_path: Path
) -> None:
    found = tensorrt.supports(graph_of(model, tmp_path), target)
    assert [p.op for p in found] == ([problem] if problem else [])
    assert all(p.layer == f"the/{p.op}" and p.rewrite for p in found)


def test_an_operator_of_nobody_is_refused(tmp_path: Path) -> None:
    model = net(node("Relu"))
    model.graph.node[0].op_type, model.graph.node[0].domain = "Frobnicate", "nowhere"
    model.opset_import.append(oh.make_opsetid("nowhere", 1))
    assert [p.op for p in tensorrt.supports(graph_of(model, tmp_path), ORIN)] == ["nowhere.Frobnicate"]


@pytest.mark.parametrize(
    ("version", "opset"), [("8.2.1", 13), ("8.5.2", 17), ("10.3", 20), ("10.15.1", 24), ("10.16", 24), ("11.4.1", 25)]
)
def test_the_newest_operator_set_of_a_version(version: str, opset: int) -> None:
    assert _tensorrt_parser.opset(Target("t", "", ("tensorrt",), versions={"tensorrt": version})) == opset


@pytest.mark.parametrize("name", ["orin-nano", "orin-nx", "agx-orin", "nano", "xavier-nx", "thor"])
def test_the_jetpack_tables_agree_with_the_parser(name: str) -> None:
    for entry in targets.load(f"jetson-{name}").jetpack:
        alone = Target("t", "", ("tensorrt",), versions={"tensorrt": entry.tensorrt})
        assert _tensorrt_parser.opset(alone) == entry.opset


# -------------------------------------------------------------------------------------------------------------- DLA


def conv(weight: tuple[int, ...], op: str = "Conv", **attributes: Any) -> onnx.ModelProto:
    shape = (1, weight[1] * attributes.get("group", 1) if op == "Conv" else weight[0], 64, 64)
    return net(node(op, "x w", **attributes), shape=shape, w=np.zeros(weight, np.float32))


@pytest.mark.parametrize(
    ("model", "cure"),
    [
        pytest.param(conv((8, 8, 3, 3), pads=[1, 1, 1, 1]), "", id="a plain convolution"),
        pytest.param(conv((8, 1, 3, 3), group=8), "", id="a depthwise one"),
        pytest.param(conv((8, 8, 33, 3)), "kernels of 1 to 32, it is (33, 3)", id="kernel"),
        pytest.param(conv((8, 8, 3, 3), strides=[9, 9]), "strides of 1 to 8, they are (9, 9)", id="stride"),
        pytest.param(conv((8, 8, 3, 3), pads=[32, 0, 0, 0]), "paddings of 0 to 31", id="padding"),
        pytest.param(conv((8, 8, 2, 2), op="ConvTranspose", strides=[2, 2]), "", id="a transposed convolution"),
        pytest.param(conv((8, 8, 4, 4), op="ConvTranspose", strides=[2, 2], pads=[1, 1, 1, 1]), "no padding",
                     id="padded"),
        pytest.param(conv((8, 2, 2, 2), op="ConvTranspose", group=4), "without groups", id="groups"),
        pytest.param(net(node("MaxPool", kernel_shape=[9, 9]), shape=(1, 4, 32, 32)), "windows of 1 to 8", id="pool"),
        pytest.param(net(node("Concat", "x x", axis=2)), "channel axis", id="concat"),
        pytest.param(net(node("Concat", "x x", axis=1)), "", id="concat of channels"),
        pytest.param(net(node("Resize", "x - scales", mode="nearest", coordinate_transformation_mode="asymmetric"),
                         scales=np.array([1, 1, 2, 2], np.float32)), "", id="twice"),
        pytest.param(net(node("Resize", "x - scales", mode="linear"), scales=np.array([1, 1, 1.5, 1.5], np.float32)),
                     "whole factors of 1 to 4", id="one and a half"),
        pytest.param(net(node("LayerNormalization", "x scale bias"), **SCALE), "batch normalization", id="norm"),
        pytest.param(net(node("Relu"), shape=(1, 4, 9000, 4)), "at most 8192", id="size"),
        pytest.param(net(node("DepthToSpace", blocksize=2), shape=(1, 8, 4, 4)), "by a transposed conv", id="d2s"),
        pytest.param(net(node("Add", "x x"), shape=(1, 8, 4, 4)), "", id="sum"),
        pytest.param(net(node("Transpose", perm=[1, 0, 2, 3])), "the batch first", id="transpose"),
        pytest.param(net(node("Erf")), "ReLU instead of GELU", id="gelu"),
        pytest.param(qdq(), "it takes no Q/DQ before TensorRT 11.4", id="qdq"),
    ],
)  # fmt: skip
def test_what_keeps_a_layer_off_the_dla(model: onnx.ModelProto, cure: str) -> None:
    found = tensorrt.dla(model, AGX)
    assert [cure in problem.rewrite for problem in found] == ([True] if cure else [])


def test_dla_is_reported_only_where_there_is_one() -> None:
    model, pooled = conv((8, 8, 40, 40)), net(node("Softmax"))
    assert tensorrt.dla(model, AGX)
    newer = dataclasses.replace(AGX, versions={**AGX.versions, "jetpack": "7.2"})
    for target in (ORIN, NANO, newer, targets.load("jetson-thor"), targets.load("nvidia-t4")):
        assert tensorrt.dla(model, target) == []
    assert tensorrt.dla(pooled, AGX) == []
    assert "only Orin" in tensorrt.dla(pooled, XAVIER)[0].rewrite
