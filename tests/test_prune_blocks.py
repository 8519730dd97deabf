"""prune_blocks: what counts as a block, which one goes first, and that the rest computes what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgegen import architecture, graph
from edgegen.passes.prune_blocks import prune_blocks, removable
from edgegen.types import Job, Model, Preprocessing, Stage, Target, TensorSpec

JOB = Job(target=Target("here", "", ("onnxruntime",)))


class Residual(nn.Module):
    """x + strength * (two convolutions)."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.strength * self.body(x)


class Timed(Residual):
    """A block that is told the time too, as in a denoiser."""

    def forward(self, x: torch.Tensor, time: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * time * self.body(x)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Timed(1.0), Timed(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, torch.ones(1), scale=0.1), torch.ones(1), scale=1.0)


class Stages(nn.Module):
    """A stage of three blocks (a module of its own class) and a fourth block behind it."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual(1.0), Residual(0.01), Residual(0.1)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage, self.last, self.head = nn.Conv2d(3, 4, 1), self.Part(), Residual(0.5), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.stage(self.stem(x))))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    spec = TensorSpec("input", (1, 3, 8, 8), value_range=(0.0, 1.0))
    out = TensorSpec("output", (1, 3, 8, 8), value_range=(0.0, 1.0))
    stage = Stage("stages", Stages().eval(), (spec,), (out,))
    return Model("stages", "restoration", (stage,), Preprocessing())


def test_blocks_are_found_inside_a_stage(model: Model) -> None:
    found = removable(model.stage.module, graph.example_inputs(model.stage))
    assert found == ["stage.blocks.0", "stage.blocks.1", "stage.blocks.2", "last"]


def test_the_block_that_matters_least_goes_first(model: Model) -> None:
    before = {name: value.clone() for name, value in model.stage.module.state_dict().items()}
    result = prune_blocks(model, JOB, ratio=0.5)
    assert result.notes["removed"] == "stage.blocks.1, stage.blocks.2"
    assert set(result.changed) == {f"stage.blocks.{i}.body.{j}" for i in (1, 2) for j in (0, 2)}
    assert result.skipped["stem"] == "is in no block that can be removed"
    assert "removing block last would make" in result.skipped["last.body.0"]
    assert result.needs_recovery
    assert all(torch.equal(value, model.stage.module.state_dict()[name]) for name, value in before.items())


def test_the_rest_computes_what_the_network_without_the_block_computes(model: Model) -> None:
    result = prune_blocks(model, JOB, blocks=["last"])
    x = graph.example_inputs(model.stage)[0]
    whole = model.stage.module
    with torch.no_grad():
        expected = whole.head(whole.stage(whole.stem(x)))
    assert torch.equal(graph.outputs(result.model.stage.module, [x])[0], expected)
    lost = sum(p.numel() for p in whole.last.parameters())
    assert result.notes["params_before"] - result.notes["params_after"] == lost


def test_the_result_can_be_described_and_rebuilt(model: Model) -> None:
    result = prune_blocks(model, JOB, ratio=0.25)
    told = architecture.describe(result.model.stage.module, model.stage.module)
    again = architecture.rebuild(Stages(), told)
    assert set(again.state_dict()) == set(result.model.stage.module.state_dict())


def test_a_ratio_below_one_block_removes_none(model: Model) -> None:
    result = prune_blocks(model, JOB, ratio=0.2)
    assert not result.changed
    assert not result.needs_recovery


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"samples": 0}, "samples be at least 1"),
        ({"blocks": ["stage.blocks.9"]}, "no removable block 'stage.blocks.9'.*did you mean 'stage.blocks"),
        ({"skip": ["head"]}, "no removable block 'head'"),
    ],
)
def test_wrong_options_are_one_clear_line(model: Model, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        prune_blocks(model, JOB, **options)


def test_a_block_that_is_told_more_than_its_input_can_go(model: Model) -> None:
    denoiser = Denoiser().eval()
    stage = Stage("d", denoiser, (TensorSpec("input", (1, 4, 8, 8)),), (TensorSpec("output", (1, 4, 8, 8)),))
    result = prune_blocks(Model("d", "restoration", (stage,)), JOB, ratio=0.5)
    assert result.notes["removed"] == "first"
    x = torch.rand(1, 4, 8, 8)
    with torch.no_grad():
        expected = denoiser.second(x, torch.ones(1))
    again = architecture.rebuild(Denoiser(), architecture.describe(result.model.stage.module, denoiser)).eval()
    again.load_state_dict(result.model.stage.module.state_dict())
    assert torch.equal(graph.outputs(again, [x])[0], expected)


def test_a_block_that_the_network_looks_into_stays_and_says_so() -> None:
    class Looked(nn.Module):
        """As DiT: the last layer uses what lies in the first block."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Pair() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for block in self.blocks:
                y = block(y)
            return self.blocks[0].one(y)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.two(self.one(x))

    torch.manual_seed(0)
    spec = TensorSpec("x", (1, 4, 8, 8))
    model = Model("net", "image-to-image", (Stage("s", Looked().eval(), (spec,), (spec,)),))
    result = prune_blocks(model, Job(Target("t", "", ())), ratio=0.99)
    assert "blocks.1.one" in result.changed and "blocks.2.one" in result.changed
    assert "has to stay" in result.skipped["blocks.0.one"]
    with pytest.raises(ValueError, match="has to stay"):
        prune_blocks(model, Job(Target("t", "", ())), blocks=["blocks.0"])


def test_a_replacement_learns_alone_what_the_block_gave(model: Model) -> None:
    options: dict[str, Any] = {"blocks": ["last", "stage.blocks.0"], "samples": 2}
    away = prune_blocks(model, JOB, **options)
    start = prune_blocks(model, JOB, replace_by="conv", steps=0, **options)
    x = torch.rand(2, 3, 8, 8)
    wanted, without, begun = (
        graph.outputs(net, [x])[0] for net in (model.stage.module, *(r.model.stage.module for r in (away, start)))
    )
    assert torch.equal(without, begun), "it starts as the identity"
    result = prune_blocks(model, JOB, replace_by="conv", steps=60, batch=4, lr=1e-2, **options)
    assert result.notes["replaced"] == "stage.blocks.0, last"
    assert all(after < before for before, after in result.notes["errors"].values())
    module = result.model.stage.module
    taught = graph.outputs(module, [x])[0]
    assert (taught - wanted).square().sum() < (without - wanted).square().sum()
    assert away.notes["macs_after"] < result.notes["macs_after"] < result.notes["macs_before"]
    fresh = architecture.rebuild(Stages(), architecture.describe(module, model.stage.module))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(graph.outputs(fresh.eval(), [x])[0], taught)


def test_a_replacement_that_training_makes_worse_is_the_identity(model: Model) -> None:
    options: dict[str, Any] = {"blocks": ["last"], "samples": 2, "replace_by": "conv"}
    worse = prune_blocks(model, JOB, steps=3, batch=2, lr=100.0, **options)
    ((before, after),) = worse.notes["errors"].values()
    assert before == after
    assert not worse.model.stage.module.last.pointwise.weight.any()


def test_bad_replacements_are_named(model: Model) -> None:
    with pytest.raises(ValueError, match="replace_by must be one of identity, conv, got 'attention'"):
        prune_blocks(model, JOB, replace_by="attention")
    with pytest.raises(ValueError, match="batch at least 1 and kernel odd, got 200, 8, 4"):
        prune_blocks(model, JOB, replace_by="conv", kernel=4)
