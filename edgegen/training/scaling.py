"""Learning rates for a compact network from those of the network that it was made from.

Chen, Wu, Wang, Hanin, 2024, Principled Architecture-aware Scaling of Hyperparameters, arXiv:2402.17440: the largest
stable rate of a network of P paths from input to output, with L_p layers on path p and kernels of q x q, goes as
(sum_p L_p^3)^(-1/2) / q; of two networks, one's rate follows from the other's by the quotient. Width enters as in muP
(Yang et al., 2022, arXiv:2203.03466): with Adam, and Muon as it is here, a matrix' rate goes as 1 / fan-in; with SGD
not at all. So the rate of a layer, relative to the same layer of the base network, is

    (mean_p L_p^3 of the base / that of this network)^(1/2)  *  q of the base / q  *  fan-in of the base / fan-in

with the last factor for Adam and Muon, and the last two only for layers that the base has under the same name.
Deviations: the mean over the paths instead of their sum, because a residual network's paths double with every block
(the formula would give a network of seven blocks fewer 11 times the rate) while its norms keep each path's share small;
fan-in counts input channels alone, as q has its own factor; and each factor is kept within 1/LIMIT and LIMIT.
Paths are counted on the graph that autograd records, so every network that can be trained is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

LIMIT = 4.0
_LAYERS = ("ConvolutionBackward", "AddmmBackward", "MmBackward")  # how autograd names what holds weights
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
Moments = tuple[float, float, float, float]  # sums over the paths of 1, L, L^2, L^3, up to a common factor


def rates(module: nn.Module, base: nn.Module, inputs: Sequence[torch.Tensor], optimizer: str) -> dict[str, float]:
    """Name of each parameter of `module` -> factor of its learning rate, where the given rate would suit `base`.

    Args:
        inputs: an example that both networks take.
    Raises:
        ValueError: no path from the inputs to the outputs, or inputs that are no real numbers.
    """
    depth = (_depth(base, inputs) / _depth(module, inputs)) ** 0.5
    layers = dict(base.named_modules())
    found = {}
    for name, part in module.named_modules():
        for key, parameter in part.named_parameters(name, recurse=False):
            other, axis = getattr(layers.get(name), "weight", None), int(not isinstance(part, _TRANSPOSED))
            found[key] = _limited(depth * _layer(parameter, other, axis, optimizer))
    return found


def _layer(mine: torch.Tensor, theirs: Any, axis: int, optimizer: str) -> float:
    """The factor of a matrix or kernel from its size and its inputs (on `axis`); 1 for vectors and new layers."""
    if not isinstance(theirs, torch.Tensor) or mine.ndim < 2 or mine.ndim != theirs.ndim:
        return 1.0
    kernel = theirs.shape[2] / mine.shape[2] if mine.ndim > 2 else 1.0
    return kernel * (theirs.shape[axis] / mine.shape[axis] if optimizer != "sgd" else 1.0)


def _limited(factor: float) -> float:
    return min(LIMIT, max(1 / LIMIT, factor))


def _depth(module: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """The mean over all paths from the inputs to the outputs of (layers on it)^3."""
    if not all(x.is_floating_point() for x in inputs):
        raise ValueError("scale_lr follows paths from inputs of real numbers; leave it out for this network")
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            given = [x.detach().clone().requires_grad_() for x in inputs]
            found = module(*given)
    finally:
        for part, training in modes:
            part.training = training
    outputs = [out for out in _flat(found) if out.grad_fn is not None]
    total = [sum(values) for values in zip(*(_moments(out.grad_fn, given) for out in outputs), strict=True)]
    if not total or not total[0]:
        raise ValueError("scale_lr finds no path from the inputs to the outputs; leave it out for this network")
    return max(1.0, total[3] / total[0])


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _flat(item)]


def _moments(root: Any, inputs: Sequence[torch.Tensor]) -> Moments:
    """Sums over the paths from a node of autograd's graph back to the inputs, each node after those before it."""
    known: dict[Any, Moments] = {None: (0.0,) * 4}
    stack = [root]
    while stack:
        node = stack[-1]
        waiting = [before for before, _ in node.next_functions if before is not None and before not in known]
        if node in known or not waiting:
            known.setdefault(stack.pop(), _node(node, known, inputs))
        else:
            stack += waiting
    return known[root]


def _node(node: Any, known: dict[Any, Moments], inputs: Sequence[torch.Tensor]) -> Moments:
    if hasattr(node, "variable"):
        return (1.0, 0.0, 0.0, 0.0) if any(node.variable is x for x in inputs) else (0.0,) * 4
    count, first, second, third = (
        sum(values) for values in zip((0.0,) * 4, *(known[before] for before, _ in node.next_functions), strict=True)
    )
    if not node.name().startswith(_LAYERS):
        return count, first, second, third
    return count, first + count, second + 2 * first + count, third + 3 * second + 3 * first + count
