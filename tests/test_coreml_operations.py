"""Core ML packages of all kinds of networks: images as inputs, every operation, what is told before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_tiny
from coreml_cases import FP16, NEWER, PHONE, W8A8, Case, case, is_close, network_input, run

from edgegen import errors, program
from edgegen.runtimes import coreml
from edgegen.types import Graph, PrecisionPlan, Preprocessing, Stage, TensorSpec

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'edgegen[coreml]'")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    samples = np.random.default_rng(0).random((8, 3, 16, 16), dtype=np.float32)
    names = ("conv_chain", "residual")
    return {name: case(make_tiny(name).stage, tmp_path_factory.mktemp(name), samples) for name in names}


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
            up = self.prelu(self.up(functional.elu(x + torch.full_like(x, 0.25))))
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
        assert {"conv_transpose", "softmax", "layer_norm", "pixel_unshuffle", "fill_like"} <= set(operators)
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
