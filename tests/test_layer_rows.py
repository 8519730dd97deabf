"""The layers of a built network: work by hand, times from the runtimes' own counters, promises kept or not."""

from __future__ import annotations

from pathlib import Path

import bundles_for_devices
import numpy as np
import pytest

from edgegen import layer_rows, measuring, registry, serial
from edgegen.bundle import read
from edgegen.types import Graph, Inspection, PrecisionPlan, Target


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
