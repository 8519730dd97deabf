"""factorize_svd, factorize_tucker, factorize_cp: exact where they must be, and the error that theory says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from swap_checks import JOB, far, model_of, survive
from torch import nn

from edgegen import graph
from edgegen.passes import _decompose, _ranks, _swap
from edgegen.passes.factorize_cp import factorize_cp, terms
from edgegen.passes.factorize_svd import _crossed, _menu, factorize_svd, two
from edgegen.passes.factorize_tucker import factorize_tucker, three
from edgegen.types import Measurement, Model, Stage

CONVS = [
    pytest.param({"kernel_size": 3, "padding": 1}, id="plain"),
    pytest.param({"kernel_size": 3, "padding": 1, "bias": False}, id="no-bias"),
    pytest.param({"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1)}, id="oblong"),
    pytest.param({"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"}, id="reflect"),
    pytest.param({"kernel_size": 3, "padding": "same"}, id="same"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 8, **options).eval()


def _place(layer: nn.Module, *shape: int) -> _swap.Place:
    x = torch.zeros(1, *shape)
    return _swap.Place("x", layer, tuple(x.shape), tuple(layer(x).shape))


@torch.no_grad()
@pytest.mark.parametrize("options", CONVS)
def test_full_rank_is_exact(options: dict[str, Any]) -> None:
    layer, x = _conv(**options), torch.rand(2, 6, 11, 12)
    zero = torch.zeros(8, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    _, _, high, wide = layer.weight.shape
    matrix = layer.weight.double().permute(1, 2, 0, 3).reshape(6 * high, 8 * wide)
    blocks = {
        "svd": two(layer, basis, zero),
        "spatial": _crossed(layer, *torch.linalg.svd(matrix, full_matrices=False)),
        "tucker": three(layer, *_decompose.tucker2(layer.weight, (8, 6))),
    }
    for name, block in blocks.items():
        assert far(block(x), layer(x)) < 1e-5, name
    factors = torch.randn(4, 3, high, wide), torch.randn(8, 4), torch.randn(6, 3)
    layer.weight.copy_(torch.einsum("abhw,oa,ib->oihw", *factors))  # now of ranks 4 and 3
    made = three(layer, *_decompose.tucker2(layer.weight, (4, 3)))
    assert len(made) == 3 and far(made(x), layer(x)) < 1e-5


@torch.no_grad()
def test_the_error_of_svd_is_the_tail_of_the_singular_values() -> None:
    layer = nn.Linear(12, 10)
    values = torch.linalg.svdvals(layer.weight.double())
    for rank, choice in zip((1, 2, 3, 4), _menu(_place(layer, 12), 1, None, "channel").choices, strict=False):
        block: Any = choice.make()
        made = block[1].weight.double() @ block[0].weight.double()
        tail = float(values[rank:].square().sum())
        assert float((made - layer.weight).square().sum()) == pytest.approx(tail, rel=1e-5)
        assert choice.kept() == pytest.approx(1 - tail / float(values.square().sum()), rel=1e-5)


@torch.no_grad()
def test_fitted_to_outputs_it_is_exact_on_inputs_of_that_rank() -> None:
    """W has rank 16, but the inputs (of which the samples are some) lie in a plane with an offset."""
    plane, offset = torch.randn(2, 16), torch.randn(16)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.layer = nn.Linear(2, 16), nn.Linear(16, 16)
            self.into.weight.copy_(plane.T)
            self.into.bias.copy_(offset)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.into(x.movedim(1, -1)))

    model = model_of(Net(), 2, 8, 8)
    x = torch.rand(1, 2, 8, 8)
    error = {}
    for fit in ("outputs", "weights"):
        result = factorize_svd(model, JOB, ratio=0.75, fit=fit, layers=["layer"])
        assert result.changed["layer"].startswith("rank 4 of 16")
        error[fit] = far(result.model.stage.module(x), model.stage.module(x))
    assert error["outputs"] < 0.02 < 0.1 < error["weights"]


@torch.no_grad()
def test_tucker_iteration_is_never_worse_than_hosvd_and_finds_an_exact_kernel() -> None:
    noisy = torch.randn(10, 9, 3, 3)
    errors = []
    for sweeps in (0, 1, 4):
        core, left, right = _decompose.tucker2(noisy, (4, 3), sweeps)
        made = torch.einsum("abhw,oa,ib->oihw", core, left, right)
        errors.append(float((made - noisy).square().sum()))
    assert errors[0] >= errors[1] >= errors[2]
    low = torch.einsum("abhw,oa,ib->oihw", torch.randn(4, 3, 3, 3), torch.randn(10, 4), torch.randn(9, 3))
    core, left, right = _decompose.tucker2(low, (4, 3))
    assert far(torch.einsum("abhw,oa,ib->oihw", core, left, right), low) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("options", CONVS)
def test_cp_finds_a_kernel_that_is_a_sum_of_few_terms(options: dict[str, Any]) -> None:
    layer = _conv(**options)
    size = layer.kernel_size[0] * layer.kernel_size[1]
    factors = [torch.randn(n, 3, dtype=torch.float64) for n in (8, 6, size)]
    layer.weight.copy_(torch.einsum("or,ir,kr->oik", *factors).reshape(layer.weight.shape))
    found = _decompose.cp(layer.weight.flatten(2), 3, sweeps=500, tolerance=0.0)
    x = torch.rand(1, 6, 11, 12)
    assert far(terms(layer, found)(x), layer(x)) < 1e-4
    assert far(terms(layer, [factor * 2 for factor in found])(x), layer(x)) > 0.1  # the check can fail


def _without_best() -> torch.Tensor:
    """a a b + a b a + b a a: of rank 3, but as near as one likes to tensors of rank 2 (De Silva and Lim, 2008)."""
    a, b = torch.eye(4, dtype=torch.float64)[:2]
    return sum(torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a)))  # type: ignore[return-value]


def test_plain_als_diverges_where_there_is_no_best_and_the_cure_bounds_it() -> None:
    tensor = _without_best()
    plain = [_decompose.cp(tensor, 2, sweeps=sweeps, tolerance=0.0) for sweeps in (20, 500, 4000)]
    growth = [_decompose.cp_growth(tensor, factors) for factors in plain]
    assert growth[0] * 3 < growth[1] and growth[1] * 2 < growth[2] and growth[2] > 20  # the more, the larger the terms
    cured = _decompose.stable(tensor, plain[-1], growth=3.0)
    assert _decompose.cp_growth(tensor, cured) <= 3.0
    assert _decompose.cp_error(tensor, cured) < 0.005


def test_the_correction_keeps_the_error_and_makes_the_terms_smaller() -> None:
    tensor = torch.randn(16, 16, 9, dtype=torch.float64)
    plain = _decompose.cp(tensor, 20, sweeps=100)
    corrected = _decompose.bounded(tensor, plain, _decompose.cp_error(tensor, plain))
    assert _decompose.cp_error(tensor, corrected) == pytest.approx(_decompose.cp_error(tensor, plain), rel=1e-3)
    assert _decompose.cp_growth(tensor, corrected) < 0.8 * _decompose.cp_growth(tensor, plain)


# ------------------------------------------------------------------------------------------------------- the passes


class Net(nn.Module):
    """A bit of everything: convolutions of all kinds, a linear layer, and layers that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.point, self.grouped = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.tied, self.tied_too = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied_too.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.stem(x).relu()).relu()
        x = self.normed(self.grouped(self.point(x))).flatten(2).transpose(1, 2)
        x = self.tied_too(self.tied(x)) + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


@pytest.fixture
def net() -> Model:
    return model_of(Net(), 3, 16, 16)


PASSES = {"svd": factorize_svd, "tucker": factorize_tucker, "cp": factorize_cp}


@pytest.mark.parametrize("name", PASSES)
def test_the_result_survives_and_costs_what_was_promised(name: str, net: Model, tmp_path: Path) -> None:
    result = PASSES[name](net, JOB, ratio=0.5)
    inputs = graph.example_inputs(net.stage)
    before, after = graph.cost(net.stage.module, inputs), graph.cost(result.model.stage.module, inputs)
    assert after.macs < before.macs and after.params < before.params and result.needs_recovery
    for layer, text in result.changed.items():
        part = result.model.stage.module.get_submodule(layer)
        promised = int(text.rsplit(" ", 1)[1])
        assert sum(p.numel() for n, p in part.named_parameters() if n.endswith("weight")) == promised
        assert promised <= 0.5 * net.stage.module.get_submodule(layer).weight.numel() or "4 " in text  # the least rank
    expected = {"conv", "stem"} | ({"point", "head"} if name == "svd" else set())
    assert set(result.changed) == expected
    survive(net, result.model, tmp_path)


def test_layers_that_cannot_be_replaced_say_why(net: Model) -> None:
    skipped = factorize_svd(net, JOB).skipped
    assert "nothing to share" in skipped["grouped"] and "computed from others" in skipped["normed"]
    assert "belongs to another module" in skipped["tied"] and "belongs to another" in skipped["tied_too"]
    assert "is a NonDynamicallyQuantizableLinear" in skipped["attention.out_proj"]
    assert factorize_svd(net, JOB, layers=["conv"]).skipped["head"] == "not named in layers"
    assert factorize_svd(net, JOB, skip=["conv"]).skipped["conv"] == "named in skip"
    assert "1x1 convolution" in factorize_tucker(net, JOB).skipped["point"]


def test_a_parent_that_looks_into_its_child_keeps_it() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.layer(x.to(self.layer.weight.dtype)))

    result = factorize_svd(model_of(Reads(), 16, 4, 4), JOB)
    assert set(result.changed) == {"other"} and "has no attribute 'weight'" in result.skipped["layer"]


def test_a_layer_used_at_two_places_stays_one(tmp_path: Path) -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1)
    model = model_of(nn.Sequential(layer, nn.ReLU(), layer), 16, 8, 8)
    result = factorize_svd(model, JOB)
    assert result.model.stage.module[0] is result.model.stage.module[2]
    survive(model, result.model, tmp_path)


@pytest.mark.parametrize("name", PASSES)
def test_energy_is_kept_or_the_layer_stays(name: str, net: Model) -> None:
    conv: Any = net.stage.module.conv
    low = _decompose.tucker2(conv.weight.detach(), (3, 3))
    near = torch.einsum("abhw,oa,ib->oihw", *low) + 1e-4 * torch.randn(conv.weight.shape)
    conv.weight.data.copy_(near)
    options: dict[str, Any] = {"by": "energy", "energy": 0.99, "layers": ["stem", "conv"], "fit": "weights"}
    result = PASSES[name](net, JOB, **options)
    assert "conv" in result.changed
    assert "keeps 0." in result.skipped["stem"] and "of the energy, not 0.99" in result.skipped["stem"]
    assert factorize_svd(net, JOB, ratio=0.0, layers=["conv"]).skipped["conv"] == "ratio is 0"


@pytest.mark.parametrize("budget", [0.001, 0.1])
def test_by_drop_the_outputs_stay_within_the_budget(budget: float, net: Model) -> None:
    result = factorize_svd(net, JOB, by="drop", drop=budget)
    inputs = _swap.samples(net, JOB, 16)[0][8:]  # the layers are fitted to the first eight
    module, new = net.stage.module, result.model.stage.module
    moved = _swap.distance(_swap.outputs(module, inputs), _swap.outputs(new, inputs))
    assert moved == pytest.approx(result.notes["output_distance"]) and moved <= budget
    if budget == 0.1:
        assert len(result.changed) >= 2
    for layer in set(result.skipped) & {"stem", "conv", "point", "head"}:
        assert "went to others" in result.skipped[layer]


def test_distances_can_tell() -> None:
    x = [(torch.ones(3),)]
    assert _swap.distance(x, x) == 0
    assert _swap.distance(x, [(torch.zeros(3),)]) == 1
    assert _swap.distance(x, [(torch.full((3,), float("nan")),)]) == float("inf")


def test_by_latency_the_greatest_rank_that_is_fast_enough(net: Model) -> None:
    """A made-up device: a layer takes its MACs, and 50 more for each layer of a chain."""
    asked = []

    def latency(stage: Stage) -> Measurement:
        asked.append(stage)
        macs = graph.cost(stage.module, graph.example_inputs(stage)).macs
        parts = len(graph.layers(stage.module))
        return Measurement("latency", "ms", float(macs + 80_000 * (parts - 1)))

    job = dataclasses.replace(JOB, latency=latency)
    result = factorize_svd(net, job, by="latency", ratio=0.1, layers=["conv", "point"])
    # conv: 2304 weights at 64 positions; rank r: 160 r; 64 * 160 r + 80000 <= 0.9 * 64 * 2304 gives r = 5, down to 4
    assert result.changed["conv"].startswith("rank 4 of 16")
    assert "not fast enough on testbed: " in result.skipped["point"]
    assert {stage.inputs[0].shape for stage in asked} == {(1, 16, 8, 8)}
    lost = Measurement("latency", "ms", float("nan"), status="not measured", reason="no device")
    none = dataclasses.replace(JOB, latency=lambda stage: lost)
    assert factorize_svd(net, none, by="latency", layers=["conv"]).skipped["conv"] == "not measured: no device"


def test_ranks_are_multiples_and_never_cost_more(net: Model) -> None:
    assert _ranks.steps(30, 8) == [8, 16, 24] and _ranks.steps(7, 8) == []
    assert len(_ranks.steps(4096, 8)) <= 65
    eight = factorize_svd(net, JOB, round_to=8, ratio=0.9)
    assert all("rank 8 of" in text for text in eight.changed.values())
    assert eight.skipped["point"] == "no rank that the target likes has fewer MACs"  # 8 * 32 = 16 * 16
    assert factorize_svd(net, JOB, kernels="spatial").changed["conv"].startswith("3x1 and 1x3 through ")


@torch.no_grad()
@pytest.mark.parametrize("fit", ["outputs", "weights"])
def test_fitting_to_outputs_helps(fit: str, net: Model) -> None:
    result = factorize_tucker(net, JOB, layers=["conv"], fit=fit)
    x = graph.example_inputs(net.stage, seed=9)
    other = factorize_tucker(net, JOB, layers=["conv"], fit="weights")
    moved = [far(each.model.stage.module(*x), net.stage.module(*x)) for each in (result, other)]
    assert moved[0] < moved[1] if fit == "outputs" else moved[0] == moved[1]
