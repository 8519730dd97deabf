"""Memory that training freed goes back to the system when the training is over.

glibc keeps it for the process, which has no use for it any more: ResNet-56 trained with batches of 64 leaves 1.08 GB
without this and 0.75 GB with it, while builds and measurements in other processes need memory.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def given_back() -> Iterator[None]:
    """Give freed memory back after the body; without glibc nothing is done."""
    try:
        yield
    finally:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
