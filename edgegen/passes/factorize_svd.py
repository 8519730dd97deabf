"""Linear layers and convolutions as two thinner ones: truncated singular value decomposition.

Guo et al., 2023, PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, arXiv:2310.10700 (linear layers
by SVD, then feature distillation: `distill` with the loss features follows); for convolutions Zhang et al., 2015,
arXiv:1505.06798 (k x k to r channels, then 1x1) and Jaderberg et al., 2014, arXiv:1405.3866 (k x 1, then 1 x k).

W (outputs, inputs) -> U_r (U_r' W) with U the leading directions of W W' (fit = "weights": Eckart and Young, the error
is the tail of the squared singular values) or of the covariance of the layer's outputs W x (fit = "outputs": the least
error of the outputs among all matrices of that rank; the same as SVD with whitened inputs).
Deviation from PELA: its weight-perturbation regularisation is a matter of training, not of this pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgegen import training
from edgegen.nn import chain
from edgegen.passes import _decompose, _moments, _ranks, _swap
from edgegen.passes._ranks import Choice, Rule
from edgegen.passes._swap import Place
from edgegen.types import Job, Model, PassResult

KERNELS = ("channel", "spatial")
# Option sets that `edgegen probe` times before any training; the shapes are those of `fit` = "outputs", made sooner.
PROBES = tuple({"ratio": ratio, "kernels": kernels, "fit": "weights"} for kernels in KERNELS for ratio in (0.5, 0.75))


def factorize_svd(
    model: Model,
    job: Job,
    *,
    by: str = "ratio",
    ratio: float = 0.5,
    energy: float = 0.95,
    drop: float = 0.01,
    fit: str = "outputs",
    kernels: str = "channel",
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    round_to: int | None = None,
    samples: int = 8,
) -> PassResult:
    """Replace linear layers and ungrouped convolutions by two, where that has fewer MACs.

    Args:
        model: one stage with a module. Not modified.
        by: what decides the rank: "ratio", "energy", "drop" or "latency".
        ratio: share of each layer's parameters to remove, in [0, 1); by latency, share of its time on the target.
        energy: share of the squared singular values to keep, in (0, 1].
        drop: squared distance that the network's outputs may move, relative to their square; greedy over the layers,
            label-free.
        fit: "outputs" (least error of the layer's outputs on samples) or "weights" (of its weights).
        kernels: windows wider than one pixel become k x k and 1x1 ("channel") or k x 1 and 1 x k ("spatial", which is
            fitted to the weights).
        layers, skip: names of layers, or of modules for all in them. round_to: ranks are rounded down to a multiple of
            it, never below one; None: the target's int8 width. samples: inputs to fit and compare on; by drop, as
            many others to compare on.
    Returns:
        PassResult; `changed` has the rank of each layer and the energy it keeps, `skipped` why the others stay.
    Raises:
        ValueError: an option out of range, a model without a network, a name that does not exist, or by latency where
            nothing can be measured.
    """
    rule = Rule(by, ratio, energy, drop)
    rule.check()
    _swap.check_choice("fit", fit, _ranks.FITS)
    _swap.check_choice("kernels", kernels, KERNELS)
    multiple = _ranks.multiple(round_to, job)
    module = _swap.network(model, "factorize_svd")
    # what a fit was made on looks better than the rest: the budget of outputs is judged on as many other samples
    inputs, source = _swap.samples(model, job, 2 * samples if by == "drop" else samples)
    fitted, judged = inputs[:samples], inputs[-samples:]
    with torch.no_grad(), training.use_threads(job.threads):
        places, skipped = _swap.find(model, module, judged[0], layers=layers, skip=skip)
        grouped = [place for place in places if getattr(place.layer, "groups", 1) != 1]
        skipped |= dict.fromkeys((place.name for place in grouped), "grouped convolution: there is nothing to share")
        places = [place for place in places if place not in grouped]
        moments = _moments.of_outputs(module, fitted, places) if fit == "outputs" else {}
        menus = [_menu(place, multiple, moments.get(place.name), kernels) for place in places]
        return _ranks.carry_out(model, module, menus, rule, judged, job, skipped,
                                {"inputs": source, "rank_multiple": multiple})  # fmt: skip


def _menu(place: Place, multiple: int, moments: _moments.Moments | None, kernels: str) -> _ranks.Menu:
    """All ranks of one layer."""
    if kernels == "spatial" and isinstance(place.layer, nn.Conv2d) and min(place.layer.kernel_size) > 1:
        return _spatial(place, multiple)
    weight = place.layer.weight.detach().double().flatten(1)  # (outputs, inputs * kernel)
    moments = moments or _moments.of_weights(weight)
    shares, basis = _decompose.principal(moments.mixed(weight))
    choices = []
    for rank in _ranks.steps(min(weight.shape), multiple):
        params = rank * sum(weight.shape)
        kept = float(shares[:rank].sum())
        text = f"rank {rank} of {min(weight.shape)}, keeps {kept:.3f} of the energy"
        make = partial(two, place.layer, basis[:, :rank], moments.mean)
        choices.append(Choice(text, params, place.places_out * params, partial(float, kept), make))
    return _ranks.menu(place, choices)


def two(layer: nn.Conv2d | nn.Linear, basis: Tensor, mean: Tensor) -> nn.Module:
    """`layer` with its outputs projected to a basis (outputs, rank): into it, then out of it.

    Args:
        mean: of the outputs without bias, (outputs,); the part of it outside the basis goes into the bias. Zeros: the
            bias stays as it is.
    """
    weight = layer.weight.detach()
    rows = basis.T @ weight.double().flatten(1)  # (rank, inputs * kernel)
    scale = rows.norm(dim=1).clamp_min(1e-30).sqrt()  # both layers get rows and columns of one norm
    rest = mean - basis @ (basis.T @ mean)
    has_bias = layer.bias is not None or bool(rest.abs().max() > 0)
    rank, outputs = basis.shape[1], basis.shape[0]
    if isinstance(layer, nn.Linear):
        parts = [chain.linear(layer.in_features, rank), chain.linear(rank, outputs, bias=has_bias)]
    else:
        parts = [chain.like(layer, layer.in_channels, rank), chain.pointwise(rank, outputs, bias=has_bias)]
    block = chain.Chain(parts)
    first, second = (part for part in list[Any](block))
    first.weight.copy_((rows / scale[:, None]).reshape(first.weight.shape))
    second.weight.copy_((basis * scale).reshape(second.weight.shape))
    if has_bias:
        second.bias.copy_(rest + (layer.bias.double() if layer.bias is not None else 0))
    return _swap.dress(block, layer)


def _spatial(place: Place, multiple: int) -> _ranks.Menu:
    """k x 1 and 1 x k: the kernel as a matrix (inputs * kH, outputs * kW)."""
    layer = place.layer
    outputs, inputs, high, wide = layer.weight.shape
    matrix = layer.weight.detach().double().permute(1, 2, 0, 3).reshape(inputs * high, outputs * wide)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    shares = values.square() / values.square().sum().clamp_min(1e-300)
    between = place.output[0] * place.output[2] * place.input[3]  # positions after the vertical layer
    choices = []
    for rank in _ranks.steps(min(matrix.shape), multiple):
        first, second = rank * inputs * high, rank * outputs * wide
        kept = float(shares[:rank].sum())
        text = f"{high}x1 and 1x{wide} through {rank} channels, keeps {kept:.3f} of the energy"
        make = partial(_crossed, layer, left[:, :rank], values[:rank], right[:rank])
        choices.append(Choice(text, first + second, between * first + place.places_out * second,
                              partial(float, kept), make))  # fmt: skip
    return _ranks.menu(place, choices)


def _crossed(layer: nn.Conv2d, left: Tensor, values: Tensor, right: Tensor) -> nn.Module:
    rank, (outputs, inputs, _, wide) = len(values), layer.weight.shape
    bias, root = layer.bias is not None, values.sqrt()
    parts = [chain.like(layer, inputs, rank, "h"), chain.like(layer, rank, outputs, "w", bias=bias)]
    second = (right * root[:, None]).reshape(rank, outputs, 1, wide).transpose(0, 1)
    return _swap.filled(layer, parts, [(left * root).T, second])
