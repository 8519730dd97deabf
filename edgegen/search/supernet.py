"""Supernets in a search: both ways to a subnet are tried at the extremes, and whether the supernet's order is right.

A subnet is a slice of the trained supernet, continued alone, or a slice of the network as it came, distilled directly;
which is better depends on how much is left (mit-han-lab/gan-compression, issue 15). The order: Kendall's tau-b
(Kendall, 1938; here SciPy's), as in Yu et al., 2020, arXiv:2001.10422: a search in a supernet is as good as its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgegen.search.spaces import Layers, Space, candidate_key, mildest, to_recipe
from edgegen.search.store import Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgegen.passes._supernet import Choice, Elastic

TRAINING, CUT = "train_supernet", "slice_widths"


@dataclass(frozen=True)
class Ways:
    """The same subnet in both ways, as choices. name: which extreme it is."""

    name: str
    slice: dict[str, int]
    direct: dict[str, int]


def ways(space: Space) -> list[Ways]:
    """Both ways to the strongest subnet and to the mildest; none where the space does not train a supernet or not."""
    shared = next((g for g in space.genes if (g.pass_name, g.option) == (TRAINING, "steps")), None)
    cuts = [gene for gene in space.genes if gene.pass_name == CUT and len(gene.choices) > 1]
    if shared is None or not cuts or 0 not in shared.choices or not any(shared.choices):
        return []
    most = max(range(len(shared.choices)), key=lambda place: shared.choices[place])
    trained, plain = {shared.name: most}, {shared.name: shared.choices.index(0)}
    strongest = {gene.name: len(gene.choices) - 1 for gene in space.genes}
    longest = {gene.name: len(gene.choices) - 1 for gene in space.genes if gene.pass_name == "distill"}
    gentle = {**mildest(space), **longest, cuts[0].name: 1}
    found = [("strongest", strongest), ("mildest", gentle)]
    return [Ways(name, {**one, **trained}, {**one, **plain}) for name, one in found]


def compared(space: Space, layers: Layers, rows: Sequence[Row]) -> list[str]:
    """Which way was better at each extreme, as far as both were measured to the end."""
    drops = {row.key: row.figures.drop for row in rows if row.figures is not None and not row.figures.stopped}
    said = []
    for one in ways(space):
        a, b = (drops.get(candidate_key(to_recipe(space, way, layers))) for way in (one.slice, one.direct))
        if a is not None and b is not None:
            better = "the supernet's slice" if a <= b else "direct distillation"
            said.append(f"{one.name} subnet: drop {a:.3g} as a slice of the supernet, {b:.3g} by direct distillation;"
                        f" {better} is kept")  # fmt: skip
    return said


@dataclass(frozen=True)
class Ranks:
    """Qualities of the same subnets as slices (with their own norm statistics, not trained further) and trained alone.

    tau: -1 to 1; NaN where all figures of one kind are equal.
    """

    slices: tuple[float, ...]
    alone: tuple[float, ...]
    tau: float


def ranks(
    supernet: nn.Module, space: Elastic, choices: Sequence[Choice], batches: Sequence[tuple[Tensor, ...]],
    alone: Callable[[Choice], nn.Module], score: Callable[[nn.Module], float],
) -> Ranks:
    """Score each choice as a slice of the trained supernet, and as the network that `alone` trains by itself."""
    from edgegen.passes import _supernet

    cuts = [_supernet.estimate(_supernet.cut(supernet, space, choice).eval(), batches) for choice in choices]
    slices = tuple(score(one) for one in cuts)
    trained = tuple(score(alone(choice).eval()) for choice in choices)
    return Ranks(slices, trained, kendall(slices, trained))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two lists of figures (tau-b, -1 to 1): whether both order the candidates alike.

    Raises:
        ValueError: lists of different lengths, or of fewer than two figures.
    """
    from scipy import stats

    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a rank correlation needs two lists of the same length, at least 2, got {len(a)}, {len(b)}")
    return float(stats.kendalltau(a, b).statistic)
