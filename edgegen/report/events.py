"""Progress for machines: one JSON object a line on standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

EVERY_S = 1.0


@contextmanager
def progress(
    *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str, str, float], None]]:
    """Yield tell(step, text, fraction): {"event": "step", "step", "text", "fraction", "seconds"}.

    A step is told when it begins, when it ends (fraction 1), and in between at most once in EVERY_S. `fraction` is null
    while the step does not know how far it is; `seconds` are since the run began.
    """
    out, began = stream or sys.stderr, clock()
    last: dict[str, Any] = {"step": "", "at": -math.inf, "fraction": None}

    def tell(step: str, text: str, fraction: float) -> None:
        now = clock()
        share = min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else None
        ended = share == 1.0 and last["fraction"] != 1.0
        if step == last["step"] and not ended and now - last["at"] < EVERY_S:
            return
        last.update(step=step, at=now, fraction=share)
        event = {"event": "step", "step": step, "text": text, "fraction": share, "seconds": round(now - began, 3)}
        print(json.dumps(event), file=out, flush=True)

    yield tell
