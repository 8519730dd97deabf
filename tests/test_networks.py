"""The networks of benchmarks/networks: real weights fit them strictly and they do what their source says they do."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import prepare_data  # noqa: E402

NETWORKS = Path(__file__).parents[1] / "benchmarks" / "networks"
ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"
FACTORIES = {
    "style": ("style",),
    "taef2": ("decoder", "encoder"),
    "resnet_cifar": ("resnet20", "resnet56"),
    "mobilenet_v2": ("mobilenet_v2",),
    "rlfn": ("rlfn",),
    "vit_mnist": ("vit_mnist",),
}
CASES = [(file, factory) for file, factories in FACTORIES.items() for factory in factories]
WEIGHTS = {
    "style": "style-mosaic.safetensors",
    "mobilenet_v2": "mobilenet_v2-imagenet.safetensors",
    "rlfn": "rlfn-x4.pth",
    "decoder": "taef2-decoder.pth",
    "encoder": "taef2-encoder.pth",
    "resnet20": "resnet20-cifar10.th",
    "resnet56": "resnet56-cifar10.th",
    "vit_mnist": "vit-mnist.pth",
}
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="../shared/assets is not here")


def record(file: str, factory: str) -> dict:
    """RECORD, or the factory's entry of RECORDS, read as a literal without importing the file."""
    tree = ast.parse((NETWORKS / f"{file}.py").read_text(encoding="utf-8"))
    found = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return ast.literal_eval(found["RECORD"]) if "RECORD" in found else ast.literal_eval(found["RECORDS"])[factory]


def create(file: str, factory: str, **sizes: int) -> torch.nn.Module:
    """A network in eval mode with seeded weights."""
    torch.manual_seed(0)
    return getattr(prepare_data.network_module(file), factory)(**sizes).eval()


def trained(file: str, factory: str) -> torch.nn.Module:
    """A network with its real weights, under its own names where they are published under others; every key matches."""
    path = ASSETS / WEIGHTS[factory]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = {k.removeprefix("module."): v.float() for k, v in state.get("state_dict", state).items()}
    if convert := getattr(prepare_data.network_module(file), "from_published", None):
        state = convert(state)
    module = create(file, factory)
    module.load_state_dict(state, strict=True)
    return module


def psnr(a: np.ndarray, b: np.ndarray, top: float) -> float:
    """dB between images in 0..top."""
    return float(20 * np.log10(top / np.sqrt(np.mean((a.astype(np.float64) - b) ** 2))))


def tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (1, 3, H, W) in 0..255."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()


def image(output: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) -> float32 (H, W, 3)."""
    return output[0].permute(1, 2, 0).numpy()


def photos(count: int) -> list[Path]:
    """Evenly spread photos of the assets."""
    files = sorted((ASSETS / "photos").glob("*.jpg"))
    return files[:: len(files) // count][:count]


@pytest.fixture(autouse=True)
def _one_thread_no_gradients():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("file", "factory"), [case for case in CASES if case[1] != "encoder"])
def test_record_states_the_shapes_that_the_network_has(file, factory):
    stated = record(file, factory)
    shape = tuple(stated["output"]["shape"])
    assert create(file, factory)(torch.rand(stated["input"]["shape"])).shape == shape
    assert stated["licence"] and stated["source"]


@needs_assets
@pytest.mark.parametrize(("file", "factory"), CASES)
def test_weights_load_with_every_key(file, factory):
    module = trained(file, factory)
    some = next(iter(module.parameters()))
    assert torch.isfinite(some).all() and float(some.detach().abs().sum()) > 0


def test_option_a_shortcut_equals_slice_and_pad():
    shortcut = prepare_data.network_module("resnet_cifar").Shortcut(4, 8)
    x = torch.randn(2, 4, 6, 6)
    expected = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(shortcut(x), expected)
    assert not torch.equal(shortcut(2 * x), expected)


def test_option_a_shortcut_appears_in_the_state_only_once_it_is_changed():
    module = create("resnet_cifar", "resnet20")
    key = "layer2.0.shortcut.weight"
    assert key not in module.state_dict()
    module.layer2[0].shortcut.weight.mul_(2)
    assert torch.equal(module.state_dict()[key], module.layer2[0].shortcut.weight)
    other = create("resnet_cifar", "resnet20")
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.layer2[0].shortcut.weight, module.layer2[0].shortcut.weight)


def test_pruned_resnet_is_rebuilt_from_its_description():
    pruning = pytest.importorskip("torch_pruning")
    from edgegen import architecture, weights

    module, x = create("resnet_cifar", "resnet20"), torch.rand(1, 3, 32, 32)
    with torch.enable_grad():
        importance = pruning.importance.GroupMagnitudeImportance()
        pruning.pruner.BasePruner(module, x, importance, pruning_ratio=0.5, ignored_layers=[module.linear]).step()
    description = architecture.describe(module, create("resnet_cifar", "resnet20"))
    again = architecture.rebuild(create("resnet_cifar", "resnet20"), description)
    weights.load_into(again, module.state_dict(), "the pruned network")
    assert torch.equal(again(x), module(x)) and again.layer2[0].shortcut.weight.shape == (16, 8, 1, 1)


def test_a_trained_resnet_comes_back_though_its_shortcuts_were_not_in_the_state_before():
    from edgegen import architecture, weights
    from edgegen.errors import ModelError

    module, x = create("resnet_cifar", "resnet20"), torch.rand(1, 3, 32, 32)
    module.layer2[0].shortcut.weight.mul_(1.5)
    description = architecture.describe(module, create("resnet_cifar", "resnet20"))
    again = architecture.rebuild(create("resnet_cifar", "resnet20"), description)
    weights.load_into(again, module.state_dict(), "the trained network")
    assert torch.equal(again(x), module(x))
    with pytest.raises(ModelError, match="unexpected"):
        weights.load_into(again, {**module.state_dict(), "layer9.weight": torch.zeros(1)}, "another network")


def test_same_padding_at_stride_two_is_right_and_bottom_only():
    conv = prepare_data.network_module("mobilenet_v2").ConvReLU6(1, 1, 3, 2)
    conv.conv.weight.zero_()
    conv.conv.weight[0, 0, 0, 0] = 1.0  # picks the upper left pixel of each window: with no padding there, pixel (0, 0)
    conv.conv.bias.zero_()
    x = torch.arange(16.0).reshape(1, 1, 4, 4) / 3
    assert torch.equal(conv(x), torch.nn.functional.relu6(x[:, :, ::2, ::2]))


@pytest.mark.parametrize(("file", "factory", "size"), [
    ("style", "style", (3, 32, 32)), ("taef2", "decoder", (32, 4, 4)), ("resnet_cifar", "resnet20", (3, 32, 32)),
    ("mobilenet_v2", "mobilenet_v2", (3, 64, 64)), ("rlfn", "rlfn", (3, 24, 24)),
])
def test_torch_pruning_follows_every_channel(file, factory, size):
    pruning = pytest.importorskip("torch_pruning")
    module, x = create(file, factory), torch.rand(1, *size)
    last = [layer for layer in module.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    final = module.upsampler[0] if file == "rlfn" else last[-1]
    before, shape = sum(p.numel() for p in module.parameters()), module(x).shape
    with torch.enable_grad():
        importance = pruning.importance.GroupMagnitudeImportance()
        pruning.pruner.BasePruner(module, x, importance, pruning_ratio=0.5, ignored_layers=[final]).step()
    assert module(x).shape == shape
    assert sum(p.numel() for p in module.parameters()) < 0.45 * before


@needs_assets
def test_style_keeps_the_range_and_paints():
    photo = prepare_data.centre(photos(1)[0], 128, 128)
    painted = image(trained("style", "style")(tensor(photo)))
    assert painted.min() >= 0 and painted.max() <= 255 and painted.std() > 30
    assert 5 < psnr(painted, photo, 255) < 20  # another picture, yet not noise


@needs_assets
def test_taef2_round_trip():
    encoder, decoder = trained("taef2", "encoder"), trained("taef2", "decoder")
    figures = []
    for file in photos(4):
        photo = prepare_data.centre(file, 256, 256)
        figures.append(psnr(image(decoder(encoder(tensor(photo) / 255)).clamp(0, 1)) * 255, photo, 255))
    assert 27 < np.mean(figures) < 33  # 29.6 dB over all photos


@needs_assets
@pytest.mark.parametrize(("factory", "least"), [("resnet20", 0.89), ("resnet56", 0.90)])
def test_resnets_know_cifar(factory, least):
    with np.load(ASSETS / "cifar10-test.npz", allow_pickle=False) as test:
        x, y = test["x"][:500], test["y"][:500]
    spec = record("resnet_cifar", factory)["input"]
    mean, std = (np.array(spec[name], np.float32) for name in ("mean", "std"))
    logits = trained("resnet_cifar", factory)(torch.from_numpy(((x / 255 - mean) / std).transpose(0, 3, 1, 2)).float())
    assert (logits.argmax(1).numpy() == y).mean() > least  # 91.73% and 93.39% on the full test set


@needs_assets
def test_vit_knows_digits():
    network = trained("vit_mnist", "vit_mnist")
    with np.load(ASSETS / "mnist-test.npz", allow_pickle=False) as test:
        x, y = test["x"][:1000], test["y"][:1000]
    images = torch.from_numpy((x / 255 - 0.1307) / 0.3081).permute(0, 3, 1, 2).float()
    assert (network(images).argmax(1).numpy() == y).mean() > 0.97  # 98.1% on the full test set


@needs_assets
def test_mobilenet_output_is_the_imagenet_class():
    network, right = trained("mobilenet_v2", "mobilenet_v2"), 0
    for file in photos(20):
        x = (tensor(prepare_data.centre(file, 224, 256)) - 127.5) / 127.5
        right += int(network(x).argmax()) == int(file.name[:4])
    assert right >= 14  # 88% of all photos


@needs_assets
def test_rlfn_beats_bicubic_by_two_decibels():
    from PIL import Image

    network, gain = trained("rlfn", "rlfn"), []
    for file in photos(4):
        photo = prepare_data.centre(file, 256, 256)
        small = Image.fromarray(photo).resize((64, 64), Image.Resampling.BICUBIC)
        bicubic = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC))
        ours = image(network(tensor(np.asarray(small))).clamp(0, 255))
        gain.append(psnr(ours, photo, 255) - psnr(bicubic, photo, 255))
    assert np.mean(gain) > 1.5  # 28.05 against 25.53 dB on 20 photos


@needs_assets
def test_photos_are_split_without_overlap():
    parts = prepare_data.split_photos(ASSETS)
    assert len(parts["train"]) == 400 and len(parts["eval"]) == 100
    assert not set(parts["train"]) & set(parts["eval"])


def test_missing_assets_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="--assets"):
        prepare_data.make("cifar", tmp_path / "absent", tmp_path)
    assert not list(tmp_path.iterdir())


def test_by_hand_ratio_and_psnr_follow_what_was_measured():
    by_hand = pytest.importorskip("by_hand", reason="needs the packages of the comparison")
    from by_hand_networks import psnr as decibels

    slow, fast = [[2.0, 2.2, 9.0], [2.0, 2.1, 2.0]], [[1.0, 1.1, 1.0], [1.0, 1.0, 8.0]]
    found = by_hand.ratio(slow, fast)
    assert found["low"] <= found["value"] <= found["high"] and found["value"] == pytest.approx(2.1, abs=0.11)
    black = np.zeros((2, 3, 4, 4), np.float32)
    assert decibels(black, black + 25.5, 255.0) == pytest.approx(20.0)
    assert decibels(black, black + 51.0, 255.0) < 15 and decibels(black, black, 255.0) == 100.0
