"""Convolutions as three: 1x1 to fewer channels, a small k x k core, 1x1 back. Tucker-2 of the kernel.

Kim et al., 2016, Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications,
arXiv:1511.06530: W (O, I, kH, kW) = U (O, a) core (a, b, kH, kW) V (I, b)', by HOSVD and a few sweeps of higher-order
orthogonal iteration, each of which cannot raise the error. Deviation: ranks by ratio, energy, output distance or time
instead of variational Bayes; a and b are the same share of O and I.
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

# Option sets that `edgegen probe` times before any training; the shapes are those of `fit` = "outputs", made sooner.
PROBES = tuple({"ratio": ratio, "fit": "weights", "sweeps": 0} for ratio in (0.5, 0.75))


def factorize_tucker(
    model: Model,
    job: Job,
    *,
    by: str = "ratio",
    ratio: float = 0.5,
    energy: float = 0.9,
    drop: float = 0.01,
    fit: str = "outputs",
    sweeps: int = 4,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    round_to: int | None = None,
    samples: int = 8,
) -> PassResult:
    """Replace ungrouped convolutions with a window by 1x1, k x k and 1x1, where that has fewer MACs.

    Args:
        model: one stage with a module. Not modified.
        by: what decides the ranks: "ratio", "energy", "drop" or "latency"; ratio, energy, drop: as in `factorize_svd`,
            energy being the share of the kernel's square.
        fit: "outputs" (the last 1x1 is fitted to the layer's outputs on samples in the end) or "weights" (the kernel).
        sweeps: of higher-order orthogonal iteration; 0: HOSVD alone.
        layers, skip, round_to, samples: as in `factorize_svd`.
    Returns:
        PassResult; `changed` has the ranks of each layer and the energy they keep, `skipped` why the others stay.
    Raises:
        ValueError: an option out of range, a model without a network, a name that does not exist, or by latency where
            nothing can be measured.
    """
    rule = Rule(by, ratio, energy, drop)
    rule.check()
    _swap.check_choice("fit", fit, _ranks.FITS)
    if sweeps < 0:
        raise ValueError(f"sweeps must be at least 0, got {sweeps}")
    multiple = _ranks.multiple(round_to, job)
    module = _swap.network(model, "factorize_tucker")
    inputs, source = _swap.samples(model, job, samples)
    with torch.no_grad(), training.use_threads(job.threads):
        places, skipped = _swap.find(model, module, inputs[0], layers=layers, skip=skip, kinds=(nn.Conv2d,))
        places, unfit = _swap.with_window(places)
        menus = [_menu(place, multiple, sweeps) for place in places]
        return _ranks.carry_out(model, module, menus, rule, inputs, job, {**skipped, **unfit},
                                {"inputs": source, "rank_multiple": multiple}, fit=fit)  # fmt: skip


def _menu(place: Place, multiple: int, sweeps: int) -> _ranks.Menu:
    """Ranks (a, b) of about one share of the outputs and inputs; a side that keeps all its channels needs no 1x1."""
    outputs, inputs, high, wide = place.layer.weight.shape
    pairs = {
        (_near(outputs * step / 64, multiple, outputs), _near(inputs * step / 64, multiple, inputs))
        for step in range(1, 65)
    }
    power = float(place.layer.weight.double().square().sum()) or 1.0
    choices = []
    for a, b in sorted(pairs):
        sides = (b * inputs if b < inputs else 0, a * b * high * wide, a * outputs if a < outputs else 0)
        factors = cache(partial(_decompose.tucker2, place.layer.weight.detach(), (a, b), sweeps))

        def kept(factors: Any = factors) -> float:
            return float(factors()[0].square().sum()) / power

        def make(factors: Any = factors) -> nn.Module:
            return three(place.layer, *factors())

        text = f"ranks {a} of {outputs} outputs and {b} of {inputs} inputs"
        macs = place.places_in * sides[0] + place.places_out * (sides[1] + sides[2])
        choices.append(Choice(text, sum(sides), macs, kept, make))
    return _ranks.menu(place, choices)


def _near(rank: float, multiple: int, most: int) -> int:
    """The multiple below, at least one, at most all."""
    return min(most, max(1, int(rank) // multiple) * multiple)


def three(layer: nn.Conv2d, core: Tensor, left: Tensor, right: Tensor) -> nn.Module:
    """`layer` with the kernel U core V': core (a, b, kH, kW), U (outputs, a), V (inputs, b)."""
    (outputs, a), (inputs, b) = left.shape, right.shape
    bias = layer.bias is not None
    if b == inputs:
        core = torch.einsum("abhw,ib->aihw", core, right)
    if a == outputs:
        core = torch.einsum("abhw,oa->obhw", core, left)
    parts = [(chain.pointwise(inputs, b), right.T)] if b < inputs else []
    parts.append((chain.like(layer, b, a, bias=bias and a == outputs), core))
    if a < outputs:
        parts.append((chain.pointwise(a, outputs, bias=bias), left))
    return _swap.filled(layer, [part for part, _ in parts], [weight for _, weight in parts])
