"""A supernet of an image-to-image generator: does it order its subnets rightly, and does a found one beat a made one.

    python benchmarks/supernet.py [--steps 800] [--alone 300] [--subnets 10] [--drawn 40] [--features SPEC]

Network: style-mosaic of ../shared/assets (the ResNet generator type), data: out/data/photos (prepare_data.py).
1. `train_supernet`, once. 2. `--subnets` subnets at random, each as a slice (own norm statistics, no further training)
and alone (cut from the sorted original, distilled): PSNR to the teacher on photos it never saw, Kendall's tau of both
lists. 3. The narrowest and a mild subnet in both ways with the same distillation. 4. `--drawn` slices are scored; the
best one with at most the MACs of a hand-made student (every free width halved) is continued alone, and both are
compared, with and without the supernet: PSNR to the teacher, KID to the teacher's images. Every training lies in
out/supernet/cache: killed and called again, it goes on. Writes results/supernet.json and .md.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import conditions
import numpy as np
import torch
from torch import nn

from edgegen import data, files, graph, loading, steps
from edgegen.metrics.kid import kid
from edgegen.nn.features import load_features
from edgegen.passes import _supernet
from edgegen.passes._supernet import Choice, Elastic
from edgegen.recipe import Step
from edgegen.search import supernet
from edgegen.types import Job, Model, Target

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
TARGET = Target("benchmark", "", (), channel_multiple={"default": 8})
SHARES = (0.25, 0.5, 0.75, 1.0)
FAST = {"lr": 2e-3, "optimizer": "muon"}  # of every training here


class Bench:
    """The teacher, its outputs on the evaluation photos, and trainings that are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        weights = options.weights if options.weights else None
        self.model: Model = loading.load_model(options.model, weights=weights, options=loading.ModelOptions())
        self.train = data.Dataset(data.open_source(options.photos / "train"), self.model, seed=0)
        held = data.Dataset(data.open_source(options.photos / "eval"), self.model, seed=0)
        self.inputs = [torch.from_numpy(held[i].input[None]) for i in range(len(held))]
        spec = self.model.stage.outputs[0]
        self.low, self.high = spec.value_range or (0.0, 1.0)
        self.wanted = [self.shown(self.model.stage.module, one) for one in self.inputs]
        self.job = Job(TARGET, data=self.train, teacher=self.model, threads=options.threads,
                       progress=lambda text, share: print(f"\r{text} {share:.0%}   ", end="", file=sys.stderr))

    def shown(self, module: nn.Module, image: torch.Tensor) -> np.ndarray:
        """The output in 0..1, (1, C, H, W)."""
        out = graph.outputs(module, (image,))[0]
        return ((out - self.low) / (self.high - self.low)).clamp(0, 1).numpy()

    def psnr(self, module: nn.Module) -> float:
        """Mean PSNR (dB) to the teacher's outputs; higher is better."""
        pairs = list(zip(self.inputs, self.wanted, strict=True))[: self.options.photos_scored]
        errors = [float(np.square(self.shown(module, x) - y).mean()) for x, y in pairs]
        return float(np.mean([-10 * np.log10(max(error, 1e-10)) for error in errors]))

    def kid(self, module: nn.Module) -> Any:
        """KID to the teacher's outputs on all held photos, with its interval; lower is better."""
        made = (self.shown(module, x) for x in self.inputs)
        return kid(iter(self.wanted), made, features=load_features(self.options.features), seed=0)

    def passed(self, model: Model, name: str, **options: Any) -> Model:
        """The model after one pass, from the cache where it was done before."""
        return steps.run_step(Step(name=name, options=options), model, self.model, self.job, self.train.digest).model

    def distilled(self, module: nn.Module) -> nn.Module:
        """A subnet trained against the teacher."""
        o = self.options
        return self.passed(self.model.with_module(module), "distill", steps=o.alone, batch=o.batch, crop=o.crop,
                           **FAST).stage.module

    def macs(self, module: nn.Module) -> int:
        return graph.cost(module, (self.inputs[0],)).macs


def told(choice: Choice) -> dict[str, Any]:
    return {"channels": dict(choice.channels), "without": sorted(choice.without)}


def same(space: Elastic, share: float) -> Choice:
    """Every width at one share, no block left out."""
    return Choice({w.name: _supernet.kept(w.full, share, TARGET.width_multiple("int8")) for w in space.widths})


def ranked(bench: Bench, trained: nn.Module, plain: nn.Module, space: Elastic, batches: list[Any]) -> dict[str, Any]:
    """Part 2."""
    draw = random.Random(0)
    choices = [_supernet.drawn(space, draw) for _ in range(bench.options.subnets)]
    alone = lambda choice: bench.distilled(_supernet.cut(plain, space, choice))  # noqa: E731
    found = supernet.ranks(trained, space, choices, batches, alone, bench.psnr)
    rows = [{**told(c), "macs": bench.macs(_supernet.cut(plain, space, c)), "slice_psnr": a, "alone_psnr": b}
            for c, a, b in zip(choices, found.slices, found.alone, strict=True)]  # fmt: skip
    return {"tau": found.tau, "subnets": rows}


def both_ways(bench: Bench, trained: nn.Module, plain: nn.Module, space: Elastic) -> dict[str, Any]:
    """Part 3."""
    found = {}
    for name, choice in (("narrowest", _supernet.narrowest(space)), ("mild", same(space, 0.75))):
        sliced = bench.psnr(bench.distilled(_supernet.cut(trained, space, choice)))
        direct = bench.psnr(bench.distilled(_supernet.cut(plain, space, choice)))
        found[name] = {"supernet_psnr": sliced, "direct_psnr": direct,
                       "kept": "supernet" if sliced >= direct else "direct"}  # fmt: skip
    return found


def against_hand(
    bench: Bench, trained: nn.Module, plain: nn.Module, space: Elastic, batches: list[Any]
) -> dict[str, Any]:
    """Part 4."""
    hand = _supernet.cut(plain, space, same(space, 0.5))
    limit, draw = bench.macs(hand), random.Random(1)
    best: tuple[float, Choice] | None = None
    tried = 0
    for _ in range(50 * bench.options.drawn):
        choice = _supernet.drawn(space, draw)
        if bench.macs(_supernet.cut(plain, space, choice)) > limit:
            continue
        score = bench.psnr(_supernet.estimate(_supernet.cut(trained, space, choice).eval(), batches))
        best = max(best, (score, choice), key=lambda one: one[0]) if best else (score, choice)
        tried += 1
        if tried >= bench.options.drawn:
            break
    if best is None:
        return {"hand_macs": limit, "why": "no drawn subnet has so few MACs"}
    rows = {}
    students = {
        "hand-made": hand, "hand-made, slice of the supernet": _supernet.cut(trained, space, same(space, 0.5)),
        "found, without the supernet": _supernet.cut(plain, space, best[1]),
        "found": _supernet.cut(trained, space, best[1]),
    }  # fmt: skip
    for name, module in students.items():
        done = bench.distilled(module)
        distance = bench.kid(done)
        rows[name] = {"macs": bench.macs(done), "psnr": bench.psnr(done), "kid": distance.value,
                      "kid_interval": distance.interval}  # fmt: skip
    return {"tried": tried, "slice_psnr": best[0], "choice": told(best[1]), "students": rows}


def markdown(found: dict[str, Any]) -> str:
    """The report."""
    lines = [f"# Supernet of {found['model']}", "", f"{found['settings']}", "",
             f"Kendall's tau of {len(found['ranks']['subnets'])} subnets, slice against alone: "
             f"**{found['ranks']['tau']:.2f}**", "",
             "| MACs | PSNR to the teacher as a slice | alone |", "|---|---|---|"]  # fmt: skip
    for row in sorted(found["ranks"]["subnets"], key=lambda one: one["macs"]):
        lines.append(f"| {row['macs'] / 1e9:.3f} G | {row['slice_psnr']:.2f} dB | {row['alone_psnr']:.2f} dB |")
    lines += ["", "| extreme | slice of the supernet, continued | direct distillation | kept |", "|---|---|---|---|"]
    for name, row in found["ways"].items():
        lines.append(f"| {name} | {row['supernet_psnr']:.2f} dB | {row['direct_psnr']:.2f} dB | {row['kept']} |")
    lines += ["", "| student | MACs | PSNR to the teacher | KID |", "|---|---|---|---|"]
    for name, row in found["against"].get("students", {}).items():
        interval = "" if row["kid_interval"] is None else " ({:.4f} to {:.4f})".format(*row["kid_interval"])
        lines.append(f"| {name} | {row['macs'] / 1e9:.3f} G | {row['psnr']:.2f} dB | {row['kid']:.4f}{interval} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 800), ("alone", 300), ("subnets", 10), ("drawn", 40), ("batch", 4), ("crop", 128),
                          ("threads", 0), ("photos-scored", 40)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default=str(ROOT / "benchmarks" / "networks" / "style.py") + ":style")
    parser.add_argument("--weights", type=Path, default=ASSETS / "style-mosaic.safetensors")
    parser.add_argument("--photos", type=Path, default=ROOT / "out" / "data" / "photos")
    parser.add_argument("--features", help="of KID, see edgegen.nn.features",
                        default=f"mobilenet_v1_025:{ASSETS / 'mobilenet_v1_025-imagenet.safetensors'}")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "supernet")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "supernet")
    options = parser.parse_args()
    os.environ["EDGEGEN_CACHE"] = str(options.work / "cache")
    began, bench = time.monotonic(), Bench(options)
    shared = {"shares": SHARES, "depth": True, "batch": options.batch, "crop": options.crop}
    trained = bench.passed(bench.model, "train_supernet", steps=options.steps, **shared, **FAST).stage.module
    plain = bench.passed(bench.model, "train_supernet", steps=0, **shared).stage.module
    inputs = [torch.from_numpy(bench.train[i].input[None]) for i in range(8)]
    from edgegen.passes import prune_blocks

    blocks = prune_blocks.removable(plain, (inputs[0],))
    space = _supernet.elastic(plain, SHARES, TARGET.width_multiple("int8"), blocks)
    batches = [(one,) for one in inputs]
    found: dict[str, Any] = {
        "model": "style-mosaic" if "style-mosaic" in str(options.weights) else options.model,
        "settings": f"{options.steps} steps of the supernet, {options.alone} alone, batch {options.batch}, crops of"
                    f" {options.crop}, PSNR on {min(options.photos_scored, len(bench.inputs))} photos, KID on"
                    f" {len(bench.inputs)} in features of {options.features.partition(':')[0]}",
        **conditions.conditions(("torch", "torch-pruning", "numpy")),
        "widths": {w.name: w.full for w in space.widths}, "blocks": blocks,
    }  # fmt: skip
    found["ranks"] = ranked(bench, trained, plain, space, batches)
    found["ways"] = both_ways(bench, trained, plain, space)
    found["against"] = against_hand(bench, trained, plain, space, batches)
    found["seconds_of_last_call"] = round(time.monotonic() - began)
    files.write_json(options.out.with_suffix(".json"), found)
    files.write_text(options.out.with_suffix(".md"), markdown(found))
    print("\n" + markdown(found))


if __name__ == "__main__":
    main()
