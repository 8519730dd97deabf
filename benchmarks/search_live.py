"""A live search beside random search, and beside what each pass does by itself.

    python benchmarks/search_live.py --case edsr [--trials 40] [--seed 0] [--samplers tpe random]

Each search is the command a user would type (spaces: benchmarks/spaces, data: benchmarks/prepare_data.py). Then every
recipe of the same space with one compressing pass and any of the trainings is measured in the same way. A level of
latency counts as won where the front's best quality at no more latency is better than that of all single passes.

The machine must be quiet; killed and called again, it goes on (out/search-live). Writes results/search-live.json and
.md, one entry a case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conditions
import goals
import search_table

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "search-live.json"
WORK = ROOT / "out" / "search-live"
Found = tuple[float, float]  # share of the original's latency, loss of quality


@dataclass(frozen=True)
class Case:
    """worst: --max-quality-drop, and the reference point of the hypervolume, in the unit of the task's gate."""

    model: str
    data: Path
    eval_data: Path
    worst: float
    weights: Path | None = None
    samples: int = 0


CASES = {
    "edsr": Case("edsr", goals.DATA / "photos/train", goals.DATA / "photos/eval", 1.0),
    "resnet56": Case(f"{goals.NETWORKS / 'resnet_cifar'}.py:resnet56", goals.DATA / "cifar/train-all.npz",
                     goals.DATA / "cifar/test.npz", 10.0, goals.ASSETS / "resnet56-cifar10.th", 4000),
}  # fmt: skip


def search(case: Case, space: str, trials: int, sampler: str, seed: int, out: Path, *more: str) -> None:
    """One search, run as a command; `more` options of it."""
    command = ["search", "--model", case.model, "--data", str(case.data), "--eval-data", str(case.eval_data), "--space",
               space, "--trials", str(trials), "--sampler", sampler, "--seed", str(seed), "--samples",
               str(case.samples), "--max-quality-drop", f"{case.worst:g}", "--out", str(out), *more]  # fmt: skip
    command += ["--weights", str(case.weights)] if case.weights else []
    print("edgegen", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "edgegen.cli", *command], cwd=ROOT, check=True)


def searched(name: str, case: Case, sampler: str, trials: int, seed: int) -> list[Any]:
    """The rows of one search."""
    from edgegen.search import store

    out = WORK / f"{name}-{sampler}-{seed}"
    search(case, f"benchmarks/spaces/{name}.toml", trials, sampler, seed, out, "--no-bundles")
    url = str(out / "study.db")
    kept, _, _ = store.open_study(url, store.names(url)[0], None, None)
    rows = kept.rows()
    kept.close()
    return rows


def alone(space: Any) -> list[dict[str, int]]:
    """The choices of all candidates with one compressing pass, and every length of training."""
    first = {gene.name: 0 for gene in space.genes}
    training = [gene for gene in space.genes if gene.pass_name == "distill"]
    lengths = [{gene.name: place} for gene in training for place in range(len(gene.choices))] or [{}]
    found = []
    for gene in space.genes:
        if gene in training:
            continue
        some = lengths[:1] if gene.pass_name == "quantize" else lengths  # what is only quantized is not trained
        found += [{**first, **length, gene.name: place} for place in range(1, len(gene.choices)) for length in some]
    return found


def singles(name: str, case: Case, seed: int) -> list[dict[str, Any]]:
    """What the single passes come to; kept one by one."""
    from edgegen.request import Request
    from edgegen.search import measured, spaces
    from edgegen.types import Budget

    file, space = WORK / f"{name}-singles.jsonl", spaces.load(str(ROOT / "benchmarks" / "spaces" / f"{name}.toml"))
    rows = search_table.known(file)
    missing = [choices for choices in alone(space) if choices not in [row["choices"] for row in rows]]
    if not missing:
        return rows
    request = Request(
        model=case.model, weights=case.weights, data=case.data, eval_data=case.eval_data, samples=case.samples,
        seed=seed, recipe="post-training", out=WORK / f"{name}-run",
    )  # fmt: skip
    bench = measured.open_bench(request)
    try:
        objective = measured.objective(bench, space, Budget(), lambda: ())
        for choices in missing:
            figures = objective(choices)
            rows.append({"choices": choices, **dataclasses.asdict(figures)})
            with file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(rows[-1]) + "\n")
            print(f"single {len(rows)}: {figures.ratio:.3f} of the latency, drop {figures.drop}  {choices}", flush=True)
    finally:
        shutil.rmtree(bench.run.folder, ignore_errors=True)
    return rows


def whole(figures: Any) -> Found | None:
    """The figures of a candidate that was trained and scored to its end."""
    usable = figures is not None and figures.drop is not None and not figures.stopped and math.isfinite(figures.drop)
    return (figures.ratio, figures.drop) if usable else None


def levels(front: Sequence[Found], others: Sequence[Found], worst: float) -> list[dict[str, float | None]]:
    """At the latency of each point of both fronts: the least loss of both at no more latency. None: nothing is so fast.

    Found that loses more than `worst` is not counted: the search was asked for none of it, and it is of no use.
    """
    from edgegen.search import strategies

    front, others = ([one for one in found if one[1] <= worst] for found in (front, others))

    def least(found: Sequence[Found], limit: float) -> float | None:
        return min((drop for ratio, drop in found if ratio <= limit), default=None)

    limits = {ratio for found in (front, others) for ratio, drop in found
              if ratio < 1.0 and not any(strategies.dominates(one, (ratio, drop)) for one in found)}  # fmt: skip
    return [{"ratio": limit, "front": least(front, limit), "single": least(others, limit)} for limit in sorted(limits)]


def won(level: dict[str, float | None]) -> bool:
    """Whether the front is better at this level."""
    front, single = level["front"], level["single"]
    return front is not None and (single is None or front < single)


def entry(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one case."""
    from edgegen.search import front, store

    samplers = {}
    for sampler in options.samplers:
        rows = searched(name, case, sampler, options.trials, options.seed)
        found = [one for row in rows if (one := whole(row.figures)) is not None]
        samplers[sampler] = {"rows": [dataclasses.asdict(row) for row in rows], "found": found,
                             "hypervolume": front.hypervolume(found, (1.0, case.worst))}  # fmt: skip
    single = singles(name, case, options.seed)
    told = [store.Figures(**{key: value for key, value in row.items() if key != "choices"}) for row in single]
    others = [one for figures in told if (one := whole(figures)) is not None]
    return {
        **conditions.conditions(), "trials": options.trials, "seed": options.seed, "worst": case.worst,
        "samplers": samplers, "singles": single,
        "levels": levels(samplers[options.samplers[0]]["found"], others, case.worst),
    }  # fmt: skip


def markdown(entries: dict[str, Any]) -> str:
    """The report: hypervolumes, and the levels of latency."""
    lines = []
    for name, one in entries.items():
        lines += [f"## {name}", "", f"{one['trials']} trials, seed {one['seed']}, {one['date']}, {one['cores']} cores.",
                  f"Hypervolume to the original's latency and a drop of {one['worst']:g}:", ""]  # fmt: skip
        lines += [f"- {sampler}: {told['hypervolume']:.3f} ({len(told['found'])} candidates trained and scored)"
                  for sampler, told in one["samplers"].items()]  # fmt: skip
        wins = sum(won(level) for level in one["levels"])
        lines += ["", f"The front against {len(one['singles'])} recipes with one compressing pass: better at {wins} of"
                  f" {len(one['levels'])} levels of latency (found with a drop of {one['worst']:g} or less).", "",
                  "| latency at most | drop, front | drop, one pass | better |", "|---|---|---|---|"]  # fmt: skip
        for level in one["levels"]:
            told = ["none" if level[k] is None else f"{level[k]:.3g}" for k in ("front", "single")]
            lines.append(f"| {level['ratio']:.3f} | {told[0]} | {told[1]} | {'front' if won(level) else 'one pass'} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"], help="the first one's front is compared")
    options = parser.parse_args()
    os.chdir(ROOT)
    WORK.mkdir(parents=True, exist_ok=True)
    os.environ["EDGEGEN_CACHE"] = str(WORK / "cache")  # what two searches both train is trained once

    from edgegen import files

    entries = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    entries[options.case] = entry(options.case, CASES[options.case], options)
    files.write_json(RESULT, entries)
    files.write_text(RESULT.with_suffix(".md"), markdown(entries))
    print(markdown(entries))


if __name__ == "__main__":
    main()
