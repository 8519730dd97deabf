"""Runs of the network against quality and time, of a denoiser: `python benchmarks/diffusion.py --model ddpm_unet`.

For the teacher, in --builds (INT8: calibrated along the way from noise to image, or naively): every sampler of
--samplers at every number of steps of --steps, the first one also with cached deep blocks (U-Nets). For a student
(--student BUNDLE): its own sampler at up to its own number of steps. KID to real images: --data, else the test images
of what the model learned from; PSNR to the teacher's images of the same latents at its own settings. Every point is
written when it is there, so a run goes on where it stopped. At the end all networks are timed, in one interleaved run
(--no-times: not now). results/diffusion-MODEL.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import conditions
import diffusion_table
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "train"))

import diffusion as trained  # noqa: E402 - the training script's

from edgegen import bundle, data, files, loading, measuring, onnx_graph, registry, samplers, targets  # noqa: E402
from edgegen.devices import local  # noqa: E402
from edgegen.metrics._common import feature_rows  # noqa: E402
from edgegen.metrics.kid import kid  # noqa: E402
from edgegen.nn import cached as cached_blocks  # noqa: E402
from edgegen.nn import diffusion  # noqa: E402
from edgegen.nn.features import load_features  # noqa: E402
from edgegen.runtimes import _common  # noqa: E402
from edgegen.types import Model, PrecisionPlan  # noqa: E402
from edgegen.weights import state_hash  # noqa: E402

BUILDS = {
    "onnxruntime fp32": ("onnxruntime", PrecisionPlan(), ""),
    "openvino fp32": ("openvino", PrecisionPlan(), ""),
    "openvino bf16": ("openvino", PrecisionPlan("bf16"), ""),
    "openvino int8": ("openvino", PrecisionPlan("int8", ranges="minmax"), "trajectory"),
    "openvino int8 mean": ("openvino", PrecisionPlan("int8", ranges="mean"), "trajectory"),
    "openvino int8 naive": ("openvino", PrecisionPlan("int8", ranges="minmax"), "naive"),
}


def main() -> None:
    asked = arguments()
    teacher = loading.load_model(asked.model, weights=asked.weights)
    out = asked.out or ROOT / "benchmarks" / "results" / f"diffusion-{teacher.name}.json"
    settings = told(asked, teacher)
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "points": {}}
    networks = {"teacher": teacher, **({"student": bundle.load_model(asked.student)} if asked.student else {})}
    if "student" in networks and found.get("student") != (mine := state_hash(networks["student"].stage.module)):
        found["points"] = {key: point for key, point in found["points"].items() if not key.startswith("student")}
        found["student"] = mine
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(asked, Path(scratch), teacher)
        found["plans"] = {build: bench.plan(build).label for build in BUILDS}
        for name, model in networks.items():
            for build, (sampler, steps, every) in itertools.product(asked.builds, ways(name, model, asked)):
                key = f"{name} | {build} | {sampler} | {steps} | cache {every}"
                if key in found["points"]:
                    continue
                found["points"][key] = bench.point(model, build, sampler, steps, every)
                conditions.write_json(out, found)
                print(key, json.dumps(found["points"][key]), flush=True)
        if not asked.no_times:
            found |= {**conditions.conditions(), "times": bench.times(networks, found["points"])}
            conditions.write_json(out, found)
    diffusion_table.write(out)
    print(out)


class Bench:
    """The reference images and the builds, each made once."""

    def __init__(self, asked: argparse.Namespace, folder: Path, teacher: Model) -> None:
        self.asked, self.folder, self.teacher = asked, folder, teacher
        self.extractor = load_features(asked.features or str(teacher.options["features"]))
        shape = tuple(int(d) for d in teacher.stage.inputs[0].shape[1:])
        self.latents = np.random.default_rng(asked.seed).standard_normal((asked.count, *shape), dtype=np.float32)
        self.target = dataclasses.replace(targets.load("cpu"), threads=asked.threads)
        self.made: dict[tuple, dict] = {}
        self.wanted = self.unit(samplers.generate(
            samplers.of(teacher.options), diffusion.runner(teacher.stage.module), self.latents[: asked.paired]))
        self.real = feature_rows(self.real_images(), self.extractor)

    def real_images(self) -> Iterator[np.ndarray]:
        """The images that KID is taken to, batches in 0..1."""
        if self.asked.data is not None:
            return data.Dataset(data.open_source(self.asked.data), self.teacher).real_images()
        learned = next((name for name, model in trained.MODELS.items() if model == self.teacher.name), None)
        if learned is None:
            raise SystemExit(f"{self.teacher.name}: which images it learned from is not known; give --data")
        drawn = trained.tested(learned, self.asked.count)
        return iter(np.array_split(drawn, max(1, len(drawn) // 250)))

    def unit(self, images: np.ndarray) -> np.ndarray:
        low, high = self.teacher.stage.outputs[0].value_range
        return np.clip((images - low) / (high - low), 0, 1)

    def point(self, model: Model, build: str, sampler: str, steps: int, every: int) -> dict:
        """One point of the curve: figures of `count` images."""
        settings = sampling(model, sampler, steps, every)
        with contextlib.ExitStack() as stack:
            runs = {name: stack.enter_context(measuring.Worker(artifact)).run_many
                    for name, artifact in self.artifacts(model, build, every > 1).items()}
            images = self.unit(samplers.generate(settings, runs, self.latents))
        calls, partial = samplers.calls(settings)
        distance = kid(self.real, iter([images]), features=self.extractor, subset_size=min(1000, len(images)))
        error = np.square(images[: len(self.wanted)] - self.wanted).mean((1, 2, 3))
        return {"nfe": calls, "partial": partial, "n": len(images), "kid": distance.value,
                "kid_interval": list(distance.interval or ()),
                "psnr_to_teacher": float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))}  # fmt: skip

    def times(self, networks: dict[str, Model], points: dict) -> dict:
        """"network | build | full or partial" -> milliseconds of one run, of all that the points need."""
        artifacts, feeds = {}, []
        for key in points:
            name, build, sampler, steps, cache = key.split(" | ")
            every = int(cache.removeprefix("cache "))
            if name not in networks:
                continue
            model, kind = networks[name], "cached" if every > 1 else "whole"
            for part, artifact in self.artifacts(model, build, every > 1).items():
                if (place := f"{name} | {build} | {kind} {part}") not in artifacts:
                    artifacts[place] = artifact
                    feeds.append(self.feeds(artifact, sampling(model, sampler, int(steps), every)))
        found = measuring.time_interleaved(list(artifacts.values()), feeds, rounds=self.asked.rounds)
        return {place: {"ms": one.value, "interval": one.interval, "samples": one.samples,
                        "round_medians": one.conditions["round_medians"]}
                for place, one in zip(artifacts, found, strict=True)}  # fmt: skip

    def artifacts(self, model: Model, build: str, cached: bool) -> dict:
        key = (id(model), build, cached)
        if key not in self.made:
            runtime, _, calibration = BUILDS[build]
            plan = self.plan(build)
            found = {}
            settings = samplers.of({**model.options, "sampler": {**model.options["sampler"], "cache_every": 2}})
            parts = zip(("full", "partial"), cached_blocks.stages(model.stage, settings)) if cached else [
                ("full", model.stage)]  # fmt: skip
            for name, stage in parts:
                place = self.folder / files.key(str(key), name)
                graph = onnx_graph.to_onnx(stage, place.with_suffix(".onnx"))
                graph = dataclasses.replace(graph, plan=plan)
                between = settings if name == "partial" else None
                samples = (self.calibration(model, place.with_suffix(".samples"), calibration, between)
                           if calibration else None)  # fmt: skip
                module = registry.module("runtimes", runtime)
                found[name] = module.build(graph, place, calibration=samples, target=self.target)
            self.made[key] = found
        return self.made[key]

    def plan(self, build: str) -> PrecisionPlan:
        """With weights of 7 bits where this processor would cut off the sums of 8."""
        return _common.exact_sums((BUILDS[build][1],), self.target, local.cpu_flags())[0]

    def calibration(self, model: Model, folder: Path, kind: str, cached: dict | None) -> Path:
        """Inputs along the model's own way from noise to image (cached: of its partial network), or the naive ones."""
        folder.mkdir(exist_ok=True)
        runs = cached_blocks.runs(model.stage.module, cached) if cached else diffusion.runner(model.stage.module)
        given = samplers.trajectory(cached or samplers.of(model.options), runs, self.latents[:32],
                                    self.asked.calibration_images, naive=kind == "naive")  # fmt: skip
        for name, values in given.items():
            np.save(folder / f"{name}.npy", values, allow_pickle=False)
        return folder

    def feeds(self, artifact, settings: dict) -> dict:
        given = samplers.feeds(settings, self.latents[:1])
        rng = np.random.default_rng(0)
        shapes = {spec.name: tuple(int(d) for d in spec.shape) for spec in artifact.inputs}
        return {name: given[name] if name in given else rng.standard_normal(shape, dtype=np.float32)
                for name, shape in shapes.items()}  # fmt: skip


def ways(name: str, model: Model, asked: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(sampler, steps, cached every so many) of a network's points."""
    own = samplers.of(model.options)
    kinds, counts = asked.samplers, asked.steps
    if name == "student":
        kinds, counts = [own["name"]], [steps for steps in (1, 2, 4, 8) if steps < own["steps"]] + [own["steps"]]
    caches = [] if cached_blocks.unfit(model.stage.module) else asked.cache
    found = list(itertools.product(kinds, counts, (1,)))
    return found + [(kinds[0], steps, every) for steps in counts for every in caches if every < steps]


def sampling(model: Model, sampler: str, steps: int, every: int) -> dict:
    """The settings of a sampler for this network."""
    return samplers.of({**model.options, "sampler": {"name": sampler, "steps": steps, "cache_every": every}})


def told(asked: argparse.Namespace, teacher: Model) -> dict:
    """What every figure depends on: a run with other settings starts anew."""
    kept = ("model", "weights", "data", "features", "count", "paired", "calibration_images", "threads", "seed")
    given = {key: value.name if isinstance(value := getattr(asked, key), Path) else value for key in kept}
    return {**given, "network": state_hash(teacher.stage.module)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ddpm_unet")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--student", type=Path, help="a bundle")
    parser.add_argument("--data", type=Path, help="real images for KID (ddpm_unet, ddpm_cifar: test images)")
    parser.add_argument("--features", default="")
    parser.add_argument("--builds", nargs="+", default=["openvino fp32", "openvino int8"], choices=list(BUILDS))
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpmpp_2m"])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 8, 12, 16, 24, 50])
    parser.add_argument("--cache", nargs="*", type=int, default=[2, 3])
    parser.add_argument("--count", type=int, default=5000, help="images for KID")
    parser.add_argument("--paired", type=int, default=500, help="images for the PSNR to the teacher's")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--calibration-images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=measuring.host_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
