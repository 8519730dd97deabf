"""Small random networks with the shapes that make channel pruning hard."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """Two residual blocks with batch norm and a stride, then a classifier."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                               nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))  # fmt: skip
        self.b = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
                               nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width))  # fmt: skip
        self.down = nn.Conv2d(width, 2 * width, 1, 2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.a(x))
        x = F.relu(self.down(x) + self.b(x))
        return self.head(x.mean((2, 3)))


class Upscaler(nn.Module):
    """Super-resolution x4: a global skip over nearest upsampling, two pixel shuffles, PReLU, clamp."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.act = nn.PReLU(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.up1 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.up2 = nn.Conv2d(width, 4 * 3, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        y = self.act(self.head(x))
        y = y + self.body(y)
        y = self.shuffle(self.up2(F.relu(self.shuffle(self.up1(y)))))
        return torch.clamp(y + F.interpolate(x, scale_factor=4, mode="nearest"), 0, 1)


class Style(nn.Module):
    """Feed-forward style transfer: reflection padding, InstanceNorm with affine, nearest upsampling, tanh."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        def conv(a: int, b: int, kernel: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.ReflectionPad2d(kernel // 2), nn.Conv2d(a, b, kernel, stride))
        self.conv1, self.in1 = conv(3, width, 9), nn.InstanceNorm2d(width, affine=True)
        self.conv2, self.in2 = conv(width, 2 * width, 3, 2), nn.InstanceNorm2d(2 * width, affine=True)
        self.res1, self.in3 = conv(2 * width, 2 * width, 3), nn.InstanceNorm2d(2 * width, affine=True)
        self.res2, self.in4 = conv(2 * width, 2 * width, 3), nn.InstanceNorm2d(2 * width, affine=True)
        self.up, self.in5 = conv(2 * width, width, 3), nn.InstanceNorm2d(width, affine=True, track_running_stats=True)
        self.out = conv(width, 3, 9)

    def forward(self, x):
        x = F.relu(self.in2(self.conv2(F.relu(self.in1(self.conv1(x))))))
        x = x + self.in4(self.res2(F.relu(self.in3(self.res1(x)))))
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return torch.tanh(self.out(F.relu(self.in5(self.up(x)))))


class Decoder(nn.Module):
    """TAESD-type decoder: tanh clamp of the latent, residual blocks with ReLU, nn.Upsample."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        def block() -> nn.Sequential:
            inside, outside = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
            return nn.Sequential(inside, nn.ReLU(), outside)
        self.inp, self.b1, self.b2 = nn.Conv2d(4, width, 3, padding=1), block(), block()
        self.up, self.mid = nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        x = F.relu(self.inp(torch.tanh(z / 3) * 3))
        x = F.relu(self.b1(x) + x)
        x = self.mid(self.up(x))
        return self.out(F.relu(self.b2(x) + x))


class Dcgan(nn.Module):
    """Latent vector, linear layer to a map, transposed convolutions with batch norm, tanh."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.fc = nn.Linear(20, 2 * width * 16)
        self.bn0 = nn.BatchNorm2d(2 * width)
        self.gen = nn.Sequential(
            nn.ConvTranspose2d(2 * width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.gen(F.relu(self.bn0(self.fc(z).view(z.shape[0], -1, 4, 4))))


class Mixed(nn.Module):
    """Concatenation with the input and between branches, depthwise and grouped convolutions, chunk, gate, flatten."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.gate = nn.Conv2d(2 * width, 2 * width, 1)
        self.join = nn.Conv2d(2 * width + width + 3, 2 * width, 1)
        self.tail = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width * 16, 10)

    def forward(self, x):
        a = F.relu(self.depthwise(self.stem(x)))
        b = F.relu(self.norm(self.grouped(a)))
        b = b * torch.sigmoid(self.gate(b.mean((2, 3), keepdim=True)))
        left, right = self.join(torch.cat([b, a, x], 1)).chunk(2, 1)
        y = F.adaptive_avg_pool2d(F.relu(self.tail(left * torch.tanh(right))), 4)
        return self.fc(y.flatten(1))


class OptionA(nn.Module):
    """A CIFAR ResNet of He et al. with option-A shortcuts: slices in space, constant zero channels on both sides."""

    def __init__(self, blocks: int = 1, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        for stage in (1, 2, 3):
            parts = [OptionABlock(widths[stage - 1] if i == 0 else widths[stage], widths[stage]) for i in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*parts))
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class OptionABlock(nn.Module):
    def __init__(self, inside: int, planes: int) -> None:
        super().__init__()
        stride, self.pad = (1, 0) if inside == planes else (2, planes // 4)
        self.conv1, self.bn1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu(y + short)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention between two layer norms, after a linear embedding."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.norm1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 96), nn.Linear(96, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm1(x)
        x = x + self.attn(y, y, y)[0]
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


SHAPES: dict[str, tuple[int, ...]] = {
    "Residual": (1, 3, 16, 16), "Upscaler": (1, 3, 12, 12), "Style": (1, 3, 16, 16), "Decoder": (1, 4, 8, 8),
    "Dcgan": (1, 20), "Mixed": (1, 3, 16, 16), "OptionA": (1, 3, 16, 16), "TorchAttention": (1, 9, 16),
}  # fmt: skip
NETWORKS = {kind.__name__: kind for kind in (Residual, Upscaler, Style, Decoder, Dcgan, Mixed, OptionA, TorchAttention)}


def make(name: str) -> nn.Module:
    """A network by name with random weights, random norms and random statistics (fresh norms hide mistakes)."""
    torch.manual_seed(0)
    module = NETWORKS[name]()
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 1.5)
        if isinstance(part, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            continue
        if getattr(part, "weight", None) is not None:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            if getattr(part, "bias", None) is not None:
                nn.init.normal_(part.bias, 0, 0.3)
    return module.eval()
