"""Images of any size through an engine of one fixed size: overlapping tiles, blended where they meet.

Neighbouring tiles share `overlap` pixels; in the middle of what they share the result goes from one to the other over
`blend` pixels, linearly. So the result is that of the whole image, up to rounding, for networks that look less than
(overlap - blend) / 2 pixels to each side and treat all places alike (no pooling over the image, no strides; with
strides, tiles at multiples of `align`). For others the seams are as smooth as `blend` is wide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgegen.errors import DataError

Run = Callable[[np.ndarray], np.ndarray]  # (1, C, tile height, tile width) to (1, C', scale * height, scale * width)


def run_tiled(
    run: Run, images: np.ndarray, tile: tuple[int, int], *, overlap: int = 16, blend: int = 8, align: int = 1
) -> np.ndarray:
    """The engine's result for whole images.

    Args:
        run: the engine for one tile; its enlargement is read from what it gives.
        images: (N, C, H, W), float32, as the engine takes them. Smaller than a tile: mirrored up to it, then cropped.
        tile: height and width that the engine takes. overlap: pixels shared by neighbours. blend: of those, over how
            many the result changes from one to the other. align: tiles begin at multiples of this.
    Raises:
        DataError: an overlap that leaves no step, a blend wider than the overlap, or a size that does not align.
    """
    if images.ndim != 4:
        raise DataError(f"images must be (N, C, H, W), got the shape {images.shape}")
    if not 0 <= blend <= overlap or overlap >= min(tile) or align < 1:
        raise DataError(
            f"need 0 <= blend <= overlap < tile and align >= 1, got blend {blend}, overlap {overlap}, tile {tile},"
            f" align {align}"
        )
    height, width = images.shape[2:]
    padded = _at_least(images, tile)
    places = [_starts(length, size, overlap, align) for length, size in zip(padded.shape[2:], tile)]
    result: np.ndarray | None = None
    for n in range(len(padded)):
        for i, top in enumerate(places[0]):
            for j, left in enumerate(places[1]):
                made = run(np.ascontiguousarray(padded[n : n + 1, :, top : top + tile[0], left : left + tile[1]]))
                scale = made.shape[2] // tile[0]
                if made.shape[2:] != (scale * tile[0], scale * tile[1]):
                    raise DataError(f"the engine gave {made.shape} for a tile of {tile}; no whole enlargement")
                if result is None:
                    shape = (len(padded), made.shape[1], scale * padded.shape[2], scale * padded.shape[3])
                    result = np.zeros(shape, np.float32)
                rows = _weights(places[0], i, tile[0], blend, scale)
                columns = _weights(places[1], j, tile[1], blend, scale)
                y, x = scale * top, scale * left
                part = result[n, :, y : y + scale * tile[0], x : x + scale * tile[1]]
                part += made[0] * (rows[:, None] * columns[None, :])
    if result is None:
        raise DataError("there is no image")
    scale = result.shape[2] // padded.shape[2]
    return result[:, :, : scale * height, : scale * width]


def _at_least(images: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Mirrored below and to the right up to the size of a tile."""
    for axis, size in zip((2, 3), tile):
        while images.shape[axis] < size:
            more = min(size - images.shape[axis], max(1, images.shape[axis] - 1))
            widths = [(0, 0)] * 4
            widths[axis] = (0, more)
            images = np.pad(images, widths, mode="reflect" if images.shape[axis] > 1 else "edge")
    return images


def _starts(length: int, tile: int, overlap: int, align: int) -> list[int]:
    """Where tiles begin along one axis; the last ends where the image ends."""
    last = length - tile
    if last % align:
        raise DataError(f"an image of {length} pixels and tiles of {tile} leave {last}, no multiple of align {align}")
    step = max(align, (tile - overlap) // align * align)
    return [*range(0, last, step), last]


def _weights(starts: list[int], index: int, tile: int, blend: int, scale: int) -> np.ndarray:
    """Share of tile `index` in the result along one axis: what the border before lets in less what the next takes."""
    place = starts[index] + (np.arange(scale * tile) + 0.5) / scale

    def after(border: int) -> np.ndarray:
        """0 before the border between tiles border - 1 and border, 1 behind it."""
        middle = (starts[border] + starts[border - 1] + tile) / 2
        if blend == 0:
            return (place >= middle).astype(np.float64)
        return np.clip((place - middle) / blend + 0.5, 0, 1)

    let_in = after(index) if index else np.ones(len(place))
    taken = after(index + 1) if index + 1 < len(starts) else 0.0
    return (let_in - taken).astype(np.float32)
