"""What each operation of a Core ML program is in ONNX; semantics as in Apple's MIL reference (coremltools ops/defs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from edgegen import errors
from edgegen.runtimes._coreml_read import type_name

_SAME = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "softplus": "Softplus", "softsign": "Softsign", "erf": "Erf",
    "abs": "Abs", "sqrt": "Sqrt", "exp": "Exp", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign",
    "sin": "Sin", "cos": "Cos", "tan": "Tan", "atan": "Atan", "logical_not": "Not", "identity": "Identity",
}  # fmt: skip
_BINARY = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "real_div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min",
    "greater": "Greater", "greater_equal": "GreaterOrEqual", "less": "Less", "less_equal": "LessOrEqual",
    "equal": "Equal", "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor",
}  # fmt: skip
_REDUCE = {
    "reduce_mean": "ReduceMean", "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd", "reduce_l1_norm": "ReduceL1", "reduce_l2_norm": "ReduceL2",
    "reduce_sum_square": "ReduceSumSquare", "reduce_log_sum_exp": "ReduceLogSumExp",
}  # fmt: skip
Emit = Callable[[Any, Any, str], Any]
_TABLE: dict[str, Emit] = {}


def emit(w: Any, op: Any) -> None:
    """Append the ONNX nodes of one operation to the writer `w`.

    Raises:
        errors.RuntimeFailed: an operation that has no translation here; names it.
    """
    kind, out = op.op_type, op.outputs[0].name
    if all(var.val is not None for var in op.outputs):
        return  # a value that is known: whoever reads it takes it as a constant
    if kind in _SAME:
        w.add(_SAME[kind], [w.ref(op.inputs["x"])], out)
    elif kind in _BINARY:
        w.add(_BINARY[kind], [w.ref(op.inputs["x"]), w.ref(op.inputs["y"])], out)
    elif kind in _REDUCE:
        axes = value(op, "axes")
        inputs = [w.ref(op.inputs["x"])] + ([] if axes is None else [w.constant(np.atleast_1d(axes))])
        w.add(_REDUCE[kind], inputs, out, keepdims=int(bool(value(op, "keep_dims", False))))
    elif kind in _TABLE:
        _TABLE[kind](w, op, out)
    else:
        raise errors.RuntimeFailed(
            f"coreml: the program has the operation {kind!r} ({op.name}), whose numbers cannot be checked here; "
            "rewrite it with simpler operations"
        )


def known(kind: str) -> bool:
    """Whether an operation of a Core ML program can be translated."""
    return kind in _SAME or kind in _BINARY or kind in _REDUCE or kind in _TABLE


def handles(*names: str) -> Callable[[Emit], Emit]:
    """Register a translation of operations: emit(writer, op, name of the first output)."""

    def register(function: Emit) -> Emit:
        _TABLE.update(dict.fromkeys(names, function))
        return function

    return register


def value(op: Any, name: str, default: Any = None) -> Any:
    """The constant value of an input, or `default` where it is absent."""
    var = op.inputs.get(name)
    return default if var is None or var.val is None else var.val


def ints(op: Any, name: str, default: Any = None) -> list[int]:
    """The constant integers of an input."""
    found = value(op, name, default)
    return [] if found is None else [int(v) for v in np.atleast_1d(found)]


def pads_of(op: Any, dims: int) -> dict[str, Any]:
    """`pads` or `auto_pad` of a convolution or pooling: MIL pairs (before, after), ONNX all before, then all after."""
    kind = str(value(op, "pad_type", "valid")).lower()
    if kind in ("same", "same_lower"):
        return {"auto_pad": "SAME_UPPER" if kind == "same" else "SAME_LOWER"}
    pads = ints(op, "pad", [0] * 2 * dims) if kind == "custom" else [0] * 2 * dims
    return {"pads": pads[0::2] + pads[1::2]}


# ------------------------------------------------------------------------------------------------ weighted operations


@handles("conv")
def _conv(w: Any, op: Any, out: str) -> None:
    dims = len(op.outputs[0].shape) - 2
    inputs = [w.ref(op.inputs[n]) for n in ("x", "weight", "bias") if op.inputs.get(n) is not None]
    steps = {"strides": ints(op, "strides", [1] * dims), "dilations": ints(op, "dilations", [1] * dims)}
    w.add("Conv", inputs, out, group=int(value(op, "groups", 1)), **steps, **pads_of(op, dims))


@handles("conv_transpose")
def _conv_transpose(w: Any, op: Any, out: str) -> None:
    x, weight, shape = op.inputs["x"].shape, op.inputs["weight"].shape, op.outputs[0].shape
    dims = len(shape) - 2
    strides, dilations = ints(op, "strides", [1] * dims), ints(op, "dilations", [1] * dims)
    kind = str(value(op, "pad_type", "valid")).lower()
    if kind not in ("valid", "custom"):
        raise errors.RuntimeFailed(f"coreml: conv_transpose {op.name} pads {kind!r}, which is not checked here")
    pads = pads_of(op, dims)["pads"]
    whole = [(x[2 + i] - 1) * strides[i] + (weight[2 + i] - 1) * dilations[i] + 1 for i in range(dims)]
    extra = [int(shape[2 + i] - whole[i] + pads[i] + pads[dims + i]) for i in range(dims)]
    inputs = [w.ref(op.inputs[n]) for n in ("x", "weight", "bias") if op.inputs.get(n) is not None]
    group = int(value(op, "groups", 1))
    steps = {"strides": strides, "dilations": dilations, "pads": pads, "output_padding": extra}
    w.add("ConvTranspose", inputs, out, group=group, **steps)


@handles("linear")
def _linear(w: Any, op: Any, out: str) -> None:
    weight = w.add("Transpose", [w.ref(op.inputs["weight"])], perm=[1, 0])
    bias = op.inputs.get("bias")
    product = w.add("MatMul", [w.ref(op.inputs["x"]), weight], out if bias is None else None)
    if bias is not None:
        w.add("Add", [product, w.ref(bias)], out)


@handles("matmul")
def _matmul(w: Any, op: Any, out: str) -> None:
    sides = []
    for name in ("x", "y"):
        var, side = op.inputs[name], w.ref(op.inputs[name])
        if bool(value(op, f"transpose_{name}", False)):
            axes = list(range(len(var.shape)))
            side = w.add("Transpose", [side], perm=[*axes[:-2], axes[-1], axes[-2]])
        sides.append(side)
    w.add("MatMul", sides, out)


@handles("einsum")
def _einsum(w: Any, op: Any, out: str) -> None:
    w.add("Einsum", [w.ref(v) for v in op.inputs["values"]], out, equation=str(value(op, "equation")))


@handles("scaled_dot_product_attention")
def _attention(w: Any, op: Any, out: str) -> None:
    query, key = op.inputs["query"], op.inputs["key"]
    axes = list(range(len(key.shape)))
    turned = w.add("Transpose", [w.ref(key)], perm=[*axes[:-2], axes[-1], axes[-2]])
    scaled = w.add("Mul", [w.ref(query), w.constant(np.float32(query.shape[-1] ** -0.5))])
    scores = w.add("MatMul", [scaled, turned])
    if (mask := op.inputs.get("attn_mask")) is not None:
        held = w.ref(mask)
        if type_name(mask) == "bool":
            held = w.add("Where", [held, w.constant(np.float32(0)), w.constant(np.float32(-np.inf))])
        scores = w.add("Add", [scores, held])
    w.add("MatMul", [w.add("Softmax", [scores], axis=-1), w.ref(op.inputs["value"])], out)


# -------------------------------------------------------------------------------------------------- elementwise


@handles("square", "silu", "relu6", "exp2", "gelu", "threshold", "thresholded_relu", "clip", "rsqrt", "inverse", "log")
def _unary(w: Any, op: Any, out: str) -> None:
    x, kind = w.ref(op.inputs["x"]), op.op_type
    if kind == "gelu":
        return _gelu(w, x, str(value(op, "mode", "EXACT")), out)
    if kind == "square":
        w.add("Mul", [x, x], out)
    elif kind == "silu":
        w.add("Mul", [x, w.add("Sigmoid", [x])], out)
    elif kind == "relu6":
        w.add("Clip", [x, w.constant(np.float32(0)), w.constant(np.float32(6))], out)
    elif kind == "exp2":
        w.add("Pow", [w.constant(np.float32(2)), x], out)
    elif kind == "threshold":
        w.add("Max", [x, w.ref(op.inputs["alpha"])], out)
    elif kind == "thresholded_relu":
        above = w.add("GreaterOrEqual", [x, w.ref(op.inputs["alpha"])])
        w.add("Where", [above, x, w.constant(np.float32(0))], out)
    elif kind == "clip":
        w.add("Clip", [x, w.ref(op.inputs["alpha"]), w.ref(op.inputs["beta"])], out)
    else:
        moved = w.add("Add", [x, w.constant(np.float32(value(op, "epsilon", 0.0)))])
        root = w.add("Sqrt", [moved]) if kind == "rsqrt" else moved
        w.add("Log" if kind == "log" else "Reciprocal", [root], out)
    return None


def _gelu(w: Any, x: str, mode: str, out: str) -> None:
    def number(value: float) -> str:
        return w.constant(np.float32(value))

    if mode == "SIGMOID_APPROXIMATION":
        w.add("Mul", [x, w.add("Sigmoid", [w.add("Mul", [x, number(1.702)])])], out)
        return
    if mode == "EXACT":
        inner = w.add("Erf", [w.add("Mul", [x, number(2**-0.5)])])
    else:
        cube = w.add("Mul", [w.add("Mul", [x, x]), x])
        summed = w.add("Add", [x, w.add("Mul", [cube, number(0.044715)])])
        inner = w.add("Tanh", [w.add("Mul", [summed, number((2 / np.pi) ** 0.5)])])
    w.add("Mul", [w.add("Mul", [x, w.add("Add", [inner, number(1)])]), number(0.5)], out)


@handles("elu", "leaky_relu", "sigmoid_hard", "prelu", "linear_activation", "scaled_tanh", "clamped_relu")
def _activation(w: Any, op: Any, out: str) -> None:
    x, kind, alpha, beta = w.ref(op.inputs["x"]), op.op_type, value(op, "alpha"), value(op, "beta")
    if kind in ("elu", "leaky_relu"):
        w.add("Elu" if kind == "elu" else "LeakyRelu", [x], out, alpha=float(alpha))
    elif kind == "sigmoid_hard":
        w.add("HardSigmoid", [x], out, alpha=float(alpha), beta=float(beta))
    elif kind == "prelu":
        shape = (-1, *[1] * (len(op.inputs["x"].shape) - 2))
        w.add("PRelu", [x, w.constant(np.reshape(alpha, shape))], out)
    elif kind == "clamped_relu":
        w.add("Min", [w.add("LeakyRelu", [x], alpha=float(alpha)), w.constant(np.float32(beta))], out)
    elif kind == "linear_activation":
        w.add("Add", [w.add("Mul", [x, w.constant(np.float32(alpha))]), w.constant(np.float32(beta))], out)
    else:
        inner = w.add("Tanh", [w.add("Mul", [x, w.constant(np.float32(beta))])])
        w.add("Mul", [inner, w.constant(np.float32(alpha))], out)


@handles("not_equal", "floor_div", "mod", "select", "cast")
def _mixed(w: Any, op: Any, out: str) -> None:
    kind = op.op_type
    if kind == "select":
        w.add("Where", [w.ref(op.inputs[n]) for n in ("cond", "a", "b")], out)
    elif kind == "cast":
        name = str(value(op, "dtype"))
        to = {"bool": TensorProto.BOOL}.get(name, TensorProto.FLOAT if name.startswith("fp") else TensorProto.INT64)
        w.add("Cast", [w.ref(op.inputs["x"])], out, to=to)
    else:
        pair = [w.ref(op.inputs["x"]), w.ref(op.inputs["y"])]
        floats = type_name(op.inputs["x"]).startswith("fp")
        if kind == "not_equal":
            w.add("Not", [w.add("Equal", pair)], out)
        elif not floats:
            raise errors.RuntimeFailed(f"coreml: {kind} of integers ({op.name}) is not checked here")
        else:
            whole = w.add("Floor", [w.add("Div", pair)], out if kind == "floor_div" else None)
            if kind == "mod":
                w.add("Sub", [pair[0], w.add("Mul", [whole, pair[1]])], out)


@handles("quantize", "dequantize")
def _quantize(w: Any, op: Any, out: str) -> None:
    zero = value(op, "zero_point")
    name = str(value(op, "output_dtype", "int8")) if op.op_type == "quantize" else type_name(op.inputs["input"])
    dtype = np.uint8 if name.startswith("uint") else np.int8
    scale = np.asarray(value(op, "scale"))
    points = np.asarray(0 if zero is None else zero).astype(dtype)
    points = np.broadcast_to(points, scale.shape).copy()
    inputs = [w.ref(op.inputs["input"]), w.constant(scale), w.constant(points)]
    axis = {"axis": int(value(op, "axis"))} if scale.ndim else {}
    w.add("QuantizeLinear" if op.op_type == "quantize" else "DequantizeLinear", inputs, out, **axis)
