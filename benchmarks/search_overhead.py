"""What a search costs beside its candidates: time a trial, memory and database over 2,000 trials of no work.

    python benchmarks/search_overhead.py [--trials 2000] [--study postgresql://...] [--sampler nsga2]

A line for each tenth: time a trial and a proposal, resident memory, bytes of the database a trial (SQLite). Flat means
that the last tenth is like the first. Writes results/search-overhead.json and .md, one entry a sampler.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import conditions

from edgegen import files
from edgegen.search import spaces, store, strategies, working
from edgegen.search.store import Figures, Row

RESULT = Path(__file__).resolve().parent / "results" / "search-overhead.json"
SPACE = spaces.parse({"schema": 1, "genes": [
    {"name": "channels", "pass": "prune_channels", "option": "ratio", "off": 0.0,
     "choices": [i / 50 for i in range(50)]},
    {"name": "blocks", "pass": "prune_blocks", "option": "ratio", "choices": [i / 40 for i in range(30)], "off": 0.0},
    {"name": "rank", "pass": "factorize_svd", "option": "ratio", "choices": [0.0, 0.25, 0.5, 0.75], "off": 0.0},
    {"name": "int8", "pass": "quantize", "option": "precision", "choices": ["float", "int8"], "off": "float"},
]}, "synthetic")  # fmt: skip


def synthetic(choices: Mapping[str, int]) -> Figures:
    """A known front: what is faster is worse."""
    strength = choices["channels"] / 50 + choices["blocks"] / 30 + choices["rank"] / 4
    latency = 10.0 - 2.0 * strength - 2.0 * choices["int8"]
    return Figures(latency, latency / 10, strength**2 + 0.1 * choices["int8"], 1_000_000 - 9_000 * choices["channels"])


def measure(sampler: str, trials: int, url: str, folder: Path) -> list[dict[str, float]]:
    """A row each tenth of the trials: ms a trial and a proposal of that tenth, memory (MB), bytes in the database."""
    kept, study, _ = store.open_study(
        url, f"overhead-{time.time_ns()}", {}, strategies.make(sampler, SPACE, trials, 0)
    )
    rows, last, tenth = [], (time.perf_counter(), 0), max(1, trials // 10)

    def told(row: Row) -> None:
        nonlocal last
        done = row.slot + 1
        if done % tenth:
            return
        now, asked = time.perf_counter(), len(study.get_trials(deepcopy=False))
        spent = 1e3 * (now - last[0])
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = sum(file.stat().st_size for file in folder.glob("study.db*")) / done
        rows.append({"trials": done, "ms_a_trial": spent / tenth, "ms_a_proposal": spent / max(1, asked - last[1]),
                     "memory_mb": memory, "bytes_a_trial": size})  # fmt: skip
        print(f"{done:6d} trials: {spent / tenth:7.1f} ms each, {rows[-1]['ms_a_proposal']:.1f} ms a proposal,"
              f" {memory:6.0f} MB, {size:7.0f} bytes a trial", flush=True)  # fmt: skip
        last = (time.perf_counter(), asked)

    working.work(kept, study, SPACE, {}, synthetic, trials=trials, told=told)
    kept.close()
    return rows


def markdown(entries: dict[str, Any]) -> str:
    """A row a sampler: its first and its last tenth."""
    lines = [
        "What a trial costs beside its objective, in the first and the last tenth of the trials. A proposal that was",
        "tried before is told its figures and costs a further one; a sampler that has converged makes many.", "",
        "| sampler | trials | ms a proposal | ms a trial | memory (MB) | bytes a trial |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, one in entries.items():
        first, end = one["rows"][0], one["rows"][-1]
        told = [f"{first[key]:.{digits}f} to {end[key]:.{digits}f}" for key, digits in
                (("ms_a_proposal", 1), ("ms_a_trial", 1), ("memory_mb", 0), ("bytes_a_trial", 0))]  # fmt: skip
        lines.append(f"| {name} | {end['trials']} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--study", default="", help="address of a PostgreSQL database; else a file")
    parser.add_argument("--sampler", default="nsga2", choices=strategies.NAMES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.sampler, options.trials, options.study or f"{folder}/study.db", Path(folder))
    entries = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    entries[options.sampler] = {**conditions.conditions(("optuna", "sqlalchemy")), "rows": rows}
    files.write_json(RESULT, entries)
    files.write_text(RESULT.with_suffix(".md"), markdown(entries))


if __name__ == "__main__":
    main()
