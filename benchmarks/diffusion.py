"""Runs of the network against quality and time, of a denoiser: `python benchmarks/diffusion.py --model ddpm_unet`.

For the teacher and (with --student BUNDLE) a student, in ONNX Runtime and OpenVINO: FP32, BF16 and INT8 (calibrated
along the way from noise to image, and naively), every sampler of --samplers at every number of steps of --steps; U-Nets
also with cached deep blocks. KID to real images (--data) or to the teacher at its own settings; PSNR to the teacher's
images of the same latents; milliseconds an image. Every point is written when it is there, so a run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

from edgegen import bundle, data, files, loading, measuring, onnx_graph, registry, samplers, targets
from edgegen.candidates import per_image
from edgegen.metrics.kid import kid
from edgegen.nn import diffusion
from edgegen.nn.cached import Full, Partial
from edgegen.nn.features import load_features
from edgegen.types import Model, PrecisionPlan, Stage, TensorSpec

ROOT = Path(__file__).resolve().parents[1]
BUILDS = {
    "onnxruntime fp32": ("onnxruntime", PrecisionPlan(), ""),
    "openvino fp32": ("openvino", PrecisionPlan(), ""),
    "openvino bf16": ("openvino", PrecisionPlan("bf16"), ""),
    "openvino int8": ("openvino", PrecisionPlan("int8", rest="fp32", ranges="mean"), "trajectory"),
    "openvino int8 naive": ("openvino", PrecisionPlan("int8", rest="fp32", ranges="mean"), "naive"),
}


def main() -> None:
    asked = arguments()
    teacher = loading.load_model(asked.model, weights=asked.weights)
    out = asked.out or ROOT / "benchmarks" / "results" / f"diffusion-{teacher.name}.json"
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"points": {}}
    extractor = load_features(asked.features or str(teacher.options["features"]))
    shape = tuple(int(d) for d in teacher.stage.inputs[0].shape[1:])
    latents = np.random.default_rng(asked.seed).standard_normal((asked.count, *shape), dtype=np.float32)
    networks = {"teacher": teacher, **({"student": bundle.load_model(asked.student)} if asked.student else {})}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(asked, Path(scratch), latents, extractor, teacher)
        for name, model in networks.items():
            for build in asked.builds:
                for sampler in asked.samplers:
                    for steps in asked.steps:
                        for every in (1, *asked.cache):
                            key = f"{name} | {build} | {sampler} | {steps} | cache {every}"
                            if key in found["points"] or (every > 1 and not cacheable(model, build)):
                                continue
                            found["points"][key] = bench.point(model, build, sampler, steps, every)
                            files.write_json(out, {**found, "settings": told(asked)})
                            print(key, json.dumps(found["points"][key]), flush=True)
    print(out)


class Bench:
    """The reference images and the builds, each made once."""

    def __init__(self, asked: argparse.Namespace, folder: Path, latents: np.ndarray, extractor, teacher: Model) -> None:
        self.asked, self.folder, self.latents, self.extractor, self.teacher = asked, folder, latents, extractor, teacher
        self.target = dataclasses.replace(targets.load("cpu"), threads=asked.threads)
        self.made: dict[tuple, dict] = {}
        settings = samplers.of(teacher.options)
        self.wanted = self.unit(samplers.generate(settings, diffusion.runner(teacher.stage.module), latents))
        if asked.data is not None:
            self.real = data.Dataset(data.open_source(asked.data), teacher, length=asked.count)
        else:
            other = np.random.default_rng(asked.seed + 1).standard_normal(latents.shape, dtype=np.float32)
            self.real = self.unit(samplers.generate(settings, diffusion.runner(teacher.stage.module), other))

    def unit(self, images: np.ndarray) -> np.ndarray:
        low, high = self.teacher.stage.outputs[0].value_range
        return np.clip((images - low) / (high - low), 0, 1)

    def point(self, model: Model, build: str, sampler: str, steps: int, every: int) -> dict:
        """One point of the curve: figures of `count` images, and time an image on this machine."""
        facts = {key: model.options[key] for key in ("prediction", "schedule", "train_steps", "labels")
                 if key in model.options}  # fmt: skip
        settings = samplers.complete({**facts, "name": sampler, "steps": steps, "cache_every": every})
        artifacts = self.artifacts(model, build, every > 1)
        with measuring.Worker(artifacts["full"]) as full:
            runs = {"full": full.run_many}
            if every == 1:
                images = self.unit(samplers.generate(settings, runs, self.latents))
            else:
                with measuring.Worker(artifacts["partial"]) as partial:
                    images = self.unit(samplers.generate(settings, {**runs, "partial": partial.run_many}, self.latents))
        calls, partial_calls = samplers.calls(settings)
        names = list(artifacts) if every > 1 else ["full"]
        times = measuring.time_interleaved(
            [artifacts[name] for name in names], [self.feeds(artifacts[name], settings) for name in names],
            rounds=self.asked.rounds,
        )  # fmt: skip
        each = dict(zip(names, [t.value for t in times], strict=True))
        real = self.real.real_images() if isinstance(self.real, data.Dataset) else iter([self.real])
        distance = kid(real, iter([images]), features=self.extractor, subset_size=min(1000, len(images)))
        error = np.square(images - self.wanted).mean((1, 2, 3))
        whole = per_image(times[0], settings).value if every == 1 else (
            (calls - partial_calls) * each["full"] + partial_calls * each["partial"])  # fmt: skip
        return {"nfe": calls, "partial": partial_calls, "ms_per_image": whole, "ms_per_run": each, "n": len(images),
                "kid": distance.value, "kid_interval": list(distance.interval or ()), "threads": self.asked.threads,
                "psnr_to_teacher": float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))}  # fmt: skip

    def artifacts(self, model: Model, build: str, cached: bool) -> dict:
        key = (id(model), build, cached)
        if key not in self.made:
            runtime, plan, calibration = BUILDS[build]
            found = {}
            for name, stage in stages(model, cached).items():
                place = self.folder / files.key(str(key), name)
                graph = onnx_graph.to_onnx(stage, place.with_suffix(".onnx"))
                graph = dataclasses.replace(graph, plan=plan)
                samples = self.calibration(model, place.with_suffix(".samples"), calibration) if calibration else None
                module = registry.module("runtimes", runtime)
                found[name] = module.build(graph, place, calibration=samples, target=self.target)
            self.made[key] = found
        return self.made[key]

    def calibration(self, model: Model, folder: Path, kind: str) -> Path:
        """Inputs along the model's own way from noise to image, or the naive ones."""
        folder.mkdir(exist_ok=True)
        given = samplers.trajectory(samplers.of(model.options), diffusion.runner(model.stage.module), self.latents[:32],
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


def stages(model: Model, cached: bool) -> dict[str, Stage]:
    """The one stage, or the full and the partial one with the cache between them."""
    if not cached:
        return {"full": model.stage}
    import torch

    full, partial = Full(model.stage.module).eval(), Partial(model.stage.module).eval()
    with torch.no_grad():
        zeros = [torch.zeros(tuple(int(d) for d in spec.shape)) for spec in model.stage.inputs]
        shape = tuple(full(*zeros)[1].shape)
    cache, out = TensorSpec("cache", shape), model.stage.outputs[0]
    return {"full": Stage("full", full, model.stage.inputs, (out, cache)),
            "partial": Stage("partial", partial, (*model.stage.inputs, cache), (out,))}  # fmt: skip


def cacheable(model: Model, build: str) -> bool:
    """Cached builds are float ones of U-Nets."""
    return hasattr(getattr(model.stage.module, "net", None), "up_blocks") and not BUILDS[build][2]


def told(asked: argparse.Namespace) -> dict:
    """The settings, without the output file: a place on this machine."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items() if key != "out"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ddpm_unet")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--student", type=Path, help="a bundle")
    parser.add_argument("--data", type=Path, help="real images for KID")
    parser.add_argument("--features", default="")
    parser.add_argument("--builds", nargs="+", default=list(BUILDS), choices=list(BUILDS))
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpmpp_2m", "heun"])
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 4, 8, 16, 32, 50])
    parser.add_argument("--cache", nargs="*", type=int, default=[2, 3])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--calibration-images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=measuring.host_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
