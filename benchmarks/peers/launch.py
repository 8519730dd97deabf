"""One cell: a peer with one of its settings on one case, in its own environment and process.

Wall time and peak memory are of the whole process with all its children, from start to end. Whatever goes wrong is a
result: {"exit": ..., "failure": one line}.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peers import environments
from peers.cases import ROOT, Case, weights

HERE = Path(__file__).resolve().parent
BEGIN, END = "# user: begin", "# user: end"
POLL_SECONDS = 0.1
LIMIT_SECONDS = 3600.0
KEPT = ("numpy", "onnx", "onnxruntime", "openvino", "nncf", "torch", "olive-ai", "nvidia-modelopt", "torch_pruning",
        "torch-pruning", "onnx-neural-compressor", "coremltools", "ai-edge-quantizer", "litert-torch", "executorch",
        "torchao", "edgegen")  # fmt: skip


def literal(peer: Path, name: str) -> Any:
    """A constant of a peer's file, read without importing it.

    Raises:
        KeyError: no such constant.
    """
    for node in ast.parse(peer.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise KeyError(f"{peer} has no {name}")


def user_lines(text: str) -> int:
    """Lines between the markers that a user has to write: no blank lines, no comments.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    lines = [line.strip() for line in text.splitlines()]
    if lines.count(BEGIN) != 1 or lines.count(END) != 1 or lines.index(BEGIN) > lines.index(END):
        raise ValueError(f"a peer's file needs one {BEGIN!r} and then one {END!r}")
    part = lines[lines.index(BEGIN) + 1 : lines.index(END)]
    return sum(1 for line in part if line and not line.startswith("#"))


def options(case: Case, peer: str, setting: str) -> dict[str, Any]:
    """What `compress` of the peer gets."""
    found = dict(literal(HERE / peer / "peer.py", "SETTINGS")[setting])
    if peer != environments.OWN:
        return found
    preset = ("--recipe", "post-training")
    arguments = (*(case.best or preset), "--thorough") if found.pop("best") else preset
    file = weights(case)
    return {
        "arguments": [*arguments, *(() if case.trained else ("--latency-only",))],
        "weights": ["--weights", str(file)] if file else [], "calibration": case.calibration,
    }  # fmt: skip


def cell(case: Case, peer: str, setting: str, given: Mapping[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Run one cell; its figures and where its artifact lies (`out`), or its failure; paths start at the project."""
    return portable(_cell(case, peer, setting, given, folder, out))


def portable(told: Any) -> Any:
    """Without the place of the project on this machine, in every text."""
    if isinstance(told, str):
        inside = told
        for root in (ROOT, (ROOT / "out").resolve().parent):  # out/ may be a link
            inside = inside.replace(f"{root}{os.sep}", "").replace(str(root), ".")
        return inside.replace(f"{ROOT.parent}{os.sep}", f"..{os.sep}") if ROOT.parent != Path(os.sep) else inside
    if isinstance(told, Mapping):
        return {name: portable(value) for name, value in told.items()}
    return [portable(value) for value in told] if isinstance(told, list | tuple) else told


def _cell(case: Case, peer: str, setting: str, given: Mapping[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    file = HERE / peer / "peer.py"
    told: dict[str, Any] = {"case": case.name, "peer": peer, "setting": setting, "options": dict(given),
                            "lines": user_lines(file.read_text(encoding="utf-8"))}  # fmt: skip
    try:
        python = environments.python(peer)
    except environments.CannotInstall as error:
        return {**told, "exit": "cannot install", "failure": str(error)}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    job, result, log = out.with_suffix(".job.json"), out.with_suffix(".result.json"), out.with_suffix(".log")
    result.unlink(missing_ok=True)
    job.write_text(json.dumps({"peer": str(file), "folder": str(folder), "out": str(out), "options": dict(given),
                               "result": str(result)}), encoding="utf-8")  # fmt: skip
    ended = measured([str(python), "-P", str(HERE / "inside.py"), str(job)], log)
    told |= {"seconds": round(ended["seconds"], 2), "peak_mb": round(ended["peak_bytes"] / 1e6)}
    if ended["code"] != 0 or not result.is_file():
        return {**told, "exit": ending(ended["code"]), "failure": last_words(log)}
    made = json.loads(result.read_text(encoding="utf-8"))
    versions = {name: made["versions"][name] for name in KEPT if name in made["versions"]}
    return {**told, "exit": "ok", "path": made["path"], "twin": made.get("twin", ""), "versions": versions,
            "seconds_inside": round(made["seconds_inside"], 2), "size_bytes": size(Path(made["path"]))}  # fmt: skip


def measured(command: list[str], log: Path, limit: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Run to the end: {"code", "seconds", "peak_bytes"}. After `limit` seconds it and its children are killed (-9).

    Peak: the larger of the kernel's high-water mark of the largest single process (VmHWM) and of the sum over the tree,
    in which memory that several processes share counts once; both sampled. Not `ru_maxrss`, in which a child starts
    with the size of the process that started it.
    """
    path = os.pathsep.join((str(ROOT / "benchmarks"), str(ROOT)))
    with log.open("wb") as sink:
        started = time.monotonic()
        child = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path}, cwd=log.parent,
        )  # fmt: skip
        peak, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(child.pid, peak, done, started + limit), daemon=True)
        watcher.start()
        code = child.wait()
        seconds = time.monotonic() - started
        done.set()
        watcher.join()
    return {"code": code, "seconds": seconds, "peak_bytes": peak[0]}


def _watch(pid: int, peak: list[int], done: threading.Event, deadline: float) -> None:
    while not done.wait(POLL_SECONDS):
        peak[0] = max(peak[0], tree_bytes(pid))
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            return


def tree_bytes(pid: int) -> int:
    """The larger of the proportional set size of a process and its descendants, and of the largest high-water mark of
    one of them (Linux; elsewhere 0).

    Not resident size: libraries that several processes map would count for each, and a tool of several processes would
    look larger than the machine that holds it.
    """
    total, highest, left = 0, 0, [pid]
    while left:
        current = left.pop()
        with contextlib.suppress(OSError, ValueError):  # it may end at any moment
            for task in Path(f"/proc/{current}/task").iterdir():
                left.extend(int(child) for child in (task / "children").read_text().split())
            text = Path(f"/proc/{current}/smaps_rollup").read_text(encoding="utf-8")
            total += _kilobytes(text, "Pss:")
            highest = max(highest, _kilobytes(Path(f"/proc/{current}/status").read_text(encoding="utf-8"), "VmHWM:"))
    return max(total, highest)


def _kilobytes(text: str, name: str) -> int:
    """Bytes of a line such as `VmHWM:  1234 kB`; 0 where there is none."""
    return sum(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(name))


def ending(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit {code}" if code else "wrote no result"


def last_words(log: Path) -> str:
    """The last error line of a log, else its end."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].split("(")[0].endswith(("Error", "Exception", "Failed"))]
    return environments.one_line(named[-1] if named else " ".join(lines[-3:]))


def size(path: Path) -> int:
    """Bytes of an artifact: the file and what belongs to it (.bin, .data), a package's files, a bundle's artifact."""
    if (path / "manifest.json").is_file():
        from edgegen import bundle

        return bundle.artifacts(bundle.read(path))[0].size_bytes
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    beside = (path.with_suffix(".bin"), path.with_name(path.name + ".data"), path.with_name(path.name + "_data"))
    return sum(file.stat().st_size for file in (path, *beside) if file.is_file())
