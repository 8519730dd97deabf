"""A time limit for pure Python work, usable outside the main thread (signals are not)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def limited(work: Callable[[], T], seconds: float) -> T:
    """Run `work` in a thread and raise TimeoutError inside it when its time is over (pure Python loops do end then)."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body, name="edgegen-trace", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError))
        thread.join(seconds)
        raise TimeoutError
    if failure:
        raise failure[0]
    return result[0]
