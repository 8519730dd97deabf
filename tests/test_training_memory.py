"""Memory that a training freed goes back to the system at its end."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from edgegen.training import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")

BLOCKS, BLOCK = 8, 16 * 2**20  # bytes


def used_and_freed() -> torch.Tensor:
    """What steps of training leave: freed blocks, below one that is still in use, so that none goes back by itself."""
    for _ in range(3):  # glibc maps the first blocks one by one; then it keeps such sizes in its heap
        blocks = [torch.ones(BLOCK // 4) for _ in range(BLOCKS + 1)]
        kept = blocks.pop()
        del blocks
    return kept


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_freed_memory_is_given_back():
    before = resident()
    with memory.given_back():
        kept = used_and_freed()
        assert resident() > before + BLOCKS * BLOCK // 2, "glibc keeps it"
    assert resident() < before + BLOCKS * BLOCK // 2 and kept[0] == 1


def test_it_is_given_back_after_a_fault_too():
    before = resident()
    with pytest.raises(KeyError), memory.given_back():
        used_and_freed()
        raise KeyError
    assert resident() < before + BLOCKS * BLOCK // 2
