"""Devices without a network: their names, bundles measured on this host, and the command."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_for_devices import QUICK, measured_here, script, tiny

from edgegen import bundle, cli_device, device_records, errors, measuring, on_device, registry
from edgegen.devices import _spec, local
from edgegen.types import Artifact, Graph, Model, PrecisionPlan, Stage, Target, TensorSpec

FAKES = Path(__file__).parent / "fakes"


pytestmark = pytest.mark.usefixtures("own_cache")


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("local", ("local", "", "", 0, "")),
        ("ssh://pi@raspberrypi.local", ("ssh", "pi", "raspberrypi.local", 0, "")),
        ("ssh://nvidia@10.0.0.7:2222", ("ssh", "nvidia", "10.0.0.7", 2222, "")),
        ("ssh://alias", ("ssh", "", "alias", 0, "")),
        ("ssh://me@[fe80::1%eth0]:22", ("ssh", "me", "fe80::1%eth0", 22, "")),
        ("adb", ("adb", "", "", 0, "")),
        ("adb:192.168.1.4:5555", ("adb", "", "", 0, "192.168.1.4:5555")),
    ],
)
def test_a_device_is_named_in_three_ways(text: str, parts: tuple[Any, ...]) -> None:
    assert _spec.parse(text) == _spec.Spec(text, *parts)


@pytest.mark.parametrize(
    "text",
    ["", "Local", "ssh:pi@board", "ssh://", "ssh://a b@c", "ssh://-oProxyCommand=x@h", "ssh://u@-v", "ssh://u:pw@host",
     "ssh://h:0", "ssh://h:99999", "ssh://h/path", "adb:", "adb:-s", "usb:1", "ssh://u@h;reboot"],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    told = r"device must be local, ssh://user@host\[:port\] or adb\[:serial\], got"
    with pytest.raises(errors.UsageError, match=told):
        _spec.parse(text)


# --------------------------------------------------------------------------------------------------------- on this host


def test_a_bundle_is_measured_here_with_every_raw_sample(bundles: Any) -> None:
    pytest.importorskip("onnxruntime")
    (record,) = measured_here(bundles("good"))
    assert record.status == "measured", record.reason
    assert [len(one.ms) for one in record.rounds] == [len(one.bare_ms) for one in record.rounds] == [5] * 6
    assert len(record.cold) == 2 and all(cold.load_ms > 0 and cold.first_ms > 0 for cold in record.cold)
    assert record.golden.checked and record.golden.ok and record.golden.worst < 1e-4 and record.golden.samples == 3
    assert record.warm[0].runs >= len(record.warm[0].ms) > 0 and record.peak_bytes > 1e6
    assert record.obtained == {"providers": ["CPUExecutionProvider"], "threads": 1}
    figures = {m.name: m for m in device_records.measurements(record)}
    assert set(figures) == {"latency", "latency without copies", "cold load", "first run"}
    latency = figures["latency"]
    assert latency.unit == "ms" and latency.conditions["n"] == 30 and latency.interval is not None
    assert min(latency.samples) <= latency.value <= max(latency.samples)
    assert latency.conditions["io"] == "copies of inputs and outputs included"
    assert "not included" in figures["latency without copies"].conditions["io"]


def test_several_bundles_are_one_run_whose_ratio_can_be_taken(bundles: Any) -> None:
    pytest.importorskip("onnxruntime")
    small, large = measured_here(bundles("good"), bundles("large", side=192))
    one, other = (device_records.measurements(record)[0] for record in (large, small))
    assert measuring.ratio(one, other).value > 1.5  # 144 times the pixels


def test_wrong_outputs_are_never_a_figure(bundles: Any) -> None:
    pytest.importorskip("onnxruntime")
    good, wrong = measured_here(bundles("good"), bundles("wrong", wrong=0.5))
    assert good.status == "measured"
    assert wrong.status == "not measured" and "its outputs there differ by 0.5" in wrong.reason
    assert [m.status for m in device_records.measurements(wrong)] == ["not measured"]
    assert len(wrong.rounds) == 6  # what was measured is kept in the record all the same


def test_another_provider_than_asked_is_not_measured(bundles: Any) -> None:
    pytest.importorskip("onnxruntime")
    (record,) = measured_here(bundles("cuda", provider="CUDAExecutionProvider"))
    assert record.status == "not measured"
    assert "onnxruntime there has no CUDAExecutionProvider" in record.reason
    assert "not measured on anything else" in record.reason


def test_a_changed_bundle_is_refused(bundles: Any, tmp_path: Path) -> None:
    path = tiny(tmp_path / "changed")
    artifact = path / "model.onnxruntime.onnx"
    artifact.write_bytes(artifact.read_bytes() + b"\0")
    with pytest.raises(errors.BundleError, match=r"model\.onnxruntime\.onnx: is not the file that was bundled"):
        measured_here(path)


CRASH = """
import ctypes
def get_available_providers(): return ["CPUExecutionProvider"]
def disable_telemetry_events(): pass
class SessionOptions:
    def __init__(self): ctypes.string_at(0)
"""


def test_a_crash_of_a_runtime_is_a_reason(bundles: Any, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(CRASH)
    python = tmp_path / "python"
    script(python, f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    (record,) = measured_here(bundles("good"), python=str(python))
    assert record.status == "not measured" and record.reason.startswith("crashed (signal 11) at open")


def test_a_runtime_without_end_is_stopped(bundles: Any, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("import time; time.sleep(60)")
    python = tmp_path / "python"
    script(python, f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    settings = dataclasses.replace(QUICK, limit_s=2.0)
    (record,) = measured_here(bundles("good"), settings=settings, python=str(python))
    assert record.status == "not measured" and "gave no answer in 2 s at open" in record.reason


def test_the_device_is_left_with_the_files_and_without_the_run(bundles: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with _spec.open_device("local") as device:
        assert device.push({"a b/it's.txt": Path(__file__)}) == ["a b/it's.txt"]
        assert device.push({"a b/it's.txt": Path(__file__)}) == []
        assert device.pull("a b/it's.txt") == Path(__file__).read_bytes()
        assert device.pull("nothing") == b""
    measured_here(bundles("good"))
    home = tmp_path / "cache" / "device"
    assert [p.name for p in (home / "runs").iterdir()] == ["lock"]
    assert {p.name for p in (home / "bundles").rglob("*") if p.is_file()} == {"model.onnxruntime.onnx", "000.npz"}


# ---------------------------------------------------------------------------------------- the runner, for every runtime


def runtimes() -> list[Any]:
    """Every runtime that runs here; the others are skipped with their reason."""
    found = []
    for name in registry.names("runtimes"):
        why = registry.module("runtimes", name).missing()
        found.append(pytest.param(name, marks=[pytest.mark.skip(reason=why)] if why else [], id=name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("runtime", runtimes())
def test_the_runner_runs_what_the_runtime_module_runs(runtime: str, tmp_path: Path) -> None:
    """Golden outputs come from `runtimes.<name>.load`; the runner's differ by no more than the order of sums."""
    from conftest import make_tiny

    from edgegen import onnx_graph, program

    model = make_tiny("depthwise_generator")
    graph = onnx_graph.to_onnx(model.stage, tmp_path / "graph.onnx")
    graph = dataclasses.replace(graph, program=program.save(model.stage, tmp_path / "graph.pt2"))
    target = Target("here", "", (runtime,), precisions=("fp32",), threads=1)
    artifact = measuring.build_isolated(graph, tmp_path / "built", runtime=runtime, calibration=None, target=target)
    x = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    with measuring.Worker(artifact) as worker:
        y = worker.run_many({"input": x})["output"]
    (record,) = measured_here(pack(tmp_path / "bundle", artifact, {"input": x}, {"output": y}))
    assert record.status == "measured", record.reason
    assert record.golden.ok and record.golden.samples == 2
    assert record.runtime_version not in ("", "unknown")
    assert all(one.bare_ms for one in record.rounds)


ENGINE_SCRIPT = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "built", "a") as log:
    log.write("x")
(here / "model.engine").write_text(json.dumps(ENGINE))
print("some words")
print(here / "model.engine")
"""


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        pytest.param({"floats": 48}, "", id="runs"),
        pytest.param({}, "TensorRT 10.3.0 cannot load the engine it built", id="no engine"),
        pytest.param(None, "build_engine.py: no parser", id="no build"),
    ],
)
def test_an_engine_is_built_and_run_there(tmp_path: Path, engine: dict[str, int] | None, reason: str) -> None:
    """With a fake tensorrt and a fake CUDA runtime: the way of the arrays to the GPU and back, and its failures."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the fake CUDA runtime")
    place = tmp_path / "packages"
    place.mkdir()
    shutil.copy(FAKES / "gpu" / "tensorrt.py", place)
    command = ["cc", "-shared", "-fPIC", "-o", str(place / "libcudart.so"), str(FAKES / "gpu" / "cudart.c")]
    subprocess.run(command, check=True)
    shape, home = (1, 3, 4, 4), tmp_path / "built"
    home.mkdir()
    (home / "model.onnx").write_bytes(b"not read by the fake")
    broken = "import sys; sys.exit('no parser')"
    text = broken if engine is None else ENGINE_SCRIPT.replace("ENGINE)", f"{engine!r})")
    (home / "build_engine.py").write_text(text)
    specs = (TensorSpec("input", shape),), (TensorSpec("output", shape),)
    parts = (home / "model.onnx", home / "build_engine.py")
    artifact = Artifact("tensorrt", parts[0], parts, PrecisionPlan("fp16"), 1, *specs, {}, {})
    x = np.random.default_rng(0).random((2, *shape[1:]), dtype=np.float32)
    path = pack(tmp_path / "bundle", artifact, {"input": x}, {"output": 2 * x})
    python = tmp_path / "python"
    script(python, f'#!/bin/sh\nLD_LIBRARY_PATH={place} PYTHONPATH={place} exec {sys.executable} "$@"\n')
    (record,) = measured_here(path, python=str(python))
    assert record.reason == reason
    if not reason:
        assert record.golden.ok and record.golden.worst == 0 and record.runtime_version == "10.3.0"
        assert all(one.ms and one.bare_ms for one in record.rounds)


def pack(out: Path, artifact: Artifact, feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Path:
    """A bundle around an artifact that is there."""
    stage = Stage("model", None, artifact.inputs, artifact.outputs)
    model = Model("net", "image-to-image", (stage,), origin={"kind": "onnx", "path": "net.onnx"})
    graph = Graph("model", artifact.files[0], artifact.inputs, artifact.outputs)
    golden = bundle.Golden(feeds, outputs, 1e-5)
    report: dict[str, str | bytes | Path] = {"report.html": "<p>", "report.json": "{}"}
    contents = bundle.Contents(model, model, (artifact,), graph, "here", "seed = 0\n", (golden,), report)
    return bundle.write(out, contents).path


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_prints_a_table_and_submits(
    bundles: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "results.json"
    cli_device.profile([bundles("good")], submit=file, rounds=3, iterations=3)
    told = capsys.readouterr()
    assert "net onnxruntime" in told.out and "no copies" in told.out and f"{file}: 1 records" in told.err
    assert len(device_records.load_records(tmp_path)) == 1


def test_the_command_fails_where_something_was_not_measured(
    bundles: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    file, both = tmp_path / "results.json", [bundles("good"), bundles("wrong", wrong=0.5)]
    with pytest.raises(errors.RuntimeFailed, match="local: 1 of 2 not measured: its outputs there differ") as caught:
        cli_device.profile(both, submit=file, rounds=3, iterations=3)
    assert "\n" not in str(caught.value)
    assert "not measured" in capsys.readouterr().out
    assert [r.network.name for r in device_records.load_records(tmp_path)] == ["net"]  # what was measured is kept


def test_two_runs_at_once_are_refused(bundles: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would disturb each other's figures; the second waits a while for the first."""
    import fcntl

    text = on_device.RUNNER.read_text(encoding="utf-8")
    assert "for _ in range(100):" in text
    impatient = tmp_path / "_runner.py"
    impatient.write_text(text.replace("for _ in range(100):", "for _ in range(2):"), encoding="utf-8")
    monkeypatch.setattr(on_device, "RUNNER", impatient)
    (tmp_path / "cache" / "device" / "runs").mkdir(parents=True)
    with (tmp_path / "cache" / "device" / "runs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(errors.RuntimeFailed, match="another run measures on this device; try again when it has"):
            measured_here(bundles("good"))


def test_this_host_tells_the_instructions_that_decide_precisions(monkeypatch: Any) -> None:
    for flags, told in (({"avx2", "fma", "avx512_vnni"}, "avx2 avx512_vnni"), ({"fma"}, None)):
        monkeypatch.setattr(local, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert local.probe().get("instructions") == told
