"""The search of `slim_to_latency`: which units of which group go, by milliseconds for importance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from edgegen.passes._clock import Clock, Layer
from edgegen.passes._groups import Coupled, Key


@dataclass
class Menu:
    """What one group may lose. order: its units, the least important first; levels: how many may stay, widest first;
    lost: importance of the first n; taken: key -> channels that the first n units hold."""

    group: Coupled
    order: list[int]
    levels: list[int]
    lost: list[float]
    taken: dict[Key, list[int]]

    @property
    def units(self) -> int:
        """All of them."""
        return len(self.group.units)


def menus(
    groups: Sequence[Coupled], scores: Sequence[torch.Tensor], multiple: int, min_width: int, most: float
) -> list[Menu]:
    """What each group may lose, `most` of it; one that can lose nothing gets its reason and no menu."""
    found = []
    for group, score in zip(groups, scores, strict=True):
        units, blocks = len(group.units), group.blocks
        step = multiple if units * blocks >= multiple else min_width
        step //= math.gcd(step, blocks)
        order = [i for i in torch.argsort(score, stable=True).tolist() if i not in group.fixed]
        least = max(step, math.ceil(min_width / blocks), units - len(order), math.ceil(units * (1 - most) - 1e-9))
        levels = [kept for kept in range((units - 1) // step * step, 0, -step) if kept >= least]
        if not levels:
            why = f"rounding to {multiple}, min_width {min_width}, most {most:g}"
            group.blocked = f"{units * blocks} channels cannot become fewer: {why}"
            continue
        lost = [0.0, *torch.cumsum(score[order], 0).tolist()]
        keys = {key for unit in group.units for key in unit}
        taken = {key: [0] for key in keys}
        for unit in order:
            for key, sums in taken.items():
                sums.append(sums[-1] + len(group.units[unit].get(key, ())))
        found.append(Menu(group, order, levels, lost, taken))
    return found


def widths(layers: Sequence[Layer], menus: Sequence[Menu], count: int) -> dict[str, tuple[list[int], list[int]]]:
    """Path -> the widths (in, out) to measure: `count` of those that may come, from the narrowest to its own."""
    steps: dict[Key, set[int]] = {}
    for menu in menus:
        for key, sums in menu.taken.items():
            steps.setdefault(key, set()).update(sums[menu.units - kept] for kept in menu.levels)

    def spread(key: Key, wide: int) -> list[int]:
        possible = sorted({wide, *(wide - gone for gone in steps.get(key, ()))})
        places = {round(i * (len(possible) - 1) / (count - 1)) for i in range(count)}
        return [possible[place] for place in sorted(places) if possible[place] > 0]

    return {
        layer.path: (spread((layer.path, "in"), layer.wide[0]), spread((layer.path, "out"), layer.wide[1]))
        for layer in layers
    }


@dataclass
class Slimming:
    """The state of the search: how many units of each group stay, and what each layer then takes."""

    layers: Sequence[Layer]
    clock: Clock
    menus: Sequence[Menu]
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_path = {layer.path: layer for layer in self.layers}
        self.restart()

    def restart(self) -> None:
        """All units are there."""
        self.kept = [menu.units for menu in self.menus]
        self.gone: dict[Key, dict[int, int]] = {}
        self.total = self.clock.whole(self.layers)

    def _ms(self, path: str, gone: Mapping[Key, Mapping[int, int]]) -> float:
        layer = self.by_path[path]
        left = [wide - sum(gone.get((path, side), {}).values())
                for side, wide in zip(("in", "out"), layer.wide, strict=True)]  # fmt: skip
        if layer.kind == "depthwise":
            left[0] = left[1]
        return self.clock.ms(layer, max(1, left[0]), max(1, left[1]))

    def change(self, number: int, kept: int) -> tuple[float, dict[Key, dict[int, int]]]:
        """(what the whole takes more, the new state) when a group keeps another number of units."""
        menu = self.menus[number]
        new = {key: {**self.gone.get(key, {}), number: sums[menu.units - kept]} for key, sums in menu.taken.items()}
        paths = dict.fromkeys(path for path, _ in menu.taken if path in self.by_path)
        state = {**self.gone, **new}
        return sum(self._ms(path, state) - self._ms(path, self.gone) for path in paths), state

    def put(self, number: int, kept: int) -> None:
        """Do so."""
        more, self.gone = self.change(number, kept)
        self.total += more
        self.kept[number] = kept

    def cost(self, number: int, kept: int) -> float:
        """Importance that a group has lost."""
        return self.menus[number].lost[self.menus[number].units - kept]

    def slim(self, limit: float) -> bool:
        """Remove until the whole takes at most `limit`; False when all that may go is gone before."""
        while self.total > limit:
            best, move = 0.0, None
            for number, menu in enumerate(self.menus):
                for kept in (level for level in menu.levels if level < self.kept[number]):
                    gained = -self.change(number, kept)[0]
                    worth = gained / max(self.cost(number, kept) - self.cost(number, self.kept[number]), 1e-12)
                    if gained > 0 and worth > best:
                        best, move = worth, (number, kept)
            if move is None:
                return False
            self.put(*move)
        self._give_back(limit)
        return True

    def _give_back(self, limit: float) -> None:
        """What the last step took too much comes back, where the most importance was lost first."""
        for number in sorted(range(len(self.menus)), key=lambda n: -self.cost(n, self.kept[n])):
            menu = self.menus[number]
            for kept in (menu.units, *menu.levels):
                if kept <= self.kept[number]:
                    break
                if self.total + self.change(number, kept)[0] <= limit:
                    self.put(number, kept)
                    break
