"""What each structural pass gains at the most on this machine: `edgegen probe` on networks of every kind.

    python benchmarks/passes.py [--only edsr vit] [--again]

Shapes with random weights, float and INT8, timed in turns with the original's best unquantized build; no training and
no quality, so nothing here says that a pass can be afforded, only which cannot pay. Resumable by network;
benchmarks/results/passes.json (raw samples) and passes.md. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import conditions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NETWORKS = ("cifar_resnet", "edsr", "vit", "dit", "ddpm_unet", "dcgan", "cyclegan", "animegan", "stylegan2")


def probed(name: str) -> dict[str, Any]:
    """The figures of one network, by the command that a user would type."""
    command = ["edgegen", "probe", "--model", name, "--json", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "edgegen.cli", *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}")
    return {"command": shlex.join(command), **conditions.conditions(), **json.loads(done.stdout)}


def gain(row: dict[str, Any]) -> float:
    """How many times faster than the original's best unquantized build, in float or INT8; 0: not timed."""
    values = [row[kind]["value"] for kind in ("floats", "int8") if row[kind] is not None and row[kind]["value"]]
    return max((1 / value for value in values), default=0.0)


def table(found: dict[str, Any]) -> str:
    """Passes by networks: the most that one of a pass' shapes gains, beside the original in INT8."""
    passes = sorted({row["name"] for one in found.values() for row in one["rows"]} - {"original"})
    lines = ["| pass | " + " | ".join(found) + " |", "|---|" + len(found) * "---|"]
    for name in ("original", *passes):
        cells = []
        for one in found.values():
            best = max((row for row in one["rows"] if row["name"] == name), key=gain, default=None)
            kinds = (best["floats"], best["int8"]) if best is not None and gain(best) else ()
            cells.append(" / ".join(f"{1 / told['value']:.2f}x" if told else "-" for told in kinds) or "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = next(iter(found.values()))
    return "\n".join([
        "Float / INT8, times faster than the best unquantized build of the original; of each pass the shape that gains"
        " most, with random weights. '-': changes nothing there, or not timed (passes.json says why).", "", *lines, "",
        f"Machine: {first['machine']}, {first['cores']} cores; {first['date']}.", "",
    ])  # fmt: skip


def main() -> None:
    """Probe what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--again", action="store_true", help="finished networks as well")
    asked = parser.parse_args()
    file = RESULTS / "passes.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in asked.only:
        if name in found and not asked.again:
            continue
        print(name, flush=True)
        found[name] = probed(name)
        conditions.write_json(file, found)
    file.with_suffix(".md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
