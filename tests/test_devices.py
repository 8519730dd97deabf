"""Devices without a network: names, the runner, vendors' tools, records, adb (a fake one) and this host."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_for_devices import tiny

from edgegen import bundle, cli_device, device_items, device_records, errors, files, measuring, on_device, registry
from edgegen.device_records import Record
from edgegen.devices import _runner, _spec, _tools
from edgegen.devices._shell import Options
from edgegen.types import Artifact, Graph, Model, PrecisionPlan, Stage, Target, TensorSpec

FAKES = Path(__file__).parent / "fakes"
QUICK = on_device.Settings(rounds=6, iterations=5, warm_seconds=0.01, cold=2, limit_s=60)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """bundles(name, **how): each made once."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def make(name: str, **how: Any) -> Path:
        if name not in made:
            made[name] = tiny(folder / name, **how)
        return made[name]

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))


def measured_here(*paths: Path, settings: on_device.Settings = QUICK, python: str = "") -> list[Record]:
    return on_device.profile(paths, "local", settings=settings, options=Options(python=python))


# ------------------------------------------------------------------------------------------------------------ names


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


# ----------------------------------------------------------------------------------------------------------- runner


def test_the_runner_is_python_38_of_the_standard_library_alone() -> None:
    text = on_device.RUNNER.read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 8))
    plain = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported = {alias.name.split(".")[0] for alias in plain}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names) | {"__future__"}
    assert "edgegen" not in imported
    newer = {"removeprefix", "removesuffix", "pairwise", "file_digest", "cache"}  # of str and the library since 3.9
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & newer


def write(root: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_facts_and_state_are_read_from_the_device_tree_and_sysfs(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "etc/os-release": 'PRETTY_NAME="Debian 12"\n',
            "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500000\n",
            "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2400000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "918000000\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "61250\n",
            "sys/class/thermal/thermal_zone1/type": "broken\n",
            "sys/class/thermal/thermal_zone1/temp": "-256000\n",
            "sys/class/hwmon/hwmon1/name": "ina3221\n",
            "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
            "sys/class/hwmon/hwmon1/in1_input": "5000\n",  # mV
            "sys/class/hwmon/hwmon1/curr1_input": "1200\n",  # mA
            "sys/class/hwmon/hwmon2/name": "other\n",
            "sys/class/hwmon/hwmon2/power1_input": "2500000\n",  # microwatts
        },
    )
    facts, state = _runner.facts(str(tmp_path)), _runner.state(str(tmp_path), programs=False)
    assert facts["model"] == "Raspberry Pi 5 Model B Rev 1.0" and facts["os"].startswith("Debian 12, Linux")
    assert state["mhz"] == {"policy0": 1500.0, "policy0 max": 2400.0, "17000000.gpu": 918.0}
    assert state["governor"] == "ondemand" and state["celsius"] == {"cpu-thermal": 61.25}
    assert state["watts"] == {"ina3221 VDD_IN": 6.0, "other 1": 2.5}


def test_a_line_that_was_cut_off_is_not_a_finished_part(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"kind": "round", "item": 0}\n{"kind": "rou')
    log = _runner.Log(str(file))
    assert log.lines == [{"kind": "round", "item": 0}]
    log.add("round", item=1)
    assert _runner.Log(str(file)).of("round", 1) == [{"kind": "round", "item": 1}]


# ------------------------------------------------------------------------------------------------------ on this host


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


# ------------------------------------------------------------------------------------- the runner, for every runtime


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


# ---------------------------------------------------------------------------------------------------- vendors' tools
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


# ---------------------------------------------------------------------------------------------------------- records


@pytest.fixture
def record(bundles: Any) -> Record:
    """A record whose rounds are given: eight, steady, 10 ms."""
    common = {"settings": {"rounds": 8, "run": "abc"}}
    (item,) = device_items.in_bundles([bundles("good")])
    about = item.known(common, "runner", files.sha256(on_device.RUNNER))
    rounds = [{"session": 1, "ms": [10.0, 10.1, 9.9], "bare_ms": [9.0], "state": state(2400, 50)} for _ in range(8)]
    return Record(
        **about, device={"kind": "ssh", "facts": {"model": "Board"}}, status="measured",
        rounds=[device_records.Round(**one) for one in rounds],
    )  # fmt: skip


def state(mhz: float, celsius: float) -> dict[str, Any]:
    return {"mhz": {"policy0": mhz, "policy0 max": 2400.0}, "celsius": {"cpu": celsius}}


def with_rounds(record: Record, *rounds: tuple[float, float, float]) -> Record:
    made = [device_records.Round(session=1, ms=[ms] * 3, state=state(mhz, heat)) for ms, mhz, heat in rounds]
    return record.model_copy(update={"rounds": made})


def test_a_steady_run_has_no_findings_and_throttling_is_found(record: Record) -> None:
    assert device_records.findings(record) == []
    hot = with_rounds(record, *[(10, 2400, 50)] * 3, *[(11, 2000, 70)] * 3, *[(15, 1500, 84)] * 3)
    (finding,) = device_records.findings(hot)
    drift = "the clock fell from 2400 to 1500 MHz, it warmed from 50 to 84 degrees"
    assert finding == f"later rounds are 50% slower than the first: {drift}"
    fell = with_rounds(record, *[(10, 2400, 50)] * 3, *[(10, 1500, 51)] * 3)
    assert device_records.findings(fell) == ["the clock fell from 2400 to 1500 MHz"]
    jumpy = with_rounds(record, *[(ms, 2400, 50) for ms in (10, 14, 10, 14, 10, 14, 10, 14, 10)])
    assert device_records.findings(jumpy) == ["rounds lie 40% apart"]
    throttled = record.model_copy(update={"after": {"throttled": "throttled=0x50005"}})
    assert "under-voltage or throttling (0x50005)" in device_records.findings(throttled)[0]
    conditions = device_records.measurements(hot)[0].conditions
    assert conditions["steady"] is False and conditions["findings"] == [finding]


def test_records_are_submitted_and_read_again(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "results" / "board.json"
    assert device_records.submit([record], file, by="A. N. Other") == 1
    again = record.model_copy(update={"reason": "", "peak_bytes": 5})
    assert device_records.submit([again], file) == 2
    first, second = device_records.load_records(file.parent)
    assert first.provenance.by == "A. N. Other" and second.peak_bytes == 5
    assert first.model_copy(update={"provenance": record.provenance}) == record
    assert device_records.load_records(tmp_path / "none") == []
    with pytest.raises(errors.UsageError, match="holds this measurement of net already"):
        device_records.submit([record], file)


def test_only_figures_are_submitted(record: Record, tmp_path: Path) -> None:
    failed = record.model_copy(update={"status": "not measured", "reason": "no runtime"})
    with pytest.raises(errors.UsageError, match="only measured records are submitted, got: no runtime"):
        device_records.submit([failed], tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r.update(extra=1), r"records\[0\]\.extra"),
        (lambda r: r["rounds"][0]["ms"].append(-1.0), r"records\[0\]\.rounds\.0\.ms\.3"),
        (lambda r: r["provenance"].update(made="yesterday"), r"records\[0\]\.provenance\.made"),
        (lambda r: r.update(schema=2), r"records\[0\]\.schema"),
        (lambda r: r.pop("network"), r"records\[0\]\.network"),
    ],
)
def test_a_damaged_record_is_refused_by_file_and_field(record: Record, tmp_path: Path, change: Any, where: str) -> None:
    device_records.submit([record], tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    change(content["records"][0])
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(errors.UsageError, match=rf"r\.json: {where}"):
        device_records.load_records(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 9, "records": []}', '{"schema": 1}'])
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(errors.UsageError, match=r"r\.json: "):
        device_records.load_records(tmp_path)


def test_a_record_tells_nothing_about_who_or_where(bundles: Any) -> None:
    pytest.importorskip("onnxruntime")
    (made,) = measured_here(bundles("good"))
    text = json.dumps(device_records.to_json(made))
    for private in (os.uname().nodename, str(Path.home()), str(bundles("good").parent), "/far/away"):
        assert len(private) < 3 or private not in text


# -------------------------------------------------------------------------------------------------------------- adb


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


def script(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


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


# ------------------------------------------------------------------------------------------------------ command line


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
