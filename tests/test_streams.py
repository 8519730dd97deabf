"""Throughput is the sum of what runs at once, with its conditions; what fails stays with its own artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgegen import streams
from edgegen.isolation import Limits
from edgegen.types import Artifact, PrecisionPlan, TensorSpec

MODULE, LIMITS = "fakes.fake_runtime", Limits(seconds=20)
X = {"x": np.ones((2, 3), np.float32)}


@pytest.fixture(autouse=True)
def _fakes_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def artifact(**options: object) -> Artifact:
    specs = (TensorSpec("x", (2, 3)),), (TensorSpec("y/out", (2, 3)),)
    return Artifact("fake", Path("model.fake"), (), PrecisionPlan(), 0, *specs, {"threads": 8, **options})


@pytest.mark.parametrize(("threads", "expected"), [(0, (1, 1)), (1, (1, 1)), (2, (2, 1)), (4, (4, 1)), (16, (4, 4))])
def test_streams_share_the_threads(threads: int, expected: tuple[int, int]) -> None:
    assert streams.split(threads) == expected


def test_streams_add_up_and_a_crash_stays_with_its_artifact() -> None:
    """A run that sleeps takes no core, so two streams of it make twice what one makes, however busy the machine is."""
    sleeper, broken = artifact(sleep_ms=20), artifact(do="segv", after=8)
    more = {"rounds": 3, "seconds": 0.2, "limits": LIMITS, "module": MODULE}
    one = streams.throughput([sleeper], X, threads=1, **more)[0]
    two, failed = streams.throughput([sleeper, broken], X, threads=2, **more)
    assert (one.unit, one.direction, one.conditions["streams"], one.conditions["batch"]) == ("1/s", "higher", 1, 2)
    assert 0.3 * 100 < one.value <= 100, "2 samples in 20 ms at the best"
    assert 1.4 < two.value / one.value < 2.8
    assert (two.conditions["streams"], two.conditions["threads"], len(two.samples)) == (2, 1, 3)
    assert two.interval is not None and two.interval[0] <= two.value <= two.interval[1]
    assert failed.status == "not measured"
    assert "crashed (signal 11)" in failed.reason


@pytest.mark.parametrize("streams_at_once", [None, 2])
def test_openvino_binds_no_cores_side_by_side(monkeypatch: pytest.MonkeyPatch, streams_at_once: int | None) -> None:
    """Bound to the first core each, two processes of one thread reach half of what they could (seen: 210 of 380/s)."""
    pytest.importorskip("openvino")
    from edgegen.runtimes import openvino

    class FakeCore:
        def compile_model(self, path: str, device: str, config: dict[str, object]) -> dict[str, object]:
            return config

    monkeypatch.setattr(openvino._ir, "core", FakeCore)
    options = {"performance_hint": "LATENCY", "inference_precision": "f32"}
    options |= {} if streams_at_once is None else {"streams": streams_at_once}
    assert openvino._compiled(artifact(**options)).get("ENABLE_CPU_PINNING", True) is (streams_at_once is None)
