"""The arithmetic of benchmarks/generators.py: differences, a process that dies, going on, and the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgegen import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import generators
import generators_table

FACTS = {"weights": "random", "passes": [{"pass": "prune_channels", "changed": 3}, {"pass": "distill", "changed": 3}],
         "macs_before": 2e6, "macs_after": 1e6, "params_before": 4e3, "params_after": 1e3}  # fmt: skip


def test_every_generator_has_a_case_and_its_configuration_is_one_that_it_takes():
    known = set(registry.names("models")) - {"cifar_resnet", "vit"}
    assert set(generators.CASES) == known
    assert all(name in registry.names("passes") for case in generators.CASES.values() for name, _ in case.passes)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_wrong_output_is_seen(precision: str):
    right = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    allowed = generators.TOLERANCE[precision]
    assert generators.difference(right, right, precision) == 0
    for wrong in (2 * right, 0 * right, -right, right[:, :, ::-1], right[:, :2], right * np.nan):
        assert generators.difference(wrong, right, precision) > allowed
    noise = np.random.default_rng(1).standard_normal(right.shape)
    assert generators.difference(right + 0.1 * noise, right, "int8") == pytest.approx(0.1, rel=0.2)


def test_a_process_that_dies_is_a_result_and_the_next_runtime_gets_a_new_one(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(generators, "RESULTS", tmp_path / "generators.json")
    calls = []

    def attempt(name: str, places: list[str]) -> Any:
        calls.append(places)
        yield {"facts": FACTS}
        for place in places:
            if place == "ncnn int8":
                yield {"ended": "SIGSEGV"}
                return
            yield {"place": place, "status": "ok", "difference": 0.01, "seconds": 1.0}

    monkeypatch.setattr(generators, "attempt", attempt)
    generators.sweep("dcgan", ["ncnn", "openvino"])
    assert calls == [["ncnn fp32", "ncnn int8", "openvino fp32", "openvino int8"], ["openvino fp32", "openvino int8"]]
    cells = generators.rows()["dcgan"]["cells"]
    assert cells["ncnn int8"] == {"status": "crashed", "why": "SIGSEGV"}
    assert [cells[place]["status"] for place in calls[1]] == ["ok", "ok"]
    generators.sweep("dcgan", ["openvino"])
    assert len(calls) == 2  # what is done is not done again
    text = (tmp_path / "generators.md").read_text(encoding="utf-8")
    assert "| dcgan | random | prune_channels (3) | 2.0 to 1.0 | 4 to 1 |" in text and "SIGSEGV" in text


def test_what_comes_to_no_runtime_is_told_and_tried_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(generators, "RESULTS", tmp_path / "generators.json")
    monkeypatch.setattr(generators, "attempt", lambda name, places: iter([{"ended": "PassError: no"}]))
    generators.sweep("cgan", ["ncnn"])
    assert generators.rows()["cgan"]["failed"] == "PassError: no"
    good = [{"facts": FACTS}, {"place": "ncnn fp32", "status": "ok", "difference": 0.0, "seconds": 1.0},
            {"place": "ncnn int8", "status": "not offered", "why": "ncnn builds fp32", "seconds": 0.0}]  # fmt: skip
    monkeypatch.setattr(generators, "attempt", lambda name, places: iter(good))
    generators.sweep("cgan", ["ncnn"])
    assert "failed" not in generators.rows()["cgan"]


def test_the_table_names_what_is_refused_with_its_cure():
    problem = {"op": "CumSum", "layer": "scan", "rewrite": "multiply with a constant triangular matrix"}
    cells = {"ncnn fp32": {"status": "refused", "problems": [problem]},
             "openvino fp32": {"status": "ok", "difference": 0},
             "openvino int8": {"status": "ok", "difference": 0.123}}  # fmt: skip
    text = generators_table.table({"dcgan": {**FACTS, "cells": cells}}, ["dcgan"])
    assert "| dcgan | ncnn fp32 | refused | CumSum (scan): multiply with a constant triangular matrix |" in text
    assert "ok / ok 12.3%" in text


def test_the_lines_of_a_process_are_read_as_they_come(tmp_path: Path, monkeypatch):
    program = tmp_path / "generators.py"
    code = "import json, sys\nprint(json.dumps({'facts': sys.argv[2:]}), flush=True)\nsys.exit('no memory')"
    program.write_text(code, encoding="utf-8")
    monkeypatch.setattr(generators, "__file__", str(program))
    told = list(generators.attempt("dcgan", ["ncnn fp32"]))
    assert told == [{"facts": ["dcgan", "ncnn fp32"]}, {"ended": "no memory"}]
    assert json.dumps(told)
