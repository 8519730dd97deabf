"""Dilations for each axis and channel: a kernel that is dilated already is found again exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgegen import architecture, graph
from edgegen.nn.dilated import Dilated
from edgegen.passes.dilate import dilate
from edgegen.types import Job, Model, Stage, Target, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")
JOB = Job(Target("testbed", "", ()), threads=1)
PATTERNS = [(1, 1), (2, 1), (1, 2), (2, 2), (2, 1), (1, 1)]


def _large(pad: int = 2, stride: int = 1, mode: str = "zeros") -> nn.Conv2d:
    """A 5x5 convolution whose output channels use the taps of one dilation each."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, len(PATTERNS), 5, stride=stride, padding=pad, padding_mode=mode)
    mask = torch.zeros_like(layer.weight)
    for channel, (down, across) in enumerate(PATTERNS):
        mask[channel, :, 2 - down : 3 + down : down, 2 - across : 3 + across : across] = 1
    layer.weight.data *= mask
    return layer


def _model(*layers: nn.Module) -> Model:
    module = nn.Sequential(*layers).eval()
    spec = TensorSpec("input", (1, 3, 16, 16), value_range=(0.0, 1.0))
    return Model("net", "image-to-image", (Stage("main", module, (spec,), (spec,)),))


@pytest.mark.parametrize(("pad", "stride", "mode"), [(2, 1, "zeros"), (0, 1, "zeros"), (1, 2, "zeros"),
                                                     (2, 1, "reflect"), (3, 1, "zeros")])  # fmt: skip
def test_a_dilated_kernel_is_found_again_exactly(pad: int, stride: int, mode: str) -> None:
    model = _model(_large(pad, stride, mode))
    result = dilate(model, JOB, samples=2)
    block = result.model.stage.module[0]
    groups = {(down, across): own for down, across, own in block.config["groups"]}
    assert groups == {(1, 1): [0, 5], (2, 1): [1, 4], (1, 2): [2], (2, 2): [3]}
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(block(image), model.stage.module(image), rtol=1e-4, atol=1e-5)
    assert result.notes["macs_after"] * 25 == result.notes["macs_before"] * 9
    assert result.needs_recovery


def test_the_comparison_sees_a_wrong_dilation() -> None:
    model = _model(_large())
    one = dilate(model, JOB, samples=2, patterns=1).model.stage.module[0]
    assert len(one.config["groups"]) == 1
    image = torch.rand(1, 3, 16, 16)
    assert not torch.allclose(one(image), model.stage.module(image), rtol=1e-4, atol=1e-5)


def test_a_dense_kernel_is_scaled_to_fit() -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 4, 7, padding=3)
    layer.weight.data.fill_(0.01)
    result = dilate(_model(layer), JOB, samples=4)
    found = result.model.stage.module[0].parts[0].weight
    assert float(found.detach()[0, 0, 0, 0]) > 0.03, "nine taps stand for forty-nine"
    assert result.changed["0"].startswith("7x7 -> 3x3: ")


def test_what_does_not_fit_stays_and_says_why() -> None:
    model = _model(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2, groups=2), nn.Conv2d(4, 4, 6),
                   nn.Conv2d(4, 3, 5, padding=2, dilation=2))  # fmt: skip
    result = dilate(model, JOB, samples=1)
    assert result.changed == {}
    assert result.skipped == {
        "0": "window 3x3 is below min_window 5", "1": "grouped convolution", "2": "an even window, or padding by name",
        "3": "has a dilation already",
    }  # fmt: skip


def test_the_block_is_made_again_from_its_description() -> None:
    model = _model(_large(), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))
    small = dilate(model, JOB, samples=1).model.stage.module
    fresh = nn.Sequential(_large(), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)).eval()
    again = architecture.rebuild(fresh, architecture.describe(small, model.stage.module))
    again.load_state_dict(small.state_dict())
    image = graph.example_inputs(model.stage)
    assert torch.equal(again(*image), small(*image))
    with pytest.raises(ValueError, match="each output channel must stand in one group"):
        Dilated(3, [[1, 1, [0, 0]]], 3, (1, 1), (0, 0), True, "zeros")
