"""A torch program to a Core ML package: image input, precision, compressed weights, the same bytes every time.

coremltools has no ONNX front end; it takes the `torch.export` program. It talks much while it works: all of it is kept
off the terminal, except what it raises.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, program
from edgegen.runtimes import _coreml_read
from edgegen.runtimes._coreml_layers import kept_operations, spellings
from edgegen.types import Graph, Preprocessing, Target

OLDEST, DEFAULT = 16, 17
_APPLE = {"ios": 0, "ipados": 0, "macos": 3, "tvos": 0, "visionos": 16, "watchos": 7}  # how far behind iOS it counts
_COPIES = ("alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy")
_NAMESPACE = uuid.UUID("6d0d9f0a-5c11-4f0e-9d6e-0c3b8a1f2e77")  # any fixed one, so that ids do not change


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Import and call coremltools without its progress bars, notes on untested versions, and others' deprecations."""
    logger = logging.getLogger("coremltools")
    kept, sink = logger.level, io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
        # coremltools, and what it imports, meet numpy's and torch's deprecations; nothing that a caller could mend
        warnings.simplefilter("ignore")
        import coremltools  # noqa: F401 - its first import is the loud one

        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(kept)


def minimum_os(target: Target) -> int:
    """The oldest iOS version (16, 17, ...) that a package for the target must run on; macOS 14 counts as iOS 17.

    Raises:
        errors.TargetError: `versions.os` is not an Apple system, or older than the first that knows compressed weights.
    """
    said = str(target.versions.get("os", f"iOS {DEFAULT}"))
    found = re.match(r"\s*([A-Za-z]+)\s*(\d+)", said)
    name = found.group(1).lower() if found else ""
    if found is None or name not in _APPLE:
        raise errors.TargetError(f"{target.name}: versions.os must be such as 'iOS 17' or 'macOS 14', got {said!r}")
    number = int(found.group(2))
    number += _APPLE[name] if number < 26 else 0  # from 26 on all of Apple's systems count alike
    if number < OLDEST:
        raise errors.TargetError(f"{target.name}: Core ML needs iOS {OLDEST} or macOS 13 at least here, got {said!r}")
    return number


def deployment_target(number: int) -> Any:
    """coremltools' name of an iOS version; the newest it knows where that is newer."""
    import coremltools as ct

    known = sorted(int(name[3:]) for name in dir(ct.target) if re.fullmatch(r"iOS\d+", name))
    return getattr(ct.target, f"iOS{max(k for k in known if k <= number)}")


# ------------------------------------------------------------------------------------------------------ image input


def pixel_plan(graph: Graph) -> dict[str, Any] | None:
    """How pixels 0..255 become the network's input, where it takes one image; None where it takes a tensor.

    Core ML has one scale for all channels: network input = (scale * pixel + bias) * factor, where `factor` is in the
    graph, and only where the standard deviations differ. `pixels`: pixel = a * network input + b, each a channel.
    """
    spec, how = graph.inputs[0], graph.preprocessing
    is_image = len(spec.shape) == 4 and spec.shape[0] == 1 and spec.shape[1] in (1, 3) and spec.value_range is not None
    if how is None or not is_image or len(graph.inputs) != 1:
        return None
    channels = int(spec.shape[1])
    low, high = how.value_range
    mean, std = _per_channel(how, channels)
    same = len(set(std.tolist())) == 1
    divisor = float(std[0]) if same else 1.0
    slope = (high - low) / 255.0
    return {
        "colour": "RGB" if channels == 3 else "L",
        "scale": slope / divisor,
        "bias": [float(v) for v in (low - mean) / divisor],
        "factor": [] if same else [float(v) for v in 1.0 / std],
        "pixels": {"scale": [float(v) for v in std / slope], "bias": [float(v) for v in (mean - low) / slope]},
    }


def _per_channel(how: Preprocessing, channels: int) -> tuple[np.ndarray, np.ndarray]:
    mean = np.broadcast_to(np.array(how.mean or (0.0,), np.float64), (channels,))
    std = np.broadcast_to(np.array(how.std or (1.0,), np.float64), (channels,))
    return mean, std


def _input_types(graph: Graph, image: Mapping[str, Any] | None) -> list[Any]:
    import coremltools as ct

    if image is None:
        return [ct.TensorType(name=s.name, shape=tuple(s.shape), dtype=np.dtype(s.dtype).type) for s in graph.inputs]
    spec, gray = graph.inputs[0], image["colour"] == "L"
    layout = ct.colorlayout.GRAYSCALE if gray else ct.colorlayout.RGB
    bias = image["bias"][0] if gray else image["bias"]
    shape = tuple(spec.shape)
    return [ct.ImageType(name=spec.name, shape=shape, scale=image["scale"], bias=bias, color_layout=layout)]


# ------------------------------------------------------------------------------------------------------ conversion


def exported(graph: Graph, factor: list[float] | None = None) -> Any:
    """The graph's torch program in ATen operations; with `factor`, one a channel, multiplied onto the input.

    Raises:
        errors.ModelError: the program cannot be read.
    """
    import torch

    if graph.program is None:
        raise errors.UsageError(f"{graph.stage}: Core ML needs the torch program: give the model as a torch network")
    found = program.load(graph.program)
    with quiet(), torch.no_grad():
        if factor:
            found = torch.export.export(_scaled(found.module(), factor), found.example_inputs[0], strict=False)
        return _without_copies(found.run_decompositions({}))


def _without_copies(source: Any) -> Any:
    """Drop what only passes a tensor on (`alias` and its kin): coremltools has no converter for these."""
    for node in source.graph.nodes:
        if node.op == "call_function" and str(node.target).removeprefix("aten.").split(".")[0] in _COPIES:
            node.replace_all_uses_with(node.args[0])
    source.graph.eliminate_dead_code()
    return source


def _scaled(network: Any, factor: list[float]) -> Any:
    import torch

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("factor", torch.tensor(factor).reshape(1, -1, 1, 1))

        def forward(self, x: Any) -> Any:
            return self.network(x * self.factor)

    return Scaled()


def convert(graph: Graph, os: int, image: Mapping[str, Any] | None) -> Any:
    """An MLModel in the plan's float precision, not loaded; layers that the plan keeps in float stay FP32.

    Raises:
        errors.ModelError: the program cannot be read. errors.RuntimeFailed: coremltools fails; its first line.
        errors.UsageError: the plan names a layer that is not there.
    """
    import coremltools as ct

    source = exported(graph, image["factor"] if image else None)
    kept = kept_operations(graph, exported(graph)) if graph.plan.precision == "fp16" else frozenset()

    def halved(op: Any) -> bool:
        names = {*spellings(op.name), re.sub(r"_[a-z]\w*$", "", op.name)}  # several operations can stand for one
        return not names & kept

    precision = ct.precision.FLOAT32 if graph.plan.precision == "fp32" else ct.transform.FP16ComputePrecision(halved)
    with quiet(), _failing_operation() as at:
        try:
            return ct.convert(
                source,
                inputs=_input_types(graph, image),
                outputs=[ct.TensorType(name=s.name, dtype=np.float32) for s in graph.outputs],
                minimum_deployment_target=deployment_target(os),
                compute_precision=precision,
                convert_to="mlprogram",
                skip_model_load=True,
            )
        except Exception as error:  # coremltools raises whatever its converters meet, asserts included
            raise errors.RuntimeFailed(f"coreml: cannot convert {graph.stage}{at()}: {first_line(error)}") from error


@contextlib.contextmanager
def _failing_operation() -> Iterator[Callable[[], str]]:
    """Yields what tells, after a failure, which torch operation it was: coremltools says so in its log only."""
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.extend(re.findall(r"converting '(\w+)' op", record.getMessage()))

    logger, listener = logging.getLogger("coremltools"), Listener(logging.ERROR)
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.ERROR)
    try:
        yield lambda: f" at {found[0]!r}" if found else ""
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)


def first_line(error: Exception) -> str:
    """First non-empty line of an error, with its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


# ---------------------------------------------------------------------------------------------------------- saving


def save(model: Any, out: Path, layers: Mapping[str, str]) -> None:
    """Write the .mlpackage without what differs from run to run (ids, date, debug handles), with the layers' names."""
    with quiet():
        model.save(str(out))
    (out / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    manifest = json.loads((out / "Manifest.json").read_text(encoding="utf-8"))
    items = {str(uuid.uuid5(_NAMESPACE, v["path"])): v for v in manifest["itemInfoEntries"].values()}
    root = next(key for key, v in items.items() if v["path"].endswith(".mlmodel"))
    manifest = {**manifest, "itemInfoEntries": items, "rootModelIdentifier": root}
    (out / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    spec = _coreml_read.read_spec(out)
    own = spec.description.metadata.userDefined
    own.pop("com.github.apple.coremltools.conversion_date", None)
    own[_coreml_read.LAYERS] = json.dumps(dict(layers), sort_keys=True)
    _coreml_read.spec_file(out).write_bytes(spec.SerializeToString(deterministic=True))
