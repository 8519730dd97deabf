"""Checkpoints in public layouts load under their own names, and the network computes what the published code does.

The references below are written from the papers' formulas on the published names, with weights as the checkpoints have
them; none is taken from the repositories.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edgegen import loading, registry, weights  # noqa: E402
from edgegen.errors import ModelError  # noqa: E402
from edgegen.models import _published  # noqa: E402
from edgegen.nn import mixed_norm  # noqa: E402
from edgegen.records import ModelOptions  # noqa: E402

ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="../shared/assets is not here")
STYLE, SIZE, WIDTH = 12, 16, 6


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load(name: str, file: Path, **options: Any) -> nn.Module:
    return loading.load_model(name, weights=file, options=ModelOptions(**options)).stage.module


def saved(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


# --------------------------------------------------------------------------------------------------- StyleGAN2


def rosinality() -> dict[str, Tensor]:
    """g_ema of rosinality/stylegan2-pytorch for 16 pixels, one width, two mapping layers."""
    shapes: dict[str, tuple[int, ...]] = {"input.input": (1, WIDTH, 4, 4)}
    for i in (1, 2):
        shapes |= {f"style.{i}.weight": (STYLE, STYLE), f"style.{i}.bias": (STYLE,)}
    heads = [(place, 3, 1) for place in ("to_rgb1", "to_rgbs.0", "to_rgbs.1")]
    for place, outputs, kernel in [("conv1", WIDTH, 3), *((f"convs.{i}", WIDTH, 3) for i in range(4)), *heads]:
        shapes |= {f"{place}.conv.weight": (1, outputs, WIDTH, kernel, kernel),
                   f"{place}.conv.modulation.weight": (WIDTH, STYLE), f"{place}.conv.modulation.bias": (WIDTH,)}
        if kernel == 3:
            shapes |= {f"{place}.noise.weight": (1,), f"{place}.activate.bias": (WIDTH,)}
        else:
            shapes |= {f"{place}.bias": (1, 3, 1, 1)}
        if place in ("convs.0", "convs.2"):
            shapes[f"{place}.conv.blur.kernel"] = (4, 4)
    shapes |= {f"to_rgbs.{i}.upsample.kernel": (4, 4) for i in (0, 1)}
    shapes |= {f"noises.noise_{i}": (1, 1, r, r) for i, r in enumerate((4, 8, 8, 16, 16))}
    state = drawn(shapes)
    for i in (1, 2):
        state[f"style.{i}.weight"] *= 100  # stored divided by the learning rate multiplier
    return state


def as_nvidia(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as G_ema.state_dict() of stylegan2-ada-pytorch."""
    result = {"synthesis.b4.const": state["input.input"][0], "mapping.w_avg": torch.zeros(STYLE)}
    result |= {f"mapping.fc{i}.{end}": state[f"style.{i + 1}.{end}"] for i in (0, 1) for end in ("weight", "bias")}
    places = {"conv1": "b4.conv1", "convs.0": "b8.conv0", "convs.1": "b8.conv1", "convs.2": "b16.conv0",
              "convs.3": "b16.conv1"}  # fmt: skip
    for i, (old, new) in enumerate(places.items()):
        part = {"weight": state[f"{old}.conv.weight"][0], "bias": state[f"{old}.activate.bias"],
                "affine.weight": state[f"{old}.conv.modulation.weight"],
                "affine.bias": state[f"{old}.conv.modulation.bias"],
                "noise_strength": state[f"{old}.noise.weight"][0], "noise_const": state[f"noises.noise_{i}"][0, 0],
                "resample_filter": torch.ones(4, 4)}  # fmt: skip
        result |= {f"synthesis.{new}.{name}": tensor for name, tensor in part.items()}
    for old, new in {"to_rgb1": "b4", "to_rgbs.0": "b8", "to_rgbs.1": "b16"}.items():
        part = {"weight": state[f"{old}.conv.weight"][0], "bias": state[f"{old}.bias"].reshape(-1),
                "affine.weight": state[f"{old}.conv.modulation.weight"],
                "affine.bias": state[f"{old}.conv.modulation.bias"]}  # fmt: skip
        result |= {f"synthesis.{new}.torgb.{name}": tensor for name, tensor in part.items()}
    return result


def equal_linear(state: dict[str, Tensor], place: str, x: Tensor, rate: float = 1.0) -> Tensor:
    weight, bias = state[f"{place}.weight"], state[f"{place}.bias"]
    return F.linear(x, weight * (rate / math.sqrt(weight.shape[1])), bias * rate)


def resampled(x: Tensor, up: int, pad: tuple[int, int]) -> Tensor:
    """Zeros between pixels, padding, and the 1-3-3-1 low-pass filter: StyleGAN2's upfirdn."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = row[:, None] * row / 64 * 4
    n, c, h, w = x.shape
    wide = torch.zeros(n, c, h * up, w * up)
    wide[:, :, ::up, ::up] = x
    padded = F.pad(wide, (pad[0], pad[1], pad[0], pad[1]))
    return F.conv2d(padded, kernel.flip(0, 1).expand(c, 1, 4, 4), groups=c)


def modulated(state: dict[str, Tensor], place: str, x: Tensor, w: Tensor, up: bool, demodulate: bool = True) -> Tensor:
    """One image: the kernel itself is scaled by style and norm, as the paper writes it."""
    weight = state[f"{place}.weight"][0] / math.sqrt(state[f"{place}.weight"][0, 0].numel())
    weight = weight * equal_linear(state, f"{place}.modulation", w)[0][None, :, None, None]
    if demodulate:
        weight = weight / torch.sqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8)
    if up:
        return resampled(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, (1, 1))
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def stylegan2(state: dict[str, Tensor], z: Tensor, truncation: float = 1.0, mean: Tensor | float = 0.0) -> Tensor:
    """Image of one latent, from the published weights."""
    w = z / torch.sqrt(z.square().mean(1, keepdim=True) + 1e-8)
    for i in (1, 2):
        w = math.sqrt(2) * F.leaky_relu(equal_linear(state, f"style.{i}", w, 0.01), 0.2)
    w = mean + truncation * (w - mean)

    def styled(place: str, x: Tensor, number: int, up: bool) -> Tensor:
        y = modulated(state, f"{place}.conv", x, w, up)
        y = y + state[f"{place}.noise.weight"] * state[f"noises.noise_{number}"]
        return math.sqrt(2) * F.leaky_relu(y + state[f"{place}.activate.bias"][None, :, None, None], 0.2)

    x = styled("conv1", state["input.input"], 0, False)
    image = modulated(state, "to_rgb1.conv", x, w, False, demodulate=False) + state["to_rgb1.bias"]
    for i in (0, 1):
        x = styled(f"convs.{2 * i}", x, 2 * i + 1, True)
        x = styled(f"convs.{2 * i + 1}", x, 2 * i + 2, False)
        part = modulated(state, f"to_rgbs.{i}.conv", x, w, False, demodulate=False) + state[f"to_rgbs.{i}.bias"]
        image = resampled(image, 2, (2, 1)) + part
    return image


TINY = {"size": SIZE, "width": WIDTH, "latent": STYLE, "style": STYLE, "layers": 2}


@pytest.mark.parametrize("layout", ["rosinality", "nvidia"])
def test_stylegan2_computes_what_its_checkpoint_means(layout: str, tmp_path: Path):
    state, z = rosinality(), torch.randn(1, STYLE, generator=torch.Generator().manual_seed(5))
    content = {"g_ema": state, "g": drawn({"other": (1,)})} if layout == "rosinality" else as_nvidia(state)
    file = saved(content, tmp_path)
    module, wanted = load("stylegan2", file, config=TINY), stylegan2(state, z)
    with torch.no_grad():
        found = module(z)
        assert torch.allclose(found, wanted, atol=2e-4 * float(wanted.abs().max()))
        assert not torch.allclose(found, 1.01 * wanted, atol=2e-4 * float(wanted.abs().max()))
        again = load("stylegan2", file, config={**TINY, "part": "synthesis"})
        assert torch.allclose(again(module.mapping(z)), found, atol=1e-5)


def test_stylegan2_truncation_takes_the_average_or_makes_it(tmp_path: Path):
    state, z = rosinality(), torch.randn(1, STYLE, generator=torch.Generator().manual_seed(5))
    nvidia = as_nvidia(state)
    nvidia["mapping.w_avg"] = torch.linspace(-1, 1, STYLE)
    module = load("stylegan2", saved(nvidia, tmp_path), config={**TINY, "truncation": 0.5})
    wanted = stylegan2(state, z, 0.5, nvidia["mapping.w_avg"])
    with torch.no_grad():
        assert torch.allclose(module(z), wanted, atol=2e-4 * float(wanted.abs().max()))
        made = load("stylegan2", saved({"g_ema": state}, tmp_path), config={**TINY, "truncation": 0.5}).mapping
        full = load("stylegan2", saved({"g_ema": state}, tmp_path), config=TINY).mapping
        mean = full(torch.randn(20_000, STYLE, generator=torch.Generator().manual_seed(1))).mean(0)
    assert torch.allclose(made.average, mean, atol=0.06)  # 4,096 latents: 1 / 64 of a style's spread


def test_own_names_load_as_they_are(tmp_path: Path):
    torch.manual_seed(0)
    module = registry.module("models", "stylegan2").create(**TINY)
    weights.save_state(module, tmp_path / "own.safetensors")
    again = load("stylegan2", tmp_path / "own.safetensors", config=TINY)
    assert weights.state_hash(again) == weights.state_hash(module.float())


# ----------------------------------------------------------------------------------------------- MobileStyleGAN


def mobile(widths: tuple[int, ...]) -> dict[str, Tensor]:
    """A distiller's checkpoint of bes-dev/MobileStyleGAN.pytorch."""
    shapes: dict[str, tuple[int, ...]] = {"input.input": (1, widths[0], 4, 4), "device_info": (1,)}

    def conv(place: str, inputs: int, outputs: int, deep: bool, head: bool = False) -> None:
        stem = f"{place}.conv."
        shapes.update({f"{stem}modulation.weight": (inputs, STYLE), f"{stem}modulation.bias": (inputs,)})
        if deep:
            shapes.update({f"{stem}weight_dw": (inputs, 1, 3, 3), f"{stem}weight_permute": (outputs, inputs, 1, 1)})
        else:
            shapes[f"{stem}weight"] = (outputs, inputs, *((1, 1) if head else (3, 3)))
        shapes[f"{place}.bias"] = (1, outputs, 1, 1)
        if not head:
            shapes[f"{place}.noise.weight"] = (1,)

    conv("conv1", widths[0], widths[0], False)
    shapes["conv1.conv.style_inv"] = (1, 1, widths[0], 1, 1)
    conv("to_img1", widths[0], 12, False, True)
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):  # noqa: RUF007
        conv(f"layers.{i}.conv1", inputs // 4, outputs, True)
        conv(f"layers.{i}.conv2", outputs, outputs, True)
        conv(f"layers.{i}.to_img", outputs, 12, False, True)
    state = {f"student.{name}": tensor for name, tensor in drawn(shapes).items()}
    for i in (1, 2):
        made = drawn({"weight": (STYLE, STYLE), "bias": (STYLE,)}, i)
        state |= {f"mapping_net.layers.{i}.weight": 100 * made["weight"], f"mapping_net.layers.{i}.bias": made["bias"]}
    return state


def inverse_haar(low: Tensor, bands: Tensor) -> Tensor:
    """low (1, C, H, W), bands (1, C, 3, H, W): pixel = (low +- rows +- columns +- both) / 2."""
    rows, columns, both = bands.unbind(2)
    out = torch.zeros(1, low.shape[1], 2 * low.shape[2], 2 * low.shape[3])
    for y in (0, 1):
        for x in (0, 1):
            a, b = (1 - 2 * y), (1 - 2 * x)
            out[:, :, y::2, x::2] = (low + a * rows + b * columns + a * b * both) / 2
    return out


def mobile_stylegan(state: dict[str, Tensor], z: Tensor, noises: dict[str, Tensor], layers: int) -> Tensor:
    """Image of one latent, from the published weights and given noise."""
    w = z / torch.sqrt(z.square().mean(1, keepdim=True) + 1e-8)
    for i in (1, 2):
        w = math.sqrt(2) * F.leaky_relu(equal_linear(state, f"mapping_net.layers.{i}", w, 0.01), 0.2)
    state = {name.removeprefix("student."): tensor for name, tensor in state.items()}

    def styled(place: str, x: Tensor) -> Tensor:
        s = F.linear(w, state[f"{place}.conv.modulation.weight"], state[f"{place}.conv.modulation.bias"])
        if f"{place}.conv.weight_dw" in state:
            s = torch.tanh(s)
            kernel = state[f"{place}.conv.weight_dw"].transpose(0, 1) * state[f"{place}.conv.weight_permute"]
            whole = kernel
        else:
            kernel = state[f"{place}.conv.weight"]
            whole = kernel * state[f"{place}.conv.style_inv"][0]
        scale = 1 / math.sqrt(kernel[0].numel())
        norm = torch.rsqrt((scale * whole).square().sum((1, 2, 3)) + 1e-8)
        y = F.conv2d(scale * s[:, :, None, None] * x, kernel, padding=1) * norm[None, :, None, None]
        return F.leaky_relu(y + state[f"{place}.noise.weight"] * noises[place] + state[f"{place}.bias"], 0.2)

    x = styled("conv1", state["input.input"])
    for i in range(layers):
        quarter = x.shape[1] // 4
        bands = torch.stack([x[:, k * quarter : (k + 1) * quarter] for k in (1, 2, 3)], 2)
        x = styled(f"layers.{i}.conv2", styled(f"layers.{i}.conv1", inverse_haar(x[:, :quarter], bands)))
    place = f"layers.{layers - 1}.to_img"
    s = F.linear(w, state[f"{place}.conv.modulation.weight"], state[f"{place}.conv.modulation.bias"])
    head = state[f"{place}.conv.weight"]
    y = F.conv2d(x * s[:, :, None, None] / math.sqrt(head.shape[1]), head) + state[f"{place}.bias"]
    return inverse_haar(y[:, :3], y[:, 3:].reshape(1, 3, 3, *y.shape[2:]))


def test_mobile_stylegan_computes_what_its_checkpoint_means(tmp_path: Path):
    widths = (8, 12, 4)
    state, z = mobile(widths), torch.randn(1, STYLE, generator=torch.Generator().manual_seed(5))
    config = {"widths": list(widths), "latent": STYLE, "style": STYLE, "layers": 2}
    module = load("mobile_stylegan", saved({"state_dict": state}, tmp_path), config=config)
    body = module.synthesis
    noises = {"conv1": body.conv1.noise}
    for i, layer in enumerate(body.layers):
        noises |= {f"layers.{i}.conv1": layer.conv1.noise, f"layers.{i}.conv2": layer.conv2.noise}
    with torch.no_grad():
        wanted, found = mobile_stylegan(state, z, noises, 2), module(z)
    assert found.shape == (1, 3, 32, 32)
    assert torch.allclose(found, wanted, atol=2e-4 * float(wanted.abs().max()))
    assert not torch.allclose(found, wanted.flip(2), atol=1e-2 * float(wanted.abs().max()))


def test_mobile_stylegan_of_the_first_version_says_what_it_needs(tmp_path: Path):
    state = mobile((8, 12, 4))
    state |= {f"student.layers.{i}.up.modulation.{end}": torch.ones(shape) for i, w in enumerate((8, 12))
              for end, shape in (("weight", (w, STYLE)), ("bias", (w,)))}  # fmt: skip
    config = {"widths": [8, 12, 4], "latent": STYLE, "style": STYLE, "layers": 2}
    with pytest.raises(ModelError, match=r"unexpected .*up\.affine"):
        load("mobile_stylegan", saved(state, tmp_path), config=config)
    module = load("mobile_stylegan", saved(state, tmp_path), config={**config, "modulated_up": True})
    assert torch.equal(module.synthesis.layers[1].up.affine.bias, torch.ones(12))


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
