"""What is measured at the end: by image, bounded in time, and where it is not measured the reason is told."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgegen import finishing, runlog, samplers
from edgegen.candidates import Candidate, per_image
from edgegen.final import Curve, Final
from edgegen.types import Artifact, Graph, Measurement, PrecisionPlan


def candidate(label: str = "original", ms: float = 5.0, plan: PrecisionPlan | None = None, **graph: Any) -> Candidate:
    plan = plan or PrecisionPlan("int8", "u8s8")
    artifact = Artifact("fake", Path("m"), (), plan, 1000, (), ())
    latency = Measurement("latency", "ms", ms)
    figures = (Measurement("PSNR to the reference", "dB", 25.0), Measurement("PSNR to the teacher", "dB", 40.0))
    return Candidate(label, "fake", Graph("main", Path("m.onnx"), (), (), plan, **graph), artifact, latency=latency,
                     figures=figures)  # fmt: skip


class Bench:
    """Quality that depends on the number of calibration samples; nothing is built."""

    here, device, feeds, limits = True, "", {}, None

    def __init__(self) -> None:
        self.built: list[int] = []

    def build(self, of: str, graph: Graph, runtime: str, plan: PrecisionPlan, calibration: Path) -> Candidate:
        rows = np.load(calibration / "x.npy")
        self.built.append(len(rows))
        return candidate() if len(rows) != 13 else dataclasses.replace(candidate(), artifact=None, reason="it crashed")

    def outputs(self, made: Candidate, dataset: Any, out: Path) -> Path:
        return out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "calibration"
    folder.mkdir()
    np.save(folder / "x.npy", np.arange(100))
    monkeypatch.setattr(finishing, "calibration_folder", lambda run: folder)
    return SimpleNamespace(
        bench=Bench(), target=SimpleNamespace(threads=2, name="cpu"), folder=tmp_path,
        request=SimpleNamespace(seed=0, thorough=False), log=runlog.RunLog(tmp_path / "log.jsonl"),
        progress=lambda step, text, share: None,
    )  # fmt: skip


@pytest.fixture
def found(run: Any) -> Any:
    def figures(outputs: Path, only: str, sampler: Any) -> tuple[Measurement, ...]:
        return (Measurement("PSNR to the teacher", "dB", 30.0 + math.log2(run.bench.built[-1])),)

    return SimpleNamespace(test=SimpleNamespace(data=None, figures=figures))


def test_the_curve_has_an_eighth_to_the_whole_set_and_the_figure_that_sees_most(run: Any, found: Any) -> None:
    curve = finishing.calibration_curve(run, candidate(), found, 60.0)
    assert [size for size, _ in curve.points] == [12, 25, 50, 100]
    assert [one.name for _, one in curve.points] == ["PSNR to the teacher"] * 4
    assert curve.points[0][1].value == pytest.approx(30.0 + math.log2(12))
    assert curve.points[-1][1].value == 40.0, "the chosen build's own"
    assert curve.reason == ""
    assert finishing.calibration_curve(run, candidate(), found, 60.0) == curve
    assert run.bench.built == [12, 25, 50], "from the log the second time"


def test_fewer_samples_are_spread_over_the_set(run: Any) -> None:
    rows = np.load(finishing._fewer(run.folder / "calibration", 4) / "x.npy")
    assert rows.tolist() == [0, 33, 66, 99]


def test_the_curve_ends_when_it_would_take_too_long(run: Any, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(finishing.time, "monotonic", lambda: float(next(now)))
    curve = finishing.calibration_curve(run, candidate(), found, 10.0)  # 5 s, and each point takes 10
    assert [size for size, _ in curve.points] == [12, 100]
    assert curve.reason.startswith("25, 50 samples are left out: each point takes 10 s, and the curve may take 5 s")
    run.request.thorough = True
    assert len(finishing.calibration_curve(run, candidate(), found, 10.0).points) == 4


def test_a_curve_that_cannot_be_afforded_is_not_begun(run: Any, found: Any) -> None:
    slow = finishing.calibration_curve(run, dataclasses.replace(candidate(), build_s=11.0), found, 60.0)
    assert slow.points == ()
    assert slow.reason.startswith("12, 25, 50 samples are left out: each point takes 11 s")


def test_a_build_that_fails_ends_the_curve_with_its_reason(run: Any, found: Any) -> None:
    np.save(run.folder / "calibration" / "x.npy", np.arange(104))
    curve = finishing.calibration_curve(run, candidate(), found, 60.0)
    assert curve == Curve((), "with 13 samples: it crashed")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (candidate(plan=PrecisionPlan("bf16")), "no INT8 layers"),
        (candidate(plan=PrecisionPlan("int8", scales=(("a", 0.0, 1.0),))), "learned, not calibrated"),
        (candidate(partial=Graph("partial", Path("p"), (), ())), "cached blocks"),
    ],
)
def test_why_there_is_no_curve(run: Any, found: Any, chosen: Candidate, reason: str) -> None:
    assert reason in finishing.calibration_curve(run, chosen, found, 60.0).reason
    assert "no quality" in finishing.calibration_curve(run, candidate(), None, 60.0).reason


def test_the_time_of_the_curve_grows_with_that_of_its_run() -> None:
    assert finishing.allowed(10.0) == 5.0
    assert finishing.allowed(1000.0) == 50.0


def test_why_throughput_is_not_measured(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**changes: Any) -> Measurement:
        made = dataclasses.replace(final, **changes)
        return finishing.throughput(run, made)["original: fake int8 (u8s8, rest fp32)"]

    final = Final(candidate(), candidate(), candidate(), {"original: fake int8 (u8s8, rest fp32)": 10**9})
    monkeypatch.setattr(finishing, "_free_bytes", lambda: 10**9)
    assert "2 processes of each build need 2.0 GB, and 1.0 GB are free" in told().reason
    assert "one run takes 400 ms" in told(chosen=candidate(ms=400.0), baseline=candidate(ms=400.0)).reason
    whole = candidate().artifact
    assert whole is not None
    partial = dataclasses.replace(candidate(), artifact=dataclasses.replace(whole, partial=whole))
    assert "take turns" in told(chosen=partial, baseline=partial).reason
    run.target.threads = 1
    assert "one thread" in told().reason
    run.bench.here = False
    assert (told().status, told().direction) == ("not measured", "higher")
    assert "on this machine only" in told().reason


def test_runs_of_a_denoiser_are_told_by_image(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = samplers.complete({"name": "ddim", "steps": 4})
    made = Measurement("throughput", "1/s", 100.0, (90.0, 120.0), (100.0,), "higher", {"streams": 2})
    monkeypatch.setattr(finishing.streams, "throughput", lambda artifacts, feeds, **more: [made] * len(artifacts))
    one = candidate(sampler=settings)
    rate = finishing.throughput(run, Final(one, one, one, {}))[one.label]
    assert (rate.value, rate.interval, rate.samples) == (25.0, (22.5, 30.0), (25.0,))
    assert rate.conditions["nfe"] == 4
    assert per_image(Measurement("latency", "ms", 2.0), settings).value == 8.0


def test_golden_inputs_are_all_that_the_network_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgegen import final

    feeds = {"input": np.ones((1, 4), np.float32), "label": np.array([3])}
    run = SimpleNamespace(data=SimpleNamespace(test=None), bench=SimpleNamespace(feeds=feeds))
    graph = SimpleNamespace(inputs=(SimpleNamespace(name="input"), SimpleNamespace(name="label")), sampler=None)
    monkeypatch.setattr(final, "_answers", lambda run, artifact, given: ({}, 0.0))
    chosen = SimpleNamespace(chosen=SimpleNamespace(graph=graph, artifact="built", label="fp32"))
    assert final.golden_of(run, chosen)[0] == feeds
