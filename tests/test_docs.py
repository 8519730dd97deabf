"""The pages in docs/ and the README: every Python and TOML block works as it stands, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/add-a-target.md", "docs/add-a-runtime.md")
BLOCK = re.compile(r"^```(python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")


def run_page(text: str, folder: Path) -> str:
    """Write the blocks that name a file, run the other Python blocks as one program; its output.

    Raises:
        AssertionError: the program fails, or a block is of a kind that cannot be run.
    """
    program = []
    for language, block in BLOCK.findall(text):
        if named := FILE.match(block):
            (folder / named[1]).write_text(block)
        else:
            assert language == "python", f"a {language} block without '# file:' is never tried"
            program.append(block)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    command = [sys.executable, "-c", "\n".join(program)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    out = run_page((ROOT / page).read_text(encoding="utf-8"), tmp_path)
    expected = {
        "docs/add-a-target.md": ["board ('onnxruntime', 'litert') 16", "threads must be a valid integer, got 'four'"],
        "docs/add-a-runtime.md": ["{'output': (1, 10)}", "0.0"],
    }[page]
    for line in expected:
        assert line in out


def test_a_page_whose_code_fails_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_page("```python\n1 / 0\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="never tried"):
        run_page("```toml\na = 1\n```\n", tmp_path)
