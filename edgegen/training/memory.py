"""Memory that training frees stays with the process until the training is over.

A step frees what it allocated, and by default glibc hands it back to the system, which must clear every page for the
next step: a tenth of the time of a step of a small convolutional network.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_NEVER = 2**31 - 1
_LARGEST, _USUAL = 32 * 2**20, 64 * 2**20  # the most that glibc takes for M_MMAP_THRESHOLD, and where it goes by itself


@contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory while the body runs, and give it back at the end; without glibc nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP, _LARGEST)
    libc.mallopt(_TRIM, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_TRIM, _USUAL)
        libc.malloc_trim(0)
