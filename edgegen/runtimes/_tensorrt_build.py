"""Build the TensorRT engine on this device, and read back what it became: python3 build_engine.py

Needs the device's own tensorrt package and Python 3.6 or newer (JetPack 4.6 has no other), nothing else. build.json
beside it says what is promised. The engine is kept as long as TensorRT, GPU, Jetson Linux, the ONNX file and the flags
are the same. `--check layers.json` compares what trtexec --exportLayerInfo wrote, without TensorRT.
"""
# ruff: noqa: UP006, UP035, UP045

import argparse
import ctypes
import hashlib
import importlib
import json
import os
import re
import sys
from typing import Any, Dict, List, Optional, Set, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
MIB = 1024 * 1024
SMALLEST = 16 * MIB  # a workspace below this serves no convolution
RANK = {"fp4": 0, "fp8": 1, "int8": 1, "fp16": 2, "bf16": 2, "fp32": 3}
OUT_OF_MEMORY = re.compile(r"out of memory|outofmemory|memoryallocation|insufficient memory|alloc\w* failed", re.I)
NVDLA = (
    "tensorrt cannot be imported: libnvdla_compiler.so is missing, which some system images leave out: sudo apt-get "
    "install nvidia-l4t-dla-compiler (for a container: on the device, and start it with --runtime nvidia); where there "
    "is no such package, take the file out of the previous release's (dpkg -x nvidia-l4t-dla-compiler_*.deb x), and "
    "copy it to /usr/lib/aarch64-linux-gnu/nvidia/"
)


def say(text: str) -> None:
    """One line to standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Optional[List[str]] = None) -> None:
    """Command line; leaves with a message and status 1 when the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=int, metavar="MIB", help="memory to build with (default: of what is free)")
    parser.add_argument("--rebuild", action="store_true", help="do not keep an engine that is there")
    parser.add_argument("--accept-wider", action="store_true", help="keep an engine that is wider than promised")
    parser.add_argument("--check", metavar="FILE", help="only compare layers that trtexec exported with the promise")
    chosen = parser.parse_args(arguments)
    with open(os.path.join(HERE, "build.json"), encoding="utf-8") as file:
        promise = json.load(file)
    if chosen.check:
        with open(chosen.check, encoding="utf-8") as file:
            judge(json.load(file), promise, chosen.accept_wider)
        return
    trt = import_tensorrt()
    gpu = cuda()
    now = identity(trt, gpu, promise)
    engine_file = os.path.join(HERE, "model.engine")
    reason = "asked for" if chosen.rebuild else stale(engine_file, now)
    log, errors = logger(trt)
    if reason is None:
        information = inspect(trt, log, read(engine_file))
        reason = "it cannot be loaded" if information is None else None
    if reason is not None:
        if os.path.exists(engine_file):
            say("rebuilding model.engine: " + reason)
        plan = build(trt, log, errors, promise, workspace(chosen.workspace, gpu))
        information = inspect(trt, log, plan)
        if information is None:
            sys.exit("TensorRT cannot load the engine that it has just built")
        obtained = judge(information, promise, chosen.accept_wider)
        write(engine_file, plan)
        record = {"identity": now, "promised": promise["precision"], "layers": obtained}
        write(engine_file + ".json", json.dumps(record, indent=1, sort_keys=True).encode("utf-8"))
    else:
        say("model.engine is of this device and is kept")
        judge(information, promise, chosen.accept_wider)
    say(engine_file)


def import_tensorrt() -> Any:
    """The device's tensorrt package, or one clear line about what is missing."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        if "libnvdla_compiler" in str(error):
            sys.exit(NVDLA)
        sys.exit(f"tensorrt cannot be imported ({error}): on a Jetson, sudo apt-get install python3-libnvinfer")


def cuda() -> Optional[Dict[str, Any]]:
    """{"free", "total": bytes, "capability": "8.7"} from the CUDA runtime, or None where there is no libcudart."""
    for name in ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2"):
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    parts = [ctypes.c_int(), ctypes.c_int()]
    status = library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    for part, attribute in zip(parts, (75, 76)):  # cudaDevAttrComputeCapabilityMajor and Minor
        status = status or library.cudaDeviceGetAttribute(ctypes.byref(part), attribute, 0)
    if status:
        sys.exit(f"CUDA answers with error {status}: is the GPU free, and the driver loaded?")
    return {"free": free.value, "total": total.value, "capability": f"{parts[0].value}.{parts[1].value}"}


def workspace(asked: Optional[int], gpu: Optional[Dict[str, Any]]) -> Optional[int]:
    """Bytes to build with: three quarters of what is free, at least 256 MiB less than it; None: TensorRT's default."""
    if asked is not None:
        return asked * MIB
    if gpu is None:
        say("libcudart was not found, so the free memory is not known: TensorRT chooses its workspace")
        return None
    return max(SMALLEST, min(gpu["free"] * 3 // 4, gpu["free"] - 256 * MIB))


def l4t() -> str:
    """Version of Jetson Linux such as "36.4.3"; empty on what is no Jetson."""
    try:
        with open("/etc/nv_tegra_release", encoding="utf-8") as file:
            found = re.search(r"R(\d+).*?REVISION: ([\d.]+)", file.read())
    except OSError:
        return ""
    return ".".join(found.groups()) if found else ""


def identity(trt: Any, gpu: Optional[Dict[str, Any]], promise: Dict[str, Any]) -> Dict[str, str]:
    """What an engine belongs to. An engine of another identity is not used."""
    digest = hashlib.sha256(read(os.path.join(HERE, "model.onnx"))).hexdigest()
    if digest != promise["sha256"]:
        sys.exit("model.onnx is not the file that build.json was made for: copy the whole folder again")
    flags = [promise["precision"], "typed" if typed(trt) else "flags"] + (["sparse"] if promise["sparse"] else [])
    return {
        "TensorRT": trt.__version__,
        "compute capability": gpu["capability"] if gpu else "unknown",
        "Jetson Linux": l4t(),
        "ONNX file": digest,
        "flags": ", ".join(flags),
    }


def stale(engine_file: str, now: Dict[str, str]) -> Optional[str]:
    """Why the engine that is there cannot be used, in one sentence; None when it can."""
    if not os.path.exists(engine_file):
        return "there is none yet"
    try:
        then = json.loads(read(engine_file + ".json").decode("utf-8"))["identity"]
    except (OSError, ValueError, KeyError):
        return "nothing says what it was built for"
    changed = [name for name in sorted(now) if then.get(name) != now[name]]
    return "; ".join(f"{name} was {then.get(name, 'unknown')}, is {now[name]}" for name in changed) or None


def major(trt: Any) -> int:
    return int(trt.__version__.split(".")[0])


def typed(trt: Any) -> bool:
    """Whether this TensorRT takes precision from the file: 10.x when asked, 11.x always, 8.x never."""
    return major(trt) >= 10


def logger(trt: Any) -> Tuple[Any, List[str]]:
    """A logger that also keeps the errors, in a list."""
    errors: List[str] = []
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                errors.append(message)
            if level in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING):
                sys.stderr.write(f"[TensorRT] {message}\n")

    return Log(), errors


def build(trt: Any, log: Any, errors: List[str], promise: Dict[str, Any], size: Optional[int]) -> bytes:
    """The serialized engine. Without enough memory it is tried again with half of the workspace, four times."""
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(os.path.join(HERE, "model.onnx")):
        told = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        sys.exit(f"TensorRT {trt.__version__} does not take model.onnx, made for {promise['tensorrt']}: {told}")
    sizes: List[Optional[int]] = [None]
    if size is not None:
        sizes = [max(SMALLEST, size >> halved) for halved in range(4)]
    for tried, current in enumerate(sizes):
        del errors[:]
        config = configure(trt, builder, promise, current, effort=1 if tried == 3 else None)
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            write(os.path.join(HERE, "timing.cache"), bytes(config.get_timing_cache().serialize()))
            return bytes(plan)
        if not any(OUT_OF_MEMORY.search(message) for message in errors):
            sys.exit(f"TensorRT built no engine: {errors[-1] if errors else 'it does not say why'}")
        told = "TensorRT's choice" if current is None else f"{current // MIB} MiB"
        say(f"not enough memory to build with a workspace of {told}")
    return sys.exit("out of memory at every size: stop other programs on this device (a desktop takes about 1 GB), "
                    "add swap, or export the network for a smaller input")


def network_flags(trt: Any) -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    if major(trt) < 10:
        return 1 << int(kinds.EXPLICIT_BATCH)
    return 1 << int(kinds.STRONGLY_TYPED) if major(trt) == 10 else 0  # 11.x knows no other kind


def configure(trt: Any, builder: Any, promise: Dict[str, Any], size: Optional[int], effort: Optional[int]) -> Any:
    """Builder settings: workspace, timing cache, all of the inspector's detail; on 8.x the precisions as flags."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if size is not None and hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    elif size is not None:
        config.max_workspace_size = size  # before 8.4
    if effort is not None and hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = effort  # fewer kernels are tried, which needs less memory
    if not typed(trt):
        if promise["precision"] in ("fp16", "int8"):
            config.set_flag(trt.BuilderFlag.FP16)
        if promise["precision"] == "int8":
            config.set_flag(trt.BuilderFlag.INT8)
    if promise["sparse"] and hasattr(trt.BuilderFlag, "SPARSE_WEIGHTS"):  # since 8.0
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    file = os.path.join(HERE, "timing.cache")
    old = read(file) if os.path.exists(file) else b""
    if not config.set_timing_cache(config.create_timing_cache(old), False):
        say("timing.cache is of another TensorRT or GPU: starting a new one")
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return config


def inspect(trt: Any, log: Any, plan: bytes) -> Any:
    """The inspector's JSON of a serialized engine; None when TensorRT cannot load it."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    return json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def judge(information: Dict[str, Any], promise: Dict[str, Any], accept_wider: bool) -> Dict[str, str]:
    """Print promised and obtained precision of each layer; leave with status 1 when the promise is not kept.

    Returns ONNX layer -> obtained precision, for the layers that the engine names.
    """
    layers = [layer for layer in information.get("Layers", []) if isinstance(layer, dict)]
    if not layers or not {"Bindings", "I/O Tensors"} & set(information):  # 10.x and 11.x
        sys.exit("the inspector tells no layers: build with detailed profiling verbosity (trtexec: "
                 "--profilingVerbosity=detailed)")
    wanted = promise["layers"]
    found: Dict[str, str] = {}
    for layer in layers:
        got = precision(layer)
        for name in named(layer) & set(wanted):
            found[name] = min(got, found.get(name, got), key=lambda kind: RANK.get(kind, 9))
    width = max([5] + [len(name) for name in wanted])
    say(f"{'layer':{width}}  promised  obtained")
    for name in wanted:
        say(f"{name:{width}}  {wanted[name]:8}  {found.get(name, 'not named by the engine')}")
    wider = [name for name in found if RANK.get(found[name], 9) > RANK[wanted[name]]]
    # 8.x chooses by speed among the precisions that its flags allow, so single layers may be wider there
    kept = not wider if not promise["weak"] else not found or 2 * len(wider) < len(found)
    if not found:
        kinds = {precision(layer) for layer in layers}
        kept = promise["precision"] in kinds or promise["precision"] == "fp32"
        say(f"the engine names no layer of the file; its layers are: {', '.join(sorted(kinds))}")
    if not kept and not accept_wider:
        where = f" for {len(wider)} of {len(wanted)} layers" if wider else ""
        sys.exit(f"promised {promise['precision']}, not obtained{where}: see the table (--accept-wider keeps it)")
    return found


def named(layer: Dict[str, Any]) -> Set[str]:
    """Names of ONNX nodes that an engine layer was made of."""
    if layer.get("LayerType") in ("Reformat", "NoOp", "Constant"):
        return set()
    names = re.split(r" \+ |\|\||\n", layer.get("Name", ""))
    names += re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
    return {name.strip() for name in names}


def precision(layer: Dict[str, Any]) -> str:
    """What a layer computes in: the narrowest of its inputs and weights, or what its kernel's name says."""
    tensors = [t for t in layer.get("Inputs", []) if isinstance(t, dict)]
    told = [str(t.get("DataType") or t.get("Datatype") or t.get("Format/Datatype") or t.get("Format") or "")
            for t in tensors]
    weights = layer.get("Weights")
    told += [str(weights.get("Type", ""))] if isinstance(weights, dict) else []
    kinds = {kind for kind in map(kind_of, told) if kind}
    if re.search(r"i8i8|s8s8|_i8_|int8|imma", str(layer.get("TacticName", "")), re.I):
        kinds.add("int8")
    return min(kinds, key=lambda kind: RANK[kind]) if kinds else "unknown"


def kind_of(text: str) -> str:
    """Precision named by the inspector: "Half", "Row major linear FP16 format", "DataType.INT8" ..."""
    for kind, pattern in (("int8", "int8"), ("fp8", "fp8"), ("fp4", "fp4"), ("bf16", "bf16|bfloat16"),
                          ("fp16", "half|fp16|float16"), ("fp32", "float|fp32")):
        if re.search(pattern, text, re.I):
            return kind
    return ""


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def write(path: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    with open(path + ".part", "wb") as file:
        file.write(data)
    os.replace(path + ".part", path)


if __name__ == "__main__":
    main()
