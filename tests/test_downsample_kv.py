"""downsample_kv: closed forms, attention of several libraries, that it runs in the runtimes, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen import architecture, graph, onnx_graph
from edgegen.nn import attention
from edgegen.passes.downsample_kv import downsample_kv
from edgegen.types import Job, Model, PassResult, Stage, Target, TensorSpec

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")


def vit(**config: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5} | config
    return VisionTransformer(**options).eval()


class MapAttention(nn.Module):
    """Attention on a map with 1x1 convolutions, as in DDPM; `fixed` assumes as many keys as queries."""

    def __init__(self, width: int = 16, fixed: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))
        self.fixed = fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.q(x).flatten(2), self.k(x), self.v(x)
        k, v = (t.reshape(b, c, h * w) if self.fixed else t.flatten(2) for t in (k, v))
        weight = (q.transpose(1, 2) @ k * c**-0.5).softmax(-1)
        return x + self.proj_out((v @ weight.transpose(1, 2)).reshape(b, c, h, w))


def map_net(fixed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), MapAttention(fixed=fixed), nn.Conv2d(16, 3, 3, padding=1)
    ).eval()


def unet() -> nn.Module:
    pytest.importorskip("diffusers")
    from edgegen.models import _diffusers

    torch.manual_seed(0)
    net = _diffusers.network("unets.unet_2d", "UNet2DModel", {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 4,
    })  # fmt: skip

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x, torch.zeros(x.shape[0])).sample

    return Denoiser().eval()


def model_of(module: nn.Module, size: int = 32) -> Model:
    out = graph.outputs(module, [torch.zeros(1, 3, size, size)])[0]
    stage = Stage("main", module, (TensorSpec("input", (1, 3, size, size), value_range=(0.0, 1.0)),),
                  (TensorSpec("output", tuple(out.shape)),))  # fmt: skip
    return Model("net", "image-to-image", (stage,))


def run(module: nn.Module, size: int = 32, **options: Any) -> PassResult:
    return downsample_kv(model_of(module, size), Job(Target("t", "", ())), **options)


# ------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(("mode", "cell"), [("average", [2.5, 4.5]), ("stride", [0.0, 2.0]), ("nearest", [5.0, 7.0])])
def test_what_a_cell_becomes(mode: str, cell: list[float]):
    tokens = torch.arange(8.0).reshape(1, 8, 1)  # a grid of 2 rows and 4 columns
    assert attention.pooled(tokens, [2, 4], 0, 2, mode).flatten().tolist() == cell
    with_class = torch.cat([torch.full((1, 1, 1), 9.0), tokens], 1)
    assert attention.pooled(with_class, [2, 4], 1, 2, mode).flatten().tolist() == [9.0, *cell]
    as_map = tokens.reshape(1, 1, 2, 4)
    assert attention.pooled(as_map, [2, 4], 0, 2, mode).flatten().tolist() == cell


def test_keys_and_values_are_the_means_of_the_old_ones():
    attn = vit().blocks[0].attn
    x = torch.randn(2, 65, 24)
    q, k, v = attn.qkv(x).reshape(2, 65, 3, 3, 8).permute(2, 0, 3, 1, 4)

    def small(t: torch.Tensor) -> torch.Tensor:
        maps = t[:, :, 1:].transpose(2, 3).reshape(2, 24, 8, 8)
        return torch.cat([t[:, :, :1], F.avg_pool2d(maps, 2).reshape(2, 3, 8, 16).transpose(2, 3)], 2)

    out = F.scaled_dot_product_attention(q, small(k), small(v)).transpose(1, 2).reshape(2, 65, 24)
    block = attention.DownsampledAttention(attn, [8, 8], 1, 2, "average")
    torch.testing.assert_close(block(x), attn.proj(out), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention.DownsampledAttention(attn, [8, 8], 1, 1, "average")(x), attn(x))


def test_a_window_that_covers_everything_is_the_attention_itself():
    attn = vit(qk_norm=True).blocks[0].attn
    x = torch.randn(2, 65, 24)
    whole = attention.WindowAttention(attn, [8, 8], 1, 4, 20.0)
    torch.testing.assert_close(whole(x), attn(x), rtol=1e-4, atol=1e-5)
    assert whole.keys.shape == (4, 65)
    local = attention.WindowAttention(attn, [8, 8], 1, 4, 2.0)
    assert local.keys.shape == (4, 65)  # 4 + 2 * 2 is the grid
    assert not torch.allclose(local(x), attn(x), atol=1e-4)


def test_a_window_sees_the_tokens_within_the_radius_only():
    attn = vit(class_token=False, global_pool="avg").blocks[0].attn
    local = attention.WindowAttention(attn, [8, 8], 0, 2, 2.0)
    assert local.keys.shape == (16, 36)
    x = torch.randn(1, 64, 24, requires_grad=True)
    local(x)[0, 3 * 8 + 3].sum().backward()  # the token in row 3, column 3
    seen = x.grad.abs().sum(-1).reshape(8, 8) > 0
    y, z = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(seen, (y - 3) ** 2 + (z - 3) ** 2 <= 4)


# ---------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("mode", attention.MODES)
def test_a_vision_transformer(mode: str):
    module = vit()
    result = run(module, mode=mode)
    assert result.changed["blocks.0.attn"] == "keys and values from 4x4 instead of 8x8"
    assert result.notes["grids"] == {"blocks.0.attn": [8, 8], "blocks.1.attn": [8, 8]}
    assert 0 < result.notes["relative_error"] < 1
    assert result.notes["macs_after"] < result.notes["macs_before"]
    assert set(graph.layers(module)) <= {*result.changed, *result.skipped}
    changed = result.model.stage.module
    fresh = architecture.rebuild(vit(), json.loads(json.dumps(architecture.describe(changed, module)))).eval()
    fresh.load_state_dict(changed.state_dict())
    x = [torch.rand(1, 3, 32, 32)]
    assert torch.equal(graph.outputs(fresh, x)[0], graph.outputs(changed, x)[0])


def test_an_even_map_does_not_notice():
    module = map_net()
    net = run(module, 16).model.stage.module
    assert isinstance(net[1].k, attention.DownsampledTokens) and not isinstance(net[1].q, attention.DownsampledTokens)
    x = torch.randn(1, 16, 1, 1).expand(1, 16, 16, 16)
    torch.testing.assert_close(net[1](x), module[1](x))
    y = torch.randn(1, 16, 16, 16)
    assert not torch.allclose(net[1](y), module[1](y))


def test_diffusers_attention():
    module = unet()
    result = run(module, 16, min_tokens=16)
    changed = [path for path in result.changed if path.endswith("attentions.0")]
    assert len(changed) == 3 and result.notes["relative_error"] > 0
    text = json.dumps(architecture.describe(result.model.stage.module, module))
    assert architecture.rebuild(unet(), json.loads(text)).state_dict().keys() == (
        result.model.stage.module.state_dict().keys()
    )


def test_the_heads_of_a_pruned_attention_come_back():
    from edgegen.passes.prune_channels import prune_channels

    pruned = prune_channels(model_of(vit()), Job(Target("t", "", ())), ratio=0.5, layers=["blocks.0.attn.qkv"],
                            min_width=1, round_to=1).model  # fmt: skip
    net = downsample_kv(pruned, Job(Target("t", "", ()))).model.stage.module
    fresh = architecture.rebuild(vit(), json.loads(json.dumps(architecture.describe(net, vit())))).eval()
    fresh.load_state_dict(net.state_dict())
    x = [torch.rand(1, 3, 32, 32)]
    assert torch.equal(graph.outputs(fresh, x)[0], graph.outputs(net, x)[0])


def test_behind_merged_tokens_there_is_no_grid():
    from edgegen.passes.prune_tokens import prune_tokens

    merged = prune_tokens(model_of(vit(depth=4)), Job(Target("t", "", ())), stages=[1], ratio=0.25).model
    result = downsample_kv(merged, Job(Target("t", "", ())), min_tokens=16)
    assert {"blocks.0.attn", "blocks.1.attn"} <= set(result.changed)
    assert result.skipped["blocks.2.attn"] == "its tokens were merged or dropped before: they are no grid"


class Cross(nn.Module):
    """Cross attention: keys and values of other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x * 2), self.v(x * 2)))


class Biased(nn.Module):
    """Attention of timm's form with a bias of its own, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(3, 9), nn.Linear(3, 3), 1
        self.bias = nn.Parameter(torch.randn(256, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias))


class OnTokens(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("module", "options", "why"), [
    pytest.param(lambda: vit(), {"min_tokens": 65}, "has 64 tokens, fewer than min_tokens 65", id="few"),
    pytest.param(lambda: vit(), {"factor": 3}, "its grid 8x8 does not divide by 3", id="odd"),
    pytest.param(lambda: vit(), {"skip": ["blocks.0.attn", "blocks.1.attn"]}, "is named in skip", id="skip"),
    pytest.param(lambda: OnTokens(Cross()).eval(), {}, "looks at another sequence (cross attention)", id="cross"),
    pytest.param(lambda: OnTokens(Biased()).eval(), {}, "is no plain attention: recomputed, it differs", id="bias"),
    pytest.param(lambda: map_net(fixed=True), {}, "needs as many keys as queries", id="fixed"),
    pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), {}, "is in no self-attention", id="none"),
])  # fmt: skip
def test_it_says_why_it_does_not_apply(module: Any, options: dict[str, Any], why: str):
    net = module()
    size = 32 if hasattr(net, "patch_embed") else 16
    result = run(net, size, **options)
    assert result.changed == {} and not result.needs_recovery
    assert any(why in reason for reason in result.skipped.values()), result.skipped
    x = [torch.rand(1, 3, size, size)]
    assert torch.equal(graph.outputs(net, x)[0], graph.outputs(result.model.stage.module, x)[0])


def test_a_name_that_is_no_attention():
    with pytest.raises(ValueError, match=r"no self-attention 'blocks.0' in net, did you mean"):
        run(vit(), layers=["blocks.0"])


@pytest.mark.parametrize("which", ["vit", "map", "window"])
def test_it_runs_in_onnx_runtime_and_openvino(which: str, tmp_path: Path):
    ort, ov = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    size = 16 if which == "map" else 32
    if which == "window":
        net = vit()
        net.blocks[0].attn = attention.WindowAttention(net.blocks[0].attn, [8, 8], 1, 4, 1.5).eval()
        stage = model_of(net).stage
    else:
        stage = run(vit() if which == "vit" else map_net(), size).model.stage
    onnx_graph.to_onnx(stage, tmp_path / "net.onnx", opset=18)
    x = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    want = graph.outputs(stage.module, [torch.from_numpy(x)])[0].numpy()
    path = str(tmp_path / "net.onnx")
    got = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([x])[0], want, rtol=1e-4, atol=1e-4)
