"""Rewrites of OpenVINO models: what the CPU plugin computes from them, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'edgegen[openvino]'")
from edgegen.runtimes import _ir  # noqa: E402

LEVELS, LOW, HIGH = 255, -2.0, 2.0


def mean_scaled_and_quantized(scale: np.ndarray, *, keep: bool) -> Any:
    """(1, 8, C) -> mean over the second axis, times a factor a channel, to 255 levels, summed."""
    from openvino import opset13 as opset

    x = opset.parameter([1, 8, scale.shape[-1]], np.float32, name="x")
    mean = opset.reduce_mean(x, np.array([1], np.int64), keep_dims=keep)
    limits = [opset.constant(np.float32(value)) for value in (LOW, HIGH, LOW, HIGH)]
    rounded = opset.fake_quantize(opset.multiply(mean, opset.constant(scale)), *limits, LEVELS)
    weight = opset.constant(np.ones((scale.shape[-1], 3), np.float32))
    return ov.Model([opset.result(opset.matmul(rounded, weight, False, False))], [x], "mean")


@pytest.mark.parametrize("keep", [False, True])
def test_a_mean_that_drops_axes_is_quantized_right(keep: bool) -> None:
    rng = np.random.default_rng(0)
    scale, x = (rng.uniform(0.1, 10, (1, 32)).astype(np.float32), rng.normal(size=(1, 8, 32)).astype(np.float32))
    model = _ir.keep_reduced(mean_scaled_and_quantized(scale, keep=keep))
    found = _ir.core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]
    step = (HIGH - LOW) / (LEVELS - 1)
    wanted = np.round((np.clip(x.mean(1) * scale, LOW, HIGH) - LOW) / step) * step + LOW
    assert np.allclose(found.reshape(-1), wanted.sum(), atol=1e-3)


def test_a_mean_keeps_its_name_and_shape() -> None:
    model = mean_scaled_and_quantized(np.ones((1, 4), np.float32), keep=False)
    before = {op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == "ReduceMean"}
    kept = _ir.keep_reduced(model)
    means = [op for op in kept.get_ops() if op.get_type_name() == "ReduceMean"]
    assert {op.get_friendly_name() for op in means} == before
    assert [list(op.output(0).shape) for op in means] == [[1, 1, 4]]
    assert list(kept.output(0).shape) == [1, 3]


def test_a_transposed_convolution_that_makes_the_output_bears_its_name(tmp_path: Path) -> None:
    """OpenVINO numbers it: a plan that leaves it in float would not find it."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'edgegen[torch]'")
    from edgegen import onnx_graph
    from edgegen.types import Stage, TensorSpec

    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 3, 2)).eval()
    specs = (TensorSpec("input", (1, 4, 8, 8)),), (TensorSpec("output", (1, 3, 7, 7)),)
    graph = onnx_graph.to_onnx(Stage("main", net, *specs), tmp_path / "float.onnx")
    kinds = {op.get_friendly_name(): op.get_type_name() for op in _ir.convert(graph.onnx).get_ops()}
    assert kinds["0/Conv"] == "Convolution" and kinds["2/ConvTranspose"] == "ConvolutionBackpropData"
    assert "2/ConvTranspose" in _ir.operations(_ir.convert(graph.onnx), ["2/ConvTranspose"])


@pytest.mark.parametrize("beside", [False, True], ids=["within", "weights beside it"])
def test_a_path_with_a_comma_is_one_file(tmp_path: Path, beside: bool) -> None:
    """OpenVINO's converter takes it for a list: every build of the file failed."""
    import onnx
    from onnx import helper, numpy_helper

    weight = np.arange(4096, dtype=np.float32).reshape(64, 64)
    told = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    graph = helper.make_graph(nodes, "g", told[:1], told[1:], [numpy_helper.from_array(weight, "w")])
    folder = tmp_path / "first, second"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"another one")
    file = folder / "one, not trained.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), file,
              save_as_external_data=beside, location="weights.bin", size_threshold=0)  # fmt: skip
    run = _ir.core().compile_model(_ir.convert(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = np.eye(64, dtype=np.float32)[3:4]
    assert np.array_equal(run([x])[0], weight[3:4])
