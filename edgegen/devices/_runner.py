"""The program that goes to the device: runs artifacts there, measures, and writes down every raw sample.

One file for Python 3.8 and newer, standard library only (numpy comes with every Python runtime); it imports nothing of
edgegen. `runner.py facts` tells what the device is. `runner.py run FOLDER` does what FOLDER/job.json says and appends
every finished part to FOLDER/log.jsonl, so that it goes on where it was cut off; progress goes to stdout as JSON lines;
it ends when its input ends. `runner.py work FOLDER ITEM` is the process of one artifact, which may crash alone.

job.json: {"settings": {rounds, iterations, seconds, warm_seconds, cold, seed, limit_s}, "items": [item]}
item: {"runtime", "label", "folder" (of the files), "file", "files", "inputs", "outputs", "options", "golden"}
log.jsonl: {"kind": "facts"|"state"|"cold"|"golden"|"warm"|"round"|"failed"|"done", "item": number, ...}; times in ms.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import importlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SETTLED = 0.97  # warm-up ends when a window is no longer faster than this share of the best one before
KEPT_WARM = 2000  # single warm-up runs that are written down
PIP = {
    "tensorrt": "sudo apt install python3-libnvinfer",
    "litert": "pip install ai-edge-litert",
    "coreml": "pip install coremltools pillow",
}


class Refused(Exception):
    """Not measured, for a reason that a user can do something about; the text is the reason."""


# ---------------------------------------------------------------------------------------------- what the device is


def facts(root: str = "/") -> dict[str, Any]:
    """What does not change: model, os, machine, cpu_model, cores, memory_bytes, python; without what cannot be read."""
    told = {
        "model": _model(root),
        "os": _system(root),
        "machine": platform.machine(),
        "cpu_model": _cpu_model(root),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "l4t": _read(root, "etc/nv_tegra_release").split("\n")[0],
        "gpu": _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
    }
    with contextlib.suppress(OSError, ValueError, AttributeError):
        told["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {key: value for key, value in told.items() if value}


def state(root: str = "/", programs: bool = True) -> dict[str, Any]:
    """What changes: load, mhz by clock, governor, celsius by zone, watts by rail; with `programs` also nvpmodel ..."""
    told = {
        "at": round(time.time(), 3),
        "mhz": _clocks(root),
        "governor": _read(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
        "celsius": _temperatures(root),
        "watts": _power(root),
    }
    with contextlib.suppress(OSError, AttributeError):
        told["load"] = round(os.getloadavg()[0], 2)
    if programs:
        told["nvpmodel"] = _said("nvpmodel", "-q").replace("\n", " ")
        told["tegrastats"] = _said("tegrastats", "--interval", "100", first_line=True)
        told["throttled"] = _said("vcgencmd", "get_throttled")  # Raspberry Pi: bits for under-voltage and throttling
        told["thermal"] = _said("pmset", "-g", "therm").replace("\n", "; ")  # macOS
        query = "--query-gpu=clocks.sm,temperature.gpu,power.draw,clocks_throttle_reasons.active"
        told["nvidia_smi"] = _said("nvidia-smi", query, "--format=csv,noheader")
    return {key: value for key, value in told.items() if value not in ("", {}, None)}


def _model(root: str) -> str:
    for name in ("proc/device-tree/model", "sys/devices/virtual/dmi/id/product_name"):
        text = _read(root, name).strip("\0 \n")
        if text:
            return text
    return _said("sysctl", "-n", "hw.model") or " ".join(
        filter(None, (_said("getprop", "ro.product.manufacturer"), _said("getprop", "ro.product.model")))
    )


def _system(root: str) -> str:
    for line in _read(root, "etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            name = line[12:].strip('"')
            return f"{name}, {platform.system()} {platform.release()}"
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    android = _said("getprop", "ro.build.version.release")
    return f"Android {android}" if android else f"{platform.system()} {platform.release()}"


def _cpu_model(root: str) -> str:
    known = dict(re.findall(r"^(.*?)\s*:\s*(.+)$", _read(root, "proc/cpuinfo"), re.M))
    return known.get("model name") or known.get("Model") or _said("sysctl", "-n", "machdep.cpu.brand_string")


def _clocks(root: str) -> dict[str, Any]:
    """MHz now, and the most allowed as "<clock> max"."""
    found = {}
    for folder in _glob(root, "sys/devices/system/cpu/cpufreq/policy*"):
        for name, end in (("scaling_cur_freq", ""), ("scaling_max_freq", " max")):
            found[os.path.basename(folder) + end] = _number(folder, name, 1e-3)  # kHz
    for folder in _glob(root, "sys/class/devfreq/*"):
        for name, end in (("cur_freq", ""), ("max_freq", " max")):
            found[os.path.basename(folder) + end] = _number(folder, name, 1e-6)  # Hz
    if not found:
        speeds = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(root, "proc/cpuinfo"), re.M)]
        found["cpu"] = round(statistics.mean(speeds), 1) if speeds else None
    return {name: mhz for name, mhz in found.items() if mhz is not None}


def _temperatures(root: str) -> dict[str, Any]:
    """Degrees Celsius by zone."""
    found = {}
    for folder in _glob(root, "sys/class/thermal/thermal_zone*"):
        found[_read(folder, "type").strip() or os.path.basename(folder)] = _number(folder, "temp", 1e-3)
    return {zone: degrees for zone, degrees in found.items() if degrees is not None and -50 < degrees < 200}


def _power(root: str) -> dict[str, Any]:
    """Watts by rail, from hwmon: power*_input where there is one, else volts times amperes (INA sensors)."""
    found = {}
    for folder in _glob(root, "sys/class/hwmon/hwmon*"):
        chip = _read(folder, "name").strip()
        for number in range(1, 9):
            watts = _number(folder, f"power{number}_input", 1e-6)
            volts, amperes = (_number(folder, f"{kind}{number}_input", 1e-3) for kind in ("in", "curr"))
            if watts is None and volts is not None and amperes is not None:
                watts = round(volts * amperes, 4)
            if watts is not None:
                label = _read(folder, f"power{number}_label") or _read(folder, f"in{number}_label")
                found[f"{chip} {(label.strip() or number)}"] = watts
    return found


def _glob(root: str, pattern: str) -> list[str]:
    return sorted(glob.glob(os.path.join(root, pattern)))


def _read(root: str, name: str) -> str:
    try:
        with open(os.path.join(root, name), encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def _number(folder: str, name: str, factor: float) -> float | None:
    with contextlib.suppress(ValueError):
        return round(float(_read(folder, name)) * factor, 4)
    return None


def _said(program: str, *arguments: str, first_line: bool = False) -> str:
    """What a program of the device prints; empty when there is none or it fails."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [path, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return ""
    timer = threading.Timer(5, process.kill)
    timer.start()
    with process, contextlib.suppress(OSError):
        pipe: Any = process.stdout
        if first_line:
            text = pipe.readline()
            process.kill()
            return text.decode("utf-8", "replace").strip()
        text = pipe.read()
        timer.cancel()
        return text.decode("utf-8", "replace").strip() if process.wait() == 0 else ""
    return ""


# ------------------------------------------------------------------------------------------------------- runtimes
# Each function opens an item and gives {"version", "run": feeds -> outputs, "bare": run without copying inputs and
# outputs or None, "got": settings read back}. Settings are those of edgegen/runtimes/<name>.py.


def _onnxruntime(item: dict[str, Any], path: str, feeds: dict[str, Any]) -> dict[str, Any]:
    ort = _imported("onnxruntime", "onnxruntime")
    ort.disable_telemetry_events()
    options, told = ort.SessionOptions(), item["options"]
    options.intra_op_num_threads, options.inter_op_num_threads = int(told.get("threads") or 0), 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    for key, value in told.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, str(value))
    wanted = told.get("provider", "CPUExecutionProvider")
    if wanted not in ort.get_available_providers():
        have = ", ".join(ort.get_available_providers())
        raise Refused(f"onnxruntime there has no {wanted}, only {have}; not measured on anything else")
    session = ort.InferenceSession(
        path, options, providers=[wanted], disabled_optimizers=list(told.get("disabled_optimizers", []))
    )
    session.disable_fallback()
    if session.get_providers()[0] != wanted:
        raise Refused(f"asked for {wanted}, onnxruntime took {session.get_providers()[0]}")
    names, binding = [spec["name"] for spec in item["outputs"]], session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    made = {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in zip(names, session.run(names, feeds))}
    for name, value in made.items():
        binding.bind_ortvalue_output(name, value)
    return {
        "version": ort.__version__,
        "run": lambda given: dict(zip(names, session.run(names, given))),
        "bare": lambda: session.run_with_iobinding(binding),
        "got": {"providers": session.get_providers(), "threads": session.get_session_options().intra_op_num_threads},
    }


def _openvino(item: dict[str, Any], path: str, feeds: dict[str, Any]) -> dict[str, Any]:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report to its maker
    ov = _imported("openvino", "openvino")
    told, device = item["options"], item["options"].get("device", "CPU")
    hint = told.get("performance_hint", "LATENCY")
    config = {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": int(told.get("threads") or 0)}
    if "inference_precision" in told:
        config["INFERENCE_PRECISION_HINT"] = told["inference_precision"]
    compiled = ov.Core().compile_model(path, device, config)
    got = list(compiled.get_property("EXECUTION_DEVICES"))
    if got != [device]:
        raise Refused(f"asked for {device}, openvino took {' and '.join(got)}")
    precision = re.sub(r".*'(\w+)'.*", r"\1", str(compiled.get_property("INFERENCE_PRECISION_HINT")))
    names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    wanted = names.get(told.get("inference_precision", ""), precision)
    if precision != wanted:
        raise Refused(f"asked for {wanted} arithmetic, openvino computes in {precision} on this processor")
    request, bound = compiled.create_infer_request(), compiled.create_infer_request()
    ports = {spec["name"]: compiled.output(spec["name"]) for spec in item["outputs"]}
    for name, value in feeds.items():
        bound.set_tensor(name, ov.Tensor(value, shared_memory=True))

    def run(given: dict[str, Any]) -> dict[str, Any]:
        found = request.infer(given, share_inputs=True, share_outputs=False)
        return {name: found[port] for name, port in ports.items()}

    threads = compiled.get_property("INFERENCE_NUM_THREADS")
    return {
        "version": ov.get_version(),
        "run": run,
        "bare": lambda: (bound.start_async(), bound.wait()),
        "got": {"devices": got, "inference_precision": precision, "threads": threads},
    }


def _litert(item: dict[str, Any], path: str, feeds: dict[str, Any]) -> dict[str, Any]:
    """The file may take images channels last; turning them is part of a run, and of no run without copies."""
    np = _imported("numpy", "litert")
    interpreter, version = _interpreter()
    threads, layout = int(item["options"].get("threads") or 0), item["options"].get("layout", {})
    net = interpreter(model_path=path, num_threads=threads or None)
    net.allocate_tensors()
    given = _tensors(net, "inputs", "args_%d", net.get_input_details(), item["inputs"])
    made = _tensors(net, "outputs", "output_%d", net.get_output_details(), item["outputs"])

    def put(values: dict[str, Any]) -> None:
        for name, index in given.items():
            value = values[name]
            last = layout.get(name) == "NHWC" and value.ndim == 4
            net.set_tensor(index, np.ascontiguousarray(value.transpose(0, 2, 3, 1) if last else value))

    def take(name: str) -> Any:
        value = net.get_tensor(made[name])
        return np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if layout.get(name) == "NHWC" else value

    def run(values: dict[str, Any]) -> dict[str, Any]:
        put(values)
        net.invoke()
        return {name: take(name) for name in made}

    put(feeds)
    return {"version": version, "run": run, "bare": net.invoke, "got": {"threads": threads}}


def _interpreter() -> tuple[Any, str]:
    for module, package in (
        ("ai_edge_litert.interpreter", "ai-edge-litert"),
        ("tflite_runtime.interpreter", "tflite-runtime"),
        ("tensorflow.lite.python.interpreter", "tensorflow"),
    ):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(module).Interpreter, f"{package} {_distribution(package)}"
    raise Refused(_absent("ai_edge_litert", "litert"))


def _tensors(net: Any, side: str, pattern: str, details: list[dict[str, Any]], specs: list[dict[str, Any]]) -> Any:
    """Name in the graph -> number of the tensor: by the file's only signature, else in order."""
    signatures = list(net._get_full_signature_list().values()) if hasattr(net, "_get_full_signature_list") else []
    named = signatures[0][side] if len(signatures) == 1 else {}
    ordered = [detail["index"] for detail in details]
    if len(ordered) != len(specs):
        raise Refused(f"the file has {len(ordered)} {side}, the network {len(specs)}")
    return {spec["name"]: named.get(pattern % number, ordered[number]) for number, spec in enumerate(specs)}


def _ncnn(item: dict[str, Any], path: str, feeds: dict[str, Any]) -> dict[str, Any]:
    np, ncnn = _imported("numpy", "ncnn"), _imported("ncnn", "ncnn")
    told, net = item["options"], ncnn.Net()
    net.opt.num_threads = int(told.get("threads") or 0) or os.cpu_count() or 1
    net.opt.use_vulkan_compute = False
    for flag in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage"):
        if hasattr(net.opt, flag):
            setattr(net.opt, flag, bool(told.get("fp16_arithmetic", False)) and "fp16" in flag)
    if net.load_param(path) != 0 or net.load_model(os.path.splitext(path)[0] + ".bin") != 0:
        raise Refused(f"ncnn there refuses {os.path.basename(path)}")
    given, made = list(zip(net.input_names(), item["inputs"])), list(zip(net.output_names(), item["outputs"]))

    def put(values: dict[str, Any]) -> list[Any]:
        return [ncnn.Mat(np.ascontiguousarray(values[s["name"]][0], dtype="float32")).clone() for _, s in given]

    def go(mats: list[Any]) -> list[Any]:
        with net.create_extractor() as extractor:
            for (name, _), mat in zip(given, mats):
                extractor.input(name, mat)
            found = [extractor.extract(name) for name, _ in made]
            if any(code != 0 for code, _ in found):
                raise Refused(f"ncnn fails with {[code for code, _ in found]}")
            return [mat for _, mat in found]

    def run(values: dict[str, Any]) -> dict[str, Any]:
        return {s["name"]: np.array(mat).reshape(s["shape"]) for (_, s), mat in zip(made, go(put(values)))}

    held, got = put(feeds), {"threads": net.opt.num_threads}
    return {"version": ncnn.__version__, "run": run, "bare": lambda: go(held), "got": got}


def _executorch(item: dict[str, Any], path: str, feeds: dict[str, Any]) -> dict[str, Any]:
    np, torch = _imported("numpy", "executorch"), _imported("torch", "executorch")
    runtime = _imported("executorch.runtime", "executorch")
    threads, specs = int(item["options"].get("threads") or 0), item["inputs"]
    if threads:
        _imported("executorch.extension.pybindings.portable_lib", "executorch")._unsafe_reset_threadpool(threads)
    method = runtime.Runtime.get().load_program(path).load_method("forward")
    if method is None:
        raise Refused("the program has no method 'forward'")

    def put(given: dict[str, Any]) -> list[Any]:
        return [torch.from_numpy(np.ascontiguousarray(given[spec["name"]], spec["dtype"])) for spec in specs]

    def run(given: dict[str, Any]) -> dict[str, Any]:
        return {spec["name"]: value.numpy().copy() for spec, value in zip(item["outputs"], method.execute(put(given)))}

    held, got = put(feeds), {"threads": threads or "the runtime's own number"}
    return {"version": _distribution("executorch"), "run": run, "bare": lambda: method.execute(held), "got": got}


def _coreml(item: dict[str, Any], path: str, feeds: dict[str, Any]) -> dict[str, Any]:
    if platform.system() != "Darwin":
        raise Refused(f"Core ML runs on Apple devices only; this one is {platform.system()}")
    ct = _imported("coremltools", "coreml")
    unit, pixels = item["options"].get("compute_unit", "ALL"), (item["options"].get("input") or {}).get("pixels")
    net = ct.models.MLModel(path, compute_units=getattr(ct.ComputeUnit, unit))

    def run(given: dict[str, Any]) -> dict[str, Any]:
        if pixels:
            given = {name: _image(value, pixels) for name, value in given.items()}
        made = net.predict(given)
        return {spec["name"]: made[spec["name"]] for spec in item["outputs"]}

    return {"version": ct.__version__, "run": run, "bare": None, "got": {"compute_unit": unit}}


def _image(value: Any, pixels: dict[str, Any]) -> Any:
    """The picture that becomes this network input: pixel = scale * input + bias, rounded to 8 bits."""
    np, pictures = _imported("numpy", "coreml"), _imported("PIL.Image", "coreml")
    scale, bias = (np.asarray(pixels[key], "float64").reshape(-1, 1, 1) for key in ("scale", "bias"))
    raw = np.clip(np.rint(value[0] * scale + bias), 0, 255).astype("uint8")
    return pictures.fromarray(raw[0] if len(raw) == 1 else raw.transpose(1, 2, 0))


def _build_engine(folder: str) -> str:
    """The bundle's own script builds the engine, or keeps one that fits; its last line is where it is."""
    _imported("tensorrt", "tensorrt")
    done = subprocess.run([sys.executable, os.path.join(folder, "build_engine.py")], capture_output=True, check=False)
    if done.returncode != 0:
        raise Refused(f"build_engine.py: {_last_line(done.stderr.decode('utf-8', 'replace'))}")
    return _last_line(done.stdout.decode("utf-8", "replace"))


def _tensorrt(item: dict[str, Any], path: str, feeds: dict[str, Any]) -> dict[str, Any]:
    """`path` is the built engine; arrays go to the GPU and back by libcudart alone."""
    np, trt = _imported("numpy", "tensorrt"), _imported("tensorrt", "tensorrt")
    with open(path, "rb") as handle:
        engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(handle.read())
    if engine is None:
        raise Refused(f"TensorRT {trt.__version__} cannot load the engine it built")
    context, cuda = engine.create_execution_context(), _Cuda()
    made = {s["name"]: np.empty(s["shape"], s.get("dtype", "float32")) for s in item["outputs"]}
    sizes = {name: value.nbytes for name, value in (*feeds.items(), *made.items())}
    buffers = {name: cuda.allocate(size) for name, size in sizes.items()}
    for name, address in buffers.items():
        context.set_tensor_address(name, address)

    def bare() -> None:
        if not context.execute_async_v3(cuda.stream):
            raise Refused("TensorRT could not run the engine")
        cuda.wait()

    def run(given: dict[str, Any]) -> dict[str, Any]:
        for name, value in given.items():
            cuda.copy(buffers[name], np.ascontiguousarray(value).ctypes.data, value.nbytes, 1)
        bare()
        for name, value in made.items():
            cuda.copy(value.ctypes.data, buffers[name], value.nbytes, 2)
        return {name: value.copy() for name, value in made.items()}

    kept = (engine, context, cuda)
    return {"version": trt.__version__, "run": run, "bare": bare, "got": {"device": "GPU"}, "kept": kept}


class _Cuda:
    """As much of the CUDA runtime as moving arrays needs, by ctypes."""

    def __init__(self) -> None:
        import ctypes
        import ctypes.util

        found = ctypes.util.find_library("cudart")
        names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", *([found] if found else [])]
        self._c: Any = ctypes
        self._library: Any = None
        for name in names + glob.glob("/usr/local/cuda*/lib64/libcudart.so*"):
            with contextlib.suppress(OSError):
                self._library = ctypes.CDLL(name)
                break
        if self._library is None:
            raise Refused("libcudart is not on the device: install the CUDA runtime")
        made = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(made))
        self.stream = made.value

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the GPU."""
        made = self._c.c_void_p()
        self._call("cudaMalloc", self._c.byref(made), self._c.c_size_t(max(1, size)))
        return int(made.value or 0)

    def copy(self, to: int, source: int, size: int, kind: int) -> None:
        """Copy and wait; kind 1: to the GPU, 2: from it."""
        there, here, stream = (self._c.c_void_p(place) for place in (to, source, self.stream))
        self._call("cudaMemcpyAsync", there, here, self._c.c_size_t(size), kind, stream)
        self.wait()

    def wait(self) -> None:
        """Until the stream is empty."""
        self._call("cudaStreamSynchronize", self._c.c_void_p(self.stream))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise Refused(f"{name} failed with CUDA error {code}")


ENGINES = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "litert": _litert,
    "ncnn": _ncnn,
    "executorch": _executorch,
    "coreml": _coreml,
    "tensorrt": _tensorrt,
}


IMPORTING = [0.0]  # seconds that imports took so far: a load in another language has none


def _imported(module: str, runtime: str) -> Any:
    top, begin = module.split(".")[0], time.perf_counter()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == top:
            raise Refused(_absent(top, runtime)) from error
        raise Refused(f"{top} does not import on the device: {error}") from error
    except (ImportError, OSError, AttributeError) as error:
        raise Refused(f"{top} does not import on the device: {_last_line(str(error))}") from error
    finally:
        IMPORTING[0] += time.perf_counter() - begin


def _absent(package: str, runtime: str) -> str:
    cure = PIP.get(runtime, f"pip install {package}")
    return f"{package} is not on the device: {cure} there (for {sys.executable}; another Python: --device-python)"


def _distribution(package: str) -> str:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "unknown"


# ------------------------------------------------------------------------------------- the process of one artifact


class Work:
    """One loaded artifact; each public method is a request of the supervisor."""

    def __init__(self, folder: str, number: int):
        job = _job(folder)
        self.item, self.settings = job["items"][number], job["settings"]
        self.place = os.path.join(folder, self.item["folder"])
        self.engine: dict[str, Any] = {}
        self.cases: dict[str, Any] = {}
        self.wanted: dict[str, Any] = {}
        self.feeds: dict[str, Any] = {}

    def open(self) -> dict[str, Any]:
        """Import, load and run once in this fresh process; the page cache is emptied of the files where that goes."""
        dropped = self._drop_pages()
        np = _imported("numpy", self.item["runtime"])
        self._read_golden(np)
        path = os.path.join(self.place, self.item["file"])
        if self.item["runtime"] == "tensorrt":
            path = _build_engine(os.path.dirname(path))
        begin, before = time.perf_counter(), IMPORTING[0]
        self.engine = ENGINES[self.item["runtime"]](self.item, path, self.feeds)
        loaded = time.perf_counter()
        self.engine["run"](self.feeds)
        first = time.perf_counter()
        return {
            "import_ms": _ms(0, IMPORTING[0]),
            "load_ms": _ms(begin, loaded - (IMPORTING[0] - before)),
            "first_ms": _ms(loaded, first),
            "page_cache": "dropped" if dropped else "as it was",
            "version": str(self.engine["version"]),
            "got": self.engine["got"],
            "copies_told_apart": self.engine["bare"] is not None,
        }

    def _drop_pages(self) -> bool:
        if not hasattr(os, "posix_fadvise"):
            return False
        for name in self.item["files"]:
            with open(os.path.join(self.place, name), "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return True

    def _read_golden(self, np: Any) -> None:
        """The golden samples, or noise where there are none, and the first batch of them, which is what is timed."""
        shapes = {spec["name"]: spec["shape"] for spec in self.item["inputs"]}
        if self.item.get("golden"):
            with np.load(os.path.join(self.place, self.item["golden"]["file"]), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            self.cases = {name[6:]: value for name, value in arrays.items() if name.startswith("input:")}
            self.wanted = {name[7:]: value for name, value in arrays.items() if name.startswith("output:")}
        else:
            noise = np.random.RandomState(0)
            self.cases = {n: noise.uniform(0, 1, shape).astype("float32") for n, shape in shapes.items()}
        self.feeds = self._batch(np, 0)

    def _batch(self, np: Any, start: int) -> dict[str, Any]:
        shape = self.item["inputs"][0]["shape"]
        size = shape[0] if shape and isinstance(shape[0], int) else 1
        count = min(len(value) for value in self.cases.values())
        rows = np.minimum(np.arange(start, start + size), count - 1)
        return {name: np.ascontiguousarray(value[rows]) for name, value in self.cases.items()}

    def golden(self) -> dict[str, Any]:
        """Largest absolute difference to the golden outputs, over all samples."""
        np = importlib.import_module("numpy")
        if not self.wanted:
            return {"checked": False, "reason": "the bundle holds no golden outputs"}
        count, step = min(len(v) for v in self.wanted.values()), len(next(iter(self.feeds.values())))
        worst = 0.0
        for start in range(0, count, step):
            made = self.engine["run"](self._batch(np, start))
            for name, value in self.wanted.items():
                want, got = value[start : start + step], made.get(name)
                if got is None or np.shape(got)[1:] != want.shape[1:]:
                    shape = None if got is None else np.shape(got)
                    raise Refused(f"output {name!r} has shape {shape}, expected (n, {want.shape[1:]})")
                gap = np.abs(np.asarray(got, "float64")[: len(want)] - want.astype("float64"))
                worst = max(worst, float(gap.max())) if np.isfinite(gap).all() else float("inf")
        tolerance = float(self.item["golden"]["tolerance"])
        told = worst if worst != float("inf") else "NaN or infinity"
        return {"checked": True, "samples": count, "worst": told, "tolerance": tolerance, "ok": worst <= tolerance}

    def warm(self) -> dict[str, Any]:
        """Run until a window is no faster than the best before; every single run up to KEPT_WARM."""
        lowest, longest = self.settings["warm_seconds"], max(3.0, 10 * self.settings["warm_seconds"])
        begin = time.perf_counter()
        runs: list[float] = []
        medians: list[float] = []
        while True:
            window = max(3, min(50, round(50 / max(medians[-1], 1e-3)))) if medians else 1
            taken = self._time(self._whole, window)
            runs += taken
            medians.append(statistics.median(taken))
            elapsed = time.perf_counter() - begin
            settled = len(medians) > 2 and medians[-1] >= SETTLED * min(medians[:-1])
            if elapsed >= longest or (settled and elapsed >= lowest):
                return {"ms": runs[:KEPT_WARM], "runs": len(runs), "settled": settled, "last": medians[-1]}

    def round(self, iterations: int) -> dict[str, Any]:
        """`iterations` runs with copies and as many without, where the runtime tells them apart."""
        told: dict[str, list[float]] = {"ms": [], "bare_ms": []}
        kinds = [("ms", self._whole)]
        if self.engine["bare"] is not None:
            kinds.append(("bare_ms", self.engine["bare"]))
        for name, call in kinds:
            self._time(call, max(2, iterations // 8))
            told[name] = self._time(call, iterations, 4 * self.settings["seconds"])
        return told

    def _whole(self) -> None:
        self.engine["run"](self.feeds)

    @staticmethod
    def _time(call: Callable[[], Any], count: int, at_most: float | None = None) -> list[float]:
        """ms of each call; stops early after `at_most` seconds, with three at least."""
        clock, taken = time.perf_counter_ns, []
        gc.collect()
        gc.disable()
        try:
            end = clock() + int(1e9 * at_most) if at_most else None
            for _ in range(count):
                start = clock()
                call()
                taken.append((clock() - start) / 1e6)
                if end is not None and start > end and len(taken) >= 3:
                    break
        finally:
            gc.enable()
        return taken

    def memory(self) -> dict[str, Any]:
        """Largest resident size of this process in bytes."""
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_bytes": size if sys.platform == "darwin" else size * 1024}


def work(folder: str, number: int) -> None:
    """Answer requests from stdin until it ends. Libraries that print do so to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Work(folder, number)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(session, request.pop("do"))(**request)
        except Refused as error:
            reply = {"failed": str(error)}
        except Exception as error:  # noqa: BLE001 - the edge of the process: every error travels as a reply
            reply = {"failed": f"{type(error).__name__}: {_last_line(str(error))}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


# ----------------------------------------------------------------------------------------------------- supervisor


class Child:
    """A `work` process: `ask` gives its reply; when it dies or is late, the reason is a Refused."""

    def __init__(self, folder: str, number: int, limit_s: float):
        command = [sys.executable, os.path.abspath(__file__), "work", folder, str(number)]
        self.limit_s = limit_s
        self.words: list[str] = []
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True
        )
        CHILDREN.append(self.process)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stderr:
            if line.strip():
                self.words = [*self.words[-5:], line.strip()[:300]]

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its reply, `limit_s` seconds at most."""
        timer = threading.Timer(self.limit_s, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(dict(fields, do=do)) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        late = not timer.is_alive()
        timer.cancel()
        if not line:
            raise Refused(self._end(do, late))
        reply = json.loads(line)
        if "failed" in reply:
            raise Refused(reply["failed"])
        return reply

    def _end(self, do: str, late: bool) -> str:
        code = self.process.wait()
        how = f"crashed (signal {-code})" if code < 0 else f"ended by itself (exit code {code})"
        how = f"gave no answer in {self.limit_s:g} s" if late else how
        return f"{how} at {do}" + (f"; last words: {self.words[-1]}" if self.words else "")

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.process.kill()
        self.process.wait()
        CHILDREN.remove(self.process)


CHILDREN: list[Any] = []


class Log:
    """log.jsonl: one finished part a line; a line that was cut off is not one."""

    def __init__(self, path: str):
        self.path, self.lines = path, []
        for line in _read("", path).split("\n"):
            with contextlib.suppress(ValueError):
                self.lines.append(json.loads(line))
        if os.path.exists(path):
            with open(path, "a", encoding="utf-8") as handle:
                handle.write("\n")

    def add(self, kind: str, **fields: Any) -> None:
        """Write one line, and have it on the disk."""
        line = dict(fields, kind=kind)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.lines.append(line)

    def of(self, kind: str, item: Any = None) -> list[dict[str, Any]]:
        """Lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind and line.get("item") == item]


def run(folder: str) -> None:
    """Do what is left of the job in `folder`."""
    with _alone(os.path.dirname(os.path.abspath(folder))):
        job, log = _job(folder), Log(os.path.join(folder, "log.jsonl"))
        session = 1 + len(log.of("facts"))
        log.add("facts", facts=facts(), session=session)
        if not log.of("state", "before"):
            log.add("state", item="before", state=state())
        failed: dict[int, str] = {}
        for number in range(len(job["items"])):
            with _failing(failed, number, log):
                _cold(folder, number, job["settings"], log)
        _steady(folder, job, failed, log, session)
        log.add("state", item="after", state=state())
        log.add("done", session=session)


@contextlib.contextmanager
def _failing(failed: dict[int, str], number: int, log: Log) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        failed[number] = str(error)
        log.add("failed", item=number, reason=str(error))
        _say("failed", item=number, reason=str(error))


def _cold(folder: str, number: int, settings: dict[str, Any], log: Log) -> None:
    """Loads and first runs, each in a fresh process."""
    for turn in range(len(log.of("cold", number)), settings["cold"]):
        child = Child(folder, number, settings["limit_s"])
        try:
            log.add("cold", item=number, **child.ask("open"))
        finally:
            child.close()
        _say("cold", item=number, turn=turn + 1, of=settings["cold"])


def _steady(folder: str, job: dict[str, Any], failed: dict[int, str], log: Log, session: int) -> None:
    """Rounds in turns over all items, in an order shuffled per round, each in a process of its own."""
    settings, children, iterations = job["settings"], {}, {}
    left = [n for n in range(len(job["items"])) if n not in failed and len(log.of("round", n)) < settings["rounds"]]
    try:
        for number in left:
            with _failing(failed, number, log):
                children[number] = Child(folder, number, settings["limit_s"])
                children[number].ask("open")
                if not log.of("golden", number):
                    log.add("golden", item=number, told=children[number].ask("golden"))
                warm = children[number].ask("warm")
                log.add("warm", item=number, session=session, **warm)
                wanted = round(1000 * settings["seconds"] / max(warm["last"], 1e-6))
                iterations[number] = settings["iterations"] or max(3, min(settings.get("most", 400), wanted))
        order = random.Random(settings["seed"])
        for turn in range(settings["rounds"]):
            for number in order.sample(left, len(left)):
                if number not in failed and len(log.of("round", number)) <= turn:
                    with _failing(failed, number, log):
                        time.sleep(0.05)  # thread pools of the process before go on spinning for a while
                        told = children[number].ask("round", iterations=iterations[number])
                        log.add("round", item=number, round=turn, session=session, state=state(programs=False), **told)
                        _say("round", item=number, round=turn + 1, of=settings["rounds"])
        for number in left:
            if number not in failed:
                with _failing(failed, number, log):
                    log.add("memory", item=number, **children[number].ask("memory"))
    finally:
        for child in children.values():
            child.close()


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Two runs at once would disturb each other's figures."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(os.path.join(folder, "lock"), "w") as handle:
        for _ in range(100):
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.2)
        else:
            raise Refused("another run measures on this device; try again when it has ended")
        yield


def _job(folder: str) -> Any:
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as handle:
        return json.load(handle)


def _ms(begin: float, end: float) -> float:
    return round(1000 * (end - begin), 4)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _say(kind: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps(dict(fields, kind=kind)) + "\n")
    sys.stdout.flush()


def _end_with_input() -> None:
    """When the connection is cut, the input ends: stop measuring, so that a retry is not disturbed."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):  # not sys.stdin: a thread that waits in it aborts the interpreter at its end
            pass
    for process in list(CHILDREN):
        with contextlib.suppress(OSError):
            process.kill()
    os._exit(3)


def main(arguments: list[str]) -> int:
    """Exit codes: 0 done, 1 a reason on stdout, 2 wrong arguments, 3 the input ended."""
    # A runtime is looked for among the device's packages, never beside this file.
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != os.path.dirname(os.path.abspath(__file__))]
    if arguments[:1] == ["facts"]:
        _say("facts", facts=facts(), state=state())
        return 0
    if arguments[:1] == ["work"]:
        work(arguments[1], int(arguments[2]))
        return 0
    if arguments[:1] != ["run"]:
        return 2
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        run(arguments[1])
    except Refused as error:
        _say("refused", reason=str(error))
        return 1
    except OSError as error:  # a full disk; what was written before is kept
        for process in list(CHILDREN):
            process.kill()
        _say("refused", reason=f"{(error.strerror or error)} (on the device)")
        return 1
    _say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
