"""What leaves a network together, and the groups of attention: positions inside its heads, or whole heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from edgegen.nn import attention

Key = tuple[str, str]  # (path of a layer or parameter, "out" or "in")
Unit = dict[Key, tuple[int, ...]]  # what leaves together, as indices into the original network


@dataclass
class Coupled:
    """A set of coupled layers. `units` may leave one by one; `blocked` says why none may; `fixed` units never may.

    blocks: one unit takes this many channels at equal distances (heads, groups). inexact: there is no masked network
    to compare the smaller one with. heads: attention module whose head size shrinks, or with `whole` the number of its
    heads (then a unit is a head, `blocks` channels wide).
    """

    root: str
    units: list[Unit]
    blocked: str = ""
    fixed: set[int] = field(default_factory=set)
    blocks: int = 1
    inexact: bool = False
    heads: str = ""
    whole: bool = False
    producers: tuple[str, ...] = ()  # paths whose output channels are coupled here

    @property
    def keys(self) -> list[Key]:
        """Every (path, side) that some unit takes channels from."""
        return list(dict.fromkeys(key for unit in self.units for key in unit))


def channel_dim(parameter: nn.Parameter) -> int:
    """The channels of a bare parameter: C of a map (1, C, H, H), else the last dimension that is longer than 1."""
    shape = tuple(parameter.shape)
    if len(shape) == 4 and shape[0] == 1 < shape[1] != shape[2] == shape[3] > 1:
        return 1
    return max((dim for dim, size in enumerate(shape) if size > 1), default=0)


def of_attention(net: nn.Module, whole: bool) -> list[Coupled]:
    """The groups inside self-attention of timm's form (one `qkv` layer), or of edgegen's (`q` and `kv`).

    A position inside the heads leaves in each of them, so that the width stays a multiple of their number; `whole`: a
    head leaves with all its positions.
    """
    return [_group(path, part, whole) for path, part in _attentions(net)]


def unknown_heads(net: nn.Module) -> list[str]:
    """Paths of modules that say how many heads they have and are no attention of the two known forms."""
    known = [path for path, _ in _attentions(net)]
    counted = [
        path for path, part in net.named_modules()
        if any(isinstance(getattr(part, name, None), int) for name in ("num_heads", "n_heads", "heads", "nhead"))
    ]  # fmt: skip
    inner = [path for path in counted if path and not any(other.startswith(f"{path}.") for other in counted)]
    return [path for path in inner if not any(f"{path}.".startswith(f"{own}.") for own in known)]


def _attentions(net: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in net.named_modules():
        if isinstance(part, attention.Projections) or (
            isinstance(getattr(part, "qkv", None), nn.Linear)
            and isinstance(getattr(part, "proj", None), nn.Linear)
            and isinstance(getattr(part, "head_dim", None), int)
            and isinstance(getattr(part, "num_heads", None), int)
            and part.qkv.out_features == 3 * part.num_heads * part.head_dim
            and part.proj.in_features == part.num_heads * part.head_dim
        ):
            yield path, part


def _group(path: str, part: Any, whole: bool) -> Coupled:
    heads, size = part.num_heads, part.head_dim
    width = heads * size
    layers = {"qkv": (0, width, 2 * width)} if hasattr(part, "qkv") else {"q": (0,), "kv": (0, width)}
    producers = tuple(f"{path}.{name}".lstrip(".") for name in layers)
    group = Coupled(producers[0], [], blocks=size if whole else heads, heads=path, whole=whole, producers=producers)
    inner = [getattr(part, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    if any(x is not None and not isinstance(x, nn.Identity) for x in inner):
        group.blocked = "attention with norms or a gate inside its heads is left as it is"
    for unit in range(heads if whole else size):
        channels = [unit * size + i for i in range(size)] if whole else [head * size + unit for head in range(heads)]
        taken: Unit = {
            (f"{path}.{name}".lstrip("."), "out"): tuple(start + channel for start in starts for channel in channels)
            for name, starts in layers.items()
        }
        group.units.append({**taken, (f"{path}.proj".lstrip("."), "in"): tuple(channels)})
    return group
