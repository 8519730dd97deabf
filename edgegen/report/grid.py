"""Pictures beside each other with captions, so that a person can judge them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import files
from edgegen.errors import MissingExtra

GAP, MARGIN, CAPTION = 6, 10, 18
BROKEN = (255, 0, 255)  # not finite


def image_grid(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    *,
    row_labels: Sequence[str] = (),
    min_side: int = 160,
    out: Path | None = None,
) -> bytes:
    """A PNG with one row of pictures for each input and one captioned column for each network.

    Small pictures are enlarged by whole factors with nearest neighbours (no smoothing that hides artefacts): all cells
    get the largest picture's size, and a picture whose size is not a whole fraction of it (a reduced input) is
    enlarged as far as it fits. Large ones keep their pixels.

    Args:
        rows: arrays (H, W), (H, W, 1) or (H, W, 3), 0..1; values outside are clipped, NaN and infinity drawn magenta.
        columns: caption of each column. row_labels: caption below each row, or empty.
        min_side: pictures are enlarged until their shorter side has at least this many pixels.
        out: also write the PNG there.
    Raises:
        ValueError: no pictures, a row of another length than `columns`, or an array that is no picture.
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtra("pillow", "to draw pictures", "torch") from error
    _check(rows, columns, row_labels)
    pictures = [[_uint8(array) for array in row] for row in rows]
    height, width = _cell(pictures, min_side)
    below = CAPTION if row_labels else 0
    size = (
        2 * MARGIN + len(columns) * (width + GAP) - GAP,
        2 * MARGIN + CAPTION + len(rows) * (height + below + GAP) - GAP,
    )
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, caption in enumerate(columns):
        left = MARGIN + index * (width + GAP)
        draw.text((left, MARGIN - 2), _fit(draw, font, caption, width), fill=(20, 20, 20), font=font)
    for number, row in enumerate(pictures):
        top = MARGIN + CAPTION + number * (height + below + GAP)
        for index, picture in enumerate(row):
            factor = max(1, min(height // picture.shape[0], width // picture.shape[1]))
            enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(enlarged), (MARGIN + index * (width + GAP), top))
        if row_labels:
            text = _fit(draw, font, row_labels[number], size[0] - 2 * MARGIN)
            draw.text((MARGIN, top + height + 1), text, fill=(90, 90, 90), font=font)
    return _png(sheet, out)


def _check(rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], row_labels: Sequence[str]) -> None:
    if not rows or not columns:
        raise ValueError("an image grid needs at least one row and one column")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"got {len(row_labels)} row labels for {len(rows)} rows; give one a row, or none")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} pictures for {len(columns)} columns")


def _uint8(array: np.ndarray) -> np.ndarray:
    """(H, W[, 1 or 3]) 0..1 to uint8 (H, W, 3)."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"a picture must be (H, W), (H, W, 1) or (H, W, 3), got {array.shape}")
    values = array.astype(np.float32)
    finite = np.isfinite(values).all(axis=2)
    scaled = np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)
    scaled = np.broadcast_to(scaled, (*scaled.shape[:2], 3)).copy()
    scaled[~finite] = BROKEN
    return scaled


def _cell(pictures: list[list[np.ndarray]], min_side: int) -> tuple[int, int]:
    """(height, width) of a cell: the largest picture, enlarged by the whole factor that `min_side` asks for."""
    height = max(picture.shape[0] for row in pictures for picture in row)
    width = max(picture.shape[1] for row in pictures for picture in row)
    factor = max(1, -(-min_side // min(height, width)))
    return height * factor, width * factor


def _fit(draw: Any, font: Any, caption: str, width: int) -> str:
    """The caption, cut with dots where it is wider than `width` pixels."""
    if draw.textlength(caption, font=font) <= width:
        return caption
    while caption and draw.textlength(caption + "...", font=font) > width:
        caption = caption[:-1]
    return caption + "..."


def _png(sheet: Any, out: Path | None) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    if out is not None:
        with files.whole(out) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return buffer.getvalue()
