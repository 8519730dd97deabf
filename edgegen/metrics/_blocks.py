"""Work cut into numbered blocks, each a file: what is finished is not done again, and several processes share the rest.

Process r of p takes every p-th block. Under torchrun (RANK, WORLD_SIZE, MASTER_ADDR) they then hand each other what the
others lack, so they need no common disk; without it, `Share(r, p)` does one part and another run merges them. Merging
reads all blocks in order, so the result is that of a single process, bit for bit.
"""

from __future__ import annotations

import datetime
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgegen import files
from edgegen.errors import DataError
from edgegen.metrics._rows import Rows

# Processes meet when each has done its part; torch waits half an hour, and a slow machine may be later than that.
WAIT_HOURS = 48.0

Arrays = Mapping[str, np.ndarray]
Work = Callable[[int], Arrays]  # number of the block -> its arrays, first axis the samples


@dataclass(frozen=True)
class Share:
    """This process' part: every `count`-th block from `index` on. `together`: started by torchrun."""

    index: int = 0
    count: int = 1
    together: bool = False


def share_of(text: str = "") -> Share:
    """`I/N` as a share; without a text, that of torchrun's environment, or all of it.

    Raises:
        DataError: not such a text, or an I that is not below N.
    """
    if text:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise DataError(f"shard {text!r} must be I/N with I from 0 to N - 1, such as 0/4")
        return Share(int(found[1]), int(found[2]))
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdigit() and world.isdigit() and os.environ.get("MASTER_ADDR") and int(world) > 1:
        return Share(int(rank), int(world), together=True)
    return Share()


@dataclass(frozen=True)
class Blocks:
    """`count` blocks in `folder`; the folder's name must say all that they depend on."""

    folder: Path
    count: int

    def fill(self, work: Work, share: Share, progress: Callable[[str, float], None]) -> None:
        """Do the missing blocks of this share; under torchrun, fetch the others' too."""
        mine = range(share.index, self.count, share.count)
        for place, number in enumerate(mine, 1):
            if self.read(number) is None:
                self._write(number, work(number))
            progress(f"block {place} of {len(mine)}", place / max(1, len(mine)))
        if share.together:
            self._exchange(share)

    def read(self, number: int) -> dict[str, np.ndarray] | None:
        """A finished block; None when it is not there or damaged."""
        try:
            with self._file(number).open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError):
            return None

    def all(self) -> Iterator[dict[str, np.ndarray]]:
        """Every block in order.

        Raises:
            DataError: some are not there yet.
        """
        absent = [number for number in range(self.count) if not self._file(number).is_file()]
        if absent:
            raise DataError(f"{len(absent)} of {self.count} blocks are not there yet; run the other shards first")
        for number in range(self.count):
            found = self.read(number)
            if found is None:
                raise DataError(f"{self._file(number)} is damaged; remove it and run again")
            yield found

    def rows(self, name: str, label: str = "") -> Rows:
        """One array of all blocks as rows (n, width)."""
        return Rows.of((block[name].reshape(len(block[name]), -1) for block in self.all()), label)

    def column(self, name: str) -> np.ndarray:
        """One array of all blocks, (n, ...), float64; for what is small."""
        return np.concatenate([block[name].astype(np.float64) for block in self.all()])

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def _write(self, number: int, arrays: Arrays) -> None:
        with files.whole(self._file(number)) as temporary, temporary.open("wb") as handle:
            np.savez(handle, allow_pickle=False, **arrays)

    def _exchange(self, share: Share) -> None:
        """Every process ends with every block; each block comes from the process that did it.

        Raises:
            DataError: the others are not there within `WAIT_HOURS`, or one of them is gone.
        """
        from torch import distributed

        try:
            if not distributed.is_initialized():
                limit = datetime.timedelta(hours=WAIT_HOURS)
                distributed.init_process_group("gloo", rank=share.index, world_size=share.count, timeout=limit)
            self._hand_out(share)
        except distributed.DistError as error:
            raise _unmet(share, error) from error
        except RuntimeError as error:  # gloo has no class of its own for a peer that is gone
            if "gloo" not in str(error):
                raise
            raise _unmet(share, error) from error

    def _hand_out(self, share: Share) -> None:
        import torch
        from torch import distributed

        have = torch.tensor([int(self._file(number).is_file()) for number in range(self.count)])
        distributed.all_reduce(have, op=distributed.ReduceOp.MIN)  # 1: all processes have it
        for number in torch.nonzero(have == 0).flatten().tolist():
            owner, mine = number % share.count, number % share.count == share.index
            content = self._file(number).read_bytes() if mine else b""
            size = torch.tensor([len(content)])
            distributed.broadcast(size, owner)
            buffer = torch.empty(int(size), dtype=torch.uint8)
            if mine:
                buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            distributed.broadcast(buffer, owner)
            if not mine and not self._file(number).is_file():
                with np.load(io.BytesIO(buffer.numpy().tobytes()), allow_pickle=False) as stored:
                    self._write(number, {name: stored[name] for name in stored.files})
        distributed.barrier()


def _unmet(share: Share, error: Exception) -> DataError:
    return DataError(
        f"process {share.index} of {share.count} waited at most {WAIT_HOURS:g} h and did not meet all the others"
        f" ({str(error).splitlines()[0][:200]}); start them all again: what is finished is kept"
    )
