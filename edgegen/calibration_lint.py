"""What is wrong with a calibration set, told in one line each, before ranges are taken from it.

Too few or too similar images, few classes, another preprocessing than the model's record says, images that are black,
flat or not finite, and no white for the range to reach. And a curve without labels: error of the INT8 output on other
images against the number of images that its ranges come from, with the point from which more bring nothing.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import errors, onnx_exact, onnx_graph, onnx_qdq, samplers
from edgegen.types import Model, PrecisionPlan

FEWEST = 32  # images; ranges of activations still grow below (curve)
ALIKE = 0.02  # mean difference of two thumbnails, as a share of the value range, below which images count as one
ALIKE_SHARE = 0.2
FLAT = 0.01  # standard deviation of an image, as a share of the value range
MOST = 512  # samples that are looked at
LATENTS = 32  # that a denoiser's inputs come from; more only take time, as they are spread over all steps
ENOUGH_DB = 0.5  # a curve is flat where all that is left to gain is less than this


@dataclass(frozen=True)
class Finding:
    """kind: count, diversity, classes, preprocessing, colour, white, black or finite; text: one line."""

    kind: str
    text: str


@dataclass(frozen=True)
class Point:
    """sqnr_db: signal to noise ratio of INT8 outputs on held-out images, with ranges from `images` others."""

    images: int
    sqnr_db: float


def lint(model: Model, dataset: Any) -> list[Finding]:
    """Findings on a `data.Dataset` for calibration; empty when nothing speaks against it."""
    number = min(len(dataset), MOST)
    places = np.linspace(0, len(dataset) - 1, number).astype(int)
    samples = [dataset[int(i)] for i in places]
    inputs = [sample.input for sample in samples]
    found = [*_finite(inputs), *_count(len(dataset))]
    inputs = [value for value in inputs if np.isfinite(value).all()]
    labels = [sample.label for sample in samples if sample.label is not None]
    if labels:
        outputs = model.stages[-1].outputs
        found += _classes(labels, int(outputs[0].shape[-1]) if outputs and isinstance(outputs[0].shape[-1], int) else 0)
    if inputs and inputs[0].ndim == 3 and model.stages[0].inputs[0].value_range is not None:
        found += _images(model, inputs)
    return found


def _finite(inputs: Sequence[np.ndarray]) -> list[Finding]:
    bad = [i for i, value in enumerate(inputs) if not np.isfinite(value).all()]
    if not bad:
        return []
    return [Finding("finite", f"{len(bad)} of {len(inputs)} samples hold NaN or infinity (first: {bad[0]}): leave out")]


def _count(number: int) -> list[Finding]:
    if number >= FEWEST:
        return []
    return [Finding("count", f"{number} samples; ranges need {FEWEST} at least, 100 to 300 are usual: give more")]


def _classes(labels: Sequence[int], classes: int) -> list[Finding]:
    seen, possible = len(set(labels)), min(classes or len(set(labels)), len(labels))
    if seen * 2 > possible:
        return []
    return [Finding("classes", f"{seen} of {classes} classes in {len(labels)} images: choose images from all of them")]


def _images(model: Model, inputs: Sequence[np.ndarray]) -> list[Finding]:
    """All that can be told from images (C, H, W) as the network takes them."""
    how = model.preprocessing
    low, high = how.value_range
    shift, scale = (_channel(values, len(inputs[0]), default) for values, default in ((how.mean, 0.0), (how.std, 1.0)))
    pixels = [(value * scale + shift - low) / (high - low) for value in inputs]  # 0..1, if the record is right
    return [*_range(pixels, how.value_range), *_colour(pixels, model), *_black(pixels), *_white(pixels),
            *_diversity(pixels)]  # fmt: skip


def _channel(values: Sequence[float], width: int, default: float) -> np.ndarray:
    return np.array(values[:width] if len(values) >= width else [default] * width).reshape(-1, 1, 1)


def _range(pixels: Sequence[np.ndarray], span: tuple[float, float]) -> list[Finding]:
    least, largest = min(float(p.min()) for p in pixels), max(float(p.max()) for p in pixels)
    record = f"the record says {span[0]:g}..{span[1]:g} before mean and std"
    if least < -0.02 or largest > 1.02:
        said = f"values reach {least:.3g}..{largest:.3g} of the value range ({record}): normalised twice?"
        return [Finding("preprocessing", said)]
    if largest < 0.1:
        said = f"the largest value is {largest:.3g} of the value range ({record}): scaled twice?"
        return [Finding("preprocessing", said)]
    return []


def _colour(pixels: Sequence[np.ndarray], model: Model) -> list[Finding]:
    if len(pixels[0]) != 3:
        return []
    grey = sum(bool(np.allclose(p[0], p[1], atol=1e-3) and np.allclose(p[1], p[2], atol=1e-3)) for p in pixels)
    if grey > 0.5 * len(pixels):
        return [Finding("colour", f"{grey} of {len(pixels)} images are grey, and the network takes colour")]
    low, high = model.preprocessing.value_range
    wanted = (np.array(model.preprocessing.mean) - low) / (high - low)
    if len(wanted) != 3 or abs(wanted[0] - wanted[2]) < 0.03:
        return []  # the record does not tell red from blue
    mean = np.mean([p.mean((1, 2)) for p in pixels], axis=0)
    right, wrong = np.abs(mean - wanted).sum(), np.abs(mean[::-1] - wanted).sum()
    if wrong + 0.03 < 0.5 * right:
        return [Finding("colour", "channel means fit the record's far better in the order blue, green, red: BGR?")]
    return []


def _black(pixels: Sequence[np.ndarray]) -> list[Finding]:
    flat = [i for i, p in enumerate(pixels) if float(p.std()) < FLAT]
    if not flat:
        return []
    said = f"{len(flat)} of {len(pixels)} images are black or of one colour (first: {flat[0]}): leave them out"
    return [Finding("black", said)]


def _white(pixels: Sequence[np.ndarray]) -> list[Finding]:
    clipped = sum(float((p >= 1 - 1e-3).mean()) > 0.2 for p in pixels)
    if clipped > 0.1 * len(pixels):
        said = f"{clipped} of {len(pixels)} images have a fifth of their pixels at white: over-exposed or clipped"
        return [Finding("white", said)]
    largest = max(float(p.max()) for p in pixels)
    if 0.1 <= largest < 0.95:
        return [Finding("white", f"no image is brighter than {largest:.0%} of white: ranges from them clip whites")]
    return []


def _diversity(pixels: Sequence[np.ndarray]) -> list[Finding]:
    """Images with a near copy: thumbnails of 8 x 8 cells that differ by less than `ALIKE`."""
    thumbs = np.stack([_thumbnail(p) for p in pixels])
    alike = 0
    for i in range(len(thumbs)):
        distance = np.abs(thumbs - thumbs[i]).mean(1)
        distance[i] = np.inf
        alike += bool(distance.min() < ALIKE) if len(thumbs) > 1 else 0
    if alike <= ALIKE_SHARE * len(thumbs):
        return []
    said = f"{alike} of {len(thumbs)} images have a near copy among them: choose more different ones"
    return [Finding("diversity", said)]


def _thumbnail(image: np.ndarray) -> np.ndarray:
    channels, height, width = image.shape
    rows, columns = min(8, height), min(8, width)
    cut = image[:, : height - height % rows, : width - width % columns]
    return cut.reshape(channels, rows, cut.shape[1] // rows, columns, -1).mean((2, 4)).ravel()


def curve(
    model: Model, dataset: Any, *, held_out: int = 8, seed: int = 0, most: int = 128,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> list[Point]:  # fmt: skip
    """Error of the INT8 build (ONNX Runtime, u8s8) on `held_out` images, for ranges from 1, 2, 4, ... other images.

    Of a denoiser they are its inputs on the way from noise to image, from latents that are held out and from others.

    Raises:
        errors.DataError: fewer than two images, or a network of several inputs that is no denoiser.
        errors.EdgegenError: the network cannot be exported or quantized.
    """
    if len(model.stage.inputs) != 1 and samplers.of(model.options) is None:
        raise errors.DataError(f"a curve is for networks that take one input; {model.name} takes"
                               f" {', '.join(spec.name for spec in model.stage.inputs)}")  # fmt: skip
    if len(dataset) < 2:
        raise errors.DataError(f"a curve needs two images at least, got {len(dataset)}")
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(dataset))]
    kept = min(held_out, len(dataset) // 2)
    tests, others = order[:kept], order[kept : kept + most]
    counts = sorted({*(2**i for i in range(20) if 2**i < len(others)), len(others)})
    with tempfile.TemporaryDirectory(prefix="edgegen-") as name:
        folder = Path(name)
        graph = onnx_graph.to_onnx(model.stage, folder / "float.onnx")
        session = onnx_exact.session(graph.onnx)
        feeds, given = (_inputs(model, dataset, chosen, session, seed) for chosen in (tests, others))
        exact = _run(session, feeds)
        points = []
        for number, count in enumerate(counts):
            progress(f"{count} images", number / len(counts))
            for name_in, values in given.items():
                np.save(folder / f"{name_in}.npy", values[:count])
            plan = PrecisionPlan("int8", "u8s8")
            made = onnx_qdq.insert_qdq(graph, folder / "int8.onnx", calibration=folder, plan=plan)
            wrong = np.square(_run(onnx_exact.session(made.onnx), feeds) - exact).sum()
            wrong /= max(1e-30, np.square(exact).sum())
            points.append(Point(count, float(-10 * np.log10(max(wrong, 1e-20)))))
    return points


def _inputs(model: Model, dataset: Any, chosen: Sequence[int], session: Any, seed: int) -> dict[str, np.ndarray]:
    """Input name -> (n, ...): the samples themselves, or as many inputs of a denoiser on their way, times mixed."""
    samples = np.stack([dataset[i].input for i in chosen]).astype(np.float32)
    if (settings := samplers.of(model.options)) is None:
        return {model.stage.inputs[0].name: samples}
    found = samplers.trajectory(
        settings, lambda feeds: {"output": _run(session, feeds).astype(np.float32)}, samples[:LATENTS], len(samples))
    order = np.random.default_rng(seed).permutation(len(samples))
    return {name: values[order] for name, values in found.items()}


def enough(points: Sequence[Point]) -> int | None:
    """The least number of images after which no larger one brings 0.5 dB more; None: the last step still did."""
    for place, point in enumerate(points[:-1]):
        if max(later.sqnr_db for later in points[place + 1 :]) - point.sqnr_db <= ENOUGH_DB:
            return point.images
    return None


def _run(session: Any, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output for stacked inputs, each sample by itself, as exported networks take one."""
    count = len(next(iter(feeds.values())))
    parts = [{name: values[i : i + 1] for name, values in feeds.items()} for i in range(count)]
    return np.concatenate([session.run(None, part)[0] for part in parts]).astype(np.float64)


def as_json(findings: Sequence[Finding], points: Sequence[Point]) -> dict[str, Any]:
    """For `--json` and reports."""
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "curve": [dataclasses.asdict(point) for point in points],
        "enough": enough(points),
    }
