"""A pruned generator: distilled against its teacher, with and without a discriminator, and trained from scratch.

    python benchmarks/distill_gan.py [--model sagan_cifar] [--steps 1000] [--ratio 0.3] [--seeds 3] [--samples 5000]
        [--adversarial 1] [--after 0.1] [--only NAME ...]

KID to test images (of ../shared/assets) in the model's own encoder, with its 95% interval, of:
teacher (the seed is that of its latents), pruned (no training), distill (L1 to the teacher), distill_gan (projected
discriminator, the teacher's samples as real), distill_gan_real (training images as real), distill_gan_r3gan (the same
with R3GAN), online (the teacher trained along) and scratch (the pruned architecture with fresh weights, real images,
the same discriminator and steps, no teacher). The discriminator looks at the features that KID is taken in, so colour
images are also judged by a network of ImageNet, enlarged.
Resumable; results/distill-gan-MODEL.json and .md, written as each run ends; a run with other settings starts anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "train"))

import conditions  # noqa: E402
import diffusion  # noqa: E402 - the training script's
import search_gan  # noqa: E402

from edgegen import data, files, graph, loading  # noqa: E402
from edgegen.metrics._common import feature_rows  # noqa: E402
from edgegen.metrics._rows import Rows  # noqa: E402
from edgegen.metrics.kid import kid  # noqa: E402
from edgegen.nn.features import load_features  # noqa: E402
from edgegen.passes.distill import distill  # noqa: E402
from edgegen.passes.distill_gan import distill_gan  # noqa: E402
from edgegen.passes.prune_channels import prune_channels  # noqa: E402
from edgegen.types import Job, Measurement, Model, PassResult, Target  # noqa: E402

RESULTS, WORK = ROOT / "benchmarks" / "results", ROOT / "out" / "distill_gan"
TARGET = Target("benchmark", "", (), channel_multiple={"default": 8})
DATA = {"dcgan": "mnist", "sagan_cifar": "cifar"}  # as the model was trained on them: digits are padded, not enlarged
AT_ONCE = 250


def made(model: Model, count: int, seed: int) -> Iterator[np.ndarray]:
    """Samples (n, C, 32, 32) in 0..1 from latents of their own seed."""
    wide = int(model.stage.inputs[0].shape[1])
    for start in range(0, count, AT_ONCE):
        z = np.random.default_rng((11, seed, start)).standard_normal((min(AT_ONCE, count - start), wide), np.float32)
        yield ((graph.outputs(model.stage.module, (torch.from_numpy(z),))[0] + 1) / 2).numpy()


def learned(model: Model) -> data.Dataset:
    """Latents, and the training images as the real ones."""
    found = diffusion.images(DATA[model.name], "train")[0].transpose(0, 2, 3, 1)
    return data.Dataset(data.ArraySource(DATA[model.name], found), model, seed=0)


@functools.cache
def reference(model: str, features: str, count: int) -> tuple[Rows, Rows | None]:
    """Features of test images, and of photographs another network's."""
    drawn = diffusion.tested(DATA[model], count)
    parts = [drawn[start : start + AT_ONCE] for start in range(0, len(drawn), AT_ONCE)]
    return feature_rows(iter(parts), load_features(features)), (
        search_gan.other_rows(parts) if features == "cifar" else None)  # fmt: skip


def fresh(model: Model, seed: int) -> Model:
    """The same architecture with new random weights."""
    module = graph.clone(model.stage.module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return model.with_module(module)


def candidates(options: argparse.Namespace, teacher: Model) -> dict[str, Callable[[Job], PassResult]]:
    """Name -> how it is made."""
    def student(job: Job) -> Model:
        return prune_channels(teacher, job, ratio=options.ratio, round_to=8).model

    def game(job: Job, **more: Any) -> PassResult:
        return distill_gan(student(job), job, steps=options.steps, batch=options.batch,
                           adversarial=options.adversarial, adversarial_after=options.after, **more)  # fmt: skip

    def scratch(job: Job) -> PassResult:
        lone = {"output": 0.0, "features": 0.0, "adversarial": 1.0, "adversarial_after": 0.0, "real": "data"}
        return distill_gan(fresh(student(job), job.seed), job, steps=options.steps, batch=options.batch, **lone)

    return {
        "teacher": lambda job: PassResult(teacher),
        "pruned": lambda job: PassResult(student(job)),
        "distill": lambda job: distill(student(job), job, steps=options.steps, batch=options.batch, ema=0.99),
        "distill_gan": lambda job: game(job, real="teacher"),
        "distill_gan_real": lambda job: game(job, real="data"),
        "distill_gan_r3gan": lambda job: game(job, real="data", loss="r3gan"),
        "online": lambda job: game(job, real="data", online=True),
        "scratch": scratch,
    }


def run(make: Callable[[Job], PassResult], job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Make one candidate and judge it."""
    result = make(job)
    stage, features = result.model.stage, str(result.model.options["features"])
    cost = graph.cost(stage.module, graph.example_inputs(stage))
    drawn = list(made(result.model, options.samples, job.seed))
    real, others = reference(result.model.name, features, options.samples)
    found: Measurement = kid(real, iter(drawn), features=load_features(features), seed=0)
    row = {
        "kid": found.value, "interval": found.interval, "conditions": dict(found.conditions), "macs": cost.macs,
        "params": cost.params, "steps": result.notes.get("steps", 0), "seconds": result.notes.get("seconds", 0.0),
        "stopped": result.notes.get("stopped", ""),
    }  # fmt: skip
    return {**row, "other": search_gan.other_kid(others, drawn)} if others is not None else row


def table(runs: dict[str, Any], settings: dict[str, Any]) -> str:
    """The report: each run, and the mean over the seeds."""
    judges = {"kid": "KID x 1000 of each seed"}
    if any("other" in row for row in runs.values()):
        judges["other"] = f"by {search_gan.OTHER.partition(':')[0]}"
    lines = ["# A pruned generator, distilled and from scratch", "", "`python benchmarks/distill_gan.py`, "
             + ", ".join(f"{name} {value}" for name, value in settings.items()) + ". Lower is better; the interval is "
             "95% over the images of one run.", "",
             f"| network | MACs | parameters | {' | mean | '.join(judges.values())} | mean |",
             "|---|---|---|" + "---|---|" * len(judges)]  # fmt: skip
    for name in dict.fromkeys(key.split(":")[0] for key in runs):
        rows = [row for key, row in sorted(runs.items()) if key.split(":")[0] == name]
        cells = []
        for judge in judges:
            found = [row["other"] if judge == "other" else row for row in rows]
            cells.append("; ".join(search_gan.shown(one) + (f" {row['stopped']}" if row["stopped"] else "")
                                   for one, row in zip(found, rows, strict=True)))  # fmt: skip
            cells.append(f"{1000 * float(np.mean([one['kid'] for one in found])):.2f}")
        lines.append(f"| {name} | {rows[0]['macs']:,} | {rows[0]['params']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sagan_cifar", choices=list(DATA))
    for name, default in (("steps", 1000), ("batch", 64), ("seeds", 3), ("samples", 5000), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, rate in (("ratio", 0.3), ("adversarial", 1.0), ("after", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=rate)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("model", "steps", "batch", "ratio", "adversarial", "after",
                                                          "samples")}  # fmt: skip
    file = options.results / f"distill-gan-{options.model}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    runs: dict[str, Any] = kept.get("runs", {}) if kept.get("settings") == settings else {}
    teacher = loading.load_model(options.model)
    everything = candidates(options, teacher)
    for name, make in everything.items():
        for seed in range(options.seeds):
            key = f"{name}:{seed}"
            if key in runs or (options.only and name not in options.only):
                continue
            job = Job(TARGET, data=learned(teacher), teacher=teacher, seed=seed, threads=options.threads,
                      device=options.device, checkpoints=WORK / files.key(settings, key),
                      progress=lambda text, fraction, key=key: print(f"\r{key}: {text}   ", end="", file=sys.stderr))
            runs[key] = run(make, job, options)
            print(f"\n{key}: KID x 1000 {1000 * runs[key]['kid']:.2f}", file=sys.stderr, flush=True)
            ordered = {k: runs[k] for n in everything for k in sorted(runs) if k.split(":")[0] == n}
            files.write_json(file, {**conditions.conditions(), "settings": settings, "runs": runs})
            files.write_text(file.with_suffix(".md"), table(ordered, settings))


if __name__ == "__main__":
    main()
