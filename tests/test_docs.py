"""The pages in docs/ and the README: every Python and TOML block works as it stands, in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from edgegen import cli

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "docs/add-a-target.md": ["board ('onnxruntime', 'litert') 16", "threads must be a valid integer, got 'four'"],
    "docs/add-a-runtime.md": ["{'output': (1, 10)}", "0.0"],
    "docs/bring-your-own-model.md": ["restoration (1, 3, 32, 32) (1, 3, 32, 32)"],
    "docs/add-a-pass.md": ["{'1': 'ReLU to Hardswish'} {'2': 'named in skip'}", "ReLU Hardswish"],
    "docs/how-we-measure.md": ["0.5"],
    "docs/read-the-report.md": [],
    "docs/quick-start.md": [],
    "docs/python.md": ["unknown target 'cpuu'"],
    "docs/search.md": ["12\n", 'pass = "prune_channels"', '"steps" = 200'],
}
SITE = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SLOW = re.compile(r"# run by the slow tests: \S+")
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")


def run_page(text: str, folder: Path, slow: bool = False) -> str:
    """Write the blocks that name a file, run the other Python blocks as one program; its output.

    slow: also those that take a minute or more; without it they are only compiled.

    Raises:
        AssertionError: the program fails, or a block is of a kind that cannot be run.
    """
    program = []
    for language, block in BLOCK.findall(text):
        if SLOW.match(block) and not slow:
            compile(block, "block", "exec")
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in SITE if "# run by the slow tests" in (ROOT / page).read_text()])
def test_the_code_that_takes_minutes_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnxruntime", "openvino"):
        pytest.importorskip(name, reason="what the quick start installs")
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    photos(tmp_path / "photos")
    out = run_page((ROOT / page).read_text(encoding="utf-8"), tmp_path, slow=True)
    assert "Traceback" not in out


def photos(folder: Path) -> None:
    """A folder of images, as the pages take for granted that a user has one."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


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


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def uncured(page: str, names: Iterable[str]) -> list[str]:
    """Names without a section in the page, or with one that says too little to be a cure."""
    sections = dict(re.findall(r"^## (\w+)$\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    return [name for name in names if len(sections.get(name, "").split()) <= 8]


def classes(source: str) -> list[str]:
    """Classes of errors.py whose name a user may see: all but the two bases."""
    return [name for name in re.findall(r"^class (\w+)\(", source, re.MULTILINE) if name not in BASES]


BASES = ("EdgegenError", "EdgegenWarning")
ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def test_every_error_and_warning_has_its_cure() -> None:
    source = (ROOT / "edgegen" / "errors.py").read_text(encoding="utf-8")
    told = hooks().messages()
    assert uncured(ERRORS, [*classes(source), *told]) == []
    assert set(classes(source)) <= set(told), "a class that nothing raises"
    assert uncured(ERRORS, classes(source + "\nclass NewError(UsageError):\n    pass\n")) == ["NewError"]
    assert uncured(ERRORS + "\n## NewError\nIt is broken.\n", ["NewError"]) == ["NewError"]


def test_errors_live_in_one_file() -> None:
    """A class of ours elsewhere would have neither a place in the tree nor a cure."""
    known = set(classes((ROOT / "edgegen" / "errors.py").read_text(encoding="utf-8"))) | set(BASES)
    for file in sorted((ROOT / "edgegen").rglob("*.py")):
        for name, bases in re.findall(r"^\s*class (\w+)\(([^)]*)\):", file.read_text(encoding="utf-8"), re.MULTILINE):
            derived = {base.strip().rpartition(".")[2] for base in bases.split(",")} & known
            assert not derived or name in known, f"{file.name}: {name}({bases})"


def test_every_message_is_listed_with_the_way_to_its_cure(tmp_path: Path) -> None:
    found, shown = hooks().messages(), hooks().on_page_markdown(ERRORS)
    assert sum(map(len, found.values())) > 600
    assert any("--max-quality-drop must be a number" in text for _, text in found["RecipeError"])
    assert any("max_latency must be above 0 ms" in text for _, text in found["ValueError"])
    assert any("changed nothing" in text for _, text in found["NothingChanged"])
    assert "pip install 'edgegen[timm]'" in " ".join(text for _, text in found["MissingExtra"])
    assert hooks().MARK not in shown
    for name, rows in found.items():
        assert f"[What to do](#{name.lower()})" in shown
        assert all(text.replace("`", "'") in shown for _, text in rows)
    (tmp_path / "errors.py").write_text("class NewError(Exception): pass")
    (tmp_path / "other.py").write_text("raise errors.NewError(f'{what} is broken: mend it')")
    assert hooks().messages(tmp_path) == {"NewError": [("other.py", "{what} is broken: mend it")]}


def test_the_page_of_commands_has_every_command() -> None:
    import typer

    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(cli.app)
    shown = hooks().on_page_markdown(page)
    for name in group.commands:
        assert re.search(rf"^\| [^|]+ \| `{name}( --[\w-]+)?` \|$", page, re.MULTILINE), f"{name} is not in the table"
        assert f"\n## {name}\n" in shown
    assert shown.count("Example: edgegen ") >= len(group.commands)
    assert hooks().COMMANDS not in shown


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


def without_example(app: Any) -> list[str]:
    """Commands whose help has no example, or one that the command line would not take."""
    import typer.testing

    found = []
    group = typer.main.get_command(app)
    for name in group.commands:  # type: ignore[attr-defined]
        shown = typer.testing.CliRunner().invoke(app, [name, "--help"]).output
        lines = re.findall(r"Example: (edgegen .*(?:\n {2,}\S.*)*)", shown)
        wrong = wrong_commands("```sh\n" + "\n".join(" ".join(line.split()) for line in lines) + "\n```\n")
        found += [name] if not lines or wrong else []
    return found


def test_every_command_has_an_example_that_it_takes() -> None:
    assert without_example(cli.app) == []


def test_a_command_without_an_example_is_noticed() -> None:
    import typer

    app = typer.Typer(rich_markup_mode=None)

    def bare() -> None:
        """Does something."""

    def wrong() -> None:
        """Does something.

        Example: edgegen verify
        """

    def good() -> None:
        """Does something.

        Example: edgegen verify out/edsr-cpu
        """

    for command in (bare, wrong, good):
        app.command()(command)
    assert without_example(app) == ["bare", "wrong"]
