"""The modulated convolution of a torch program as scale, static convolution, scale (static_modulated_convolution)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgegen.rewrites import _program

_RANK = 5  # weights are looked at as (samples, out, in, kH, kW)
_RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.clone", "aten.contiguous")


@dataclass
class _Product:
    """A weight as the product of one constant and computed factors (node, shape on five axes)."""

    base: Any
    factors: list[tuple[Any, tuple[int, ...]]] = field(default_factory=list)


def rewrite(network: Any) -> dict[str, str]:
    """Convolutions first, then the norms that were computed from their weights."""
    changed = {}
    for node in list(network.graph.nodes):
        if _program.is_call(node, "aten.conv2d", "aten.conv_transpose2d") and (text := _make_static(network, node)):
            changed[str(node.name)] = text
    for node in list(network.graph.nodes) if changed else ():
        if _program.is_call(node, "aten.sum") and (text := _norm_of_styles(network, node)):
            changed[str(node.name)] = text
    return _program.finish(network, changed)


def _make_static(network: Any, node: Any) -> str:
    transposed = _program.is_call(node, "aten.conv_transpose2d")
    group = int(_program.argument(node, 6, "groups", 1))
    given, wanted = _program.shape(node.args[0]), _program.shape(node.args[1])
    samples = group if group > 1 and given[:1] == (1,) else 1
    plain = _program.tensor(network, node.args[1]) is None and _program.argument(node, 2, "bias", None) is None
    if not plain or len(given) != 4 or len(wanted) != 4 or group != samples:
        return ""
    found = _weight(network, node.args[1], transposed)
    full = (1, wanted[0] // samples, *wanted[1:])
    full = (1, full[2], full[1], *full[3:]) if transposed else full
    if found is None or tuple(found.base.shape) != full or any(s[0] not in (1, samples) for _, s in found.factors):
        return ""
    weight = found.base[0].transpose(0, 1) if transposed else found.base[0]
    more = ((5, "output_padding", 0), (7, "dilation", 1)) if transposed else ((5, "dilation", 1),)
    options = tuple(_program.argument(node, *place) for place in ((3, "stride", 1), (4, "padding", 0), *more))
    before = tuple((factor, s[0]) for factor, s in found.factors if s[1] == 1)
    after = tuple((factor, s[0]) for factor, s in found.factors if s[1] != 1)
    constant = _program.constant(network, node, weight.float())
    node.args, node.kwargs = (node.args[0], constant, before, after, samples, transposed, options), {}
    node.target = _scaled
    return f"modulated weight -> scale, constant weight, scale ({samples} samples)"


def _scaled(x: Any, weight: Any, before: Any, after: Any, samples: int, transposed: bool, options: Any) -> Any:
    import torch.nn.functional as functional

    if samples > 1:
        x = x.reshape(samples, -1, *x.shape[2:])
    for factor, rows in before:
        x = x * factor.reshape(rows, -1, 1, 1)
    if transposed:
        stride, padding, extra, dilation = options
        x = functional.conv_transpose2d(x, weight, None, stride, padding, extra, 1, dilation)
    else:
        x = functional.conv2d(x, weight, None, *options)
    for factor, rows in after:
        x = x * factor.reshape(rows, -1, 1, 1)
    return x.reshape(1, -1, *x.shape[2:]) if samples > 1 else x


def _weight(network: Any, node: Any, transposed: bool) -> _Product | None:
    """A computed weight as a product in the order (samples, out, in, kH, kW)."""
    while _program.is_call(node, *_RESHAPES):
        node = node.args[0]
    swapped, rank = transposed, len(_program.shape(node))
    if _program.is_call(node, "aten.transpose"):
        if sorted(int(axis) % rank for axis in node.args[1:3]) != [rank - 4, rank - 3]:
            return None
        node, swapped = node.args[0], not transposed
    found = _product(network, node)
    if found is None or not swapped:
        return found
    flipped = [(factor, (s[0], s[2], s[1], *s[3:])) for factor, s in found.factors]
    return _Product(found.base.transpose(1, 2), flipped)


def _product(network: Any, node: Any) -> _Product | None:
    """Walk through products down to one full constant and factors along single axes."""
    import torch

    value = torch.tensor(float(node)) if isinstance(node, (int, float)) else _program.tensor(network, node)
    if value is not None:
        return _Product(value.detach().double().reshape((1,) * (_RANK - value.dim()) + value.shape))
    shape = _program.shape(node)
    if not shape or len(shape) > _RANK:
        return None
    shape = (1,) * (_RANK - len(shape)) + shape
    if shape[3:] == (1, 1) and 1 in shape[1:3]:
        return _Product(torch.ones((1,) * _RANK, dtype=torch.float64), [(node, shape)])
    if not _program.is_call(node, "aten.mul"):
        return None
    sides = [_product(network, source) for source in node.args]
    if sides[0] is None or sides[1] is None:
        return None
    return _Product(sides[0].base * sides[1].base, sides[0].factors + sides[1].factors)


def _norm_of_styles(network: Any, node: Any) -> str:
    """Sum of (w s)^2 over inputs and kernel -> s^2 times the kernel sums of w^2."""
    square, out = node.args[0], _program.shape(node)
    if not (_is_square(square) and len(node.args) > 1 and node.args[1] and out):
        return ""
    found, shape = _product(network, square.args[0]), _program.shape(square.args[0])
    summed = sorted(int(axis) % len(shape) + _RANK - len(shape) for axis in node.args[1])
    if found is None or not found.factors or summed not in ([2, 3, 4], [1, 3, 4]):
        return ""
    kept = 1 if summed[0] == 2 else 2
    full = (1,) * (_RANK - len(shape)) + shape
    if tuple(found.base.shape) != (1, *full[1:]) or any(s[kept] != 1 for _, s in found.factors):
        return ""
    table = found.base[0].square().sum((2, 3))  # (out, in)
    constant = _program.constant(network, node, (table.T if kept == 1 else table).float())
    styles = tuple((factor, s[0]) for factor, s in found.factors)
    node.target, node.args, node.kwargs = _summed, (styles, constant, out), {}
    return "norm of the modulated weight from squared styles"


def _is_square(node: Any) -> bool:
    if _program.is_call(node, "aten.mul"):
        return node.args[0] is node.args[1]
    return _program.is_call(node, "aten.square") or (_program.is_call(node, "aten.pow") and node.args[1] == 2)


def _summed(styles: Any, table: Any, shape: Any) -> Any:
    style = 1.0
    for factor, rows in styles:
        style = style * factor.reshape(rows, -1)
    return ((style * style) @ table).reshape(shape)
