"""Workers of a search on a Ray cluster: each is a task that joins the study and works until it is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from edgegen.errors import MissingExtra, UsageError


def _join(url: str, name: str, grace: float) -> int:
    from edgegen.search import session

    return session.join(url, name, grace=grace)


def work(
    address: str, count: int, url: str, name: str, grace: float, joined: Callable[[str, str, float], int] = _join
) -> list[int]:
    """Start `count` workers on the cluster at `address` ("local": one that is started here); what each of them did.

    Ray's own usage reports are switched off. A node that is lost takes its worker along; Ray starts it again elsewhere,
    and the study gives its candidate out again. The nodes need edgegen, and the network and the data at the same paths.
    joined: what a worker does.

    Raises:
        MissingExtra: ray is not installed. UsageError: the cluster cannot be reached, or the study is a local file.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "to start workers on a Ray cluster", "ray") from error
    if address != "local" and "://" not in url:
        raise UsageError(f"--ray {address}: workers elsewhere cannot open the file {url}; give --study postgresql://...")
    try:
        here: dict[str, Any] = {"include_dashboard": False, "num_cpus": count} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, **here)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address}: cannot be reached ({' '.join(str(error).split())[:200]})") from error
    try:
        task: Any = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(joined)
        return list(ray.get([task.remote(url, name, grace) for _ in range(count)]))
    finally:
        ray.shutdown()
