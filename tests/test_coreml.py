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

from edgegen import errors, files, loading, onnx_graph, program
from edgegen.runtimes import coreml
from edgegen.types import Graph, PrecisionPlan, Preprocessing, Stage, Target, TensorSpec

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'edgegen[coreml]'")

PRECISIONS = ("fp32", "fp16", "int8")
PHONE = Target("phone", "", ("coreml",), precisions=PRECISIONS, threads=1, versions={"os": "iOS 17"})
NEWER = dataclasses.replace(PHONE, versions={"os": "macOS 15"})
FP16, W8A8 = PrecisionPlan("fp16"), PrecisionPlan("int8", rest="fp16")
PLANS = {plan.label: plan for plan in coreml.plans(PHONE, frozenset())}
# Largest difference as a fraction of the output's peak, random weights: sums in another order; 11 bits of mantissa in
# the weights; 8-bit steps a channel; 64 and 16 values a tensor; 8-bit steps in activations as well.
TOLERANCE = {"": 4e-3, "int8": 3e-2, "palette6": 0.1, "palette4": 0.4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph with its program, calibration folder, one input, and what torch says to it."""

    graph: Graph
    calibration: Path
    feed: np.ndarray
    wanted: np.ndarray

    def build(self, plan: PrecisionPlan, out: Path, target: Target = PHONE) -> Any:
        graph = dataclasses.replace(self.graph, plan=plan)
        return coreml.build(graph, out, calibration=self.calibration, target=target)


def case(stage: Stage, folder: Path, samples: np.ndarray, preprocessing: Preprocessing | None = None) -> Case:
    """Export a stage both ways; `samples` are network inputs."""
    import torch

    np.save(folder / f"{stage.inputs[0].name}.npy", samples)
    graph = onnx_graph.to_onnx(stage, folder / "graph.onnx")
    graph = dataclasses.replace(
        graph, program=program.save(stage, folder / "graph.pt2"), preprocessing=preprocessing
    )
    with torch.no_grad():
        wanted = stage.module(torch.from_numpy(samples[:1])).numpy()
    return Case(graph, folder, samples[:1], wanted)


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


def run(artifact: Any, feed: np.ndarray) -> np.ndarray:
    with coreml.load(artifact) as runner:
        return runner({artifact.inputs[0].name: feed})[artifact.outputs[0].name]


def is_close(wanted: np.ndarray, got: np.ndarray, tolerance: float) -> bool:
    """Same shape, and nowhere further apart than `tolerance` of the expected peak."""
    return wanted.shape == got.shape and float(np.abs(wanted - got).max()) <= tolerance * float(np.abs(wanted).max())


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


# ------------------------------------------------------------------------------------------------------------ images


@dataclasses.dataclass(frozen=True)
class Normalised:
    """A preprocessing and the number of channels it is for."""

    how: Preprocessing
    channels: int


NORMALISED = {
    "one std": Normalised(Preprocessing((-1.0, 1.0), (0.5, 0.4, 0.3), (0.25, 0.25, 0.25)), 3),
    "imagenet": Normalised(Preprocessing((0.0, 1.0), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 3),
    "gray": Normalised(Preprocessing((0.0, 1.0), (0.13,), (0.31,), colour="L"), 1),
}


def network_input(pixels: np.ndarray, how: Preprocessing) -> np.ndarray:
    """uint8 (1, C, H, W) as the network takes it, by the definition in types.Preprocessing."""
    low, high = how.value_range
    shape = (1, -1, 1, 1)
    value = low + (high - low) * pixels.astype(np.float64) / 255
    mean, std = np.reshape(how.mean or (0.0,), shape), np.reshape(how.std or (1.0,), shape)
    return ((value - mean) / std).astype(np.float32)


@pytest.mark.parametrize("name", NORMALISED)
def test_package_takes_the_image_and_its_twin_the_network_input(name: str, tmp_path: Path) -> None:
    import onnxruntime
    import torch

    from edgegen.runtimes import _coreml_mac, _coreml_read, _coreml_twin

    how, channels = NORMALISED[name].how, NORMALISED[name].channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3, padding=1), torch.nn.Tanh()).eval()
    shape = (1, channels, 12, 10)
    ends = (TensorSpec("input", shape, value_range=how.value_range),), (TensorSpec("output", (1, 8, 12, 10)),)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    source = case(Stage("net", network, *ends), tmp_path, network_input(pixels, how), how)
    artifact = source.build(PrecisionPlan("fp32"), tmp_path / "out")
    facts = artifact.options["input"]
    spec, read = _coreml_read.read_program(artifact.path)
    kind = spec.description.input[0].type.imageType
    assert (kind.width, kind.height) == (10, 12)
    assert kind.colorSpace == (10 if channels == 1 else 20)  # GRAYSCALE, RGB in Apple's FeatureTypes.proto
    assert bool(facts["factor"]) == (name == "imagenet")
    assert is_close(source.wanted, run(artifact, source.feed), 1e-5)
    raw = _coreml_twin.translate(read, artifact.inputs, artifact.outputs, None)
    session = onnxruntime.InferenceSession(raw.SerializeToString(), providers=["CPUExecutionProvider"])
    assert is_close(source.wanted, session.run(None, {"input": pixels.astype(np.float32)})[0], 1e-5)
    back = _coreml_mac.to_pixels(source.feed, facts["pixels"])
    assert np.array_equal(back, pixels[0].transpose(1, 2, 0))


def test_latents_and_unknown_preprocessing_stay_tensors(cases: Any) -> None:
    from edgegen.runtimes._coreml_convert import pixel_plan

    graph = cases["residual"].graph
    assert pixel_plan(graph) is None
    image = dataclasses.replace(graph, preprocessing=Preprocessing())
    assert pixel_plan(image) is not None
    spec = dataclasses.replace(graph.inputs[0], value_range=None)
    assert pixel_plan(dataclasses.replace(image, inputs=(spec,))) is None
    batch = dataclasses.replace(graph.inputs[0], shape=(2, 3, 16, 16))
    assert pixel_plan(dataclasses.replace(image, inputs=(batch,))) is None


# -------------------------------------------------------------------------------------------------------- operations


def many_operations() -> Any:
    """A network that uses most of what generators and backbones use."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.group = nn.Conv2d(4, 16, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, 16)
            self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)
            self.norm, self.instance = nn.LayerNorm(16), nn.InstanceNorm2d(16, affine=True)
            self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
            self.query, self.act, self.prelu = nn.Linear(16, 48), nn.GELU(), nn.PReLU(8)
            self.tail = nn.Conv2d(32, 3, 1)

        def forward(self, x: Any) -> Any:
            x = functional.pixel_unshuffle(functional.pad(x, (2, 2, 1, 1), mode="reflect"), 2)[:, :4]
            x = functional.silu(self.group(self.first(x)))
            x = x + functional.hardswish(self.dilated(x)) * functional.leaky_relu(self.instance(x), 0.1)
            n, c, height, width = x.shape
            tokens = self.norm(x.flatten(2).transpose(1, 2))
            q, k, v = self.query(tokens).reshape(n, -1, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            heads = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + heads + torch.roll(tokens, 1, dims=1)
            x = tokens.transpose(1, 2).reshape(n, c, height, width)
            pooled = functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False).mean(dim=(2, 3), keepdim=True)
            x = x * torch.sigmoid(pooled) + functional.max_pool2d(x, 3, 1, 1)
            up = self.prelu(self.up(functional.elu(x)))
            wide = [
                functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)[:, :8],
                functional.interpolate(x, scale_factor=2, mode="nearest")[:, ::2],
                functional.softmax(up, dim=1),
                functional.normalize(up, dim=1) + torch.rsqrt(up.abs() + 1).clamp(0.1, 0.9),
            ]
            return torch.tanh(self.tail(self.act(torch.cat(wide, dim=1))))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Many().eval()


def test_translated_operations_compute_what_torch_computes(tmp_path: Path) -> None:
    ends = (TensorSpec("input", (1, 3, 14, 12)),), (TensorSpec("output", ()),)
    samples = np.random.default_rng(0).standard_normal((1, 3, 14, 12)).astype(np.float32)
    source = case(Stage("many", many_operations(), *ends), tmp_path, samples)
    for target in (PHONE, NEWER):
        artifact = source.build(PrecisionPlan("fp32"), tmp_path / "out", target)
        assert is_close(source.wanted, run(artifact, source.feed), 1e-4)
        operators = artifact.options["read_back"]["operators"]
        assert {"conv_transpose", "softmax", "layer_norm", "pixel_unshuffle"} <= set(operators)
    assert "scaled_dot_product_attention" in operators  # iOS 18


def test_problems_are_told_before_any_work(cases: Any, tmp_path: Path) -> None:
    import torch

    assert coreml.supports(cases["residual"].graph, PHONE) == []
    [problem] = coreml.supports(dataclasses.replace(cases["residual"].graph, program=None), PHONE)
    assert (problem.op, "needs the torch program" in problem.rewrite) == ("graph", True)

    class Bessel(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.special.bessel_j0(x)

    network = torch.nn.Sequential(torch.nn.ReLU(), Bessel())
    ends = (TensorSpec("input", (1, 3, 4, 4)),), (TensorSpec("output", (1, 3, 4, 4)),)
    file = program.save(Stage("odd", network, *ends), tmp_path / "odd.pt2")
    graph = Graph("odd", tmp_path / "odd.onnx", *ends, program=file)
    [problem] = coreml.supports(graph, PHONE)
    assert (problem.op, problem.layer) == ("special_bessel_j0", "1")
    assert "rewrite it" in problem.rewrite


def test_activation_that_fp16_cannot_hold_is_named(tmp_path: Path) -> None:
    import torch

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 1)).eval()
    with torch.no_grad():
        network[0].weight.fill_(5e4)
        network[2].weight.fill_(1e-5)
    ends = (TensorSpec("input", (1, 3, 4, 4), value_range=(0.0, 1.0)),), (TensorSpec("output", (1, 3, 4, 4)),)
    source = case(Stage("loud", network, *ends), tmp_path, np.ones((1, 3, 4, 4), np.float32))
    with pytest.raises(errors.RuntimeFailed, match=r"reaches 1\.5e\+05, FP16 ends at 65504"):
        source.build(FP16, tmp_path / "out")
    kept = PrecisionPlan("fp16", float_layers=("0/Conv", "2/Conv"))
    assert is_close(source.wanted, run(source.build(kept, tmp_path / "out"), source.feed), 1e-2)


def test_transposed_convolutions_alone_cannot_be_w8a8(tmp_path: Path) -> None:
    import torch

    network = torch.nn.Sequential(torch.nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1)).eval()
    ends = (TensorSpec("input", (1, 8, 4, 4)),), (TensorSpec("output", (1, 16, 8, 8)),)
    source = case(Stage("up", network, *ends), tmp_path, np.ones((2, 8, 4, 4), np.float32))
    with pytest.raises(errors.RuntimeFailed, match="convolutions and linear layers only"):
        source.build(W8A8, tmp_path / "out")


def test_placement_is_a_prediction_and_says_so(cases: Any, tmp_path: Path) -> None:
    small = coreml.placement(cases["conv_chain"].graph)
    assert (small["label"], small["place"]) == ("predicted", "CPU")
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 64, 64, 64]) for n in ("x", "y")]
    weight = onnx.numpy_helper.from_array(np.zeros((64, 64, 3, 3), np.float32), "w")
    options = {"dilations": [2, 2], "pads": [2, 2, 2, 2]}
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="wide", **options)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight]))
    onnx.save(model, tmp_path / "g.onnx")
    ends = (TensorSpec("x", (1, 64, 64, 64)),), (TensorSpec("y", (1, 64, 64, 64)),)
    found = coreml.placement(Graph("g", tmp_path / "g.onnx", *ends, plan=FP16))
    assert found["evictors"] == {"wide": "dilated convolution"}
    assert "parts on GPU or CPU" in found["place"]


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
