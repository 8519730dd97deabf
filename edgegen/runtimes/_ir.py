"""OpenVINO models: convert from ONNX with the ONNX node names, save with stable bytes, read back what is in them.

openvino and nncf report to their maker through the package openvino_telemetry; both do without when it cannot be
imported, and that is what `openvino()` arranges before it imports them. Nothing of edgegen imports them otherwise.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from edgegen.onnx_cost import WEIGHTED

_WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
_PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "fp32", "bf16": "bf16", "f16": "fp16"}
_NUMBERED = r"[A-Z][A-Za-z0-9]*_\d+"  # how OpenVINO names what it makes itself


def openvino() -> Any:
    """The openvino module, imported where its telemetry package cannot be found."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes its import fail
    return importlib.import_module("openvino")


@cache
def core() -> Any:
    """OpenVINO's device manager; one a process."""
    return openvino().Core()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep nncf from logging, from drawing progress bars on standard output, and from importing torch.

    It imports torch wherever that is installed, for networks of a kind that it is not given here: 3 s and 600 MB of
    every build.
    """
    import rich

    openvino()
    with ExitStack() as stack:
        if "torch" not in sys.modules:
            sys.modules["torch"] = None  # type: ignore[assignment]  # None makes its import fail
            stack.callback(sys.modules.pop, "torch")
        chatty = logging.getLogger("torch.utils.cpp_extension")  # tells about CUDA when nncf imports it
        stack.callback(chatty.setLevel, chatty.level)
        chatty.setLevel(logging.ERROR)
        log = importlib.import_module("nncf.common.logging").nncf_logger  # exists, and sets its level, after the import
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        console = rich.get_console()
        stack.callback(setattr, console, "quiet", console.quiet)
        console.quiet = True
        yield


def convert(path: Path) -> Any:
    """An ONNX file as an OpenVINO model; the operation that does a weighted ONNX node's work bears the node's name."""
    with _without_comma(path) as named:
        return _named(openvino().convert_model(str(named)), path)


@contextmanager
def _without_comma(path: Path) -> Iterator[Path]:
    """The file by a path that has no comma: OpenVINO's converter takes a path with one for a list of files."""
    if "," not in str(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="edgegen-") as folder:
        model = Path(folder) / "model.onnx"
        shutil.copyfile(path, model)
        held = onnx.load(path, load_external_data=False).graph.initializer
        for name in {ExternalDataInfo(one).location for one in held if uses_external_data(one)}:
            (model.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / name, model.parent / name)  # a link that leads out of the folder is refused
        yield model


def keep_reduced(model: Any) -> Any:
    """The model, its means that drop axes made means that keep them, and a squeeze behind each.

    OpenVINO (2026.4.1) computes what follows a mean together with it. Where axes are dropped, a factor for each channel
    and then a quantization come out wrong (half of the output's norm; EfficientFormer-L1 quantized as a transformer).
    """
    opset = importlib.import_module("openvino.opset13")
    for found in model.get_ordered_ops():
        if found.get_type_name() == "ReduceMean" and not found.get_attributes()["keep_dims"]:
            kept = opset.reduce_mean(found.input_value(0), found.input_value(1), keep_dims=True)
            kept.set_friendly_name(found.get_friendly_name())
            dropped = opset.squeeze(kept, found.input_value(1))
            dropped.set_friendly_name(f"{found.get_friendly_name()}/squeeze")
            dropped.output(0).set_names(found.output(0).get_names())
            found.output(0).replace(dropped.output(0))
    model.validate_nodes_and_infer_types()
    return model


def read(path: Path) -> Any:
    """What a file holds, as it holds it: a conversion would widen weights of 4 bits. Names as `convert` gives them."""
    model = core().read_model(path)
    return _named(model, path) if path.suffix == ".onnx" else model


def _named(model: Any, path: Path) -> Any:
    source = onnx.load(path, load_external_data=False)
    for node in source.graph.node:
        if node.op_type in WEIGHTED:
            # a transposed convolution with a bias that makes the output has a numbered name, behind the output's
            group = _group(model, node.name) or _group(model, node.output[0])
            cores = [operation for operation in group if operation.get_type_name() in _WEIGHTED]
            if len(cores) == 1:
                for operation in group:
                    if operation.get_friendly_name() == node.name:
                        operation.set_friendly_name(f"{node.name}/{operation.get_type_name()}")
                cores[0].set_friendly_name(node.name)
    return model


def _group(model: Any, node: str) -> list[Any]:
    """Operations that an ONNX node became: `node`, `node/...`, and what was made for them under a numbered name."""
    stack = [
        op for op in model.get_ops() if op.get_friendly_name() == node or op.get_friendly_name().startswith(f"{node}/")
    ]
    found: dict[str, Any] = {}
    while stack:
        operation = stack.pop()
        if operation.get_name() in found or operation.get_type_name() in ("Constant", "Parameter"):
            continue
        found[operation.get_name()] = operation
        sources = [value.get_source_output().get_node() for value in operation.inputs()]
        stack += [source for source in sources if re.fullmatch(_NUMBERED, source.get_friendly_name())]
    return list(found.values())


def operations(model: Any, names: Iterable[str]) -> list[str]:
    """Friendly names of the OpenVINO operations that the named ONNX nodes became, for nncf's ignored scope."""
    return sorted({operation.get_friendly_name() for name in names for operation in _group(model, name)})


def save(model: Any, out: Path, source: Path, *, halve: bool) -> None:
    """Write model.xml and model.bin with bytes that depend on the model alone.

    OpenVINO names what it makes itself after its type and a counter of the process (`Constant_8467`), and NNCF builds
    on these names. They are counted anew from the file; names of nodes and tensors of the ONNX file `source` are kept.

    Args:
        halve: store FP32 constants in FP16.
    """
    _share_ranges(model)
    openvino().save_model(model, str(out), compress_to_fp16=halve)
    graph = onnx.load(source, load_external_data=False).graph
    kept = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    numbers: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        name = match.group(0)
        return name if name in kept else numbers.setdefault(name, f"{match.group(1)}__{len(numbers)}")

    text = re.sub(r"(?<![\w/.])([A-Z][A-Za-z0-9]*)_\d+(?!\d)", renumber, out.read_text(encoding="utf-8"))
    out.write_text(re.sub(r">\s+<", "><", text), encoding="utf-8")  # indentation is half of a small network's file


def _share_ranges(model: Any) -> None:
    """Let FakeQuantize operations read equal ends of ranges from one scalar: a tenth of a small network's file."""
    scalars: dict[float, Any] = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "FakeQuantize":
            continue
        for place in range(1, 5):
            constant = operation.input_value(place).get_node()
            if constant.get_type_name() == "Constant" and constant.data.dtype == np.float32 and constant.data.size == 1:
                value = constant.data.item()
                if value not in scalars:
                    scalars[value] = openvino().opset13.constant(np.float32(value)).output(0)
                operation.input(place).replace_source_output(scalars[value])


@dataclass(frozen=True)
class Layer:
    """A weighted operation.

    weight_type is OpenVINO's name of the stored element type, "" without constant weights. aliases: names of the
    operations right behind it, one of which the compiled model may give to the fused whole, and of its weight.
    """

    name: str
    macs: int
    weight_type: str
    weight_bytes: int
    aliases: tuple[str, ...]


def weighted_layers(model: Any) -> list[Layer]:
    """Convolutions and matrix products of a model, in order."""
    found = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in _WEIGHTED:
            weight = next((c for c in (_constant(operation, 1), _constant(operation, 0)) if c is not None), None)
            kind = weight.get_element_type().get_type_name() if weight is not None else ""
            size = weight.get_byte_size() if weight is not None else 0
            aliases = (*_followers(operation), *([weight.get_friendly_name()] if weight is not None else []))
            found.append(Layer(operation.get_friendly_name(), _macs(operation), kind, size, aliases))
    return found


def _followers(operation: Any) -> tuple[str, ...]:
    """Names of up to three operations behind one another, each the only consumer of the one before."""
    names: list[str] = []
    while len(names) < 3:
        consumers = [port for output in operation.outputs() for port in output.get_target_inputs()]
        if len(consumers) != 1 or consumers[0].get_node().get_type_name() in (*_WEIGHTED, "Result"):
            break
        operation = consumers[0].get_node()
        names.append(operation.get_friendly_name())
    return tuple(names)


def _constant(operation: Any, index: int) -> Any:
    """The constant behind an input, through conversions and dequantization; None when the input is computed."""
    node = operation.input_value(index).get_node()
    passing = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "FakeQuantize")
    while node.get_type_name() in passing:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _macs(operation: Any) -> int:
    kind = operation.get_type_name()
    first, second, out = (
        list(shape)
        for shape in (operation.get_input_shape(0), operation.get_input_shape(1), operation.get_output_shape(0))
    )
    if kind == "MatMul":
        return math.prod(out) * first[-2 if operation.get_attributes()["transpose_a"] and len(first) > 1 else -1]
    per_element = math.prod(second[2 if kind.startswith("Group") else 1 :])  # grouped weights: (groups, out, in, ...)
    return math.prod(first if kind.endswith("BackpropData") else out) * per_element


def executed(compiled: Any) -> dict[str, str]:
    """Name of an operation or of its weight -> precision (one of types.PRECISIONS) in which it executes.

    Told by the kernel (`brgconv_avx512_f32`) where its name says so: `runtimePrecision` alone calls an FP32 kernel with
    FP16 weights f16 (2026.4.1).
    """
    found: dict[str, str] = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        told = operation.get_rt_info()
        info = {key: told[key].astype(str) for key in ("layerType", "runtimePrecision", "primitiveType")}
        if info["layerType"] not in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            continue
        kernel = info["primitiveType"].rpartition("_")[2].lower()
        precision = _PRECISIONS.get(kernel) or _PRECISIONS.get(info["runtimePrecision"], info["runtimePrecision"])
        for name in told["originalLayersNames"].astype(str).split(","):
            found.setdefault(re.sub(r"/DequantizationMultiply$", "", name), precision)
        for weight in (value.get_source_output().get_node() for value in operation.inputs()):
            if weight.get_rt_info()["layerType"].astype(str) == "Const":
                found.setdefault(weight.get_friendly_name(), precision)
    return found
