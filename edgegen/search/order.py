"""What a search is asked for, and a study that is open for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen.request import Request
from edgegen.search.measured import Bench
from edgegen.search.spaces import Space
from edgegen.search.store import Store


@dataclass(frozen=True)
class Order:
    """What is searched for. request: network, data, target and limits, as for `compress`. trials: of all workers.

    study: address of the database ("": a file in `out`). workers: processes on this machine. ray: address of a Ray
    cluster whose nodes work too, `workers` of them. grace: seconds after which a silent worker counts as dead.
    """

    request: Request
    out: Path
    space: str = "recipe"
    trials: int = 40
    sampler: str = "tpe"
    study: str = ""
    name: str = ""
    workers: int = 1
    ray: str = ""
    bundles: bool = True
    grace: float = 60.0


@dataclass(frozen=True)
class Opened:
    """A study that is open here, with everything a worker needs."""

    store: Store
    study: Any
    bench: Bench
    space: Space
    budget: Any
    trials: int
    seed: int
    left: dict[str, str]
