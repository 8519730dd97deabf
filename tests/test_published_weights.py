"""Checkpoints in public layouts load under their own names, and the network computes what the published code does."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from published_checkpoints import STYLE, TINY, load, rosinality, saved  # noqa: E402
from torch import nn  # noqa: E402

from edgegen import registry, weights  # noqa: E402
from edgegen.errors import ModelError  # noqa: E402
from edgegen.models import _published  # noqa: E402
from edgegen.nn import mixed_norm  # noqa: E402

ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="../shared/assets is not here")


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------- the others, by their names

# name, configuration, input shape, names that the published layout has
NAMES = [
    ("cyclegan", {}, ("model.1.weight", "model.4.bias", "model.10.conv_block.1.weight", "model.18.conv_block.5.bias",
                      "model.19.weight", "model.22.bias", "model.26.weight")),
    ("cyclegan", {"dropout": True}, ("model.10.conv_block.6.weight",)),
    ("cyclegan", {"antialias": True}, ("model.1.weight", "model.4.weight", "model.8.bias",
                                       "model.12.conv_block.1.weight", "model.22.weight", "model.26.weight",
                                       "model.30.bias")),
    ("pix2pix", {}, ("model.model.0.weight", "model.model.1.model.1.weight", "model.model.1.model.2.running_mean",
                     "model.model.1.model.3.model.3.model.3.model.3.model.3.model.3.model.1.weight",
                     "model.model.1.model.3.model.3.model.3.model.3.model.3.model.3.model.4.weight",
                     "model.model.1.model.5.weight", "model.model.1.model.6.bias", "model.model.3.bias")),
    ("animegan", {}, ("block_a.0.1.weight", "block_a.1.2.bias", "block_c.1.layers.0.1.weight",
                      "block_c.1.layers.1.1.bias", "block_c.4.layers.3.weight", "block_e.2.1.weight",
                      "out_layer.0.weight")),
    ("ugatit", {"size": 32}, ("DownBlock.1.weight", "DownBlock.12.conv_block.1.weight", "gap_fc.weight",
                              "gmp_fc.weight", "conv1x1.bias", "FC.2.weight", "gamma.weight", "UpBlock1_1.conv1.weight",
                              "UpBlock1_4.norm2.rho", "UpBlock2.2.weight", "UpBlock2.3.rho", "UpBlock2.11.weight")),
    ("taesd", {}, ("1.weight", "3.conv.0.weight", "7.weight", "8.conv.4.bias", "18.conv.0.weight", "19.bias")),
    ("rlfn", {}, ("conv_1.weight", "block_1.c1_r.weight", "block_4.esa.conv_f.bias", "conv_2.weight",
                  "upsampler.0.weight")),
    ("cgan", {}, ("label_emb.weight", "l1.0.weight", "conv_blocks.0.running_var", "conv_blocks.9.weight")),
    ("fastgan", {}, ("init.init.0.weight", "init.init.1.running_mean", "feat_8.1.weight", "feat_8.2.weight",
                     "feat_8.5.weight", "feat_16.2.running_var", "se_64.main.1.weight", "se_512.main.3.weight",
                     "feat_1024.1.weight", "to_big.weight")),
    ("styleswin", {}, ("layers.0.blocks.0.norm1.style.weight", "layers.3.blocks.1.qkv.bias",
                       "layers.1.blocks.1.attn.1.relative_position_bias_table", "layers.0.blocks.0.mlp.fc1.weight",
                       "layers.0.upsample.reduction.weight", "layers.5.upsample.alpha", "to_rgbs.6.bias")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "expected"), NAMES, ids=[f"{n}-{list(c)}" for n, c, _ in NAMES])
def test_names_are_the_published_ones(name: str, config: dict[str, Any], expected: tuple[str, ...]):
    with torch.device("meta"):
        state = registry.module("models", name).create(**config).state_dict()
    assert set(expected) <= set(state)


def test_cyclegan_without_the_statistics_of_old_torch_and_the_filters_of_cut(tmp_path: Path):
    config = {"width": 2, "blocks": 1}
    torch.manual_seed(0)
    module = registry.module("models", "cyclegan").create(**config)
    extra = {"model.2.running_mean": torch.zeros(2), "model.2.num_batches_tracked": torch.zeros(()),
             "model.10.conv_block.2.running_var": torch.ones(8)}  # fmt: skip
    loaded = load("cyclegan", saved(module.state_dict() | extra, tmp_path), config=config, input_shape=(3, 16, 16))
    assert weights.state_hash(loaded) == weights.state_hash(module)


def test_low_pass_enlargement_and_reduction_of_cut():
    cyclegan = registry.module("models", "cyclegan")
    ramp = torch.arange(12.0).expand(1, 2, 12, 12)
    assert torch.allclose(cyclegan.Downsample()(ramp)[:, :, :, 1:], ramp[:, :, ::2, 2::2])  # a line stays a line
    large = cyclegan.Upsample()(ramp)[0, 0, 5]
    assert large.shape == (24,)
    assert torch.allclose(large[3:-3].diff(), torch.full((17,), 0.5))
    assert float(large[11:13].mean()) == pytest.approx(5.5)  # centres stay where they are


def test_fastgan_with_spectral_norm_computes_the_same(tmp_path: Path):
    config = {"size": 32, "latent": 8, "width": 2}
    torch.manual_seed(0)
    plain = registry.module("models", "fastgan").create(**config)
    normed = registry.module("models", "fastgan").create(**config)
    for part in list(normed.modules()):
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.utils.spectral_norm(part)  # the older form, whose names the published checkpoints have
    z = torch.randn(2, 8)
    for _ in range(3):
        normed.train()(z)
    state = {f"module.{name}": tensor for name, tensor in normed.eval().state_dict().items()}
    state |= {"module.to_128.weight_orig": torch.ones(3, 2, 1, 1), "module.to_128.weight_u": torch.ones(3),
              "module.to_128.weight_v": torch.ones(2)}  # fmt: skip
    file = saved({"g": state, "d": {"x": torch.ones(1)}}, tmp_path)
    loaded = load("fastgan", file, config=config, input_shape=(1, 8))
    with torch.no_grad():
        assert torch.allclose(loaded(z), normed(z), atol=1e-5)
        assert not torch.allclose(loaded(z), plain.eval()(z), atol=1e-3)
    published = {name: tensor for name, tensor in state.items() if not name.endswith(".noise")}
    again = load("fastgan", saved({"g": published}, tmp_path), config=config, input_shape=(1, 8))
    assert float(again.feat_8[2].noise.std()) == pytest.approx(1, abs=0.3)


def test_folding_spectral_norm_in_closed_form():
    weight = torch.diag(torch.tensor([4.0, 2.0]))
    state = {"a.weight_orig": weight, "a.weight_u": torch.tensor([1.0, 0]), "a.weight_v": torch.tensor([1.0, 0])}
    assert torch.equal(_published.fold_spectral_norm(state)["a.weight"], weight / 4)
    assert set(_published.fold_spectral_norm({"a.weight_orig": weight})) == {"a.weight_orig"}  # not silently dropped


def test_styleswin_gains_go_into_the_weights(tmp_path: Path):
    config = {"widths": [16, 16], "style": STYLE, "layers": 1}
    torch.manual_seed(0)
    module = registry.module("models", "styleswin").create(**config)
    state = dict(module.state_dict())
    published = {"style.1.weight": state.pop("mapping.fc.0.weight") * 100 * math.sqrt(STYLE / 2),
                 "style.1.bias": state.pop("mapping.fc.0.bias"), "input.input": state.pop("const")}  # fmt: skip
    for name, tensor in state.items():
        if name.endswith("style.weight"):
            tensor = tensor * math.sqrt(STYLE)
        if match := re.fullmatch(r"to_rgbs\.(\d)\.(weight|bias)", name):
            published[f"to_rgbs.{match[1]}.conv.{match[2]}"] = tensor
            if match[2] == "bias":
                published[f"to_rgbs.{match[1]}.bias"] = torch.full((1, 3, 1, 1), 0.25)
        else:
            published[name] = tensor
    published["layers.1.blocks.0.attn_mask2"] = published["to_rgbs.0.upsample.kernel"] = torch.ones(2, 2)
    loaded = load("styleswin", saved({"g_ema": published}, tmp_path), config=config, input_shape=(1, STYLE))
    with torch.no_grad():
        for head in module.to_rgbs:
            head.bias += 0.25
    z = torch.randn(2, STYLE)
    with torch.no_grad():
        assert torch.allclose(loaded(z), module.eval()(z), atol=1e-5)


def test_styleswin_attends_inside_shifted_windows_only():
    attention = registry.module("models", "styleswin").WindowAttention(8, 16, 8, 2, 4).eval()
    q, k = torch.randn(1, 16, 16, 8), torch.randn(1, 16, 16, 8)
    v = torch.zeros(1, 16, 16, 8)
    v[:, :4, :4] = 1  # a corner: its shifted window holds what is beside it alone, not the opposite corner
    reached = attention(q, k, v)[0].abs().sum(-1) > 1e-6
    assert bool(reached[:4, :4].all()) and int(reached.sum()) == 16


def test_taesd_of_diffusers(tmp_path: Path):
    config = {"width": 4, "blocks": 1}
    torch.manual_seed(0)
    module = registry.module("models", "taesd").create(**config)
    state = {}
    for name, tensor in module.state_dict().items():
        number, rest = name.split(".", 1)
        state[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor
    loaded = load("taesd", saved(state | {"encoder.layers.0.weight": torch.ones(1)}, tmp_path), config=config)
    assert weights.state_hash(loaded) == weights.state_hash(module)


def test_ugatit_takes_one_generator_of_several(tmp_path: Path):
    config = {"width": 2, "blocks": 1, "light": True}
    torch.manual_seed(0)
    module = registry.module("models", "ugatit").create(**config)
    file = saved({"genA2B": module.state_dict(), "genB2A": {"x": torch.ones(1)}}, tmp_path)
    loaded = load("ugatit", file, config=config, input_shape=(3, 16, 16))
    assert weights.state_hash(loaded) == weights.state_hash(module)


def test_layer_instance_norm_in_closed_form():
    norm = mixed_norm.layer_instance_norm
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    alone = (x - x.mean((2, 3), keepdim=True)) / torch.sqrt(x.var((2, 3), keepdim=True) + 1e-5)
    together = (x - x.mean((1, 2, 3), keepdim=True)) / torch.sqrt(x.var((1, 2, 3), keepdim=True) + 1e-5)
    assert torch.allclose(norm(x, torch.tensor(1.0)), alone, atol=1e-6)
    assert torch.allclose(norm(x, torch.tensor(0.25)), 0.25 * alone + 0.75 * together, atol=1e-6)


@pytest.mark.parametrize("name", ["animegan", "cyclegan", "fastgan", "mobile_stylegan", "stylegan2", "taesd"])
def test_a_checkpoint_of_something_else_is_one_line_with_the_missing_names(name: str, tmp_path: Path):
    tiny = {"stylegan2": TINY, "mobile_stylegan": {"widths": [8, 4], "latent": 8, "style": 8, "layers": 1},
            "fastgan": {"size": 32, "latent": 4, "width": 1}, "taesd": {"width": 4, "blocks": 1}}  # fmt: skip
    with pytest.raises(ModelError) as caught:
        load(name, saved({"features.0.weight": torch.ones(2, 2)}, tmp_path), config=tiny.get(name, {}))
    text = str(caught.value)
    assert "missing" in text and "unexpected [features.0.weight]" in text and "\n" not in text


def test_half_of_a_layer_is_named_as_missing(tmp_path: Path):
    state = rosinality()
    del state["convs.2.conv.weight"]
    with pytest.raises(ModelError, match=r"1 missing \[synthesis\.b16\.conv0\.conv\.weight\]"):
        load("stylegan2", saved({"g_ema": state}, tmp_path), config=TINY)


# ------------------------------------------------------------------------------------------------- real weights


@needs_assets
def test_the_conditional_gan_draws_the_digit_that_is_asked_for():
    from edgegen.nn import encoders

    file = ASSETS / "cwgan-mnist.pth"
    module = load("cgan", file)
    digits = torch.arange(10).repeat_interleave(12)
    z = torch.randn(120, 10, generator=torch.Generator().manual_seed(0))
    images = module(torch.cat((z, F.one_hot(digits, 10).float()), 1))
    found = encoders.create("mnist").classify(F.pad((images + 1) / 2, (2, 2, 2, 2))).argmax(1)
    right = float((found == digits).float().mean())
    assert right > 0.3  # the weights are weak (0.44 seen with 200 images); chance is 0.1, as without the class:
    assert float((found == digits.flip(0)).float().mean()) < 0.5 * right
    indexed = registry.module("models", "cgan").create(label="index").eval()
    weights.load_into(indexed, weights.read_state(file), str(file))
    assert torch.allclose(indexed(z[:2], digits[:2]), images[:2], atol=1e-5)


@needs_assets
def test_rlfn_is_clearly_better_than_bicubic():
    from PIL import Image

    photo = np.asarray(Image.open(sorted((ASSETS / "kodak24").glob("*.png"))[4]).convert("RGB"))[:256, :256]
    low = np.asarray(Image.fromarray(photo).resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    bicubic = np.asarray(Image.fromarray(low.astype(np.uint8)).resize((256, 256), Image.Resampling.BICUBIC), np.float32)
    module = load("rlfn", ASSETS / "rlfn-x4.pth", input_shape=(3, 64, 64))
    with torch.no_grad():
        made = module(torch.from_numpy(low).permute(2, 0, 1)[None])[0].permute(1, 2, 0).clamp(0, 255).numpy()
    better, worse = (float(10 * np.log10(255**2 / np.square(x - photo).mean())) for x in (made, bicubic))
    assert better > worse + 0.7  # dB


@needs_assets
def test_a_real_decoder_loads_by_the_names_of_taesd():
    module = load("taesd", ASSETS / "taef2-decoder.pth", config={"latent": 32, "pooled": True})
    with torch.no_grad():
        image = module(torch.zeros(1, 32, 8, 8))
    assert image.shape == (1, 3, 64, 64) and 0 < float(image.mean()) < 1


@needs_assets
def test_a_dcgan_of_another_shape_draws_most_digits():
    from edgegen.nn import encoders

    config = {"kernels": [3, 4, 3, 4], "strides": [2, 1, 2, 2], "paddings": [0, 0, 0, 0], "bias": True}
    module = load("dcgan", ASSETS / "dcgan-mnist" / "dcgan_generator.pth", config=config)
    with torch.no_grad():
        images = module(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (200, 1, 28, 28)
    sure, digit = encoders.create("mnist").classify(F.pad((images + 1) / 2, (2, 2, 2, 2))).softmax(1).max(1)
    assert float(sure.median()) > 0.8 and len(digit.unique()) >= 7
