"""Scores of channels in closed form; ratios by layer, iterations with recovery, whole heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import networks_for_pruning as networks
import pytest
import torch
from torch import nn

from edgegen import graph
from edgegen.passes import _coupling, _importance
from edgegen.passes.prune_channels import prune_channels
from edgegen.types import Job, Model, PassResult, Stage, Target, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def wrap(module: nn.Module, shape: tuple[int, ...]) -> Model:
    out = graph.outputs(module.eval(), [torch.zeros(shape)])[0]
    stage = Stage("main", module, (TensorSpec("x", shape),), (TensorSpec("y", tuple(out.shape)),))
    return Model("net", "image-to-image", (stage,))


def prune(model: Model, **options: Any) -> PassResult:
    return prune_channels(model, Job(Target("t", "", (), channel_multiple={"int8": 4}), threads=1), **options)


def linear_chain(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))


def scored(module: nn.Module, kind: str, inputs: list[list[torch.Tensor]]) -> torch.Tensor:
    groups = _coupling.find(module, inputs[0], seconds=60)
    (group,) = [group for group in groups if not group.blocked]
    return _importance.scores(module, [group], kind, 0, inputs)[0]


# -------------------------------------------------------------------------------------------------------- closed form


def test_the_effect_on_the_output_is_measured():
    module = linear_chain()
    inputs = [[torch.randn(1, 4)] for _ in range(3)]
    wanted = torch.zeros(6, dtype=torch.float64)
    for (x,) in inputs:
        hidden = module[0](x)[0].detach()
        for unit in range(6):
            wanted[unit] += (module[1].weight[:, unit] * hidden[unit]).detach().double().square().sum()
    torch.testing.assert_close(scored(module, "output_effect", inputs), wanted, rtol=1e-4, atol=1e-9)


def test_taylor_is_the_effect_itself_in_a_linear_network(monkeypatch: pytest.MonkeyPatch):
    module = linear_chain()
    inputs = [[torch.randn(1, 4)] for _ in range(2)]
    monkeypatch.setattr(_importance, "PROJECTIONS", 4000)  # its expectation over random signs
    taylor, effect = scored(module, "taylor", inputs), scored(module, "output_effect", inputs) / 2
    torch.testing.assert_close(taylor, effect, rtol=0.12, atol=1e-4)


def test_taylor_with_one_output_is_activation_times_gradient():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    x = torch.randn(1, 4)
    hidden = torch.relu(module[0](x))[0]
    wanted = (hidden * module[2].weight[0]).detach().double().square()
    torch.testing.assert_close(scored(module, "taylor", [[x]]), wanted, rtol=1e-5, atol=1e-9)


def test_activation_is_the_mean_absolute_value_where_it_is_read():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    inputs = [[torch.randn(1, 3, 8, 8)] for _ in range(2)]
    wanted = torch.stack([torch.relu(module[0](x)).detach().double().mean((0, 2, 3)) for (x,) in inputs]).mean(0)
    torch.testing.assert_close(scored(module, "activation", inputs), wanted, rtol=1e-5, atol=1e-9)


def test_fpgm_takes_what_the_others_can_make_up_for():
    module = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    with torch.no_grad():  # three large filters next to each other, and a small one far from them
        module[0].weight.copy_(torch.tensor([[9.0, 9.0], [9.1, 9.0], [9.0, 9.1], [0.1, -0.1]]))
    score = scored(module, "fpgm", [[torch.zeros(1, 2)]])
    assert score.argmax() == 3 and score.argmin() == 0
    assert scored(module, "l2", [[torch.zeros(1, 2)]]).argmin() == 3
    assert score[0] == pytest.approx(0.1 + 0.1 + (8.9**2 + 9.1**2) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("kind", ["activation", "taylor", "output_effect"])
def test_a_channel_that_is_never_on_goes_first(kind: str):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
    with torch.no_grad():
        module[0].weight[[1, 4, 5, 6]] *= 5  # large filters, yet
        module[0].bias[[1, 4, 5, 6]] = -1e4  # ReLU never opens
    x = torch.randn(1, 3, 8, 8)
    result = prune(wrap(module, (1, 3, 8, 8)), ratio=0.5, importance=kind, min_width=1)
    after = result.model.stage.module
    assert after[0].out_channels == 4
    torch.testing.assert_close(graph.outputs(after, [x])[0], graph.outputs(module, [x])[0], rtol=1e-4, atol=1e-5)
    wrong = prune(wrap(module, (1, 3, 8, 8)), ratio=0.5, importance="l2", min_width=1).model.stage.module
    assert not torch.allclose(graph.outputs(wrong, [x])[0], graph.outputs(module, [x])[0], atol=1e-3)


@pytest.mark.parametrize("kind", [k for k in _importance.IMPORTANCE if k not in ("l1", "l2", "group", "random")])
@pytest.mark.parametrize("name", ["Upscaler", "Mixed", "Dcgan", "TorchAttention"])
def test_every_score_on_hard_networks(kind: str, name: str):
    model = wrap(networks.make(name), networks.SHAPES[name])
    result = prune(model, ratio=0.5, importance=kind, samples=1)
    assert result.changed and "safely" not in str(result.skipped)
    x = torch.randn(networks.SHAPES[name])
    assert torch.isfinite(graph.outputs(result.model.stage.module, [x])[0]).all()
    again = prune(model, ratio=0.5, importance=kind, samples=1)
    assert again.changed == result.changed
    states = [r.model.stage.module.state_dict() for r in (result, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_network_for_one_sample_at_a_time_is_measured_all_the_same():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)).reshape(1, 3)

    torch.manual_seed(0)
    single, chain = Single(), linear_chain()
    single.a.load_state_dict(chain[0].state_dict())
    single.b.load_state_dict(chain[1].state_dict())
    inputs = [[torch.randn(1, 4)]]
    torch.testing.assert_close(scored(single, "output_effect", inputs), scored(chain, "output_effect", inputs))


# ----------------------------------------------------------------------------------------------- ratios and schedules


def three_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 3)).eval()


def widths(result: PassResult) -> tuple[int, int]:
    net = result.model.stage.module
    return net[0].out_channels, net[2].out_channels


def test_ratios_by_layer():
    model = wrap(three_layers(), (1, 3, 12, 12))
    assert widths(prune(model, ratio=0.25, ratios={"2": 0.75})) == (24, 8)
    assert widths(prune(model, ratio=0.0, ratios={"0": 0.5})) == (16, 32)
    assert widths(prune(model, ratio=0.5, ratios={"0": 0.0}, scope="global")) == (32, 16)


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_iterations_end_at_the_same_width(iterations: int):
    model = wrap(three_layers(), (1, 3, 12, 12))
    assert widths(prune(model, ratio=0.5, iterations=iterations)) == (16, 16)
    assert prune(model, ratio=0.5, iterations=iterations).notes["groups_pruned"] == 2


def test_later_iterations_see_what_is_left(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    original = _importance.scores

    def spy(module: nn.Module, *args: Any) -> Any:
        seen.append(module[0].out_channels)
        return original(module, *args)

    monkeypatch.setattr(_importance, "scores", spy)
    prune(wrap(three_layers(), (1, 3, 12, 12)), ratio=0.5, iterations=4)
    assert seen == [32, 28, 24, 20]


def test_recovery_between_iterations_trains_and_the_teacher_stays(tmp_path: Path):
    model = wrap(three_layers(), (1, 3, 12, 12))
    before = {name: value.clone() for name, value in model.stage.module.state_dict().items()}
    job = Job(Target("t", "", (), channel_multiple={"int8": 4}), threads=1, checkpoints=tmp_path)
    options: dict[str, Any] = {"ratio": 0.5, "iterations": 2}
    plain = prune_channels(model, job, **options)
    trained = prune_channels(model, job, **options, recover_steps=3)
    again = prune_channels(model, dataclasses.replace(job, checkpoints=None), **options, recover_steps=3)
    assert widths(plain) == widths(trained) == (16, 16)
    a, b, c = (r.model.stage.module[4].bias for r in (plain, trained, again))
    assert not torch.equal(a, b) and torch.equal(b, c)
    assert all(torch.equal(value, before[name]) for name, value in model.stage.module.state_dict().items())


def test_recovery_needs_something_to_stand_between():
    with pytest.raises(ValueError, match="at least 2, got 3 with iterations 1"):
        prune(wrap(three_layers(), (1, 3, 12, 12)), recover_steps=3)


def test_global_scope_compares_effects_as_they_are():
    module = three_layers()
    with torch.no_grad():
        module[2].weight[:16] = 0
        module[2].bias[:16] = 0
    result = prune(wrap(module, (1, 3, 12, 12)), ratio=0.25, scope="global", importance="output_effect", samples=1)
    assert widths(result) == (32, 16)


@pytest.mark.parametrize("iterations", [1, 3, 4, 8])
def test_global_scope_removes_the_share_that_was_asked_for_in_any_number_of_iterations(iterations: int):
    module = three_layers()
    with torch.no_grad():  # the lowest scores lie in one layer, so the others keep more than their own share
        module[2].weight *= torch.linspace(0.01, 1.0, 32)[:, None, None, None] ** 4
    result = prune(wrap(module, (1, 3, 12, 12)), ratio=0.5, scope="global", iterations=iterations, min_width=1,
                   round_to=1)  # fmt: skip
    first, second = widths(result)
    assert first + second == 32
    assert first > second


class Asked(nn.Module):
    """Attention by three layers, as diffusers has it."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = (part(x) for part in (self.to_q, self.to_k, self.to_v))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in made)
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_of_an_unknown_kind_stay_and_it_says_so():
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), Asked(), nn.Linear(16, 16)).eval()
    result = prune(wrap(net, (1, 5, 16)), ratio=0.5, heads=True)
    told = "heads: those of 3 are not known here; leave out heads"
    assert [result.skipped[f"3.{name}"] for name in ("to_q", "to_k", "to_v")] == [told] * 3
    assert result.model.stage.module[0].out_features == 16, "other layers are pruned as ever"
    torch_own = wrap(networks.make("TorchAttention"), networks.SHAPES["TorchAttention"])
    result = prune(torch_own, ratio=0.5, heads=True)
    assert result.model.stage.module.attn.num_heads == 4 and "fc1" in result.changed
    assert result.skipped["embed"] == "heads: those of attn are not known here; leave out heads"
