"""One network whose slices are all candidates: weight sharing over the widths and the depth of a convolutional network.

Yu et al., 2019, Universally Slimmable Networks, arXiv:1903.05134 (sandwich rule: the widest, the narrowest and some
between in every step; statistics of batch norm taken anew for each); Cai et al., 2020, Once-for-All, arXiv:1908.09791;
Li et al., 2020, GAN Compression, arXiv:2003.08936, for image-to-image generators.

The supernet is the network itself. A choice keeps the first channels of each free width and leaves out whole blocks;
running the supernet with a choice sets the other channels to zero where they are made, which is what the network cut
out by `cut` computes, as long as zero stays zero between the layers: convolutions, norms, ReLU-like functions, sums.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgegen import graph

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d, nn.InstanceNorm2d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_ZERO_STAYS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity, nn.Dropout, nn.Hardswish)


@dataclass(frozen=True)
class Width:
    """Channels that are free together. writers: layers that make them (masked), norms: on them, readers: that take
    them. full: how many there are. Names are module paths."""

    name: str
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[str, ...]
    full: int


@dataclass(frozen=True)
class Elastic:
    """What may be chosen: for each width the numbers of channels, from few to many; blocks that may be left out."""

    widths: tuple[Width, ...]
    counts: Mapping[str, tuple[int, ...]]
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """channels: width -> how many. without: blocks that are left out (each is then the identity)."""

    channels: Mapping[str, int]
    without: frozenset[str] = field(default_factory=frozenset)


def chain(module: nn.Module) -> list[Width]:
    """The free widths of a network whose channels are made by one convolution and taken by the next ones.

    Found by tracing it: which convolution reads what which one wrote, through norms and functions that keep zero at
    zero. Sums tie the widths of their terms together. What anything else touches, or the output shows, is not free.
    """
    from torch import fx

    traced = fx.symbolic_trace(module)
    parts = dict(traced.named_modules())
    tie: dict[Any, Any] = {}
    made: dict[Any, set[str]] = {}
    norms: dict[Any, set[str]] = {}
    readers: dict[Any, set[str]] = {}
    fixed: set[Any] = set()

    def root(node: Any) -> Any:
        while tie.get(node, node) is not node:
            node = tie[node]
        return node

    def join(a: Any, b: Any) -> None:
        a, b = root(a), root(b)
        if a is not b:
            tie[b] = a

    for node in traced.graph.nodes:
        kind = _kind(node, parts)
        sources = list(node.all_input_nodes)
        if kind == "conv":
            readers.setdefault(sources[0], set()).add(str(node.target))
            made.setdefault(node, set()).add(str(node.target))
        elif kind == "norm":
            norms.setdefault(node, set()).add(str(node.target))
            join(sources[0], node)
        elif kind == "same":
            for source in sources:
                join(source, node)
        elif sources or node.op == "placeholder":
            fixed |= {node, *sources}
    return _widths(traced, parts, root, (made, norms, readers), {root(node) for node in fixed})


def _kind(node: Any, parts: Mapping[str, nn.Module]) -> str:
    """How a node of the traced network treats channels: "conv", "norm", "same" (each by itself, zero to zero) or ""."""
    import operator

    from torch.nn import functional

    if node.op == "call_module":
        part = parts[str(node.target)]
        if isinstance(part, _CONVS) and part.groups == 1:
            return "conv"
        if isinstance(part, NORMS):
            return "norm"
        pads = type(part).__name__.startswith(("ReflectionPad", "ReplicationPad", "ZeroPad", "Upsample", "AvgPool"))
        return "same" if isinstance(part, _ZERO_STAYS) or pads else ""
    sums = (operator.add, operator.iadd, torch.add, functional.relu, torch.relu)
    tensors = all(hasattr(argument, "op") for argument in node.args[:2])
    return "same" if node.op == "call_function" and node.target in sums and tensors else ""


def _widths(
    traced: Any, parts: Mapping[str, nn.Module], root: Callable[[Any], Any], told: Sequence[dict], fixed: set[Any]
) -> list[Width]:
    groups: dict[Any, list[set[str]]] = {}
    for place, table in enumerate(told):
        for node, names in table.items():
            groups.setdefault(root(node), [set(), set(), set()])[place] |= names
    order = {str(node.target): i for i, node in enumerate(traced.graph.nodes) if node.op == "call_module"}
    found = []
    for group, (writers, norms, readers) in groups.items():
        if group in fixed or not writers or not readers:
            continue
        names = [tuple(sorted(part, key=lambda name: order[name])) for part in (writers, norms, readers)]
        full = int(parts[names[0][0]].out_channels)  # type: ignore[arg-type]
        found.append(Width(names[0][0], names[0], names[1], names[2], full))
    return sorted(found, key=lambda width: order[width.name])


def elastic(
    module: nn.Module, shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0), multiple: int = 1,
    blocks: Sequence[str] = (),
) -> Elastic:
    """The choices of a network. shares: of each width, rounded up to `multiple`. blocks: paths that may be left out;
    each must give what it takes in shape.

    Raises:
        ValueError: no width is free, or a share outside (0, 1].
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must lie in (0, 1], got {list(shares)}")
    widths = chain(module)
    if not widths:
        raise ValueError("no width of the network is free: all channels are tied to inputs, outputs or other layers")
    counts = {
        width.name: tuple(sorted({min(width.full, -(-int(np.ceil(share * width.full)) // multiple) * multiple)
                                  for share in shares}))
        for width in widths
    }  # fmt: skip
    return Elastic(tuple(widths), counts, tuple(blocks))


def widest(space: Elastic) -> Choice:
    """Every channel and every block."""
    return Choice({width.name: space.counts[width.name][-1] for width in space.widths})


def narrowest(space: Elastic) -> Choice:
    """The fewest channels; without every block that may be left out."""
    return Choice({width.name: space.counts[width.name][0] for width in space.widths}, frozenset(space.blocks))


def drawn(space: Elastic, draw: random.Random) -> Choice:
    """A choice at random; each block stays with probability 1/2."""
    channels = {width.name: draw.choice(space.counts[width.name]) for width in space.widths}
    return Choice(channels, frozenset(block for block in space.blocks if draw.random() < 0.5))


@contextlib.contextmanager
def chosen(module: nn.Module, space: Elastic, choice: Choice) -> Iterator[nn.Module]:
    """The supernet running as one of its subnets, while the block runs."""
    handles = []
    for width in space.widths:
        keep = choice.channels[width.name]
        for name in (*width.writers, *width.norms) if keep < width.full else ():
            handles.append(module.get_submodule(name).register_forward_hook(_masking(keep)))
    for name in choice.without:
        handles.append(module.get_submodule(name).register_forward_hook(lambda part, inputs, output: inputs[0]))
    with graph.hooked(handles):
        yield module


def _masking(keep: int) -> Callable[..., Tensor]:
    def mask(part: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        held = output[:, :keep]
        return torch.cat([held, output.new_zeros(output.shape[0], output.shape[1] - keep, *output.shape[2:])], dim=1)

    return mask


def cut(module: nn.Module, space: Elastic, choice: Choice) -> nn.Module:
    """The subnet as a network of its own: a copy with the first channels of each width, without the left-out blocks."""
    result = graph.clone(module)
    for width in space.widths:
        keep = choice.channels[width.name]
        for name in width.writers:
            _slice(result.get_submodule(name), keep, writes=True)
        for name in width.norms:
            _slice_norm(result.get_submodule(name), keep)
        for name in width.readers:
            _slice(result.get_submodule(name), keep, writes=False)
    for name in choice.without:
        parent, _, last = name.rpartition(".")
        result.get_submodule(parent)._modules[last] = nn.Identity()
    return result


def _slice(conv: Any, keep: int, writes: bool) -> None:
    transposed = isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    axis = 1 if writes == transposed else 0  # ConvTranspose weights are (in, out, ...), the others (out, in, ...)
    conv.weight = nn.Parameter(conv.weight.detach().narrow(axis, 0, keep).clone())
    if writes:
        conv.out_channels = keep
        conv.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach()[:keep].clone())
    else:
        conv.in_channels = keep


def _slice_norm(norm: Any, keep: int) -> None:
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        setattr(norm, name, None if value is None else nn.Parameter(value.detach()[:keep].clone()))
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, value[:keep].clone())
    norm.num_features = keep


def train(
    module: nn.Module, teacher: nn.Module, space: Elastic, batch_at: Callable[[int], Tensor], *, steps: int,
    between: int = 2, lr: float = 1e-3, seed: int = 0, told: Callable[[str, float], None] = lambda text, share: None,
) -> tuple[nn.Module, list[float]]:
    """A trained copy of `module`, and the loss of the widest subnet at each step.

    Sandwich rule: in each step the widest subnet, the narrowest and `between` others learn the teacher's outputs (mean
    absolute difference; softened KL for (N, classes)), their gradients summed. Norm statistics are not learned here:
    `estimate` takes them for each subnet.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    result, draw = graph.clone(module).train(), random.Random(seed)
    optimizer = torch.optim.AdamW(result.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve: list[Any] = []
    for step in range(steps):
        batch = batch_at(step)
        with torch.no_grad():
            wanted = teacher(batch)
        optimizer.zero_grad()
        for choice in (widest(space), narrowest(space), *(drawn(space, draw) for _ in range(between))):
            with chosen(result, space, choice):
                loss = distance(result(batch), wanted)
            loss.backward()
            if choice == widest(space) and len(curve) == step:
                curve.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(result.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        told(f"supernet, loss {curve[-1]:.4g}", (step + 1) / steps)
    return result.eval(), curve


def distance(output: Tensor, wanted: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean absolute difference of images; of (N, classes) the softened KL divergence (Hinton et al., 2015)."""
    if output.ndim == 2:
        mine = nn.functional.log_softmax(output / temperature, dim=1)
        theirs = nn.functional.log_softmax(wanted / temperature, dim=1)
        return temperature**2 * nn.functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")
    return (output - wanted).abs().mean()


def estimate(network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Take the statistics of batch norms anew from `batches`, in place: those of the supernet are of no subnet."""
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    held = [part.momentum for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # the plain mean over the batches
        part.train()
    with torch.no_grad():
        for batch in batches if norms else ():
            network(batch)
    for part, momentum in zip(norms, held, strict=True):
        part.momentum = momentum
        part.eval()
    return network


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two lists of figures (Kendall's tau-b, -1 to 1): whether both order the candidates alike.

    NaN where a list holds one figure only.

    Raises:
        ValueError: lists of different lengths, or of fewer than two figures.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a rank correlation needs two lists of the same length, at least 2, got {len(a)}, {len(b)}")
    first, second = (np.sign(np.subtract.outer(np.asarray(x), np.asarray(x))) for x in (a, b))
    ties = float((first**2).sum() * (second**2).sum())  # pairs that are no ties, in each list
    return float((first * second).sum()) / ties**0.5 if ties else float("nan")
