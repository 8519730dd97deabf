"""Target files: every one that ships loads and is sourced; errors name the field; estimates are rooflines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnx.helper as oh
import pytest

from edgegen import errors, estimate, registry, targets
from edgegen.devices import local
from edgegen.estimate import Layer
from edgegen.types import PRECISIONS, Graph, PrecisionPlan, Target

GOOD = """
description = "a board"
runtimes = ["tensorrt"]
precisions = ["fp32", "int8"]
memory_bytes = 1024
[channel_multiple]
int8 = 32
[sources]
memory_bytes = "its manual"
channel_multiple = "its manual"
"""


def written(folder: Path, text: str, name: str = "board") -> Path:
    file = folder / f"{name}.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", registry.names("targets"))
def test_every_target_that_ships_loads_and_its_figures_have_sources(name: str) -> None:
    target = targets.load(name)
    assert target.description
    assert set(target.precisions) <= set(PRECISIONS)
    for precision in target.precisions:
        assert target.width_multiple(precision) in (1, 2, 4, 8, 16, 32)
    if not target.is_host:
        assert set(targets.FIGURES) <= set(target.sources)
        assert set(target.peak_macs_per_s) == set(target.precisions)


def test_the_cpu_target_is_this_host() -> None:
    cpu = targets.load("cpu")
    assert cpu.is_host
    assert cpu.runtimes == ("onnxruntime", "openvino")
    assert cpu.threads == local.cores() >= 1
    assert cpu.memory_bytes == local.memory_bytes() > 2**28


def test_jetson_is_an_alias() -> None:
    assert targets.load("jetson") == targets.load("jetson-orin-nano")


def test_the_jetson_peaks_are_dense_macs_not_sparse_operations() -> None:
    peaks = targets.load("jetson").peak_macs_per_s
    assert peaks["int8"] == pytest.approx(67e12 / 2 / 2, rel=0.01)
    assert peaks["int8"] == pytest.approx(2 * peaks["fp16"], rel=0.01)


def test_a_file_of_ones_own_is_read_by_its_path(tmp_path: Path) -> None:
    target = targets.load(written(tmp_path, GOOD))
    assert (target.name, target.memory_bytes, target.width_multiple("int8")) == ("board", 1024, 32)
    assert targets.load(str(tmp_path / "board.toml")) == target


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("memory_bytes = 1024", "memory_byte = 1024",
                     r"board.toml: unknown field 'memory_byte', did you mean 'memory_bytes'\?; allowed: description",
                     id="unknown"),
        pytest.param("= 1024", '= "much"', r"memory_bytes must be a valid integer, got 'much'", id="type"),
        pytest.param("= 1024", "= -1", r"memory_bytes must be greater than or equal to 0, got -1", id="range"),
        pytest.param('"int8"]', '"int4"]', r"precisions.1 must be 'fp32', .* or 'int8', got 'int4'", id="name"),
        pytest.param('description = "a board"', "", r"the field 'description' is missing", id="missing"),
        pytest.param("int8 = 32", "int7 = 32", r"channel_multiple.int7 must be .*'int8', got 'int7'", id="key"),
        pytest.param('memory_bytes = "its manual"', "", r"memory_bytes has no source; add \[sources\]", id="source"),
        pytest.param('memory_bytes = "its', 'memory_bits = ""\nmemory_bytes = "its',
                     r"a source for 'memory_bits', which is no field, did you mean 'memory_bytes'\?", id="stray"),
        pytest.param("[sources]", "[peak_macs_per_s]\nbf16 = 1e12\n[sources]\npeak_macs_per_s = ''",
                     r"peak_macs_per_s.bf16 is given, but precisions has no 'bf16'", id="peak"),
        pytest.param("runtimes = [", "runtimes = ", r"board.toml: not a readable TOML file", id="syntax"),
    ],
)
def test_errors_name_the_file_the_field_and_what_is_allowed(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(errors.TargetError, match=message):
        targets.load(written(tmp_path, GOOD.replace(old, new, 1)))


def test_unknown_names_and_paths_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(errors.TargetError, match=r"unknown target 'jetsen', did you mean 'jetson'\?; there are: cpu"):
        targets.load("jetsen")
    with pytest.raises(errors.TargetError, match=r"no target file .*none.toml'; give an existing"):
        targets.load(tmp_path / "none.toml")


def test_an_alias_of_an_alias_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.TargetError, match="got another alias 'jetson'"):
        targets.load(written(tmp_path, 'alias = "jetson"'))


def test_this_host_says_what_it_is() -> None:
    facts = local.probe()
    assert facts["cores"] >= 1
    assert facts["cpu_model"]
    assert facts["os"]
    if Path("/proc/cpuinfo").exists():
        assert local.cpu_flags()


BOARD = Target(
    "board", "", ("tensorrt",), precisions=("fp32", "fp16", "int8"), bandwidth_bytes_per_s=1e9,
    peak_macs_per_s={"fp32": 1e9, "fp16": 2e9, "int8": 4e9},
)
COMPUTE, MEMORY = Layer("c", "Conv", 4_000_000, 1000), Layer("m", "Conv", 1000, 1_000_000)


def graph(plan: PrecisionPlan | None = None, file: Path = Path("absent")) -> Graph:
    return Graph("net", file, (), (), plan=plan or PrecisionPlan())


@pytest.mark.parametrize(
    ("layer", "precision", "bounds_ms"),
    [
        pytest.param(COMPUTE, "fp32", (4.002, 40.01), id="compute: MACs / peak, and ten times that"),
        pytest.param(COMPUTE, "fp16", (2.002, 20.01), id="fp16 peak"),
        pytest.param(COMPUTE, "int8", (1.002, 10.01), id="int8 peak"),
        pytest.param(MEMORY, "fp32", (4.002, 10.01), id="memory: 4 bytes an element, and 2.5 times that"),
        pytest.param(MEMORY, "int8", (1.002, 2.51), id="1 byte an element"),
    ],
)
def test_one_layer_is_bound_by_the_slower_of_peak_and_bandwidth(
    layer: Layer, precision: str, bounds_ms: tuple[float, float]
) -> None:
    found = estimate.estimate_latency(graph(), BOARD, precision, layers=[layer])
    assert found.interval == pytest.approx(bounds_ms, rel=1e-6)
    assert found.value == pytest.approx((bounds_ms[0] * bounds_ms[1]) ** 0.5, rel=1e-6)
    assert found.status == "estimated"
    assert "unvalidated" in found.conditions["method"]


def test_layers_add_up_and_what_has_no_macs_counts_in_the_upper_bound_only() -> None:
    alone = estimate.estimate_latency(graph(), BOARD, "fp32", layers=[COMPUTE]).interval or (0, 0)
    both = estimate.estimate_latency(graph(), BOARD, "fp32", layers=[COMPUTE, COMPUTE]).interval or (0, 0)
    assert both == pytest.approx((2 * alone[0], 2 * alone[1]))
    work = [COMPUTE, Layer("r", "Resize", 0, 1000)]
    resized = estimate.estimate_latency(graph(), BOARD, "fp32", layers=work).interval
    assert resized == pytest.approx((alone[0], alone[1] + 0.01 + 0.01))  # 4000 bytes at 0.4 GB/s, and a launch


def test_layers_left_in_float_are_counted_in_float() -> None:
    plan = PrecisionPlan("int8", rest="fp16", float_layers=("c",))
    kept = estimate.estimate_latency(graph(plan), BOARD, "int8", layers=[COMPUTE])
    assert kept.interval == estimate.estimate_latency(graph(), BOARD, "fp16", layers=[COMPUTE]).interval
    by_type = estimate.estimate_latency(
        graph(dataclasses.replace(plan, float_layers=(), float_types=("Conv",))), BOARD, "int8", layers=[COMPUTE])
    assert by_type.interval == kept.interval


def test_what_the_target_does_not_state_cannot_be_estimated() -> None:
    with pytest.raises(errors.TargetError, match=r"board cannot be estimated in bf16: .* peaks for: fp32, fp16, int8"):
        estimate.estimate_latency(graph(), BOARD, "bf16", layers=[COMPUTE])
    with pytest.raises(errors.TargetError, match="cpu cannot be estimated"):
        estimate.estimate_latency(graph(), targets.load("cpu"), "fp32", layers=[COMPUTE])


def test_work_is_counted_from_the_onnx_file(tmp_path: Path) -> None:
    weight = oh.make_tensor("w", onnx.TensorProto.FLOAT, (8, 3, 3, 3), [0.0] * 216)
    nodes = [
        oh.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["a"], ["b"], "relu"),
        oh.make_node("GlobalAveragePool", ["b"], ["y"], "pool"),
    ]
    start = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 3, 4, 4))
    end = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 8, 1, 1))
    made = oh.make_graph(nodes, "g", [start], [end], [weight])
    onnx.save(oh.make_model(made, opset_imports=[oh.make_opsetid("", 18)]), tmp_path / "net.onnx")
    conv = Layer("conv", "Conv", 8 * 16 * 27, 3 * 16 + 8 * 16 + 216)
    pool = Layer("pool", "GlobalAveragePool", 0, 8 * 16 + 8)
    assert estimate.layers_of(tmp_path / "net.onnx") == [conv, pool]
    counted = estimate.estimate_latency(graph(file=tmp_path / "net.onnx"), BOARD, "fp32")
    assert counted.interval == estimate.estimate_latency(graph(), BOARD, "fp32", layers=[conv, pool]).interval
