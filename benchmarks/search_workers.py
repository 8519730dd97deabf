"""How a search gains from more workers: the same trials by one, two and four processes on one database.

    python benchmarks/search_workers.py [--study postgresql://...] [--trials 32] [--rounds 3]

A trial either waits (`--seconds`: a device elsewhere is busy, this machine is not) or computes for as long on one core.
Waiting shows what the database and the hand-out of candidates cost; computing shows at most as many times as there are
cores. The trials that were done, and those done twice, are counted. Timed from the moment when all workers are ready;
medians of interleaved rounds. Writes results/search-workers.json and .md, one entry a database.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import conditions
import search_overhead

from edgegen import files
from edgegen.search import store, strategies, working

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "search-workers.json"
COUNTS = (1, 2, 4)


def waits(seconds: float) -> None:
    time.sleep(seconds)


def computes(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


KINDS = {"waits": waits, "computes": computes}


def worker(url: str, name: str, kind: str, trials: int, seconds: float, ready: Any, done: Any) -> None:
    """One process: opens the study, says that it is ready, works when all are."""

    def objective(choices: Any) -> store.Figures:
        KINDS[kind](seconds)
        return search_overhead.synthetic(choices)

    sampler = strategies.make("nsga2", search_overhead.SPACE, trials, os.getpid())
    kept, study, _ = store.open_study(url, name, None, sampler)
    ready.wait()
    done.put(working.work(kept, study, search_overhead.SPACE, {}, objective, trials=trials, seed=os.getpid()))
    kept.close()


def once(url: str, kind: str, count: int, trials: int, seconds: float) -> float:
    """Seconds of one search of its own.

    Raises:
        RuntimeError: candidates are missing, or were done more than once.
    """
    name = f"workers-{kind}-{count}-{time.time_ns()}"
    kept, _, _ = store.open_study(url, name, {}, strategies.make("nsga2", search_overhead.SPACE, trials, 0))
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(count + 1), context.Queue()
    each = (url, name, kind, trials, seconds, ready, done)
    processes = [context.Process(target=worker, args=each, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    ready.wait(120)
    began = time.perf_counter()
    numbers = [done.get(timeout=600) for _ in processes]
    took = time.perf_counter() - began
    for process in processes:
        process.join()
    rows = kept.rows()
    kept.close()
    if not (sum(numbers) == len(rows) == trials and {row.attempts for row in rows} == {1}):
        raise RuntimeError(f"{trials} trials asked for, {len(rows)} rows, {sum(numbers)} done by {numbers}")
    return took


def markdown(entries: dict[str, Any]) -> str:
    """A row a database and kind of trial."""
    lines = ["| database | a trial | 1 worker | 2 workers | 4 workers |", "|---|---|---|---|---|"]
    for name, entry in entries.items():
        for kind, samples in entry["seconds"].items():
            middle = {count: statistics.median(found) for count, found in samples.items()}
            told = [f"{middle[str(c)]:.2f} s ({middle['1'] / middle[str(c)]:.2f}x)" for c in COUNTS]
            lines.append(f"| {name} | {kind} {entry['trial_seconds']:g} s | {' | '.join(told)} |")
    one = next(iter(entries.values()))
    lines += ["", f"{one['trials']} trials, {one['cores']} cores: what computes cannot gain more than {one['cores']}x.",
              "No trial was missing or done twice."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="", help="address of an empty PostgreSQL database; else a file")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    entries = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    seconds: dict[str, dict[str, list[float]]] = {kind: {str(count): [] for count in COUNTS} for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        url = options.study or f"{folder}/study.db"
        for _ in range(options.rounds):
            for kind, samples in seconds.items():
                for count in COUNTS:
                    samples[str(count)].append(once(url, kind, count, options.trials, options.seconds))
                    print(f"{kind} {count}: {samples[str(count)][-1]:.2f} s", flush=True)
    entries["PostgreSQL" if options.study else "SQLite"] = {
        **conditions.conditions(("optuna", "sqlalchemy", "psycopg")),
        "trials": options.trials, "trial_seconds": options.seconds, "seconds": seconds,
    }  # fmt: skip
    files.write_json(RESULT, entries)
    files.write_text(RESULT.with_suffix(".md"), markdown(entries))
    print(markdown(entries))


if __name__ == "__main__":
    main()
