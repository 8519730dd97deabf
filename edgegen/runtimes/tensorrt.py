"""TensorRT, strongly typed: precision is in the ONNX file (FP16 casts, Q/DQ), so one file builds on 10.x and 11.x.

The engine itself is built on the device, by the scripts that `build` writes beside the ONNX file; an engine belongs to
one TensorRT version and one GPU. Here its numerics are checked on the same ONNX file in ONNX Runtime (the "twin"), and
the rules that TensorRT has for such files are checked without it. TensorRT 8 knows no strong typing: for it the file is
written in the operator set that its parser takes, and the script switches the precisions on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from edgegen import errors, files, onnx_cost, onnx_files, onnx_graph, onnx_qdq
from edgegen.runtimes import _common, _tensorrt_dla, _tensorrt_opset, _tensorrt_parser, _tensorrt_qdq, _tensorrt_rules
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Problem, Target

NAME = "tensorrt"
TWIN = "onnxruntime"
_PLANS = (PrecisionPlan("fp32"), PrecisionPlan("fp16"), PrecisionPlan("int8", format="s8s8", rest="fp16"))
_TYPED = (10, 0)  # the first version that takes precision from the file
_SCRIPT = Path(__file__).with_name("_tensorrt_build.py")
_SHELL = """#!/bin/sh
# The same with the vendor's own tool, which also times the engine: sh build_engine.sh [more options of trtexec]
cd "$(dirname "$0")" || exit 1
trtexec=${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}
known=$("$trtexec" --help 2>&1)
has() {{ printf '%s' "$known" | grep -q -e "$1"; }}
# MiB that are free: of the card, or of a Jetson, whose memory is shared
free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits 2>/dev/null | head -n 1)
case $free in '' | *[!0-9]*) free=$(awk '/MemAvailable/ {{print int($2 / 1024)}}' /proc/meminfo) ;; esac
set -- "--memPoolSize=workspace:$((free * 3 / 4))" "$@"
has --memPoolSize || {{ shift; set -- "--workspace=$((free * 3 / 4))" "$@"; }}
if has --stronglyTyped; then set -- --stronglyTyped "$@"{flags}; fi
"$trtexec" --onnx=model.onnx --saveEngine=model.engine --timingCacheFile=timing.cache --profilingVerbosity=detailed \\
  --exportLayerInfo=model.layers.json --useCudaGraph --separateProfileRun --dumpProfile{sparse} "$@" || exit 1
# the engine is read back: promised and obtained precision of each layer
exec python3 build_engine.py --check model.layers.json
"""


def missing() -> str | None:
    """Why no engine can be built or run on this machine, or None."""
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed here: the engine is built on the device by build_engine.py of the bundle"
    return None


def cannot_build() -> str | None:
    """What is built here is the ONNX file; ONNX Runtime checks its numbers."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed, which checks the files for TensorRT: pip install 'edgegen[onnxruntime]'"
    return None


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """FP32, FP16, and INT8 with symmetric scales (zero point 0) with the rest in FP16."""
    return _common.allowed(_PLANS, target)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """Operators that the target's parser does not take, after the rewrite into an operator set that it takes."""
    lowered, found = _fitted(onnx.load(graph.onnx, load_external_data=False), target)
    return found or _tensorrt_parser.problems(lowered, target)


def dla(source: Path | onnx.ModelProto, target: Target) -> list[Problem]:
    """What keeps a file off the target's deep learning accelerator, and the nearest cure; empty where there is none."""
    return _tensorrt_dla.dla(source, target)


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Write the strongly typed ONNX file, what it promises, and the scripts that build its engine on the device.

    Raises:
        UsageError: a plan that TensorRT or the target does not have, an unknown layer, no calibration data.
        DataError: unusable calibration data.
        ModelError: a weight is too large for FP16.
        RuntimeFailed: the file breaks a rule of TensorRT, or its precision read back is not the promised one.
    """
    plan = graph.plan
    _common.check_plan(NAME, plan, plans(target, frozenset()), calibration)
    with files.whole(out) as folder:
        folder.mkdir(parents=True)
        model = onnx_files.tidy(_written(graph, folder / "model.onnx", calibration, target))
        model, found = _fitted(model, target)
        if found := found or _tensorrt_rules.lint(model, target):
            told = "; ".join(f"{p.op} {p.layer!r}: {p.rewrite}" for p in found[:3])
            raise errors.RuntimeFailed(f"{NAME} {plan.label} on {target.name}: {told} ({len(found)} in all)")
        sha256 = onnx_files.write(onnx_files.tidy(model), folder / "model.onnx")
        promise = _promise(folder / "model.onnx", sha256, plan, target)
        files.write_json(folder / "build.json", promise)
        shutil.copyfile(_SCRIPT, folder / "build_engine.py")
        wanted = {"fp16": " --fp16", "int8": " --fp16 --int8"}.get(plan.precision, "")
        flags = f'; else set -- "$@"{wanted}' if promise["weak"] and wanted else ""
        sparse = ' --sparsity=enable' if promise["sparse"] else ""
        (folder / "build_engine.sh").write_text(_SHELL.format(flags=flags, sparse=sparse), encoding="utf-8")
        options = {"threads": _common.threads(target), "twin": TWIN, "target_versions": dict(target.versions)}
        built = _common.artifact(NAME, folder / "model.onnx", graph, plan, options, ("onnx", "onnxruntime"))
        _common.check_promise(built, inspect(built), _share(graph) if plan.precision == "int8" else 0.0)
    return _common.artifact(NAME, out / "model.onnx", graph, plan, options, ("onnx", "onnxruntime"))


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
    """Precision of each layer as the ONNX file asks for it (the engine is read back on the device)."""
    return _tensorrt_rules.read_back(artifact.path)


def _weak(target: Target) -> bool:
    """Whether the target's TensorRT takes precision from flags instead of the file."""
    return _tensorrt_parser.version(target) < _TYPED


def _skips_zeros(target: Target) -> bool:
    """Whether the target's tensor cores have 2:4 sparsity: Ampere and later."""
    return bool(target.compute_capability) and int(target.compute_capability.split(".")[0]) >= 8


def _fitted(model: onnx.ModelProto, target: Target) -> tuple[onnx.ModelProto, list[Problem]]:
    """The model as the target's parser takes it, by operator set and operators; and what stands in the way."""
    newest, missing = _tensorrt_parser.opset(target), _tensorrt_parser.refused(target)
    if _tensorrt_opset.current(model) <= newest and not missing & {node.op_type for node in model.graph.node}:
        return model, []
    return _tensorrt_opset.lower(model, newest, missing)


def _written(graph: Graph, file: Path, calibration: Path | None, target: Target) -> onnx.ModelProto:
    """The graph with its precision in it, as `graph.plan` says."""
    plan = graph.plan
    if plan.precision == "fp32":
        return onnx.load(graph.onnx)
    if plan.precision == "fp16" or calibration is None:
        onnx_graph.to_fp16(graph, file, calibration=calibration)
        return onnx.load(file)
    kept = _tensorrt_qdq.kept(onnx.load(graph.onnx), plan)
    wide = onnx_graph.insert_qdq(graph, file, calibration=calibration, plan=kept, placement=NAME)
    model = onnx.load(file)
    _tensorrt_qdq.settle(model)
    if _weak(target):  # TensorRT 8 takes no FP16 scales; its FP16 flag does what is left
        _tensorrt_qdq.pair_weights(model)
        return model
    onnx_files.write(onnx_files.tidy(model), file)
    onnx_graph.to_fp16(wide, file, calibration=calibration)
    return onnx.load(file)


def _share(graph: Graph) -> float:
    """Share of the graph's MACs that its plan puts in INT8."""
    model = onnx.load(graph.onnx)
    chosen = set(onnx_qdq.quantized_nodes(model, _tensorrt_qdq.kept(model, graph.plan), placement=NAME))
    total = onnx_cost.cost(model)
    return sum(layer.macs for layer in total.layers if layer.name in chosen) / max(1, total.macs)


def _promise(file: Path, sha256: str, plan: PrecisionPlan, target: Target) -> dict[str, object]:
    """What the engine must turn out to be; the builder script compares. sparse: layers that sparse kernels could take;
    with the flag TensorRT tries these kernels beside the dense ones and keeps the faster.
    """
    return {
        "format": 1,
        "sha256": sha256,
        "precision": plan.precision,
        "layers": dict(_tensorrt_rules.read_back(file).layers),
        "weak": _weak(target),
        "sparse": _tensorrt_rules.sparse(file) if _skips_zeros(target) else [],
        "target": target.name,
        "tensorrt": ".".join(map(str, _tensorrt_parser.version(target))),
    }
