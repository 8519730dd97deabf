"""A pruned network comes back from JSON and weights alone: the same shapes, attributes and outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import architecture, weights
from edgegen.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


class Gate(nn.Module):
    """A parameter of its own beside a child, a plain attribute used in forward, and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("order", torch.arange(8), persistent=False)
        self.split: tuple[int, int] = (4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.split(self.conv(x)[:, self.order] * self.gain, self.split, dim=1)
        return torch.cat([a, b.relu()], dim=1)


def _chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3), nn.GroupNorm(4, 8),
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1),
    )  # fmt: skip


def _timm(name: str, **config: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, exportable=True, num_classes=10, **config)


def _resnet() -> nn.Module:
    return _timm("resnet18")


def _vit() -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3)


def _pruned(create: Callable[[], nn.Module], size: int) -> tuple[nn.Module, nn.Module]:
    """(pruned, unchanged copy of the original) by torch-pruning, a half of the channels."""
    import torch_pruning as tp

    original = create().eval()
    net = copy.deepcopy(original)
    heads = {part.qkv: part.num_heads for part in net.modules() if hasattr(part, "qkv")}
    last = list(net.modules())[-1] if not hasattr(net, "get_classifier") else net.get_classifier()
    unwrapped = [(p, p.ndim - 1) for name, p in net.named_parameters() if name in ("cls_token", "pos_embed")]
    pruner = tp.pruner.MagnitudePruner(
        net, torch.rand(2, 3, size, size), tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[last], num_heads=heads, prune_head_dims=True, unwrapped_parameters=unwrapped,
    )  # fmt: skip
    pruner.step()
    for part in net.modules():
        if hasattr(part, "qkv"):
            part.num_heads = pruner.num_heads[part.qkv]
            part.head_dim = part.qkv.out_features // (3 * part.num_heads)
            part.attn_dim = part.num_heads * part.head_dim
    return net.eval(), original


@pytest.mark.parametrize(
    ("create", "size"),
    [pytest.param(_chain, 12, id="chain"), pytest.param(_resnet, 32, id="resnet"), pytest.param(_vit, 32, id="vit")],
)
def test_pruned_networks_come_back_from_json_and_weights(
    create: Callable[[], nn.Module], size: int, tmp_path: Path
) -> None:
    net, original = _pruned(create, size)
    assert sum(p.numel() for p in net.parameters()) < 0.7 * sum(p.numel() for p in original.parameters())
    text = json.dumps(architecture.describe(net, original), allow_nan=False)
    weights.save_state(net, tmp_path / "w.safetensors")
    torch.manual_seed(7)
    again = architecture.rebuild(create(), json.loads(text)).eval()
    weights.load_into(again, weights.read_state(tmp_path / "w.safetensors"), "w")
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert weights.state_hash(again) == weights.state_hash(net)
    assert str(again) == str(net)
    assert {p.requires_grad for p in again.parameters()} == {True}


def test_vit_description_names_heads() -> None:
    net, original = _pruned(_vit, 32)
    change = architecture.describe(net, original)["modules"]["blocks.0.attn"]
    assert change == {"class": "Attention", "attributes": {"attn_dim": 24, "head_dim": 8}}


def test_unchanged_network_has_no_differences() -> None:
    net = _chain()
    description = architecture.describe(copy.deepcopy(net), net)
    assert (description["modules"], description["removed"], description["replaced"]) == ({}, [], {})


def test_own_parameters_attributes_and_unsaved_buffers_of_containers() -> None:
    original = nn.Sequential(Gate(), nn.Conv2d(8, 2, 1))
    net = copy.deepcopy(original)
    gate = net[0]
    gate.conv = nn.Conv2d(3, 6, 3, padding=1)
    gate.gain = nn.Parameter(torch.rand(6, 1, 1))
    gate.order = torch.tensor([5, 4, 3, 2, 1, 0])
    gate.split = (2, 4)
    net[1] = nn.Conv2d(6, 2, 1)
    description = json.loads(json.dumps(architecture.describe(net, original)))
    again = architecture.rebuild(nn.Sequential(Gate(), nn.Conv2d(8, 2, 1)), description)
    assert again[0].split == (2, 4) and isinstance(again[0].split, tuple)
    weights.load_into(again, net.state_dict(), "w")
    x = torch.rand(1, 3, 5, 5)
    assert torch.equal(again(x), net(x))


def test_folded_norms_and_removed_blocks_are_told() -> None:
    def create() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), _chain()))

    original = create()
    net = copy.deepcopy(original)
    net[0] = nn.Conv2d(3, 4, 3)
    net[1] = nn.Identity()
    del net[2][1]
    description = architecture.describe(net, original)
    assert description["replaced"] == {"1": "BatchNorm2d"} and description["removed"] == ["2.1"]
    again = architecture.rebuild(create(), description)
    weights.load_into(again, net.state_dict(), "w")
    x = torch.rand(1, 3, 5, 5)
    assert torch.equal(again(x), net(x))


def test_tied_parameters_stay_tied() -> None:
    def create(width: int) -> nn.ModuleDict:
        net = nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.Linear(width, width)})
        net["b"].weight = net["a"].weight
        return net

    again = architecture.rebuild(create(8), architecture.describe(create(4), create(8)))
    assert again["a"].weight is again["b"].weight and again["a"].weight.shape == (4, 4)


def test_another_class_cannot_be_described() -> None:
    net = _chain()
    net[2] = nn.GELU()
    with pytest.raises(ModelError, match="cannot describe 2: it is a GELU and was ReLU"):
        architecture.describe(net, _chain())
    with pytest.raises(ModelError, match="cannot describe 7: it is a ReLU and is not in the original"):
        architecture.describe(nn.Sequential(*_chain(), nn.ReLU()), _chain())


@pytest.fixture(scope="module")
def chain_description() -> dict[str, Any]:
    net, original = _pruned(_chain, 12)
    return architecture.describe(net, original)


def _refused(fresh: nn.Module, description: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        architecture.rebuild(fresh, description)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_description_of_another_network_is_refused(chain_description: dict[str, Any]) -> None:
    assert "it has no module" in _refused(nn.Sequential(nn.Conv2d(3, 16, 3)), chain_description)
    wider = nn.Sequential(nn.Conv2d(3, 32, 3), *list(_chain())[1:])
    assert "0.bias has shape [32], the description expects [16]" in _refused(wider, chain_description)
    other = nn.Sequential(nn.Linear(3, 16), *list(_chain())[1:])
    assert "0 is a Linear, not a Conv2d" in _refused(other, chain_description)
    more = nn.Sequential(*_chain(), nn.Conv2d(4, 4, 1))
    assert "other tensors or shapes are left over" in _refused(more, chain_description)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), 2, "has schema 2, known is 1"),
        (("modules", "0", "attributes"), {"forward": 1}, "not a plain attribute"),
        (("modules", "0", "attributes"), {"_modules": 1}, "not a plain attribute"),
        (("modules", "0", "attributes"), {"__class__": 1}, "not a plain attribute"),
        (("modules", "0", "tensors", "weight", "shape"), [-1, 3, 3, 3], "impossible shape"),
        (("modules", "0", "tensors", "weight", "shape"), [2**20, 2**20, 3, 3], "impossible shape"),
        (("modules", "0", "tensors", "weight", "shape"), "eight", "impossible shape"),
        (("modules", "0", "tensors", "weight", "dtype"), "load", "unknown dtype 'load'"),
        (("modules", "0", "tensors"), [1], "malformed"),
        (("modules",), None, "malformed"),
        (("removed",), ["nowhere"], "has no module 'nowhere'"),
    ],
)
def test_malformed_descriptions_are_refused(
    chain_description: dict[str, Any], place: tuple[str, ...], value: Any, message: str
) -> None:
    description = copy.deepcopy(chain_description)
    part = description
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    with pytest.raises(ModelError, match=message):
        architecture.rebuild(_chain(), description)


def test_equal_weights_are_one_network_only_with_the_same_classes_attributes_and_buffers() -> None:
    first, again = Gate(), Gate()
    again.load_state_dict(first.state_dict())
    assert architecture.identity(first) == architecture.identity(again)
    assert architecture.identity(first) == architecture.identity(copy.deepcopy(first).eval())
    known = {architecture.identity(first)}

    def differs(change: Callable[[Gate], None]) -> None:
        other = copy.deepcopy(first)
        change(other)
        found = architecture.identity(other)
        assert found not in known
        known.add(found)

    differs(lambda gate: setattr(gate, "split", (2, 6)))
    differs(lambda gate: gate.order.copy_(torch.arange(8).flip(0)))
    differs(lambda gate: setattr(gate.conv, "__class__", type("Other", (nn.Conv2d,), {})))
    differs(lambda gate: gate.gain.data.mul_(2))
    traced = [torch.fx.symbolic_trace(f) for f in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()))]
    traced[1].delete_submodule("1")  # now both have one ReLU, which the second one calls twice
    for node in traced[1].graph.nodes:
        node.target = "0" if node.target == "1" else node.target
    traced[1].recompile()
    assert architecture.identity(traced[0]) != architecture.identity(traced[1])
