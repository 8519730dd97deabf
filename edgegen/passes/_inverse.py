"""Invertible layers, as in normalising flows: what passes through them is the latent, and keeps its channels.

Kingma and Dhariwal, 2018, Glow, arXiv:1807.03039: a coupling, a permutation or a 1x1 convolution with an inverse.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

_NAMES = ("inverse", "invert", "reverse", "inverse_forward")


def reason(net: nn.Module, paths: Sequence[str]) -> str:
    """Why an invertible layer forbids that coupled channels of these layers leave, or "".

    A width that only the network inside one coupling has may change: it is computed anew in both directions.
    """
    around = {_around(net, path) for path in paths}
    at = sorted(around - {""})
    if not at or (len(around) == 1 and at[0] not in paths):
        return ""
    return f"{at[0]} is invertible and these channels pass through it: its inverse needs them all"


def first(net: nn.Module) -> str:
    """Path of the first invertible module of a network, or ""."""
    return next((path for path, part in net.named_modules() if path and _is_invertible(part)), "")


def _is_invertible(part: nn.Module) -> bool:
    """Whether it has a method of such a name: a layer that is called so (an inverse wavelet transform) is none."""
    found = [getattr(part, name, None) for name in _NAMES]
    return any(callable(one) and not isinstance(one, nn.Module) for one in found)


def _around(net: nn.Module, path: str) -> str:
    """The innermost module with an inverse of its own that a layer or parameter is, or lies in."""
    names = path.split(".")
    for count in range(len(names), 0, -1):
        name = ".".join(names[:count])
        try:
            part = net.get_submodule(name)
        except AttributeError:  # a bare parameter
            continue
        if _is_invertible(part):
            return name
    return ""
