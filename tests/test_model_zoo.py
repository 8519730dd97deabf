"""The generators: published sizes, export of each, refusals, and that each runs in two runtimes as in torch."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgegen import graph, loading, onnx_graph, registry  # noqa: E402
from edgegen.errors import ModelError  # noqa: E402
from edgegen.records import ModelOptions  # noqa: E402
from edgegen.types import Stage, TensorSpec  # noqa: E402

STYLE = {"latent": 16, "style": 16, "layers": 2}
IMAGE = (1, 3, 32, 32)
# name, configuration, input shape where the record does not follow the configuration
TINY: dict[str, tuple[str, dict[str, Any], tuple[int, ...] | None]] = {
    "animegan": ("animegan", {"width": 4}, IMAGE),
    "cgan": ("cgan", {"width": 8}, None),
    "cgan-index": ("cgan", {"width": 8, "label": "index"}, None),
    "cut": ("cyclegan", {"width": 4, "blocks": 1, "antialias": True}, IMAGE),
    "cyclegan": ("cyclegan", {"width": 4, "blocks": 1}, IMAGE),
    "fastgan": ("fastgan", {"size": 64, "latent": 16, "width": 2}, (1, 16)),
    "mobile_stylegan": ("mobile_stylegan", {**STYLE, "widths": [16, 16, 8]}, None),
    "pix2pix": ("pix2pix", {"width": 2, "levels": 5}, IMAGE),
    "rlfn": ("rlfn", {"channels": 8, "middle": 8, "attention": 4, "blocks": 1}, IMAGE),
    "sagan": ("sagan", {"size": 32, "latent": 8, "classes": 4, "width": 8, "attention": 16}, None),
    "stylegan2": ("stylegan2", {**STYLE, "size": 16, "width": 8}, None),
    "stylegan2-noise": ("stylegan2", {**STYLE, "size": 8, "width": 8, "noise": "input"}, None),
    "stylegan2-mapping": ("stylegan2", {**STYLE, "size": 16, "part": "mapping"}, None),
    "stylegan2-synthesis": ("stylegan2", {**STYLE, "size": 16, "width": 8, "part": "synthesis"}, None),
    "styleswin": ("styleswin", {"widths": [16, 16, 16], "style": 16, "layers": 2}, (1, 16)),
    "taesd": ("taesd", {"width": 8, "blocks": 1, "pooled": True}, (1, 4, 4, 4)),
    "ugatit": ("ugatit", {"width": 4, "blocks": 1, "size": 32}, IMAGE),
    "ugatit-light": ("ugatit", {"width": 4, "blocks": 1, "light": True}, IMAGE),
}
SLOW = ("animegan", "cgan-index", "cut", "fastgan", "stylegan2-mapping", "stylegan2-noise", "stylegan2-synthesis",
        "styleswin", "taesd", "ugatit")  # fmt: skip
CASES = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in TINY]
MINE = sorted({name for name, _, _ in TINY.values()})

# name, configuration, input shape, published parameters in millions, source
PARAMETERS = [
    ("cyclegan", {}, (1, 3, 256, 256), 11.378, "log of junyanz/pytorch-CycleGAN-and-pix2pix: [Network G]"),
    ("pix2pix", {}, (1, 3, 256, 256), 54.414, "log of junyanz/pytorch-CycleGAN-and-pix2pix: [Network G]"),
    ("animegan", {}, (1, 3, 256, 256), 2.14, "layer table of bryandlee/animegan2-pytorch, counted from its code"),
    ("rlfn", {}, (1, 3, 128, 128), 0.317, "arXiv:2205.05675, NTIRE 2022: ByteESR, which is RLFN"),
    ("stylegan2", {"size": 1024, "part": "synthesis"}, (1, 512), 28.27, "arXiv:2104.04767, section 1"),
    ("stylegan2", {"size": 256}, (1, 512), 30.03, "config F of arXiv:1912.04958 at 256, both parts"),
    ("styleswin", {"widths": (512, 512, 512, 512, 256, 128, 64, 32, 16)}, (1, 512), 40.86, "arXiv:2112.10762, table 6"),
    ("taesd", {}, (1, 4, 32, 32), 1.22, "decoder of madebyollin/taesd, counted from its code"),
]  # fmt: skip
# name, configuration, input shape, published GMACs, allowed relative difference, source, how it counts
MACS = [
    ("cyclegan", {}, (1, 3, 256, 256), 56.8, 0.001, "arXiv:2003.08936, table 1", "outputs"),
    ("stylegan2", {"size": 1024, "part": "synthesis"}, (1, 512), 143.15, 0.011, "arXiv:2104.04767, section 1",
     "outputs"),
    ("rlfn", {}, (1, 3, 256, 256), 19.70, 0.005, "arXiv:2205.05675, NTIRE 2022, ByteESR at 256x256", "all"),
    ("styleswin", {"widths": (512, 512, 512, 512, 256, 128, 64, 32, 16)}, (1, 512), 50.90, 0.035,
     "arXiv:2112.10762, table 6, by a formula of its own", "all"),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def costs(name: str, config: dict[str, Any], shape: tuple[int, ...]) -> tuple[graph.Cost, torch.nn.Module]:
    """Parameters and MACs without memory or arithmetic."""
    with torch.device("meta"):
        module = registry.module("models", name).create(**config).eval()
    return graph.cost(module, [torch.empty(shape, device="meta")]), module


def macs_of_outputs(cost: graph.Cost, module: torch.nn.Module) -> int:
    """MACs as papers often count them: layers alone, transposed convolutions at output positions, zeros included."""
    layers = {name: module.get_submodule(name) for name in cost.layers}
    return sum(
        count * (layers[name].stride[0] ** 2 if isinstance(layers[name], torch.nn.ConvTranspose2d) else 1)
        for name, count in cost.layers.items()
    )


@pytest.mark.parametrize(("name", "config", "shape", "millions", "source"), PARAMETERS, ids=lambda v: str(v)[:24])
def test_parameters_are_those_published(name, config, shape, millions, source):
    assert source
    found = costs(name, config, shape)[0].params / 1e6
    digits = len(str(millions).split(".")[1])
    assert round(found, digits) == pytest.approx(millions, abs=1.01 * 10**-digits)


@pytest.mark.parametrize(("name", "config", "shape", "giga", "allowed", "source", "how"), MACS, ids=str)
def test_macs_are_those_published(name, config, shape, giga, allowed, source, how):
    cost, module = costs(name, config, shape)
    found = macs_of_outputs(cost, module) if how == "outputs" else cost.macs
    assert found / 1e9 == pytest.approx(giga, rel=allowed), source


@pytest.mark.slow  # importing diffusers alone takes many seconds
@pytest.mark.parametrize(("config", "millions", "source"), [
    ({"channels": 3, "widths": (128, 256, 256, 256), "blocks": 2, "attention": (False, True, False, False),
      "groups": 32}, 35.7, "arXiv:2006.11239, appendix B: CIFAR-10"),
    ({"channels": 3, "widths": (192, 384, 576, 768), "blocks": 3, "attention": (False, True, True, True), "groups": 32,
      "labels": 999, "size": 64, "scale_shift": True, "resample": "resnet", "head_width": 64, "learned_sigma": True},
     295.9, "arXiv:2105.05233, appendix: 296 M for ImageNet 64 (999 + 1 classes here: no class is one of them)"),
])  # fmt: skip
def test_parameters_of_denoisers_are_those_published(config, millions, source):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        found = graph.params(registry.module("models", "ddpm_unet").create(**config))
    assert round(found / 1e6, 1) == millions, source


@pytest.mark.slow
def test_dit_xl_2_costs_what_is_published():
    pytest.importorskip("diffusers")
    config = {"channels": 4, "size": 32, "patch": 2, "layers": 28, "heads": 16, "head_width": 72, "labels": 1000}
    with torch.device("meta"):
        module = registry.module("models", "dit").create(**config, learned_sigma=True).eval()
    # diffusers gives each block the embedders of time and class, which the paper's code has once
    told = [graph.params(block.norm1.emb) for block in module.net.transformer_blocks]
    assert (graph.params(module) - sum(told[1:])) / 1e6 == pytest.approx(675, abs=0.5)  # arXiv:2212.09748, table 4
    given = [torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta"), torch.empty(1, device="meta")]
    assert graph.cost(module, given).macs / 1e9 == pytest.approx(118.6, abs=0.1)  # "Gflops" there, counted as MACs


def test_mobile_stylegan_costs_what_its_code_makes():
    # The paper states 8.01 M and 15.09 GMAC (arXiv:2104.04767, table 2). The code that was released later enlarges by
    # an inverse Haar transform without weights: 7.34 M with the heads of all sizes, 5.80 M with the last alone.
    with torch.device("meta"):
        module = registry.module("models", "mobile_stylegan").create(part="synthesis").eval()
    widths = registry.module("models", "mobile_stylegan").WIDTHS
    heads = sum(513 * width + 12 * (width + 1) for width in widths[:-1])
    assert (graph.params(module) + heads) / 1e6 == pytest.approx(7.34, abs=0.01)
    cost = graph.cost(module, [torch.empty(1, 512, device="meta")])
    assert cost.macs / 1e9 == pytest.approx(7.28, abs=0.01)


@pytest.mark.parametrize("case", CASES)
def test_runs_elsewhere_as_in_torch(case: str, tmp_path: Path):
    name, config, shape = TINY[case]
    options = ModelOptions(config=config, input_shape=shape)
    stage = loading.load_model(name, options=options, latency_only=True).stage
    with torch.no_grad():
        for parameter in stage.module.parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.5)  # shares of noise and attention that start at zero would hide a fault
    made = onnx_graph.to_onnx(stage, tmp_path / "model.onnx")
    feed = graph.example_feeds(stage.inputs, 3)
    onnx_graph.parity(stage, made, feed, atol=1e-4, rtol=1e-4)
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(made.onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    wanted = graph.outputs(stage.module, [torch.from_numpy(value) for value in feed.values()])[0].numpy()
    got = compiled(feed)[0]
    assert np.abs(got - wanted).max() <= 1e-4 + 1e-3 * np.abs(wanted).max()
    assert np.abs(wanted).std() > 1e-4 and not np.allclose(got, 2 * wanted, atol=1e-4)  # the comparison can fail


@pytest.mark.parametrize("name", sorted(set(registry.names("models"))))
def test_without_weights_a_built_in_is_refused_and_says_where_they_are(name: str):
    if (registry.folder("models") / "weights" / f"{name}.safetensors").is_file():
        assert loading.load_model(name).provenance.weights_sha256  # ships its own
        return
    record = registry.module("models", name).RECORD
    with pytest.raises(ModelError) as caught:
        loading.load_model(name)
    text = str(caught.value)
    assert "--weights FILE" in text and "--latency-only" in text and "\n" not in text
    assert record["source"] and record["source"] in text


@pytest.mark.parametrize("name", MINE)
def test_record_is_a_literal_and_complete(name: str):
    tree = ast.parse(registry.path("models", name).read_text(encoding="utf-8"))
    value = next(
        node.value for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and getattr(node.targets[0] if isinstance(node, ast.Assign) else node.target, "id", "") == "RECORD"
    )  # fmt: skip
    record = ast.literal_eval(value)
    assert record["licence"] and record["source"] and (record["paper"] or name == "taesd")
    module = registry.module("models", name)
    with torch.device("meta"):
        network = module.create().eval()
    made = graph.outputs(network, [torch.empty(record["input"]["shape"], device="meta")])[0]
    assert list(made.shape) == record["output"]["shape"]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("stylegan2", {"size": 48}, "power of two"),
        ("stylegan2", {"noise": "random"}, "noise must be one of"),
        ("mobile_stylegan", {"widths": [16, 6, 8]}, "divisible by 4"),
        ("styleswin", {"widths": [16, 24]}, "divisible by 16"),
        ("sagan", {"size": 40}, "power of two"),
        ("sagan", {"size": 32, "attention": 64}, "attention must be 0 or a power of two from 8 to 32"),
        ("cgan", {"label": "text"}, "label must be one of joined, one-hot, index"),
        ("cgan", {"size": 30}, "divisible by 4"),
        ("fastgan", {"size": 100}, "size must be one of"),
        ("pix2pix", {"levels": 3}, "levels must be at least 5"),
    ],
)
def test_a_wrong_size_is_one_line(name: str, config: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message) as caught:
        loading.load_model(name, options=ModelOptions(config=config), latency_only=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "config"), [("cgan", {"width": 8}), ("sagan", TINY["sagan"][1])])
def test_the_class_can_be_given_in_three_ways(name: str, config: dict[str, Any]):
    code = registry.module("models", name)
    networks = {}
    for label in ("joined", "one-hot", "index"):
        torch.manual_seed(0)
        networks[label] = code.create(**config, label=label).eval()
    classes = networks["joined"].classes
    z = torch.randn(2, networks["joined"].latent, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, classes - 1])
    hot = torch.nn.functional.one_hot(index, classes).float()
    with torch.no_grad():
        for embedding in (part for net in networks.values() for part in net.modules()
                          if isinstance(part, torch.nn.Embedding)):  # fmt: skip
            embedding.weight.copy_(torch.linspace(-1, 1, embedding.weight.numel()).reshape(embedding.weight.shape))
        first = networks["index"](z, index)
        assert torch.allclose(networks["one-hot"](z, hot), first, atol=1e-5)
        assert torch.allclose(networks["joined"](torch.cat((z, hot), 1)), first, atol=1e-5)
        assert not torch.allclose(networks["index"](z, index.flip(0)), first, atol=1e-3)
    with pytest.raises(ValueError, match="a class is needed"):
        networks["index"](z)


def test_index_labels_and_noise_maps_are_further_inputs_that_reach_the_image():
    def loaded(name: str, config: dict[str, Any]) -> Stage:
        return loading.load_model(name, options=ModelOptions(config=config), latency_only=True).stage

    cgan = loaded("cgan", {"width": 8, "label": "index"})
    assert cgan.inputs[1] == TensorSpec("label", (1,), "int64", (0, 9), "N")
    noisy = {**STYLE, "noise": "input", "size": 8, "width": 8}
    whole, part = loaded("stylegan2", noisy), loaded("stylegan2", {**noisy, "part": "synthesis"})
    mobile = loaded("mobile_stylegan", {**STYLE, "noise": "input", "widths": [16, 16, 8]})
    assert [spec.shape[-1] for spec in whole.inputs] == [16, 4, 8, 8] == [spec.shape[-1] for spec in part.inputs]
    assert [spec.shape[-1] for spec in mobile.inputs[1:]] == [4, 8, 8, 16, 16]
    for stage in (cgan, whole, mobile):
        feed = {name: torch.from_numpy(value) for name, value in graph.example_feeds(stage.inputs, 0).items()}
        last = stage.inputs[-1].name
        other = {**feed, last: (feed[last] + 1) % 10 if last == "label" else torch.zeros_like(feed[last])}
        with torch.no_grad():
            for parameter in stage.module.parameters():
                if parameter.numel() == 1:
                    parameter.fill_(0.5)  # the noise' share starts at zero
            assert not torch.allclose(stage.module(*feed.values()), stage.module(*other.values()), atol=1e-4)


def test_what_is_not_judged_alone_is_timed_alone():
    from edgegen import inputs
    from edgegen.errors import DataError
    from edgegen.request import Request

    small = {**STYLE, "size": 8, "width": 8}
    for name, config, said in (("stylegan2", {**small, "part": "mapping"}, r"gives \(1, 16\), which is no image"),
                               ("stylegan2", {**small, "noise": "input"}, "takes input, noise0, noise1, noise2"),
                               ("mobile_stylegan", {**STYLE, "widths": [8, 8], "part": "synthesis"}, "takes styles, "),
                               ("dit", {"channels": 4, "layers": 1}, "makes latents of 4 channels, .* to be images")):
        model = loading.load_model(name, options=ModelOptions(config=config), latency_only=True)
        request = Request(model=name, target="cpu", out=Path("out"))
        with pytest.raises(DataError, match=said + ".*, so that its quality is not judged alone: give --latency-only"):
            inputs.prepare(request, model)
        assert inputs.prepare(dataclasses.replace(request, latency_only=True), model).test is None


def test_truncation_draws_styles_to_their_mean():
    create = registry.module("models", "stylegan2").create
    torch.manual_seed(0)
    full = create(**STYLE, size=8, width=8, part="mapping")
    torch.manual_seed(0)
    half = create(**STYLE, size=8, width=8, part="mapping", truncation=0.5)
    half.average.fill_(3.0)
    z = torch.randn(4, 16)
    assert torch.allclose(half(z), 3 + 0.5 * (full(z) - 3), atol=1e-6)


def test_spectral_norm_is_for_training_and_folds_away():
    torch.manual_seed(0)
    network = registry.module("models", "sagan").create(**TINY["sagan"][1], spectral=True).train()
    z = torch.randn(2, 12)
    for _ in range(30):  # power iterations
        network(z)
    network.eval()
    weight = network.blocks[0].conv1.weight.detach().flatten(1)
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=0.02)


def test_sizes_can_be_given_on_the_command_line():
    from edgegen import cli_options

    given = cli_options.config("size=1024,light=true,widths=16:16:8,truncation=0.7,part=synthesis")
    assert given == {"size": 1024, "light": True, "widths": [16, 16, 8], "truncation": 0.7, "part": "synthesis"}
    assert cli_options.config("") is None
    with pytest.raises(ModelError, match=r"'size' is not NAME=VALUE"):
        cli_options.config("size")


@pytest.mark.parametrize(
    ("name", "config", "into", "out"),
    [
        ("dit", {"size": 16, "patch": 2, "layers": 1}, (1, 3, 16, 16), (1, 3, 16, 16)),
        ("ddpm_unet", {"size": 16, "channels": 3, "labels": 4}, (1, 3, 16, 16), (1, 3, 16, 16)),
        ("vit", {"size": 16, "depth": 1, "classes": 7}, (1, 3, 16, 16), (1, 7)),
    ],
)
def test_the_shapes_follow_the_configuration(
    name: str, config: dict[str, Any], into: tuple[int, ...], out: tuple[int, ...]
) -> None:
    model = loading.load_model(name, options=ModelOptions(config=config), latency_only=True)
    assert model.stage.inputs[0].shape == into and model.stage.outputs[0].shape == out
    assert registry.module("models", name).record() == registry.module("models", name).RECORD
    if "labels" in config:
        assert model.stage.inputs[-1].value_range == (0, 3)


def test_shipped_weights_of_other_sizes_are_not_asked_of_a_network_that_is_timed_alone() -> None:
    config = ModelOptions(config={"latent": 8})
    with pytest.raises(ModelError, match="these weights belong to another configuration"):
        loading.load_model("dcgan", options=config)
    assert loading.load_model("dcgan", options=config, latency_only=True).stage.inputs[0].shape == (1, 8)
