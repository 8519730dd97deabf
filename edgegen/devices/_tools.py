"""The vendors' own benchmark programs, for devices without a Python: how they are called, and what they print.

trtexec (TensorRT), benchmark_app (OpenVINO), benchmark_model (LiteRT), benchncnn (ncnn). None of them compares outputs
with golden ones, and benchncnn does not even read the weights; a record says so.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from edgegen import errors

TOOLS = {"tensorrt": "trtexec", "openvino": "benchmark_app", "litert": "benchmark_model", "ncnn": "benchncnn"}
PLACES = ("/usr/src/tensorrt/bin", "/opt/intel/openvino/samples_bin", "/data/local/tmp", "/usr/local/bin")
TIMES = "times.json"  # every single run, as trtexec writes them
_OPENVINO_TYPES = {"float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "uint8": "u8"}
_OPENVINO = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def find(tool: str) -> str:
    """A shell script that prints where the tool is, if anywhere."""
    places = " ".join(shlex.quote(f"{place}/{tool}") for place in PLACES)
    return f'command -v {tool} || for f in {places}; do [ -x "$f" ] && echo "$f" && break; done; true'


def command(tool: str, path: str, item: Mapping[str, Any], seconds: float) -> str:
    """The shell command that runs `item` for `seconds`, in the folder of its files; both streams on standard output."""
    options, file = item["options"], shlex.quote(item["file"])
    threads, call, time = int(options.get("threads") or 0), shlex.quote(path), max(1, round(seconds))
    if tool == "trtexec":
        more = f"--stronglyTyped --useCudaGraph --duration={time} --warmUp=1000 --exportTimes={TIMES}"
        return f"{call} --onnx={file} {more} 2>&1"
    if tool == "benchmark_app":
        # it takes a number of threads only without a performance hint; one stream is what the latency hint would choose
        count = f"-hint none -nstreams 1 -nthreads {threads} " if threads else "-hint latency "
        exact = f"-infer_precision {options['inference_precision']} " if options.get("inference_precision") else ""
        # without -ip it makes inputs that look like images u8, and so times another graph
        kind = _OPENVINO_TYPES.get(item["inputs"][0]["dtype"], "f32")
        return f"{call} -m {file} -d CPU -api sync {count}{exact}-ip {kind} -t {time} 2>&1"
    if tool == "benchmark_model":
        count = f"--num_threads={threads} " if threads else ""
        return f"{call} --graph={file} {count}--num_runs=50 --min_secs={time} --warmup_runs=5 2>&1"
    if tool == "benchncnn":
        shape = ",".join(str(side) for side in reversed(item["inputs"][0]["shape"][1:]))
        return f"{call} 50 {threads or '$(nproc)'} 0 -1 0 param={file} 'shape=[{shape}]' 2>&1"
    raise errors.UsageError(f"unknown tool {tool!r}; there are: {', '.join(TOOLS.values())}")


def parse(tool: str, text: str, item: Mapping[str, Any], times: str = "") -> dict[str, Any]:
    """Figures in ms: {"whole": with copies of inputs and outputs, "bare": without, "load", "first"}, what there is.

    whole and bare hold some of median, mean, min, max, n. All but trtexec leave the copies out of what they time.
    samples, bare_samples: every single run, where the tool tells them. version: the runtime's, where it says so.

    Raises:
        RuntimeFailed: the tool failed, ran elsewhere than asked, or prints what is not understood; its last words.
    """
    parser = {"trtexec": _trtexec, "benchmark_app": _app, "benchmark_model": _model, "benchncnn": _ncnn}[tool]
    found = parser(text, item, times)
    if not any(found.get(kind, {}).get(figure) for kind in ("whole", "bare") for figure in ("median", "mean")):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        blamed = [line for line in lines if re.search(r"error|fail|\[E\]", line, re.I)] or lines or ["it said nothing"]
        raise errors.RuntimeFailed(f"{tool} gave no latency: {blamed[-1][:300]}")
    return found


def _trtexec(text: str, item: Mapping[str, Any], times: str) -> dict[str, Any]:
    """Latency is H2D + GPU compute + D2H of one query; GPU compute alone is the figure without copies."""
    found: dict[str, Any] = {"whole": _summary(text, "Latency"), "bare": _summary(text, "GPU Compute Time")}
    if version := re.search(r"TensorRT version: ([\d.]+)", text):
        found["version"] = version[1]
    if times.strip():
        runs = json.loads(times)
        found["samples"] = [float(run["latencyMs"]) for run in runs]
        found["bare_samples"] = [float(run["computeMs"]) for run in runs]
        found["whole"]["n"] = found["bare"]["n"] = len(runs)
    return found


def _summary(text: str, name: str) -> dict[str, float]:
    """`name: min = 1 ms, max = 2 ms, mean = 1.5 ms, median = 1.4 ms, percentile(99%) = 2 ms`."""
    line = re.search(rf"\] {name}: (min = .*)$", text, re.M)
    return {k: float(v) for k, v in re.findall(r"(\w+) = ([\d.e+-]+) ms", line[1])} if line else {}


def _app(text: str, item: Mapping[str, Any], times: str) -> dict[str, Any]:
    devices = re.search(r"Execution Devices:\s*\[?'?(.*?)'?\]?\s*$", text, re.M)
    if devices and devices[1].strip() not in ("CPU", ""):
        raise errors.RuntimeFailed(f"asked for CPU, benchmark_app ran on {devices[1].strip()}")
    asked = _OPENVINO.get(str(item["options"].get("inference_precision", "")))
    got = re.search(r"INFERENCE_PRECISION_HINT\s*:\s*(?:<Type: ')?(\w+)", text)
    if asked and got and _OPENVINO.get(got[1], got[1]) != asked:
        raise errors.RuntimeFailed(f"asked for {asked} arithmetic, benchmark_app computes in {got[1]}")
    names = {"median": "Median", "mean": "Average", "min": "Min", "max": "Max", "n": "Count"}
    bare = {}
    for key, name in names.items():
        if value := re.search(rf"{name}:\s+([\d.]+)", text):
            bare[key] = float(value[1])
    found: dict[str, Any] = {"bare": bare}
    for key, words in (("load", "Compile model took"), ("first", "First inference took")):
        if value := re.search(rf"{words} ([\d.]+) ms", text):
            found[key] = float(value[1])
    if version := re.search(r"Build \.+ (\S+)", text):
        found["version"] = version[1]
    return found


def _model(text: str, item: Mapping[str, Any], times: str) -> dict[str, Any]:
    """Microseconds; the last `count=` line is the one of the measured runs."""
    found: dict[str, Any] = {}
    if line := re.search(r"Inference timings in us: Init: ([\d.e+]+), First inference: ([\d.e+]+)", text):
        found |= {"load": float(line[1]) / 1000, "first": float(line[2]) / 1000}
    lines = re.findall(r"count=(\d+) .*?min=([\d.e+]+) max=([\d.e+]+) avg=([\d.e+]+)(?:.*?median=([\d.e+]+))?", text)
    if found and lines:
        count, *figures = lines[-1]
        found["bare"] = {k: float(v) / 1000 for k, v in zip(("min", "max", "mean", "median"), figures) if v}
        found["bare"]["n"] = int(count)
    return found


def _ncnn(text: str, item: Mapping[str, Any], times: str) -> dict[str, Any]:
    lines = re.findall(r"min =\s*([\d.]+)\s+max =\s*([\d.]+)\s+avg =\s*([\d.]+)", text)
    if not lines:
        return {}
    loops = re.search(r"loop_count = (\d+)", text)
    bare: dict[str, float] = {key: float(value) for key, value in zip(("min", "max", "mean"), lines[-1])}
    return {"bare": {**bare, "n": int(loops[1]) if loops else 0}}
