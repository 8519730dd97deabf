"""Photos made for tests, and models of which only the contract matters."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from edgegen import types


def model(task, inputs, outputs, **options):
    """A model of which only the contract matters."""
    how = options.pop("preprocessing", types.Preprocessing())
    out_range = options.pop("out_range", (0.0, 1.0))
    stage = types.Stage(
        "net", None, (types.TensorSpec("x", inputs),), (types.TensorSpec("y", outputs, value_range=out_range),)
    )
    return types.Model("net", task, (stage,), preprocessing=how, options=options)


def photo(height, width, seed=0):
    """Smooth colour noise, so that resizing keeps something of it."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write_photos(folder, number=5, size=(40, 56), classes=()):
    for i in range(number):
        place = folder / (classes[i % len(classes)] if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(*size, seed=i)).save(place / f"{i:02d}.png")
    return folder


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()
