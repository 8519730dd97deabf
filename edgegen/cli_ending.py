"""How a command ends when it is interrupted: by Ctrl-C, by a terminal that was closed, by a shutdown."""

from __future__ import annotations

import _thread
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

RESUMABLE = ("compress", "export")
_AGAIN_S = 0.05  # until then the callback that swallowed a signal is left, as a rule; else once more
_WHY = {"SIGHUP": "the terminal was closed", "SIGTERM": "asked to end", "SIGINT": "interrupted"}


class Ended(BaseException):
    """A signal that ends the command; unwinds like Ctrl-C, so that what is half written goes away.

    Not a KeyboardInterrupt: typer makes a silent exit code of that one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def listen() -> None:
    """Let a closed terminal and a shutdown unwind the command as Ctrl-C does; what is ignored (nohup) stays so."""
    for name in _WHY:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there decides
                signal.signal(number, _end)
    sys.unraisablehook = _swallowed


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clearing up short
    raise Ended(number)


def _swallowed(unraisable: Any) -> None:
    """Raise an `Ended` again that came in a destructor or a weak reference's callback, where nothing can be raised.

    PyTorch's tracing runs such callbacks all the time; the first signal was lost there and all later ones ignored.
    """
    if not isinstance(unraisable.exc_value, Ended):
        sys.__unraisablehook__(unraisable)
        return
    number, main = unraisable.exc_value.number, threading.main_thread().ident
    signal.signal(number, _end)
    if hasattr(signal, "pthread_kill") and main is not None:  # wakes a sleep too; Windows has no such call
        later = threading.Timer(_AGAIN_S, signal.pthread_kill, [main, number])
    else:
        later = threading.Timer(_AGAIN_S, _thread.interrupt_main, [number])
    later.daemon = True
    later.start()


def told(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """(last line, exit code); the line says how to go on. arguments: those of the command, without the program."""
    number = error.number if isinstance(error, Ended) else signal.SIGINT
    why = _WHY.get(signal.Signals(number).name, "interrupted")
    if not arguments or arguments[0] not in RESUMABLE:
        return f"{why}; nothing half written is left", 128 + number
    again = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    return f"{why}; finished steps are kept: go on with: {shlex.join(['edgegen', *again])}", 128 + number


def unheard(error: OSError) -> bool:
    """Whether an error comes from a terminal that is gone, which may be noticed before its signal comes."""
    if error.errno not in (errno.EIO, errno.EPIPE):
        return False
    try:
        os.write(2, b"\n")
    except OSError:
        return True
    return False


def say(line: str) -> None:
    """The last line on standard error, which may be gone with its terminal; an event for who asked for `--json`."""
    with contextlib.suppress(OSError, ValueError):
        as_event = "--json" in sys.argv
        told = json.dumps({"event": "error", "message": line}) if as_event else f"edgegen: {line}"
        sys.stderr.write(f"{told}\n")
        sys.stderr.flush()
