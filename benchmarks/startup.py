"""How long edgegen takes to say hello: `edgegen --help` and `edgegen list`, median of ten, and where the time goes.

    python benchmarks/startup.py [--runs 10]

Goals: 0.3 s and 0.5 s. Also measured: the interpreter alone, which is in every figure. The import profile is the one
of `python -X importtime`: the modules that take longest by themselves. benchmarks/results/startup.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
COMMANDS = {
    "python -c pass": (None, ["-c", "pass"]),
    "edgegen --help": (0.3, ["-m", "edgegen.cli", "--help"]),
    "edgegen list passes": (0.5, ["-m", "edgegen.cli", "list", "passes"]),
    "edgegen list models": (0.5, ["-m", "edgegen.cli", "list", "models"]),
    "edgegen list runtimes": (0.5, ["-m", "edgegen.cli", "list", "runtimes"]),
    "edgegen list targets": (0.5, ["-m", "edgegen.cli", "list", "targets"]),
}
LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)")
SHOWN = 15


def seconds(arguments: Sequence[str], runs: int) -> list[float]:
    """Wall time of each run, after one that warms the file cache.

    Raises:
        RuntimeError: the command fails; its last line.
    """
    found = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        found.append(time.perf_counter() - started)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ends with {done.returncode}: {done.stderr.strip()[-200:]}")
    return found[1:]


def profile(text: str) -> list[dict[str, Any]]:
    """What `-X importtime` wrote: {"module", "self_ms", "total_ms", "depth"} of every module, in its order."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match:
            alone, total, spaces, module = match.groups()
            found.append({"module": module, "self_ms": int(alone) / 1000, "total_ms": int(total) / 1000,
                          "depth": (len(spaces) - 1) // 2})  # fmt: skip
    return found


def imported(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The import profile of a command."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False
    )
    return profile(done.stderr)


def met(row: dict[str, Any]) -> str:
    """Whether the goal is met; nothing where there is none."""
    if row["goal_s"] is None:
        return ""
    return "yes" if row["median_s"] <= row["goal_s"] else "**no**"


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["# Start-up", "", f"Made by benchmarks/startup.py, {result['date']}, {result['machine']}, "
             f"load {result['load'][0]:.1f}; median of {result['runs']} runs.", "",
             "| command | median s | least s | most s | goal | met |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in result["commands"].items():
        goal = "" if row["goal_s"] is None else row["goal_s"]
        lines.append(f"| {name} | {row['median_s']:.3f} | {min(row['seconds']):.3f} | {max(row['seconds']):.3f} | "
                     f"{goal} | {met(row)} |")  # fmt: skip
    for name, modules in result["imports"].items():
        total = sum(entry["self_ms"] for entry in modules)
        lines += ["", f"## Imports of `{name}`: {len(modules)} modules, {total:.0f} ms", "",
                  "| module | ms alone | ms with what it imports |", "|---|---|---|"]  # fmt: skip
        for entry in sorted(modules, key=lambda e: -e["self_ms"])[:SHOWN]:
            lines.append(f"| {entry['module']} | {entry['self_ms']:.1f} | {entry['total_ms']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args()
    commands = {}
    for name, (goal, arguments) in COMMANDS.items():
        took = seconds(arguments, options.runs)
        commands[name] = {"goal_s": goal, "median_s": statistics.median(took), "seconds": took}
        print(f"{name}: {statistics.median(took):.3f} s", flush=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "runs": options.runs,
        "machine": f"{platform.machine()}, Python {platform.python_version()}", "load": os.getloadavg(),
        "commands": commands,
        "imports": {name: imported(COMMANDS[name][1]) for name in ("edgegen --help", "edgegen list passes")},
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
