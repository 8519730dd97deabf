"""One network whose slices are all candidates: weight sharing over the widths and the depth of a convolutional network.

Yu et al., 2019, Universally Slimmable Networks, arXiv:1903.05134 (sandwich rule: the widest, the narrowest and some
between in every step; statistics of batch norm taken anew for each); Cai et al., 2020, Once-for-All, arXiv:1908.09791
(channels sorted by importance first); Li et al., 2020, GAN Compression, arXiv:2003.08936, for image generators.

The supernet is the network itself. A choice keeps the first channels of each free width and leaves out whole blocks;
running the supernet with a choice sets the other channels to zero where they are made, which is what the network cut
out by `cut` computes, as long as zero stays zero between the layers: convolutions, norms, ReLU-like functions, sums.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgegen import graph
from edgegen.passes._free_widths import Width, chain


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


def kept(full: int, share: float, multiple: int) -> int:
    """How many of `full` channels a share of them is: rounded up to `multiple`."""
    return min(full, math.ceil(math.ceil(share * full - 1e-9) / multiple) * multiple)


def elastic(
    module: nn.Module, shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0), multiple: int = 1,
    blocks: Sequence[str] = (),
) -> Elastic:
    """The choices of a network. shares: of each width, rounded up to `multiple`. blocks: paths that may be left out;
    each must give what it takes in shape.

    Raises:
        ValueError: nothing is free, or a share outside (0, 1].
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must lie in (0, 1], got {list(shares)}")
    widths = chain(module)
    if not widths and not blocks:
        raise ValueError("no width of the network is free: all channels are tied to inputs, outputs or other layers")
    counts = {width.name: tuple(sorted({kept(width.full, share, multiple) for share in (*shares, 1.0)}))
              for width in widths}  # fmt: skip
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
        _pick(result, width, torch.arange(choice.channels[width.name]))
    for name in choice.without:
        parent, _, last = name.rpartition(".")
        result.get_submodule(parent)._modules[last] = nn.Identity()
    return result


def sort_channels(module: nn.Module, widths: Sequence[Width]) -> nn.Module:
    """A copy that computes the same, each width's channels in falling order of importance.

    Importance: the sum of absolute weights over all layers that make a channel, and over those that read it, each
    relative to the layer's mean.
    """
    result = graph.clone(module)
    for width in widths:
        scores = torch.zeros(width.full)
        for names, writes in ((width.writers, True), (width.readers, False)):
            for name in names:
                part = result.get_submodule(name)
                found = part.weight.detach().abs().transpose(0, _axis(part, writes)).flatten(1).sum(1)  # type: ignore
                scores += found / found.mean().clamp_min(1e-12)
        _pick(result, width, torch.argsort(scores, descending=True, stable=True))
    return result


def _pick(module: nn.Module, width: Width, channels: Tensor) -> None:
    """Keep these channels of a width, in this order, in place."""
    for name in width.writers:
        _slice(module.get_submodule(name), channels, writes=True)
    for name in width.norms:
        _slice_norm(module.get_submodule(name), channels)
    for name in width.readers:
        _slice(module.get_submodule(name), channels, writes=False)


def _axis(part: nn.Module, writes: bool) -> int:
    """Axis of a weight: of transposed convolutions it is (in, out, ...), of all others (out, in, ...)."""
    return 1 if writes == isinstance(part, (nn.ConvTranspose1d, nn.ConvTranspose2d)) else 0


def _slice(part: Any, channels: Tensor, writes: bool) -> None:
    part.weight = nn.Parameter(part.weight.detach().index_select(_axis(part, writes), channels).clone())
    linear = isinstance(part, nn.Linear)
    if writes:
        part.bias = None if part.bias is None else nn.Parameter(part.bias.detach()[channels].clone())
    setattr(part, {(True, True): "out_features", (True, False): "out_channels", (False, True): "in_features",
                   (False, False): "in_channels"}[writes, linear], len(channels))  # fmt: skip


def _slice_norm(norm: Any, channels: Tensor) -> None:
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        setattr(norm, name, None if value is None else nn.Parameter(value.detach()[channels].clone()))
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, value[channels].clone())
    norm.num_features = len(channels)


def lesson(
    teacher: Callable[..., Any], space: Elastic, between: int, seed: int, span: float = 1.0
) -> Callable[[nn.Module, Mapping[str, Any], int], dict[str, Tensor]]:
    """What a step of `training.train` learns: the sandwich rule. `batch["input"]` is a tuple of tensors.

    span: of the values of output images, by which their differences are divided.

    The widest subnet, the narrowest and `between` others learn the teacher's outputs, their gradients summed. Norm
    statistics are not learned here: `estimate` takes them for each subnet.
    """

    def losses(learner: nn.Module, batch: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        draw = random.Random(f"{seed} {step}")
        with torch.no_grad():
            wanted = graph.flatten(teacher(*batch["input"]))
        choices = {"widest": widest(space), "narrowest": narrowest(space)}
        choices |= {f"between {number + 1}": drawn(space, draw) for number in range(between)}
        found: dict[str, Tensor] = {}
        for name, choice in choices.items():
            with chosen(learner, space, choice):
                got = graph.flatten(learner(*batch["input"]))
            found[name] = torch.stack([_apart(a, b, span) for a, b in zip(got, wanted, strict=True)]).sum()
        return found

    return losses


def _apart(output: Tensor, wanted: Tensor, span: float) -> Tensor:
    return distance(output, wanted) / (1.0 if output.ndim == 2 else span)


def distance(output: Tensor, wanted: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean absolute difference of images; of (N, classes) the softened KL divergence (Hinton et al., 2015)."""
    if output.ndim == 2:
        mine = nn.functional.log_softmax(output / temperature, dim=1)
        theirs = nn.functional.log_softmax(wanted / temperature, dim=1)
        return temperature**2 * nn.functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")
    return (output - wanted).abs().mean()


def batch_norms(network: nn.Module) -> list[Any]:
    """The norms that keep statistics of the data."""
    kept = (part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    return [part for part in kept if part.running_mean is not None]


def estimate(network: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> nn.Module:
    """Take the statistics of batch norms anew from `batches`, in place: those of the supernet are of no subnet."""
    norms = batch_norms(network)
    held = [part.momentum for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # the plain mean over the batches
        part.train()
    with torch.no_grad():
        for batch in batches if norms else ():
            network(*batch)
    for part, momentum in zip(norms, held, strict=True):
        part.momentum = momentum
        part.eval()
    return network
