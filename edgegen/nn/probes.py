"""Networks of layer lists, for `edgegen.probes`: [["conv", out, window, stride, groups, activation], ...].

conv with groups -1 has no padding of its own. linear, layernorm and attention work on the last axis, "last" and "first"
move the channels there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen.errors import UsageError

_ACTIVATIONS = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "": nn.Identity,
}  # fmt: skip
Shape = tuple[int, ...]


class Residual(nn.Module):
    """activation(x + body(x))."""

    def __init__(self, body: nn.Module, act: nn.Module):
        super().__init__()
        self.body, self.act = body, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


class Concat(nn.Module):
    """x beside body(x)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


class Excite(nn.Module):
    """Squeeze and excitation: x times a gate of its channel means."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        inner = max(8, channels // reduction)
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Attention(nn.Module):
    """Self-attention of (N, tokens, channels)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.mix, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.mix(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Mean(nn.Module):
    """(N, tokens, channels) to (N, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Permute(nn.Module):
    """Axes in another order."""

    def __init__(self, *order: int):
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.order)


def network(shape: Sequence[int], layers: Sequence[Sequence[Any]]) -> nn.Sequential:
    """The layers as a network for inputs of `shape`.

    Raises:
        UsageError: an unknown layer or activation.
    """
    made: list[nn.Module] = []
    x = torch.zeros(tuple(shape))
    for layer in layers:
        made.append(_layer(str(layer[0]), list(layer[1:]), tuple(x.shape)))
        with torch.no_grad():
            x = made[-1].eval()(x)
    return nn.Sequential(*made)


def _layer(op: str, rest: list[Any], shape: Shape) -> nn.Module:
    maker: Callable[..., nn.Module] | None = _MAKERS.get(op)  # type: ignore[assignment]  # of different arguments
    if maker is None:
        raise UsageError(f"a probe's layer must be one of {', '.join(_MAKERS)}, got {op!r}")
    return maker(shape, *rest)


def _act(shape: Shape, name: str) -> nn.Module:
    if name == "leaky":
        return nn.LeakyReLU(0.1)
    if name == "softmax":
        return nn.Softmax(-1)
    if name not in _ACTIVATIONS:
        raise UsageError(f"a probe's activation must be one of {', '.join(_ACTIVATIONS)}, leaky, softmax; got {name!r}")
    return _ACTIVATIONS[name]()


def _conv(shape: Shape, out: int, window: int, stride: int, groups: int, act: str) -> nn.Module:
    padding = 0 if groups < 0 else (window - 1) // 2
    conv = nn.Conv2d(shape[1], out, window, stride, padding, groups=max(1, groups))
    return nn.Sequential(conv, _act(shape, act))


def _transposed(shape: Shape, out: int, window: int, stride: int, act: str) -> nn.Module:
    padding = max(0, (window - stride) // 2)
    return nn.Sequential(nn.ConvTranspose2d(shape[1], out, window, stride, padding), _act(shape, act))


def _linear(shape: Shape, out: int, act: str) -> nn.Module:
    return nn.Sequential(nn.Linear(shape[-1], out), _act(shape, act))


def _norm(shape: Shape, how: str) -> nn.Module:
    return nn.InstanceNorm2d(shape[1], affine=True) if how == "instance" else nn.GroupNorm(min(8, shape[1]), shape[1])


def _pool(shape: Shape, how: str) -> nn.Module:
    if how == "global":
        return nn.AdaptiveAvgPool2d(1)
    kind, size = how.split()
    padding = 1 if size == "3" else 0
    return (nn.MaxPool2d if kind == "max" else nn.AvgPool2d)(int(size), 2, padding)


def _resize(shape: Shape, factor: int, mode: str) -> nn.Module:
    return nn.Upsample(scale_factor=factor, mode=mode)


_MAKERS = {
    "conv": _conv,
    "transposed": _transposed,
    "linear": _linear,
    "act": _act,
    "norm": _norm,
    "pool": _pool,
    "resize": _resize,
    "shuffle": lambda shape, factor: nn.PixelShuffle(factor),
    "mix": lambda shape, groups: nn.ChannelShuffle(groups),
    "pad": lambda shape, size: nn.ReflectionPad2d(size),
    "layernorm": lambda shape: nn.LayerNorm(shape[-1]),
    "attention": lambda shape, heads: Attention(shape[-1], heads),
    "excite": lambda shape, reduction: Excite(shape[1], reduction),
    "mean": lambda shape: Mean(),
    "last": lambda shape: Permute(0, 2, 3, 1),
    "first": lambda shape: Permute(0, 3, 1, 2),
    "residual": lambda shape, body, act: Residual(network(shape, body), _act(shape, act)),
    "concat": lambda shape, body: Concat(network(shape, body)),
}
