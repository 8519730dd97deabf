"""One worker of a search: take a candidate nobody has, find its figures, write them down, until all are done."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from edgegen.search import strategies
from edgegen.search.spaces import Layers, Space, candidate_key, to_recipe
from edgegen.search.store import FAILED, RUNNING, Figures, Row, Store
from edgegen.types import Budget

MOST_ATTEMPTS = 3  # a candidate that killed so many workers is given up
AGAIN = 8  # after so many proposals in a row that were tried before, one that was not is drawn instead
Objective = Callable[[Mapping[str, int]], Figures]


def work(
    store: Store, study: Any, space: Space, layers: Layers, objective: Objective, *, trials: int,
    budget: Budget | None = None, seed: int = 0, told: Callable[[Row], None] = lambda row: None,
) -> int:
    """Work on the study until `trials` candidates are done by all workers together; how many this one did.

    objective: choices -> Figures; failures are figures, exceptions end the worker (and free the candidate).
    """
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    ranges, number, repeated = strategies.distributions(space), 0, 0
    while True:
        row, trial = (store.take_stale(owner) if store.count(RUNNING) else None), None
        if row is None:
            if store.count() >= trials:
                if not store.count(RUNNING):
                    return number
                time.sleep(min(1.0, store.grace / 8))
                continue
            row, trial = _next(store, study, space, layers, ranges, owner, trials)
            if row is None:
                repeated += 1
                if repeated >= AGAIN:
                    fresh = strategies.untried(
                        space, lambda choices: store.find(_key(space, choices, layers)) is not None, seed + repeated
                    )
                    if fresh is None:  # nothing is left: wait for the others, then end
                        trials = store.count()
                        continue
                    study.enqueue_trial(dict(fresh))
                continue
        repeated = 0
        number += _done(store, study, row, trial, objective, budget or Budget(), told)


def _key(space: Space, choices: Mapping[str, int], layers: Layers) -> str:
    return candidate_key(to_recipe(space, choices, layers))


def _next(
    store: Store, study: Any, space: Space, layers: Layers, ranges: dict[str, Any], owner: str, trials: int
) -> tuple[Row | None, Any]:
    """The next candidate as its row and Optuna's trial; None where it was tried before, or all slots are taken."""
    from optuna.trial import TrialState

    trial = study.ask(ranges)
    choices = strategies.suggested(trial)
    key = _key(space, choices, layers)
    found = store.reserve(key, trial.number, choices, owner, trials)
    if isinstance(found, Row):
        return found, trial
    known = store.find(key)
    if known is not None and known.figures is not None and known.state != FAILED:  # its figures cost nothing
        study.tell(trial, list(known.figures.values))
    else:
        study.tell(trial, state=TrialState.FAIL)
    return None, None


def _done(
    store: Store, study: Any, row: Row, trial: Any, objective: Objective, budget: Budget, told: Callable[[Row], None]
) -> int:
    """Find the figures of one candidate and tell them; 1 when they counted."""
    if row.attempts > MOST_ATTEMPTS:
        figures = Figures(failure=f"its worker died {MOST_ATTEMPTS} times")
    else:
        with store.beating(row):
            figures = objective(row.choices)
    if not store.finish(row, figures):  # we were silent for too long, and another worker has it now
        return 0
    _tell(study, trial or _orphan(study, row.trial), figures, budget)
    told(dataclasses.replace(row, figures=figures))
    return 1


def _orphan(study: Any, number: int) -> Any:
    """The trial that a dead worker left running; None when it is finished."""
    import optuna

    found = next((one for one in reversed(study.get_trials(deepcopy=False)) if one.number == number), None)
    return None if found is None or found.state.is_finished() else optuna.trial.Trial(study, found._trial_id)


def _tell(study: Any, trial: Any, figures: Figures, budget: Budget) -> None:
    import optuna

    if trial is None:
        return
    if figures.failure:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    broken = violations(figures, budget)
    for name, value in broken.items():
        trial.set_constraint(name, value)
    if broken:
        trial.set_user_attr("violations", list(broken.values()))
    study.tell(trial, list(figures.values))


def violations(figures: Figures, budget: Budget) -> dict[str, float]:
    """Limit -> by which share of it the candidate is above (negative: below)."""
    latency, drop, size = figures.values
    limits = {
        "latency": (latency, budget.max_latency_ms),
        "size": (size * 1e6, budget.max_size_bytes),
        "quality": (drop, budget.max_quality_drop),
    }
    return {
        name: (value - limit) / max(abs(limit), 1e-9) for name, (value, limit) in limits.items() if limit is not None
    }
