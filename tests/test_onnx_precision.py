"""FP16 and Q/DQ files: what is narrow in them, what stays whole, and what they refuse."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_by_hand import IMAGE, graph_of, network, onnx_file, random

from edgegen import errors, onnx_fp16, onnx_graph, onnx_qdq
from edgegen.types import PrecisionPlan, Stage, TensorSpec

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
    step = samples.max() / 127 if form.startswith("s8") else (samples.max() - 0) / 255
    assert held["input_scale"] == pytest.approx(step, rel=1e-5)
    points = [value for name, value in held.items() if name.endswith("_zero_point") and "bias" not in name]
    if form.startswith("s8"):
        assert all(not value.any() and value.dtype == np.int8 for value in points)
    weight = scales(graph.onnx)["1.conv1.weight"]
    levels = 127 if form.endswith("s8") else 64
    per_channel = np.abs(weight).max(axis=(1, 2, 3)) / levels
    assert np.abs(held["1.conv1.weight_quantized"].astype(int)).max() == levels
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
