"""How the next candidate is chosen, by name."""

from __future__ import annotations

import warnings
from typing import Any

from edgegen import registry
from edgegen.errors import UsageError
from edgegen.search.spaces import Choices, Space

NAMES = ("nsga2", "tpe", "evolution", "two-stage", "shifting", "random")


def make(name: str, space: Space, trials: int, seed: int) -> Any:
    """An Optuna sampler for a search of `trials` candidates.

    nsga2: Deb et al., 2002, in generations of a quarter of the trials, 8 to 50. tpe: Ozaki et al., 2022,
    arXiv:2207.00532 (multi-objective), all genes drawn together: on the table of benchmarks/search_replay.py that finds
    more than gene by gene. evolution: aging evolution, two-stage: the same first for the generator, then for its game
    (`evolution`). shifting: the space itself moves between rounds (`shifting`). All know constraints.

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
            few = max(8, min(20, trials // 4))
            # constant_liar: workers keep away from what another one is at
            return optuna.samplers.TPESampler(n_startup_trials=few, multivariate=True, constant_liar=True, seed=seed)
        if name in ("evolution", "two-stage"):
            from edgegen.search import evolution

            population = max(8, min(50, trials // 4))
            if name == "evolution":
                return evolution.Aging(space, population, seed)
            return evolution.TwoStage(space, population, seed, trials)
        if name == "shifting":
            from edgegen.search import shifting

            return shifting.Shifting(space, trials, seed)
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


def violation(trial: Any) -> float:
    """By how much a finished trial breaks the limits, in shares of them; 0 inside."""
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
