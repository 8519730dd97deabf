"""Exact rewrites of ONNX graphs: the same outputs, fewer MACs, and left alone where they would not be exact."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgegen.rewrites.block_output import block_output
from edgegen.rewrites.merge_upsampling import merge_upsampling

ort = pytest.importorskip("onnxruntime")


def network(border: str, *, mode="asymmetric", scale=2.0, kernel=3, outputs=3, shared=False) -> onnx.ModelProto:
    """Resize, [Pad], Conv on (1, 4, 6, 8), seeded."""
    rng, size = np.random.default_rng(0), int(scale)
    weight = rng.normal(size=(outputs, 4, kernel, kernel)).astype(np.float32)
    constants = {"w": weight, "b": rng.normal(size=outputs).astype(np.float32),
                 "scales": np.array([1, 1, scale, scale], np.float32),
                 "amounts": np.array([0, 0, kernel // 2, kernel // 2] * 2, np.int64)}  # fmt: skip
    rounding = "floor" if mode == "asymmetric" else "round_prefer_floor"
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["up"], "up", mode="nearest", nearest_mode=rounding,
                              coordinate_transformation_mode=mode)]  # fmt: skip
    source, pads = "up", [kernel // 2] * 4
    if border != "zero":
        nodes.append(helper.make_node("Pad", ["up", "amounts"], ["padded"], "pad", mode=border))
        source, pads = "padded", [0] * 4
    nodes.append(helper.make_node("Conv", [source, "w", "b"], ["y"], "conv", pads=pads))
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs, 6 * size, 8 * size])]
    if shared:
        outs.append(helper.make_tensor_value_info("up", TensorProto.FLOAT, [1, 4, 6 * size, 8 * size]))
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 8])], outs,
                              [numpy_helper.from_array(v, k) for k, v in constants.items()])  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto) -> np.ndarray:
    """The first output on a seeded input."""
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).normal(size=(1, 4, 6, 8)).astype(np.float32)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def kinds(model: onnx.ModelProto) -> list[str]:
    """Operation types in order."""
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("mode", ["asymmetric", "half_pixel"])
@pytest.mark.parametrize("border", ["zero", "edge", "reflect"])
def test_merged_upsampling_gives_the_same_picture(border, mode):
    model = network(border, mode=mode)
    before = run(model)
    assert list(merge_upsampling(model)) == ["conv"]
    assert kinds(model) == (["ConvTranspose"] if border == "zero" else ["Pad", "ConvTranspose"])
    assert np.abs(run(model) - before).max() < 1e-5
    assert np.abs(2 * run(model) - before).max() > 1  # the comparison can fail
    assert [node.name for node in model.graph.node][-1] == "conv"


@pytest.mark.parametrize("options", [
    pytest.param({"border": "zero", "scale": 3.0}, id="x3"),
    pytest.param({"border": "zero", "kernel": 5}, id="5x5"),
    pytest.param({"border": "constant"}, id="zero Pad node"),
    pytest.param({"border": "zero", "shared": True}, id="enlarged image used elsewhere"),
])  # fmt: skip
def test_upsampling_that_cannot_be_merged_is_left(options):
    model = network(**options)
    before = model.SerializeToString()
    assert merge_upsampling(model) == {} and model.SerializeToString() == before


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize(("border", "kernel"), [("zero", 3), ("reflect", 9), ("edge", 5)])
def test_blocked_output_gives_the_same_picture(border, kernel, block):
    model = network(border, kernel=kernel)
    before = run(model)
    assert list(block_output(model, block=block)) == ["conv"]
    assert kinds(model)[-2:] == ["Conv", "DepthToSpace"]
    assert np.abs(run(model) - before).max() < 1e-4


@pytest.mark.parametrize("options", [{"outputs": 8}, {"kernel": 1}])
def test_output_that_gains_nothing_is_left(options):
    assert block_output(network("zero", **options)) == {}


def test_size_that_does_not_divide_is_left():
    assert block_output(network("zero"), block=5) == {}
