"""Convolutions as 1x1, depthwise k x k and 1x1: a sum of rank-one terms (CP), with a cure for terms that diverge.

Phan et al., 2020, Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural Network,
arXiv:2008.05441: the kernel (O, I, kH * kW) = sum over r of a_r b_r c_r. Plain ALS may let terms grow that cancel each
other (degeneracy): it is checked by the sum of their squared norms relative to the kernel's, and cured by their error
preserving correction: the factors of least sensitivity with the same error.
Deviations: the correction goes from factor to factor by a ridge regression of the right strength (the same minimum in
each factor as their spherically constrained quadratic programme); it is always applied; where terms still cancel by
more than `growth`, the error is given up in steps of 1.5 until they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from edgegen import training
from edgegen.nn import chain
from edgegen.passes import _decompose, _ranks, _swap
from edgegen.passes._ranks import Choice, Rule
from edgegen.passes._swap import Place
from edgegen.types import Job, Model, PassResult

# Option sets that `edgegen probe` times before any training.
PROBES = tuple({"ratio": ratio, "fit": "weights", "sweeps": 1, "stable": False} for ratio in (0.5, 0.75))


def factorize_cp(
    model: Model,
    job: Job,
    *,
    by: str = "ratio",
    ratio: float = 0.5,
    energy: float = 0.9,
    drop: float = 0.01,
    fit: str = "outputs",
    sweeps: int = 60,
    stable: bool = True,
    growth: float = 10.0,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    round_to: int | None = None,
    samples: int = 8,
) -> PassResult:
    """Replace ungrouped convolutions with a window by 1x1, depthwise k x k and 1x1, where that has fewer MACs.

    Args:
        model: one stage with a module. Not modified.
        by, ratio, energy, drop, fit, layers, skip, round_to, samples: as in `factorize_tucker`.
        sweeps: of alternating least squares. stable: correct what diverges. growth: how often the terms' squared norms
            may make up the kernel's own before error is given up for it.
    Returns:
        PassResult; `changed` has each layer's number of terms; `notes` their growth before and after the correction.
    Raises:
        ValueError: an option out of range, a model without a network, a name that does not exist, or by latency where
            nothing can be measured.
    """
    rule = Rule(by, ratio, energy, drop)
    rule.check()
    _swap.check_choice("fit", fit, _ranks.FITS)
    if sweeps < 1 or not growth >= 1:
        raise ValueError(f"sweeps and growth must be at least 1, got {sweeps} and {growth}")
    multiple = _ranks.multiple(round_to, job)
    module = _swap.network(model, "factorize_cp")
    inputs, source = _swap.samples(model, job, samples)
    notes: dict[str, Any] = {"inputs": source, "rank_multiple": multiple, "growth": {}}
    with torch.no_grad(), training.use_threads(job.threads):
        places, skipped = _swap.find(model, module, inputs[0], layers=layers, skip=skip, kinds=(nn.Conv2d,))
        places, unfit = _swap.with_window(places)
        solve = partial(_fit, sweeps=sweeps, seed=job.seed, growth=growth if stable else None)
        menus = [_menu(place, multiple, solve, notes["growth"]) for place in places]
        result = _ranks.carry_out(model, module, menus, rule, inputs, job, {**skipped, **unfit}, notes, fit=fit)
    for name in notes["growth"].keys() - result.changed.keys():  # tried and not taken
        del notes["growth"][name]
    return result


def _fit(
    kernel: Tensor, rank: int, *, sweeps: int, seed: int, growth: float | None
) -> tuple[_decompose.Factors, float]:
    """Factors of a kernel (O, I, kH * kW), and the growth of the terms of plain ALS."""
    plain = _decompose.cp(kernel, rank, sweeps=sweeps, seed=seed, tolerance=1e-5)
    before = _decompose.cp_growth(kernel, plain)
    return (plain if growth is None else _decompose.stable(kernel, plain, growth=growth)), before


def _menu(place: Place, multiple: int, solve: Any, told: dict[str, Any]) -> _ranks.Menu:
    """All ranks of one layer; `told` gets the growth of the terms of what is made."""
    outputs, inputs, high, wide = place.layer.weight.shape
    kernel = place.layer.weight.detach().flatten(2).double()
    choices = []
    for rank in _ranks.steps(place.params // (outputs + inputs + high * wide), multiple):
        factors = cache(partial(solve, kernel, rank))

        def kept(factors: Any = factors) -> float:
            return 1 - _decompose.cp_error(kernel, factors()[0])

        def make(factors: Any = factors) -> nn.Module:
            found, before = factors()
            told[place.name] = [round(before, 4), round(_decompose.cp_growth(kernel, found), 4)]
            return terms(place.layer, found)

        params = rank * (outputs + inputs + high * wide)
        macs = place.places_in * rank * inputs + place.places_out * rank * (outputs + high * wide)
        choices.append(Choice(f"{rank} terms", params, macs, kept, make))
    return _ranks.menu(place, choices)


def terms(layer: nn.Conv2d, factors: Sequence[Tensor]) -> nn.Module:
    """`layer` with the kernel sum of a_r b_r c_r: factors (O, rank), (I, rank), (kH * kW, rank)."""
    a, b, c = factors
    rank = a.shape[1]
    parts = [
        chain.pointwise(len(b), rank), chain.like(layer, rank, rank, groups=rank),
        chain.pointwise(rank, len(a), bias=layer.bias is not None),
    ]  # fmt: skip
    return _swap.filled(layer, parts, [b.T, c.T.reshape(rank, 1, *layer.kernel_size), a])
