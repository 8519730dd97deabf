"""Operator tables and estimates: a synthetic device of known law is recovered, wrong tables are noticed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgegen import cli, errors, estimate, operator_fit, operator_table, operators, probes, profiling, registry, targets
from edgegen.devices import local
from edgegen.operator_fit import Sample
from edgegen.operators import Kernel
from edgegen.types import Graph, Target

RATES = {"conv3x3": 4e10, "conv1x1": 2e10, "depthwise": 4e9, "linear": 1e10}  # MACs a second
BANDWIDTH, LAUNCH_MS, RUN_MS = 1e10, 0.003, 0.02
BOARD = Target("board", "", ("onnxruntime",), precisions=("fp32",), threads=2)


def kernel(rng: np.random.Generator) -> Kernel:
    """A layer of a size that occurs."""
    kind = str(rng.choice([*RATES, "elementwise"]))
    into, out = (int(c) for c in rng.choice([16, 24, 32, 48, 64, 96, 128, 256], 2))
    space, window = int(rng.choice([7, 14, 28, 56])), 3 if kind in ("conv3x3", "depthwise") else 1
    groups = into if kind == "depthwise" else 1
    out = into if kind in ("depthwise", "elementwise") else out
    weights = 0 if kind == "elementwise" else into // groups * out * window**2
    return Kernel(kind, weights * space**2, 4 * into * space**2, 4 * weights, 4 * out * space**2, into, out, space,
                  space, (window, window), 1, groups)  # fmt: skip


def truth(k: Kernel) -> float:
    """Milliseconds on the synthetic device: a roofline, with narrow layers below the peak."""
    if k.kind == "run":
        return RUN_MS
    compute = k.macs / (RATES.get(k.kind, 1.0) * k.channels_out / (k.channels_out + 8))
    return LAUNCH_MS + 1e3 * max(compute, (k.bytes_moved + k.bytes_weights) / BANDWIDTH)


def net(rng: np.random.Generator, size: int) -> tuple[Kernel, ...]:
    return (Kernel("run"), *(kernel(rng) for _ in range(size)))


def samples(count: int = 100, noise: float = 0.02) -> list[Sample]:
    rng = np.random.default_rng(0)
    nets = [(Kernel("run"),), *(net(rng, int(rng.integers(1, 5))) for _ in range(count - 1))]
    return [Sample(one, float(sum(map(truth, one)) * np.exp(rng.normal(0, noise)))) for one in nets]


@pytest.fixture(scope="module")
def fitted() -> operator_fit.Fit:
    return operator_fit.fit(samples())


def test_a_device_of_known_law_is_recovered_within_ten_percent_on_networks_not_seen(fitted: operator_fit.Fit) -> None:
    rng = np.random.default_rng(1)
    nets = [net(rng, int(rng.integers(10, 60))) for _ in range(40)]
    ratios = [operator_fit.predict(fitted, one).sum() / sum(map(truth, one)) for one in nets]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.1
    assert fitted.error[0] < 0.05


def test_single_kernels_are_told_apart_although_only_sums_were_seen(fitted: operator_fit.Fit) -> None:
    rng = np.random.default_rng(2)
    one = net(rng, 50)[1:]
    off = operator_fit.predict(fitted, one) / np.array([truth(k) for k in one]) - 1
    assert np.median(np.abs(off)) < 0.1


def test_a_kernel_far_outside_the_table_takes_what_its_work_takes(fitted: operator_fit.Fit) -> None:
    size = 4 * 1024 * 512**2
    huge = Kernel("conv3x3", 9 * 1024**2 * 512**2, size, 4 * 9 * 1024**2, size, 1024, 1024, 512, 512, (3, 3))
    assert operator_fit.predict(fitted, [huge])[0] == pytest.approx(truth(huge), rel=0.3)
    twice = dataclasses.replace(huge, macs=2 * huge.macs, bytes_in=2 * size, bytes_out=2 * size, height=1024)
    ratio = operator_fit.predict(fitted, [twice])[0] / operator_fit.predict(fitted, [huge])[0]
    assert ratio == pytest.approx(2, rel=0.1)


def test_kinds_that_the_table_has_not_seen_are_named_and_still_take_time(fitted: operator_fit.Fit) -> None:
    strange = Kernel("softmax", 0, 4_000_000, 0, 4_000_000, 64, 64, 125, 125)
    assert operator_fit.unknown(fitted, [strange, Kernel("run")]) == ["softmax"]
    assert 0.1 < operator_fit.predict(fitted, [strange])[0] < 10


def test_the_same_table_gives_the_same_fit_and_another_device_another_one(fitted: operator_fit.Fit) -> None:
    one = net(np.random.default_rng(3), 20)
    again = operator_fit.fit(samples())
    assert np.array_equal(operator_fit.predict(again, one), operator_fit.predict(fitted, one))
    slower = operator_fit.fit([dataclasses.replace(sample, ms=3 * sample.ms) for sample in samples()])
    ratio = operator_fit.predict(slower, one).sum() / operator_fit.predict(fitted, one).sum()
    assert ratio == pytest.approx(3, rel=1e-3)


def test_a_disturbed_timing_weighs_little() -> None:
    clean, rng = samples(), np.random.default_rng(4)
    bad = {int(row) for row in rng.choice(len(clean), 10, replace=False)}
    spoilt = [dataclasses.replace(s, ms=5 * s.ms, spread=2.0) if row in bad else s for row, s in enumerate(clean)]
    one = net(rng, 40)
    assert operator_fit.predict(operator_fit.fit(spoilt), one).sum() == pytest.approx(sum(map(truth, one)), rel=0.1)


def test_networks_with_a_kernel_that_runs_oddly_do_not_bend_the_others() -> None:
    """Five of a hundred take six times as long, steadily: no spread of theirs tells."""
    odd = [dataclasses.replace(s, ms=6 * s.ms) if row % 20 == 7 else s for row, s in enumerate(samples())]
    rng = np.random.default_rng(5)
    nets = [net(rng, int(rng.integers(2, 12))) for _ in range(40)]
    found = operator_fit.fit(odd)
    off = [abs(operator_fit.predict(found, one).sum() / sum(map(truth, one)) - 1) for one in nets]
    assert np.mean(np.array(off) <= 0.1) >= 0.8


@pytest.mark.parametrize("wrong", [samples()[:3], [*samples()[:20], Sample((Kernel("run"),), 0.0)]])
def test_too_little_or_no_time_cannot_be_fitted(wrong: list[Sample]) -> None:
    with pytest.raises(errors.UsageError, match="at least 8 networks with positive times"):
        operator_fit.fit(wrong)


def test_error_figures_are_right_on_known_numbers() -> None:
    told = operator_table.errors_of([(1.0, 1.0), (1.05, 1.0), (0.85, 1.0), (2.6, 2.0), (1.5, 1.0)])
    assert told["networks"] == 5
    assert told["median"] == pytest.approx(0.15)
    assert told["p90"] == pytest.approx(0.42)  # between 0.3 and 0.5
    assert told["within10"] == pytest.approx(0.4)
    assert told["within20"] == pytest.approx(0.6)
    assert told["bias"] == pytest.approx(0.05)
    for wrong in ([], [(1.0, 0.0)], [(float("nan"), 1.0)]):
        with pytest.raises(errors.UsageError, match="pairs of positive times"):
            operator_table.errors_of(wrong)


# ------------------------------------------------------------------------------------------------------------ tables


def table(**changes: Any) -> dict[str, Any]:
    """A table of the synthetic device."""
    made = operator_table.new("board", "ssh://board", {"cpu_model": "synthetic"}, 2, "2026-01-01")
    made["versions"] = {"onnxruntime": "1.2.3"}
    made["entries"] = [
        {"runtime": "onnxruntime", "precision": "fp32", "probe": {"name": str(row), "input": [1], "layers": []},
         "kernels": [operators.to_row(k) for k in sample.kernels], "status": "measured", "ms": sample.ms}
        for row, sample in enumerate(samples())
    ]  # fmt: skip
    return made | changes


@pytest.fixture
def graph(tmp_path: Path, conv_chain: Any) -> Graph:
    from edgegen import onnx_graph

    return onnx_graph.to_onnx(conv_chain.stage, tmp_path / "net.onnx")


def test_an_estimate_comes_from_the_table_with_its_error_beside_it(tmp_path: Path, graph: Graph) -> None:
    folder = tmp_path / "tables"
    operator_table.save(table(), folder / "board.json")
    found = estimate.estimate_latency(graph, BOARD, "fp32", tables=folder)
    assert (found.status, found.conditions["method"]) == ("estimated", "operator table, unvalidated")
    assert found.value > RUN_MS
    told = operator_table.errors_of([(1.04, 1.0), (1.0, 1.0), (1.5, 1.0)])
    operator_table.save(table(validation={"onnxruntime fp32": told}), folder / "board.json")
    validated = estimate.estimate_latency(graph, BOARD, "fp32", tables=folder)
    assert validated.conditions["method"] == (
        "operator table, validated: median 4%, p90 41%, 67% within 10% (3 networks)")  # fmt: skip
    assert validated.value == found.value
    assert validated.interval == pytest.approx((found.value / 1.408, found.value * 1.408))


@pytest.mark.parametrize(
    ("changes", "target", "why"),
    [
        ({"target": "other"}, BOARD, "measured on other, not on board"),
        ({"threads": 4}, BOARD, "with 4 threads, not 2"),
        ({"entries": []}, BOARD, "holds only 0 networks of onnxruntime fp32"),
        ({"machine": {"cpu_model": "synthetic", "busy": True}}, BOARD, "while the machine was busy"),
        ({}, dataclasses.replace(BOARD, is_host=True), r"on another machine \(synthetic\)"),
        ({}, dataclasses.replace(BOARD, versions={"onnxruntime": "1.3.0"}), "with onnxruntime 1.2.3, not 1.3.0"),
    ],
)
def test_a_table_that_does_not_fit_is_not_used_and_the_reason_is_told(
    tmp_path: Path, graph: Graph, changes: dict, target: Target, why: str
) -> None:
    import re

    operator_table.save(table(**changes), tmp_path / "tables" / "one.json")
    stated = dataclasses.replace(target, bandwidth_bytes_per_s=1e9, peak_macs_per_s={"fp32": 1e9})
    found = estimate.estimate_latency(graph, stated, "fp32", tables=tmp_path / "tables")
    assert found.conditions["method"] == "roofline, unvalidated"
    assert re.search(why, found.conditions["table"])


def test_a_target_without_facts_and_without_a_table_is_not_measured(tmp_path: Path, graph: Graph) -> None:
    found = estimate.estimate_latency(graph, BOARD, "fp32", tables=tmp_path / "none")
    assert found.status == "not measured"
    assert "bandwidth_bytes_per_s" in found.reason


def _broken(change: Any) -> dict[str, Any]:
    made = copy.deepcopy(table())
    change(made)
    return made


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.update(schema="edgegen operator table 0"), "schema must be 'edgegen operator table 1', got"),
        (lambda t: t.pop("threads"), "threads must be of type int"),
        (lambda t: t.update(entries={}), "entries must be of type list"),
        (lambda t: t["entries"][4].pop("kernels"), r"entries\[4\]: .*kernels is missing"),
        (lambda t: t["entries"][4]["kernels"][0].pop(), r"entries\[4\]: kernels"),
        (lambda t: t["entries"][0]["kernels"][0].__setitem__(0, "magic"), r"unknown kind of kernel 'magic'"),
        (lambda t: t["entries"][5].update(ms=-1.0), r"entries\[5\]: ms must be a positive number, got -1.0"),
    ],
)
def test_a_wrong_table_is_refused_with_file_and_field(tmp_path: Path, change: Any, why: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps(_broken(change)))
    with pytest.raises(errors.UsageError, match=why):
        operator_table.load(file)


def test_a_table_survives_its_file_and_what_is_no_table_is_refused(tmp_path: Path) -> None:
    operator_table.save(table(), tmp_path / "t.json")
    assert operator_table.load(tmp_path / "t.json") == json.loads(json.dumps(table()))
    (tmp_path / "n.json").write_text("{")
    with pytest.raises(errors.UsageError, match="not readable JSON"):
        operator_table.load(tmp_path / "n.json")


def test_tables_that_ship_are_whole() -> None:
    for file in (registry.folder("targets") / "operators").glob("*.json"):
        shipped = operator_table.load(file)
        for told in shipped["validation"].values():
            assert told["networks"] >= 20
            assert 0 <= told["median"] <= told["p90"]


# --------------------------------------------------------------------------------------------------------- measuring


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and short rounds."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "table.json"


QUICK = profiling.Settings(minutes=5, count=3, batch=3, rounds=3, seconds=0.005, warm_seconds=0.01)
THREE = [
    {"name": "empty", "input": [1, 1, 1, 1], "layers": [["act", "relu"]]},
    {"name": "conv", "input": [1, 8, 8, 8], "layers": [["conv", 8, 3, 1, 1, "relu"]]},
    {"name": "pool", "input": [1, 8, 8, 8], "layers": [["pool", "global"]]},
]


def test_probes_are_timed_and_a_second_call_goes_on_where_the_first_stopped(small: Path, monkeypatch: Any) -> None:
    host = targets.load("cpu")
    pairs = [("onnxruntime", "fp32")]
    timed: list[int] = []
    real = profiling.time_them
    monkeypatch.setattr(profiling, "time_them", lambda a, *rest: timed.append(len(a)) or real(a, *rest))
    monkeypatch.setattr(profiling, "UNSTEADY", 1e9)

    def measure(wanted: list) -> dict:
        return profiling.profile(host, pairs, small, wanted, QUICK, lambda text, share: None, while_busy=True)

    measure(THREE[:2])
    for entry in (first := operator_table.load(small))["entries"]:
        entry["busy"] = False  # whatever this machine does besides
    operator_table.save(first, small)
    measure(THREE)
    assert timed == [2, 1]
    told = operator_table.load(small)
    assert [entry["probe"]["name"] for entry in told["entries"]] == ["empty", "conv", "pool"]
    assert all(entry["status"] == "measured" and len(entry["round_medians"]) == 3 for entry in told["entries"])
    assert told["entries"][1]["kernels"][2][0] == "conv3x3"
    assert told["machine"]["cpu_model"] == local.cpu_model()
    assert told["versions"]["onnxruntime"]


def test_a_probe_that_a_runtime_cannot_build_is_an_entry_with_its_reason(small: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(profiling, "_built", lambda *rest: (None, None, "the converter crashed"))
    made = profiling.profile(targets.load("cpu"), [("onnxruntime", "fp32")], small, THREE[:1], QUICK,
                             lambda text, share: None, while_busy=True)  # fmt: skip
    assert (made["entries"][0]["status"], made["entries"][0]["reason"]) == ("not measured", "the converter crashed")
    assert operator_table.samples(made, "onnxruntime", "fp32") == []


def test_a_busy_machine_is_refused_and_another_ones_table_too(small: Path, monkeypatch: Any) -> None:
    def measure(**how: Any) -> Any:
        return profiling.profile(targets.load("cpu"), [("onnxruntime", "fp32")], small, [], QUICK,
                                 lambda text, share: None, **how)  # fmt: skip

    monkeypatch.setattr(profiling.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    with pytest.raises(errors.UsageError, match=r"no time to measure: the load average is 99\.0"):
        measure()
    monkeypatch.setattr(profiling.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    here = profiling.open_table(small, targets.load("cpu"))
    operator_table.save(here | {"machine": {**here["machine"], "cpu_model": "another"}}, small)
    with pytest.raises(errors.UsageError, match="holds a table with cpu_model 'another'"):
        measure()


def test_samples_of_a_busy_machine_are_marked() -> None:
    from edgegen.latency import summarise

    def told(load: float) -> dict[str, Any]:
        return profiling.told(summarise([[1.0, 2.0], [1.0, 3.0]], {"device": "local", "load_before": load}))

    assert told(99.0)["busy"]
    assert not told(0.5)["busy"]
    assert told(0.5)["ms"] == 1.5
    assert told(0.5)["round_medians"] == [1.5, 2.0]


def test_the_command_names_what_it_cannot_have(small: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["profile-device", *arguments]).exception

    assert "unknown target 'cpuu'" in str(run("--target", "cpuu"))
    assert "tensorrt cannot run here" in str(run("--target", "jetson", "--runtime", "tensorrt"))
    assert "offers no int4" in str(run("--target", "cpu", "--runtime", "onnxruntime", "--precision", "int4"))


def test_probes_are_small_enough_for_small_boards() -> None:
    assert max(np.prod(probe["input"]) for probe in probes.sample(150)) * 4 <= 13e6  # byte
