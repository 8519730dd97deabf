"""Train edgegen/models/weights/sagan_cifar.safetensors: `python benchmarks/train/sagan.py` (after cifar.py).

The 50,000 CIFAR-10 training images and their mirror images. Hinge loss against a discriminator with spectral norm
(Miyato et al., 2018, arXiv:1802.05957) that sees the class by projection (Miyato & Koyama, 2018, arXiv:1802.05637),
with two learning rates; what ships is the average of the generator's weights, its batch norm statistics measured anew.
"""

from __future__ import annotations

from typing import Any

import common
import dcgan
import diffusion
import numpy as np
import torch
from torch import nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

from edgegen.models import sagan_cifar
from edgegen.nn import encoders

LATENT, CLASSES, BATCH, RATE, CRITIC_RATE, BETAS, DECAY, JUDGED = 128, 10, 64, 2e-4, 4e-4, (0.0, 0.9), 0.999, 5000
WEIGHTS = dcgan.WEIGHTS.with_name("sagan_cifar.safetensors")
LAYERS = ((64, 3, 1), (64, 4, 2), (128, 3, 1), (128, 4, 2), (256, 3, 1), (256, 4, 2), (384, 3, 1))


class Critic(nn.Module):
    """Images (N, 3, 32, 32) in -1..1 and their classes (N,) to scores (N,)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs, kernel, stride in LAYERS:
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, 1)), nn.LeakyReLU(0.1)]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.score = spectral_norm(nn.Linear(inputs, 1))
        self.embed = spectral_norm(nn.Embedding(CLASSES, inputs))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        # Summed, not averaged: averaged scores stay far inside the hinge, and the critic learns nothing about what is
        # hard (its loss stayed at 2.0; KID to 1,000 images rose from 0.032 at step 1,500 to 0.083 at 4,000).
        y = self.layers(x).float().sum((2, 3))
        return self.score(y)[:, 0] + (self.embed(label) * y).sum(1)


def latents(count: int, *key: int) -> torch.Tensor:
    """(count, 138) normal numbers, a function of the key; the largest of the last ten names the class."""
    return torch.from_numpy(np.random.default_rng(key).standard_normal((count, LATENT + CLASSES), dtype=np.float32))


def reals(images: np.ndarray, labels: np.ndarray, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(64, 3, 32, 32) in -1..1, half of them mirrored, and classes (64,), a function of (seed, step)."""
    rng = common.generator(seed, step)
    chosen = rng.integers(len(images), size=BATCH)
    x = torch.from_numpy(images[chosen]).float() / 127.5 - 1
    mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)[:, None, None, None]
    return torch.where(mirrored, x.flip(3), x), torch.from_numpy(labels[chosen])


def measure_norms(generator: nn.Module, batches: int = 80) -> None:
    """Statistics of batch norms anew, for averaged weights."""
    dcgan.measure_norms(generator, batches, lambda index: latents(250, 7, index))


@torch.no_grad()
def samples(generator: nn.Module, count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 32, 32) in 0..1 from latents of their own seed."""
    parts = [generator(latents(250, 11, seed, i)) for i in range(-(-count // 250))]
    return (torch.cat(parts)[:count] + 1) / 2


def figures(generator: nn.Module) -> dict[str, object]:
    """KID to test images, beside that of training images; how often the encoder sees the class that was asked for."""
    reference, made = diffusion.test_features("cifar", JUDGED), samples(generator, JUDGED)
    found = diffusion.images("cifar", "train")[0]
    order = np.random.default_rng(13).permutation(len(found))[:JUDGED]  # the files are sorted by class
    trained_on = torch.from_numpy(found[order]).float() / 255
    asked = torch.cat([latents(250, 11, 0, i) for i in range(-(-JUDGED // 250))])[:JUDGED, LATENT:].argmax(1)
    seen = encoders.create("cifar")
    with torch.no_grad():
        classes = torch.cat([seen.body.head(seen(part)[1]).argmax(1) for part in made.split(250)])
    return {
        "features": f"cifar encoder, {reference.shape[1]}",
        "n": JUDGED,
        "kid_to_cifar_test": dcgan.kid(diffusion.features("cifar", made), reference),
        "kid_of_cifar_train_to_test": dcgan.kid(diffusion.features("cifar", trained_on), reference),
        "share_of_the_class_asked_for": float((classes == asked).float().mean()),
    }


def main() -> None:
    options = common.arguments(__doc__, steps=8000)
    images, labels = diffusion.images("cifar", "train")
    fast: dict[str, Any] = {"memory_format": torch.channels_last}
    model, critic = sagan_cifar.create().train().to(**fast), Critic().train().to(**fast)
    average = common.Average(model, DECAY)
    makers = torch.optim.Adam(model.parameters(), lr=RATE, betas=BETAS)
    judges = torch.optim.Adam(critic.parameters(), lr=CRITIC_RATE, betas=BETAS)
    run = common.Run("sagan_cifar", options.steps, options.seed, common.checkpoint(options, "sagan_cifar"), {
        "model": model, "critic": critic, "average": average, "makers": makers, "judges": judges})  # fmt: skip
    reference = diffusion.test_features("cifar", 1000)

    def step(index: int) -> dict[str, float]:
        share = min(1.0, 2.0 * (1 - index / options.steps))  # flat, then falling to zero in the second half
        common.set_rate(makers, share * RATE)
        common.set_rate(judges, share * CRITIC_RATE)
        z = latents(BATCH, options.seed, index)
        asked, (real, told) = z[:, LATENT:].argmax(1), reals(images, labels, options.seed, index)
        with common.autocast():
            fake = model(z)
            both = torch.cat([real, fake.detach()]).contiguous(**fast)
            real_scores, fake_scores = critic(both, torch.cat([told, asked])).chunk(2)
        judged = relu(1 - real_scores).mean() + relu(1 + fake_scores).mean()
        judges.zero_grad(set_to_none=True)
        judged.backward()
        judges.step()
        critic.requires_grad_(False)  # its own gradients are not wanted here, and a third of this backward pass
        with common.autocast():
            made = -critic(fake, asked).mean()
        makers.zero_grad(set_to_none=True)
        made.backward()
        makers.step()
        critic.requires_grad_(True)
        average.update(model, index)
        return {"critic": judged.item(), "generator": made.item()}

    def evaluate() -> dict[str, float]:
        measure_norms(average.module, batches=8)
        return {"kid_1000": dcgan.kid(diffusion.features("cifar", samples(average.module, 1000)), reference)}

    common.train(run, step, evaluate=evaluate, every=500)
    measure_norms(average.module)
    common.write_weights(average.module, WEIGHTS, half=True)
    settings = {
        "batch": BATCH, "rate": RATE, "critic_rate": CRITIC_RATE, "betas": BETAS, "average_decay": DECAY,
        "loss": "hinge", "critic": f"spectral norm, projection, {LAYERS}",
        "precision": common.PRECISION,
    }  # fmt: skip
    common.record(run, settings=settings, figures=figures(average.module), weights=WEIGHTS, module=model,
                  data="CIFAR-10, 50,000 training images")  # fmt: skip


if __name__ == "__main__":
    main()
