"""prune_channels: what is removed is gone, what stays computes what it did, and every refusal has its reason."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import networks_for_pruning as networks
import pytest
import torch
from torch import nn

from edgegen import architecture, graph
from edgegen.errors import PassError
from edgegen.passes import _coupling, _removal
from edgegen.passes import prune_channels as pruning
from edgegen.passes.prune_channels import keep, prune_channels
from edgegen.types import Job, Model, PassResult, Stage, Target, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")

ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"
EXACT = ("Residual", "Upscaler", "Style", "Decoder", "Dcgan", "OptionA")  # no norm over the channels


def model_of(name: str) -> Model:
    return wrap(networks.make(name), networks.SHAPES[name], name)


def wrap(module: nn.Module, shape: tuple[int, ...], name: str = "net") -> Model:
    stage = Stage("main", module.eval(), (TensorSpec("x", shape),), (TensorSpec("y", (1,)),))
    return Model(name, "image-to-image", (stage,))


def prune(model: Model, multiple: int = 8, **options: Any) -> PassResult:
    return prune_channels(model, Job(Target("t", "", (), channel_multiple={"int8": multiple})), **options)


def kept_channels(before: nn.Module, after: nn.Module, path: str) -> set[int]:
    """Which filters (or norm channels) of a layer stayed, found by value."""
    a, b = (net.get_submodule(path).weight for net in (before, after))
    return {i for i, row in enumerate(a) if any(torch.equal(row, other) for other in b)}


# ------------------------------------------------------------------------------------------------ pruned == masked


@pytest.mark.parametrize("importance", ["l2", "random"])
@pytest.mark.parametrize("name", EXACT)
def test_the_pruned_network_computes_what_the_masked_one_does(name: str, importance: str, monkeypatch):
    original, removed = _removal.mask, []

    def spy(module: nn.Module, removals: Any) -> nn.Module:
        removed.append(removals)
        return original(module, removals)

    monkeypatch.setattr(_removal, "mask", spy)
    model = model_of(name)
    result = prune(model, ratio=0.5, importance=importance, multiple=4)
    nets = (result.model.stage.module, original(model.stage.module, removed[-1]), model.stage.module)
    x = torch.randn(3, *networks.SHAPES[name][1:], dtype=torch.float64)
    got, expected, unpruned = (graph.outputs(graph.clone(net).double(), [x])[0] for net in nets)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)  # fp64: only the order of sums differs
    assert (unpruned - expected).abs().max() > 1e-3


def test_the_own_check_of_the_pass_can_fail():
    a = (torch.tensor([1.0, 2.0]),)
    assert pruning._difference(a, a, 1e-6) == ""
    assert "differs from the masked network" in pruning._difference((a[0] * 2,), a, 1e-2)
    assert "differs from the masked network" in pruning._difference((a[0] * 0,), a, 1e-2)
    assert "outputs are not finite" in pruning._difference((a[0] * torch.nan,), a, 1e-2)
    assert "outputs became [(1,)], were [(2,)]" in pruning._difference((a[0][:1],), a, 1e-2)


@pytest.mark.parametrize("name", ["Upscaler", "OptionA"])
def test_wrong_dependencies_are_found_and_left_alone(name: str, monkeypatch):
    monkeypatch.setattr(_coupling, "_add_mappings", lambda dg: [])  # torch-pruning alone gets these wrong
    result = prune(model_of(name), ratio=0.5)
    refused = {why for why in result.skipped.values() if why.startswith("cannot be removed safely: ")}
    assert refused
    x = torch.randn(networks.SHAPES[name])
    assert torch.isfinite(graph.outputs(result.model.stage.module, [x])[0]).all()


# --------------------------------------------------------------------------------------------------- what is removed


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_half_of_everything_goes_for_good(name: str):
    model = model_of(name)
    result = prune(model, ratio=0.5)
    assert result.needs_recovery
    notes = result.notes
    assert notes["params_after"] == graph.params(result.model.stage.module)
    assert notes["params_after"] < (0.6 if name == "OptionA" else 0.42) * notes["params_before"]
    assert notes["macs_after"] < 0.45 * notes["macs_before"]
    only = {"Dcgan": "gen.6", "Style": "out.1", "Upscaler": "up2", "Decoder": "out", "Residual": "head", "Mixed": "fc",
            "OptionA": "linear", "TorchAttention": "head"}[name]  # fmt: skip
    assert result.skipped == {only: "produces the model's output"}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_pruned_network_can_be_described_and_rebuilt(name: str):
    model = model_of(name)
    pruned = prune(model, ratio=0.5).model.stage.module
    fresh = architecture.rebuild(networks.make(name), architecture.describe(pruned, model.stage.module))
    fresh.load_state_dict(pruned.state_dict())
    x = torch.randn(networks.SHAPES[name])
    assert torch.equal(graph.outputs(fresh.eval(), [x])[0], graph.outputs(pruned, [x])[0])


def test_ratio_zero_is_the_identity():
    model = model_of("Residual")
    result = prune(model, ratio=0.0)
    assert result.changed == {}
    assert not result.needs_recovery
    assert set(result.skipped.values()) == {"ratio is 0", "produces the model's output"}
    x = torch.randn(networks.SHAPES["Residual"])
    assert torch.equal(graph.outputs(result.model.stage.module, [x])[0], graph.outputs(model.stage.module, [x])[0])
    assert result.model.stage.module is not model.stage.module


def chain(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))


@pytest.mark.parametrize("importance", ["l2", "l1", "group"])
def test_the_smallest_filters_go(importance: str):
    module = chain()
    with torch.no_grad():
        for i in range(16):
            module[0].weight[i] *= 0.01 if i in (2, 3, 5, 7, 8, 11, 13, 14) else 1.0
    model = wrap(module, (1, 3, 8, 8))
    after = prune(model, ratio=0.5, importance=importance).model.stage.module
    assert kept_channels(module, after, "0") == {0, 1, 4, 6, 9, 10, 12, 15}
    assert torch.equal(after[2].weight, module[2].weight[:, [0, 1, 4, 6, 9, 10, 12, 15]])


def test_l1_and_l2_rank_differently():
    module = chain(2)
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].weight[0, 0, 0, 0] = 2.0  # l1 2, l2 2
        module[0].weight[1] = 0.1  # l1 2.7, l2 0.52
    for importance, kept in (("l1", {1}), ("l2", {0})):
        after = prune(wrap(module, (1, 3, 8, 8)), ratio=0.5, importance=importance, min_width=1, round_to=1)
        assert kept_channels(module, after.model.stage.module, "0") == kept


def test_random_follows_the_seed():
    model = wrap(chain(), (1, 3, 8, 8))
    job = Job(Target("t", "", (), channel_multiple={"int8": 8}))
    states = [
        prune_channels(model, dataclasses.replace(job, seed=seed), ratio=0.5, importance="random").model.stage.module
        for seed in (0, 0, 1)
    ]
    assert torch.equal(states[0][0].weight, states[1][0].weight)
    assert not torch.equal(states[0][0].weight, states[2][0].weight)


@pytest.mark.parametrize(
    ("units", "remove", "multiple", "min_width", "blocks", "kept"),
    [
        pytest.param(64, 64 * 0.3, 16, 8, 1, 48, id="44.8 is nearer to 48 than to 32"),
        pytest.param(64, 64 * 0.5, 16, 8, 1, 32, id="on the grid"),
        pytest.param(134, 40, 32, 8, 1, 96, id="94 to 96"),
        pytest.param(16, 16 * 0.9, 16, 8, 1, 16, id="never below one multiple"),
        pytest.param(12, 12 * 0.5, 16, 4, 1, 8, id="narrower than the multiple: steps of min_width, 6 to 8"),
        pytest.param(6, 6 * 0.5, 16, 8, 1, 6, id="narrower than min_width: left"),
        pytest.param(64, 64 * 0.3, 16, 8, 3, 48, id="three heads of 64: sizes in steps of 16"),
        pytest.param(12, 12 * 0.5, 8, 8, 4, 6, id="four heads of 12: 6 each is 24"),
        pytest.param(32, 32 * 0.5, 8, 24, 1, 24, id="min_width binds"),
    ],
)
def test_kept_widths(units: int, remove: float, multiple: int, min_width: int, blocks: int, kept: int):
    assert keep(units, remove, multiple, min_width, blocks) == kept


def test_round_to_overrides_the_target():
    model = wrap(chain(40), (1, 3, 8, 8))
    assert prune(model, multiple=32, ratio=0.5).changed == {"0": "out 40 -> 32", "2": "in 40 -> 32"}
    assert prune(model, multiple=32, ratio=0.5, round_to=4).changed == {"0": "out 40 -> 20", "2": "in 40 -> 20"}


def test_global_scope_takes_from_where_scores_are_low():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 3))
    with torch.no_grad():
        module[0].weight.copy_(torch.ones_like(module[0].weight))
        module[2].weight[:16] *= 1e-3
    model = wrap(module, (1, 3, 12, 12))
    after = prune(model, ratio=0.25, scope="global").model.stage.module
    assert (after[0].out_channels, after[2].out_channels) == (32, 16)
    after = prune(model, ratio=0.25, scope="local").model.stage.module
    assert (after[0].out_channels, after[2].out_channels) == (24, 24)


# ------------------------------------------------------------------------------------------------------ what stays


def test_skip_protects_the_layer_and_all_that_is_coupled_to_it():
    result = prune(model_of("Residual"), ratio=0.5, skip=["a.3"])
    assert result.skipped["stem"] == result.skipped["a.3"] == "a.3 is named in skip, and they are coupled"
    assert result.model.stage.module.stem.out_channels == 32
    assert result.model.stage.module.a[0].out_channels == 16


def test_layers_limits_the_pass():
    result = prune(model_of("Residual"), ratio=0.5, layers=["a.0"])
    assert set(result.changed) == {"a.0", "a.1", "a.3"}
    assert result.skipped["stem"] == "not named in layers"


def test_option_a_shortcuts_keep_the_channels_that_padding_makes():
    model = model_of("OptionA")
    after = prune(model, ratio=0.5).model.stage.module
    widths = [after.conv1.out_channels, after.layer2[0].conv2.out_channels, after.layer3[0].conv2.out_channels]
    assert widths == [8, 8 + 16, 8 + 16 + 32]  # 16 and 32 channels come from constant padding: they must stay
    kept = [kept_channels(model.stage.module, after, path) for path in ("layer2.0.bn2", "layer3.0.bn2")]
    assert {*range(8), *range(24, 32)} <= kept[0]
    assert {*range(16), *range(48, 64)} <= kept[1]


def test_heads_lose_the_same_number_and_attention_stays_exact():
    timm = pytest.importorskip("timm")
    from timm.layers import Attention

    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.head = Attention(24, num_heads=3, qkv_bias=True), nn.Linear(24, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attn(x).mean(1))

    assert timm.__version__
    model = wrap(Net(), (1, 7, 24))
    result = prune(model, ratio=0.5, min_width=1, round_to=1, layers=["attn.qkv"])
    attn = result.model.stage.module.attn
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.qkv.out_features) == (3, 4, 12, 36)
    assert result.changed == {"attn.qkv": "out 72 -> 36", "attn.proj": "in 24 -> 12"}
    for fused in (True, False):  # both ways of computing it must see the same scale
        attn.fused_attn = fused
        got = graph.outputs(result.model.stage.module, [torch.ones(1, 7, 24)])[0]
        assert torch.isfinite(got).all()
    # pruned == masked was checked by the pass itself, as no norm is in the way
    assert "cannot be removed" not in str(result.skipped)


def test_torch_attention_stays_divisible():
    after = prune(model_of("TorchAttention"), ratio=0.3).model.stage.module
    assert after.attn.embed_dim % after.attn.num_heads == 0
    assert after.attn.embed_dim == after.embed.out_features < 48
    assert after.fc1.out_features < 96


def test_a_fixed_split_inside_attention_is_left_with_its_reason():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 48), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.a(x).split([16, 16, 16], -1)  # sizes are constants of the code
            return self.b(q * k + v)

    result = prune(wrap(Split(), (1, 5, 16)), ratio=0.5)
    assert result.skipped["a"].startswith("cannot be removed safely: ")
    assert result.model.stage.module.a.out_features == 48


def test_gradient_flags_survive():
    model = model_of("Residual")
    model.stage.module.stem.weight.requires_grad_(False)
    after = prune(model, ratio=0.5).model.stage.module
    assert not after.stem.weight.requires_grad
    assert after.stem.bias.requires_grad


def test_tracing_gives_up_when_its_time_is_over(monkeypatch):
    def endless(net: Any, inputs: Any) -> None:
        while True:
            time.sleep(0.001)

    monkeypatch.setattr(_coupling, "_find", endless)
    begin = time.monotonic()
    with pytest.raises(PassError, match=r"tracing the channel dependencies took more than 0.2 s"):
        prune(model_of("Residual"), trace_seconds=0.2)
    assert time.monotonic() - begin < 5


def test_a_network_that_cannot_be_traced_is_a_pass_error():
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("needs a mask")

    with pytest.raises(PassError, match="cannot be traced: needs a mask"):
        prune(wrap(Odd(), (1, 3)))


def test_a_latent_beside_an_embedded_class_can_be_traced():
    """torch-pruning cannot infer the parts' sizes where none comes from a layer; autograd knows them."""

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 4)
            self.first, self.conv = nn.Linear(10, 32 * 4), nn.Conv2d(32, 32, 3, padding=1)
            self.last = nn.Conv2d(32, 1, 1)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            x = torch.cat((z[:, :6], z[:, 6:].softmax(1) @ self.embedding.weight), 1)
            return self.last(self.conv(self.first(x).reshape(-1, 32, 2, 2)).relu())

    result = prune(wrap(Conditional(), (1, 10)), ratio=0.5)
    module: Any = result.model.stage.module
    assert (module.conv.out_channels, module.last.in_channels, module.first.in_features) == (16, 16, 10)


# ----------------------------------------------------------------------------------------------- real trained weights


@pytest.mark.shared
@pytest.mark.skipif(not (ASSETS / "resnet20-cifar10.th").is_file(), reason="../shared/assets is not here")
def test_a_real_option_a_resnet():
    module = networks.OptionA(blocks=3)
    saved = torch.load(ASSETS / "resnet20-cifar10.th", weights_only=True, map_location="cpu")["state_dict"]
    module.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    result = prune(wrap(module, (1, 3, 32, 32)), ratio=0.5)
    assert result.skipped == {"linear": "produces the model's output"}
    assert result.notes["macs_after"] < 0.4 * result.notes["macs_before"]
    assert result.model.stage.module.layer1[0].conv1.out_channels == 8
