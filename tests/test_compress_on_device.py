"""`edgegen compress --device`: candidates of a target that is not this host are timed on the device, not estimated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgegen import errors, pipeline
from edgegen.request import Request

BOARD = """
description = "a board with ONNX Runtime"
runtimes = ["onnxruntime"]
precisions = ["fp32", "int8"]
threads = 1
"""


@pytest.mark.slow
def test_candidates_are_timed_on_the_device(tmp_path: Path) -> None:
    board = tmp_path / "board.toml"
    board.write_text(BOARD)
    request = Request(
        model="cifar_resnet", target=str(board), device="local", recipe="post-training", latency_only=True,
        out=tmp_path / "out",
    )  # fmt: skip
    bundle = pipeline.compress(request)
    report = json.loads((bundle.path / "report.json").read_text())
    result = report["result"]
    assert result["latency"]["status"] == "measured"
    assert result["latency"]["conditions"]["reached_by"] == "local"
    assert report["baseline"]["latency"]["value"] > 0
    assert "no device" not in report["headline"]
    assert not any("estimate" in stamp for stamp in report["stamps"])


def test_a_device_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    request = Request(model="cifar_resnet", device="ssh:/nowhere", latency_only=True, out=tmp_path / "out")
    with pytest.raises(errors.UsageError, match=r"device must be local, ssh://user@host\[:port\] or adb"):
        pipeline.compress(request)
    assert not (tmp_path / "out").exists()
