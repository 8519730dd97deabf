"""What a search costs beside its candidates: time a trial, memory and database over 2,000 trials of no work.

    python benchmarks/search_overhead.py [--trials 2000] [--study postgresql://...] [--sampler nsga2]

Prints a line for each tenth: seconds a trial, resident memory, bytes of the database a trial (SQLite). Flat means that
the last tenth is like the first ones.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import conditions

from edgegen.search import spaces, store, strategies, working
from edgegen.search.store import Figures, Row

SPACE = spaces.parse({"schema": 1, "genes": [
    {"name": "channels", "pass": "prune_channels", "option": "ratio", "off": 0.0,
     "choices": [i / 50 for i in range(50)]},
    {"name": "blocks", "pass": "prune_blocks", "option": "ratio", "choices": [i / 40 for i in range(30)], "off": 0.0},
    {"name": "rank", "pass": "factorize_svd", "option": "ratio", "choices": [0.0, 0.25, 0.5, 0.75], "off": 0.0},
    {"name": "int8", "pass": "quantize", "option": "precision", "choices": ["float", "int8"], "off": "float"},
]}, "synthetic")  # fmt: skip


def synthetic(choices: dict[str, int]) -> Figures:
    """A known front: what is faster is worse."""
    strength = choices["channels"] / 50 + choices["blocks"] / 30 + choices["rank"] / 4
    latency = 10.0 - 2.0 * strength - 2.0 * choices["int8"]
    return Figures(latency, latency / 10, strength**2 + 0.1 * choices["int8"], 1_000_000 - 9_000 * choices["channels"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--study", default="")
    parser.add_argument("--sampler", default="nsga2", choices=strategies.NAMES)
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.study or f"{folder}/study.db"
        sampler = strategies.make(options.sampler, SPACE, options.trials, 0)
        kept, study, _ = store.open_study(url, f"overhead-{time.time_ns()}", {}, sampler)
        rows, last = [], time.perf_counter()

        def told(row: Row) -> None:
            nonlocal last
            done = row.slot + 1
            if done % max(1, options.trials // 10) == 0:
                now = time.perf_counter()
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                size = sum(p.stat().st_size for p in Path(folder).glob("study.db*")) / done
                each = (now - last) / max(1, options.trials // 10)
                rows.append({"trials": done, "ms_a_trial": 1e3 * each, "memory_mb": memory, "bytes_a_trial": size})
                print(f"{done:6d} trials: {1e3 * each:7.1f} ms each, {memory:6.0f} MB, {size:7.0f} bytes a trial")
                last = now

        number = working.work(kept, study, SPACE, {}, synthetic, trials=options.trials, told=told)
        kept.close()
    print(f"{number} trials, {options.sampler}")
    if options.out is not None:
        told = {"sampler": options.sampler, **conditions.conditions(("optuna", "sqlalchemy")), "rows": rows}
        options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
