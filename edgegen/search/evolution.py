"""Aging evolution, and the same in two stages for networks that are trained by a game.

Real et al., 2019, arXiv:1802.01548: the parent is the best of a few drawn from the youngest, and one gene changes; the
oldest die, however good. Best means here: first feasible, then beaten by the fewest of those drawn. Ying et al., 2021,
EAGAN, arXiv:2111.15097: first the generator evolves and the game is fixed, then the game of the best generators.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from edgegen import recipe
from edgegen.search.spaces import Gene, Space
from edgegen.search.strategies import distributions, dominates, violation


class Aging(BaseSampler):
    """Aging evolution over the genes of a space: `population` young ones, the parent is the best of `drawn`."""

    def __init__(self, space: Space, population: int, seed: int, drawn: int = 5) -> None:
        self._space, self._population, self._drawn = space, population, drawn
        self._random = random.Random(seed)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """All genes are chosen together."""
        return distributions(self._space)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        """A random candidate while there are few, then a child of a young one."""
        done = finished(study)
        if len(done) < self._population:
            return self._any(self._space.genes)
        return self._child(done[-self._population :], self._space.genes)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        """Not reached: `sample_relative` gives every gene."""
        raise NotImplementedError(param_name)

    def reseed_rng(self) -> None:
        """Another random state, for a worker that was copied."""
        self._random.seed()

    def _any(self, genes: Sequence[Gene]) -> dict[str, int]:
        """Random choices for these genes, the first ones for all others."""
        return {gene.name: self._random.randrange(len(gene.choices)) if gene in genes else 0
                for gene in self._space.genes}  # fmt: skip

    def _child(self, parents: Sequence[Any], genes: Sequence[Gene]) -> dict[str, int]:
        """The best of a few drawn parents with another choice for one of these genes; half of the time, where choices
        have an order, with the next one."""
        some = self._random.sample(list(parents), min(self._drawn, len(parents)))
        parent = min(some, key=lambda one: (violation(one), sum(dominates(o.values, one.values) for o in some)))
        child = {gene.name: int(parent.params[gene.name]) for gene in self._space.genes}
        if free := [gene for gene in genes if len(gene.choices) > 1]:
            gene = self._random.choice(free)
            here, count = child[gene.name], len(gene.choices)
            near = [place for place in (here - 1, here + 1) if 0 <= place < count]
            far = [place for place in range(count) if place != here]
            child[gene.name] = self._random.choice(near if gene.ordered and self._random.random() < 0.5 else far)
        return child


class TwoStage(Aging):
    """EAGAN's order: in the first half of the trials genes of the network evolve, under the first choice of every gene
    of its training (the cheapest game); in the second half genes of the training evolve, for the best networks."""

    def __init__(self, space: Space, population: int, seed: int, trials: int) -> None:
        super().__init__(space, min(population, max(4, trials // 4)), seed)
        self._first = max(1, trials // 2)
        self._game = [gene for gene in space.genes if gene.pass_name in recipe.ROUNDS]
        self._network = [gene for gene in space.genes if gene.pass_name not in recipe.ROUNDS]

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        """A candidate of the stage that the search is in."""
        done = finished(study)
        if not self._game or not self._network:
            return super().sample_relative(study, trial, search_space)
        if len(done) >= self._first:
            networks = best(done[: self._first]) or done
            return self._child([*networks, *done[self._first :][-self._population :]], self._game)
        plain = [one for one in done if all(one.params[gene.name] == 0 for gene in self._game)]
        if len(plain) < self._population:
            return self._any(self._network)
        return self._child(plain[-self._population :], self._network)


def finished(study: Any) -> list[Any]:
    """The trials that have figures, in the order in which they began; one that was proposed again counts once."""
    done = study._get_trials(deepcopy=False, states=(TrialState.COMPLETE,), use_cache=True)
    unique: dict[tuple[Any, ...], Any] = {}
    for one in sorted(done, key=lambda trial: trial.number):
        unique.setdefault(tuple(one.params.values()), one)
    return list(unique.values())


def best(trials: Sequence[Any]) -> list[Any]:
    """The feasible trials that none of the others beats."""
    inside = [one for one in trials if violation(one) == 0]
    return [one for one in inside if not any(dominates(other.values, one.values) for other in inside)]
