"""Least-squares reconstruction: exact where what was removed can be made up for, and better than before where not."""

import dataclasses

import pytest
import torch
from conftest import make_tiny
from torch import nn

from edgegen import graph, targets
from edgegen.passes import _lessons
from edgegen.passes.factorize_svd import factorize_svd
from edgegen.passes.prune_channels import prune_channels
from edgegen.passes.reconstruct import reconstruct
from edgegen.types import Job, Model, Stage, TensorSpec


def model_of(module):
    image = TensorSpec("input", (1, 3, 12, 12), value_range=(0.0, 1.0))
    output = TensorSpec("output", (1, 3, 12, 12), value_range=(0.0, 1.0))
    return Model("m", "image-to-image", (Stage("main", module.eval(), (image,), (output,)),))


def job_for(teacher):
    return Job(target=targets.load("cpu"), teacher=teacher, threads=1)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_removed_channel_that_was_a_copy_of_another_is_made_up_for_exactly(mode):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1, padding_mode=mode)
    with torch.no_grad():  # channels 4..7 copy 0..3, so that four of the eight carry everything
        first.weight[4:], first.bias[4:] = first.weight[:4], first.bias[:4]
    teacher = nn.Sequential(first, nn.ReLU(), second)
    small = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode))
    with torch.no_grad():
        small[0].weight.copy_(first.weight[:4])
        small[0].bias.copy_(first.bias[:4])
        small[2].weight.copy_(second.weight[:, :4])
        small[2].bias.copy_(second.bias)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    result = reconstruct(model_of(small), job_for(model_of(teacher)), samples=8, ridge=1e-9)
    (x,) = _lessons.made_up(model_of(small), 4, 77)[0](0)["input"]  # of the kind it was solved on, but others
    solved = result.model.stage.module
    assert (small(x) - teacher(x)).abs().max() > 1e-2, "the test is about something that needs mending"
    assert torch.allclose(solved(x), teacher(x), atol=1e-3, rtol=0)
    assert list(result.changed) == ["2"]
    assert result.skipped["0"] == "has fewer outputs than its teacher"
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items()), "the input model was modified"


@pytest.mark.parametrize("name", ["residual", "conv_chain", "depthwise_generator"])
def test_after_pruning_the_output_comes_closer_to_the_teacher_and_twice_is_the_same(name):
    teacher = make_tiny(name)
    job = job_for(teacher)
    pruned = prune_channels(teacher, job, ratio=0.5, round_to=4).model
    first, again = (reconstruct(pruned, job, samples=24) for _ in range(2))
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    wanted, before, after = (m.stage.module(x) for m in (teacher, pruned, first.model))
    if first.changed:
        assert (after - wanted).square().mean() < (before - wanted).square().mean()
    assert first.changed or first.skipped
    states = first.model.stage.module.state_dict(), again.model.stage.module.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_layers_that_the_teacher_has_not_are_skipped():
    teacher = make_tiny("conv_chain")
    factorised = factorize_svd(teacher, job_for(teacher), ratio=0.5).model
    parts = graph.layers(factorised.stage.module).keys() - graph.layers(teacher.stage.module).keys()
    assert parts, "nothing was factorised"
    result = reconstruct(factorised, job_for(teacher), samples=4)
    assert parts == {name for name, why in result.skipped.items() if why == "its teacher has no such layer"}


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("positions", 0), ("ridge", 0.0)])
def test_options_out_of_range_are_refused(option, value):
    teacher = make_tiny("residual")
    with pytest.raises(ValueError, match="must be positive"):
        reconstruct(teacher, job_for(teacher), **{option: value})


def test_without_a_teacher_it_says_what_it_follows():
    model = make_tiny("residual")
    with pytest.raises(ValueError, match="follows prune_channels"):
        reconstruct(model, dataclasses.replace(job_for(model), teacher=None))
