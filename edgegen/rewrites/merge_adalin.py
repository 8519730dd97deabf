"""Adaptive layer-instance normalization (Kim et al., 2020, U-GAT-IT, arXiv:1907.10830) with one pass of statistics.

r (x - m) / s + (1 - r) (x - M) / S mixes an instance and a layer normalization of the same x. The layer's statistics
follow from the instance's: M = mean of m over channels, V = mean over channels of v + (m - M)^2, and with e = m - M the
sum is (x - m) (r / s + (1 - r) / S) + e (1 - r) / S. So the image is read for two means instead of four, and scaled
once instead of twice. Exact up to rounding. An offer for every runtime; before `fuse_instance_norm`, which would hide
the pattern.
"""

from __future__ import annotations

import numpy as np
import onnx

from edgegen.rewrites import _net, _normal

KIND = "offer"
RUNTIMES: tuple[str, ...] = ()


def merge_adalin(model: onnx.ModelProto) -> dict[str, str]:
    """a * instance norm(x) + b * layer norm(x), written out in primitives -> one set of statistics."""
    return _net.each(model, ("Add",), _merge)


def _merge(net: _net.Net, total: onnx.NodeProto) -> str:
    sides = [side for side in (_term(net, name) for name in total.input) if side is not None]
    if len(sides) != 2:
        return ""
    (instance, share), (layer, rest) = sorted(sides, key=lambda side: len(side[0].axes))
    shape = net.shape(instance.source)
    spatial, whole = tuple(range(2, len(shape))), tuple(range(1, len(shape)))
    fits = instance.source == layer.source and (instance.axes, layer.axes) == (spatial, whole)
    columns = all(all(size == 1 for size in net.shape(name)[-len(spatial) :]) for name in (share, rest))
    if len(shape) < 3 or not fits or not columns or not net.is_float(instance.source):
        return ""
    chain = _net.Chain(net, total)

    def deviation(variance: str, found: _normal.Normal) -> str:
        scaled = chain.then("Mul", variance, chain.const("factor", np.array(found.factor, np.float32)))
        return chain.then("Sqrt", chain.then("Add", scaled, chain.const("eps", np.array(found.epsilon, np.float32))))

    mean = chain.reduce("ReduceMean", instance.source, spatial)
    centred = chain.then("Sub", instance.source, mean)
    variance = chain.reduce("ReduceMean", chain.then("Mul", centred, centred), spatial)
    away = chain.then("Sub", mean, chain.reduce("ReduceMean", mean, [1]))
    spread = chain.then("Add", variance, chain.then("Mul", away, away))
    first = chain.then("Div", share, deviation(variance, instance))
    second = chain.then("Div", rest, deviation(chain.reduce("ReduceMean", spread, [1]), layer))
    scaled = chain.then("Mul", centred, chain.then("Add", first, second))
    chain.then("Add", scaled, chain.then("Mul", away, second), last=True)
    chain.done()
    return "instance and layer normalization share their statistics"


def _term(net: _net.Net, name: str) -> tuple[_normal.Normal, str] | None:
    """(normalisation, its factor) of a product, or None."""
    product = net.maker(name, "Mul")
    if product is None:
        return None
    for place in (0, 1):
        node = net.maker(product.input[place], "Div", "Mul")
        found = _normal.find(net, node) if node is not None else None
        if found is not None:
            return found, product.input[1 - place]
    return None
