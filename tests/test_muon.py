"""Muon: the closed form of its orthogonalisation, and that it trains and resumes like the others."""

from __future__ import annotations

import pytest
import torch

from edgegen.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (4, 36), (36, 4)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.linspace(0.5, 2, shape[0])[:, None]
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    mixed = u.T @ found @ v.T
    assert torch.allclose(mixed, torch.diag(mixed.diagonal()), atol=1e-3)  # the same singular vectors
    assert mixed.diagonal().min() > 0.3
    assert mixed.diagonal().max() < 1.3
    assert s.max() / s.min() > 1.5  # and the values were not alike before


def test_a_step_of_a_vector_is_adams() -> None:
    start, gradient = torch.tensor([1.0, -2.0]), torch.tensor([0.3, -0.1])
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = [
        (Muon([mine], lr=0.1), mine),
        (torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.98), weight_decay=0), theirs),
    ]
    for optimizer, parameter in pairs:
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_it_fits_a_linear_map_in_fewer_steps_than_its_start() -> None:
    torch.manual_seed(0)
    wanted, inputs = torch.randn(6, 10), torch.randn(64, 10)
    weight = torch.nn.Parameter(torch.zeros(6, 10))
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for _ in range(200):
        loss = (inputs @ weight.T - inputs @ wanted.T).square().mean()
        weight.grad = None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
