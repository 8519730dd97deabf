"""What stands beside every figure of quality, in `compress` and in `evaluate`: the data, and how the network was run.

Parmar et al., 2022, arXiv:2104.11222: how images are resized and stored changes FID by more than many networks differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from edgegen.types import Model


def of_data(model: Model, source: Any, real: Any = None) -> dict[str, Any]:
    """Name of the data, how images are stored there, and how they are fitted to the network.

    Args:
        source: the `sources.Source` of the inputs; None: latents.
        real: that of real images to compare sets with, if there are any; fitted to the output.
    """
    inputs = None if model.task == "unconditional" and getattr(source, "kind", "") != "latents" else source
    told = {
        "data": inputs.name if inputs is not None else "latents N(0, 1)",
        "file_format": _file_format(inputs),
        "fit": _fit(model, inputs),
    }
    if real is not None:
        shape = model.stages[-1].outputs[0].shape
        fitted = f"resized to cover {shape[2]} x {shape[3]}, bicubic, then centre crop"
        told |= {"real": real.name, "real_file_format": _file_format(real), "reference_fit": fitted}
    return told


def of_network(model: Model, sampler: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the network was made with (sizes, truncation), and the loop that it ran in (steps, guidance)."""
    config = dict(model.origin.get("config") or {})
    return ({"config": config} if config else {}) | ({"sampler": dict(sampler)} if sampler else {})


def _file_format(source: Any) -> str:
    if source is None:
        return "none"
    return ", ".join(sorted({PurePosixPath(name).suffix.lower() for name in getattr(source, "names", ())})) or "arrays"


def _fit(model: Model, source: Any) -> str:
    """How what the source holds becomes the network's input; see `samples`."""
    if source is None or source.kind != "images" or model.task == "restoration":
        return "as it is"
    if model.task == "super-resolution":
        return f"tiles, reduced by {model.options.get('scale')}, bicubic, antialiased"
    how, shape = model.preprocessing, model.stages[0].inputs[0].shape
    parts = [f"shorter side to {how.resize}"] if how.resize is not None else []
    parts += ["centre crop {} x {}".format(*how.crop)] if how.crop is not None else []
    size = "{} x {}".format(*(shape[1:3] if model.stages[0].inputs[0].layout == "NHWC" else shape[2:4]))
    tiles = "; tiles of large photos" if model.task == "image-to-image" else ""
    return ", ".join([*parts, f"resized to cover {size}, bicubic, antialiased, then centre crop"]) + tiles
