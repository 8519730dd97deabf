"""Train edgegen/models/weights/vit.safetensors: `python benchmarks/train/vit.py [--part train.npz]`.

The 50,000 CIFAR-10 training images (or with --part the `x` and `y` of a file that benchmarks/prepare_data.py made),
flips, shifts of up to 4 pixels, erased squares, mixup, label smoothing, AdamW; the average of the weights ships. The
test images are only looked at. Touvron et al., 2020, DeiT, arXiv:2012.12877, is where the augmentations come from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cifar
import common
import numpy as np
import torch
from torch.nn import functional as F

from edgegen.models import vit

EPOCHS, BATCH, PEAK, DECAY, SMOOTHING, MIXUP, ERASE, AVERAGE = 60, 128, 1e-3, 0.05, 0.1, 0.2, 8, 0.999
WEIGHTS = Path(vit.__file__).parent / "weights" / "vit.safetensors"


def given_part() -> Path | None:
    """--part FILE, taken off the command line before `common.arguments` reads the rest."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--part", type=Path)
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return mine.part


def images_of(part: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 40, 40, 3) uint8, reflected at the border, and labels (N,)."""
    if part is None:
        return cifar.training_images()
    with np.load(part, allow_pickle=False) as saved:
        images, labels = saved["x"], saved["y"]
    border = ((0, 0), (cifar.SHIFT, cifar.SHIFT), (cifar.SHIFT, cifar.SHIFT), (0, 0))
    return np.pad(images, border, mode="reflect"), labels


def batch(images: np.ndarray, labels: np.ndarray, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images (128, 3, 32, 32) with an erased square each, mixed in pairs, and label shares (128, 10)."""
    x, y = cifar.batch(images, labels, seed, step)
    rng = np.random.default_rng((seed, step, 2))
    for image, (top, left) in zip(x, rng.integers(0, 33 - ERASE, size=(len(x), 2))):
        image[:, top:top + ERASE, left:left + ERASE] = 0.0
    share = float(rng.beta(MIXUP, MIXUP))
    target = F.one_hot(y.long(), 10).float()
    return share * x + (1 - share) * x.flip(0), share * target + (1 - share) * target.flip(0)


def main() -> None:
    part = given_part()
    images, labels = images_of(part)
    each = len(images) // BATCH
    options = common.arguments(__doc__, steps=EPOCHS * each)
    test = np.load(common.ASSETS / "cifar10-test.npz", allow_pickle=False)
    judged = test["x"], test["y"]
    model = vit.create(drop_path=0.1).train()
    average = common.Average(model, AVERAGE)
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": DECAY},
              {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK)
    run = common.Run("vit", options.steps, options.seed, common.checkpoint(options, "vit"),
                     {"model": model, "average": average, "optimizer": optimizer})

    def step(index: int) -> dict[str, float]:
        torch.manual_seed(options.seed * 1_000_003 + index)  # for the blocks that are left out
        common.set_rate(optimizer, common.cosine(index, options.steps, PEAK, 5 * each))
        x, y = batch(images, labels, options.seed, index)
        with common.autocast():
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, index)
        return {"loss": loss.item()}

    def evaluate() -> dict[str, float]:
        return {"test_top1": cifar.accuracy(average.module, *judged, bf16=True)}

    common.train(run, step, evaluate=evaluate, every=each)
    common.write_weights(average.module, WEIGHTS, half=True)
    figures = {"test_top1_percent": cifar.accuracy(average.module, *judged, bf16=False), "test_images": len(judged[0])}
    common.record(run, settings={"batch": BATCH, "peak_rate": PEAK, "weight_decay": DECAY, "label_smoothing": SMOOTHING,
                                 "shift": cifar.SHIFT, "erase": ERASE, "mixup": MIXUP, "average": AVERAGE,
                                 "drop_path": 0.1, "optimizer": "AdamW", "precision": common.PRECISION},
                  figures=figures, weights=WEIGHTS, module=average.module,
                  data=f"CIFAR-10, {len(images):,} training images")


if __name__ == "__main__":
    main()
