"""Core ML on a Mac: run a package on a chosen compute unit, and time it. Nothing here works anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from edgegen import errors
from edgegen.runtimes import _coreml_convert
from edgegen.types import Artifact

UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")


@contextlib.contextmanager
def load(artifact: Artifact, unit: str) -> Iterator[Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Yield run(network inputs) -> outputs on one compute unit.

    Raises:
        errors.RuntimeFailed: Core ML cannot load the package, or a run fails.
    """
    with _coreml_convert.quiet():
        import coremltools as ct

        try:
            model = ct.models.MLModel(str(artifact.path), compute_units=getattr(ct.ComputeUnit, unit))
        except Exception as error:  # Core ML's own errors have no common base
            said = _coreml_convert.first_line(error)
            raise errors.RuntimeFailed(f"{artifact.label}: cannot load on {unit}: {said}") from error

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            found = model.predict(package_feeds(artifact, feeds))
        except (RuntimeError, ValueError, TypeError) as error:
            raise errors.RuntimeFailed(f"{artifact.label}: {_coreml_convert.first_line(error)}") from error
        return {spec.name: np.asarray(found[spec.name], np.float32) for spec in artifact.outputs}

    yield run


def package_feeds(artifact: Artifact, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the package takes for these network inputs: itself, or an image whose pixels are rounded to 8 bits."""
    image = artifact.options.get("input", {})
    if "pixels" not in image:
        return dict(feeds)
    from PIL import Image

    name = artifact.inputs[0].name
    pixels = to_pixels(feeds[name], image["pixels"])
    return {name: Image.fromarray(pixels[..., 0] if image["colour"] == "L" else pixels)}


def to_pixels(value: np.ndarray, pixels: Mapping[str, Any]) -> np.ndarray:
    """A network input (1, C, H, W) as pixels (H, W, C), uint8: rounded, and cut off at 0 and 255."""
    scale, bias = (np.reshape(np.float32(pixels[key]), (1, -1, 1, 1)) for key in ("scale", "bias"))
    return np.clip(np.rint(value * scale + bias), 0, 255).astype(np.uint8)[0].transpose(1, 2, 0)


def measure(artifact: Artifact, unit: str, feeds: Mapping[str, np.ndarray], iterations: int) -> dict[str, Any]:
    """Outputs, load time, first run and each later run in ms; {"failed": reason} where Core ML refuses the unit."""
    clock = time.perf_counter
    start = clock()
    try:
        with load(artifact, unit) as run:
            loaded = clock()
            outputs = run(feeds)
            first = clock()
            samples = []
            for _ in range(iterations):
                before = clock()
                run(feeds)
                samples.append(1e3 * (clock() - before))
    except errors.RuntimeFailed as error:
        return {"failed": str(error)}
    times = {"load_ms": 1e3 * (loaded - start), "first_ms": 1e3 * (first - loaded), "samples_ms": samples}
    return {"outputs": outputs, **times}
