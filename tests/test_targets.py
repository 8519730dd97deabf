"""Target files: every one that ships loads and is sourced; errors name the field; estimates are rooflines."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import onnx
import onnx.helper as oh
import pytest

from edgegen import errors, estimate, registry, serial, targets
from edgegen.devices import local
from edgegen.estimate import Layer
from edgegen.types import PRECISIONS, Graph, JetPack, PrecisionPlan, Target

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
    assert set(target.peak_macs_per_s) <= set(target.precisions)
    stated = set(registry.load_toml(registry.path("targets", target.name)))
    assert stated & set(targets.FIGURES) <= set(target.sources)
    if not target.is_host:
        # every figure that an estimate needs, of the maker or derived: the source says which
        assert set(target.peak_macs_per_s) == set(target.precisions)
        assert target.bandwidth_bytes_per_s > 0
        assert target.versions and target.techniques["latency"]
        assert not any("TODO" in source or len(source) < 10 for source in target.sources.values())


WANTED = """cpu intel-cpu raspberry-pi-5 jetson jetson-nano jetson-xavier-nx jetson-orin-nano jetson-orin-nx
jetson-agx-orin jetson-thor iphone iphone-12 iphone-15-pro ipad-m4 mac-m4 android pixel-9 galaxy-s24 nvidia-t4
nvidia-rtx-4090 nvidia-h200"""


def test_every_device_that_was_promised_is_there() -> None:
    assert set(WANTED.split()) == set(registry.names("targets"))


@pytest.mark.parametrize(("alias", "name"), [("jetson", "jetson-orin-nano"), ("iphone", "iphone-15-pro"),
                                             ("android", "pixel-9")])
def test_aliases_stand_for_a_device(alias: str, name: str) -> None:
    assert targets.load(alias) == targets.load(name)
    assert targets.load(alias).name == name


RUNTIMES = {
    "cpu": ("onnxruntime", "openvino"), "intel-cpu": ("openvino", "onnxruntime"),
    "raspberry-pi-5": ("onnxruntime", "litert", "ncnn", "executorch"), "jetson": ("tensorrt",), "nvidia": ("tensorrt",),
    "i": ("coreml",), "mac": ("coreml",), "pixel": ("litert", "executorch", "ncnn"),
    "galaxy": ("litert", "executorch", "ncnn"),
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED.split())
def test_runtimes_are_those_of_the_device(name: str) -> None:
    target = targets.load(name)
    start = max((prefix for prefix in RUNTIMES if target.name.startswith(prefix)), key=len)
    assert target.runtimes == RUNTIMES[start]


@pytest.mark.parametrize("name", registry.names("targets"))
def test_every_runtime_of_a_target_has_a_plan_for_it(name: str) -> None:
    target = targets.load(name)
    for runtime in target.runtimes:
        plans = registry.module("runtimes", runtime).plans(target, frozenset())
        assert {"fp32", "fp16"} & {plan.precision for plan in plans}
        assert {plan.precision for plan in plans} <= set(target.precisions)


JETSONS = [name for name in WANTED.split() if name.startswith("jetson-")]


@pytest.mark.parametrize("name", JETSONS)
def test_the_jetpack_table_agrees_with_the_facts(name: str) -> None:
    target = targets.load(name)
    assert target.release is not None
    assert target.release.version == target.versions["jetpack"]
    assert (target.release.tensorrt, target.release.cuda) == (target.versions["tensorrt"], target.versions["cuda"])
    assert target.opset <= target.release.opset


def test_dla_belongs_to_a_module_and_to_a_release() -> None:
    cores = {name: {entry.version: entry.dla for entry in targets.load(name).jetpack} for name in JETSONS}
    assert cores["jetson-agx-orin"] == cores["jetson-orin-nx"] == {"6.2": 2, "7.2": 0}
    assert cores["jetson-xavier-nx"] == {"5.1.2": 2, "4.6.1": 2}
    for name in ("jetson-orin-nano", "jetson-nano", "jetson-thor"):
        assert set(cores[name].values()) == {0}


def test_the_old_jetsons_keep_to_what_their_software_takes() -> None:
    nano, xavier = targets.load("jetson-nano"), targets.load("jetson-xavier-nx")
    assert (nano.opset, nano.versions["tensorrt"], nano.precisions) == (13, "8.2.1", ("fp32", "fp16"))
    assert (xavier.opset, xavier.versions["tensorrt"]) == (17, "8.5.2")


def test_derived_peaks_follow_from_their_figures() -> None:
    peaks = {name: targets.load(name).peak_macs_per_s for name in WANTED.split()}
    assert peaks["raspberry-pi-5"]["fp32"] == pytest.approx(4 * 2 * 4 * 2.4e9)
    assert peaks["jetson-nano"]["fp16"] * 2 == pytest.approx(472e9, rel=0.01)
    assert peaks["jetson-agx-orin"]["int8"] == pytest.approx(171e12 / 4)
    assert peaks["jetson-xavier-nx"]["fp16"] == pytest.approx(48 * 64 * 1.1e9, rel=0.01)
    assert peaks["nvidia-h200"]["int8"] == pytest.approx(3.96e15 / 4)
    assert peaks["pixel-9"]["fp32"] == pytest.approx(16 * 3.1e9 + 3 * 8 * 2.6e9, rel=0.01)
    assert peaks["galaxy-s24"]["fp32"] == pytest.approx(16 * 3.39e9 + 24 * 3.1e9 + 16 * 2.9e9, rel=0.01)
    assert peaks["intel-cpu"]["int8"] == pytest.approx(56 * 1024 * 2e9, rel=0.01)


def test_the_cpu_target_is_this_host() -> None:
    cpu = targets.load("cpu")
    assert cpu.is_host
    assert cpu.runtimes == ("onnxruntime", "openvino")
    assert cpu.threads == local.cores() >= 1
    assert cpu.memory_bytes == local.memory_bytes() > 2**28


def test_the_jetson_peaks_are_dense_macs_not_sparse_operations() -> None:
    peaks = targets.load("jetson").peak_macs_per_s
    assert peaks["int8"] == pytest.approx(67e12 / 2 / 2, rel=0.01)
    assert peaks["int8"] == pytest.approx(2 * peaks["fp16"], rel=0.01)


def test_a_file_of_ones_own_is_read_by_its_path(tmp_path: Path) -> None:
    target = targets.load(written(tmp_path, GOOD))
    assert (target.name, target.memory_bytes, target.width_multiple("int8")) == ("board", 1024, 32)
    assert targets.load(str(tmp_path / "board.toml")) == target


BOARD_WITH_JETPACK = """
description = "a Jetson"
runtimes = ["tensorrt"]
precisions = ["fp32", "int8"]
opset = 18
[versions]
jetpack = "6.2"
tensorrt = "10.3"
cuda = "12.6"
[[jetpack]]
version = "6.2"
tensorrt = "10.3"
cuda = "12.6"
opset = 20
dla = 1
[techniques]
latency = ["int8"]
size = ["palette4"]
[sources]
versions = "its manual"
jetpack = "its manual"
techniques = "its manual"
opset = "its manual"
"""


def test_a_board_with_its_jetpack_table(tmp_path: Path) -> None:
    target = targets.load(written(tmp_path, BOARD_WITH_JETPACK))
    assert target.jetpack == (JetPack("6.2", "10.3", "12.6", 20, 1),)
    assert target.release == target.jetpack[0]
    assert target.techniques == {"latency": ("int8",), "size": ("palette4",)}
    assert serial.from_json(Target, serial.to_json(target)) == target
    assert targets.load(written(tmp_path, GOOD, "plain")).release is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param('jetpack = "6.2"', 'jetpack = "6.1"',
                     r"versions.jetpack must be one of the \[\[jetpack\]\] entries \(6.2\), got '6.1'", id="release"),
        pytest.param('jetpack = "6.2"\n', "", r"versions.jetpack must be one of .* got None", id="no release"),
        pytest.param('tensorrt = "10.3"', 'tensorrt = "10.4"',
                     r"versions.tensorrt must be what JetPack 6.2 carries, '10.3', got '10.4'", id="carried"),
        pytest.param("opset = 18", "opset = 21", r"opset must be at most 20, the newest .* JetPack 6.2 .* got 21",
                     id="opset"),
        pytest.param('version = "6.2"', 'version = "six"',
                     r"jetpack.0.version must be a version such as '10.3', got 'six'",
                     id="version"),
        pytest.param("dla = 1", "dlas = 1",
                     r"unknown field 'jetpack.0.dlas'.*allowed: version, tensorrt, cuda, opset, dla",
                     id="unknown"),
        pytest.param("dla = 1", "dla = -1", r"jetpack.0.dla must be greater than or equal to 0, got -1", id="range"),
        pytest.param("opset = 20\n", "", r"the field 'jetpack.0.opset' is missing", id="missing"),
        pytest.param('["palette4"]', '["int8"]', r"techniques.size must not repeat .* got 'int8'", id="both"),
        pytest.param('["int8"]', '["fp16"]', r"techniques.latency names 'fp16', but precisions has no 'fp16'",
                     id="precision"),
        pytest.param('["int8"]', '["magic"]', r"techniques.latency.0 must be 'fp16', .* got 'magic'", id="technique"),
        pytest.param('jetpack = "its manual"\n', "", r"jetpack has no source; add \[sources\]", id="source"),
    ],
)  # fmt: skip
def test_errors_in_the_jetpack_table_name_the_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    start = BOARD_WITH_JETPACK.rindex(old) if old.startswith("jetpack = \"its") else BOARD_WITH_JETPACK.index(old)
    if old == '["int8"]':
        start = BOARD_WITH_JETPACK.index(old, BOARD_WITH_JETPACK.index("[techniques]"))
    text = BOARD_WITH_JETPACK[:start] + new + BOARD_WITH_JETPACK[start + len(old):]
    with pytest.raises(errors.TargetError, match=message):
        targets.load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("memory_bytes = 1024", "memory_byte = 1024",
                     r"board.toml: unknown field 'memory_byte', did you mean 'memory_bytes'\?; allowed: description",
                     id="unknown"),
        pytest.param("= 1024", '= "much"', r"memory_bytes must be a valid integer, got 'much'", id="type"),
        pytest.param("= 1024", "= -1", r"memory_bytes must be greater than or equal to 0, got -1", id="range"),
        pytest.param('["tensorrt"]', '["tensort"]',
                     r"runtimes names 'tensort', did you mean 'tensorrt'\?, which is none; there", id="runtime"),
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
    with pytest.raises(errors.TargetError, match=r"unknown target 'jetsen', did you mean 'jetson'.; there are: andr"):
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
    for target, precision, why in (
        (BOARD, "bf16", "board cannot be estimated in bf16: .* peaks for: fp32, fp16, int8"),
        (targets.load("cpu"), "fp32", "cpu cannot be estimated"),
    ):
        found = estimate.estimate_latency(graph(), target, precision, layers=[COMPUTE])
        assert found.status == "not measured"
        assert math.isnan(found.value)
        assert re.match(why, found.reason)


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
