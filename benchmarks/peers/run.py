"""edgegen and what a user would pick instead: same networks, same calibration images, same runtimes, one run.

    python benchmarks/peers/run.py [--case resnet20 ...] [--peer nncf_openvino ...] [--setting default] [--again]
    python benchmarks/peers/run.py --table                   only the page and the plot, from the lines that are there
    python benchmarks/peers/run.py --install                 only the environments

Every peer runs in an environment of its own under out/peers/<peer>/venv, made from its requirements.txt. A finished
cell is a line of benchmarks/results/peers.jsonl and is not run again; neither is the timing of a case whose cells have
not changed. A crash is a line too. Needs benchmarks/prepare_data.py, ../shared/assets and edgegen[all].
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Not this folder, which a script has first: it holds folders that are called like packages.
sys.path[:1] = [str(HERE.parent), str(HERE.parents[1])]

from peers import cases, environments, launch, report  # noqa: E402

RESULTS = cases.ROOT / "benchmarks" / "results"
SETTINGS = ("default", "best")


def append(file: Path, row: dict[str, Any]) -> None:
    """One more line, on disk before the next cell starts; a line that was cut off before gets its end first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cut = file.is_file() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    if cut:
        whole = file.read_bytes().rpartition(b"\n")
        file.write_bytes(whole[0] + whole[1])
    with file.open("a", encoding="utf-8") as sink:
        sink.write(json.dumps(row) + "\n")
        sink.flush()
        os.fsync(sink.fileno())


def now() -> str:
    """UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run_case(case: cases.Case, options: argparse.Namespace) -> None:
    """The cells of a case that are not done yet, then its timing when a cell changed.

    A timing needs all artifacts of its case: where one is not here any more (another machine), its cell runs again.
    """
    rows = report.read(options.output)
    wanted = [(peer, setting) for peer in options.peer for setting in options.setting]
    if timed(case, rows, options) and not options.again and all((case.name, *cell) in rows for cell in wanted):
        return
    folder = cases.prepare(case, environments.WORK / "cases" / case.name)
    for peer, setting in wanted:
        row = rows.get((case.name, peer, setting))
        if row and not options.again and (row["exit"] != "ok" or (cases.ROOT / row["path"]).exists()):
            continue
        given = launch.options(case, peer, setting)
        print(f"{case.name}: {peer} {setting} ...", file=sys.stderr, flush=True)
        out = environments.WORK / "made" / case.name / f"{peer}-{setting}"
        row = {"kind": "cell", **launch.cell(case, peer, setting, given, folder, out), "date": now()}
        append(options.output, row)
        print(f"  {row['exit']} {row.get('failure', '')} {row.get('seconds', '')} s", file=sys.stderr, flush=True)
    time_case(case, folder, options)


def made(case: cases.Case, rows: Mapping[tuple[str, ...], dict[str, Any]]) -> list[list[str]]:
    """[peer, setting, date] of every cell of a case that gave an artifact."""
    cells = (row for row in rows.values() if row["kind"] == "cell" and row["case"] == case.name)
    return sorted([row["peer"], row["setting"], row["date"]] for row in cells if row["exit"] == "ok")


def timed(case: cases.Case, rows: Mapping[tuple[str, ...], dict[str, Any]], options: argparse.Namespace) -> bool:
    """Whether the newest timing of a case is of the newest artifacts."""
    before = rows.get((case.name,), {})
    return options.no_timing or (before.get("made") == made(case, rows) and before["rounds"] == options.rounds)


def finished(case: cases.Case, options: argparse.Namespace) -> bool:
    """Run a case; False, and why on standard error, where its files are not here or its timing cannot be taken."""
    from edgegen.errors import EdgegenError

    try:
        run_case(case, options)
    except (EdgegenError, OSError, KeyError, ValueError) as error:
        print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def time_case(case: cases.Case, folder: Path, options: argparse.Namespace) -> None:
    """All artifacts of the case in one interleaved run.

    Raises:
        ValueError: an artifact is not here.
    """
    from peers import judge

    rows = report.read(options.output)
    if timed(case, rows, options):
        return
    ready = [row for row in rows.values()
             if row["kind"] == "cell" and row["case"] == case.name and row["exit"] == "ok"]  # fmt: skip
    gone = [f"{row['peer']} {row['setting']}" for row in ready if not (cases.ROOT / row["path"]).exists()]
    if gone:
        raise ValueError(f"no timing without the artifacts of {', '.join(gone)}: run the case with all peers")
    print(f"{case.name}: quality and latency of {len(ready)} artifacts ...", file=sys.stderr, flush=True)
    told = judge.measure(folder, ready, threads=options.threads, rounds=options.rounds, seconds=options.seconds)
    row = {"kind": "timing", "case": case.name, "made": made(case, rows), "date": now(), "load": os.getloadavg(),
           "versions": installed(), **launch.portable(told)}  # fmt: skip
    append(options.output, row)


def installed() -> dict[str, str]:
    """The runtimes that all artifacts are timed with."""
    from importlib import metadata

    return {f"{name} (timing)": metadata.version(name) for name in ("onnxruntime", "openvino", "numpy")}


def machine() -> dict[str, Any]:
    """The processor, its cores, and what this host runs."""
    from edgegen.devices import local

    told = local.probe()
    return {name: told[name] for name in ("cpu_model", "cores", "governor") if told.get(name)}


def write(options: argparse.Namespace) -> None:
    """The page and the plot."""
    rows = report.read(options.output)
    page, drawn = options.output.with_suffix(".md"), options.output.with_suffix(".svg")
    notes = (HERE / "notes.md").read_text(encoding="utf-8")
    page.write_text(report.markdown(rows, machine(), notes), encoding="utf-8")
    print(page)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib, pip install 'edgegen[report]'", file=sys.stderr)
    else:
        report.plot(rows, drawn)
        print(drawn)


def parse() -> argparse.Namespace:
    """Command line."""
    peers = environments.names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(cases.CASES), nargs="*", default=list(cases.CASES))
    parser.add_argument("--peer", choices=peers, nargs="*", default=peers)
    parser.add_argument("--setting", choices=SETTINGS, nargs="*", default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.jsonl")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.3, help="runs of an artifact in a round take so long")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--again", action="store_true", help="run finished cells again")
    parser.add_argument("--no-timing", action="store_true", help="only the cells")
    parser.add_argument("--table", action="store_true", help="only write the page and the plot")
    parser.add_argument("--install", action="store_true", help="only make the environments")
    return parser.parse_args()


def without() -> list[str]:
    """Why runtimes of this host cannot be used: edgegen would be shown without them."""
    from edgegen import registry

    names = ("onnxruntime", "openvino", "litert", "executorch", "ncnn")
    return [why for name in names if (why := registry.module("runtimes", name).missing())]


def main() -> None:
    """What is not done yet, then the page."""
    options = parse()
    if not (options.table or options.install) and (lacking := without()):
        sys.exit("; ".join(lacking))
    if options.install:
        for peer in options.peer:
            try:
                print(f"{peer}: {environments.python(peer)}", flush=True)
            except environments.CannotInstall as error:
                print(f"{peer}: cannot install: {error}", flush=True)
        return
    failed: list[str] = []
    if not options.table:
        # Workers import peers.lane; temporary files of numpy arrays are large.
        paths = (str(HERE.parent), os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environments.WORK.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=environments.WORK) as tempfile.tempdir:
            failed = [name for name in options.case if not finished(cases.CASES[name], options)]
        tempfile.tempdir = None
    write(options)
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
