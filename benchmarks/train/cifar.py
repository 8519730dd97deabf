"""Train edgegen/models/weights/cifar_resnet.safetensors: `python benchmarks/train/cifar.py`.

The 50,000 CIFAR-10 training images, flips and shifts of up to 4 pixels, label smoothing, SGD. The test images are only
looked at; what ships is the last step.
"""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from edgegen.models import cifar_resnet

EPOCHS, BATCH, PEAK, DECAY, SMOOTHING, SHIFT = 14, 128, 0.1, 5e-4, 0.1, 4
WEIGHTS = Path(cifar_resnet.__file__).parent / "weights" / "cifar_resnet.safetensors"
MEAN = torch.tensor(cifar_resnet.RECORD["input"]["mean"]).view(1, 3, 1, 1)
STD = torch.tensor(cifar_resnet.RECORD["input"]["std"]).view(1, 3, 1, 1)


def training_images() -> tuple[np.ndarray, np.ndarray]:
    """Images (50000, 40, 40, 3) uint8, reflected by four pixels at the border, and labels (50000,)."""
    images, labels = [], []
    for sheet in sorted((common.ASSETS / "cifar10-train").glob("*.webp")):
        grid = np.asarray(Image.open(sheet).convert("RGB")).reshape(50, 32, 100, 32, 3)
        images.append(grid.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
        labels.append(np.full(len(images[-1]), int(sheet.name.split("_")[0])))
    border = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    return np.pad(np.concatenate(images), border, mode="reflect"), np.concatenate(labels)


def batch(images: np.ndarray, labels: np.ndarray, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised (128, 3, 32, 32) and labels, a function of (seed, step); an epoch sees every image once."""
    each = len(images) // BATCH
    order = np.random.default_rng((seed, step // each, 1)).permutation(len(images))
    chosen = order[step % each * BATCH:][:BATCH]
    rng = common.generator(seed, step)
    offsets, flips = rng.integers(2 * SHIFT + 1, size=(BATCH, 2)), rng.integers(2, size=BATCH)
    crops = np.stack([images[i, y:y + 32, x:x + 32] for i, (y, x) in zip(chosen, offsets)])
    crops[flips == 1] = crops[flips == 1][:, :, ::-1]
    return normalised(crops), torch.from_numpy(labels[chosen])


def normalised(images: np.ndarray) -> torch.Tensor:
    """(N, 32, 32, 3) uint8 to the network's input, channels last in memory."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, *, bf16: bool) -> float:
    """Top-1 in percent, with batch norm in eval mode."""
    model.eval()
    hits = 0
    for start in range(0, len(images), 500):
        with common.autocast(bf16):
            found = model(normalised(images[start:start + 500])).argmax(1).numpy()
        hits += int((found == labels[start:start + 500]).sum())
    model.train()
    return 100 * hits / len(images)


def main() -> None:
    each = 50000 // BATCH
    options = common.arguments(__doc__, steps=EPOCHS * each)
    images, labels = training_images()
    test = np.load(common.ASSETS / "cifar10-test.npz")
    judged = test["x"], test["y"]
    model = cifar_resnet.create().to(memory_format=torch.channels_last).train()
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=PEAK, momentum=0.9, nesterov=True)
    run = common.Run("cifar_resnet", options.steps, options.seed, common.checkpoint(options, "cifar_resnet"),
                     {"model": model, "optimizer": optimizer})

    def step(index: int) -> dict[str, float]:
        common.set_rate(optimizer, common.cosine(index, options.steps, PEAK, each // 2))
        x, y = batch(images, labels, options.seed, index)
        with common.autocast():
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item(), "train_top1": 100 * (logits.argmax(1) == y).float().mean().item()}

    def evaluate() -> dict[str, float]:
        return {"test_top1": accuracy(model, *judged, bf16=True)}

    common.train(run, step, evaluate=evaluate, every=each)
    common.write_weights(model, WEIGHTS)
    figures = {"test_top1_percent": accuracy(model, *judged, bf16=False), "test_images": len(judged[0])}
    common.record(run, settings={"batch": BATCH, "peak_rate": PEAK, "weight_decay": DECAY, "label_smoothing": SMOOTHING,
                                 "shift": SHIFT, "optimizer": "SGD, Nesterov 0.9", "precision": common.PRECISION},
                  figures=figures, weights=WEIGHTS, module=model, data="CIFAR-10, 50,000 training images")


if __name__ == "__main__":
    main()
