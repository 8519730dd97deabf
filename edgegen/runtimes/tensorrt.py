"""TensorRT, strongly typed: precision is in the ONNX file (FP16 casts, Q/DQ), so one file builds on 10.x and 11.x.

The engine itself is built on the device, by the scripts that `build` writes beside the ONNX file; an engine belongs to
one TensorRT version and one GPU. Here its numerics are checked on the same ONNX file in ONNX Runtime (the "twin").
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from edgegen import errors, files, onnx_graph
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Problem, Target

TWIN = "onnxruntime"
_SCRIPT = '''"""Build the engine on this device, with its own tensorrt package: python3 build_engine.py"""
import pathlib
import sys

import tensorrt as trt

here = pathlib.Path(__file__).resolve().parent
logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11.x knows no other kind
network = builder.create_network(1 << int(flag) if flag is not None else 0)
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(str(here / "model.onnx")):
    sys.exit("\\n".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
config = builder.create_builder_config()
cache_file = here / "timing.cache"
cache = config.create_timing_cache(cache_file.read_bytes() if cache_file.exists() else b"")
config.set_timing_cache(cache, False)
engine = builder.build_serialized_network(network, config)
if engine is None:
    sys.exit("TensorRT built no engine; its messages above say why")
cache_file.write_bytes(bytes(cache.serialize()))
name = "model-trt%s.engine" % trt.__version__
(here / name).write_bytes(bytes(engine))
print(here / name)
'''
_SHELL = """#!/bin/sh
# The same with the vendor's own tool, which also times the engine.
cd "$(dirname "$0")" || exit 1
exec "${TRTEXEC:-/usr/src/tensorrt/bin/trtexec}" --onnx=model.onnx --stronglyTyped --timingCacheFile=timing.cache \\
  --saveEngine=model.engine --useCudaGraph --separateProfileRun --dumpProfile "$@"
"""


def missing() -> str | None:
    """Why no engine can be built or run on this machine, or None."""
    try:
        importlib.metadata.version("tensorrt")
    except importlib.metadata.PackageNotFoundError:
        return "TensorRT is not installed here: the engine is built on the device by build_engine.py of the bundle"
    return None


def cannot_build() -> None:
    """What is built here is the ONNX file, which needs no TensorRT."""


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """FP32, FP16, and INT8 with symmetric scales (zero point 0) with the rest in FP16."""
    offered = (PrecisionPlan("fp32"), PrecisionPlan("fp16"), PrecisionPlan("int8", format="s8s8", rest="fp16"))
    return tuple(plan for plan in offered if plan.precision in target.precisions)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Nothing is known to be refused beyond what ONNX's own check finds; the device's parser has the last word."""
    return []


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Write the strongly typed ONNX file and the scripts that build its engine on the device.

    Raises:
        RuntimeFailed: the plan is not one of `plans`, or an INT8 plan came without a calibration set.
        ModelError: a weight is too large for FP16.
    """
    plan = graph.plan
    if plan.precision not in ("fp32", "fp16", "int8"):
        raise errors.RuntimeFailed(f"tensorrt builds fp32, fp16 and int8, got {plan.precision}")
    with files.whole(out) as temporary:
        temporary.mkdir(parents=True)
        typed = temporary / "model.onnx"
        if plan.precision == "int8":
            if calibration is None:
                raise errors.RuntimeFailed("tensorrt: int8 needs a calibration set, got none")
            quantized = temporary / "quantized.onnx"
            wide = onnx_graph.insert_qdq(graph, quantized, calibration=calibration, plan=plan, placement="tensorrt")
            onnx_graph.to_fp16(wide, typed)
            quantized.unlink()
        elif plan.precision == "fp32":
            shutil.copyfile(graph.onnx, typed)
        else:
            onnx_graph.to_fp16(graph, typed)
        (temporary / "build_engine.py").write_text(_SCRIPT, encoding="utf-8")
        (temporary / "build_engine.sh").write_text(_SHELL, encoding="utf-8")
    parts = tuple(out / name for name in ("model.onnx", "build_engine.py", "build_engine.sh"))
    options = {"threads": target.threads, "twin": TWIN, "target_versions": dict(target.versions)}
    versions = {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")}
    size = parts[0].stat().st_size
    return Artifact("tensorrt", parts[0], parts, plan, size, graph.inputs, graph.outputs, options, versions)


def twin(artifact: Artifact) -> Artifact:
    """The same ONNX file as an ONNX Runtime artifact: same numbers, no TensorRT timing."""
    return dataclasses.replace(artifact, runtime=TWIN, files=(artifact.path,))


@contextlib.contextmanager
def load(artifact: Artifact) -> Iterator[Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Run the ONNX twin in ONNX Runtime. Its latency says nothing about the device and is never reported."""
    from edgegen.runtimes import onnxruntime

    with onnxruntime.load(twin(artifact)) as run:
        yield run


def inspect(artifact: Artifact) -> Inspection:
    """Precision of each layer as written in the ONNX file (the engine is read back on the device)."""
    from edgegen.runtimes import onnxruntime

    return onnxruntime.inspect(twin(artifact))
