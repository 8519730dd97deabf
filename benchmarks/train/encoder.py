"""Train edgegen/nn/weights/mnist_encoder.safetensors: `python benchmarks/train/encoder.py`.

The 60,000 MNIST training images, padded to 32x32 and shifted by up to 3 pixels, as a classifier of ten digits.
"""

from __future__ import annotations

import common
import numpy as np
import torch
from torch.nn import functional as F

from edgegen.nn import encoders

EPOCHS, BATCH, PEAK, SHIFT = 5, 128, 3e-3, 3
WEIGHTS = encoders.WEIGHTS["mnist"]


def padded(name: str) -> tuple[np.ndarray, np.ndarray]:
    """MNIST `train` or `test`: images (N, 32, 32) uint8 with two black pixels at the border, and labels (N,)."""
    archive = np.load(common.ASSETS / f"mnist-{name}.npz")
    images = archive["x"].reshape(-1, 28, 28)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), archive["y"]


def tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W) uint8 to (N, 1, H, W) float in 0..1."""
    return torch.from_numpy(images)[:, None].float() / 255


def batch(images: np.ndarray, labels: np.ndarray, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (128, 1, 32, 32) in 0..1, shifted at random, and labels: a function of (seed, step)."""
    rng = common.generator(seed, step)
    chosen = rng.integers(len(images), size=BATCH)
    shifts = rng.integers(-SHIFT, SHIFT + 1, size=(BATCH, 2))
    shifted = [np.roll(images[i], shift, (0, 1)) for i, shift in zip(chosen, map(tuple, shifts))]
    return tensor(np.stack(shifted)), torch.from_numpy(labels[chosen])


@torch.no_grad()
def accuracy(model: encoders.MnistEncoder, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent."""
    model.eval()
    found = [model.classify(tensor(images[i:i + 500])).argmax(1).numpy() for i in range(0, len(images), 500)]
    model.train()
    return 100 * float((np.concatenate(found) == labels).mean())


def main() -> None:
    options = common.arguments(__doc__, steps=EPOCHS * 60000 // BATCH)
    images, labels = padded("train")
    test = padded("test")
    model = encoders.MnistEncoder().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=1e-2)
    run = common.Run("mnist_encoder", options.steps, options.seed, common.checkpoint(options, "mnist_encoder"),
                     {"model": model, "optimizer": optimizer})

    def step(index: int) -> dict[str, float]:
        common.set_rate(optimizer, common.cosine(index, options.steps, PEAK, 100))
        x, y = batch(images, labels, options.seed, index)
        with common.autocast():
            logits = model.classify(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    common.train(run, step, evaluate=lambda: {"test_top1": accuracy(model, *test)}, every=60000 // BATCH)
    common.write_weights(model, WEIGHTS)
    common.record(run, settings={"batch": BATCH, "peak_rate": PEAK, "optimizer": "AdamW", "weight_decay": 1e-2,
                                 "shift": SHIFT, "precision": common.PRECISION},
                  figures={"test_top1_percent": accuracy(model, *test), "test_images": len(test[0])},
                  weights=WEIGHTS, module=model, data="MNIST, 60,000 training images")


if __name__ == "__main__":
    main()
