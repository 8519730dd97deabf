"""ExecuTorch: .pte files for XNNPACK on the CPU, FP32 and INT8 by pt2e; for Core ML or Vulkan where a target asks."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgegen import errors, files, onnx_cost, onnx_graph, program
from edgegen.runtimes import _common, _executorch_axes, _executorch_file, _executorch_lower, _executorch_names, _outputs
from edgegen.types import Artifact, Graph, Inspection, PrecisionPlan, Problem, Target

NAME = "executorch"
NEEDS_PROGRAM = True
_PACKAGES = ("executorch", "torch", "torchao")
_PLANS = {
    # Ranges: "minmax", or "" for the histogram that clips rare values to make the mean error small.
    "xnnpack": (PrecisionPlan("fp32"), PrecisionPlan("int8", ranges="minmax"), PrecisionPlan("int8")),
    "vulkan": (PrecisionPlan("fp32"), PrecisionPlan("fp16")),
    "coreml": (PrecisionPlan("fp32"), PrecisionPlan("fp16")),
}
# Files for Core ML and Vulkan are lowered here and run elsewhere; here their numbers are those of this ONNX file.
_TWIN, _TWIN_FILE = "onnxruntime", "twin.onnx"
_TOLERANCE = {"fp32": 1e-2, "int8": float("inf")}  # INT8 is for quality to judge; here it must only run

# Built without a word, and then they fail when they run (1.5.1).
_FAILING = ("conv3d", "conv_transpose3d", "avg_pool3d", "max_pool3d", "adaptive_avg_pool3d")

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def missing() -> str | None:
    """Why this machine cannot build or run with ExecuTorch, or None."""
    absent = [name for name in ("executorch", "torchao", "torch") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'edgegen[executorch]'" if absent else None


def plans(target: Target, cpu_flags: frozenset[str]) -> tuple[PrecisionPlan, ...]:
    """As far as the target's precisions go: FP32 and INT8 with XNNPACK, FP32 and FP16 with Core ML or Vulkan."""
    return _common.allowed(_PLANS[_delegate(target)], target)


def supports(graph: Graph, target: Target) -> list[Problem]:
    """A graph without its torch program, shapes that depend on data, and operations that are known to fail."""
    if graph.program is None:
        return [Problem("graph", "", "needs the torch program: give the model as a torch network, not as .onnx")]
    found = []
    for node in program.load(graph.program).graph.nodes:
        if _executorch_names.operator(node) in _FAILING:
            cure = "write it with operations on images (two axes): its kernels fail when they run"
            found.append(Problem(_executorch_names.operator(node), _executorch_names.path(node), cure))
        if _executorch_names.operator(node) == "col2im" and any(node.args[4]):
            cure = "write fold as a transposed convolution with a constant kernel: the cut of its padding fails"
            found.append(Problem("col2im", _executorch_names.path(node), cure))
        if any(not isinstance(size, int) for shape in _executorch_axes.shapes(node) for size in shape):
            cure = "fix the input shapes, and take no shapes from data (nonzero, boolean masks)"
            op = _executorch_names.operator(node) or node.op
            found.append(Problem(op, _executorch_names.path(node) or node.name, cure))
    return found


def build(graph: Graph, out: Path, *, calibration: Path | None, target: Target) -> Artifact:
    """Build the folder `out` with model.pte, whole or not at all, as `graph.plan` says.

    options: `delegated_share` (of operations), `undelegated` (those outside the delegate: operator, layer, how often),
    `layers` (handle in the file -> layer of the graph).

    Args:
        graph: with its torch program.
        out: folder to make; one that exists is replaced.
        calibration: folder with one `<input name>.npy` an input, first axis the samples; only INT8 needs it.
    Raises:
        errors.UsageError: a plan that ExecuTorch does not have, an unknown layer, no calibration data.
        errors.DataError: unusable calibration data.
        errors.RuntimeFailed: ExecuTorch fails, the file computes something else, or its precision is not the promised.
    """
    plan, delegate = graph.plan, _delegate(target)
    _common.check_plan(f"{NAME} ({delegate})", plan, _PLANS[delegate], calibration)
    with files.whole(out) as folder, _executorch_lower.quiet():
        folder.mkdir()
        try:
            lowered = _executorch_lower.lower(graph, calibration, delegate, _ios(target))
        except errors.EdgegenError:
            raise
        except _failures() as error:
            raise errors.RuntimeFailed(f"{NAME} {plan.label}: {_line(error)}") from error
        (folder / "model.pte").write_bytes(lowered.content)
        options = _options(folder / "model.pte", lowered, delegate, target)
        if delegate == "xnnpack":
            built = _common.artifact(NAME, folder / "model.pte", graph, plan, options, _PACKAGES)
            _common.check_promise(built, inspect(built), _promised(graph))
            with load(built) as run:
                _outputs.check(run, graph, calibration, _TOLERANCE[plan.precision])
        elif plan.precision == "fp16":
            onnx_graph.to_fp16(graph, folder / _TWIN_FILE)
        else:
            shutil.copyfile(graph.onnx, folder / _TWIN_FILE)
    made = _common.artifact(NAME, out / "model.pte", graph, plan, options, _PACKAGES)
    return made if delegate == "xnnpack" else dataclasses.replace(made, size_bytes=made.path.stat().st_size)


def twin(artifact: Artifact) -> Artifact:
    """What `load` runs here: the file itself for XNNPACK, its ONNX twin (FP16 as casts) for Core ML and Vulkan."""
    if artifact.options.get("delegate", "xnnpack") == "xnnpack":
        return artifact
    path = artifact.path.with_name(_TWIN_FILE)
    return dataclasses.replace(artifact, runtime=_TWIN, path=path, files=(path,))


@contextmanager
def load(artifact: Artifact) -> Iterator[Run]:
    """Yield run(feeds) -> outputs: numpy in, numpy out, synchronous. Outputs are copies.

    XNNPACK's pool of threads belongs to the process: it is set to the artifact's threads. A file for Core ML or Vulkan
    does not run here: its ONNX twin does, and its latency says nothing about the device.

    Raises:
        errors.RuntimeFailed: the file cannot be loaded, or a run fails.
    """
    import torch

    if twin(artifact).runtime != NAME:
        from edgegen.runtimes import onnxruntime

        with onnxruntime.load(twin(artifact)) as run_twin:
            yield run_twin
        return
    method = _method(artifact)

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for spec in artifact.inputs:
            got = feeds[spec.name].shape if spec.name in feeds else "none"
            if got != tuple(spec.shape):
                raise errors.RuntimeFailed(
                    f"{artifact.label}: input {spec.name!r} must have shape {spec.shape}, got {got}"
                )
        given = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name], spec.dtype)) for spec in artifact.inputs]
        try:
            found = method.execute(given)
        except (RuntimeError, ValueError, TypeError) as error:
            raise errors.RuntimeFailed(f"{artifact.label}: {_line(error)}") from error
        return {spec.name: value.numpy().copy() for spec, value in zip(artifact.outputs, found)}

    yield run


def _method(artifact: Artifact) -> Any:
    with _executorch_lower.quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(int(artifact.options["threads"]))
        try:
            method = Runtime.get().load_program(artifact.path).load_method("forward")
        except (RuntimeError, OSError) as error:
            raise errors.RuntimeFailed(f"{artifact.label}: cannot load: {_line(error)}") from error
    if method is None:
        raise errors.RuntimeFailed(f"{artifact.label}: cannot load: the program has no method 'forward'")
    return method


def inspect(artifact: Artifact) -> Inspection:
    """Precision of each weighted layer, read from the .pte: the XNNPACK delegate's own graph, and kernels outside it.

    Core ML and Vulkan keep their programs to themselves: of them only the layers outside are told.
    """
    with _executorch_lower.quiet():
        content = _executorch_file.read(artifact.path)
    names = artifact.options.get("layers", {})
    got: dict[str, str] = {}
    for number, layer in enumerate(content.layers):
        unnamed = f"outside the delegate/{number}" if layer.handle < 0 else f"/{layer.handle}"
        name = names.get(str(layer.handle), unnamed)
        got[name] = layer.precision
    weights, macs = sum(x.weight_bytes for x in content.layers), sum(x.macs for x in content.layers)
    small = sum(layer.weight_bytes for layer in content.layers if layer.weight == "int8")
    integer = sum(layer.macs for layer in content.layers if layer.precision == "int8")
    return Inspection(got, small / max(1, weights), integer / max(1, macs))


def _delegate(target: Target) -> str:
    """The delegate that a target asks for (`versions.delegate`), by default XNNPACK.

    Raises:
        errors.TargetError: an unknown one.
    """
    asked = target.versions.get("delegate", "xnnpack")
    if asked not in _executorch_lower.DELEGATES:
        known = ", ".join(_executorch_lower.DELEGATES)
        raise errors.TargetError(f"{target.name}: unknown ExecuTorch delegate {asked!r}; there are: {known}")
    return asked


def _options(file: Path, lowered: _executorch_lower.Lowered, delegate: str, target: Target) -> dict[str, Any]:
    """What the file is, with the share of its operations that the delegate runs and those that it does not."""
    options: dict[str, Any] = {"threads": _common.threads(target), "delegate": delegate}
    content = _executorch_file.read(file)
    layers = {str(handle): name for handle, name in sorted(lowered.layers.items())}
    counted = Counter(lowered.undelegated)
    outside = [{"op": op, "layer": layer, "count": count} for (op, layer), count in sorted(counted.items())]
    share = content.delegated_share if delegate == "xnnpack" else None
    if delegate != "xnnpack":
        options["twin"] = _TWIN
    return {**options, "layers": layers, "delegated_share": share, "undelegated": outside}


def _ios(target: Target) -> str:
    """The oldest iOS that the target names, such as "18"; "" when it names none."""
    found = re.search(r"iOS (\d+)", target.versions.get("os", ""))
    return found.group(1) if found else ""


def _promised(graph: Graph) -> float:
    """Share of MACs in layers with constant weights that the plan does not keep in float, and XNNPACK has in INT8.

    It has no grouped transposed convolution in INT8; those stay in float, and `inspect` says so.
    """
    model, plan = onnx.load(graph.onnx), graph.plan
    total = onnx_cost.cost(model)
    grouped = {n.name for n in model.graph.node for a in n.attribute if a.name == "group" and a.i != 1}
    chosen = [
        layer.macs
        for layer in total.layers
        if layer.weight
        and layer.name not in plan.float_layers
        and layer.op not in plan.float_types
        and not (layer.op == "ConvTranspose" and layer.name in grouped)
    ]
    return sum(chosen) / max(1, total.macs) if plan.precision == "int8" else 0.0


def _failures() -> tuple[type[Exception], ...]:
    """What torch.export, pt2e and ExecuTorch raise; they have no common base."""
    from executorch.exir.error import ExportError, InternalError
    from torch._dynamo.exc import TorchDynamoException
    from torch._export.verifier import SpecViolationError

    kinds = (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, AssertionError, AttributeError)
    return (*kinds, ExportError, InternalError, SpecViolationError, TorchDynamoException)


def _line(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
