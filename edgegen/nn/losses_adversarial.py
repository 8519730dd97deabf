"""Losses of two players: a discriminator of outputs that is trained along, and what generators are trained with.

OutputDiscriminator: MEAL V2 (Shen and Savvides, 2020, arXiv:2009.08453), a small network that tells the student's
outputs from the teacher's. Deviation: one optimizer trains both, each by its own loss; the student's is the one that
does not saturate (Goodfellow et al., 2014, arXiv:1406.2661), as a discriminator that is sure would teach it nothing.
hinge: Lim and Ye, 2017, arXiv:1705.02894. r3gan: Huang et al., 2024, The GAN is dead; long live the GAN!,
arXiv:2501.05441, relativistic pairs (Jolicoeur-Martineau, 2018, arXiv:1807.00734) with zero-centred gradient penalties,
R1 on real and R2 on made images (Mescheder et al., 2018, arXiv:1801.04406).
augmented: DiffAugment (Zhao et al., 2020, arXiv:2006.10738): colour, translation, cutout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ADVERSARIAL = ("hinge", "r3gan")


class OutputDiscriminator(nn.Module):
    """Tells teacher from student by an output: the probabilities of logits, images (N, C, H, W), or vectors."""

    def __init__(self, shape: tuple[int, ...], logits: bool, width: int = 64) -> None:
        """shape: of one output, without the batch axis."""
        super().__init__()
        self.logits = logits
        kind: Any = nn.Conv2d if len(shape) == 3 else nn.Linear
        kernel = {"kernel_size": 3, "stride": 2, "padding": 1} if len(shape) == 3 else {}
        first, last = kind(shape[0] if len(shape) == 3 else shape[-1], width, **kernel), kind(width, 1, **kernel)
        self.body = nn.Sequential(
            first, nn.LeakyReLU(0.2), kind(width, width, **kernel), nn.LeakyReLU(0.2), last
        )
        nn.init.zeros_(last.weight)  # at first it cannot tell, and the student's gradient is 0
        nn.init.zeros_(last.bias)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """Logit of "the teacher's", (N, ...)."""
        return self.body(output.float().softmax(-1) if self.logits else output.float())

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Binary cross entropy of telling them apart, log 2 when it cannot; its gradient moves the discriminator.

        The student's gradient is that of being taken for the teacher, which does not count in the value.
        """
        apart = (F.softplus(self(student.detach())).mean() + F.softplus(-self(teacher)).mean()) / 2
        fixed = {name: value.detach() for name, value in self.named_parameters()}
        fooled = F.softplus(-torch.func.functional_call(self, fixed, (student,))).mean()
        return apart + fooled - fooled.detach()


def critic_loss(kind: str, real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """What a discriminator minimises, from its scores (N, ...) of real and of made images."""
    real, made = real.float(), made.float()
    return F.relu(1 - real).mean() + F.relu(1 + made).mean() if kind == "hinge" else F.softplus(made - real).mean()


def maker_loss(kind: str, real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """What a generator minimises, from the same scores; hinge does not look at the real ones."""
    return -made.float().mean() if kind == "hinge" else F.softplus(real.float() - made.float()).mean()


def gradient_penalty(scores: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean over the images (N, ...) of the squared norm of the gradient of an image's mean score; scores: (N, ...)."""
    each = scores.float().reshape(len(scores), -1).mean(1)
    (gradient,) = torch.autograd.grad(each.sum(), images, create_graph=True)
    return gradient.float().pow(2).flatten(1).sum(1).mean()


def augmented(*batches: torch.Tensor) -> list[torch.Tensor]:
    """DiffAugment: the same random colours, shift and hole for each batch's image of one number.

    Args:
        batches: images (N, C, H, W), centred on 0 or not, all of one shape. Draws from torch's global random state.
    """
    first = batches[0]
    n, _, height, width = first.shape
    light, satur, contr = (torch.rand(n, 1, 1, 1, device=first.device) for _ in range(3))
    shift_y, hole_y = (_places(n, height, share, first.device) for share in (8, 2))
    shift_x, hole_x = (_places(n, width, share, first.device) for share in (8, 2))
    return [
        _hole(_shifted(_coloured(images, light, satur, contr), shift_y, shift_x), hole_y, hole_x) for images in batches
    ]


def _places(n: int, size: int, share: int, device: torch.device) -> torch.Tensor:
    """Random whole numbers (N, 1): shifts within an eighth of the size (share 8), or the start of a hole (share 2)."""
    low, high = (-(size // 8), size // 8 + 1) if share == 8 else (-(size // 4), size - size // 4)
    return torch.randint(low, max(low + 1, high), (n, 1), device=device)


def _coloured(x: torch.Tensor, light: torch.Tensor, satur: torch.Tensor, contr: torch.Tensor) -> torch.Tensor:
    """Brightness moved by -0.5..0.5, saturation times 0..2, contrast times 0.5..1.5."""
    x = x + (light - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (satur * 2) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contr + 0.5) + mean


def _shifted(x: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Each image moved by whole pixels, 0 beyond its edges."""
    n, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device) - down
    columns = torch.arange(width, device=x.device) - right
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
    x = x.gather(2, rows.clamp(0, height - 1)[:, None, :, None].expand(n, channels, height, width))
    x = x.gather(3, columns.clamp(0, width - 1)[:, None, None].expand(n, channels, height, width))
    return x * inside


def _hole(x: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Each image with a square of half its size set to 0."""
    height, width = x.shape[2:]
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    across, along = (rows >= top) & (rows < top + height // 2), (columns >= left) & (columns < left + width // 2)
    return x * ~(across[:, None, :, None] & along[:, None, None])
