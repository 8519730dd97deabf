"""Core ML: built from the torch program, read back from disk, and its numbers checked on the translated program."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import TINY, make_tiny
from coreml_cases import FP16, NEWER, PHONE, TOLERANCE, W8A8, Case, case, is_close, network_input, run

from edgegen import errors, files, loading, onnx_graph
from edgegen.runtimes import coreml
from edgegen.types import Graph, PrecisionPlan, Preprocessing

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'edgegen[coreml]'")
PLANS = {plan.label: plan for plan in coreml.plans(PHONE, frozenset())}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    samples = np.random.default_rng(0).random((8, 3, 16, 16), dtype=np.float32)
    return {name: case(make_tiny(name).stage, tmp_path_factory.mktemp(name), samples) for name in TINY}


@pytest.fixture(scope="module")
def built(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, PrecisionPlan], Any]:
    made: dict[Any, Any] = {}

    def build(name: str, plan: PrecisionPlan) -> Any:
        if (name, plan) not in made:
            made[name, plan] = cases[name].build(plan, tmp_path_factory.mktemp("built") / "out")
        return made[name, plan]

    return build


@pytest.mark.parametrize("wrong", [lambda x: 2 * x, np.zeros_like, lambda x: x[:, :-1], lambda x: x * np.nan])
def test_comparison_can_fail(wrong: Any) -> None:
    right = np.random.default_rng(0).random((1, 3, 4, 4), dtype=np.float32)
    assert is_close(right, right.copy(), 1e-6)
    assert not is_close(right, wrong(right), 0.4)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("label", PLANS)
def test_saved_program_answers_as_torch_does(label: str, name: str, cases: Any, built: Any) -> None:
    plan, source = PLANS[label], cases[name]
    got = run(built(name, plan), source.feed)
    tolerance = 0.2 if plan.precision == "int8" else 1e-4 if plan.precision == "fp32" else TOLERANCE[plan.weights]
    assert is_close(source.wanted, got, tolerance)
    assert not is_close(2 * source.wanted, got, tolerance)


@pytest.mark.parametrize("name", TINY)
def test_layers_are_those_of_the_onnx_graph_with_what_the_file_holds(name: str, cases: Any, built: Any) -> None:
    layers = {layer.name for layer in onnx_graph.cost(cases[name].graph.onnx).layers}
    found = coreml.inspect(built(name, FP16))
    assert found.layers == dict.fromkeys(layers, "fp16")
    assert (found.int8_weight_share, found.int8_macs_share) == (0, 0)
    assert set(coreml.inspect(built(name, PrecisionPlan("fp32"))).layers.values()) == {"fp32"}
    packed = coreml.inspect(built(name, PrecisionPlan("fp16", weights="palette4"))).layers
    assert set(packed) == layers
    assert set(packed.values()) <= {"fp16", "fp16 (weights palette4)"}
    integer = coreml.inspect(built(name, W8A8))
    assert set(integer.layers.values()) == {"int8"}
    assert (integer.int8_weight_share, integer.int8_macs_share) == (1, 1)


def test_narrower_weights_make_smaller_packages_and_the_twin_does_not_count(built: Any) -> None:
    sizes = [built("residual", PLANS[label]).size_bytes for label in ("fp32", "fp16")]
    stored = [built("residual", plan).options["read_back"]["bytes_by_type"] for plan in PLANS.values() if plan.weights]
    assert sizes[0] > sizes[1]
    weights = [max(v for key, v in held.items() if key in ("int8", "palette6", "palette4")) for held in stored]
    assert weights == sorted(weights, reverse=True)
    artifact = built("residual", FP16)
    twin = artifact.path.parent / "twin.onnx"
    assert twin in artifact.files
    assert artifact.size_bytes == sum(f.stat().st_size for f in artifact.path.rglob("*") if f.is_file())
    assert coreml.twin(artifact).path == twin
    assert (artifact.options["minimum_os"], artifact.options["read_back"]["specification_version"]) == ("iOS 17", 8)


def test_palette_tables_hold_16_values(cases: Any, built: Any) -> None:
    """Closed form: a weight of a palette4 build has at most 16 different values, and those the twin has too."""
    artifact = built("residual", PrecisionPlan("fp16", weights="palette4"))
    twin = onnx.load(coreml.twin(artifact).path)
    weights = [onnx.numpy_helper.to_array(t) for t in twin.graph.initializer if len(t.dims) == 4]
    large = [w for w in weights if w.size >= 512]
    assert len(large) == 4
    assert all(len(np.unique(w)) <= 16 for w in large)
    assert all(np.array_equal(w, w.astype(np.float16).astype(np.float32)) for w in large)


def test_table_of_values_has_the_least_squared_error() -> None:
    """Closed form: two clusters of {0, 1, 9, 10} are their means; no more values than there are costs nothing."""
    from edgegen.runtimes._coreml_weights import table

    lut, places = table(1, np.array([0, 1, 9, 10], np.float16))
    assert (lut.tolist(), places.tolist()) == ([0.5, 9.5], [0, 0, 1, 1])
    few = np.array([[3, -1], [-1, 3]], np.float16)
    lut, places = table(4, few)
    assert np.array_equal(lut[places].reshape(2, 2), few)


def test_promise_that_the_file_does_not_keep_is_refused(built: Any) -> None:
    from edgegen.runtimes import _coreml_build, _coreml_read

    artifact = built("residual", FP16)
    found = _coreml_read.contents(artifact.path)
    graph = Graph("g", artifact.path, artifact.inputs, artifact.outputs)
    _coreml_build.promise(graph, found, FP16)
    for plan, said in (
        (PrecisionPlan("fp16", weights="palette4"), "promised palette4 weights, the weight of .* is stored as fp16"),
        (PrecisionPlan("fp32"), "promised fp32, .* computes in fp16"),
        (W8A8, "promised int8 for .* obtained 0%"),
    ):
        with pytest.raises(errors.RuntimeFailed, match=said):
            _coreml_build.promise(graph, found, plan)


def test_package_and_twin_that_do_not_belong_together_are_refused(built: Any, cases: Any, tmp_path: Path) -> None:
    artifact = built("conv_chain", FP16)
    folder = Path(shutil.copytree(artifact.path.parent, tmp_path / "changed"))
    moved = dataclasses.replace(artifact, path=folder / artifact.path.name)
    assert is_close(run(artifact, cases["conv_chain"].feed), run(moved, cases["conv_chain"].feed), 0)
    weights = moved.path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(errors.RuntimeFailed, match=r"cannot load: twin.onnx was not made from this"):
        coreml.load(moved).__enter__()
    program_file = moved.path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    program_file.write_bytes(program_file.read_bytes()[:500])
    with pytest.raises(errors.RuntimeFailed, match="not a readable Core ML package"):
        coreml.inspect(moved)
    gone = dataclasses.replace(artifact, path=tmp_path / "model.mlpackage")
    with pytest.raises(errors.RuntimeFailed, match=r"cannot load: model\.mlpackage is not a Core ML package"):
        coreml.load(gone).__enter__()


def test_conversion_that_computes_something_else_is_refused(cases: Any, tmp_path: Path) -> None:
    """The program is compared with the ONNX graph: here one weight of the latter is doubled."""
    source = cases["residual"]
    model = onnx.load(source.graph.onnx)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    other = dataclasses.replace(source.graph, onnx=tmp_path / "other.onnx", plan=FP16)
    with pytest.raises(errors.RuntimeFailed, match=r"converted program differs from main by .* of the output's peak"):
        coreml.build(other, tmp_path / "out", calibration=source.calibration, target=PHONE)
    assert not (tmp_path / "out").exists()


def test_same_program_same_bytes_and_no_words(cases: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = PrecisionPlan("fp16", weights="int8")
    first, second = (cases["residual"].build(plan, tmp_path / name) for name in ("a", "b"))
    assert [files.sha256(f) for f in first.files] == [files.sha256(f) for f in second.files]
    assert capfd.readouterr() == ("", "")


def test_kept_layers_stay_in_float(cases: Any, tmp_path: Path) -> None:
    kept = ("1.conv1/Conv",)
    half = coreml.inspect(cases["residual"].build(PrecisionPlan("fp16", float_layers=kept), tmp_path / "half"))
    assert {name for name, got in half.layers.items() if got == "fp32"} == set(kept)
    types = coreml.inspect(cases["conv_chain"].build(PrecisionPlan("fp16", float_types=("Gemm",)), tmp_path / "types"))
    assert {name for name, got in types.layers.items() if got == "fp32"} == {"10/Gemm"}
    plan = dataclasses.replace(W8A8, float_layers=kept)
    integer = coreml.inspect(cases["residual"].build(plan, tmp_path / "int8"))
    assert integer.layers[kept[0]] == "fp16"
    assert integer.layers["1.conv2/Conv"] == "int8"
    with pytest.raises(errors.UsageError, match=r"unknown layer '1.conv1/Con', did you mean '1.conv1/Conv'\?"):
        cases["residual"].build(PrecisionPlan("fp16", float_layers=("1.conv1/Con",)), tmp_path / "no")


def test_bad_requests_are_one_line(cases: Any, tmp_path: Path) -> None:
    source = cases["residual"]
    for plan, said in (
        (PrecisionPlan("bf16"), "coreml cannot build bf16; it can build: fp16, fp32"),
        (PrecisionPlan("fp16", weights="palette2"), r"coreml cannot build fp16 \(weights palette2\); it can"),
    ):
        with pytest.raises(errors.UsageError, match=said):
            source.build(plan, tmp_path / "out")
    with pytest.raises(errors.UsageError, match="needs calibration data"):
        coreml.build(dataclasses.replace(source.graph, plan=W8A8), tmp_path / "out", calibration=None, target=PHONE)
    old = dataclasses.replace(PHONE, versions={"os": "iOS 16"})
    with pytest.raises(errors.UsageError, match="needs iOS 17 or macOS 14, phone is iOS 16"):
        source.build(W8A8, tmp_path / "out", old)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- target


@pytest.mark.parametrize(
    ("said", "number"),
    [("iOS 17", 17), ("iOS 18.2", 18), ("macOS 14", 17), ("macOS 15.1", 18), ("iPadOS 17", 17), ("macOS 26", 26)],
)
def test_minimum_os_is_counted_in_ios_versions(said: str, number: int) -> None:
    from edgegen.runtimes._coreml_convert import minimum_os

    assert minimum_os(dataclasses.replace(PHONE, versions={"os": said})) == number
    assert minimum_os(dataclasses.replace(PHONE, versions={})) == 17


@pytest.mark.parametrize(("said", "why"), [("Android 15", "must be such as"), ("iOS 14", "at least"), ("", "such as")])
def test_minimum_os_that_cannot_be_is_refused(said: str, why: str) -> None:
    with pytest.raises(errors.TargetError, match=why):
        coreml.plans(dataclasses.replace(PHONE, versions={"os": said}), frozenset())


def test_plans_keep_to_the_target() -> None:
    assert W8A8 in PLANS.values()
    assert W8A8 not in coreml.plans(dataclasses.replace(PHONE, versions={"os": "iOS 16"}), frozenset())
    half = coreml.plans(dataclasses.replace(PHONE, precisions=("fp16",)), frozenset())
    assert {plan.precision for plan in half} == {"fp16"}
    assert {plan.weights for plan in half} == {"", "int8", "palette6", "palette4"}


def test_newer_systems_get_a_table_for_each_16_channels(cases: Any, tmp_path: Path) -> None:
    """From iOS 18 on; 16 values a group, so a tensor of several groups has more than 16."""
    artifact = cases["depthwise_generator"].build(PrecisionPlan("fp16", weights="palette4"), tmp_path / "out", NEWER)
    twin = onnx.load(coreml.twin(artifact).path)
    weights = [onnx.numpy_helper.to_array(t) for t in twin.graph.initializer if t.dims[:2] == [64, 16]]
    assert len(weights) == 1
    assert 16 < len(np.unique(weights[0])) <= 64
    assert all(len(np.unique(group)) <= 16 for group in np.split(weights[0], 4))
    assert artifact.options["read_back"]["specification_version"] == 9


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac: Core ML runs")
def test_elsewhere_nothing_is_run_or_timed(built: Any, cases: Any) -> None:
    assert "macOS only" in str(coreml.missing())
    assert coreml.cannot_build() is None
    with pytest.raises(errors.TargetUnavailable, match="macOS only"):
        coreml.compute_units(built("residual", FP16), {"input": cases["residual"].feed})


# ------------------------------------------------------------------------------------------------------------- Swift


def swift_files(artifact: Any, how: Preprocessing, task: str) -> dict[str, str]:
    from edgegen.runtimes import _coreml_swift

    return _coreml_swift.files(artifact, 'a "name"', how, task, artifact.outputs[0].value_range)


@pytest.mark.parametrize("name", TINY)
def test_swift_project_is_swift_and_knows_the_model(name: str, built: Any) -> None:
    parser = swift_parser()
    how = Preprocessing((0.0, 1.0), (0.5,), (0.25,), resize=20)
    made = swift_files(built(name, FP16), how, make_tiny(name).task)
    for file, text in made.items():
        assert "@NAME" not in text
        if file.endswith(".swift"):
            assert not parser(text).has_error, file
    facts = made["Sources/Generator/Facts.swift"]
    assert 'name = "a \\"name\\""' in facts
    assert "mean: [Float] = [0.5, 0.5, 0.5]" in facts
    assert f"givesClasses = {'true' if name == 'conv_chain' else 'false'}" in facts
    assert '.iOS("17.0"), .macOS("14.0")' in made["Package.swift"]


def test_swift_parser_sees_what_is_broken() -> None:
    assert swift_parser()("func f( { let }").has_error
    assert not swift_parser()("func f() -> Int { return 1 }").has_error


def swift_parser() -> Callable[[str], Any]:
    tree_sitter = pytest.importorskip("tree_sitter", reason="pip install tree-sitter tree-sitter-swift")
    language = pytest.importorskip("tree_sitter_swift", reason="pip install tree-sitter tree-sitter-swift")
    parser = tree_sitter.Parser(tree_sitter.Language(language.language()))
    return lambda text: parser.parse(text.encode()).root_node


# ---------------------------------------------------------------------------------------------------- built-in models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edsr", "cifar_resnet", "dcgan"])
def test_built_in_models(name: str, tmp_path: Path) -> None:
    """Trained networks, so rounding stays small: whole plans against torch, and each smaller than the one before."""
    model = loading.load_model(name)
    spec = model.stage.inputs[0]
    rng = np.random.default_rng(0)
    if spec.value_range is None:
        samples = rng.standard_normal((4, *spec.shape[1:])).astype(np.float32)
    else:
        coarse = rng.integers(0, 256, (4, spec.shape[1], 8, 8), dtype=np.uint8)
        times = int(spec.shape[2]) // 8
        samples = network_input(coarse.repeat(times, 2).repeat(times, 3), model.preprocessing)
    source = case(model.stage, tmp_path, samples, model.preprocessing)
    assert coreml.supports(source.graph, PHONE) == []
    sizes = []
    for weights, tolerance in (("", 0.01), ("int8", 0.1), ("palette6", 0.2), ("palette4", 0.8)):
        artifact = source.build(PrecisionPlan("fp16", weights=weights), tmp_path / "out")
        got = run(artifact, source.feed)
        assert is_close(source.wanted, got, tolerance)
        assert np.corrcoef(source.wanted.ravel(), got.ravel())[0, 1] > (0.999 if not weights else 0.9)
        kinds = set(coreml.inspect(artifact).layers.values())
        assert kinds <= {"fp16", f"fp16 (weights {weights})"} if weights else kinds == {"fp16"}
        sizes.append(artifact.size_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 0.35 * sizes[0]
