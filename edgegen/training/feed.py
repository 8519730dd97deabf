"""Batches prepared ahead in order, and progress told at a bearable pace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

PREFETCH = 3  # batches prepared ahead


def prefetched(
    batch_at: Callable[[int], Any], first: int, steps: int, device: str, each: int = 1
) -> Iterator[tuple[int, list[Any]]]:
    """(step, its `each` batches) in order, prepared ahead in one background thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="edgegen-batches")
    _one_thread(pool)
    queue: list[Future] = []
    asked, end = first * each, steps * each
    try:
        for step in range(first, steps):
            batches = []
            for _ in range(each):
                while len(queue) < PREFETCH and asked < end:
                    queue.append(pool.submit(lambda at: place(batch_at(at), device), asked))
                    asked += 1
                batches.append(queue.pop(0).result())
            yield step, batches
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_thread(pool: ThreadPoolExecutor) -> None:
    """Let torch compute with one thread in the pool's only thread.

    With a second team of OpenMP threads in the process there are more of them than cores; then those of the main thread
    sleep between operations instead of waiting for the next one, and a step of training takes up to 1.7 times as long.
    """
    count = torch.get_num_threads()

    def alone() -> None:
        torch.get_num_threads()  # the first call in a thread sets the number of all threads; it must not come later
        torch.set_num_threads(1)

    pool.submit(alone).result()
    torch.set_num_threads(count)  # the number is kept for each thread, and once more for threads that begin later


def place(value: Any, device: str = "cpu") -> Any:
    """Tensors inside tuples, lists and dictionaries moved to `device`; images (N, C, H, W) become channels_last."""
    if isinstance(value, torch.Tensor):
        layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
        return value.to(device=device, memory_format=layout)
    if isinstance(value, dict):
        return {name: place(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(place(item, device) for item in value)
    return value


class Reporter:
    """Calls `progress` with the loss and the time left, at most twice a second and once at the end."""

    def __init__(self, progress: Callable[[str, float], None] | None, steps: int, first: int) -> None:
        self.progress, self.steps, self.first = progress, steps, first
        self.begin, self.said = time.monotonic(), -math.inf

    def __call__(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if self.progress is None or (now - self.said < 0.5 and step < self.steps):
            return
        self.said = now
        left = (now - self.begin) / (step - self.first) * (self.steps - step)
        self.progress(f"step {step}/{self.steps}, loss {loss:.4g}, {clock(left)} left", step / self.steps)


def clock(seconds: float) -> str:
    """Whole seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
