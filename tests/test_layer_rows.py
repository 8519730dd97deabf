"""The layers of a built network: work by hand, times from the runtimes' own counters, promises kept or not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import bundles_for_devices
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgegen import layer_rows, measuring, registry, serial, targets
from edgegen.bundle import read
from edgegen.report import html, schema
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Target


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    """One 1x1 convolution of 3 channels on 16 x 16: 9 x 256 MACs."""
    made = bundles_for_devices.tiny(tmp_path / "b")
    found = serial.from_json(Graph, read(made).manifest["graph"])
    return Graph(found.stage, made / "model.onnx", found.inputs, found.outputs, PrecisionPlan("int8"))


def test_work_and_bytes_are_those_by_hand(graph: Graph) -> None:
    seen = Inspection({"conv": "fp32"}, 0.0, 0.0)
    notes = {"sqnr_db": {"conv": 30.5}, "recovers": "x"}
    times = [{"name": "conv", "op": "Conv", "kernel": "k", "ms": [3.0, 1.0, 2.0]},
             {"name": "order", "op": "Reorder", "kernel": "r", "ms": [0.5]}]  # fmt: skip
    first, second = layer_rows.rows(graph, seen, times, [notes])
    assert (first["macs"], first["params"]) == (9 * 256, 9)
    assert first["bytes"] == 4 * (3 * 256 + 3 * 256 + 9)
    assert (first["ms"], first["n"], first["kernel"]) == (2.0, 3, "k")
    assert (first["promised"], first["obtained"]) == ("int8", "fp32")
    assert (first["sqnr_db"], first["recovers"]) == (30.5, None)
    assert (second["name"], second["op"], second["macs"], second["ms"]) == ("order", "Reorder", None, 0.5)


def test_what_is_not_known_is_none(graph: Graph) -> None:
    (row,) = layer_rows.rows(graph, None, [])
    assert row["macs"] == 9 * 256
    assert [row[key] for key in ("ms", "bytes", "sqnr_db", "obtained")] == [None, None, None, ""]
    assert layer_rows.roof(Target("t", "", ())) == {"peak_macs_per_s": {}, "bytes_per_s": 0.0}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_tells_the_times_of_its_kernels(runtime: str, graph: Graph, tmp_path: Path) -> None:
    module = registry.module("runtimes", runtime)
    if why := module.missing():
        pytest.skip(why)
    plain = Graph(graph.stage, graph.onnx, graph.inputs, graph.outputs)
    artifact = module.build(plain, tmp_path / "built", calibration=None, target=bundles_for_devices.HERE)
    with measuring.Worker(artifact) as worker:
        times, reason = worker.layer_times({"input": np.zeros((1, 3, 16, 16), np.float32)}, 4)
        rows = layer_rows.rows(plain, worker.inspect(), times)
    assert reason == ""
    assert rows[0]["name"] == "conv"
    assert rows[0]["n"] == 4
    assert rows[0]["ms"] > 0
    assert rows[0]["kernel"]
    assert rows[0]["obtained"] == "fp32"


def test_a_runtime_without_counters_says_so(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_runtime.py").write_text(
        "import contextlib\n@contextlib.contextmanager\ndef load(artifact):\n    yield lambda feeds: feeds\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    artifact = read(tmp_path / "b")
    from edgegen import bundle

    with measuring.Worker(bundle.artifacts(artifact)[0], module="plain_runtime") as worker:
        times, reason = worker.layer_times({"input": np.zeros((1, 3, 16, 16), np.float32)})
    assert times == []
    assert "no times of single layers" in reason


def test_what_a_jetsons_accelerator_takes_is_told_where_there_is_one(tmp_path: Path) -> None:
    shape = [1, 3, 8, 8]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "output")]
    weight = numpy_helper.from_array(np.zeros((3, 3, 1, 1), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["a"], "conv"), helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Erf", ["b"], ["output"], "erf"),
    ]  # fmt: skip
    made = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight]), ir_version=9)
    onnx.save(made, tmp_path / "model.onnx")
    built = Artifact("tensorrt", tmp_path / "model.onnx", (tmp_path / "model.onnx",), PrecisionPlan("fp16"), 1, (), ())
    found = layer_rows.dla(built, targets.load("jetson-orin-nx"))
    assert found == {
        "cores": 2, "layers": 3, "eligible": 2, "whole": "", "problems": {"erf": "Erf: use ReLU instead of GELU"},
    }  # fmt: skip
    assert layer_rows.dla(built, targets.load("jetson-orin-nano")) is None  # has no such core
    assert layer_rows.dla(dataclasses.replace(built, runtime="onnxruntime"), targets.load("jetson-orin-nx")) is None
    said = html._accelerator({"dla": schema.Dla.model_validate(found).model_dump()})
    assert "2 DLA cores: <data value=\"2\" data-path=\"dla.eligible\">2</data> of" in said and "ReLU instead" in said
    assert html._accelerator({"dla": None}) == ""
    assert "does not go there: no" in html._accelerator({"dla": {**found, "whole": "no Q/DQ", "problems": {}}})
