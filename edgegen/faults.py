"""A fault of edgegen itself: one line for the user, the traceback in a file for whoever mends it."""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from pathlib import Path

from edgegen import files


def told(error: BaseException) -> str:
    """Keep the traceback of an unexpected error, and say in one line what happened and where it is kept.

    With EDGEGEN_TRACEBACK=1 in the environment the error is raised again instead.
    """
    if os.environ.get("EDGEGEN_TRACEBACK") == "1":
        raise error
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    try:
        where = f"the traceback is in {_keep(error)}"
    except OSError as lost:
        where = f"the traceback could not be kept ({lost}); run again with EDGEGEN_TRACEBACK=1"
    return f"a fault in edgegen, not in your input: {what}; {where}; please report it"


def _keep(error: BaseException) -> Path:
    text = "".join(traceback.format_exception(error))
    folder = files.cache_folder() / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    file.write_text(f"{shlex.join(sys.argv)}\n\n{text}", encoding="utf-8")
    return file
