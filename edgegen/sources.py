"""Where samples come from: arrays and sampled latents (images: `image_files`).

A source knows nothing about networks: `edgegen.data.Dataset` turns it into a network's inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from edgegen.errors import DataError
from edgegen.images import channels_last

BROKEN_SHARE_LIMIT = 0.1


class Source:
    """Images, arrays or latents by index.

    kind: "images" (`image`), "arrays" (`array`: float32 network inputs) or "latents" (`latent`). labels: class names,
    empty without labels. broken: names of what was skipped because it cannot be read.
    """

    kind = "images"

    def __init__(self, name: str, labels: tuple[str, ...] = (), broken: tuple[str, ...] = ()):
        self.name, self.labels, self.broken = name, labels, broken

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, i: int) -> np.ndarray:
        """Image i as uint8 (H, W, C), C 1 or 3; read-only."""
        raise DataError(f"{self.name} holds {self.kind}, not images; give images")

    def size(self, i: int) -> tuple[int, int]:
        """(H, W) of image i, without decoding it where that is known."""
        height, width = self.image(i).shape[:2]
        return height, width

    def array(self, i: int) -> np.ndarray:
        """Network input i as float32, no batch axis."""
        raise DataError(f"{self.name} holds {self.kind}, not arrays; give an .npz with x and y")

    def reference(self, i: int) -> np.ndarray | None:
        """Reference image i: uint8 (H, W, C) or float32 (C, H, W), or None."""
        return None

    def label(self, i: int) -> int | None:
        """Class index of i, or None."""
        return None

    def key(self, i: int) -> str:
        """Content hash of i: equal images have equal keys, whatever file they come from."""
        raise NotImplementedError


class ArraySource(Source):
    """Arrays in memory or memory-mapped: uint8 images (N, H, W[, C]) or float network inputs (N, ...).

    y: int labels (N,), or reference images, uint8 (N, H, W[, C]) or float (N, C, H, W), or None.

    Raises:
        DataError: a shape or type that is neither, or more than 10 % of the samples not finite.
    """

    def __init__(self, name: str, x: np.ndarray, y: np.ndarray | None = None, labels: tuple[str, ...] = ()):
        _check_arrays(name, x, y)
        self.kind = "images" if x.dtype == np.uint8 else "arrays"
        self._x, self._y = x, y
        self._labelled = y is not None and y.dtype.kind in "iu" and y.ndim == 1
        if y is not None and self._labelled and not labels:
            labels = tuple(str(i) for i in range(int(np.max(y)) + 1))
        good = _finite_rows(x)
        if y is not None:
            good &= _finite_rows(y)
        bad = np.flatnonzero(~good)
        if len(bad) > BROKEN_SHARE_LIMIT * len(x):
            raise DataError(f"{name}: {len(bad)} of {len(x)} samples hold NaN or infinity (allowed: 10 %); mend them")
        super().__init__(name, labels, tuple(f"x[{i}]" for i in bad))
        self._rows = np.flatnonzero(good)

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, i: int) -> np.ndarray:
        """Image i as uint8 (H, W, C)."""
        if self.kind != "images":
            return super().image(i)
        return channels_last(self._x[self._rows[i]])

    def array(self, i: int) -> np.ndarray:
        """Network input i as float32."""
        if self.kind != "arrays":
            return super().array(i)
        return np.array(self._x[self._rows[i]], dtype=np.float32)

    def reference(self, i: int) -> np.ndarray | None:
        """y[i] where y holds images."""
        if self._y is None or self._labelled:
            return None
        value = self._y[self._rows[i]]
        return channels_last(value) if value.dtype == np.uint8 else np.array(value, dtype=np.float32)

    def label(self, i: int) -> int | None:
        """y[i] where y holds labels."""
        return int(self._y[self._rows[i]]) if self._labelled and self._y is not None else None

    def key(self, i: int) -> str:
        """Hash of x[i]."""
        value = self._x[self._rows[i]]
        return content_key(channels_last(value) if self.kind == "images" else value)


class LatentSource(Source):
    """Latents N(0, 1), each a pure function of (seed, index). parts: (seed, number of latents)."""

    kind = "latents"

    def __init__(self, name: str, parts: Sequence[tuple[int, int]]):
        super().__init__(name)
        self._places = [(seed, index) for seed, number in parts for index in range(number)]

    def __len__(self) -> int:
        return len(self._places)

    def latent(self, i: int, shape: tuple[int, ...]) -> np.ndarray:
        """Latent i as float32 of `shape`."""
        return latent(*self._places[i], shape)

    def key(self, i: int) -> str:
        """The latent's seed and index."""
        return latent_key(*self._places[i])


def latent(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 array, a pure function of (seed, index, shape)."""
    return np.random.default_rng([seed, index]).standard_normal(shape, dtype=np.float32)


def latent_key(seed: int, index: int) -> str:
    """Content key of a latent."""
    return f"latent-{seed}-{index}"


def content_key(array: np.ndarray) -> str:
    """Hash over type, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _check_arrays(name: str, x: np.ndarray, y: np.ndarray | None) -> None:
    """Refuse what is neither uint8 images nor float inputs, and a y that does not belong to x."""
    if x.ndim < 2 or len(x) == 0 or (x.dtype != np.uint8 and x.dtype.kind != "f"):
        raise DataError(
            f"{name}: x is {x.dtype} {x.shape}; allowed are uint8 images (N, H, W, C) or (N, H, W), or float network"
            " inputs (N, ...)"
        )
    if x.dtype == np.uint8 and (x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3))):
        raise DataError(f"{name}: uint8 images x are {x.shape}; allowed are (N, H, W, 3), (N, H, W, 1) and (N, H, W)")
    if y is None:
        return
    if y.ndim == 0 or len(y) != len(x):
        raise DataError(f"{name}: x has {len(x)} samples and y is {y.shape}; give one y for every x")
    labels = y.dtype.kind in "iu" and y.ndim == 1
    if labels and int(np.min(y)) < 0:
        raise DataError(f"{name}: the smallest label in y is {int(np.min(y))}; labels start at 0")
    images = (y.dtype == np.uint8 and y.ndim in (3, 4)) or (y.dtype.kind == "f" and y.ndim >= 3)
    if not labels and not images:
        raise DataError(
            f"{name}: y is {y.dtype} {y.shape}; allowed are int labels (N,), or reference images, uint8 (N, H, W, C) or"
            " float (N, C, H, W)"
        )


def _finite_rows(values: np.ndarray) -> np.ndarray:
    """bool (N,): which samples hold neither NaN nor infinity; read in blocks of about 16 MiB."""
    good = np.ones(len(values), dtype=bool)
    if values.dtype.kind != "f":
        return good
    step = max(1, (16 << 20) // max(1, values[0].nbytes))
    for start in range(0, len(values), step):
        block = values[start : start + step]
        good[start : start + step] = np.isfinite(block).reshape(len(block), -1).all(axis=1)
    return good
