"""Image arithmetic on uint8 arrays: decode, resize, crop, tile, and the map from pixels to a network's input."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np

from edgegen.errors import DataError, MissingExtra
from edgegen.types import Preprocessing

# At most this many tiles along each side of a photo: a 24 megapixel photo must not drown the others.
TILES_A_SIDE = 4


def pillow() -> Any:
    """PIL.Image.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "to read images", "torch") from error
    return Image


def broken_image_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises on damaged files."""
    return (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, pillow().DecompressionBombError)


def decode(content: bytes) -> np.ndarray:
    """Encoded image -> uint8 (H, W, 1 or 3), turned upright as its EXIF says; alpha is dropped."""
    image_module = pillow()
    from PIL import ImageOps

    with image_module.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bit grey
            return channels_last((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode == "P":
            image = image.convert("RGBA")
        return channels_last(np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")))


def channels_last(image: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 1); (H, W, C) as it is."""
    return image[..., None] if image.ndim == 2 else image


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (H, W, 1 or 3) -> (H, W, `channels`): grey is repeated, colour becomes ITU-R 601 luma."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return channels_last(np.array(pillow().fromarray(np.ascontiguousarray(image)).convert("L")))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, antialiased when it shrinks (PIL); uint8 (H, W, C) -> (height, width, C)."""
    if image.shape[:2] == (height, width):
        return image
    plane = np.ascontiguousarray(image if image.shape[2] == 3 else image[..., 0])
    bicubic = pillow().Resampling.BICUBIC
    return channels_last(np.array(pillow().fromarray(plane).resize((width, height), bicubic)))


def resize_shorter(image: np.ndarray, length: int) -> np.ndarray:
    """Keep the aspect; the shorter side becomes `length` pixels, the longer is rounded down (as torchvision does)."""
    height, width = image.shape[:2]
    if height <= width:
        return resize(image, length, int(length * width / height))
    return resize(image, int(length * height / width), length)


def crop(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The window (height, width) at (top, left)."""
    return image[top : top + height, left : left + width]


def centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle (height, width); a side that is smaller stays as it is."""
    top = max(0, round((image.shape[0] - height) / 2))
    left = max(0, round((image.shape[1] - width) / 2))
    return crop(image, top, left, height, width)


def cover(image: np.ndarray, height: int, width: int, at_most: bool = False) -> np.ndarray:
    """Resize, keeping the aspect, to the smallest size that covers (height, width); `at_most`: never enlarge."""
    scale = max(height / image.shape[0], width / image.shape[1])
    if at_most and scale >= 1:
        return image
    return resize(image, max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`cover`, then the centre crop: exactly (height, width)."""
    if image.shape[:2] == (height, width):
        return image
    return centre_crop(cover(image, height, width), height, width)


def view(image: np.ndarray, how: Preprocessing, height: int, width: int) -> np.ndarray:
    """Resize and crop as the model's record says; what it leaves open is closed by `fit` to (height, width)."""
    if how.resize is not None:
        image = resize_shorter(image, how.resize)
    if how.crop is not None:
        image = centre_crop(image, *how.crop)
    return fit(image, height, width)


def tiles(size: tuple[int, int], height: int, width: int) -> list[tuple[int, int]]:
    """(top, left) of non-overlapping windows, spread evenly over an image of `size` (H, W); [] when it is too small."""
    return [(top, left) for top in _starts(size[0], height) for left in _starts(size[1], width)]


def _starts(length: int, tile: int) -> list[int]:
    number = min(TILES_A_SIDE, length // tile)
    gap = length - number * tile
    return [j * tile + gap * (2 * j + 1) // (2 * number) for j in range(number)]


def scaled(image: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """uint8 (H, W, C) -> float32 (C, H, W) with 0 and 255 at the ends of `value_range`."""
    low, high = value_range
    values = image.transpose(2, 0, 1).astype(np.float32) * np.float32((high - low) / 255.0)
    return values + np.float32(low) if low else values


def network_input(image: np.ndarray, how: Preprocessing, layout: str = "NCHW") -> np.ndarray:
    """uint8 (H, W, C) -> float32 as the network takes it: value range, then (x - mean) / std, then the layout."""
    values = scaled(image, how.value_range)
    for name, numbers in (("mean", how.mean), ("std", how.std)):
        if numbers and len(numbers) not in (1, len(values)):
            raise DataError(
                f"preprocessing {name} has {len(numbers)} numbers, the network takes {len(values)} channels"
            )
    if how.mean:
        values -= np.array(how.mean, np.float32)[:, None, None]
    if how.std:
        values /= np.array(how.std, np.float32)[:, None, None]
    return np.ascontiguousarray(values.transpose(1, 2, 0) if layout == "NHWC" else values)


def unit_range(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Values in `value_range` -> 0..1, clipped, float32. What is not finite becomes NaN: an overflow is no white."""
    low, high = value_range or (0.0, 1.0)
    unit = np.clip((values - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return np.where(np.isfinite(values), unit, np.float32(np.nan))
