"""Memory during training: pages that are freed are used again, and are given back at the end."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from edgegen.training import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

BLOCKS, BLOCK = 8, 16 * 2**20  # bytes


def faults_of_a_step() -> int:
    """Pages that the system had to clear for some blocks, which are freed at the end."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(BLOCK // 4) for _ in range(BLOCKS)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_freed_memory_is_used_again_and_given_back():
    pages = BLOCKS * BLOCK // resource.getpagesize()
    before = resident()
    with memory.kept():
        found = [faults_of_a_step() for _ in range(5)]
        assert found[-1] < 0.01 * pages
        assert resident() > before + BLOCKS * BLOCK // 2
    assert resident() < before + BLOCKS * BLOCK // 2


def test_it_is_given_back_after_a_fault_too():
    before = resident()
    with pytest.raises(KeyError), memory.kept():
        faults_of_a_step()
        raise KeyError
    assert resident() < before + BLOCKS * BLOCK // 2
