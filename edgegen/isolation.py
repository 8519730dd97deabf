"""A child process that may crash, hang or eat memory: its parent gets a RuntimeFailed with the reason, and goes on.

The child is `python -m edgegen.worker`. Requests and replies are JSON lines over pipes that no library can write to.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgegen import errors

POLL_S = 0.05  # how often time and memory are looked at while a request runs
_PROC = Path("/proc/self/statm").exists()


@dataclass(frozen=True)
class Limits:
    """What a worker process may use.

    seconds: time for one request (one build, one load, one batch of runs). memory_bytes: resident memory of the process
    and all its children; None or 0: no limit.
    """

    seconds: float = 600.0
    memory_bytes: int | None = None


DEFAULT_LIMITS = Limits()


class Process:
    """One worker process. Start it from a thread that lives as long as it does: Linux ends it with that thread.

    name: what messages call it, normally the runtime's name.
    """

    def __init__(self, name: str, limits: Limits = DEFAULT_LIMITS):
        self.name, self.limits = name, limits
        self._death = ""
        self._replies: queue.Queue[bytes | None] = queue.Queue()
        self._words: collections.deque[bytes] = collections.deque(maxlen=40)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgegen.worker", str(os.getpid())],  # -P: the current folder holds no modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
        readers = (self._read_replies, self._read_words)
        self._threads = [threading.Thread(target=reader, daemon=True) for reader in readers]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def request(self, op: str, *, poll: float = POLL_S, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            RuntimeFailed: the process died, ran out of its limits, or the runtime raised; says at which `op`.
            EdgegenError: the error that edgegen code raised inside the process, of the same class.
        """
        if self._death:
            raise errors.RuntimeFailed(f"{self.name}: cannot {op}, the worker is gone: {self._death}")
        deadline = time.monotonic() + self.limits.seconds
        try:
            self._pipe().write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._pipe().flush()
        except OSError:
            self._fail(op, self._how_it_ended())
        while True:
            with contextlib.suppress(queue.Empty):
                line = self._replies.get(timeout=max(0.0, min(poll, deadline - time.monotonic())))
                return self._answer(op, line)
            self._check(op, deadline)

    def close(self) -> None:
        """Ask the process to end (it does at the end of its input); kill it when it does not within two seconds."""
        self._death = self._death or "it was closed"
        with contextlib.suppress(OSError):
            self._pipe().close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        self.kill()

    def kill(self) -> None:
        """End the process and its children at once."""
        self._death = self._death or "it was killed"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(timeout=1)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _pipe(self) -> Any:
        return self._process.stdin

    def _read_replies(self) -> None:
        for line in self._process.stdout or ():
            self._replies.put(line)
        self._replies.put(None)

    def _read_words(self) -> None:
        for line in self._process.stderr or ():
            if line.strip():
                self._words.append(line.strip()[:500])

    def _answer(self, op: str, line: bytes | None) -> dict[str, Any]:
        if line is None:
            self._fail(op, self._how_it_ended())
        reply = json.loads(line)
        if "error" in reply:
            raise _rebuilt(self.name, op, reply["error"])
        return reply

    def _check(self, op: str, deadline: float) -> None:
        limit = self.limits.memory_bytes
        if self._process.poll() is not None and self._replies.empty():
            self._fail(op, self._how_it_ended())
        if limit and resident_bytes(self._process.pid) > limit:
            self._fail(op, f"out of memory (limit {limit / 2**30:.1f} GiB)")
        if time.monotonic() >= deadline:
            self._fail(op, f"no answer in {self.limits.seconds:g} s")

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=5)
            if code == -signal.SIGKILL:
                return "killed (signal 9), perhaps by the system for lack of memory"
            return f"crashed (signal {-code})" if code < 0 else f"ended by itself (exit code {code})"
        return "closed its pipe"

    def _fail(self, op: str, how: str) -> NoReturn:
        self._death = f"{how} at {op}"
        self.kill()
        words = " | ".join(line.decode(errors="replace") for line in list(self._words)[-3:])[-400:]
        raise errors.RuntimeFailed(f"{self.name}: {how} at {op}" + (f"; last words: {words}" if words else ""))


def host_threads() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants, in bytes; 0 when it is gone or cannot be read."""
    if not _PROC:
        return _resident_bytes_psutil(pid)
    total, pages = 0, [pid]
    while pages:
        current = pages.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may end at any moment
            total += int(Path(f"/proc/{current}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{current}/task").iterdir():
                pages.extend(int(child) for child in (task / "children").read_text().split())
    return total


def _resident_bytes_psutil(pid: int) -> int:
    try:
        import psutil
    except ImportError:
        return 0  # no way to look: the time limit still holds
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])
    return 0


def _environment() -> dict[str, str]:
    """The parent's environment, with the folder that holds this very edgegen first on the path."""
    here = str(Path(__file__).resolve().parents[1])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _rebuilt(name: str, op: str, told: dict[str, Any]) -> errors.EdgegenError:
    """The exception that a worker told about: its own class when it is one of edgegen's, else RuntimeFailed."""
    kind = getattr(errors, told["class"], None)
    message = told["message"]
    if not (isinstance(kind, type) and issubclass(kind, errors.EdgegenError)):
        kind, message = errors.RuntimeFailed, f"{name}: {told['class']} at {op}: {message}"
    error: errors.EdgegenError = kind.__new__(kind)
    error.args = (message,)
    vars(error).update(told["state"])
    error.add_note(told["traceback"])
    return error
