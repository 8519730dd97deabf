"""Tensors as sums of small factors: principal directions, Tucker-2, CP, and the cure of CP's diverging terms.

All in float64 on (outputs, inputs, kH, kW) or (outputs, inputs, kH * kW); plain numbers in, plain numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Factors = list[Tensor]
_TINY = 1e-12


def principal(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """(share of the energy of each direction, falling; directions as columns) of a symmetric matrix (n, n)."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return values / values.sum().clamp_min(1e-300), vectors


def tucker2(weight: Tensor, ranks: tuple[int, int], sweeps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Core (a, b, kH, kW), outputs' basis (O, a) and inputs' basis (I, b) of a kernel (O, I, kH, kW).

    Tucker-2 (Kim et al., 2016, arXiv:1511.06530): HOSVD, then `sweeps` of higher-order orthogonal iteration (De
    Lathauwer et al., 2000), each of which cannot raise the error.
    """
    full = weight.double().flatten(2)  # (O, I, K)
    left = principal(_gram(full, 0))[1][:, : ranks[0]]
    right = principal(_gram(full, 1))[1][:, : ranks[1]]
    for _ in range(sweeps if min(ranks[0] / len(full), ranks[1] / full.shape[1]) < 1 else 0):
        left = principal(_gram(torch.einsum("oik,ib->obk", full, right), 0))[1][:, : ranks[0]]
        right = principal(_gram(torch.einsum("oik,oa->aik", full, left), 1))[1][:, : ranks[1]]
    core = torch.einsum("oik,oa,ib->abk", full, left, right)
    return core.reshape(*ranks, *weight.shape[2:]), left, right


def _gram(full: Tensor, mode: int) -> Tensor:
    flat = full.movedim(mode, 0).flatten(1)
    return flat @ flat.T


def unfold_energy(weight: Tensor, mode: int) -> Tensor:
    """Share of the energy of each principal direction of one mode of a kernel, falling."""
    return principal(_gram(weight.double().flatten(2), mode))[0]


def cp(full: Tensor, rank: int, *, sweeps: int = 100, seed: int = 0, tolerance: float = 1e-8) -> Factors:
    """Sum of `rank` rank-one terms by alternating least squares (Carroll and Chang, 1970), from a random start.

    Args:
        full: (I, J, K). tolerance: ends when a sweep lowers the relative squared error by less.
    Returns:
        Factors (I, rank), (J, rank), (K, rank); the columns of each have one norm (see `balanced`).
    """
    full = full.double()
    generator, power = torch.Generator().manual_seed(seed), max(float(full.square().sum()), 1e-300)
    factors = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in full.shape]
    before = math.inf
    for _ in range(sweeps):
        for mode in range(3):
            gram, cross = _normal(full, factors, mode)
            ridge = 1e-14 * gram.diagonal().max().clamp_min(_TINY)
            factors[mode] = torch.linalg.solve(gram + ridge * torch.eye(rank, dtype=gram.dtype), cross.T).T
        made = float((gram * (factors[2].T @ factors[2])).sum() - 2 * (cross * factors[2]).sum())  # of the last mode
        error, factors = 1 + made / power, balanced(factors)
        if before - error < tolerance:
            break
        before = error
    return factors


def bounded(full: Tensor, factors: Sequence[Tensor], error: float, *, sweeps: int = 10) -> Factors:
    """The error preserving correction: the least sensitive factors with at most the given error.

    Phan et al., 2020, Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural Network,
    arXiv:2008.05441, section 3: sensitivity is the squared change of the tensor for noise in the factors, sum over r of
    I |b|^2 |c|^2 + J |a|^2 |c|^2 + K |a|^2 |b|^2; one factor after the other it is a ridge regression whose strength is
    fixed by the error. Where the error cannot be kept, plain least squares.

    Args:
        error: relative squared error that may be made.
    """
    full, result = full.double(), balanced(factors)
    power = float(full.square().sum())
    for _ in range(sweeps):
        for mode in range(3):
            gram, cross = _normal(full, result, mode)
            scale = _sensitivity_weights(full.shape, result, mode).clamp_min(_TINY).rsqrt()
            values, basis = torch.linalg.eigh(gram * scale[:, None] * scale)
            values, turned = values.clamp_min(0), (cross * scale) @ basis
            strength = _strength(values, turned.square().sum(0), power, error * power)
            result[mode] = (turned / (values + strength)) @ basis.T * scale
        result = balanced(result)
    return result


def stable(full: Tensor, factors: Sequence[Tensor], *, growth: float) -> Factors:
    """`bounded` at the factors' own error; while the terms still cancel more than `growth`, at 1.5 times the error.

    Some tensors have no best approximation of their rank: ALS comes ever closer with ever larger terms (De Silva and
    Lim, 2008). Then keeping the error keeps the terms, and only giving up some of it bounds them. That is a deviation
    from Phan et al., who state the bound beforehand.
    """
    error = max(cp_error(full, factors), _TINY)
    result = bounded(full, factors, error)
    while cp_growth(full, result) > growth and error < 1:
        error *= 1.5
        result = bounded(full, result, error)
    return result


def _strength(values: Tensor, moments: Tensor, power: float, allowed: float) -> float:
    """The ridge at which the squared error is `allowed`, by bisection of its logarithm: the error grows with it."""
    top = float(values.max().clamp_min(_TINY))
    low, high = top * 1e-15, top * 1e6

    def error(ridge: float) -> float:
        return power - float((moments * (values + 2 * ridge) / (values + ridge).square()).sum())

    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if error(middle) <= allowed else (low, middle)
    return low


def _sensitivity_weights(shape: Sequence[int], factors: Sequence[Tensor], mode: int) -> Tensor:
    """What |column|^2 of one factor costs in sensitivity."""
    a, b = (other for other in range(3) if other != mode)
    norms = [factor.square().sum(0) for factor in factors]
    return shape[a] * norms[b] + shape[b] * norms[a]


def _normal(full: Tensor, factors: Sequence[Tensor], mode: int) -> tuple[Tensor, Tensor]:
    """Left and right side of the normal equations of one factor: (rank, rank) and (size, rank)."""
    a, b = (factors[other] for other in range(3) if other != mode)
    pairs = (a[:, None] * b).flatten(0, 1)  # Khatri-Rao: small beside the tensor, and then one matrix product
    return (a.T @ a) * (b.T @ b), full.movedim(mode, 0).flatten(1) @ pairs


def balanced(factors: Sequence[Tensor]) -> Factors:
    """The same tensor with the norm of each term shared out evenly."""
    norms = [factor.norm(dim=0).clamp_min(1e-150) for factor in factors]
    mean = torch.stack(norms).log().mean(0).exp()
    return [factor / norm * mean for factor, norm in zip(factors, norms, strict=True)]


def cp_error(full: Tensor, factors: Sequence[Tensor]) -> float:
    """Squared error of the sum of the terms, relative to the tensor's own square."""
    made = torch.einsum("ir,jr,kr->ijk", *factors)
    return float((full.double() - made).square().sum() / full.double().square().sum().clamp_min(1e-300))


def cp_growth(full: Tensor, factors: Sequence[Tensor]) -> float:
    """Sum of the squared norms of the terms relative to the tensor's own: far above 1, they cancel (degeneracy)."""
    terms = torch.stack([factor.square().sum(0) for factor in factors]).prod(0).sum()
    return float(terms / full.double().square().sum().clamp_min(1e-300))
