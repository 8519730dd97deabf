"""Weights of INT8 builds stored in 4 bits: the grid, the file, and that the integer kernels compute the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from int8_builds import DATA, RUNTIMES, TARGET, built, image_model, job, needy, out, skip_without, wrong
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgegen import errors, onnx_graph, onnx_narrow, onnx_qdq, registry, variants
from edgegen.devices import local
from edgegen.passes import _simulate
from edgegen.passes.quantize_aware import quantize_aware
from edgegen.passes.round_adaptively import round_adaptively
from edgegen.types import PrecisionPlan, Stage, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_step_of_one_outlier_is_clipped_and_one_of_even_values_is_not():
    """1,000 values in [-1, 1] and one of 3: covering it makes every error 3 times as large, clipping it costs one."""
    even = np.linspace(-1, 1, 1001, dtype=np.float32)
    steps = onnx_narrow.steps(np.stack([np.append(even, 3.0), np.append(even, 1.0)]), 0)
    assert 1 / 7 * 0.9 < steps[0] < 1.5 / 7
    assert steps[1] == pytest.approx(1 / 7, rel=0.1)


@pytest.mark.parametrize("largest", range(1, 8))
def test_weights_on_a_grid_stay_there(largest: int):
    rng = np.random.default_rng(largest)
    steps = rng.uniform(1e-3, 10, (5, 1)).astype(np.float32)
    weight = rng.integers(-largest, largest + 1, (5, 30)).astype(np.float32) * steps
    found = onnx_narrow.steps(weight, 0)[:, None]
    np.testing.assert_allclose(onnx_narrow.levels(weight, found) * found, weight, rtol=1e-6)


def test_steps_are_those_of_the_named_axis():
    weight = np.ones((2, 3, 4), np.float32) * np.array([1, 10, 100], np.float32)[:, None]
    np.testing.assert_allclose(onnx_narrow.steps(weight, 1) * 7, [1, 10, 100], rtol=1e-6)
    assert onnx_narrow.shaped(np.arange(3), 1, 3).shape == (1, 3, 1)


@pytest.mark.parametrize("count", [4, 5])
def test_stored_integers_are_read_back(count: int):
    values = np.arange(-7, -7 + 3 * count, dtype=np.int8).clip(-7, 7).reshape(3, count)
    packed = onnx_narrow._packed(values, "w")
    np.testing.assert_array_equal(numpy_helper.to_array(packed).astype(np.int8), values)
    assert len(packed.raw_data) == -(-values.size // 2)


def test_a_weight_that_is_read_elsewhere_too_stays():
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="a")
    total = helper.make_node("Add", ["y", "w"], ["z"], name="b")
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 8]) for name in ("x", "z")]
    for nodes, found in (([product], {"w": 1}), ([product, total], {})):
        model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], [weight]))
        assert onnx_narrow.axes(model, ["a"]) == found


@pytest.fixture
def network(tmp_path: Path):
    """A generator of every kind of layer with a weight, whose last layer is small; its ONNX file and samples."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1),
    ).eval()  # fmt: skip
    specs = (TensorSpec("input", (1, 8, 8, 8)),), (TensorSpec("output", (1, 2, 16, 16)),)
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 8)).astype(np.float32)
    (tmp_path / "samples").mkdir()
    np.save(tmp_path / "samples" / "input.npy", x)
    return onnx_graph.to_onnx(Stage("main", net, *specs), tmp_path / "float.onnx"), x, tmp_path


def _built(runtime: str, graph, plan: PrecisionPlan, folder: Path, name: str):
    module = registry.module("runtimes", runtime)
    graph = dataclasses.replace(graph, plan=plan)
    return module, module.build(graph, folder / name, calibration=folder / "samples", target=TARGET)


def _outputs(module, artifact, x: np.ndarray) -> np.ndarray:
    with module.load(artifact) as run:
        return np.concatenate([run({"input": sample[None]})["output"] for sample in x])


def _bytes(artifact, *suffixes: str) -> int:
    return sum(file.stat().st_size for file in artifact.files if file.suffix[1:] in suffixes)


def _learned(graph, folder: Path) -> tuple:
    return onnx_qdq.activation_ranges(graph, folder / "samples", PrecisionPlan("int8", "u8s8"))


def _snapped(graph, folder: Path, runtime: str):
    """The graph in float with the weights of what the runtime has in INT8 on their 15 levels."""
    model = onnx.load(graph.onnx)
    onnx_narrow.snap(model, onnx_qdq.quantized_nodes(model, PrecisionPlan("int8"), placement=runtime))
    onnx.save(model, folder / "snapped.onnx")
    return dataclasses.replace(graph, onnx=folder / "snapped.onnx")


@pytest.mark.parametrize("ranges", ["calibrated", "learned"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_file_halves_and_the_integer_kernels_compute_the_same(runtime: str, ranges: str, network):
    """Beside an INT8 build of a network whose weights have the same 15 levels, which 8 bits hold almost exactly."""
    skip_without(runtime)
    graph, x, folder = network
    plan = next(p for p in registry.module("runtimes", runtime).int8_from_int4(TARGET, local.cpu_flags()) if p.weights)
    if ranges == "learned":
        plan = dataclasses.replace(plan, scales=_learned(graph, folder))
    module, four = _built(runtime, graph, plan, folder, "four")
    _, eight = _built(runtime, _snapped(graph, folder, runtime), dataclasses.replace(plan, weights=""), folder, "eight")
    float_module, exact = _built("onnxruntime", _snapped(graph, folder, runtime), PrecisionPlan(), folder, "exact")
    wanted = _outputs(float_module, exact, x)
    a, b = (wrong(wanted, _outputs(module, artifact, x)) for artifact in (four, eight))
    assert a < 1.1 * b < 1e-3  # 15 levels are exact in 4 bits, and rounded in 8
    float_module, exact = _built("onnxruntime", graph, PrecisionPlan(), folder, "other")
    assert wrong(_outputs(float_module, exact, x), _outputs(module, four, x)) > 4 * a  # the comparison can tell
    layers, before = module.inspect(four), module.inspect(eight)
    assert layers.int8_macs_share == before.int8_macs_share > 0.3
    large = {"0/Conv", "2/Conv"} | ({"4/ConvTranspose"} if runtime == "openvino" else set())
    assert {name for name, told in layers.layers.items() if told == "int8 (weights int4)"} == large
    assert layers.layers["6/Conv"] == before.layers["6/Conv"] == "int8"
    weights = 32 * 8 * 9 + 32 * 16 * 9 + (32 * 16 * 16 if runtime == "openvino" else 0)
    one_file = four.path.suffix == eight.path.suffix == ".onnx"
    saved = eight.size_bytes - four.size_bytes if one_file else _bytes(eight, "bin") - _bytes(four, "bin", "onnx")
    assert saved == pytest.approx(weights / 2, rel=0.1) or (ranges, runtime) == ("learned", "openvino")
    assert four.size_bytes < eight.size_bytes - 0.4 * weights


def test_an_old_graph_and_one_of_changed_meaning_are_refused(network):
    graph, _, _ = network
    model = onnx.load(graph.onnx)
    model.opset_import[0].version = 17
    with pytest.raises(errors.Unsupported, match="a graph of opset 17; store them in 8 bits"):
        onnx_narrow.store(model)
    model.opset_import[0].version = 18
    model.graph.node.append(helper.make_node("GridSample", ["a", "b"], ["c"], name="warp"))
    with pytest.raises(errors.Unsupported, match="GridSample 'warp'"):
        onnx_narrow.store(model)


def test_a_network_without_a_weight_for_it_is_refused():
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 8]) for name in ("x", "y", "z")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "y"], ["z"], name="a")], "g", info[:2], info[2:])
    with pytest.raises(errors.Unsupported, match="no layer that becomes INT8"):
        onnx_narrow.snap(helper.make_model(graph), ["a"])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_training_in_four_bits_hands_over_what_the_build_computes(runtime: str, tmp_path: Path):
    skip_without(runtime)
    model = needy()
    result = quantize_aware(model, job(teacher=model), steps=80, batch=4, lr=3e-3, samples=8, weights="int4")
    assert result.notes["output_error_after"] < 0.5 * result.notes["output_error_before"]
    assert "INT4" in result.changed["0"]
    net, ranges = result.model.stage.module, {name: (low, high) for name, low, high in result.model.plan.scales}
    inputs = [(torch.from_numpy(image[None]),) for image in DATA.images]
    four = _simulate.plan_of(TARGET, "int4")
    found = _simulate.placement(result.model, net, inputs, four)
    assert set(found.steps) == {"0", "3", "5"}
    with torch.no_grad():
        taught = np.concatenate([_simulate.run(net, x, found, ranges).numpy() for x in inputs])
    plan = next(iter(registry.module("runtimes", runtime).int8_from_int4(TARGET, local.cpu_flags())))
    made = built(result.model, runtime, tmp_path / "build", dataclasses.replace(plan, scales=result.model.plan.scales))
    step = float(np.ptp(taught)) / 255  # ONNX Runtime rounds biases too, as coarsely as the weights' steps are wide
    assert np.mean(np.abs(made - taught) > 1.5 * step) < 5e-3 and np.abs(made - taught).mean() < 0.5 * step
    plain = built(model, runtime, tmp_path / "untaught", plan)
    assert np.mean(np.abs(plain - taught) > 1.5 * step) > 0.3


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_rounding_is_chosen_in_four_bits_too(runtime: str, tmp_path: Path):
    skip_without(runtime)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 3)
    model = image_model(nn.Sequential(*layers))
    result = round_adaptively(model, job(), samples=16, steps=400, lr=3e-2, weights="int4")
    assert result.changed and all("INT4 grid" in told for told in result.changed.values())
    plan = next(iter(registry.module("runtimes", runtime).int8_from_int4(TARGET, local.cpu_flags())))
    exact = np.concatenate([out(model, torch.from_numpy(image[None])) for image in DATA.images])
    before, after = (
        wrong(exact, built(each, runtime, tmp_path / name, plan))
        for name, each in (("before", model), ("after", result.model))
    )
    assert after < 0.8 * before


def test_a_target_whose_runtimes_cannot_is_named():
    run = SimpleNamespace(target=dataclasses.replace(TARGET, runtimes=("tensorrt",)))
    with pytest.raises(errors.RecipeError, match="not for tensorrt of target testbed; use int8"):
        variants._quantized_plans(run, {"weights": ["int4"]})
    run.target = TARGET
    assert {plan.weights for _, plan in variants._quantized_plans(run, {"weights": ["int4"]})} == {"int4"}


def test_a_rewritten_network_is_not_stored_in_four_bits():
    """Its kernels were added up: those of the network itself are on the grid that they were trained for."""
    plan = PrecisionPlan("int8", "u8s8", weights="int4")
    assert variants._taken_form("net", "onnxruntime", plan, [])
    assert not variants._taken_form(f"net{variants.REWRITTEN}", "onnxruntime", plan, [])
