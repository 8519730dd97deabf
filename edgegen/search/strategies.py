"""How the next candidate is chosen: NSGA-II, TPE, aging evolution or at random, by name."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from edgegen import registry
from edgegen.errors import UsageError
from edgegen.search.spaces import Choices, Space

NAMES = ("nsga2", "tpe", "evolution", "random")


def make(name: str, space: Space, trials: int, seed: int) -> Any:
    """An Optuna sampler for a search of `trials` candidates.

    nsga2: Deb et al., 2002, in generations of a quarter of the trials, 8 to 50. tpe: Ozaki et al., 2022,
    arXiv:2207.00532 (multi-objective). evolution: see `aging`. All know constraints.

    Raises:
        UsageError: an unknown name.
    """
    import optuna

    if name not in NAMES:
        raise UsageError(f"unknown sampler {name!r}{registry.near(name, NAMES)}; there are: {', '.join(NAMES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(8, min(50, trials // 4)), seed=seed)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(8, min(20, trials // 4)))
        if name == "evolution":
            return aging()(space, population=max(8, min(50, trials // 4)), seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def distributions(space: Space) -> dict[str, Any]:
    """Gene -> Optuna's distribution over the positions of its choices."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    found: dict[str, Any] = {}
    for gene in space.genes:
        count = len(gene.choices)
        found[gene.name] = IntDistribution(0, count - 1) if gene.ordered else CategoricalDistribution(range(count))
    return found


def suggested(trial: Any) -> dict[str, int]:
    """The choices of a trial that was asked for with `distributions`."""
    return {name: int(value) for name, value in trial.params.items()}


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether `a` is no worse than `b` in everything and better in something; lower is better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@functools.cache
def aging() -> type:
    """The sampler class of aging evolution; made when it is asked for, because Optuna is imported late.

    Real et al., 2019, arXiv:1802.01548: the parent is the best of a few drawn from the youngest `population`, and one
    gene changes; the oldest die, however good. Best means: first feasible, then beaten by the fewest of those drawn.
    """
    import random

    from optuna.samplers import BaseSampler, RandomSampler
    from optuna.trial import TrialState

    class Aging(BaseSampler):
        """See `aging`."""

        def __init__(self, space: Space, population: int, seed: int, drawn: int = 5) -> None:
            self._space, self._population, self._drawn = space, population, drawn
            self._random, self._first = random.Random(seed), RandomSampler(seed=seed)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return distributions(self._space)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            done = study._get_trials(deepcopy=False, states=(TrialState.COMPLETE,), use_cache=True)
            if len(done) < self._population:
                return {}
            young = sorted(done, key=lambda one: one.number)[-self._population :]
            some = self._random.sample(young, min(self._drawn, len(young)))
            parent = min(some, key=lambda one: (_violation(one), sum(dominates(o.values, one.values) for o in some)))
            child = {gene.name: int(parent.params[gene.name]) for gene in self._space.genes}
            open_genes = [gene for gene in self._space.genes if len(gene.choices) > 1]
            gene = self._random.choice(open_genes)
            child[gene.name] = self._random.choice([p for p in range(len(gene.choices)) if p != child[gene.name]])
            return child

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return self._first.sample_independent(study, trial, name, distribution)

        def reseed_rng(self) -> None:
            self._random.seed()
            self._first.reseed_rng()

    return Aging


def _violation(trial: Any) -> float:
    return sum(max(0.0, value) for value in trial.user_attrs.get("violations", ()))


def untried(space: Space, known: Any, seed: int) -> Choices | None:
    """Some candidate for which `known(choices)` is false, drawn at random, else looked for in order; None: all are.

    Spaces of more than 100,000 candidates are not looked through: after 300 draws they count as tried.
    """
    import random

    from edgegen.search.spaces import everything

    draw = random.Random(seed)
    for _ in range(300):
        choices = {gene.name: draw.randrange(len(gene.choices)) for gene in space.genes}
        if not known(choices):
            return choices
    if space.size > 100_000:
        return None
    names = [gene.name for gene in space.genes]
    return next((found for places in everything(space) if not known(found := dict(zip(names, places)))), None)
