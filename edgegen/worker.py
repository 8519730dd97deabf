"""The isolated process: `python -m edgegen.worker PARENT_PID`. JSON lines in, JSON lines out, arrays as .npy files.

`isolation.Process` starts it; nobody else should. Libraries that print do not disturb the protocol: file descriptors 0
and 1 are exchanged before the first of them is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgegen import errors, serial, types

_PR_SET_PDEATHSIG = 1
_SETTLED = 0.97  # warm-up ends when a window is no longer faster than this share of the best one before


class Session:
    """One runtime, at most one loaded artifact, and the feeds that are timed. Each public method is a request."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._module: Any = None
        self._artifact: types.Artifact | None = None
        self._run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None
        self._feeds: dict[str, np.ndarray] = {}
        self._baseline = 0

    def build(self, module: str, graph: Any, out: str, calibration: str | None, target: Any) -> dict[str, Any]:
        """Build an artifact; its JSON. What the runtime says it cannot take is refused before any work."""
        runtime = importlib.import_module(module)
        asked, device = serial.from_json(types.Graph, graph), serial.from_json(types.Target, target)
        if problems := runtime.supports(asked, device):
            name = module.rpartition(".")[2]
            raise errors.Unsupported(f"{name} cannot take {asked.stage}: {_told(problems)}")
        artifact = runtime.build(
            asked, Path(out), calibration=Path(calibration) if calibration else None, target=device
        )
        return {"artifact": serial.to_json(artifact)}

    def open(self, module: str, artifact: Any) -> dict[str, Any]:
        """Load an artifact and keep it loaded; facts of this host."""
        self._module = importlib.import_module(module)
        self._artifact = serial.from_json(types.Artifact, artifact)
        self._baseline = _status_bytes("VmRSS")
        self._run = self._stack.enter_context(self._module.load(self._artifact))
        return self.host()

    def host(self) -> dict[str, Any]:
        """Facts of this machine, with its load now."""
        local = importlib.import_module("edgegen.devices.local")
        return {"host": local.probe()}

    def feed(self, feeds: dict[str, str]) -> dict[str, Any]:
        """Take the arrays that `time` and `warm` run on."""
        self._feeds = {name: np.load(path, allow_pickle=False) for name, path in feeds.items()}
        return {}

    def run(self, feeds: dict[str, str], folder: str) -> dict[str, Any]:
        """Run once."""
        outputs = self._loaded()({name: np.load(path, allow_pickle=False) for name, path in feeds.items()})
        return {"outputs": _save_all(outputs, Path(folder))}

    def run_many(self, feeds: dict[str, str], folder: str) -> dict[str, Any]:
        """Run over stacked samples in steps of the artifact's batch; outputs are streamed to disk."""
        stacks = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in feeds.items()}
        count = min(len(stack) for stack in stacks.values())
        files: dict[str, str] = {}
        sinks: dict[str, np.memmap] = {}
        for start, size, piece in _pieces(stacks, count, self._batch(count)):
            for index, (name, value) in enumerate(self._loaded()(piece).items()):
                if name not in sinks:
                    files[name] = str(Path(folder) / f"out{index}.npy")
                    sinks[name] = np.lib.format.open_memmap(
                        files[name], mode="w+", dtype=value.dtype, shape=(count, *value.shape[1:])
                    )
                sinks[name][start : start + size] = value[:size]
        for sink in sinks.values():
            sink.flush()
        return {"outputs": files}

    def time(self, iterations: int, warmup: int, at_most: float | None = None) -> dict[str, Any]:
        """Milliseconds of each of `iterations` runs; only `run` lies between the two clock readings.

        at_most: seconds after which it stops early, once there are three samples; None: never.
        """
        run, feeds, clock = self._loaded(), self._feeds, time.perf_counter_ns
        for _ in range(warmup):
            run(feeds)
        samples: list[float] = []
        with _collector_off():
            end = clock() + int(1e9 * at_most) if at_most is not None else None
            for _ in range(iterations):
                start = clock()
                run(feeds)
                samples.append((clock() - start) / 1e6)
                if end is not None and start > end and len(samples) >= 3:
                    break
        return {"ms": samples}

    def warm(self, seconds: float, at_most: float) -> dict[str, Any]:
        """Run for `seconds` and on until a window is no faster than the best before it, `at_most` seconds in all."""
        begin, medians, runs = time.perf_counter(), [self.time(1, 0)["ms"][0]], 1
        while True:
            window = max(3, min(50, round(50 / max(medians[-1], 1e-3))))
            medians.append(statistics.median(self.time(window, 0)["ms"]))
            runs += window
            elapsed = time.perf_counter() - begin
            settled = len(medians) > 2 and medians[-1] >= _SETTLED * min(medians[:-1])
            if elapsed >= at_most or (settled and elapsed >= seconds):
                return {"ms": medians[-1], "runs": runs, "settled": settled}

    def memory(self) -> dict[str, Any]:
        """Bytes: the largest resident size of this process so far, and that before the artifact was loaded."""
        return {"peak": _status_bytes("VmHWM"), "baseline": self._baseline}

    def inspect(self) -> dict[str, Any]:
        """What the built file contains."""
        self._loaded()
        return {"inspection": serial.to_json(self._module.inspect(self._artifact))}

    def layers(self, iterations: int) -> dict[str, Any]:
        """Times of each kernel on the feeds, where the runtime tells them; else why not."""
        self._loaded()
        if not hasattr(self._module, "layer_times"):
            return {"layers": [], "reason": "this runtime tells no times of single layers"}
        return {"layers": self._module.layer_times(self._artifact, self._feeds, iterations), "reason": ""}

    def close(self) -> None:
        """Leave the artifact's context."""
        self._stack.close()

    def _loaded(self) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        if self._run is None:
            raise errors.RuntimeFailed("no artifact is loaded in this worker; open one first")
        return self._run

    def _batch(self, count: int) -> int:
        shape = self._artifact.inputs[0].shape if self._artifact and self._artifact.inputs else ()
        return shape[0] if shape and isinstance(shape[0], int) else count


REQUESTS = ("build", "open", "host", "feed", "run", "run_many", "time", "warm", "memory", "inspect", "layers")


def main() -> int:
    """Serve requests until the input ends."""
    _die_with(int(sys.argv[1]))
    requests, replies = _private_pipes()
    session = Session()
    for line in requests:
        replies.write(json.dumps(_serve(session, json.loads(line))).encode() + b"\n")
        replies.flush()
    session.close()
    return 0


def _serve(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    op = request.pop("op")
    try:
        if op not in REQUESTS:
            raise errors.UsageError(f"unknown request {op!r}; allowed: {', '.join(REQUESTS)}")
        return getattr(session, op)(**request)
    except Exception as error:  # noqa: BLE001 - the edge of the process: every error travels to the parent as a reply
        state = {key: value for key, value in vars(error).items() if isinstance(value, str)}
        told = {"class": type(error).__name__, "message": str(error)[:2000], "state": state}
        return {"error": {**told, "traceback": "".join(traceback.format_exception(error))[-4000:]}}


def _told(problems: list[types.Problem]) -> str:
    """Operator, layer and cure of the first three problems."""
    said = [f"{p.op}{f' ({p.layer})' if p.layer else ''}: {p.rewrite}" for p in problems[:3]]
    return "; ".join(said) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Copies of stdin and stdout that children do not inherit; 0 now is empty and 1 is stderr."""
    requests, replies = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _die_with(parent: int) -> None:
    """On Linux be killed when the parent dies, even in the middle of a native call; elsewhere the input just ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def _pieces(
    stacks: dict[str, np.ndarray], count: int, batch: int
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """(start, samples, feeds) in steps of `batch`; the last step is filled up with copies of its last sample."""
    for start in range(0, count, batch):
        size = min(batch, count - start)
        rows = np.minimum(np.arange(start, start + batch), start + size - 1)
        yield start, size, {name: np.ascontiguousarray(stack[rows]) for name, stack in stacks.items()}


def _save_all(arrays: dict[str, np.ndarray], folder: Path) -> dict[str, str]:
    files = {name: str(folder / f"out{index}.npy") for index, name in enumerate(arrays)}
    for name, file in files.items():
        np.save(file, arrays[name], allow_pickle=False)
    return files


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; where there is no /proc, the largest resident size stands for both."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


if __name__ == "__main__":
    sys.exit(main())
