"""Devices without Python: figures of the vendors' tools, and a phone behind adb (a fake one)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles_for_devices import QUICK, script

from edgegen import device_records, errors, on_device
from edgegen.devices import _tools

FAKES = Path(__file__).parent / "fakes"


pytestmark = pytest.mark.usefixtures("own_cache")


# ------------------------------------------------------------------------------------------------------- vendors' tools


# Lines of real runs: NVIDIA/TensorRT#4177, tensorflow/tensorflow#42507, Tencent/ncnn#3451, openvino 2026.4.1 here.

TRTEXEC = """
[03/28/2024-07:10:12] [I] TensorRT version: 8.6.3
[10/03/2024-10:47:59] [I] === Performance summary ===
[10/03/2024-10:47:59] [I] Throughput: 130.298 qps
[10/03/2024-10:47:59] [I] Latency: min = 5.38672 ms, max = 13.3664 ms, mean = 7.60628 ms, median = 7.16092 ms, percentile(90%) = 10.2996 ms, percentile(95%) = 10.8698 ms, percentile(99%) = 12.9675 ms
[10/03/2024-10:47:59] [I] Enqueue Time: min = 2.72876 ms, max = 15.0201 ms, mean = 7.63062 ms, median = 7.86694 ms, percentile(90%) = 10.1792 ms, percentile(95%) = 11.7217 ms, percentile(99%) = 14.1848 ms
[10/03/2024-10:47:59] [I] H2D Latency: min = 0.0065918 ms, max = 0.0698242 ms, mean = 0.0122212 ms, median = 0.00814819 ms, percentile(90%) = 0.0253906 ms, percentile(95%) = 0.0270996 ms, percentile(99%) = 0.0515137 ms
[10/03/2024-10:47:59] [I] GPU Compute Time: min = 5.34595 ms, max = 13.3388 ms, mean = 7.58404 ms, median = 7.14139 ms, percentile(90%) = 10.2881 ms, percentile(95%) = 10.8175 ms, percentile(99%) = 12.9485 ms
[10/03/2024-10:47:59] [I] D2H Latency: min = 0.00390625 ms, max = 0.110596 ms, mean = 0.0100141 ms, median = 0.00439453 ms, percentile(90%) = 0.0254517 ms, percentile(95%) = 0.0319824 ms, percentile(99%) = 0.0994873 ms
[10/03/2024-10:47:59] [I] Total Host Walltime: 3.00082 s
"""  # noqa: E501 - as it was printed
TFLITE = """
Initialized session in 0.855ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=15 first=49060 curr=33682 min=32825 max=49060 avg=34825.1 std=3930

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=50 first=32891 curr=33978 min=32641 max=34005 avg=33209.4 std=450

Inference timings in us: Init: 855, First inference: 49060, Warmup (avg): 34825.1, Inference (avg): 33209.4
"""
NCNN = """
loop_count = 8
num_threads = 4
powersave = 0
gpu_device = -1
cooling_down = 1
          squeezenet  min =   93.77  max =   94.78  avg =   94.25
"""
OPENVINO = """
[ INFO ] Build ................................. 2026.4.1-22982-e213a147257-releases/2026/4
[ INFO ] Compile model took 149.08 ms
[ INFO ]   INFERENCE_PRECISION_HINT: <Type: 'float32'>
[ INFO ] Benchmarking in inference only mode (inputs filling are not included in measurement loop).
[ INFO ] First inference took 8.11 ms
[ INFO ] Execution Devices:['CPU']
[ INFO ] Count:            227 iterations
[ INFO ] Duration:         2003.72 ms
[ INFO ] Latency:
[ INFO ]    Median:        10.02 ms
[ INFO ]    Average:       8.78 ms
[ INFO ]    Min:           6.00 ms
[ INFO ]    Max:           15.82 ms
[ INFO ] Throughput:   113.29 FPS
"""
ITEM: dict[str, Any] = {
    "file": "model.x", "options": {"inference_precision": "f32", "threads": 2},
    "inputs": [{"name": "input", "shape": [1, 3, 64, 48], "dtype": "float32"}],
}  # fmt: skip


def test_figures_of_the_vendors_tools_are_read_as_they_print_them() -> None:
    trt = _tools.parse("trtexec", TRTEXEC, ITEM)
    assert trt["whole"] == {"min": 5.38672, "max": 13.3664, "mean": 7.60628, "median": 7.16092}
    assert trt["bare"]["median"] == 7.14139 and trt["version"] == "8.6.3"
    assert _tools.parse("benchmark_model", TFLITE, ITEM) == {
        "load": 0.855, "first": 49.06, "bare": {"min": 32.641, "max": 34.005, "mean": 33.2094, "n": 50}
    }  # fmt: skip
    assert _tools.parse("benchncnn", NCNN, ITEM)["bare"] == {"min": 93.77, "max": 94.78, "mean": 94.25, "n": 8}
    app = _tools.parse("benchmark_app", OPENVINO, ITEM)
    assert app["bare"] == {"median": 10.02, "mean": 8.78, "min": 6.0, "max": 15.82, "n": 227}
    assert (app["load"], app["first"], app["version"][:8]) == (149.08, 8.11, "2026.4.1")


def test_every_run_of_trtexec_is_kept_where_it_was_exported() -> None:
    runs = [{"computeMs": 1.0, "latencyMs": 1.5}, {"computeMs": 1.25, "latencyMs": 1.75}]
    found = _tools.parse("trtexec", TRTEXEC, ITEM, json.dumps(runs))
    assert found["samples"] == [1.5, 1.75] and found["bare_samples"] == [1.0, 1.25] and found["whole"]["n"] == 2


@pytest.mark.parametrize(
    ("tool", "text", "reason"),
    [
        ("trtexec", "[E] Engine could not be created from network\n&&&& FAILED", "trtexec gave no latency: .*FAILED"),
        ("benchmark_model", "ERROR: Could not open 'x.tflite'.\nbye", "gave no latency: ERROR: Could not open"),
        ("benchncnn", "", "benchncnn gave no latency: it said nothing"),
        ("benchmark_app", OPENVINO.replace("['CPU']", "['GPU.0']"), r"asked for CPU, benchmark_app ran on GPU\.0"),
        ("benchmark_app", OPENVINO.replace("float32", "bfloat16"), "asked for float32 .* computes in bfloat16"),
    ],
)
def test_a_tool_that_failed_or_ran_elsewhere_gives_no_figure(tool: str, text: str, reason: str) -> None:
    with pytest.raises(errors.RuntimeFailed, match=reason):
        _tools.parse(tool, text, ITEM)


def test_commands_give_threads_shape_and_precision() -> None:
    assert "'shape=[48,64,3]'" in _tools.command("benchncnn", "/x/benchncnn", ITEM, 2.0)
    app = _tools.command("benchmark_app", "benchmark_app", ITEM, 2.0)
    assert "-nthreads 2" in app and "-infer_precision f32" in app and "-ip f32" in app
    assert "--num_threads=2" in _tools.command("benchmark_model", "m", ITEM, 2.0)


# ------------------------------------------------------------------------------------------------------------------ adb


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Home of the fake adb's device, whose PATH holds the shell's tools and no Python."""
    home = tmp_path / "phone"
    (home / "path").mkdir(parents=True)
    for tool in ("sh", "cat", "mkdir", "mv", "rm", "pwd", "dirname", "sha256sum", "uname", "tr", "nproc", "true"):
        for place in ("/usr/bin", "/bin"):
            if (Path(place) / tool).exists():
                (home / "path" / tool).symlink_to(Path(place) / tool)
                break
    monkeypatch.setenv("FAKE_ADB", str(home))
    monkeypatch.setenv("PATH", f"{FAKES}{os.pathsep}{os.environ['PATH']}")
    return home


@pytest.mark.parametrize(
    ("mode", "device", "reason"),
    [
        ("none", "adb", "adb: no device: plug one in and allow USB debugging"),
        ("", "adb:NOPE", "adb:NOPE: no device with this serial number"),
        ("two", "adb", "adb: more than one device: name one, adb:SERIAL"),
        ("unauthorized", "adb", "adb: the device does not trust this computer"),
    ],
)
def test_what_adb_says_is_one_clear_line(phone: Path, bundles: Any, mode: str, device: str, reason: str) -> None:
    (phone / "mode").write_text(mode)
    with pytest.raises(errors.TargetUnavailable, match=reason):
        on_device.profile([bundles("good")], device)


def test_the_real_adb_without_a_device_says_so(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("adb") is None:
        pytest.skip("adb is not installed")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "15037")
    try:
        with pytest.raises(errors.TargetUnavailable, match="adb: no device"):
            on_device.profile([bundles("good")], "adb")
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True, check=False)


def test_a_full_phone_is_told(phone: Path, bundles: Any) -> None:
    script(phone / "path" / "benchmark_model", "#!/bin/sh\ntrue\n")
    (phone / "mode").write_text("full")
    with pytest.raises(errors.RuntimeFailed, match="adb: the disk there is full: cannot write"):
        on_device.profile([bundles("lite", runtime="litert")], "adb")


def test_without_python_and_tool_the_cure_is_named(phone: Path, bundles: Any) -> None:
    lite, ort = bundles("lite", runtime="litert"), bundles("good")
    first, second = on_device.profile([lite, ort], "adb:SERIAL1")
    assert first.status == second.status == "not measured"
    assert "no Python 3.8 or newer there, and no benchmark_model: install Python 3.8" in first.reason
    assert second.reason.startswith("no Python 3.8 or newer there: install")


def test_the_vendors_tool_measures_where_there_is_no_python(phone: Path, bundles: Any) -> None:
    """The tool is a script that prints what a real one printed; the figures of the record are those."""
    out = phone / "printed"
    out.write_text(TFLITE)
    script(phone / "path" / "benchmark_model", f'#!/bin/sh\n[ -s "${{1#--graph=}}" ] && cat {out}\n')
    (record,) = on_device.profile([bundles("lite", runtime="litert")], "adb:SERIAL1", settings=QUICK)
    assert record.status == "measured" and record.provenance.tool == "benchmark_model"
    assert not record.golden.checked and "compares no outputs" in record.golden.reason
    figures = {m.name: m for m in device_records.measurements(record)}
    assert set(figures) == {"latency without copies", "cold load", "first run"}
    bare = figures["latency without copies"]
    assert bare.value == 33.2094 and bare.conditions["statistic"] == "mean" and bare.interval is None
    assert figures["first run"].value == 49.06


def test_by_adb_with_a_python_the_runner_measures(phone: Path, bundles: Any) -> None:
    pytest.importorskip("onnxruntime")
    script(phone / "path" / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (record,) = on_device.profile([bundles("good")], "adb:SERIAL1", settings=QUICK)
    assert record.status == "measured", record.reason
    assert record.device["kind"] == "adb" and len(record.rounds) == 6
    pushed = [line for line in (phone / "calls").read_text().splitlines() if line.startswith("push")]
    assert len(pushed) == 4  # runner, job, artifact, golden
    on_device.profile([bundles("good")], "adb:SERIAL1", settings=QUICK)
    pushed_again = [line for line in (phone / "calls").read_text().splitlines() if line.startswith("push")]
    assert len(pushed_again) == 5  # the job alone
