"""The factors of the learning rate of a compact network, from depth, kernels and width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgegen.training import scaling


class Residual(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).relu()
        return x


def chain(layers: int, width: int = 4) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width if i else 4, width if i + 1 < layers else 4) for i in range(layers)))


X = (torch.ones(1, 4),)


@pytest.mark.parametrize(("module", "cubes"), [
    (chain(1), 1), (chain(3), 27), (Residual(1), 1.0),  # (0 + 1) / 2 is below the least, one layer
    (Residual(2), (0 + 1 + 1 + 8) / 4), (Residual(3), (0 + 3 * 1 + 3 * 8 + 27) / 8),
])  # fmt: skip
def test_depth_is_the_mean_cube_of_the_layers_on_a_path(module: nn.Module, cubes: float) -> None:
    assert scaling._depth(module, X) == pytest.approx(cubes)


def test_fewer_layers_raise_the_rate_by_three_halves_powers() -> None:
    found = scaling.rates(chain(2), chain(4), X, "sgd")
    assert set(found) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(value == pytest.approx(2**1.5) for value in found.values())
    assert all(value == pytest.approx(2**-1.5) for value in scaling.rates(chain(4), chain(2), X, "sgd").values())


def test_fewer_inputs_raise_the_rate_of_a_matrix_with_adam() -> None:
    small, large = chain(3, width=4), chain(3, width=8)
    found = scaling.rates(small, large, X, "adamw")
    assert found == pytest.approx(dict.fromkeys(found, 1.0) | {"1.weight": 2.0, "2.weight": 2.0})
    assert scaling.rates(small, large, X, "muon") == found
    assert set(scaling.rates(small, large, X, "sgd").values()) == {1.0}


def test_kernels_and_transposed_convolutions() -> None:
    x = (torch.ones(1, 2, 9, 9),)

    def net(kernel: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, width, kernel), nn.ConvTranspose2d(width, 5, 3))

    found = scaling.rates(net(3, 4), net(5, 8), x, "adam")
    assert found == pytest.approx({"0.weight": 5 / 3, "0.bias": 1.0, "1.weight": 2.0, "1.bias": 1.0})


def test_factors_stay_within_the_limit() -> None:
    assert set(scaling.rates(chain(1), chain(6), X, "sgd").values()) == {scaling.LIMIT}


def test_the_networks_are_left_as_they_were() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert set(scaling.rates(module, module, (torch.rand(2, 3, 4, 4),), "adam").values()) == {1.0}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_networks_without_a_path_are_named() -> None:
    with pytest.raises(ValueError, match="scale_lr follows paths from inputs of real numbers"):
        scaling.rates(chain(1), chain(2), (X[0].int(),), "sgd")
