"""`edgegen doctor`: what it says about rivals, versions and a Jetson's library, and that its cures are commands."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgegen import doctor, registry

ROOT = Path(__file__).parents[1]


def test_two_distributions_of_one_module_are_broken_and_the_cure_names_both() -> None:
    found = doctor.rivals({"onnxruntime": ["onnxruntime", "onnxruntime-gpu"], "numpy": ["numpy"]})
    assert [(f.what, f.state) for f in found] == [("onnxruntime", "broken")]
    assert "overwrite each other" in found[0].text
    assert found[0].cure == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    assert doctor.rivals({"onnxruntime": ["onnxruntime"]}) == []


def test_with_rivals_onnxruntime_refuses_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.module("runtimes", "onnxruntime")
    module._rivals.cache_clear()
    pair = {"onnxruntime": ["onnxruntime-gpu", "onnxruntime"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: pair)
    try:
        assert "pip uninstall onnxruntime" in module.missing()
    finally:
        module._rivals.cache_clear()


def test_versions_stand_beside_the_tested_ones() -> None:
    table = {"here": ["1.2", "a"], "other": ["1.2", "exporting"], "local": ["1.2", "b"], "absent": ["1.2", "c"]}
    have = {"here": "1.2", "other": "1.3", "local": "1.2+cpu"}
    found = {f.what: f for f in doctor.versions(table, have.get)}
    assert {name: f.state for name, f in found.items()} == {"here": "works", "other": "note", "local": "works"}
    assert "tested with 1.2" in found["other"].text
    assert "exporting" in found["other"].text


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    table = registry.load_toml(doctor.TABLE)["packages"]
    assert {name: tested for name, (tested, _) in table.items()} == {name: pins[name] for name in table}


@pytest.mark.parametrize(
    ("jetson", "machine", "library", "states"),
    [
        (False, "aarch64", None, []),
        (True, "x86_64", None, []),
        (True, "aarch64", "libnvdla_compiler.so", ["works"]),
        (True, "aarch64", None, ["broken"]),
    ],
)
def test_the_library_that_tensorrt_needs_on_a_jetson(
    jetson: bool, machine: str, library: str | None, states: list[str]
) -> None:
    assert [f.state for f in doctor.tegra(jetson, machine, lambda name: library)] == states


def test_every_runtime_has_a_line_and_what_is_missing_has_a_command() -> None:
    found = doctor.runtimes()
    assert [f.what for f in found] == list(registry.names("runtimes"))
    assert all(f.cure.startswith("pip install") for f in found if f.state == "missing")


def test_the_command_prints_json() -> None:
    done = subprocess.run([sys.executable, "-m", "edgegen.cli", "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert {"what", "state", "text", "cure"} == set(json.loads(done.stdout)[0])
