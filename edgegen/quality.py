"""Quality of a built artifact, by task: which metrics, what counts as a drop, and where the gate stands.

| task | figures | the drop, and its unit |
|---|---|---|
| classification | top-1 (with labels), agreement with the teacher | points of top-1 lost (without labels: of agreement) |
| super-resolution, restoration | PSNR and SSIM to the reference images, PSNR to the teacher | dB of PSNR to the reference lost; with the model's option `luminance`: of the luminance's PSNR |
| image-to-image | PSNR, SSIM and perceptual distance to the teacher | dB of paired PSNR below 50 dB (two builds of one network in FP32 and BF16 are about 50 dB apart); with "%": perceptual distance to the teacher x 100 |
| unconditional | KID to real images or to other samples of the teacher, its change from the teacher's (paired), PSNR to the teacher | KID x 1000 that the change may be in either direction (two-sided): the far end of its 95 % interval |

Images have more figures: those that are black, flat or not finite where the teacher's are not, and the shift of
brightness and colour. A build that breaks more images than the teacher does is refused, whatever its drop.

Teacher and candidate always see the same inputs. Outputs lie on disk as memory-mapped arrays, so memory stays bounded.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import conditions, registry
from edgegen.errors import RecipeError
from edgegen.images import unit_range
from edgegen.metrics._common import feature_rows
from edgegen.metrics._rows import Rows
from edgegen.types import Measurement, Model

CHUNK, CHUNK_BYTES = 32, 2**24  # samples at a time, fewer of large ones
CEILING_DB = 50.0
KID_CHANGE = "KID change from the teacher"
PERCEPTUAL = "perceptual distance to the teacher"
TO_REFERENCE = "PSNR to the reference"
LUMINANCE = "luminance PSNR to the reference"
BAD = "bad images"
FAULTS = {"bad_images": BAD, "brightness_shift": "brightness shift from the teacher",
          "colour_shift": "colour shift from the teacher"}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """How a task judges a candidate. figure: the deciding metric; default: the drop allowed when none is given."""

    figure: str
    unit: str
    default: float


def gate(model: Model, labelled: bool, unit: str = "") -> Gate:
    """The gate of a model's task; `unit` "%" asks for the perceptual distance where the task has one.

    Raises:
        RecipeError: "%" for a task without a perceptual distance.
    """
    if unit == "%":
        if model.task in ("classification", "unconditional"):
            raise RecipeError(
                f"a quality drop in % is for image-to-image, super-resolution and restoration, got task {model.task};"
                " give a plain number"
            )
        return Gate(PERCEPTUAL, f"% of {PERCEPTUAL}", 5.0)
    luminance = bool(model.options.get("luminance"))
    restored = Gate(LUMINANCE if luminance else TO_REFERENCE,
                    f"dB of {'luminance ' if luminance else ''}PSNR to the reference images", 0.5)  # fmt: skip
    return {
        "classification": Gate("top-1", "points of top-1", 0.5)
        if labelled
        else Gate("agreement", "points of agreement with the teacher", 1.0),
        "super-resolution": restored,
        "restoration": restored,
        "image-to-image": Gate("PSNR to the teacher", f"dB of PSNR to the teacher below {CEILING_DB:.0f} dB", 25.0),
        "unconditional": Gate("KID", "KID x 1000, two-sided, at the far end of the change's 95% interval", 20.0),
    }[model.task]


def collect(run_many: Callable[[np.ndarray], np.ndarray], dataset: Any, out: Path, progress: Callable) -> Path:
    """Run every sample of `dataset` through `run_many` (stacked inputs to stacked outputs) into a .npy file."""
    total = len(dataset)
    array = None
    for start in range(0, total, CHUNK):
        inputs = np.stack([dataset[i].input for i in range(start, min(start + CHUNK, total))])
        outputs = run_many(inputs)
        if array is None:
            shape = (total, *outputs.shape[1:])
            array = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
        array[start : start + len(outputs)] = outputs
        progress(f"{min(start + CHUNK, total)} of {total} samples", min(start + CHUNK, total) / total)
    if array is not None:
        array.flush()
    return out


@dataclass(frozen=True)
class Evaluation:
    """Everything that stays the same between two candidates: data, the teacher's outputs, extractor and seed.

    data: a `data.Dataset` that the passes never saw. teacher: .npy with the teacher's outputs on it. real: iterable
    factory of real images (N, C, H, W) in 0..1 for `unconditional`, or None (then `fresh`, the teacher's samples
    from other latents, is the reference). features: a feature extractor, or None where the task needs none. kept:
    features of what is the same for every candidate, made once.
    """

    model: Model
    data: Any
    teacher: Path
    seed: int = 0
    features: Any = None
    real: Callable[[], Iterable[np.ndarray]] | None = None
    fresh: Path | None = None
    kept: dict[str, Rows] = field(default_factory=dict, repr=False, compare=False)

    def figures(
        self, outputs: Path, only: str = "", sampler: Mapping[str, Any] | None = None
    ) -> tuple[Measurement, ...]:
        """All figures of one candidate, the deciding one of its task among them, each with what it was made from.

        only: the name of one figure of an image network; the others, which may take longer, are left out. sampler: the
        complete settings of the loop that made the outputs.
        """
        source = getattr(self.data, "source", None)
        real = source if self.model.task == "unconditional" and self.real is not None else None
        told = conditions.of_data(self.model, source, real)
        told |= conditions.of_network(self.model, sampler)
        return tuple(
            dataclasses.replace(figure, conditions={**figure.conditions, **told})
            for figure in self._figures(outputs, only)
        )

    def _figures(self, outputs: Path, only: str) -> tuple[Measurement, ...]:
        if self.model.task == "classification":
            return self._classification(outputs)
        if self.model.task == "unconditional":
            return self._unconditional(outputs, only)
        return self._images(outputs, only)

    def _faults(self, outputs: Path, only: str) -> Iterator[Measurement]:
        """What averages hide: images that the teacher makes well and this build does not, and a shift of all."""
        for name, title in FAULTS.items():
            if only not in ("", title):
                continue
            value = _metric(name)(self._images_of(self.teacher), self._images_of(outputs), seed=self.seed)
            told = {}
            if name == "bad_images":
                told = {"teacher": _metric(name)(None, self._images_of(self.teacher), seed=self.seed).value}
            yield dataclasses.replace(value, name=title, conditions={**value.conditions, **told})

    def _classification(self, outputs: Path) -> tuple[Measurement, ...]:
        found = [_metric("agreement")(rows(self.teacher), rows(outputs), seed=self.seed)]
        if self.data[0].label is not None:
            labels = (np.array([s.label for s in part]) for part in _samples(self.data))
            found.insert(0, _metric("top1")(labels, rows(outputs), seed=self.seed))
        return tuple(_renamed(m, {"top1": "top-1"}.get(m.name, m.name)) for m in found)

    def _images(self, outputs: Path, only: str) -> tuple[Measurement, ...]:
        found = []
        for against, images in (("reference", self._references), ("teacher", lambda: self._images_of(self.teacher))):
            if against == "reference" and self.data[0].reference is None:
                continue
            luminance = against == "reference" and self.model.options.get("luminance")
            for name in ("luminance_psnr", "psnr", "ssim") if luminance else ("psnr", "ssim"):
                title = LUMINANCE if name == "luminance_psnr" else f"{name.upper()} to the {against}"
                if only in ("", title):
                    found.append(_renamed(_metric(name)(images(), self._images_of(outputs), seed=self.seed), title))
        if self.features is not None and only in ("", PERCEPTUAL):
            distance = _metric("perceptual")
            pair = (self._images_of(self.teacher), self._images_of(outputs))
            value = distance(*pair, features=self.features, seed=self.seed)
            found.append(_renamed(value, PERCEPTUAL))
        return (*found, *self._faults(outputs, only))

    def _unconditional(self, outputs: Path, only: str) -> tuple[Measurement, ...]:
        reference = self._rows("reference", self._real_images)
        teacher = self._rows("teacher", lambda: self._images_of(self.teacher))
        mine = teacher if outputs == self.teacher else feature_rows(self._images_of(outputs), self.features)
        module = registry.module("metrics", "kid")
        kid = module.kid(reference, mine, features=self.features, seed=self.seed)
        change = module.change(reference, teacher, mine, features=self.features, seed=self.seed)
        paired = _metric("psnr")(self._images_of(self.teacher), self._images_of(outputs), seed=self.seed)
        named = (_renamed(kid, "KID"), _renamed(change, KID_CHANGE), _renamed(paired, "PSNR to the teacher"))
        return (*named, *self._faults(outputs, only))

    def _rows(self, name: str, images: Callable[[], Iterable[np.ndarray]]) -> Rows:
        if name not in self.kept:
            self.kept[name] = feature_rows(images(), self.features)
        return self.kept[name]

    def _real_images(self) -> Iterable[np.ndarray]:
        if self.real is not None:
            return self.real()
        if self.fresh is None:
            raise ValueError("an unconditional generator is judged against real images or fresh teacher samples")
        return self._images_of(self.fresh)

    def _references(self) -> Iterator[np.ndarray]:
        return (self._unit(np.stack([s.reference for s in part])) for part in _samples(self.data))

    def _images_of(self, outputs: Path) -> Iterator[np.ndarray]:
        return (self._unit(part) for part in rows(outputs))

    def _unit(self, images: np.ndarray) -> np.ndarray:
        return unit_range(images, self.model.stages[-1].outputs[0].value_range)


def features(model: Model, name: str = "") -> Any:
    """The extractor of perceptual distances and KID: `name`, else the model's own; None for a classifier."""
    from edgegen.metrics import _extractors

    if model.task == "classification":
        return None
    return _extractors.load(name or str(model.options.get("features", "cifar")))


def drop(model: Model, chosen: Gate, teacher: tuple[Measurement, ...], candidate: tuple[Measurement, ...]) -> float:
    """The candidate's quality drop in the gate's unit; zero or less is no worse than the teacher. NaN counts as inf."""
    mine = find(candidate, chosen.figure).value
    if not math.isfinite(mine):
        return math.inf
    if chosen.figure.startswith("perceptual"):
        return 100.0 * mine
    if model.task == "image-to-image":
        return max(0.0, CEILING_DB - mine)
    if model.task == "unconditional":
        # Not the value alone: a change that may just as well be large is not shown to be small.
        change = find(candidate, KID_CHANGE)
        return 1000.0 * max(abs(bound) for bound in change.interval or (change.value,))
    theirs = find(teacher, chosen.figure).value
    scale = 100.0 if model.task == "classification" else 1.0
    return round(scale * (theirs - mine), 9)  # 100 x (0.934 - 0.929) is more than the half point that it is


def undecided(chosen: Gate, figures: tuple[Measurement, ...], allowed: float) -> str:
    """What to do where only the interval of a drop is over what is allowed and its value is not; else empty."""
    if chosen.figure != "KID" or not any(figure.name == KID_CHANGE for figure in figures):
        return ""
    change = 1000.0 * find(figures, KID_CHANGE).value
    if not abs(change) <= allowed:
        return ""
    return f" (the change itself is {change:+.3g}: too few samples to decide; --samples takes more)"


def spoilt(figures: tuple[Measurement, ...]) -> str:
    """Which images a build breaks, where it breaks more than the teacher has broken ones; else empty.

    Of the same latent a student may make another image than its teacher: what is compared are the shares.
    """
    found = next((figure for figure in figures if figure.name == BAD), None)
    if found is None or found.value <= found.conditions["teacher"]:
        return ""
    told, kinds = found.conditions, found.conditions["kinds"]
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    own = f"; of the teacher's own {told['teacher']:.2%} are" if told["teacher"] else ""
    return f"{sum(kinds.values())} of {told['n']} images are bad where the teacher's are not ({counts}){own}"


def gained(lost: float | None, allowed: float | None, unit: str) -> str:
    """The end of a reason where a build is better than its teacher by more than it may be worse; else empty.

    lost: the drop, in the gate's `unit`. To a label or a reference image a gain is no fault, but it is no sameness
    either: the student was perhaps trained on better data, or the teacher's own build is not what it should be.
    """
    if lost is None or allowed is None or not math.isfinite(lost) or not -lost > allowed:
        return ""
    what = unit.partition(" (")[0]
    return f"; it gains {-lost:.3g} {what} on its teacher, more than the {allowed:g} that it may lose"


def find(figures: tuple[Measurement, ...], name: str) -> Measurement:
    """The figure of that name."""
    for figure in figures:
        if figure.name == name:
            return figure
    raise KeyError(f"no figure {name!r} among {[f.name for f in figures]}")


def rows(file: Path) -> Iterator[np.ndarray]:
    """A .npy file in blocks of at most `CHUNK` samples and about `CHUNK_BYTES`, memory-mapped."""
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    step = _at_once(array.nbytes // max(1, len(array)))
    return (np.asarray(array[i : i + step]) for i in range(0, len(array), step))


def _at_once(sample_bytes: int) -> int:
    return max(1, min(CHUNK, CHUNK_BYTES // max(1, sample_bytes)))


def _samples(dataset: Any) -> Iterator[list[Any]]:
    reference = dataset[0].reference
    step = CHUNK if reference is None else _at_once(reference.nbytes)
    for start in range(0, len(dataset), step):
        yield [dataset[i] for i in range(start, min(start + step, len(dataset)))]


def _metric(name: str) -> Callable[..., Measurement]:
    return getattr(registry.module("metrics", name), name)


def _renamed(value: Measurement, name: str) -> Measurement:
    return dataclasses.replace(value, name=name)
