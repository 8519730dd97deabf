"""What the teacher gives for a fixed set of views of each sample, kept on disk: it runs once for each view.

Shen and Xing, 2022, A Fast Knowledge Distillation Framework for Visual Recognition, arXiv:2112.01528. Deviations: views
are looked at as they are drawn, in training, instead of all beforehand; logits are kept whole, images too. Values are
kept in 16 bits, and are rounded so from the first time on: a run that was cut off ends with the same weights.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgegen.training import distributed

_SHARE = 0.5  # of the free disk that may be taken
_LARGEST = float(np.finfo(np.float16).max)


class Kept:
    """Outputs of the teacher by view: arrays in files, mapped into memory, of which only what is there takes room."""

    def __init__(self, folder: Path | None, count: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """folder: kept beside a run's checkpoint; None: until `close`. shapes: of the outputs, without the batch.

        Raises:
            ValueError: the disk has no room for them.
        """
        self._own = tempfile.TemporaryDirectory(prefix="edgegen-") if folder is None else None
        place = Path(self._own.name) if self._own is not None else Path(str(folder))
        place = place / f"views-{distributed.group().rank}"
        place.mkdir(parents=True, exist_ok=True)
        asked, free = sum(2 * count * math.prod(shape) for shape in shapes), shutil.disk_usage(place).free
        if asked > _SHARE * free:
            self.close()
            room = f"half of what is free on the disk is {_SHARE * free / 1e9:.1f} GB"
            told = f"views: {count} of them need {asked / 1e9:.1f} GB"
            raise ValueError(f"{told}, and {room}; ask for fewer, or for none")
        self.outputs = [_mapped(place / f"{i}.npy", (count, *shape), np.float16) for i, shape in enumerate(shapes)]
        self.known = _mapped(place / "known.npy", (count,), np.uint8)

    def of(
        self, views: torch.Tensor, teach: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        """Outputs of a batch of views (N,); teach: places in the batch -> the teacher's outputs for those."""
        rows = views.cpu().numpy()
        missing = np.flatnonzero(self.known[rows] == 0)
        if len(missing):
            found = [out.float().cpu().numpy() for out in teach(torch.from_numpy(missing).to(views.device))]
            if (largest := max(float(np.abs(out).max()) for out in found)) > _LARGEST:
                raise ValueError(f"views: the teacher gives {largest:.3g}, 16 bits hold {_LARGEST:g}; leave them out")
            for kept, out in zip(self.outputs, found, strict=True):
                kept[rows[missing]] = out
            self.known[rows[missing]] = 1
        return tuple(torch.from_numpy(kept[rows].astype(np.float32)).to(views.device) for kept in self.outputs)

    def close(self) -> None:
        """Remove what no later run can go on with."""
        if self._own is not None:
            self._own.cleanup()


def _mapped(file: Path, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """The array in this file, or a new one of zeros."""
    if file.is_file():
        return np.lib.format.open_memmap(file, mode="r+")
    return np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)
