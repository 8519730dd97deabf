"""Channel pruning over architectures: the pruned network equals the masked one, in float64, and says what it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen import architecture, graph, registry
from edgegen.errors import PassError
from edgegen.passes import _inverse, _removal
from edgegen.passes.prune_blocks import prune_blocks
from edgegen.passes.prune_channels import prune_channels
from edgegen.types import Job, Model, PassResult, Stage, Target, TensorSpec

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(module: nn.Module) -> nn.Module:
    """Random norms and statistics: fresh ones hide mistakes."""
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 1.5)
        if "norm" in type(part).__name__.lower() and isinstance(getattr(part, "weight", None), nn.Parameter):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    return module.eval()


class UNet(nn.Module):
    """Two scales down and up with skips by concatenation, max pooling and transposed convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        self.d1, self.d2, self.mid = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.u2 = block(4 * width, 2 * width)
        self.u1, self.out = block(3 * width, width), nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        y = self.u2(torch.cat([self.up2(self.mid(F.max_pool2d(b, 2))), b], 1))
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.u1(torch.cat([a, y], 1)))


class Shuffled(nn.Module):
    """Pixel unshuffle, depthwise and grouped convolutions, pixel shuffle with a long skip."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(12, width, 3, padding=1)
        self.depthwise, self.point = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1)
        self.grouped, self.up = nn.Conv2d(width, 2 * width, 3, padding=1, groups=2), nn.Conv2d(2 * width, 4 * width, 1)
        self.tail = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.head(F.pixel_unshuffle(x, 2)))
        y = y + self.point(F.relu(self.depthwise(y)))
        y = F.pixel_shuffle(self.up(F.relu(self.grouped(y))), 2)
        return F.pixel_shuffle(self.tail(y), 2)


class Styled(nn.Module):
    """AdaIN: a mapping network whose output is split into scale and shift of instance-normalised features."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.start, self.conv1 = nn.Linear(12, width * 16), nn.Conv2d(width, width, 3, padding=1)
        self.style1, self.conv2 = nn.Linear(24, 2 * width), nn.Conv2d(width, width, 3, padding=1)
        self.style2, self.out = nn.Linear(24, 2 * width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        w = self.mapping(z)
        x = self.start(z).view(z.shape[0], -1, 4, 4)
        for conv, style in ((self.conv1, self.style1), (self.conv2, self.style2)):
            scale, shift = style(w).chunk(2, 1)
            x = F.interpolate(F.instance_norm(conv(x)), scale_factor=2.0)
            x = F.relu((1 + scale[:, :, None, None]) * x + shift[:, :, None, None])
        return self.out(x)


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5)


def densenet() -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 2), num_classes=5, bn_size=2)


def mobilenet() -> nn.Module:
    return timm.create_model("mobilenetv2_050", num_classes=5)


def convnext() -> nn.Module:
    """Norms over the channels of maps and of tokens."""
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), num_classes=5)


def vit(**config: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5} | config
    return VisionTransformer(**options)


def sagan() -> nn.Module:
    """Class-conditional norms and attention over positions, with what training starts at zero made to matter."""
    net: Any = registry.module("models", "sagan").create(size=16, latent=8, classes=4, width=8, attention=8)
    nn.init.constant_(net.attend.gamma, 0.7)
    for block in net.blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.normal_(norm.embed.weight, 1.0, 0.5)
    return net


def ugatit() -> nn.Module:
    """Layer-instance norms, and an attention map that weighs one map twice."""
    net: nn.Module = registry.module("models", "ugatit").create(width=8, blocks=1, size=16)
    for name, parameter in net.named_parameters():
        if name.endswith(("rho", ".gamma", ".beta")):
            nn.init.uniform_(parameter, 0.2, 0.8)
    return net


def stylegan2() -> nn.Module:
    """A learned map at the start, and convolutions whose input channels are scaled by styles."""
    made: nn.Module = registry.module("models", "stylegan2").create(
        size=16, latent=12, style=16, layers=2, width=16, base=256
    )
    return made


def mobile_stylegan() -> nn.Module:
    made: nn.Module = registry.module("models", "mobile_stylegan").create(
        widths=(16, 16, 8), latent=12, style=16, layers=2
    )
    return made


SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {
    resnet: (1, 3, 32, 32), densenet: (1, 3, 32, 32), mobilenet: (1, 3, 32, 32), convnext: (1, 3, 32, 32),
    vit: (1, 3, 16, 16), UNet: (1, 3, 16, 16), Shuffled: (1, 3, 16, 16), Styled: (1, 12),
    sagan: (1, 12), ugatit: (1, 3, 16, 16), stylegan2: (1, 12), mobile_stylegan: (1, 12),
}  # fmt: skip


def prune(create: Callable[[], nn.Module], **options: Any) -> tuple[Model, PassResult]:
    torch.manual_seed(0)
    module = randomised(create())
    stage = Stage("main", module, (TensorSpec("x", SHAPES[create]),), (TensorSpec("y", (1,)),))
    model = Model("net", "image-to-image", (stage,))
    return model, prune_channels(model, Job(Target("t", "", (), channel_multiple={"int8": 4})), **options)


def masked_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Every removal that the pass carries out."""
    seen, original = [], _removal.remove

    def spy(module: nn.Module, removals: Any, heads: Any) -> nn.Module:
        seen.append((removals, heads))
        return original(module, removals, heads)

    monkeypatch.setattr(_removal, "remove", spy)
    return seen


def check(model: Model, result: PassResult, removals: Any) -> float:
    """The pruned network against the masked one; how much the removal changed the output."""
    x = torch.randn(2, *model.stage.inputs[0].shape[1:], dtype=torch.float64)
    nets = (result.model.stage.module, _removal.mask(model.stage.module, removals), model.stage.module)
    got, expected, before = (graph.outputs(graph.clone(net).double(), [x])[0] for net in nets)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)
    return float((before - expected).abs().max())


# ---------------------------------------------------------------------------------------------- pruned == masked


@pytest.mark.parametrize(
    "create", [resnet, densenet, mobilenet, convnext, vit, UNet, Shuffled, Styled, sagan, ugatit, stylegan2],
    ids=lambda f: f.__name__,
)
def test_the_pruned_network_equals_the_masked_one(create: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch):
    seen = masked_by(monkeypatch)
    model, result = prune(create, ratio=0.5, min_width=4)
    assert check(model, result, seen[-1][0]) > 1e-4  # something was removed that mattered
    assert result.notes["params_after"] < 0.6 * result.notes["params_before"]
    refused = {why for why in result.skipped.values() if "safely" in why}
    assert not refused, result.skipped
    fresh = architecture.rebuild(create(), architecture.describe(result.model.stage.module, model.stage.module)).eval()
    fresh.load_state_dict(result.model.stage.module.state_dict())
    x = torch.randn(SHAPES[create])
    assert torch.equal(graph.outputs(fresh, [x])[0], graph.outputs(result.model.stage.module, [x])[0])


def test_styles_lose_the_channels_that_they_scale(monkeypatch: pytest.MonkeyPatch):
    _, result = prune(stylegan2, ratio=0.5, min_width=4)
    assert result.notes["macs_after"] < 0.3 * result.notes["macs_before"]
    conv = result.model.stage.module.synthesis.b8.conv0
    assert (conv.affine.in_features, conv.affine.out_features, conv.conv.in_channels, len(conv.bias)) == (8, 8, 8, 8)
    assert result.model.stage.module.synthesis.b4.const.shape == (1, 8, 4, 4)
    seen = masked_by(monkeypatch)
    model, result = prune(mobile_stylegan, ratio=0.5, min_width=4)
    assert check(model, result, seen[-1][0]) > 1e-4
    assert result.notes["macs_after"] < 0.6 * result.notes["macs_before"]


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch):
    seen = masked_by(monkeypatch)
    model, result = prune(UNet, ratio=0.5, min_width=4)
    with torch.no_grad():
        result.model.stage.module.out.weight[0, 0] += 0.01
    with pytest.raises(AssertionError):
        check(model, result, seen[-1][0])


@pytest.mark.parametrize("options", [
    pytest.param({"layers": ["blocks.0.mlp.fc1", "blocks.2.mlp.fc1"]}, id="MLP"),
    pytest.param({"layers": ["blocks.1.attn.qkv"], "min_width": 1, "round_to": 1}, id="head width"),
    pytest.param({"layers": ["blocks.1.attn.qkv", "blocks.3.attn.qkv"], "heads": True}, id="heads"),
])  # fmt: skip
def test_widths_of_a_vision_transformer(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    seen = masked_by(monkeypatch)
    model, result = prune(vit, ratio=0.5, **options)
    assert result.changed and check(model, result, seen[-1][0]) > 1e-5
    net = result.model.stage.module
    for path in options["layers"]:
        if "mlp" in path:
            assert net.get_submodule(path).out_features == 64
        else:
            attn = net.get_submodule(path.removesuffix(".qkv"))
            wanted = (2, 8, 16) if options.get("heads") else (4, 4, 16)
            assert (attn.num_heads, attn.head_dim, attn.attn_dim) == wanted
    fresh = architecture.rebuild(vit(), architecture.describe(net, model.stage.module)).eval()
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(SHAPES[vit])
    assert torch.equal(graph.outputs(fresh, [x])[0], graph.outputs(net, [x])[0])


def test_the_width_of_the_tokens_and_the_depth():
    model, result = prune(vit, ratio=0.5)
    net = result.model.stage.module
    assert net.patch_embed.proj.out_channels == net.head.in_features == 16
    assert net.cls_token.shape[-1] == 16 and result.notes["params_after"] < 0.3 * result.notes["params_before"]
    shorter = prune_blocks(model, Job(Target("t", "", ())), ratio=0.5, samples=1)
    assert shorter.notes["removed"].count("blocks.") == 2


def test_a_norm_over_the_channels_does_not_hide_a_wrong_trace(monkeypatch: pytest.MonkeyPatch):
    original = _removal._shrink

    def other(part: Any, side: str, indices: list[int]) -> None:
        shift = int(isinstance(part, nn.LayerNorm))
        original(part, side, sorted((i + shift) % _removal.width(part, side) for i in indices))

    monkeypatch.setattr(_removal, "_shrink", other)
    _, result = prune(vit, ratio=0.5)
    assert "differs from the masked network" in result.skipped["patch_embed.proj"]


def test_scale_and_shift_of_a_style_stay_coupled():
    _, result = prune(Styled, ratio=0.5, min_width=4)
    net = result.model.stage.module
    assert (net.style1.out_features, net.conv1.out_channels) == (16, 8)
    assert (net.style2.out_features, net.conv2.out_channels, net.mapping[2].out_features) == (16, 8, 12)


@pytest.mark.parametrize(("first", "options"), [
    ("prune_tokens", {}), ("downsample_kv", {"min_tokens": 16}),
    ("replace_attention", {"to": "window", "blocks": "all", "steps": 0, "joint_steps": 0, "radius": 1.5}),
    ("replace_attention", {"to": "conv", "blocks": "all", "steps": 0, "joint_steps": 0}),
])  # fmt: skip
def test_channels_and_blocks_of_a_network_that_was_changed_before(first: str, options: dict[str, Any]):
    torch.manual_seed(0)
    stage = Stage("main", randomised(vit()), (TensorSpec("x", SHAPES[vit]),), (TensorSpec("y", (1,)),))
    model, job = Model("net", "image-to-image", (stage,)), Job(Target("t", "", (), channel_multiple={"int8": 4}))
    changed = getattr(registry.module("passes", first), first)(model, job, **options).model
    result = prune_channels(changed, job, ratio=0.5)
    assert result.notes["params_after"] < 0.45 * result.notes["params_before"]
    shorter = prune_blocks(result.model, job, ratio=0.3, samples=1)
    net = shorter.model.stage.module
    fresh = architecture.rebuild(randomised(vit()), architecture.describe(net, stage.module)).eval()
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(SHAPES[vit])
    assert torch.equal(graph.outputs(fresh, [x])[0], graph.outputs(net, [x])[0])


class Positions(nn.Module):
    """Attention over positions in a form that edgegen does not know: torch-pruning takes its reshapes for channels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.query, self.key = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 4, 1)
        self.value, self.back = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        self.last, self.out = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(F.relu(self.first(x)))
        query, key = self.query(x).flatten(2), F.max_pool2d(self.key(x), 2).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ key, -1)
        y = F.max_pool2d(self.value(x), 2).flatten(2) @ weights.transpose(1, 2)
        x = x + self.back(y.reshape(y.shape[0], -1, *x.shape[2:]))
        return self.out(F.relu(self.last(x)))


SHAPES[Positions] = (1, 3, 16, 16)


def test_dependencies_that_go_round_in_circles_are_walked_once(monkeypatch: pytest.MonkeyPatch):
    seen = masked_by(monkeypatch)
    begin = time.monotonic()
    model, result = prune(Positions, ratio=0.5, min_width=4)
    assert time.monotonic() - begin < 20  # torch-pruning alone does not end
    assert result.changed["first"] == "out 16 -> 8" and {"second", "last"} <= set(result.changed)
    assert "the trace takes channels from back that it does not have" in result.skipped["query"]
    assert check(model, result, seen[-1][0]) > 1e-4


# ------------------------------------------------------------------------------------------------------------ flows


class Coupling(nn.Module):
    """An affine coupling of a flow behind a permutation, with its inverse; `mixed`: a matrix instead, as in Glow."""

    def __init__(self, width: int, mixed: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(width // 2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, width, 3, padding=1))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(width, width))[0]) if mixed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flip(1) if self.mix is None else F.conv2d(x, self.mix[:, :, None, None])
        a, b = x.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        return torch.cat([a, b * torch.sigmoid(scale + 2) + shift], 1)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        a, b = y.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        x = torch.cat([a, (b - shift) / torch.sigmoid(scale + 2)], 1)
        return x.flip(1) if self.mix is None else F.conv2d(x, self.mix.inverse()[:, :, None, None])


class Flow(nn.Module):
    """A convolution, two couplings, and an output: the latent has the width of the convolution."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.a, self.b = Coupling(8, mixed), Coupling(8, mixed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.b(self.a(self.inp(x))))


def glow() -> nn.Module:
    return Flow(mixed=True)


SHAPES |= {Flow: (1, 3, 8, 8), glow: (1, 3, 8, 8)}


def test_a_layer_that_is_called_inverse_makes_no_invertible_network():
    assert hasattr(mobile_stylegan().synthesis, "inverse") and not _inverse.first(mobile_stylegan())


def test_invertible_layers_keep_their_channels_and_their_inverse():
    _, result = prune(Flow, ratio=0.5, min_width=2, round_to=2)
    net = result.model.stage.module
    assert net.inp.out_channels == 8 and net.out.in_channels == 8
    assert "is invertible and these channels pass through it" in result.skipped["inp"], result.skipped
    x = torch.randn(2, 8, 8, 8)
    for part in (net.a, net.b):
        torch.testing.assert_close(part.inverse(part(x)), x, rtol=1e-3, atol=1e-4)
    assert net.a.net[0].out_channels == 8  # the width inside a coupling is its own affair


def test_a_flow_that_cannot_be_traced_says_why():
    with pytest.raises(PassError, match=r"a is invertible: a flow keeps its channels, use another pass"):
        prune(glow, ratio=0.5)
