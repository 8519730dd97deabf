"""MACs against closed forms, copies, example inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen import graph
from edgegen.types import Model, Preprocessing, Stage, TensorSpec


class Attend(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(5, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.w)


@pytest.mark.parametrize(
    ("module", "shape", "macs", "params"),
    [
        pytest.param(nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 5, 5), 2 * 25 * 8 * 2 * 9, 152, id="grouped"),
        pytest.param(nn.Conv2d(4, 4, 3, 2, groups=4), (1, 4, 7, 7), 9 * 4 * 9, 40, id="depthwise stride 2"),
        pytest.param(nn.ConvTranspose2d(4, 6, 4, 2, 1), (1, 4, 5, 5), 25 * 4 * 6 * 16, 390, id="transposed"),
        pytest.param(nn.Linear(3, 7), (2, 5, 3), 10 * 21, 28, id="linear on tokens"),
        pytest.param(Attend(), (1, 2, 9, 16), 2 * 2 * 9 * 9 * 16, 0, id="attention"),
        pytest.param(Functional(), (1, 3, 4, 4), 16 * 15, 15, id="functional"),
        pytest.param(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (1, 3, 4, 4), 0, 6, id="norms are free"),
    ],
)
def test_macs_have_their_closed_form(module: nn.Module, shape: tuple[int, ...], macs: int, params: int):
    cost = graph.cost(module, [torch.randn(shape)])
    assert (cost.macs, cost.params) == (macs, params)
    if graph.layers(module):
        assert cost.layers == {"": macs}


def test_a_layer_used_twice_costs_twice_and_counts_once():
    layer = nn.Conv2d(3, 3, 1)
    cost = graph.cost(nn.Sequential(layer, layer), [torch.randn(1, 3, 4, 4)])
    assert (cost.macs, cost.params, cost.layers) == (2 * 16 * 9, 12, {"0": 2 * 16 * 9})


def test_counting_leaves_no_trace(conv_chain: Model):
    module = conv_chain.stage.module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    graph.cost(module, graph.example_inputs(conv_chain.stage))
    assert module.training
    assert not any(part._forward_hooks for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_clone_shares_nothing_and_takes_cached_tensors_along():
    module = nn.Linear(2, 2)
    module.cache = {"cpu": module.weight * 2}  # has a gradient history: copy.deepcopy alone refuses it
    copy = graph.clone(module)
    assert torch.equal(copy.cache["cpu"], module.cache["cpu"])
    with torch.no_grad():
        module.weight.zero_()
        module.cache["cpu"].detach().zero_()
    assert copy.weight.abs().sum() > 0
    assert copy.cache["cpu"].abs().sum() > 0


def test_example_inputs_keep_their_contract():
    specs = (
        TensorSpec("image", (1, 3, "H", "W"), value_range=(0.0, 255.0)),
        TensorSpec("label", (1,), "int64", value_range=(0, 9)),
        TensorSpec("z", (1, 512)),
    )
    stage = Stage("s", nn.Identity(), specs, ())
    image, label, z = graph.example_inputs(stage, seed=3, batch=4)
    assert image.shape == (4, 3, 64, 64)
    assert 0 <= image.min() < 30 < 225 < image.max() <= 255
    assert label.shape == (4,)
    assert label.dtype == torch.int64
    assert 0 <= label.min() <= label.max() <= 9
    assert abs(z.std() - 1) < 0.1
    assert all(torch.equal(a, b) for a, b in zip((image, label, z), graph.example_inputs(stage, seed=3, batch=4)))
    centred = Preprocessing((0, 255), (127.5,) * 3, (127.5,) * 3)
    scaled = graph.example_inputs(stage, seed=3, batch=4, preprocessing=centred)
    assert -1 <= scaled[0].min() < scaled[0].max() <= 1
