"""Searches against random search on a table of measured candidates: hypervolume after a few dozen trials, twenty seeds.

    python benchmarks/search_replay.py [--table benchmarks/results/search-table.json] [--trials 40] [--seeds 20]

The table (benchmarks/search_table.py) stands in for the measuring: a trial is a look-up, everything else is the code of
`edgegen search`. Hypervolume of (latency ratio, drop) to a reference of the original's latency and the drop in --worst,
as a share of that of the whole table. Every sampler searches twice: without a limit, and with the reference's drop as
--max-quality-drop. Writes results/search-replay.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import conditions

from edgegen.search import front, spaces, store, strategies, working
from edgegen.search.store import Figures, Row
from edgegen.types import Budget

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def figures(entry: Mapping[str, Any]) -> Figures:
    """What a search would have measured."""
    if entry["failure"]:
        return Figures(failure=entry["failure"])
    return Figures(entry["latency_ms"], entry["ratio"], entry["drop"], entry["size_bytes"], build=entry["build"])


def volume(found: list[Figures], worst: tuple[float, float]) -> float:
    """Hypervolume of the candidates that were scored."""
    return front.hypervolume([(one.ratio, one.drop) for one in found if one.drop is not None], worst)


def searched(
    sampler: str, space: spaces.Space, look_up: Callable[[Mapping[str, int]], Figures], trials: int, seed: int,
    budget: Budget,
) -> list[Figures]:
    """The figures of all trials of one search, in their order; the ends of the space are its first two, as always."""
    with tempfile.TemporaryDirectory() as folder:
        made = strategies.make(sampler, space, trials, seed)
        kept, study, _ = store.open_study(f"{folder}/study.db", "replay", {}, made)
        for one in spaces.extremes(space)[:2]:
            study.enqueue_trial(dict(one))
        rows: list[Row] = []
        working.work(kept, study, space, {}, look_up, trials=trials, seed=seed, budget=budget, told=rows.append)
        kept.close()
    return [row.figures for row in rows if row.figures is not None]


def replayed(table: Mapping[str, Any], samplers: list[str], trials: int, seeds: int, drop: float) -> dict[str, Any]:
    """Sampler -> share of the table's hypervolume for each seed, and in how many seeds it beats random search."""
    space = spaces.parse(table["space"], "table")
    rows = {entry["key"]: figures(entry) for entry in table["rows"]}

    def look_up(choices: Mapping[str, int]) -> Figures:
        key = spaces.candidate_key(spaces.to_recipe(space, choices, {}))
        return rows.get(key, Figures(failure="is not in the table"))

    worst = (1.0, drop)
    whole = volume(list(rows.values()), worst)
    limited = f", --max-quality-drop {drop:g}"
    runs = [("random", "random", Budget()), *((name, name, Budget()) for name in samplers),
            *((name + limited, name, Budget(max_quality_drop=drop)) for name in samplers)]  # fmt: skip
    shares = {
        told: [volume(searched(name, space, look_up, trials, seed, budget), worst) / whole for seed in range(seeds)]
        for told, name, budget in runs
    }
    wins = {name: sum(a > b for a, b in zip(found, shares["random"], strict=True)) for name, found in shares.items()}
    return {"trials": trials, "reference": worst, "candidates": len(rows), "shares": shares, "wins": wins}


def markdown(found: Mapping[str, Any]) -> str:
    """A row a sampler."""
    lines = [
        f"Share of the table's hypervolume ({found['candidates']} measured candidates) after {found['trials']} trials.",
        "", "| sampler | mean | seeds 0, 1, 2, ... | better than random | of the first five seeds |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, shares in found["shares"].items():
        told, mean = ", ".join(f"{share:.2f}" for share in shares), sum(shares) / len(shares)
        first = sum(a > b for a, b in zip(shares[:5], found["shares"]["random"], strict=False))
        wins = ("", "") if name == "random" else (f"{found['wins'][name]} of {len(shares)}", str(first))
        lines.append(f"| {name} | {mean:.3f} | {told} | {wins[0]} | {wins[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", type=Path, default=RESULTS / "search-table.json")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--worst", type=float, default=20.0, help="drop of the reference point, in the table's unit")
    parser.add_argument("--samplers", nargs="+", default=[name for name in strategies.NAMES if name != "random"])
    parser.add_argument("--out", type=Path, default=RESULTS / "search-replay")
    options = parser.parse_args()
    table = json.loads(options.table.read_text(encoding="utf-8"))
    found = replayed(table, options.samplers, options.trials, options.seeds, options.worst)
    found |= conditions.conditions(("optuna", "numpy"))
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
