"""prune_weights: as many zeros as asked for, the largest weights stay, and what it says of the target."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from swap_checks import JOB, TARGET, model_of, survive
from torch import nn

from edgegen import graph, targets
from edgegen.passes.prune_weights import prune_weights
from edgegen.types import Model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 8, 1))
    return model_of(net, 3, 8, 8)


def _zeros(module: nn.Module) -> dict[str, float]:
    return {name: float((layer.weight == 0).double().mean()) for name, layer in graph.layers(module).items()}


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_each_layer_has_its_zeros_and_its_largest_weights(sparsity: float, model: Model, tmp_path: Path) -> None:
    result = prune_weights(model, JOB, sparsity=sparsity)
    for name, zeros in _zeros(result.model.stage.module).items():
        old, new = model.stage.module.get_submodule(name).weight, result.model.stage.module.get_submodule(name).weight
        assert zeros == pytest.approx(sparsity, abs=0.5 / old.numel())
        assert torch.equal(new[new != 0], old[new != 0])
        assert old[new == 0].abs().max() <= new[new != 0].abs().min()
    assert result.needs_recovery and result.notes["sparsity"] == pytest.approx(sparsity, abs=0.01)
    assert result.notes["compressed_after_bytes"] < result.notes["compressed_before_bytes"]
    assert result.notes["macs_after"] == result.notes["macs_before"]
    survive(model, result.model, tmp_path)


def test_globally_the_smallest_anywhere_go(model: Model) -> None:
    model.stage.module[3].weight.data *= 100
    result = prune_weights(model, JOB, sparsity=0.5, scope="global")
    zeros = _zeros(result.model.stage.module)
    assert zeros["3"] < 0.1 and zeros["2"] > 0.5
    assert result.notes["sparsity"] == pytest.approx(0.5, abs=0.01)
    nothing = prune_weights(model, JOB, sparsity=0.0)
    assert not nothing.changed and nothing.skipped["0"] == "no weight of it is among the smallest"


def test_two_of_every_four_inputs_stay(model: Model, tmp_path: Path) -> None:
    result = prune_weights(model, JOB, pattern="2:4")
    new, old = result.model.stage.module, model.stage.module
    assert result.skipped == {"0": "3 inputs are no multiple of 4", "3": "6 inputs are no multiple of 4"}
    weight, dense = (net[2].weight.movedim(0, -1).reshape(-1, 4) for net in (new, old))  # transposed: inputs first
    assert bool(((weight != 0).sum(1) == 2).all())
    assert torch.allclose(weight.abs().sum(1), dense.abs().sort(1).values[:, 2:].sum(1))
    survive(model, result.model, tmp_path)
    linear = model_of(nn.Sequential(nn.Linear(8, 4)), 8)
    kept = prune_weights(linear, JOB, pattern="1:4").model.stage.module[0].weight.reshape(-1, 4)
    assert bool(((kept != 0).sum(1) == 1).all())


def test_only_a_target_that_skips_zeros_gains_speed(model: Model) -> None:
    sparse = dataclasses.replace(JOB, target=dataclasses.replace(TARGET, techniques={"latency": ("2:4-sparsity",)}))
    gain = prune_weights(model, sparse, pattern="2:4").notes["gain"]
    assert gain == "testbed runs 2:4 sparsity faster; to be measured"
    orin = dataclasses.replace(JOB, target=targets.load("jetson-orin-nano"))
    tried = prune_weights(model, orin, pattern="2:4").notes["gain"]
    assert tried == "TensorRT tries sparse kernels on jetson-orin-nano and keeps what is faster; to be measured"
    for name, pattern in (("jetson-xavier-nx", "2:4"), ("jetson-orin-nano", "1:4"), ("cpu", "2:4")):
        job = dataclasses.replace(JOB, target=targets.load(name))
        told = prune_weights(model, job, pattern=pattern).notes["gain"]
        assert told == f"size after compression only: no runtime on this target uses {pattern} sparsity"
    for job, pattern in ((sparse, ""), (JOB, "2:4")):
        assert prune_weights(model, job, pattern=pattern).notes["gain"].startswith("size after compression only")
