"""substitute_conv and commute_upsample: where the new operator can be exact it is, and elsewhere the layer says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_checks import JOB, far, model_of, survive
from torch import nn

from edgegen import graph
from edgegen.nn import cheap_conv
from edgegen.passes._swap import Place
from edgegen.passes.commute_upsample import commute_upsample
from edgegen.passes.substitute_conv import KINDS, _between, _ghost, _grouped, _split, substitute_conv


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _place(layer: nn.Conv2d, size: int = 12) -> Place:
    x = torch.zeros(1, layer.in_channels, size, size)
    return Place("x", layer, tuple(x.shape), tuple(layer(x).shape))


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2, "bias": False}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_a_kernel_of_one_window_an_input_becomes_depthwise_separable_exactly(options: dict[str, Any]) -> None:
    layer, x = nn.Conv2d(6, 8, 3, **options), torch.rand(1, 6, 12, 12)
    assert far(_grouped(_place(layer), 1)(x), layer(x)) > 1e-2  # of any kernel it is not
    layer.weight.copy_(torch.randn(8, 6, 1, 1) * torch.randn(1, 6, 3, 3))
    assert far(_grouped(_place(layer), 1)(x), layer(x)) < 1e-5


@torch.no_grad()
def test_groups_share_as_many_windows_as_they_have_channels() -> None:
    layer, x = nn.Conv2d(6, 8, 3, padding=1), torch.rand(1, 6, 12, 12)
    halves = [torch.einsum("om,mihw->oihw", torch.randn(8, 3), torch.randn(3, 3, 3, 3)) for _ in range(2)]
    layer.weight.copy_(torch.cat(halves, 1))
    block: Any = _grouped(_place(layer), 3)
    assert block[0].groups == 2 and far(block(x), layer(x)) < 1e-5
    assert far(_grouped(_place(layer), 1)(x), layer(x)) > 1e-2
    assert _grouped(_place(layer), 4) == "6 input channels are no multiple of group_size 4"
    few = nn.Conv2d(8, 2, 3)  # fewer outputs than channels of a group
    assert far(_grouped(_place(few), 8)(torch.ones(1, 8, 5, 5)), few(torch.ones(1, 8, 5, 5))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("outputs", [8, 7])
def test_channels_that_are_filtered_others_become_ghosts(outputs: int) -> None:
    layer, x = nn.Conv2d(6, outputs, 3, padding=1), torch.rand(1, 6, 12, 12)
    first = 4
    for ghost in range(outputs - first):  # a multiple of its source: the least of all filters
        layer.weight[first + ghost] = (ghost - 2.5) * layer.weight[ghost]
    block: Any = _ghost(_place(layer), 2)
    assert block.primary.out_channels == first and far(block(x), layer(x)) < 1e-5
    layer.weight.copy_(torch.randn_like(layer.weight))
    block = _ghost(_place(layer), 2)
    assert far(block(x)[:, :first], layer(x)[:, :first]) < 1e-5 < far(block(x), layer(x))


@torch.no_grad()
def test_a_ghosts_kernel_is_found_by_least_squares() -> None:
    source, kernel = torch.randn(5, 3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    wide = F.conv2d(F.pad(source[:, None], [2] * 4), kernel.flip(0, 1)[None, None])[:, 0]  # (5, 5, 5)
    found = _between(source, wide[:, 1:-1, 1:-1], 3)

    def error(k: torch.Tensor) -> float:
        made = F.conv2d(F.pad(source[:, None], [2] * 4), k.flip(0, 1)[None, None])[:, 0]
        return float((made - F.pad(wide[:, 1:-1, 1:-1], [1] * 4)).square().sum())

    assert error(found) <= error(kernel) + 1e-9
    assert all(error(found) <= error(found + 0.01 * torch.randn(3, 3)) for _ in range(20))


@torch.no_grad()
def test_a_cross_becomes_split_windows() -> None:
    """16 channels in branches of 2: identity, 3x3, 1x7 and 7x1 kernels in that order."""
    layer, x = nn.Conv2d(16, 16, 7, padding=3, groups=16), torch.rand(1, 16, 12, 12)
    weight = torch.zeros_like(layer.weight)
    weight[:10, :, 3, 3] = 1
    weight[10:12, :, 2:5, 2:5] = torch.randn(2, 1, 3, 3)
    weight[12:14, :, 3] = torch.randn(2, 1, 7)
    weight[14:, :, :, 3] = torch.randn(2, 1, 7)
    layer.weight.copy_(weight)
    layer.bias[:10] = 0
    block = _split(_place(layer), 0.125, 5)
    assert isinstance(block, cheap_conv.SplitLarge) and far(block(x), layer(x)) < 1e-5
    for other, why in [
        (nn.Conv2d(16, 16, 7, padding=3), "not a depthwise"),
        (nn.Conv2d(16, 16, 3, padding=1, groups=16), "window 3x3"),
        (nn.Conv2d(16, 16, 7, groups=16), "padding"), (nn.Conv2d(4, 4, 7, padding=3, groups=4), "too few"),
    ]:  # fmt: skip
        assert why in str(_split(_place(other), 0.125, 5))


class Net(nn.Module):
    """Dense convolutions, a large depthwise one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
        self.conv, self.large = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 7, padding=3, groups=24)
        self.point, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.down(self.stem(x).relu()).relu()).relu()
        return self.head(self.point(self.large(x)).movedim(1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_survives_and_has_fewer_macs(kind: str, tmp_path: Path) -> None:
    model = model_of(Net(), 3, 16, 16)
    result = substitute_conv(model, JOB, kind=kind)
    expected = {
        "depthwise_separable": {"stem", "down", "conv"}, "groups": {"down", "conv"}, "ghost": {"stem", "conv"},
        "split_large": {"large"},
    }[kind]  # fmt: skip
    assert set(result.changed) == expected and result.needs_recovery
    assert result.notes["macs_after"] < result.notes["macs_before"]
    survive(model, result.model, tmp_path)


def test_what_would_have_more_macs_stays() -> None:
    model = model_of(nn.Sequential(nn.Conv2d(16, 2, 3, padding=1), nn.Conv2d(2, 16, 3, padding=1)), 16, 8, 8)
    result = substitute_conv(model, JOB, kind="groups", group_size=2, layers=["0"])
    # 64 * (16 * 2 * 9 + 16 * 2) and 64 * 16 * 2 * 9
    assert result.skipped["0"] == "would have 20480 MACs instead of 18432"
    assert result.skipped["1"] == "not named in layers" and not result.changed and not result.needs_recovery


# ------------------------------------------------------------------------------------------------- commute_upsample


def _enlarge(mode: str, scale: float = 2.0) -> nn.Upsample:
    return nn.Upsample(scale_factor=scale, mode=mode, align_corners=None if mode.startswith("nearest") else False)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "nearest-exact"])
def test_a_pointwise_convolution_runs_on_the_small_image(mode: str, tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1)
    ends = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 3, 1), nn.Tanh()
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), _enlarge(mode), norm, *ends)
    model = model_of(net, 3, 8, 8)
    result = commute_upsample(model, JOB)
    assert set(result.changed) == {"3", "4"} and not result.needs_recovery
    assert result.skipped["0"].startswith("looks at neighbours")
    x = torch.rand(1, 3, 8, 8)
    assert far(graph.outputs(result.model.stage.module, [x])[0], graph.outputs(net, [x])[0]) < 1e-5
    small, pointwise = 64, 8 * 4 + 4 * 3
    assert result.notes["macs_before"] - result.notes["macs_after"] == (4 - 1) * small * pointwise
    survive(model, result.model, tmp_path)
    assert not commute_upsample(result.model, JOB).changed  # nothing is left to move


def test_activations_commute_with_nearest_only() -> None:
    for mode, moved in (("nearest", {"3"}), ("bilinear", set())):
        net = nn.Sequential(nn.Conv2d(3, 8, 1), _enlarge(mode), nn.ReLU(), nn.Conv2d(8, 4, 1))
        model, x = model_of(net, 3, 8, 8), torch.rand(1, 3, 8, 8)
        result = commute_upsample(model, JOB)
        assert set(result.changed) == moved
        assert far(graph.outputs(result.model.stage.module, [x])[0], graph.outputs(net, [x])[0]) < 1e-5
    assert result.skipped["3"] == "no 1x1 convolution follows" or "comes right before" in result.skipped["3"]


def test_where_the_large_image_is_used_twice_nothing_moves() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enlarge, self.conv = _enlarge("nearest"), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            large = self.enlarge(x)
            return self.conv(large) + large

    result = commute_upsample(model_of(Twice(), 3, 8, 8), JOB)
    assert not result.changed and "changes the output by inf" in result.skipped["conv"]
    shrinks = commute_upsample(model_of(nn.Sequential(_enlarge("nearest", 0.5), nn.Conv2d(3, 3, 1)), 3, 8, 8), JOB)
    assert shrinks.skipped["1"] == "0 does not enlarge"
    padded = commute_upsample(model_of(nn.Sequential(_enlarge("nearest"), nn.Conv2d(3, 3, 1, padding=1)), 3, 8, 8), JOB)
    assert not padded.changed
