"""Rows of float32 numbers that may be too many for memory: in a file without a name, read back by number or in blocks.

Read with `pread`, not mapped: mapped pages count as the process' memory, and 50,000 Inception features are 400 MB.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator

import numpy as np

from edgegen.errors import DataError

BLOCK_BYTES = 8 << 20


class Rows:
    """(n, width) float32, appended in blocks; `label` says what made them (an extractor's hash)."""

    def __init__(self, label: str = "") -> None:
        self.label, self.width, self._count = label, 0, 0
        handle, name = tempfile.mkstemp(prefix="edgegen-rows-")
        os.unlink(name)
        self._file = handle
        self._places: np.ndarray | None = None
        weakref.finalize(self, os.close, handle)

    @classmethod
    def of(cls, blocks: Iterable[np.ndarray], label: str = "") -> Rows:
        """All blocks (n_i, width), one after the other."""
        rows = cls(label)
        for block in blocks:
            rows.append(block)
        return rows

    def __len__(self) -> int:
        return self._count if self._places is None else len(self._places)

    def append(self, block: np.ndarray) -> None:
        """Add (n, width).

        Raises:
            DataError: another width than the rows before.
        """
        block = np.ascontiguousarray(block, dtype=np.float32)
        if block.ndim != 2 or (self._count and block.shape[1] != self.width):
            raise DataError(f"features are {block.shape} after rows of {self.width}; all must be (N, {self.width})")
        self.width = block.shape[1]
        view = block.data.cast("B") if block.size else memoryview(b"")
        offset = self._count * self.width * 4
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
        self._count += len(block)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers, (k, width), in that order."""
        places = np.asarray(numbers, dtype=np.int64)
        places = places if self._places is None else self._places[places]
        found = np.empty((len(places), self.width), np.float32)
        size = self.width * 4
        for row, place in enumerate(places.tolist()):
            os.preadv(self._file, [memoryview(found[row]).cast("B")], place * size)
        return found

    def blocks(self, rows: int = 0) -> Iterator[np.ndarray]:
        """All rows in order; `rows` in each block, by default about 8 MiB."""
        step = rows or max(1, BLOCK_BYTES // max(4, 4 * self.width))
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            if self._places is not None:
                yield self.take(np.arange(start, stop))
            else:
                raw = os.pread(self._file, (stop - start) * self.width * 4, start * self.width * 4)
                yield np.frombuffer(raw, np.float32).reshape(stop - start, self.width)

    def only(self, numbers: np.ndarray) -> Rows:
        """A view of some of the rows, which shares the file."""
        view = object.__new__(Rows)
        view.__dict__.update(self.__dict__)
        numbers = np.asarray(numbers, dtype=np.int64)
        view._places = numbers if self._places is None else self._places[numbers]
        view.__dict__["_owner"] = self  # the file is closed with its owner
        return view

    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(np.isfinite(block).all() for block in self.blocks())
