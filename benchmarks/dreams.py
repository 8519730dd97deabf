"""What a denoiser's inner maps are worth to a classifier of the same kind of images that has few labels.

    python benchmarks/dreams.py [--labels 100] [--seeds 3] [--threads 1]

A small convolutional network for MNIST, three ways: labels alone; labels alone for as many steps as the third way has
in all; first `distill` with the loss `generator` (teacher: the built-in ddpm_unet) on all training images without their
labels, then labels. The same LABELS training images, steps and rates in each; top-1 on the 10,000 test images. Needs
../shared/assets; results/dreams.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import conditions
import numpy as np
import torch
from torch import nn

from edgegen import data, loading
from edgegen.passes.distill import distill
from edgegen.types import Job, Model, Preprocessing, Stage, Target, TensorSpec

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
LABELLED = {"steps": 300, "batch": 32, "lr": 2e-3, "losses": ["labels"], "precision": "fp32"}
DREAMT = {"steps": 600, "batch": 32, "lr": 2e-3, "losses": ["generator"], "precision": "fp32"}


def classifier(seed: int) -> Model:
    """28 x 28 grey images to ten classes: four convolutions with batch norm, three sizes of maps."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for given, made, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        conv = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        parts.append(nn.Sequential(conv, nn.BatchNorm2d(made), nn.ReLU()))
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    stage = Stage(
        "main", network.eval(), (TensorSpec("x", ("N", 1, 28, 28), "float32", (0.0, 1.0)),),
        (TensorSpec("logits", ("N", 10), "float32"),),
    )  # fmt: skip
    return Model("digits", "classification", (stage,), Preprocessing((0.0, 1.0), mean=(0.13,), std=(0.31,), colour="L"))


def read(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, 28, 28) uint8, classes (N,))."""
    with np.load(ASSETS / f"mnist-{part}.npz", allow_pickle=False) as stored:
        x, y = stored["x"], stored["y"]
    return x.reshape(len(x), 28, 28), y.astype(np.int64)


def few(y: np.ndarray, count: int, seed: int) -> np.ndarray:
    """As many of each class, by the seed."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(y == label))[: count // 10] for label in range(10)])


@torch.inference_mode()
def top1(model: Model, x: np.ndarray, y: np.ndarray) -> float:
    """Share of the test images whose class is found."""
    images = (torch.from_numpy(x[:, None]).float() / 255 - 0.13) / 0.31
    made = [model.stage.module(images[i:i + 500]).argmax(1) for i in range(0, len(images), 500)]
    return float((torch.cat(made).numpy() == y).mean())


def run(seed: int, labels: int, threads: int) -> dict[str, float]:
    """Top-1 of the three ways with one seed."""
    x, y = read("train")
    chosen = few(y, labels, seed)
    start, judge = classifier(seed), read("test")
    target = Target("none", "", ())

    def job(rows: Any, teacher: Model | None = None) -> Job:
        dataset = data.Dataset(data.ArraySource("digits", x[rows], y[rows]), start, seed=seed)
        return Job(target, teacher=teacher, data=dataset, seed=seed, threads=threads)

    def labelled(model: Model, steps: int) -> float:
        return top1(distill(model, job(chosen), **{**LABELLED, "steps": steps}).model, *judge)

    denoiser = loading.load_model("ddpm_unet")
    dreamt = distill(start, job(slice(None), denoiser), **DREAMT)
    steps = int(LABELLED["steps"])
    return {
        "labels": labelled(start, steps), "labels, longer": labelled(start, steps + int(DREAMT["steps"])),
        "generator, then labels": labelled(dreamt.model, steps),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Way by seed, with the mean."""
    seeds = sorted(found["top1"], key=int)
    lines = [f"| {found['labels']} labels, top-1 | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
             "|---|" + (len(seeds) + 1) * "---|"]  # fmt: skip
    for way in found["top1"][seeds[0]]:
        values = [found["top1"][seed][way] for seed in seeds]
        lines.append(f"| {way} | " + " | ".join(f"{value:.4f}" for value in (*values, statistics.mean(values))) + " |")
    where = f"Machine: {found['machine']}, {found['cores']} cores; {found['date']}."
    return "\n".join([*lines, "", where, ""])


def main() -> None:
    """All seeds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=100, help="a multiple of 10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    found: dict[str, Any] = {"labels": asked.labels, "settings": [DREAMT, LABELLED], "top1": {}}
    for seed in range(asked.seeds):
        found["top1"][str(seed)] = run(seed, asked.labels, asked.threads)
        print(seed, found["top1"][str(seed)], flush=True)
        conditions.write_json(RESULTS / "dreams.json", {**found, **conditions.conditions()})
    (RESULTS / "dreams.md").write_text(table({**found, **conditions.conditions()}), encoding="utf-8")


if __name__ == "__main__":
    main()
