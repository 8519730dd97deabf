"""StyleGAN2's modulated convolution (Karras et al., 2020, arXiv:1912.04958): scale, static convolution, scale.

The generator multiplies the weight of each sample's own convolution by a style s (input channels) and divides it by
its norm d (output channels). A convolution is linear, so conv(x, w s d) = d conv(x s, w), with one constant weight for
all samples; and the norm needs no computed weight: sum over inputs and kernel of (w s)^2 is the product of s^2 and the
kernel sums of w^2. Exact up to rounding. A cure wherever weights must be constant: INT8 everywhere,
coremltools 9.0 (transposed ones), litert-torch 0.10 (refuses its powers), XNNPACK in ExecuTorch 1.5.1 (leaves it
undelegated). Far fewer operations, too. Transposed convolutions and batches (one group a sample) as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from edgegen.rewrites import _modulated, _net

KIND = "cure"
REMOVES = ("Conv", "ConvTranspose", "conv2d", "conv_transpose2d")
RUNTIMES: tuple[str, ...] = ("coreml", "executorch", "litert")
_RANK = 5  # weights are looked at as (samples, out, in, kH, kW); transposed ones as (samples, in, out, kH, kW)


@dataclass
class _Product:
    """A weight as the product of one constant and computed factors, each of them along one axis."""

    base: np.ndarray
    factors: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


def static_modulated_convolution(model: onnx.ModelProto) -> dict[str, str]:
    """Conv and ConvTranspose with modulated weights -> Mul, the same with a constant weight, Mul."""
    changed = _net.each(model, ("Conv", "ConvTranspose"), _make_static)
    return {**changed, **_net.each(model, ("ReduceSum",), _norm_of_styles)} if changed else {}


def program_static_modulated_convolution(network: Any) -> dict[str, str]:
    """The same on a torch program."""
    return _modulated.rewrite(network)


def _make_static(net: _net.Net, conv: onnx.NodeProto) -> str:
    group, given, wanted = _net.attributes(conv).get("group", 1), net.shape(conv.input[0]), net.shape(conv.input[1])
    computed = net.constant(conv.input[1]) is None and len(conv.input) == 2 and net.is_float(conv.input[0])
    samples = group if group > 1 and given[:1] == (1,) else 1
    if not computed or len(given) != 4 or len(wanted) != 4 or group != samples:
        return ""
    transposed = conv.op_type == "ConvTranspose"
    found = _weight(net, conv.input[1], transposed)
    full = (1, wanted[0] // samples, *wanted[1:])
    full = (1, full[2], full[1], *full[3:]) if transposed else full
    if found is None or found.base.shape != full or any(shape[0] not in (1, samples) for _, shape in found.factors):
        return ""
    _write(net, conv, found, samples)
    return f"modulated weight -> scale, constant weight, scale ({samples} samples)"


def _write(net: _net.Net, conv: onnx.NodeProto, found: _Product, samples: int) -> None:
    transposed = conv.op_type == "ConvTranspose"
    chain = _net.Chain(net, conv)
    source = conv.input[0]
    if samples > 1:
        size = [samples, found.base.shape[2], *net.shape(source)[2:]]
        source = chain.then("Reshape", source, chain.const("samples", size))
    for name, shape in found.factors:
        if shape[1] == 1:
            source = chain.then("Mul", source, _column(chain, name, shape))
    weight = found.base[0].swapaxes(0, 1) if transposed else found.base[0]
    options = {**_net.attributes(conv), "group": 1}
    done = chain.then(conv.op_type, source, chain.const("weight", weight.astype(np.float32)), **options)
    for name, shape in found.factors:
        if shape[1] != 1:
            done = chain.then("Mul", done, _column(chain, name, shape))
    if samples > 1:
        chain.then("Reshape", done, chain.const("shape", list(net.shape(conv.output[0]))))
    chain.finish(layer=conv.op_type)


def _column(chain: _net.Chain, name: str, shape: tuple[int, ...]) -> str:
    """A factor as (samples or 1, channels, 1, 1)."""
    return chain.then("Reshape", name, chain.const("column", [shape[0], max(shape[1], shape[2]), 1, 1]))


def _weight(net: _net.Net, name: str, transposed: bool) -> _Product | None:
    """A computed convolution weight as a product in the order (samples, out, in, kH, kW)."""
    rows = net.maker(name, "Reshape")
    if rows is not None and len(net.shape(rows.input[0])) == _RANK:
        name = rows.input[0]
    swapped = transposed
    turn = net.maker(name, "Transpose")
    if turn is not None:
        perm = list(_net.attributes(turn).get("perm", []))
        if perm[-4:] != [len(perm) - 3, len(perm) - 4, len(perm) - 2, len(perm) - 1]:
            return None
        name, swapped = turn.input[0], not transposed
    found = _product(net, name)
    if found is None or not swapped:
        return found
    flipped = [(factor, (s[0], s[2], s[1], *s[3:])) for factor, s in found.factors]
    return _Product(found.base.swapaxes(1, 2), flipped)


def _product(net: _net.Net, name: str) -> _Product | None:
    """Walk through Mul down to one full constant and factors along single axes; None when it is something else."""
    value = net.constant(name)
    if value is not None:
        full = value.reshape((1,) * (_RANK - value.ndim) + value.shape) if value.ndim <= _RANK else None
        return None if full is None or full.dtype != np.float32 else _Product(full.astype(np.float64))
    node, shape = net.maker(name, "Mul"), net.shape(name)
    if not shape or len(shape) > _RANK:
        return None
    shape = (1,) * (_RANK - len(shape)) + shape
    if shape[3:] == (1, 1) and 1 in shape[1:3]:
        return _Product(np.ones((1,) * _RANK), [(name, shape)])
    if node is None:
        return None
    sides = [_product(net, source) for source in node.input]
    if sides[0] is None or sides[1] is None:
        return None
    return _Product(sides[0].base * sides[1].base, sides[0].factors + sides[1].factors)


def _norm_of_styles(net: _net.Net, total: onnx.NodeProto) -> str:
    """ReduceSum of (w s)^2 over inputs and kernel -> s^2 times the kernel sums of w^2."""
    square, axes = net.maker(total.input[0], "Mul", "Pow"), net.axes(total)
    if square is None or axes is None or not net.shape(total.output[0]):
        return ""
    is_square = square.input[0] == square.input[1] if square.op_type == "Mul" else net.scalar(square.input[1]) == 2.0
    found = _product(net, square.input[0])
    rank = len(net.shape(square.input[0]))
    summed = tuple(axis + _RANK - rank for axis in axes)
    if not is_square or found is None or not found.factors or summed not in ((2, 3, 4), (1, 3, 4)):
        return ""
    kept, lost = (1, 2) if summed == (2, 3, 4) else (2, 1)
    full = (1,) * (_RANK - rank) + net.shape(square.input[0])
    if found.base.shape != (1, *full[1:]) or any(shape[kept] != 1 for _, shape in found.factors):
        return ""
    table = (found.base[0] ** 2).sum((2, 3))  # (out, in)
    table = table.T if kept == 1 else table  # (summed, kept)
    chain = _net.Chain(net, total)
    style = ""
    for name, shape in found.factors:
        row = chain.then("Reshape", name, chain.const("row", [shape[0], shape[lost]]))
        style = chain.then("Mul", style, row) if style else row
    squared = chain.then("Mul", style, style)
    sums = chain.then("MatMul", squared, chain.const("kernel_sums", table.astype(np.float32)))
    chain.then("Reshape", sums, chain.const("shape", list(net.shape(total.output[0]))))
    chain.finish()
    return "norm of the modulated weight from squared styles"
