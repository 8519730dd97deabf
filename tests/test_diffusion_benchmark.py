"""The table of benchmarks/diffusion.py: which point the window is of, who is inside, what an image costs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("diffusion_table")
    sys.modules.pop("diffusion_table", None)


def point(kid: float, nfe: int, partial: int = 0) -> dict[str, Any]:
    return {"kid": kid, "kid_interval": [kid - 0.005, kid + 0.005], "nfe": nfe, "partial": partial,
            "psnr_to_teacher": 20.0, "n": 100}  # fmt: skip


def timed(*medians: float) -> dict[str, Any]:
    return {"ms": medians[0], "interval": None, "samples": [], "round_medians": list(medians)}


def figures() -> dict[str, Any]:
    return {
        "settings": {"model": "m", "count": 100, "threads": 2},
        "points": {
            "student | openvino int8 | ddim | 4 | cache 1": point(0.042, 4),
            "student | openvino int8 | ddim | 2 | cache 1": point(0.08, 2),
            "teacher | openvino fp32 | ddim | 8 | cache 1": point(0.03, 8),
            "teacher | openvino fp32 | ddim | 50 | cache 1": point(0.04, 50),
            "teacher | openvino fp32 | ddim | 50 | cache 2": point(0.045, 50, 25),
            "teacher | openvino int8 | ddim | 99 | cache 1": point(0.04, 99),
        },
        "times": {
            "teacher | openvino fp32 | whole full": timed(4.0, 4.0, 6.0),
            "teacher | openvino fp32 | cached full": timed(4.0, 4.0, 4.0),
            "teacher | openvino fp32 | cached partial": timed(1.0, 1.0, 1.0),
            "student | openvino int8 | whole full": timed(2.0, 2.0, 3.0),
        },
    }


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {" ".join([*row[:3], row[3]]): row for row in cells[1:]}


def test_the_window_is_of_the_float_teacher_with_most_runs(made: Any, tmp_path: Path):
    found = figures()
    file = tmp_path / "diffusion-m.json"
    file.write_text(json.dumps(found))
    made.write(file)
    told = rows(file.with_suffix(".md").read_text())
    assert made.window_of(found["points"]) == "teacher | openvino fp32 | ddim | 50 | cache 1"
    assert made.fewest(found["points"]) == "teacher | openvino fp32 | ddim | 8 | cache 1", "cached ones do not count"
    assert {name: row[6] for name, row in told.items()} == {
        "student openvino int8 ddim 4": "inside", "student openvino int8 ddim 2": "above",
        "teacher openvino fp32 ddim 8": "below", "teacher openvino fp32 ddim 50": "inside",
        "teacher openvino fp32 ddim, cache 2 50": "inside", "teacher openvino int8 ddim 99": "inside",
    }  # fmt: skip


def test_the_picture_has_a_line_for_each_way(made: Any, tmp_path: Path):
    pytest.importorskip("matplotlib")
    made.plot(figures(), tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    for line in ("student, openvino int8, ddim", "teacher, openvino fp32, ddim, cache 2", "the window"):
        assert f"<!-- {line} -->" in drawn


def test_an_image_costs_its_runs_and_ratios_are_taken_round_by_round(made: Any):
    told = rows(made.table(figures()))
    assert told["student openvino int8 ddim 4"][8:] == ["8.0", "25.00", "4.00"]
    assert told["teacher openvino fp32 ddim, cache 2 50"][8:] == ["125.0", "1.60", "0.26"]
    assert told["teacher openvino int8 ddim 99"][8:] == ["", "", ""], "it was not timed"
