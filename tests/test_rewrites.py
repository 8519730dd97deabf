"""Every rewrite of an ONNX graph: the same outputs, nothing left to do a second time, near misses left as they are."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rewrite_cases import CASES, LEFT, Case, adain, adalin, duplicates, dynamic, modulated, normal, transposed

from edgegen import errors, onnx_cost, registry, rewriting

ort = pytest.importorskip("onnxruntime")
TOLERANCE = 2e-5  # of the output's peak: float32 sums in another order
ELSEWHERE = {"merge_upsampling", "block_output"}  # tests/test_rewrites_upsampling.py
RUNTIMES = {"onnxruntime", "openvino", "tensorrt", "coreml", "executorch", "litert", "ncnn"}
NAMES = registry.names("rewrites")


def inputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Seeded inputs; what is free in a shape is taken as in the case of `fix_shapes`."""
    free, feeds = {"batch": 2, "height": 6, "width": 10}, {}
    for i, info in enumerate(model.graph.input):
        shape = [d.dim_value or free[d.dim_param] for d in info.type.tensor_type.shape.dim]
        feeds[info.name] = normal(*shape, seed=10 + i) + 0.5
    return feeds


def run(model: onnx.ModelProto) -> np.ndarray:
    """ONNX Runtime's output on those inputs."""
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["y"], inputs(model))[0]


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def is_close(wanted: np.ndarray, got: np.ndarray, tolerance: float) -> bool:
    """The same shape, and nowhere further apart than `tolerance` of the expected peak."""
    return wanted.shape == got.shape and float(np.abs(wanted - got).max()) <= tolerance * float(np.abs(wanted).max())


@pytest.mark.parametrize("wrong", [lambda x: 2 * x, np.zeros_like, lambda x: x[:, ::-1], lambda x: x * np.nan])
def test_the_comparison_can_fail(wrong: Any) -> None:
    assert is_close(normal(2, 3, 4), normal(2, 3, 4) * (1 + 1e-6), TOLERANCE)
    assert not is_close(normal(2, 3, 4), wrong(normal(2, 3, 4)), TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rewrite}: {case.label}")
def test_rewritten_graph_computes_the_same(case: Case) -> None:
    model, rewrite = case.build(), rewriting.function(case.rewrite)
    wanted = run(model)
    changed = rewrite(model, **case.options)
    assert changed and all(isinstance(text, str) and text for text in changed.values())
    assert is_close(wanted, run(model), TOLERANCE)
    assert not kinds(model) & set(case.gone)
    assert set(case.there) <= kinds(model)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
    once = model.SerializeToString()
    assert rewrite(model, **case.options) == {}
    assert model.SerializeToString() == once


@pytest.mark.slow
def test_rewritten_graphs_compute_the_same_in_a_second_runtime() -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    for case in CASES:
        model = case.build()
        wanted, feeds = run(model), inputs(model)
        rewriting.function(case.rewrite)(model, **case.options)
        compiled = core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU", settings)
        assert is_close(wanted, compiled(feeds)[0], TOLERANCE), case


@pytest.mark.parametrize("case", LEFT, ids=lambda case: f"{case.rewrite}: {case.label}")
def test_a_near_miss_is_left(case: Case) -> None:
    model = case.build()
    before = model.SerializeToString()
    assert rewriting.function(case.rewrite)(model, **case.options) == {}
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", NAMES)
def test_every_rewrite_keeps_the_contract(name: str) -> None:
    module = registry.module("rewrites", name)
    levels = [level for level in ("onnx", "program", "module") if rewriting.function(name, level)]
    assert levels
    assert module.KIND in ("cure", "offer") and set(module.RUNTIMES) <= RUNTIMES
    assert module.KIND == "cure" or module.RUNTIMES == ()
    assert all(isinstance(kind, str) for kind in getattr(module, "REMOVES", ()))
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    assert "xact" in ast.get_docstring(tree)
    if "onnx" in levels and name not in ELSEWHERE:
        assert name in {case.rewrite for case in CASES}
        assert name in {case.rewrite for case in LEFT}


def test_a_layer_keeps_its_name() -> None:
    model = transposed()
    assert list(rewriting.apply(model, ["subpixel_convolution"])["subpixel_convolution"]) == ["0/ConvTranspose"]
    assert next(node.name for node in model.graph.node if node.op_type == "Conv") == "0/ConvTranspose"


def test_subpixel_form_needs_no_more_multiplications() -> None:
    """Kernel 4, stride 2, padding 1: (n + 1)^2 positions of 2x2 taps for 4 phases, against n^2 of 4x4."""
    model = transposed()
    before = onnx_cost.cost(model).macs
    rewriting.apply(model, ["subpixel_convolution"])
    model = onnx.shape_inference.infer_shapes(model)
    assert before == 2 * 5 * 7 * 4 * 6 * 16
    assert onnx_cost.cost(model).macs == 2 * 6 * 8 * 4 * 6 * 16


def test_the_norm_of_a_modulated_weight_is_not_computed_from_the_weight() -> None:
    model = modulated(3)
    rewriting.apply(model, ["static_modulated_convolution"])
    shapes = onnx_cost.static_shapes(model)
    assert not any(shapes[name][-2:] == (3, 3) for node in model.graph.node for name in node.output)


def test_adalin_reads_the_image_for_two_means_instead_of_four() -> None:
    def reads(model: onnx.ModelProto) -> int:
        shapes = onnx_cost.static_shapes(model)
        return sum(node.op_type == "ReduceMean" and shapes[node.input[0]] == (2, 4, 5, 7) for node in model.graph.node)

    model = adalin()
    assert reads(model) == 4
    rewriting.apply(model, ["merge_adalin"])
    assert reads(onnx.shape_inference.infer_shapes(model)) == 2


def test_merged_weights_are_stored_once() -> None:
    model = duplicates()
    assert rewriting.apply(model, ["merge_duplicates"]) == {"merge_duplicates": {"w2": "the same as 'w1'"}}
    assert [t.name for t in model.graph.initializer] == ["w1"]


def test_several_fixed_shapes_give_several_models() -> None:
    module = registry.module("rewrites", "fix_shapes")
    source = dynamic()
    before = source.SerializeToString()
    made = module.at_shapes(source, [{"x": (1, 3, 8, 8)}, {"x": (2, 3, 6, 10)}])
    assert source.SerializeToString() == before
    assert [run(model).shape for model in made] == [(1, 5, 4 * 8), (2, 5, 3 * 10)]
    assert is_close(run(source), run(made[1]), TOLERANCE)
    assert all(kinds(model) == {"Conv", "Reshape"} for model in made)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1, 3, 8, 8)}, "no input 'z'; there are: x"),
        ({"x": (1, 4, 8, 8)}, r"input 'x' is \['batch', 3, 'height', 'width'\]; it cannot be \[1, 4, 8, 8\]"),
        ({"x": (1, 3, 8)}, "it cannot be"),
        ({"x": (1, 3, 0, 8)}, "it cannot be"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shapes: dict[str, Any], message: str) -> None:
    model = dynamic()
    with pytest.raises(errors.ModelError, match=message):
        rewriting.function("fix_shapes")(model, shapes)


def test_style_becomes_the_input_of_one_operation() -> None:
    model = adain()
    rewriting.apply(model, ["fuse_adain"])
    assert sorted(node.op_type for node in model.graph.node) == ["InstanceNormalization", "Mul", "Reshape", "Reshape"]


def test_weights_of_a_rewritten_graph_are_stored_once() -> None:
    """What nothing uses any more is gone."""
    for case in CASES:
        model = case.build()
        rewriting.function(case.rewrite)(model, **case.options)
        used = {name for node in model.graph.node for name in node.input}
        assert {t.name for t in model.graph.initializer} <= used, case
        assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in model.graph.initializer)


def test_unknown_rewrite_is_named_with_the_near_one() -> None:
    with pytest.raises(errors.UsageError, match="unknown rewrite 'fold_batchnorm', did you mean 'fold_batch_norm'"):
        rewriting.apply(duplicates(), ["fold_batchnorm"])
