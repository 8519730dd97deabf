"""A command that is interrupted ends clean and says how to go on; a plan writes nothing; events are JSON lines."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from edgegen import cli, cli_ending
from edgegen.report import events


def test_the_last_line_says_how_to_go_on() -> None:
    line, code = cli_ending.told(KeyboardInterrupt(), ["compress", "--model", "my net.py:f"])
    assert code == 130
    assert line.endswith("go on with: edgegen compress --model 'my net.py:f' --resume")
    line, code = cli_ending.told(cli_ending.Ended(signal.SIGHUP), ["compress", "--resume"])
    assert (code, line.count("--resume")) == (129, 1)
    assert line.startswith("the terminal was closed")
    assert cli_ending.told(cli_ending.Ended(signal.SIGTERM), ["verify"]) == (
        "asked to end; nothing half written is left", 143,
    )  # fmt: skip


def test_a_signal_that_comes_inside_a_callback_is_not_lost() -> None:
    code = """
import os, signal, sys, time, weakref
from edgegen import cli_ending

class Thing: pass

def callback(reference):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass

signal.signal(signal.SIGTERM, signal.SIG_DFL)
cli_ending.listen()
thing = Thing()
kept = weakref.ref(thing, callback)
try:
    del thing
    print("swallowed", flush=True)
    time.sleep(60)
except cli_ending.Ended as error:
    sys.exit(128 + error.number)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "swallowed\n", "")


def test_what_nohup_ignores_stays_ignored() -> None:
    code = (  # whoever started the tests may ignore signals too, and children inherit that
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "from edgegen import cli_ending\n"
        "cli_ending.listen()\nprint(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,"
        " signal.getsignal(signal.SIGTERM) is cli_ending._end)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_events_are_json_lines_and_not_too_many() -> None:
    now, stream = [0.0], io.StringIO()
    with events.progress(stream=stream, clock=lambda: now[0]) as tell:
        for i in range(101):
            tell("distill", f"step {i}", i / 100)
            now[0] += 0.1
        tell("build", "int8", float("nan"))
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [one["step"] for one in told][-2:] == ["distill", "build"]
    assert told[-2]["fraction"] == 1.0
    assert told[-1]["fraction"] is None
    assert 10 <= len(told) <= 13
    assert set(told[0]) == {"event", "step", "text", "fraction", "seconds"}


pytest_torch = pytest.mark.skipif(
    any(__import__("importlib.util").util.find_spec(name) is None for name in ("torch", "onnxruntime")),
    reason="a run needs the extras `torch` and `onnxruntime`",
)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    import user_network

    arguments = user_network.write(tmp_path)
    return tmp_path, arguments


def heard() -> None:
    """In a child: no signal is ignored, whatever whoever started the tests ignores."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(folder: Path, arguments: tuple[str, ...], *more: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "EDGEGEN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "edgegen.cli", "compress", *arguments, "--out", "made", *more]
    more = {"start_new_session": True, "preexec_fn": heard, **options}
    return subprocess.Popen(command, cwd=folder, env=environment, **more)


def under_way(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the run has finished something that a resumed run keeps."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if list((folder / "cache").glob("runs/*/log.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get under way")


def clean(folder: Path) -> bool:
    """Nothing half written: no bundle, no temporary folder beside it; the run's own folder is there to resume."""
    left = [p for p in folder.iterdir() if p.name.startswith(".made")]
    return not (folder / "made").exists() and not left and bool(list((folder / "cache").glob("runs/*/log.jsonl")))


@pytest_torch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_an_interrupted_run_without_a_terminal_leaves_a_clean_state(place: Any, name: str) -> None:
    folder, arguments = place
    process = start(folder, arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    under_way(folder, process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    last = err.decode().strip().splitlines()[-1]
    assert last.startswith("edgegen: ")
    assert last.endswith("--out made --resume")
    assert b"Traceback" not in err
    assert b"\x1b[" not in err + out, "no colours without a terminal"
    assert clean(folder)


@pytest_torch
@pytest.mark.slow
def test_a_closed_terminal_leaves_a_clean_state(place: Any) -> None:
    """The run's terminal goes away: a hangup, and nothing can be written any more."""
    folder, arguments = place
    own, theirs = pty.openpty()
    process = start(folder, arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    under_way(folder, process)
    os.close(own)
    process.send_signal(signal.SIGHUP)  # the kernel's, to the session that had the terminal
    assert process.wait(60) == 129
    assert clean(folder)


def own_terminal() -> None:
    """In a child: its standard input is its controlling terminal, so that Ctrl-C there reaches it."""
    heard()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest_torch
@pytest.mark.slow
def test_ctrl_c_on_a_terminal_ends_with_the_line_and_the_cursor_is_back(place: Any) -> None:
    folder, arguments = place
    own, theirs = pty.openpty()
    process = start(folder, arguments, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal)
    os.close(theirs)
    under_way(folder, process)
    os.write(own, b"\x03")
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed when the command has ended
        while piece := os.read(own, 1 << 16):
            shown += piece
    os.close(own)
    assert process.wait(60) == 130
    text = shown.decode(errors="replace")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor was hidden and not shown again"
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")
    lines = [line for line in plain.splitlines() if line.strip()]
    assert lines[-1].startswith("edgegen: interrupted; finished steps are kept: go on with: edgegen compress")
    assert lines[-1].endswith("--out made --resume")
    assert clean(folder)


@pytest_torch
def test_a_plan_writes_nothing_and_predicts_every_step(place: Any, monkeypatch: Any, capsys: Any) -> None:
    folder, arguments = place
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EDGEGEN_CACHE", str(folder / "cache"))
    for form in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["edgegen", "compress", *arguments, "--out", "made", "--dry-run", *form])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert sorted(p.name for p in folder.iterdir()) == before
        if not form:
            assert "nothing was written" in shown
            continue
        told = json.loads(shown)
        names = [step["name"] for step in told["steps"]]
        group = ["1 prune_channels", "1 distill", "1 judge"]
        assert names == ["export", "baseline", "teacher", *group, "quantize", "final", "calibration curve"]
        assert told["seconds"] == pytest.approx(sum(step["seconds"] for step in told["steps"]))
        assert told["memory_bytes"] > told["disk_bytes"] > 1_000_000
