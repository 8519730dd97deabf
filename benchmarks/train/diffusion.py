"""Train edgegen/models/weights/ddpm_unet.safetensors or ddpm_cifar.safetensors: `python benchmarks/train/diffusion.py
mnist` (or `cifar`; after encoder.py).

Mean squared error of v at random times, spread evenly over each batch; what ships is the average of the weights. The
curve has the KID of 500 images of 25 DDIM steps to test images, in the features of the encoder that ships.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import common
import numpy as np
import torch
from dcgan import kid
from encoder import padded
from torch import nn

from edgegen import registry, samplers
from edgegen.nn import diffusion, encoders

MODELS = {"mnist": "ddpm_unet", "cifar": "ddpm_cifar"}
STEPS = {"mnist": 8000, "cifar": 8000}
BATCH, RATE, WARMUP, DECAY, CLIP, DROPPED = 64, 6e-4, 200, 0.999, 1.0, 0.1
JUDGED, EVERY = 500, 1000
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def images(name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, C, 32, 32) uint8 and labels (N,) of the training or test images."""
    if name == "mnist":
        found, labels = padded(part)
        return found[:, None], labels
    if part == "test":
        archive = np.load(common.ASSETS / "cifar10-test.npz")
        return archive["x"].transpose(0, 3, 1, 2), archive["y"]
    from PIL import Image

    parts = []
    for number, kind in enumerate(CLASSES):
        sheet = np.asarray(Image.open(common.ASSETS / "cifar10-train" / f"{number}_{kind}.webp").convert("RGB"))
        parts.append(sheet.reshape(50, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32))
    return np.concatenate(parts), np.repeat(np.arange(10), [len(part) for part in parts])


def batch(found: np.ndarray, labels: np.ndarray, facts: diffusion.Levels, seed: int, step: int) -> tuple:
    """(noised images, times, labels or None, target): a function of (seed, step)."""
    rng = common.generator(seed, step)
    chosen = rng.integers(len(found), size=BATCH)
    x0 = torch.from_numpy(found[chosen]).float() / 127.5 - 1
    if facts.labels:  # photographs may be mirrored, digits may not
        mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)[:, None, None, None]
        x0 = torch.where(mirrored, x0.flip(3), x0)
    places = (rng.permutation(BATCH) + rng.random(BATCH)) / BATCH  # one time in each of BATCH equal parts
    t = torch.from_numpy(np.floor(places * facts.count)).float()
    eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    told = None
    if facts.labels:
        told = torch.from_numpy(np.where(rng.random(BATCH) < DROPPED, facts.labels, labels[chosen])).float()
    return facts.noised(x0, t, eps), t, told, facts.target(x0, t, eps)


def arguments_of(x: torch.Tensor, t: torch.Tensor, told: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What the network takes, in order."""
    given = (x.contiguous(memory_format=torch.channels_last), t)
    return given if told is None else (*given, told)


@torch.no_grad()
def sampled(module: nn.Module, settings: dict, count: int, channels: int) -> torch.Tensor:
    """(count, C, 32, 32) in 0..1 from latents of their own seed."""
    module.eval()

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = [torch.from_numpy(feeds[name]) for name in ("sample", "timestep", "label") if name in feeds]
        with common.autocast():
            made = module(given[0].contiguous(memory_format=torch.channels_last), *given[1:])
        return {"output": made.float().contiguous().numpy()}

    parts = []
    for start in range(0, count, 100):
        size = min(100, count - start)
        latents = np.random.default_rng((11, start)).standard_normal((size, channels, 32, 32), dtype=np.float32)
        parts.append(samplers.generate(settings, run, latents))
    return (torch.from_numpy(np.concatenate(parts)).clamp(-1, 1) + 1) / 2


@torch.no_grad()
def features(name: str, found: torch.Tensor) -> np.ndarray:
    """Pooled features of the encoder that ships for these images."""
    encoder = encoders.create(name)
    return torch.cat([encoder(part)[1] for part in found.split(250)]).double().numpy()


def tested(name: str, count: int) -> np.ndarray:
    """Test images (count, C, 32, 32) in 0..1, drawn evenly: the files are sorted by class."""
    found, _ = images(name, "test")
    return found[np.random.default_rng(13).permutation(len(found))[:count]].astype(np.float32) / 255


def test_features(name: str, count: int) -> np.ndarray:
    """Features of test images."""
    return features(name, torch.from_numpy(tested(name, count)))


def figures(name: str, module: nn.Module, options: dict, channels: int, count: int = 2000) -> dict[str, object]:
    """KID of images of 50 DDIM steps to test images; on digits also how often the encoder sees each, and how surely."""
    settings = samplers.of({**options, "sampler": {"name": "ddim", "steps": 50}})
    made = sampled(module, settings, count, channels)
    reference = test_features(name, 5000)
    found, _ = images(name, "train")
    order = np.random.default_rng(17).permutation(len(found))[:5000]
    real = features(name, torch.from_numpy(found[order]).float() / 255)
    told: dict[str, object] = {
        "features": f"{name} encoder", "n": count, "sampler": settings,
        "kid_to_test": kid(features(name, made), reference),
        "kid_of_train_to_test": kid(real, reference),
    }  # fmt: skip
    if name == "mnist":
        with torch.no_grad():
            sure, digit = encoders.create("mnist").classify(made).softmax(1).max(1)
        told["share_classified_above_0.9"] = float((sure > 0.9).float().mean())
        told["share_of_digits"] = [round(float((digit == d).float().mean()), 4) for d in range(10)]
    return told


def which() -> str:
    """The first argument: mnist or cifar; the others are those of all training scripts."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("data", choices=sorted(MODELS))
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return chosen.data


def main() -> None:
    name = which()
    options = common.arguments(__doc__, steps=STEPS[name])
    kind = registry.module("models", MODELS[name])
    facts, channels = diffusion.Levels(kind.RECORD["options"]), kind.RECORD["input"]["shape"][1]
    weights = Path(kind.__file__).parent / "weights" / f"{MODELS[name]}.safetensors"
    found, labels = images(name, "train")
    model = kind.create().to(memory_format=torch.channels_last).train()
    average = common.Average(model, DECAY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    run = common.Run(MODELS[name], options.steps, options.seed, common.checkpoint(options, MODELS[name]),
                     {"model": model, "average": average, "optimizer": optimizer})
    quick = samplers.of({**kind.RECORD["options"], "sampler": {"name": "ddim", "steps": 25}})
    reference = test_features(name, 2000)

    def step(index: int) -> dict[str, float]:
        common.set_rate(optimizer, common.cosine(index, options.steps, RATE, WARMUP))
        x, t, told, target = batch(found, labels, facts, options.seed, index)
        with common.autocast():
            made = model(*arguments_of(x, t, told))
        loss = (made.float() - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        average.update(model, index)
        return {"loss": loss.item()}

    def evaluate() -> dict[str, float]:
        if run.step % EVERY and run.step != options.steps:
            return {}
        made = sampled(average.module, quick, JUDGED, channels)
        return {f"kid_{JUDGED}": kid(features(name, made), reference)}

    common.train(run, step, evaluate=evaluate, every=250)
    common.write_weights(average.module, weights, half=True)
    settings = {"batch": BATCH, "rate": RATE, "warmup": WARMUP, "average_decay": DECAY, "gradient_clip": CLIP,
                "labels_dropped": DROPPED if facts.labels else None, "prediction": facts.prediction,
                "schedule": kind.RECORD["options"]["schedule"], "optimizer": "AdamW", "precision": common.PRECISION}
    told = figures(name, average.module.float(), dict(kind.RECORD["options"]), channels)
    about = {"mnist": "MNIST, 60,000 training images, padded to 32x32", "cifar": "CIFAR-10, 50,000 training images"}
    common.record(run, settings=settings, figures=told, weights=weights, module=model, data=about[name])


if __name__ == "__main__":
    main()
