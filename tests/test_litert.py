"""LiteRT: numbers equal torch's, layouts and shares are counted, promises are checked, refusals come before work."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, make_tiny

from edgegen import errors, onnx_graph, program
from edgegen.runtimes import litert
from edgegen.types import Artifact, Graph, PrecisionPlan, Stage, Target, TensorSpec

pytestmark = pytest.mark.skipif(bool(litert.cannot_build()), reason=str(litert.cannot_build()))
HERE = Target("here", "", ("litert",), precisions=("fp32", "fp16", "int8"), threads=1)
FLOAT = PrecisionPlan("fp32")
FP32 = 1e-5  # largest difference as a fraction of the peak: another order of sums


def graph_of(module: Any, shape: tuple[int, ...], folder: Path) -> Graph:
    """A module as ONNX and as a program."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        out = tuple(module.eval()(torch.zeros(shape)).shape)
    stage = Stage("net", module, (TensorSpec("input", shape),), (TensorSpec("output", out),))
    graph = onnx_graph.to_onnx(stage, folder / "graph.onnx")
    return dataclasses.replace(graph, program=program.save(stage, folder / "graph.pt2"))


def build(graph: Graph, folder: Path, plan: PrecisionPlan = FLOAT, calibration: Path | None = None) -> Any:
    made = dataclasses.replace(graph, plan=plan)
    return litert.build(made, folder / "out", calibration=calibration, target=HERE)


def run(artifact: Artifact, value: np.ndarray) -> np.ndarray:
    with litert.load(artifact) as runner:
        return runner({"input": value})["output"]


def kinds(artifact: Artifact) -> Counter[str]:
    from edgegen.runtimes import _litert_file

    return Counter(op.kind for op in _litert_file.read(artifact.path))


def apart(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference as a fraction of the peak; infinite for another shape or what is not a number."""
    if wanted.shape != got.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(wanted - got).max() / np.abs(wanted).max())


@pytest.mark.parametrize("wrong", [lambda x: 2 * x, np.zeros_like, lambda x: x[:, :-1], lambda x: x * np.nan])
def test_comparison_can_fail(wrong: Any) -> None:
    right = np.random.default_rng(0).random((1, 3, 4, 4), dtype=np.float32)
    assert apart(right, right) == 0
    assert apart(right, wrong(right)) > 0.5
    assert litert.difference(right, right) == ""
    assert litert.difference(right, wrong(right)) != "" or np.isnan(wrong(right)).any()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Graph, Artifact]]:
    """Each tiny model with its FP32 build."""
    found = {}
    for name in TINY:
        folder = tmp_path_factory.mktemp(name)
        graph = graph_of(make_tiny(name).stage.module, (1, 3, 16, 16), folder)
        found[name] = (graph, build(graph, folder))
    return found


@pytest.mark.parametrize("name", TINY)
def test_macs_and_layers_are_those_of_the_onnx_graph(name: str, tiny: Any) -> None:
    from edgegen.runtimes import _litert_file

    graph, artifact = tiny[name]
    assert sum(_litert_file.macs(op) for op in _litert_file.read(artifact.path)) == graph.macs
    found = litert.inspect(artifact)
    assert set(found.layers.values()) == {"fp32"}
    assert (found.int8_weight_share, found.int8_macs_share) == (0, 0)


def test_images_lie_channels_last_in_the_file_and_not_in_the_contract(tiny: Any) -> None:
    from ai_edge_litert.interpreter import Interpreter

    _, artifact = tiny["depthwise_generator"]
    assert artifact.options["layout"] == {"input": "NHWC", "output": "NHWC"}
    interpreter = Interpreter(model_path=str(artifact.path))
    assert tuple(interpreter.get_input_details()[0]["shape"]) == (1, 16, 16, 3)
    assert tuple(interpreter.get_output_details()[0]["shape"]) == (1, 32, 32, 3)
    assert run(artifact, np.zeros((1, 3, 16, 16), np.float32)).shape == (1, 3, 32, 32)
    assert tiny["conv_chain"][1].options["layout"] == {"input": "NHWC", "output": ""}


def test_transposes_are_counted(tmp_path: Path, tiny: Any) -> None:
    """A network that swaps rows and columns once needs one transposition; ordinary ones need none."""
    import torch
    from torch import nn

    class Swap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, (3, 1)), nn.Conv2d(4, 3, (3, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).transpose(2, 3))

    assert build(graph_of(Swap(), (1, 3, 8, 8), tmp_path), tmp_path).options["transposes"] == 1
    assert [artifact.options["transposes"] for _, artifact in tiny.values()] == [0, 0, 0]


def test_pixel_shuffle_is_one_operation(tiny: Any) -> None:
    _, artifact = tiny["depthwise_generator"]
    assert kinds(artifact)["DEPTH_TO_SPACE"] == 1
    assert not kinds(artifact).keys() & {"TRANSPOSE", "RESHAPE", "GATHER", "GATHER_ND"}
    assert artifact.options["gpu_delegate"]["eligible"]
    assert artifact.options["gpu_delegate"]["status"] == "predicted"


@pytest.mark.parametrize(
    ("changed", "promised"),
    [(PrecisionPlan("int8", ranges="minmax"), 1.0), (PrecisionPlan("fp32", weights="int8"), 0.0),
     (PrecisionPlan("fp16"), 0.0)],
    ids=["int8", "weights", "fp16"],
)  # fmt: skip
def test_a_float_file_does_not_pass_for_less(changed: PrecisionPlan, promised: float, tiny: Any) -> None:
    _, artifact = tiny["residual"]
    with pytest.raises(errors.RuntimeFailed, match="promised"):
        litert._check_promise(dataclasses.replace(artifact, plan=changed), promised)


def test_a_wrong_conversion_is_no_build(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgegen.runtimes import _litert_convert

    right = _litert_convert.reference
    monkeypatch.setattr(_litert_convert, "reference", lambda *args: [1.01 * value for value in right(*args)])
    with pytest.raises(errors.RuntimeFailed, match=r"wrong at 'output': differs from torch by 0\.0"):
        build(tiny["residual"][0], tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ranges", "peak"), [("minmax", 3.0), ("mean", 2.0)])
def test_ranges_are_those_of_the_calibration_set(ranges: str, peak: float, tiny: Any, tmp_path: Path) -> None:
    """Two samples, 0 to 1 and 0 to 3: the input's scale is 3 / 255, or 2 / 255 for the mean of extremes."""
    from ai_edge_litert.interpreter import Interpreter

    from edgegen.runtimes import _litert_file

    samples = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    samples[:, 0, 0, :2] = (0, 1)
    samples[1] *= 3
    np.save(tmp_path / "input.npy", samples)
    plan = PrecisionPlan("int8", ranges=ranges)
    artifact = build(tiny["residual"][0], tmp_path, plan, tmp_path)
    assert kinds(artifact)["QUANTIZE"] == kinds(artifact)["DEQUANTIZE"] == 1
    first = next(op for op in _litert_file.read(artifact.path) if op.kind == "QUANTIZE").outputs[0].index
    details = {d["index"]: d for d in Interpreter(model_path=str(artifact.path)).get_tensor_details()}
    assert details[first]["quantization"][0] == pytest.approx(peak / 255, rel=1e-5)


def test_unknown_weights_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=r"litert cannot build fp32 \(weights palette4\); it can build: fp32"):
        build(tiny["residual"][0], tmp_path, PrecisionPlan("fp32", weights="palette4"))


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    import torch
    from torch import nn

    conv = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        conv.weight[0, 0] = 7e4
    with pytest.raises(errors.RuntimeFailed, match="exceed 65504"):
        build(graph_of(conv, (1, 3, 8, 8), tmp_path), tmp_path, PrecisionPlan("fp16"))


def test_supports_needs_a_program_and_refuses_nothing_that_converts(tiny: Any) -> None:
    graph, _ = tiny["depthwise_generator"]
    (problem,) = litert.supports(dataclasses.replace(graph, program=None), HERE)
    assert problem.op == "graph"
    assert "torch network" in problem.rewrite
    assert litert.supports(graph, HERE) == []


def test_supports_names_operation_layer_and_cure(tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Best(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).topk(3).values

    problems = litert.supports(graph_of(nn.Sequential(nn.ReLU(), Best()), (1, 3, 8, 8), tmp_path), HERE)
    assert [(p.op, p.layer) for p in problems] == [("topk", "1")]
    assert problems[0].rewrite == "choose outside of the network"
    graph = graph_of(nn.ReLU(), (1, 3, 8, 8), tmp_path / "pool")
    stage = Stage("net", nn.AdaptiveMaxPool2d(3), graph.inputs, (TensorSpec("output", (1, 3, 3, 3)),))
    pool = litert.supports(dataclasses.replace(graph, program=program.save(stage, tmp_path / "pool.pt2")), HERE)
    assert [p.op for p in pool] == ["adaptive_max_pool2d"]
    assert "divides" in pool[0].rewrite


def test_everything_is_silent(tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    run(build(tiny["conv_chain"][0], tmp_path), np.zeros((1, 3, 16, 16), np.float32))
    assert capfd.readouterr() == ("", "")


def constructs() -> dict[str, tuple[Any, dict[str, int]]]:
    """Module, and operations that its file must hold; 0: must not hold. Batch 1, 16 channels, 10 x 10."""
    from torch import nn
    from torch.nn import functional

    class Call(nn.Module):
        def __init__(self, function: Any):
            super().__init__()
            self.function = function

        def forward(self, x: Any) -> Any:
            return self.function(x)

    def resized(**how: Any) -> Call:
        return Call(lambda x: functional.interpolate(x, **how))

    conv, back = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
    return {
        "CycleGAN's transposed convolution": (nn.ConvTranspose2d(16, 8, 3, 2, 1, 1), {"TRANSPOSE_CONV": 1}),
        "output padding of two": (nn.ConvTranspose2d(16, 8, 5, 3, 1, 2), {"TRANSPOSE_CONV": 1}),
        "dilated transposed": (nn.ConvTranspose2d(16, 8, 3, 2, 1, 1, dilation=2), {"TRANSPOSE_CONV": 1}),
        "grouped transposed": (nn.ConvTranspose2d(16, 8, 3, 2, 1, 1, groups=4), {"TRANSPOSE_CONV": 4}),
        "nearest by 2.5": (nn.Sequential(conv, resized(size=(25, 15))), {"GATHER": 2, "TRANSPOSE": 0}),
        "nearest to half": (resized(size=(5, 5)), {"GATHER": 2, "TRANSPOSE": 0}),
        "nearest-exact": (resized(scale_factor=2, mode="nearest-exact"), {"RESIZE_NEAREST_NEIGHBOR": 1}),
        "bicubic x2": (resized(scale_factor=2, mode="bicubic"), {"GATHER_ND": 0, "DEPTH_TO_SPACE": 1}),
        "bicubic down": (resized(size=(4, 7), mode="bicubic"), {"GATHER_ND": 0, "FULLY_CONNECTED": 2}),
        "antialiased": (resized(size=(5, 4), mode="bilinear", antialias=True), {"FULLY_CONNECTED": 2}),
        "instance norm": (nn.Sequential(conv, nn.InstanceNorm2d(8, affine=True), back), {"TRANSPOSE": 0}),
        "group norm": (nn.Sequential(conv, nn.GroupNorm(4, 8), nn.SiLU(), back), {"TRANSPOSE": 0}),
        "replicated edges": (nn.Conv2d(16, 8, 3, padding=1, padding_mode="replicate"), {"MIRROR_PAD": 0}),
        "circular edges": (nn.Conv2d(16, 8, 3, padding=1, padding_mode="circular"), {"CONCATENATION": 2}),
        "edges of zeros": (Call(lambda x: functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 2, 1)), {"PAD": 1}),
        "reflected edges": (nn.Sequential(nn.ReflectionPad2d((1, 2, 3, 1)), conv), {"MIRROR_PAD": 1}),
        "unshuffle": (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(64, 4, 1)), {"SPACE_TO_DEPTH": 1, "TRANSPOSE": 0}),
        "shuffle behind ReLU": (
            nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.PixelShuffle(2), back), {"GATHER": 0, "TRANSPOSE": 0}
        ),
        "shuffle alone": (nn.PixelShuffle(2), {"GATHER": 1, "TRANSPOSE": 0}),
        "GAN's first layer": (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ConvTranspose2d(16, 8, 4), nn.BatchNorm2d(8), back),
            {"FULLY_CONNECTED": 1, "CONV_2D": 1},
        ),
        "largest value": (nn.Sequential(conv, nn.AdaptiveMaxPool2d(1)), {"REDUCE_MAX": 1}),
        "constants": (Call(lambda x: x * x.new_ones(10).cumsum(0)), {"CUMSUM": 0, "MUL": 1}),
        "five dimensions": (Call(lambda x: x[:, :, None].pow(2).sum(2)), {"POW": 0}),
        # as BoTNet's relative positions: the plain converter computes it wrong
        "broadcast in five dimensions": (
            Call(lambda x: x[:, :, None].expand(-1, -1, 10, -1, -1).permute(0, 1, 3, 2, 4).contiguous().flatten(1, 2)),
            {"BROADCAST_TO": 0},
        ),
    }  # fmt: skip


QUICK = (
    "CycleGAN's transposed convolution", "nearest by 2.5", "bicubic x2", "group norm", "edges of zeros",
    "broadcast in five dimensions",
)  # fmt: skip
NAMES = (
    "CycleGAN's transposed convolution", "output padding of two", "dilated transposed", "grouped transposed",
    "nearest by 2.5", "nearest to half", "nearest-exact", "bicubic x2", "bicubic down", "antialiased", "instance norm",
    "group norm", "replicated edges", "circular edges", "edges of zeros", "reflected edges", "unshuffle",
    "shuffle behind ReLU", "shuffle alone", "GAN's first layer", "largest value", "constants", "five dimensions",
    "broadcast in five dimensions",
)  # fmt: skip


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_construct_equals_torch_and_is_made_of_few_operations(name: str, tmp_path: Path) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, counts = constructs()[name]
        x = torch.rand(1, 16, 10, 10) - 0.3
    artifact = build(graph_of(module, (1, 16, 10, 10), tmp_path), tmp_path)
    with torch.no_grad():
        wanted = module(x).numpy()
    assert apart(wanted, run(artifact, x.numpy())) <= FP32
    found = kinds(artifact)
    assert {kind: found[kind] for kind in counts} == counts


def test_every_construct_is_listed() -> None:
    assert set(constructs()) == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edsr", "cifar_resnet", "dcgan"])
def test_shipped_models(name: str, tmp_path: Path) -> None:
    import torch

    from edgegen import loading

    stage = loading.load_model(name).stage
    shape = tuple(int(d) for d in stage.inputs[0].shape)
    graph = onnx_graph.to_onnx(stage, tmp_path / "graph.onnx")
    graph = dataclasses.replace(graph, program=program.save(stage, tmp_path / "graph.pt2"))
    random = np.random.default_rng(0)
    draw = random.standard_normal if name == "dcgan" else random.random
    samples = draw((16, *shape[1:]), dtype=np.float32)
    key = graph.inputs[0].name
    np.save(tmp_path / f"{key}.npy", samples)
    with torch.no_grad():
        wanted = stage.module(torch.from_numpy(samples[:1])).numpy()
    # of the peak: FP32 rounding, then 8 bits through all layers
    for plan, limit in ((PrecisionPlan(), 1e-4), (PrecisionPlan("int8", ranges="minmax"), 0.2)):
        artifact = build(graph, tmp_path, plan, tmp_path)
        with litert.load(artifact) as runner:
            (got,) = runner({key: samples[:1]}).values()
        assert apart(wanted, got) <= limit
        assert artifact.options["transposes"] == 0
        assert artifact.options["gpu_delegate"]["refused"] == []
    found = litert.inspect(artifact)
    assert (found.int8_weight_share, found.int8_macs_share) == (1, 1)
    assert set(found.layers.values()) == {"int8"}
