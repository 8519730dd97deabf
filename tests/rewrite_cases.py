"""Small ONNX networks that rewrites apply to, and near misses that they must leave, by name of the rewrite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Build = Callable[[], onnx.ModelProto]


@dataclass(frozen=True)
class Case:
    """One network. gone, there: operation types that the rewritten graph must lack, and must have."""

    rewrite: str
    label: str
    build: Build
    gone: tuple[str, ...] = ()
    there: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def model(
    nodes: Sequence[onnx.NodeProto], shapes: dict[str, Sequence[Any]], constants: dict[str, Any], opset: int = 18,
    result: Sequence[int] = (),
) -> onnx.ModelProto:  # fmt: skip
    """A network with float inputs of these shapes, one output `y`, nodes named after their place and type.

    result: shape of the output, where ONNX cannot infer it.
    """
    for i, node in enumerate(nodes):
        node.name = node.name or f"{i}/{node.op_type}"
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, result or None)
    graph = helper.make_graph(list(nodes), "g", inputs, [output], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)


def node(kind: str, inputs: str, output: str = "y", **options: Any) -> onnx.NodeProto:
    """A node with inputs in one text: "x w b"; "-" is an input that is not given."""
    return helper.make_node(kind, ["" if name == "-" else name for name in inputs.split()], [output], **options)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


# ------------------------------------------------------------------------------------------------------ batch norm


def statistics(channels: int) -> dict[str, np.ndarray]:
    return {"g": normal(channels, seed=1), "h": normal(channels, seed=2), "m": normal(channels, seed=3),
            "v": np.abs(normal(channels, seed=4)) + 0.5}  # fmt: skip


def batch_norm(before: str = "Conv", groups: int = 1, training: int = 0, shared: bool = False) -> onnx.ModelProto:
    """Conv, ConvTranspose, Gemm or nothing (""), then BatchNormalization of 6 channels."""
    weights = {"Conv": (6, 4 // groups, 3, 2), "ConvTranspose": (4, 6 // groups, 3, 2), "Gemm": (6, 4)}
    constants: dict[str, Any] = statistics(6)
    shape: tuple[int, ...] = (1, 4, 7, 5)
    source, nodes = "x", []
    if before:
        constants |= {"w": normal(*weights[before], seed=5), "b": normal(6, seed=6)}
        options: dict[str, Any] = {"transB": 1} if before == "Gemm" else {"group": groups, "strides": [2, 1]}
        nodes, source = [node(before, "x w b", "c", **options)], "c"
        shape = (3, 4) if before == "Gemm" else shape
    else:
        shape = (1, 6, 7, 5)
    nodes.append(node("BatchNormalization", f"{source} g h m v", "y" if not shared else "n", training_mode=training))
    if training:
        nodes[-1].output.extend(["running_mean", "running_variance"])
    if shared:
        nodes.append(node("Add", "n c"))
    return model(nodes, {"x": shape}, constants)


# --------------------------------------------------------------------------------------------------- normalisations


def written_out(
    axes: Sequence[int], shape: Sequence[int], *, factor: float = 1.0, tail: str = "", inverse: bool = False,
    other_axes: Sequence[int] | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """(x - mean) / sqrt(factor * variance + 1e-3) [* g + h], as exporters write it."""
    nodes = [
        node("ReduceMean", "x axes", "mean"), node("Sub", "x mean", "d"), node("Mul", "d d", "q"),
        node("ReduceMean", "q others", "v"), node("Mul", "v factor", "f"), node("Add", "f eps", "e"),
        node("Sqrt", "e", "s"),
    ]  # fmt: skip
    result = "n" if tail else "y"
    if inverse:
        nodes += [node("Reciprocal", "s", "r"), node("Mul", "r d", result)]
    else:
        nodes += [node("Div", "d s", result)]
    if tail:
        nodes += [node("Mul", "n g", "ng"), node("Add", "h ng")]
    size = {"channels": (shape[1], *[1] * (len(shape) - 2)), "last": (shape[-1],)}.get(tail, (1,))
    constants = {"axes": ints(*axes), "others": ints(*(other_axes or axes)), "factor": scalar(factor),
                 "eps": scalar(1e-3), "g": normal(*size, seed=1), "h": normal(*size, seed=2)}  # fmt: skip
    return model(nodes, {"x": shape}, constants)


def instance_norm(shape: Sequence[int] = (2, 4, 5, 7)) -> onnx.ModelProto:
    constants = {"g": normal(shape[1], seed=1), "h": normal(shape[1], seed=2)}
    return model([node("InstanceNormalization", "x g h", epsilon=1e-3)], {"x": shape}, constants)


def group_norm(opset: int, shape: Sequence[int] = (2, 6, 5, 7)) -> onnx.ModelProto:
    size = shape[1] if opset >= 21 else 3
    constants = {"g": normal(size, seed=1), "h": normal(size, seed=2)}
    layer = node("GroupNormalization", "x g h", num_groups=3, epsilon=1e-3)
    return model([layer], {"x": shape}, constants, opset, result=shape)


def layer_norm(axis: int = -1, outputs: int = 1) -> onnx.ModelProto:
    shape = (2, 3, 5, 7)
    constants = {"g": normal(*shape[axis:], seed=1), "h": normal(*shape[axis:], seed=2)}
    layer = node("LayerNormalization", "x g h", "y", axis=axis)
    if outputs > 1:
        layer.output.append("mean")
    return model([layer], {"x": shape}, constants)


def adain(batch: int = 1, shape: tuple[int, ...] = (4, 1, 1), shift: float = 0.0) -> onnx.ModelProto:
    """Instance normalization scaled and shifted by a second input."""
    nodes = [node("InstanceNormalization", "x g h", "n"), node("Mul", "n s", "ns"), node("Add", "ns t")]
    constants = {"g": np.full(4, 0.9, np.float32), "h": np.full(4, shift, np.float32)}
    return model(nodes, {"x": (batch, 4, 5, 7), "s": (batch, *shape), "t": (batch, *shape)}, constants)


def adalin(axes: Sequence[int] = (1, 2, 3), share: tuple[int, ...] = (1, 4, 1, 1)) -> onnx.ModelProto:
    nodes = []
    for part, along in (("i", "spatial"), ("l", "whole")):
        nodes += [
            node("ReduceMean", f"x {along}", f"m{part}"), node("Sub", f"x m{part}", f"d{part}"),
            node("Mul", f"d{part} d{part}", f"q{part}"), node("ReduceMean", f"q{part} {along}", f"v{part}"),
            node("Mul", f"v{part} f{part}", f"c{part}"), node("Add", f"c{part} eps", f"e{part}"),
            node("Sqrt", f"e{part}", f"s{part}"), node("Div", f"d{part} s{part}", f"n{part}"),
            node("Mul", f"n{part} r{part}", f"t{part}"),
        ]  # fmt: skip
    nodes.append(node("Add", "tl ti"))
    constants = {"spatial": ints(2, 3), "whole": ints(*axes), "eps": scalar(1e-3), "fi": scalar(35 / 34),
                 "fl": scalar(140 / 139), "ri": normal(*share, seed=1), "rl": normal(*share, seed=2)}  # fmt: skip
    return model(nodes, {"x": (2, 4, 5, 7)}, constants)


# ------------------------------------------------------------------------------------------------------ convolutions


def transposed(
    kernel: tuple[int, int] = (4, 4), strides: tuple[int, int] = (2, 2), pads: Sequence[int] = (1, 1, 1, 1), *,
    groups: int = 1, dilations: tuple[int, int] = (1, 1), extra: tuple[int, int] = (0, 0), computed: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    weight = normal(4, 6 // groups, *kernel, seed=1)
    layer = node("ConvTranspose", "x w b", "y", strides=strides, pads=pads, group=groups, dilations=dilations,
                 output_padding=extra)  # fmt: skip
    shapes: dict[str, Sequence[int]] = {"x": (2, 4, 5, 7)}
    constants = {"b": normal(6, seed=2)}
    if computed:
        shapes["w"] = weight.shape
    else:
        constants["w"] = weight
    return model([layer], shapes, constants)


def modulated(
    batch: int = 1, kernel: int = 3, up: bool = False, *, scale_axis: int = 2, demodulate: bool = True
) -> onnx.ModelProto:
    """StyleGAN2's convolution of (batch, 4, 5, 7) by a style (batch, 4), six outputs, as torch exports it."""
    outputs, inputs = 6, 4
    style = {2: (batch, 1, inputs, 1, 1), 4: (batch, 1, inputs, 1, kernel)}[scale_axis]
    source = "s" if scale_axis == 2 else "wide"
    nodes = [] if scale_axis == 2 else [node("Tile", "s times", "wide")]
    nodes += [node("Reshape", f"{source} style", "sv"), node("Mul", "w sv", "ws")]
    last = "ws"
    if demodulate:
        nodes += [
            node("Pow", "ws two", "sq"), node("ReduceSum", "sq kernel", "total", keepdims=0),
            node("Add", "total eps", "te"), node("Sqrt", "te", "root"), node("Reciprocal", "root", "d"),
            node("Reshape", "d demod", "dv"), node("Mul", "ws dv", "wd"),
        ]  # fmt: skip
        last = "wd"
    rows = (batch * inputs, outputs) if up else (batch * outputs, inputs)
    if up:
        nodes.append(node("Transpose", last, "turned", perm=[0, 2, 1, 3, 4]))
        last = "turned"
    nodes.append(node("Reshape", f"{last} rows", "weight"))
    options = {"strides": [2, 2], "group": batch} if up else {"pads": [1, 1, 1, 1], "group": batch}
    kind = "ConvTranspose" if up else "Conv"
    nodes += [node("Reshape", "x flat", "xs"), node(kind, "xs weight", "c", **options)]
    nodes.append(node("Reshape", "c out"))
    height, width = (4 * 2 + kernel, 6 * 2 + kernel) if up else (5 + 3 - kernel, 7 + 3 - kernel)
    constants = {
        "w": normal(1, outputs, inputs, kernel, kernel, seed=1), "two": scalar(2), "eps": scalar(1e-8),
        "style": ints(*style), "demod": ints(batch, outputs, 1, 1, 1), "kernel": ints(2, 3, 4),
        "rows": ints(*rows, kernel, kernel), "flat": ints(1, batch * inputs, 5, 7), "times": ints(1, kernel),
        "out": ints(batch, outputs, height, width),
    }  # fmt: skip
    return model(nodes, {"x": (batch, inputs, 5, 7), "s": (batch, inputs)}, constants)


def computed_weight(from_input: bool = False) -> onnx.ModelProto:
    """A convolution whose weight is divided by its norm (or by something of the input) in the graph."""
    nodes = [node("ReduceL2", f"{'x' if from_input else 'v'} -", "n", keepdims=0), node("Div", "v n", "w"),
             node("Conv", "x w b")]  # fmt: skip
    return model(nodes, {"x": (1, 4, 5, 7)}, {"v": normal(6, 4, 3, 3), "b": normal(6)})


# ------------------------------------------------------------------------------------------------------ moving things


def einsum(equation: str, *shapes: Sequence[int]) -> onnx.ModelProto:
    names = [f"x{i}" for i in range(len(shapes))]
    return model([node("Einsum", " ".join(names), equation=equation)], dict(zip(names, shapes)), {})


def unfolded(
    kernel: tuple[int, int] = (3, 2), stride: int = 2, dilation: int = 1, pad: tuple[int, int] = (1, 0),
    mode: str = "constant", twist: int = 0,
) -> onnx.ModelProto:  # fmt: skip
    """torch's unfold of (2, 3, 8, 7), as it is exported. twist: added to the last index, so that it is no window."""
    tables = {}
    for size, taps, border, name in zip((8, 7), kernel, pad, ("rows", "columns")):
        count = (size + 2 * border - dilation * (taps - 1) - 1) // stride + 1
        tables[name] = np.arange(taps)[:, None] * dilation + np.arange(count)[None] * stride
    tables["rows"][-1, -1] -= twist
    out = (2, 3 * kernel[0] * kernel[1], tables["rows"].shape[1] * tables["columns"].shape[1])
    nodes = [
        node("Pad", "x border", "p", mode=mode), node("Gather", "p rows", "r", axis=2),
        node("Gather", "r columns", "c", axis=4), node("Transpose", "c", "t", perm=[0, 1, 2, 4, 3, 5]),
        node("Reshape", "t out"),
    ]  # fmt: skip
    return model(nodes, {"x": (2, 3, 8, 7)}, {**tables, "border": ints(0, 0, *pad, 0, 0, *pad), "out": ints(*out)})


def folded(
    kernel: tuple[int, int] = (3, 2), stride: int = 2, dilation: int = 1, pads: Sequence[int] = (1, 0, 1, 0),
    image: tuple[int, int] = (8, 7), constant: bool = True,
) -> onnx.ModelProto:  # fmt: skip
    """torch's fold to (2, 3, *image), as it is exported. constant: whether the image's size is known."""
    free = [size + pads[i] + pads[2 + i] - dilation * (kernel[i] - 1) - 1 for i, size in enumerate(image)]
    shape = (2, 3 * kernel[0] * kernel[1], (free[0] // stride + 1) * (free[1] // stride + 1))
    options: dict[str, Any] = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": list(pads)}
    nodes = [node("Col2Im", "x image taps" if constant else "x computed taps", **options)]
    nodes = nodes if constant else [node("Add", "image image", "computed"), *nodes]
    constants = {"image": ints(*(image if constant else (size // 2 for size in image))), "taps": ints(*kernel)}
    return model(nodes, {"x": shape}, constants, result=(2, 3, *image))


def rolled(index: np.ndarray, axis: int = 2) -> onnx.ModelProto:
    return model([node("Gather", "x index", axis=axis)], {"x": (2, 3, 5, 7)}, {"index": index})


def rotated(axis: int, by: int) -> onnx.ModelProto:
    return rolled(np.roll(np.arange((2, 3, 5, 7)[axis]), by), axis)


def moved(
    shape: Sequence[int], parts: Sequence[int], perm: Sequence[int], out: Sequence[int], conv: bool = False
) -> onnx.ModelProto:
    """Reshape, Transpose, Reshape [, Conv]."""
    last = node("Reshape", "t out", "o" if conv else "y")
    nodes = [node("Reshape", "x parts", "a"), node("Transpose", "a", "t", perm=perm), last]
    constants: dict[str, Any] = {"parts": ints(*parts), "out": ints(*out)}
    if conv:
        nodes.append(node("Conv", "o w"))
        constants["w"] = normal(5, out[1], 3, 3)
    return model(nodes, {"x": shape}, constants)


def shuffled(kind: str, **options: Any) -> onnx.ModelProto:
    shape = (2, 8, 3, 5) if kind == "DepthToSpace" else (2, 3, 4, 6)
    return model([node(kind, "x", blocksize=2, **options)], {"x": shape}, {})


def bicubic(
    size: tuple[int, int], scales: tuple[float, float], *, sizes: bool = False, **options: Any
) -> onnx.ModelProto:
    settings = {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75, **options}
    constants = {"scales": np.array([1, 1, *scales], np.float32),
                 "sizes": ints(2, 3, *(round(n * s) for n, s in zip(size, scales)))}  # fmt: skip
    inputs = "x - - sizes" if sizes else "x - scales"
    return model([node("Resize", inputs, **settings)], {"x": (2, 3, *size)}, constants)


def duplicates(equal: bool = True) -> onnx.ModelProto:
    weight = normal(4, 4, 3, 3)
    nodes = [node("Conv", "x w1", "a"), node("Conv", "a w2")]
    return model(nodes, {"x": (1, 4, 7, 8)}, {"w1": weight, "w2": weight.copy() if equal else 2 * weight})


def dynamic() -> onnx.ModelProto:
    """A network for any image: convolution, and pixels as tokens by a shape that is computed."""
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1], strides=[2, 1]), node("Shape", "c", "size", start=0, end=2),
        node("Concat", "size rest", "wanted", axis=0), node("Reshape", "c wanted"),
    ]  # fmt: skip
    return model(nodes, {"x": ("batch", 3, "height", "width")}, {"w": normal(5, 3, 3, 3), "rest": ints(-1)})


TRANSPOSED: list[tuple[Any, dict[str, Any]]] = [
    (((4, 4), (2, 2), (1, 1, 1, 1)), {}),
    (((3, 3), (2, 2), (1, 1, 1, 1)), {"extra": (1, 1)}),
    (((2, 2), (2, 2), (0, 0, 0, 0)), {}),
    (((5, 3), (3, 2), (0, 1, 2, 1)), {"groups": 2}),
    (((3, 2), (2, 2), (0, 0, 0, 0)), {"dilations": (2, 3)}),
    (((1, 1), (2, 2), (0, 0, 0, 0)), {"extra": (1, 0)}),
    (((7, 6), (2, 2), (3, 2, 4, 5)), {}),
    (((3, 3), (1, 2), (1, 1, 1, 1)), {}),
    (((4, 4), (4, 4), (0, 0, 0, 0)), {}),
    (((6, 6), (2, 2), (4, 4, 4, 4)), {}),
    (((2, 2), (3, 3), (0, 0, 0, 0)), {"extra": (2, 1)}),
]
MODULATED: list[tuple[tuple[int, int, bool], dict[str, Any]]] = [
    ((1, 3, False), {}),
    ((3, 3, False), {}),
    ((1, 1, False), {"demodulate": False}),
    ((3, 1, False), {"demodulate": False}),
    ((1, 3, True), {}),
    ((3, 3, True), {}),
]
EINSUMS = {
    "nchw,ncvw->nhv": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "bhid,bhjd->bhij": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "ij,jk": ((3, 4), (4, 5)),
    "nctv,vw->nctw": ((2, 3, 4, 5), (5, 6)),
    "ij->ji": ((3, 4),),
    "ijk->k": ((3, 4, 5),),
    "i,j->ij": ((3,), (4,)),
    "ij,jk,kl->il": ((3, 4), (4, 5), (5, 6)),
    "bij,bjk->k": ((2, 3, 4), (2, 4, 5)),
    "bi,bi->b": ((2, 3), (2, 3)),
    "ab,ab->": ((2, 3), (2, 3)),
}
UNFOLDED: list[dict[str, Any]] = [
    {},
    {"kernel": (3, 3), "stride": 1, "pad": (1, 1)},
    {"kernel": (2, 2), "dilation": 3, "pad": (2, 1)},
    {"kernel": (1, 4), "stride": 3, "pad": (0, 2)},
    {"mode": "reflect"},
]
FOLDED: list[dict[str, Any]] = [
    {},
    {"kernel": (3, 3), "pads": (1, 1, 1, 1), "image": (8, 8)},
    {"kernel": (3, 3), "stride": 3, "pads": (0, 0, 0, 0)},
    {"kernel": (2, 2), "stride": 1, "dilation": 3, "pads": (2, 1, 2, 1)},
    {"kernel": (1, 4), "stride": 3, "pads": (0, 2, 1, 0)},
]
MOVED: list[tuple[Any, tuple[str, ...], tuple[str, ...]]] = [
    (((2, 12, 3, 5), (2, 3, 2, 2, 3, 5), (0, 1, 4, 2, 5, 3), (2, 3, 6, 10)), ("Transpose",), ("DepthToSpace",)),
    (((2, 12, 3, 5), (6, 2, 2, 3, 5), (0, 3, 1, 4, 2), (2, 3, 6, 10)), ("Transpose",), ("DepthToSpace",)),
    (((1, 18, 3, 5), (3, 3, 2, 3, 5), (2, 3, 0, 4, 1), (1, 2, 9, 15)), ("Transpose",), ("DepthToSpace",)),
    (((2, 3, 4, 6), (2, 3, 2, 2, 3, 2), (0, 1, 3, 5, 2, 4), (2, 12, 2, 3)), ("Transpose",), ("Gather",)),
    (((2, 3, 8, 6), (2, 3, 4, 2, 3, 2), (0, 1, 3, 5, 2, 4), (2, 12, 4, 3), True), ("Gather",), ("SpaceToDepth",)),
]
CUBIC: list[tuple[Any, dict[str, Any]]] = [
    (((5, 7), (2, 2)), {}),
    (((5, 4), (3, 3)), {"sizes": True}),
    (((1, 6), (4, 4)), {}),
    (((5, 7), (2, 3)), {}),
    (((4, 6), (1, 2)), {}),
    (((8, 6), (0.5, 0.5)), {}),
    (((9, 6), (1 / 3, 2)), {"sizes": True}),
    (((16, 8), (0.125, 0.25)), {}),
    (((5, 7), (2, 2)), {"cubic_coeff_a": -0.5, "coordinate_transformation_mode": "pytorch_half_pixel"}),
]

PRODUCTS: list[tuple[Any, dict[str, Any]]] = [
    (((6, 4), (1.5, 1.5)), {}),
    (((15, 9), (14 / 15, 7 / 9)), {"sizes": True}),
    (((5, 7), (2, 2)), {"coordinate_transformation_mode": "align_corners"}),
    (((6, 8), (0.5, 1.25)), {"cubic_coeff_a": -0.5}),
]

CASES = [
    *(Case("fold_batch_norm", f"{kind or 'alone'} groups {g}", lambda k=kind, g=g: batch_norm(k, g),
           ("BatchNormalization",), (kind or "Mul",))
      for kind, g in (("Conv", 1), ("Conv", 2), ("ConvTranspose", 1), ("ConvTranspose", 2), ("Gemm", 1), ("", 1))),
    Case("fold_batch_norm", "shared", lambda: batch_norm(shared=True), ("BatchNormalization",), ("Conv", "Mul")),
    Case("fold_constant_weights", "norm", computed_weight, ("Div", "ReduceL2"), ("Conv",)),
    Case("decompose_instance_norm", "image", instance_norm, ("InstanceNormalization",), ("Sqrt", "Mul", "Add")),
    Case("decompose_instance_norm", "signal", lambda: instance_norm((2, 4, 9)), ("InstanceNormalization",)),
    Case("fuse_instance_norm", "plain", lambda: written_out((2, 3), (2, 4, 5, 7)), ("ReduceMean", "Sqrt"),
         ("InstanceNormalization",)),
    Case("fuse_instance_norm", "unbiased, affine", lambda: written_out((2, 3), (2, 4, 5, 7), factor=35 / 34,
         tail="channels"), ("ReduceMean", "Sqrt", "Mul", "Add"), ("InstanceNormalization",)),
    Case("fuse_instance_norm", "reciprocal, volume", lambda: written_out((-1, 2, 3), (1, 2, 3, 4, 5), inverse=True),
         ("Reciprocal",), ("InstanceNormalization",)),
    Case("decompose_group_norm", "opset 21", lambda: group_norm(21), ("GroupNormalization",)),
    Case("decompose_layer_norm", "last", layer_norm, ("LayerNormalization",)),
    Case("decompose_layer_norm", "image", lambda: layer_norm(-3), ("LayerNormalization",)),
    Case("fuse_layer_norm", "affine", lambda: written_out((-1,), (2, 5, 7), tail="last"), ("Sqrt",),
         ("LayerNormalization",)),
    Case("fuse_layer_norm", "unbiased", lambda: written_out((2,), (2, 5, 7), factor=7 / 6, inverse=True), ("Sqrt",),
         ("LayerNormalization",)),
    Case("fuse_adain", "batch 1", adain, ("Add",), ("InstanceNormalization",)),
    Case("merge_adalin", "batch 2", adalin, (), ("Sqrt",)),
    *(Case("subpixel_convolution", f"{arguments} {options}", lambda a=arguments, o=options: transposed(*a, **o),
           ("ConvTranspose",), ("Conv",)) for arguments, options in TRANSPOSED),
    *(Case("static_modulated_convolution", f"{arguments} {options}", lambda a=arguments, o=options: modulated(*a, **o),
           () if options else ("Pow",), ("ConvTranspose",) if arguments[2] else ("Conv",))
      for arguments, options in MODULATED),
    *(Case("einsum_to_matmul", equation, lambda e=equation, s=shapes: einsum(e, *s), ("Einsum",))
      for equation, shapes in EINSUMS.items()),
    *(Case("unfold_to_convolution", str(options), lambda o=options: unfolded(**o), ("Gather",), ("Conv",))
      for options in UNFOLDED),
    *(Case("fold_to_convolution", str(options), lambda o=options: folded(**o), ("Col2Im",), ("ConvTranspose",))
      for options in FOLDED),
    *(Case("roll_to_slices", f"axis {axis}, by {by}", lambda a=axis, b=by: rotated(a, b), ("Gather",), ("Concat",))
      for axis, by in ((2, 2), (3, -3), (1, 1))),
    Case("decompose_pixel_shuffle", "CRD", lambda: shuffled("DepthToSpace", mode="CRD"), ("DepthToSpace",)),
    Case("decompose_pixel_shuffle", "DCR", lambda: shuffled("DepthToSpace", mode="DCR"), ("DepthToSpace",)),
    Case("decompose_pixel_shuffle", "unshuffle", lambda: shuffled("SpaceToDepth"), ("SpaceToDepth",)),
    *(Case("fuse_pixel_shuffle", f"{arguments}", lambda a=arguments: moved(*a), gone, there)
      for arguments, gone, there in MOVED),
    *(Case("bicubic_to_convolutions", f"{arguments} {options}", lambda a=arguments, o=options: bicubic(*a, **o),
           ("Resize",), ("Conv",)) for arguments, options in CUBIC),
    *(Case("bicubic_to_products", f"{arguments} {options}", lambda a=arguments, o=options: bicubic(*a, **o),
           ("Resize",), ("MatMul",)) for arguments, options in PRODUCTS),
    Case("merge_duplicates", "two kernels", duplicates),
    Case("fix_shapes", "tokens", dynamic, ("Shape", "Concat"), ("Reshape",), {"shapes": {"x": (2, 3, 6, 10)}}),
]  # fmt: skip

LEFT = [
    Case("fold_batch_norm", "training", lambda: batch_norm(training=1)),
    Case("fold_constant_weights", "from the input", lambda: computed_weight(from_input=True)),
    Case("decompose_instance_norm", "none", duplicates),
    Case("fuse_instance_norm", "over channels", lambda: written_out((1, 2, 3), (2, 4, 5, 7))),
    Case("fuse_instance_norm", "variance of other axes",
         lambda: written_out((2, 3), (2, 4, 5, 7), other_axes=(1, 2))),
    Case("decompose_group_norm", "scale of groups, which ONNX has withdrawn", lambda: group_norm(18)),
    Case("decompose_layer_norm", "its mean is used", lambda: layer_norm(outputs=2)),
    Case("fuse_layer_norm", "over two axes", lambda: written_out((1, 2), (2, 5, 7))),
    Case("fuse_adain", "batch 2", lambda: adain(2)),
    Case("fuse_adain", "style of the image", lambda: adain(1, (4, 5, 7))),
    Case("fuse_adain", "shifted before", lambda: adain(shift=1.0)),
    Case("merge_adalin", "other axes", lambda: adalin(axes=(0, 2, 3))),
    Case("merge_adalin", "a share for each pixel", lambda: adalin(share=(1, 4, 5, 7))),
    Case("subpixel_convolution", "stride 1", lambda: transposed((3, 3), (1, 1))),
    Case("subpixel_convolution", "computed weight", lambda: transposed(computed=True)),
    Case("static_modulated_convolution", "style for each column", lambda: modulated(scale_axis=4)),
    Case("static_modulated_convolution", "constant weight", duplicates),
    Case("einsum_to_matmul", "diagonal", lambda: einsum("ii->i", (3, 3))),
    Case("einsum_to_matmul", "ellipsis", lambda: einsum("...ij,...jk->...ik", (2, 3, 4), (2, 4, 5))),
    Case("unfold_to_convolution", "no window", lambda: unfolded(twist=1)),
    Case("fold_to_convolution", "computed size", lambda: folded(image=(8, 6), constant=False)),
    Case("roll_to_slices", "no rotation", lambda: rolled(ints(1, 0, 2, 3, 4))),
    Case("roll_to_slices", "identity", lambda: rolled(np.arange(5))),
    Case("roll_to_slices", "a part", lambda: rolled(ints(3, 4))),
    Case("decompose_pixel_shuffle", "none", duplicates),
    Case("fuse_pixel_shuffle", "rows and columns swapped",
         lambda: moved((2, 12, 3, 5), (2, 3, 2, 2, 3, 5), (0, 1, 4, 3, 5, 2), (2, 3, 6, 10))),
    Case("bicubic_to_convolutions", "align corners",
         lambda: bicubic((5, 7), (2, 2), coordinate_transformation_mode="align_corners")),
    Case("bicubic_to_convolutions", "antialias", lambda: bicubic((8, 6), (0.5, 0.5), antialias=1)),
    Case("bicubic_to_convolutions", "no whole factor", lambda: bicubic((6, 4), (1.5, 1.5))),
    Case("bicubic_to_products", "antialias", lambda: bicubic((8, 6), (0.5, 0.5), antialias=1)),
    Case("bicubic_to_products", "linear", lambda: bicubic((6, 4), (1.5, 1.5), mode="linear")),
    Case("bicubic_to_convolutions", "linear", lambda: bicubic((6, 4), (2, 2), mode="linear")),
    Case("merge_duplicates", "different", lambda: duplicates(equal=False)),
    Case("fix_shapes", "no shapes", dynamic),
]  # fmt: skip
