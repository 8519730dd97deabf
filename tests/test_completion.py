"""The installed command writes completion scripts, and bash completes commands, options and names with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgegen import cli, cli_options, registry

EDGEGEN = Path(sys.executable).with_name("edgegen")
SHELLS = {"bash": "complete -o default -F", "zsh": "compdef", "fish": "complete --command edgegen"}

pytestmark = pytest.mark.skipif(
    not EDGEGEN.exists(), reason="the command `edgegen` is not installed beside this Python"
)


def script(shell: str) -> str:
    """What `--show-completion` writes when it is started from that shell."""
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [str(EDGEGEN), "--show-completion", shell]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of a line (empty after a blank)."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    program = f"{script('bash')}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
    program += "_edgegen_completion edgegen\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    environment = {**os.environ, "PATH": f"{EDGEGEN.parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_names_the_command(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    assert SHELLS[shell] in text
    assert "_EDGEGEN_COMPLETE" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n", "/dev/stdin"], input=text, text=True, check=True, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("edgegen ver", ["verify"]),
        ("edgegen compress --max-l", ["--max-latency"]),
        ("edgegen compress --model ed", ["edsr"]),
        ("edgegen compress --model edsr --target jetson-n", ["jetson-nano"]),
        ("edgegen export --target ", list(registry.names("targets"))),
        ("edgegen list pa", ["passes"]),
        ("edgegen compress --model nothing-like-it", []),
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    assert completed(line, tmp_path) == expected


def test_every_option_that_takes_a_name_offers_the_names() -> None:
    """So that a new command's --model is not forgotten: each is made by `cli_options.named`."""
    import typer

    kinds = {name: f"{name}s" for name in ("model", "target", "recipe", "space")} | {"calibration": "calibration"}
    group = typer.main.get_command(cli.app)
    offered = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.name in kinds and parameter.param_type_name == "option":
                found = parameter.shell_complete(None, "")
                offered[name, parameter.name] = [item.value for item in found]
    assert {name for name, _ in offered} >= {"compress", "export", "probe", "search", "train"}
    wrong = [key for key, found in offered.items() if found != list(registry.names(kinds[key[1]]))]
    assert wrong == []


def test_names_come_with_a_line_about_them() -> None:
    assert cli_options._beginning("models", "eds") == [("edsr", registry.summary("models", "edsr"))]
