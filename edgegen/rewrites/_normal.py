"""Normalisations written out in primitive operations: found in an ONNX graph, and written into one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from edgegen.rewrites import _net


@dataclass(frozen=True)
class Normal:
    """(x - mean) / sqrt(factor * variance + epsilon) over `axes`; `factor` is n / (n - 1) for torch's own variance."""

    source: str
    axes: tuple[int, ...]
    epsilon: float
    factor: float


@dataclass(frozen=True)
class Affine:
    """A scale and a shift by constants after a normalisation; `node` is the last one that is a part of it."""

    node: onnx.NodeProto
    scale: np.ndarray
    shift: np.ndarray


def find(net: _net.Net, node: onnx.NodeProto) -> Normal | None:
    """The normalisation whose last operation is this Div or Mul, or None."""
    for centred, rest in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        spread = _deviation(net, node, rest)
        sub = net.maker(centred, "Sub")
        mean = _mean(net, sub.input[1]) if sub is not None else None
        if spread is None or sub is None or mean is None or mean[0] != sub.input[0]:
            if node.op_type == "Div":
                break
            continue
        found = _variance(net, spread, (sub.input[0], mean[1]))
        if found is not None:
            return Normal(sub.input[0], mean[1], *found)
        if node.op_type == "Div":
            break
    return None


def _deviation(net: _net.Net, node: onnx.NodeProto, name: str) -> str | None:
    """The tensor below the root: x / sqrt(t), or x * (1 / sqrt(t))."""
    if node.op_type == "Mul":
        inverse = net.maker(name, "Reciprocal", "Div")
        if inverse is None or (inverse.op_type == "Div" and net.scalar(inverse.input[0]) != 1.0):
            return None
        name = inverse.input[-1]
    root = net.maker(name, "Sqrt")
    return root.input[0] if root is not None else None


def _mean(net: _net.Net, name: str) -> tuple[str, tuple[int, ...]] | None:
    """(source, axes) of a mean that keeps its axes."""
    node = net.maker(name, "ReduceMean", "GlobalAveragePool")
    if node is None:
        return None
    rank = len(net.shape(node.input[0]))
    if node.op_type == "GlobalAveragePool":
        return (node.input[0], tuple(range(2, rank))) if rank > 2 else None
    axes = net.axes(node)
    return (node.input[0], axes) if axes and _net.attributes(node).get("keepdims", 1) else None


def _variance(net: _net.Net, name: str, of: tuple[str, tuple[int, ...]]) -> tuple[float, float] | None:
    """(epsilon, factor) where a tensor is factor * variance + epsilon of (source, axes)."""
    total = net.maker(name, "Add")
    if total is None:
        return None
    epsilons = [net.scalar(x) for x in total.input]
    if (epsilons[0] is None) == (epsilons[1] is None):
        return None
    epsilon, name = next((e, total.input[1 - i]) for i, e in enumerate(epsilons) if e is not None)
    kept = [1 if axis in of[1] else size for axis, size in enumerate(net.shape(of[0]))]
    if not kept or list(net.shape(name)) != kept:
        return None
    factor = 1.0
    while (node := net.maker(name, "Mul", "Div", "Reshape", "Unsqueeze")) is not None:
        if node.op_type in ("Mul", "Div"):
            number = net.scalar(node.input[1])
            if not number:
                return None
            factor *= number if node.op_type == "Mul" else 1 / number
        name = node.input[0]
    mean = net.maker(name, "ReduceMean")
    if mean is None or net.axes(mean) != of[1] or factor <= 0:
        return None
    return (epsilon, factor) if _is_squared_deviation(net, mean.input[0], of) else None


def _is_squared_deviation(net: _net.Net, name: str, of: tuple[str, tuple[int, ...]]) -> bool:
    square = net.maker(name, "Mul", "Pow")
    if square is None:
        return False
    if square.op_type == "Pow" and net.scalar(square.input[1]) != 2.0:
        return False
    if square.op_type == "Mul" and square.input[0] != square.input[1]:
        return False
    sub = net.maker(square.input[0], "Sub")
    return sub is not None and sub.input[0] == of[0] and _mean(net, sub.input[1]) == of


def affine(net: _net.Net, node: onnx.NodeProto, sizes: tuple[int, ...], trailing: int) -> Affine:
    """The constant scale and shift that follow a normalisation, as vectors of shape `sizes`; ones and zeros if none.

    trailing: how many axes lie behind those of `sizes` (the spatial ones, for channels).
    """
    last, scale, shift = node, np.ones(sizes, np.float32), np.zeros(sizes, np.float32)
    for kind in ("Mul", "Add"):
        user = net.user(last.output[0], kind)
        value = _vector(net, user, last.output[0], sizes, trailing) if user is not None else None
        if user is None or value is None:
            continue
        last = user
        if kind == "Mul":
            scale = value
        else:
            shift = value
    return Affine(last, scale, shift)


def _vector(
    net: _net.Net, node: onnx.NodeProto, besides: str, sizes: tuple[int, ...], trailing: int
) -> np.ndarray | None:
    value = net.constant(next((name for name in node.input if name != besides), ""))
    rank = len(sizes) + trailing
    if value is None or value.dtype != np.float32:
        return None
    shape = (1,) * (rank - value.ndim) + value.shape if value.ndim <= rank else value.shape
    start, end = len(shape) - rank, len(shape) - trailing
    extra, own, behind = shape[:start], shape[start:end], shape[end:]
    if any(size != 1 for size in (*extra, *behind)) or any(a not in (1, b) for a, b in zip(own, sizes)):
        return None
    return np.broadcast_to(value.reshape(own), sizes)


def write(chain: _net.Chain, source: str, axes: tuple[int, ...], epsilon: float) -> str:
    """(x - mean) / sqrt(variance + epsilon) in primitives; the result."""
    mean = chain.reduce("ReduceMean", source, axes)
    centred = chain.then("Sub", source, mean)
    variance = chain.reduce("ReduceMean", chain.then("Mul", centred, centred), axes)
    shifted = chain.then("Add", variance, chain.const("epsilon", np.array(epsilon, np.float32)))
    return chain.then("Div", centred, chain.then("Sqrt", shifted))
