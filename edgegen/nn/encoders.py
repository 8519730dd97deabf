"""Small image encoders that ship with edgegen: features for perceptual distances and KID without Inception.

"cifar" is the body of the built-in CIFAR-10 classifier, "mnist" a small digit classifier. They see their own domain
well and others roughly; a figure made with one names it. The use of a classifier's features follows Zhang et al., 2018,
arXiv:1801.03924 (perceptual distance) and Binkowski et al., 2018, arXiv:1801.01401 (KID).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from edgegen import registry
from edgegen.errors import ModelError
from edgegen.nn.resnet import CifarResNet

WEIGHTS = {
    "cifar": registry.PACKAGE / "models" / "weights" / "cifar_resnet.safetensors",
    "mnist": registry.PACKAGE / "nn" / "weights" / "mnist_encoder.safetensors",
}
SMALLEST = 32  # pixels; smaller images leave less than a digit or an object to see


class CifarEncoder(nn.Module):
    """RGB or grey (N, 3 or 1, H, W) in 0..1 to ([3 maps of 16, 64, 128 channels], pooled (N, 128))."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.body = CifarResNet((16, 64, 128), 2, 10)
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        check_images(x)
        colour = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        maps = self.body.features((colour - self.mean) / self.std)
        return maps, maps[-1].mean((2, 3))


class MnistEncoder(nn.Module):
    """Grey or RGB (N, 1 or 3, H, W) in 0..1 to ([4 maps of 16, 32, 64, 64 channels], pooled (N, 64))."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1))  # inputs, outputs, stride
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, stride in sizes
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        check_images(x)
        x = x.mean(1, keepdim=True) * 2 - 1
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps, x.mean((2, 3))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the ten digits, (N, 10)."""
        return self.head(self(x)[1])


def check_images(x: torch.Tensor) -> None:
    """Raise ModelError unless `x` is (N, 1 or 3, H, W) with H and W at least 32."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < SMALLEST:
        raise ModelError(
            f"an encoder was given images of shape {tuple(x.shape)}; allowed: (N, 1 or 3, H, W) with H and W at least "
            f"{SMALLEST}; enlarge smaller images first"
        )


def weights_path(name: str) -> Path:
    """The weights file of an encoder.

    Raises:
        ModelError: no such encoder.
    """
    if name not in WEIGHTS:
        known = tuple(WEIGHTS)
        raise ModelError(f"unknown encoder {name!r}{registry.near(name, known)}; there are: {', '.join(known)}")
    return WEIGHTS[name]


def create(name: str) -> nn.Module:
    """The encoder with its shipped weights, in eval mode, without gradients of its own.

    Returns:
        A module: images (N, 1 or 3, H, W) in 0..1 -> (feature maps, each (N, C, H', W'); pooled vector (N, D)).
    Raises:
        ModelError: no such encoder.
    """
    state = load_file(weights_path(name))
    module: nn.Module
    if name == "cifar":
        module = CifarEncoder()
        module.body.load_state_dict(state)
    else:
        module = MnistEncoder()
        module.load_state_dict(state)
    return module.eval().requires_grad_(False)
