"""Train edgegen/models/weights/dcgan.safetensors: `python benchmarks/train/dcgan.py` (after encoder.py).

The 60,000 MNIST training images padded to 32x32. Hinge loss against a discriminator with spectral norm (Miyato et al.,
2018, arXiv:1802.05957); what ships is the average of the generator's weights, its batch norm statistics measured anew
on 20,000 latents, because the statistics of the last step belong to other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import common
import numpy as np
import torch
from encoder import padded, tensor
from torch import nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

from edgegen.models import dcgan
from edgegen.nn import encoders

LATENT, BATCH, RATE, CRITIC_RATE, BETAS, DECAY, JUDGED = 64, 64, 2e-4, 4e-4, (0.5, 0.99), 0.998, 5000
GAIN = 8.0
WEIGHTS = Path(dcgan.__file__).parent / "weights" / "dcgan.safetensors"


def discriminator(width: int = 64) -> nn.Module:
    """(N, 1, 32, 32) in -1..1 to scores (N, 1, 1, 1).

    With spectral norm alone the scores of real and made digits stay closer than the hinge's margin, and the generator
    learns little; `GAIN` widens them.
    """
    widths = (1, width, 2 * width, 4 * width)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 4)), Gain())


class Gain(nn.Module):
    """x * GAIN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * GAIN


def latents(count: int, *key: int) -> torch.Tensor:
    """(count, 64) normal numbers, a function of the key."""
    return torch.from_numpy(np.random.default_rng(key).standard_normal((count, LATENT), dtype=np.float32))


def reals(images: np.ndarray, seed: int, step: int) -> torch.Tensor:
    """(64, 1, 32, 32) in -1..1, a function of (seed, step)."""
    chosen = common.generator(seed, step).integers(len(images), size=BATCH)
    return torch.from_numpy(images[chosen])[:, None].float() / 127.5 - 1


@torch.no_grad()
def measure_norms(
    generator: nn.Module, batches: int = 80, draw: Callable[[int], torch.Tensor] = lambda index: latents(250, 7, index)
) -> None:
    """Set every batch norm's statistics to their mean over `batches` batches of latents; leaves eval mode on."""
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    generator.train()
    for index in range(batches):
        generator(draw(index))
    for norm in norms:
        norm.momentum = 0.1
    generator.eval()


@torch.no_grad()
def samples(generator: nn.Module, count: int, seed: int = 0) -> torch.Tensor:
    """(count, 1, 32, 32) in 0..1 from latents of their own seed."""
    parts = [generator(latents(250, 11, seed, i)) for i in range(-(-count // 250))]
    return (torch.cat(parts)[:count] + 1) / 2


def chosen_images(name: str, count: int) -> torch.Tensor:
    """(count, 1, 32, 32) in 0..1, drawn evenly: the files are sorted by class."""
    images = padded(name)[0]
    order = np.random.default_rng(13).permutation(len(images))[:count]
    return tensor(images[order])


@torch.no_grad()
def features(images: torch.Tensor) -> np.ndarray:
    """Pooled features (N, 64) of the mnist encoder."""
    encoder = encoders.create("mnist")
    return torch.cat([encoder(images[i:i + 250])[1] for i in range(0, len(images), 250)]).double().numpy()


def kid(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al., 2018, arXiv:1801.01401)."""
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        matrix = kernel(a, a)
        return float((matrix.sum() - np.trace(matrix)) / (len(a) * (len(a) - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def figures(generator: nn.Module) -> dict[str, object]:
    """KID to MNIST test images, beside that of MNIST training images, and how often the encoder sees each digit."""
    test, train = chosen_images("test", JUDGED), chosen_images("train", JUDGED)
    made = samples(generator, JUDGED)
    reference, encoder = features(test), encoders.create("mnist")
    with torch.no_grad():
        sure, digit = encoder.classify(made).softmax(1).max(1)
    return {
        "features": "mnist encoder, 64",
        "n": JUDGED,
        "kid_to_mnist_test": kid(features(made), reference),
        "kid_of_mnist_train_to_test": kid(features(train), reference),
        "share_classified_above_0.9": float((sure > 0.9).float().mean()),
        "share_of_digits": [round(float((digit == d).float().mean()), 4) for d in range(10)],
    }


def main() -> None:
    options = common.arguments(__doc__, steps=6000)
    images, _ = padded("train")
    model, critic = dcgan.create(latent=LATENT).train(), discriminator().train()
    average = common.Average(model, DECAY)
    makers = torch.optim.Adam(model.parameters(), lr=RATE, betas=BETAS)
    judges = torch.optim.Adam(critic.parameters(), lr=CRITIC_RATE, betas=BETAS)
    run = common.Run("dcgan", options.steps, options.seed, common.checkpoint(options, "dcgan"), {
        "model": model, "critic": critic, "average": average, "makers": makers, "judges": judges})

    def step(index: int) -> dict[str, float]:
        share = min(1.0, 2.0 * (1 - index / options.steps))  # flat, then falling to zero in the second half
        common.set_rate(makers, share * RATE)
        common.set_rate(judges, share * CRITIC_RATE)
        z = latents(BATCH, options.seed, index)
        with common.autocast():
            fake = model(z)
            real_scores = critic(reals(images, options.seed, index)).float()
            fake_scores = critic(fake.detach()).float()
        judged = relu(1 - real_scores).mean() + relu(1 + fake_scores).mean()
        judges.zero_grad(set_to_none=True)
        judged.backward()
        judges.step()
        with common.autocast():
            made = -critic(fake).float().mean()
        makers.zero_grad(set_to_none=True)
        made.backward()
        makers.step()
        average.update(model, index)
        return {"critic": judged.item(), "generator": made.item()}

    def evaluate() -> dict[str, float]:
        measure_norms(average.module, batches=8)
        return {"kid_1000": kid(features(samples(average.module, 1000)), features(chosen_images("test", 1000)))}

    common.train(run, step, evaluate=evaluate, every=250)
    measure_norms(average.module)
    common.write_weights(average.module, WEIGHTS)
    settings = {
        "batch": BATCH, "rate": RATE, "critic_rate": CRITIC_RATE, "betas": BETAS, "average_decay": DECAY,
        "loss": "hinge", "critic": "spectral norm, 64-128-256", "gain": GAIN, "precision": common.PRECISION,
    }
    common.record(run, settings=settings, figures=figures(average.module), weights=WEIGHTS, module=model,
                  data="MNIST, 60,000 training images, padded to 32x32")


if __name__ == "__main__":
    main()
