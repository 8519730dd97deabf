"""Published checkpoints of StyleGAN2 and MobileStyleGAN load, and the network computes what they mean.

The references below are written from the papers' formulas on the published names, with weights as the checkpoints have
them; none is taken from the repositories.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from published_checkpoints import STYLE, TINY, drawn, load, rosinality, saved  # noqa: E402
from torch import Tensor  # noqa: E402

from edgegen import registry, weights  # noqa: E402
from edgegen.errors import ModelError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
