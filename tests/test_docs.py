"""The pages in docs/ and the README: every Python and TOML block works as it stands, in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgegen import cli, errors

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "docs/add-a-target.md": ["board ('onnxruntime', 'litert') 16", "threads must be a valid integer, got 'four'"],
    "docs/add-a-runtime.md": ["{'output': (1, 10)}", "0.0"],
    "docs/bring-your-own-model.md": ["restoration (1, 3, 32, 32) (1, 3, 32, 32)"],
    "docs/add-a-pass.md": ["{'1': 'ReLU to Hardswish'} {'2': 'named in skip'}", "ReLU Hardswish"],
    "docs/how-we-measure.md": ["0.5"],
    "docs/read-the-report.md": [],
    "docs/quick-start.md": [],
}
SITE = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# not run in tests: \S+")
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")


def run_page(text: str, folder: Path) -> str:
    """Write the blocks that name a file, run the other Python blocks as one program; its output.

    Raises:
        AssertionError: the program fails, or a block is of a kind that cannot be run.
    """
    program = []
    for language, block in BLOCK.findall(text):
        if NOT_RUN.match(block):
            compile(block, "block", "exec")  # its reason stands in the page
        elif named := FILE.match(block):
            (folder / named[1]).write_text(block)
        else:
            assert language == "python", f"a {language} block without '# file:' is never tried"
            program.append(block)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    command = [sys.executable, "-c", "\n".join(program)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("page", EXPECTED)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    out = run_page((ROOT / page).read_text(encoding="utf-8"), tmp_path)
    for line in EXPECTED[page]:
        assert line in out


@pytest.mark.parametrize("page", SITE)
def test_no_page_has_code_that_no_test_runs(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert page in EXPECTED or not BLOCK.findall(text)
    assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) <= {"python", "toml", "sh"}


def wrong_commands(text: str) -> list[str]:
    """Lines `edgegen ...` of shell blocks that the command line would not take."""
    import click
    import typer


    group = typer.main.get_command(cli.app)
    found = []
    for line in "".join(SHELL.findall(text)).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "edgegen" or words[1].startswith("--install"):
            continue
        command = group.commands.get(words[1])  # type: ignore[attr-defined]
        if command is None:
            found.append(f"no command: {line}")
            continue
        try:
            command.make_context(words[1], words[2:], resilient_parsing=False)
        except (click.ClickException, cli._WrongUsage) as error:
            found.append(f"{error.format_message()}: {line}")
    return found


@pytest.mark.parametrize("page", [*SITE, "README.md"])
def test_commands_of_a_page_are_taken(page: str) -> None:
    assert wrong_commands((ROOT / page).read_text(encoding="utf-8")) == []


def test_a_wrong_command_is_noticed() -> None:
    text = "```sh\nedgegen verfy x\nedgegen verify\nedgegen compress --model a --nonsense\nedgegen doctor\n```\n"
    assert len(wrong_commands(text)) == 3


def test_every_error_has_its_cure_and_every_message_is_listed() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    names = re.findall(r"^class (\w+)\(", (ROOT / "edgegen" / "errors.py").read_text(encoding="utf-8"), re.MULTILINE)
    for name in names:
        if name != "EdgegenError" and not issubclass(getattr(errors, name), Warning):
            section = page.split(f"## {name}\n")[1].split("\n## ")[0]
            assert len(section.split()) > 8, f"{name} has no cure"
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    found = hooks.messages()
    assert sum(map(len, found.values())) > 300
    assert {name for name in found if name != "EdgegenError"} <= set(re.findall(r"^## (\w+)$", page, re.MULTILINE))
    assert any("--max-quality-drop must be a number" in text for _, text in found["RecipeError"])
    assert "## " in hooks.on_page_markdown(page)
    assert hooks.MARK not in hooks.on_page_markdown(page)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "site").rglob("index.html"))) >= len(SITE)
    assert "must be a number of zero or more" in (tmp_path / "site" / "errors" / "index.html").read_text()


def test_a_page_whose_code_fails_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_page("```python\n1 / 0\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="never tried"):
        run_page("```toml\na = 1\n```\n", tmp_path)


def test_every_command_has_an_example_that_it_takes() -> None:
    for command in cli.app.registered_commands:
        lines = re.findall(r"Example: (edgegen .*)", command.callback.__doc__ or "")
        assert lines, command.callback
        assert wrong_commands("```sh\n" + "\n".join(lines) + "\n```\n") == []
