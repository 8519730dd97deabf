"""What the by-hand comparison knows of each network: how to make it, its inputs, and how its outputs are judged.

Inputs come from benchmarks/prepare_data.py: calibration and evaluation never share an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from prepare_data import centre, network_module

if TYPE_CHECKING:
    from torch import nn

IMAGENET = (np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32))


@dataclass(frozen=True)
class Inputs:
    """calibration (N, ...) and evaluation (M, ...) float32 as the network takes them; labels int64 (M,) and references
    (M, C, H, W) in the output's range, or None."""

    calibration: np.ndarray
    evaluation: np.ndarray
    labels: np.ndarray | None = None
    references: np.ndarray | None = None


@dataclass(frozen=True)
class Network:
    """make(assets) -> trained module in eval mode; inputs(data, assets, calibration images, evaluation images); top of
    the output's value range (0: logits)."""

    make: Callable[[Path], nn.Module]
    inputs: Callable[[Path, Path, int, int], Inputs]
    calibration: int
    top: float = 0.0


def _trained(file: str, factory: str, weights: str) -> Callable[[Path], nn.Module]:
    def make(assets: Path) -> nn.Module:
        import torch
        from safetensors.torch import load_file

        path = assets / weights
        plain = path.suffix == ".safetensors"
        state = load_file(path) if plain else torch.load(path, map_location="cpu", weights_only=True)
        state = {k.removeprefix("module."): v.float() for k, v in state.get("state_dict", state).items()}
        module = getattr(network_module(file), factory)()
        module.load_state_dict(state, strict=True)
        return module.eval()

    return make


def _untrained(name: str) -> Callable[[Path], nn.Module]:
    """A timm network for timing alone. Its norms and layer scales are randomised: timm's zeros and 1e-5 in residual
    branches let compilers fold whole branches away."""

    def make(assets: Path) -> nn.Module:
        import timm
        import torch

        torch.manual_seed(0)
        module = timm.create_model(name, pretrained=False).eval()
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if parameter.dim() == 1 and not key.endswith("bias"):
                    parameter.uniform_(0.5, 1.5)
        return module

    return make


def _images(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.float32)


def _load(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["x"][:count], file["y"][:count]


def _cifar(data: Path, assets: Path, calibration: int, evaluation: int) -> Inputs:
    def normal(x: np.ndarray) -> np.ndarray:
        return _images((x.astype(np.float32) / 255 - IMAGENET[0]) / IMAGENET[1])

    x, y = _load(data / "cifar" / "test.npz", evaluation)
    return Inputs(normal(_load(data / "cifar" / "calibration.npz", calibration)[0]), normal(x), labels=y)


def _imagenet(mean: np.ndarray, std: np.ndarray) -> Callable[[Path, Path, int, int], Inputs]:
    def inputs(data: Path, assets: Path, calibration: int, evaluation: int) -> Inputs:
        def normal(x: np.ndarray) -> np.ndarray:
            return _images((x.astype(np.float32) / 255 - mean) / std)

        x, y = _load(data / "imagenet" / "eval.npz", evaluation)
        return Inputs(normal(_spread(data / "imagenet" / "train.npz", calibration)), normal(x), labels=y)

    return inputs


def _spread(path: Path, count: int) -> np.ndarray:
    """`count` images evenly spread over a file that is in class order."""
    with np.load(path, allow_pickle=False) as file:
        x = file["x"]
    return x[np.linspace(0, len(x) - 1, min(count, len(x))).astype(int)]


def _photos(data: Path, part: str, count: int) -> list[Path]:
    files = sorted((data / "photos" / part).iterdir())
    return [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]


def _style(data: Path, assets: Path, calibration: int, evaluation: int) -> Inputs:
    parts = (_photos(data, "train", calibration), _photos(data, "eval", evaluation))
    return Inputs(*(_images(np.stack([centre(file, 256, 256) for file in files])) for files in parts))


def _taef2(data: Path, assets: Path, calibration: int, evaluation: int) -> Inputs:
    x, y = _load(data / "taef2" / "eval.npz", evaluation)
    return Inputs(_spread(data / "taef2" / "train.npz", calibration), x, references=_images(y) / 255)


def _super_resolution(data: Path, assets: Path, calibration: int, evaluation: int) -> Inputs:
    """Calibration: photos at 128. Evaluation: kodak24, centre 512 and its antialiased reduction to 128."""
    small = np.stack([centre(file, 128, 128) for file in _photos(data, "train", calibration)])
    large = [centre(file, 512, 512) for file in sorted((assets / "kodak24").glob("*.png"))[:evaluation]]
    reduced = [np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC)) for image in large]
    return Inputs(_images(small), _images(np.stack(reduced)), references=_images(np.stack(large)))


_HALF = np.array([0.5, 0.5, 0.5], np.float32)
NETWORKS = {
    "resnet20": Network(_trained("resnet_cifar", "resnet20", "resnet20-cifar10.th"), _cifar, 300),
    "resnet56": Network(_trained("resnet_cifar", "resnet56", "resnet56-cifar10.th"), _cifar, 300),
    "style-mosaic": Network(_trained("style", "style", "style-mosaic.safetensors"), _style, 100, 255.0),
    "taef2-decoder": Network(_trained("taef2", "decoder", "taef2-decoder.pth"), _taef2, 100, 1.0),
    "rlfn": Network(_trained("rlfn", "rlfn", "rlfn-x4.pth"), _super_resolution, 100, 255.0),
    "mobilenet_v2": Network(
        _trained("mobilenet_v2", "mobilenet_v2", "mobilenet_v2-imagenet.safetensors"), _imagenet(_HALF, _HALF), 100
    ),
    "efficientformer_l1": Network(_untrained("efficientformer_l1"), _imagenet(*IMAGENET), 100),
    "deit_tiny": Network(_untrained("deit_tiny_patch16_224"), _imagenet(*IMAGENET), 100),
}
RANDOM_WEIGHTS = ("efficientformer_l1", "deit_tiny")


def psnr(reference: np.ndarray, candidate: np.ndarray, top: float) -> float:
    """Mean over images of the dB between (N, C, H, W) arrays, both clipped to 0..top; equal images count as 100 dB."""
    errors = (np.clip(reference, 0, top).astype(np.float64) - np.clip(candidate, 0, top)) ** 2
    mean = errors.reshape(len(errors), -1).mean(1)
    return float(np.mean(np.minimum(100.0, -10 * np.log10(np.maximum(mean, 1e-30) / top**2))))


def quality(name: str, inputs: Inputs, outputs: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Figures by their name with unit; top-1 is left out where the weights are random."""
    network = NETWORKS[name]
    if network.top:
        found = {"PSNR to teacher dB": psnr(teacher, outputs, network.top)}
        if inputs.references is not None:
            found["PSNR to reference dB"] = psnr(inputs.references, outputs, network.top)
        return found
    if name in RANDOM_WEIGHTS:
        error = np.linalg.norm(outputs.astype(np.float64) - teacher) / np.linalg.norm(teacher)
        return {"relative output error": float(error)}
    labels = inputs.labels if inputs.labels is not None else teacher.argmax(1)
    agreement = float((outputs.argmax(1) == teacher.argmax(1)).mean())
    return {"top-1 %": 100 * float((outputs.argmax(1) == labels).mean()), "agreement %": 100 * agreement}
