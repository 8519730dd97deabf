"""The space itself evolves between rounds: each ordered gene has a window of its choices that moves by measured error.

Chen et al., 2021, Searching the Search Space of Vision Transformer (S3), arXiv:2111.14725: the E-T error of a part of a
dimension is the mean error of the candidates in it plus that of the best ones among them; a line through the E-T errors
says where the dimension should go. Here, after each round: a window shifts along a falling line; at the end of its
choices it shrinks from the side with the larger error; where no place is worse it grows. At the end comes aging
evolution inside the windows, as S3 searches its final space. Error of a candidate, as there are several objectives: the
share of its round that beats it; above 1 where it breaks a limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgegen.search.evolution import Aging, finished
from edgegen.search.spaces import Gene, Space
from edgegen.search.strategies import dominates, violation

LEAST = 0.1  # change of the E-T error over a window that is taken for a slope
NARROWEST = 2
Windows = dict[str, tuple[int, int]]  # gene -> first and last place of its window


class Shifting(Aging):
    """Uniform draws in windows that move between rounds of a quarter of the trials, 6 to 50; the last quarter of the
    rounds is evolution inside them."""

    def __init__(self, space: Space, trials: int, seed: int) -> None:
        self.each = max(6, min(50, trials // 4))
        self.rounds = max(1, 3 * max(2, trials // self.each) // 4)  # after which the windows stay
        self._known = [start(space)]
        super().__init__(space, self.each, seed)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        """A candidate inside the windows, which follow from the finished trials."""
        done = finished(study)
        turns = min(self.rounds, len(done) // self.each)
        while len(self._known) <= turns:
            last = len(self._known) * self.each
            found = told(done[last - self.each : last])
            self._known.append(moved(self._space, self._known[-1], *found))
        now = self._known[turns]
        if turns < self.rounds:
            return {name: self._random.randint(low, high) for name, (low, high) in now.items()}
        child = self._child(done[-self.each :], self._space.genes)
        return {name: min(max(place, now[name][0]), now[name][1]) for name, place in child.items()}


def start(space: Space) -> Windows:
    """The middle half of each ordered gene's choices, at least two; all choices of a gene without order."""
    found = {}
    for gene in space.genes:
        count = len(gene.choices)
        wide = min(count, max(NARROWEST, math.ceil(count / 2))) if gene.ordered else count
        low = (count - wide) // 2
        found[gene.name] = (low, low + wide - 1)
    return found


def told(trials: Sequence[Any]) -> tuple[list[Mapping[str, int]], list[float]]:
    """Choices and errors of the trials of a round."""
    errors = []
    for one in trials:
        others = [other for other in trials if other is not one]
        above = violation(one)
        beaten = sum(dominates(other.values, one.values) for other in others) / max(1, len(others))
        errors.append(1.0 + above if above > 0 else beaten)
    return [one.params for one in trials], errors


def moved(space: Space, windows: Windows, chosen: Sequence[Mapping[str, int]], errors: Sequence[float]) -> Windows:
    """The windows after a round. chosen, errors: of each candidate of the round."""
    return {
        gene.name: _moved(gene, windows[gene.name], [int(one[gene.name]) for one in chosen], errors)
        if gene.ordered else windows[gene.name]
        for gene in space.genes
    }  # fmt: skip


def _moved(gene: Gene, window: tuple[int, int], places: Sequence[int], errors: Sequence[float]) -> tuple[int, int]:
    low, high = window
    last = len(gene.choices) - 1
    found = {place: et_error([e for p, e in zip(places, errors, strict=True) if p == place])
             for place in range(low, high + 1) if place in places}  # fmt: skip
    if len(found) < 2:
        return window
    slope = float(np.polyfit(list(found), list(found.values()), 1)[0])
    if abs(slope) * (high - low) < LEAST:
        return max(0, low - 1), min(last, high + 1)
    wide = high - low + 1
    step = max(1, wide // 2)
    if slope > 0:  # better towards the first choices
        by = min(step, low)
        return (low - by, high - by) if by else (low, max(high - step, low + NARROWEST - 1))
    by = min(step, last - high)
    return (low + by, high + by) if by else (min(low + step, high - NARROWEST + 1), high)


def et_error(errors: Sequence[float]) -> float:
    """Expected and top-tier error: the mean, and the mean of the best third, in equal parts."""
    ordered = sorted(errors)
    top = ordered[: max(1, len(ordered) // 3)]
    return (sum(ordered) / len(ordered) + sum(top) / len(top)) / 2
