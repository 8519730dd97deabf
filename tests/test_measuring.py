"""Worker processes: results come through, misbehaviour becomes RuntimeFailed, and ratios are what they must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgegen import errors, latency, measuring
from edgegen.isolation import Limits, Process, resident_bytes
from edgegen.types import Artifact, Graph, Measurement, PrecisionPlan, Target, TensorSpec

TESTS = Path(__file__).parent
MODULE = "fakes.fake_runtime"
SPECS = (TensorSpec("x", (1, 3)),), (TensorSpec("y/out", (1, 3)),)
TARGET = Target("somewhere", "a test target", ("fake",), threads=2)
SHORT = Limits(seconds=20, memory_bytes=2 << 30)
SMALL = Limits(seconds=20, memory_bytes=300 << 20)


@pytest.fixture(autouse=True)
def _fakes_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def artifact(**options: object) -> Artifact:
    return Artifact("fake", Path("model.fake"), (), PrecisionPlan(), 0, *SPECS, {"threads": 1, **options})


def build(out: Path, how: str = "", limits: Limits = SHORT) -> Artifact:
    graph = Graph("net", Path("model.onnx"), *SPECS, plan=PrecisionPlan(format=how))
    return measuring.build_isolated(
        graph, out, runtime="fake", calibration=Path("images"), target=TARGET, limits=limits, module=MODULE
    )


def worker(limits: Limits = SHORT, **options: object) -> measuring.Worker:
    return measuring.Worker(artifact(**options), limits, module=MODULE)


X = {"x": np.array([[1.0, 2.0, 3.0]], dtype=np.float32)}


def test_build_gives_the_artifact_that_the_runtime_made_from_all_arguments(tmp_path: Path) -> None:
    made = build(tmp_path / "out")
    assert made.path == tmp_path / "out" / "model.fake"
    assert made.path.read_text() == '{"target": "somewhere", "calibration": "images"}'
    assert (made.inputs, made.outputs, made.options) == (*SPECS, {"threads": 2})


@pytest.mark.parametrize(
    ("how", "limits", "message"),
    [
        pytest.param("segv", SHORT, r"^fake: crashed \(signal 11\) at build; last words: about to fall", id="crash"),
        pytest.param("exit", SHORT, r"^fake: ended by itself \(exit code 3\) at build$", id="exit"),
        pytest.param("raise", SHORT, r"^fake: ArithmeticError at build: no such kernel\n?", id="exception"),
        pytest.param("hang", Limits(seconds=1.5), r"^fake: no answer in 1.5 s at build$", id="time"),
        pytest.param("eat", SMALL, r"^fake: out of memory \(limit 0.3 GiB\) at build$", id="memory"),
        pytest.param("child eats", SMALL, r"^fake: out of memory \(limit 0.3 GiB\) at build$", id="memory of a child"),
    ],
)
def test_misbehaviour_at_build_is_named_and_leaves_nothing(
    tmp_path: Path, how: str, limits: Limits, message: str
) -> None:
    with pytest.raises(errors.RuntimeFailed, match=message):
        build(tmp_path / "out", how, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_is_kept_when_a_build_fails(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(errors.RuntimeFailed):
        build(tmp_path, "raise")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_errors_of_edgegen_keep_their_class_fields_and_place(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingExtra, match=r"pip install 'edgegen\[fake\]'") as caught:
        build(tmp_path / "out", "usage")
    assert (caught.value.package, caught.value.extra) == ("fakelib", "fake")
    assert "fake_runtime.py" in caught.value.__notes__[0]


def test_a_runtime_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.RuntimeFailed, match=r"ModuleNotFoundError at open: No module named 'fakes\.none'"):
        measuring.Worker(artifact(), SHORT, module="fakes.none").__enter__()


def test_outputs_of_run_are_exact() -> None:
    with worker() as one:
        outputs = one.run(X)
    assert outputs["y/out"].dtype == np.float32
    np.testing.assert_array_equal(outputs["y/out"], [[2.0, 4.0, 6.0]])


def test_what_libraries_print_does_not_reach_the_protocol(capfd: pytest.CaptureFixture[str]) -> None:
    with worker(load="print", do="print") as one:
        assert [one.run(X)["calls"].item() for _ in range(3)] == [1, 2, 3]
    assert capfd.readouterr().out == ""


def test_run_many_steps_by_the_batch_and_drops_the_filling() -> None:
    wide = Artifact("fake", Path("m"), (), PrecisionPlan(), 0, (TensorSpec("x", (4, 3)),), SPECS[1])
    stack = np.arange(30, dtype=np.float32).reshape(10, 3)
    with measuring.Worker(wide, SHORT, module=MODULE) as one:
        outputs = one.run_many({"x": stack})
    np.testing.assert_array_equal(outputs["y/out"], stack * 2)
    assert outputs["calls"].ravel().tolist() == [1] * 4 + [2] * 4 + [3] * 2


@pytest.mark.parametrize("stack", [{"x": np.zeros((0, 3))}, {"x": np.zeros((2, 3)), "z": np.zeros((3, 3))}])
def test_uneven_or_empty_stacks_are_refused(stack: dict[str, np.ndarray]) -> None:
    with worker() as one, pytest.raises(errors.DataError, match="same number of samples"):
        one.run_many(stack)


def test_objects_never_travel() -> None:
    with worker() as one, pytest.raises(errors.DataError, match="array of objects"):
        one.run({"x": np.array([{}])})


def test_a_crash_at_run_ends_the_worker_and_later_calls_say_so() -> None:
    with worker(do="segv", after=1) as one:
        one.run(X)
        with pytest.raises(errors.RuntimeFailed, match=r"crashed \(signal 11\) at run; last words: about to fall"):
            one.run(X)
        with pytest.raises(errors.RuntimeFailed, match=r"the worker is gone: crashed \(signal 11\) at run"):
            one.inspect()


def test_a_crash_at_load_leaves_no_process_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken = worker(load="segv")
    with pytest.raises(errors.RuntimeFailed, match="at open"):
        broken.__enter__()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(broken.pid, 0)


def test_a_worker_that_was_not_opened_says_so() -> None:
    with pytest.raises(errors.RuntimeFailed, match="not open; use it in a with statement"):
        worker().run(X)


def test_time_counts_only_the_runs_asked_for_and_reads_the_clock_around_them() -> None:
    with worker(ms=5) as one:
        samples = one.time(X, 4, warmup=2)
        assert one.run(X)["calls"].item() == 4 + 2 + 1
    assert len(samples) == 4
    assert all(sample >= 5 for sample in samples)


def test_a_round_that_takes_too_long_is_cut_after_three_samples() -> None:
    with worker(ms=20) as one:
        assert len(one.time(X, 50, warmup=0, at_most=0.01)) == 3


def test_rounds_of_unequal_length_are_pooled() -> None:
    found = latency.summarise([[1.0, 1.0, 1.0, 1.0], [3.0, 3.0]], {})
    assert (found.value, found.interval, found.conditions["n"]) == (1.0, (1.0, 3.0), 6)
    assert found.conditions["round_medians"] == [1.0, 3.0]


def test_peak_memory_grows_with_what_is_touched() -> None:
    big = np.ones((1, 16 << 20), dtype=np.float32)  # 64 MiB in, 64 MiB out
    with worker() as one:
        before, baseline = one.peak_memory_bytes(), one.baseline_memory_bytes()
        one.run({"x": big})
        assert one.peak_memory_bytes() - before >= 127 << 20  # a megabyte of pages may have been there before
    assert 5 << 20 < baseline <= before


def test_inspect_reads_back() -> None:
    with worker() as one:
        assert one.inspect().layers == {"conv": "int8"}


PARENT = """
from test_measuring import X, worker
with worker(do="hang") as one:
    print(one.pid, flush=True)
    one.run(X)
"""


def test_the_worker_dies_with_its_parent_even_in_the_middle_of_a_request() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=TESTS, text=True) as parent:
        pid = int(parent.stdout.readline() if parent.stdout else 0)
        time.sleep(0.3)
        assert resident_bytes(pid) > 0
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while resident_bytes(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert resident_bytes(pid) == 0


def test_a_request_that_is_not_one_is_answered_with_what_is_allowed() -> None:
    process = Process("fake", SHORT)
    with pytest.raises(errors.UsageError, match="unknown request 'main'; allowed: build, open"):
        process.request("main")
    process.close()
    assert resident_bytes(process.pid) == 0


def test_interleaved_latency_says_how_it_was_measured_and_a_crash_does_not_stop_the_others() -> None:
    fast, broken, slow = artifact(ms=2), artifact(do="segv", after=8), artifact(ms=6)
    results = measuring.time_interleaved(
        [fast, broken, slow], X, rounds=4, seconds=0.02, warm_seconds=0.02, limits=SHORT, module=MODULE
    )
    assert [result.status for result in results] == ["measured", "not measured", "measured"]
    assert np.isnan(results[1].value)
    assert "crashed (signal 11)" in results[1].reason
    conditions = results[0].conditions
    assert 4 * 3 <= conditions["n"] == len(results[0].samples) <= 4 * conditions["iterations"]
    assert conditions["io"] == "numpy in and out included"
    assert {"device", "cpu_model", "threads", "batch", "round_medians", "load_before", "run"} <= set(conditions)
    assert results[0].value >= 2
    assert results[0].interval is not None
    assert results[0].interval[0] <= results[0].value <= results[0].interval[1]
    assert 1.5 < measuring.ratio(results[2], results[0]).value < 6  # 3 where nothing disturbs
    assert measuring.ratio(results[1], results[0]).status == "not measured"


def test_open_workers_can_be_timed_and_stay_open() -> None:
    with worker(ms=1) as one:
        (result,) = measuring.time_interleaved([one], X, rounds=2, iterations=3, warm_seconds=0.01)
        assert result.conditions["n"] == 6
        assert one.run(X)["y/out"].shape == (1, 3)


def test_bad_arguments_of_a_timing_run() -> None:
    with pytest.raises(errors.UsageError, match="rounds must be >= 1"):
        measuring.time_interleaved([artifact()], X, rounds=0)


def rounds(*medians: float, run: str | None = "one", name: str = "a") -> Measurement:
    return latency.summarise([[m, m, m] for m in medians], {"run": run, "runtime": name, "precision": "fp32"})


def test_ratio_of_doubled_rounds_is_two_with_no_width_whatever_slowed_both() -> None:
    b = rounds(1.0, 5.0, 2.0, 1.5, name="ort")
    a = rounds(2.0, 10.0, 4.0, 3.0, name="ov")
    ratio = measuring.ratio(a, b)
    assert (ratio.value, ratio.interval, ratio.samples) == (2.0, (2.0, 2.0), (2.0,) * 4)
    assert (ratio.conditions["baseline"], ratio.conditions["candidate"]) == ("ort fp32", "ov fp32")
    assert measuring.ratio(b, b).value == 1.0


def test_speedup_is_the_ratio_the_other_way_up() -> None:
    speedup = measuring.speedup(rounds(1.0, 2.0), rounds(4.0, 8.0, name="base"))
    assert (speedup.value, speedup.direction, speedup.conditions["baseline"]) == (4.0, "higher", "base fp32")


def test_the_ratio_interval_covers_the_spread_of_rounds() -> None:
    b = rounds(*[1.0] * 9)
    a = rounds(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)
    low, high = measuring.ratio(a, b).interval or (0.0, 0.0)
    assert 1.0 <= low < 1.4 < high <= 1.8
    assert high - low > 0.2


@pytest.mark.parametrize("other", [rounds(1.0, run="two"), rounds(1.0, run=None)])
def test_a_ratio_across_runs_is_refused(other: Measurement) -> None:
    with pytest.raises(errors.UsageError, match="one interleaved run"):
        measuring.ratio(rounds(1.0), other)


def test_percentiles_of_known_samples() -> None:
    known = latency.summarise([list(range(51)), list(range(50, 101))], {})
    assert measuring.percentile(known, 90) == pytest.approx(90, abs=1)
    assert measuring.percentile(known, 0) == 0
    assert np.isnan(measuring.percentile(latency.not_measured("latency", "ms", "no device", {}), 50))
    with pytest.raises(errors.UsageError, match=r"0\.\.100, got 101"):
        measuring.percentile(known, 101)
    with pytest.raises(errors.UsageError, match="no samples"):
        measuring.percentile(Measurement("size", "byte", 1.0), 50)


def test_drift_and_noise_are_not_steady_and_calm_rounds_are() -> None:
    assert measuring.steady(rounds(1.0, 1.01, 0.99, 1.02, 1.0))
    assert not measuring.steady(rounds(1.0, 1.1, 1.2, 1.3, 1.4))
    assert not measuring.steady(latency.not_measured("latency", "ms", "no device", {}))
    assert measuring.spread(rounds(1.0, 1.0, 1.0)) == 0.0
