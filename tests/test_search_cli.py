"""What `edgegen search` says to orders that cannot be: one line each, exit code 2, before any work."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="optuna is not installed (extra: search)")

from edgegen import cli
from edgegen.search import store

GENE = """
[[genes]]
name = "channels"
pass = "prune_channels"
option = "ratio"
choices = [0.0, 0.5]
"""


def said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> str:
    """The only line of an order that is refused."""
    monkeypatch.setattr(sys, "argv", ["edgegen", "search", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    return lines[0]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("schema = 1" + GENE.replace("ratio", "ration"), "has no option 'ration', did you mean 'ratio'?"),
        ("schema = 1" + GENE.replace("[0.0, 0.5]", "[0.0, 0.0]"), "choices must all differ, got [0.0, 0.0]"),
        ("schema = 1" + GENE.replace("choices", "chioces"), "unknown field, did you mean 'choices'?"),
        ("schema = 9" + GENE, "space schema must be 1, got 9"),
        ("schema = ", "not a readable TOML file"),
    ],
)
def test_a_space_file_with_an_error(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    line = said(capsys, monkeypatch, "--model", "edsr", "--space", tmp_path / "mine.toml", "--out", tmp_path / "out")
    assert "mine.toml" in line
    assert told in line
    assert not (tmp_path / "out").exists()


def test_a_database_that_cannot_be_reached(
    free_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra: search)")
    url = f"postgresql://me:hunter2@127.0.0.1:{free_port}/db"
    for arguments in (["--model", "edsr", "--out", tmp_path / "out"], ["--join"]):
        line = said(capsys, monkeypatch, *arguments, "--study", url)
        assert f"--study postgresql://me:***@127.0.0.1:{free_port}/db: cannot be reached or used" in line
        assert "hunter2" not in line
    assert not (tmp_path / "out").exists()


def test_a_study_of_another_schema_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "s.db")
    kept, study, _ = store.open_study(url, "mine", {"v": 1}, None)
    study.set_user_attr("edgegen_schema", 99)
    kept.close()
    line = said(capsys, monkeypatch, "--join", "--study", url)
    assert "study 'mine' has schema 99, this edgegen reads 1; use the edgegen that made it, or another --name" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "edsr", "--sampler", "nsga3"], "unknown sampler 'nsga3', did you mean 'nsga2'?"),
        (["--join"], "--join needs the study to join: --study URL"),
        ([], "--model is missing: the network to search for"),
        (["--model", "edsr", "--study", "redis://host/0"], "unknown kind of database"),
    ],
)
def test_other_orders_that_cannot_be(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("EDGEGEN_STUDY", raising=False)
    assert told in said(capsys, monkeypatch, *arguments, "--out", tmp_path / "out")
