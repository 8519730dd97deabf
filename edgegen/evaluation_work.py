"""What an evaluation does with one block of samples: run the artifacts, keep what the metrics need of the outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import __version__, bundle, files, images, measuring, registry, serial
from edgegen.errors import BundleError
from edgegen.metrics import _blocks
from edgegen.sources import content_key
from edgegen.types import Artifact, Measurement, Model, Preprocessing, Stage, TensorSpec

BLOCK = 64
FORM = 2  # of what a block holds: blocks of another form are not read


@dataclass(frozen=True)
class Settings:
    """What to evaluate on. n: samples; 0: all, or 2,048 latents. features, metrics: empty for the task's own.

    real: images to compare sets with, where `data` are inputs; a generator of latents takes them from `data` too.
    """

    data: Path | None = None
    metrics: tuple[str, ...] = ()
    n: int = 0
    seed: int = 0
    features: str = ""
    shard: str = ""
    real: Path | None = None


@dataclass(frozen=True)
class Subject:
    """A bundle that is evaluated: its first artifact, its network's contract, and the loop it runs in, if any."""

    path: Path
    model: Model
    artifact: Artifact
    sha256: str
    sampler: Mapping[str, Any] | None


def subject(path: Path) -> Subject:
    """Open a bundle for evaluation; needs neither torch nor the network's code.

    Raises:
        BundleError: not a bundle, or its artifact is not the file that was bundled.
    """
    opened = bundle.read(path)
    artifact = bundle.artifacts(opened)[0]
    told = opened.manifest["model"]
    listed = opened.manifest["files"]
    hashes = {}
    for file in (file for part in artifact.parts for file in part.files):
        name = file.relative_to(opened.path.absolute()).as_posix()
        hashes[name] = files.sha256(file) if file.is_file() else ""
        if hashes[name] != listed[name]["sha256"]:
            raise BundleError(f"{path}: {name} is not the file that was bundled (see edgegen verify)")
    specs = [tuple(serial.from_json(TensorSpec, spec) for spec in told[side]) for side in ("inputs", "outputs")]
    model = Model(
        name=told["name"],
        task=told["task"],
        stages=(Stage(told["stage"], None, specs[0], specs[1]),),
        preprocessing=serial.from_json(Preprocessing, told["preprocessing"]),
        options=told["options"],
        origin=told["origin"],
    )
    sampler = opened.manifest["graph"].get("sampler")
    if len(artifact.inputs) != 1 and not sampler:
        raise BundleError(f"{path}: has {len(artifact.inputs)} inputs; evaluate takes networks of one input")
    settings = {"options": artifact.options, "plan": dataclasses.asdict(artifact.plan), "sampler": sampler}
    return Subject(Path(path), model, artifact, files.key(hashes, artifact.runtime, settings), sampler)


def takes(name: str) -> str:
    return str(registry.module("metrics", name).TAKES)


def metric(name: str) -> Callable[..., Measurement]:
    """The function of a metric."""
    return getattr(registry.module("metrics", name), name)


def referenced(dataset: Any) -> bool:
    return dataset.model.task != "unconditional" and dataset[0].reference is not None


@dataclass(frozen=True)
class Task:
    """Everything that the blocks of one evaluation depend on. real: source of real images, if there are any."""

    subjects: list[Subject]
    dataset: Any
    real: Any
    metrics: tuple[str, ...]
    settings: Settings
    features: Any

    def taking(self, kind: str) -> tuple[str, ...]:
        """The chosen metrics that take what `kind` says."""
        return tuple(name for name in self.metrics if takes(name) == kind)

    def blocks(self) -> _blocks.Blocks:
        subjects = [s.sha256 for s in self.subjects]
        content = [(self.dataset.key(i), *self._target(i)) for i in range(len(self.dataset))]
        shape = [self.dataset.model.preprocessing, self.settings.seed, self.metrics]
        return self._blocks(len(self.dataset), subjects, content, shape)

    def _target(self, i: int) -> tuple[Any, ...]:
        """What sample i is compared with; the content key is that of its input alone."""
        source = self.dataset.source
        if source is None or self.dataset.model.task == "unconditional":
            return ()
        reference = source.reference(self.dataset.place(i))
        return source.label(self.dataset.place(i)), None if reference is None else content_key(reference)

    def reference_blocks(self) -> _blocks.Blocks | None:
        if self.real is None or not (self.taking("features") or self.taking("spectra")):
            return None
        made = self.dataset.model.stage.outputs[0]
        content = [self.real.key(i) for i in self.places]
        return self._blocks(len(content), "real", content, [made.shape, bool(self.taking("spectra"))])

    @property
    def places(self) -> list[int]:
        """Real images: as many as are generated, where there are more."""
        order = np.random.default_rng(self.settings.seed).permutation(len(self.real))[: len(self.dataset)]
        return sorted(int(i) for i in order)

    def _blocks(self, samples: int, *parts: Any) -> _blocks.Blocks:
        extractor = None if self.features is None else [self.features.sha256, self.features.resize]
        name = files.key(parts, extractor, BLOCK, FORM, __version__)
        return _blocks.Blocks(files.cache_folder() / "features" / name, math.ceil(samples / BLOCK))

    def reference_block(self, number: int) -> dict[str, np.ndarray]:
        """Features of one block of real images."""
        shape = tuple(int(d) for d in self.dataset.model.stage.outputs[0].shape[1:])
        source, found = self.real, []
        for place in self.places[number * BLOCK : (number + 1) * BLOCK]:
            image = images.fit(images.with_channels(source.image(place), shape[0]), *shape[1:])
            found.append(images.scaled(image, (0.0, 1.0)))
        return self.set_arrays(np.stack(found))

    def set_arrays(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """What metrics of sets keep of images (n, C, H, W) in 0..1."""
        kept = {}
        if self.features is not None and self.taking("features"):
            kept["features"] = self.features(pictures)[1]
        if self.taking("spectra"):
            kept["spectra"] = registry.module("metrics", "spectrum").extractor()(pictures)[1]
        return kept

    def pairs(self, a: np.ndarray | None, b: np.ndarray) -> dict[str, np.ndarray]:
        """The figure of each image, of every metric that compares image with image."""
        found = {}
        for name in self.taking("pairs"):
            if a is not None or name == "bad_images":
                value = metric(name)(None if a is None else [a], [b], **self.options(name))
                found[name] = np.array(value.samples)
                if "kinds" in value.conditions:  # a row for each block
                    found[f"{name}.kinds"] = np.array([list(value.conditions["kinds"].values())])
        return found

    def options(self, name: str) -> dict[str, Any]:
        return {"features": self.features} if name == "perceptual" or takes(name) == "features" else {}


class Work:
    """Runs the artifacts on one block; the workers start with the first block that is not there."""

    def __init__(self, task: Task, stack: contextlib.ExitStack) -> None:
        self.task, self.stack = task, stack
        self.workers: list[Any] = []

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        task = self.task
        places = range(number * BLOCK, min((number + 1) * BLOCK, len(task.dataset)))
        samples = [task.dataset[i] for i in places]
        outputs = [self.run(k, np.stack([s.input for s in samples])) for k in range(len(task.subjects))]
        if task.dataset.model.task == "classification":
            return self.logits(samples, places, outputs)
        span = task.dataset.model.stage.outputs[0].value_range
        pictures = [images.unit_range(y, span).astype(np.float32) for y in outputs]
        against = None
        if referenced(task.dataset):
            against = images.unit_range(np.stack([s.reference for s in samples]), span)
        kept: dict[str, np.ndarray] = {}
        for k, made in enumerate(pictures):
            found = task.set_arrays(made) | task.pairs(against, made)
            kept |= {f"{k}.{name}": value for name, value in found.items()}
        if len(pictures) == 2:
            kept |= {f"pair.{name}": value for name, value in task.pairs(*pictures).items()}
        return kept

    def logits(self, samples: list[Any], places: range, outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
        kept = {f"{k}.logits": y for k, y in enumerate(outputs)}
        if samples[0].label is not None:
            kept["labels"] = np.array([s.label for s in samples])
        if self.task.taking("corruptions"):
            from edgegen.metrics._corruptions import CORRUPTIONS

            for k in range(len(outputs)):
                made = [self.run(k, self.corrupted(samples, places, name)) for name in CORRUPTIONS]
                kept[f"{k}.corrupted"] = np.stack(made, axis=1)
        return kept

    def corrupted(self, samples: list[Any], places: range, name: str) -> np.ndarray:
        """The inputs again, from the corrupted 8-bit images."""
        from edgegen.metrics._corruptions import corrupted

        model, source = self.task.dataset.model, self.task.dataset.source
        spec, found = model.stage.inputs[0], []
        for sample, place in zip(samples, places, strict=True):
            shape = sample.input.shape
            height, width, channels = shape if spec.layout == "NHWC" else (*shape[1:], shape[0])
            picture = images.view(source.image(self.task.dataset.place(place)), model.preprocessing, height, width)
            picture = images.with_channels(picture, channels)
            changed = corrupted(picture, name, seed=self.task.settings.seed, number=place)
            found.append(images.network_input(changed, model.preprocessing, spec.layout))
        return np.stack(found)

    def run(self, number: int, inputs: np.ndarray) -> np.ndarray:
        """Outputs of an artifact on stacked inputs."""
        if not self.workers:
            self.workers = [measuring.runs(s.artifact, self.stack) for s in self.task.subjects]
        chosen, run = self.task.subjects[number], self.workers[number]
        if chosen.sampler is not None:
            from edgegen import samplers

            return samplers.generate(chosen.sampler, run, inputs)
        return run({chosen.artifact.inputs[0].name: inputs})[chosen.artifact.outputs[0].name]
