"""Rewrites of torch modules and torch programs: the same outputs, and the operation is gone from what is exported."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from edgegen import errors, onnx_graph, program, registry, rewriting
from edgegen import graph as graph_tools
from edgegen.types import Graph, Problem, Stage, Target, TensorSpec

torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional
TOLERANCE = 2e-5  # of the output's peak: float32 sums in another order
HERE = Target("here", "", ("fake",))


class Call(nn.Module):
    """A network around one function of (its parts, x)."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Any) -> Any:
        return self.function(self.parts, x)


def seeded(make: Callable[[], Any]) -> Any:
    """A network with weights and statistics that are not trivial, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
        for part in network.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.running_mean.normal_(0, 0.5)
                part.running_var.uniform_(0.5, 2)
            if "Norm" in type(part).__name__ and getattr(part, "weight", None) is not None:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return network.eval()


def exported(network: Any, shape: tuple[int, ...]) -> Any:
    """The network of an exported program."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own deprecations
        return torch.export.export(network, (torch.zeros(shape),), strict=False).module()


def sample(shape: tuple[int, ...]) -> Any:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape).astype(np.float32)) + 0.25


def operations(network: Any) -> set[str]:
    return {str(getattr(node.target, "overloadpacket", node.target)) for node in network.graph.nodes}


def is_close(wanted: Any, got: Any, tolerance: float = TOLERANCE) -> bool:
    return wanted.shape == got.shape and float((wanted - got).abs().max()) <= tolerance * float(wanted.abs().max())


def test_the_comparison_can_fail() -> None:
    x = sample((2, 3))
    assert is_close(x, x.clone())
    assert not any(is_close(x, wrong) for wrong in (2 * x, 0 * x, x[:1], x * float("nan")))


def conv(*sizes: int, **options: Any) -> Any:
    return nn.Conv2d(*sizes, **options)


def unsqueezed_gain(parts: Any, x: Any) -> Any:
    return functional.conv2d(x, parts[0].weight * 0.5, parts[0].bias)


class Modulated(nn.Module):
    """StyleGAN2's convolution (Karras et al., 2020), with the style from the image's means."""

    def __init__(self, kernel: int, up: bool = False, demodulate: bool = True, flat: bool = False):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, 6, 4, kernel, kernel)), nn.Linear(4, 4)
        self.kernel, self.up, self.demodulate, self.flat = kernel, up, demodulate, flat

    def forward(self, x: Any) -> Any:
        n, c, h, w = x.shape
        s = self.style(x.mean((2, 3))).reshape(n, 1, c, 1, 1)
        weight = 0.3 * self.weight * (s.expand(-1, -1, -1, 1, self.kernel) if self.flat else s)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(n, 6, 1, 1, 1)
        x = x.reshape(1, n * c, h, w)
        if self.up:
            weight = weight.transpose(1, 2).reshape(n * c, 6, self.kernel, self.kernel)
            out = functional.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1, groups=n)
        else:
            out = functional.conv2d(x, weight.view(n * 6, c, self.kernel, self.kernel), padding=1, groups=n)
        return out.view(n, 6, *out.shape[2:])


IMAGE = (2, 4, 7, 6)
PROGRAMS: dict[str, tuple[str, Callable[[], Any], tuple[int, ...], str]] = {
    "conv + bn": ("fold_batch_norm", lambda: nn.Sequential(conv(4, 6, 3, groups=2, stride=2, bias=False),
                  nn.BatchNorm2d(6), nn.ReLU()), IMAGE, "aten.batch_norm"),
    "transposed + bn": ("fold_batch_norm", lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2),
                        nn.BatchNorm2d(6)), IMAGE, "aten.batch_norm"),
    "bn without affine, alone": ("fold_batch_norm", lambda: nn.BatchNorm2d(4, affine=False), IMAGE, "aten.batch_norm"),
    "bn, conv is shared": ("fold_batch_norm", lambda: Call(lambda p, x: (y := p[0](x)) + p[1](y), conv(4, 6, 3),
                           nn.BatchNorm2d(6)), IMAGE, "aten.batch_norm"),
    "linear + bn": ("fold_batch_norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4),
                    "aten.batch_norm"),
    "signal": ("fold_batch_norm", lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9),
               "aten.batch_norm"),
    "spectral norm": ("fold_constant_weights", lambda: nn.utils.parametrizations.spectral_norm(conv(4, 6, 3)), IMAGE,
                      "aten.mv"),
    "weight norm": ("fold_constant_weights", lambda: nn.utils.parametrizations.weight_norm(conv(4, 6, 3)), IMAGE,
                    "aten._weight_norm"),
    "learning rate": ("fold_constant_weights", lambda: Call(unsqueezed_gain, conv(4, 6, 3)), IMAGE, "aten.mul"),
    "modulated, batch 1": ("static_modulated_convolution", lambda: Modulated(3), (1, 4, 7, 6), "aten.sum"),
    "modulated, batch 2": ("static_modulated_convolution", lambda: Modulated(3), IMAGE, "aten.sum"),
    "modulated, up": ("static_modulated_convolution", lambda: Modulated(3, up=True), IMAGE, "aten.sum"),
    "modulated, up, batch 1": ("static_modulated_convolution", lambda: Modulated(4, up=True), (1, 4, 7, 6), "aten.sum"),
    "modulated, 1x1, plain": ("static_modulated_convolution", lambda: Modulated(1, demodulate=False), IMAGE, ""),
    "instance norm": ("decompose_instance_norm", lambda: nn.InstanceNorm2d(4, affine=True), IMAGE,
                      "aten.instance_norm"),
    "group norm": ("decompose_group_norm", lambda: nn.GroupNorm(2, 4), IMAGE, "aten.group_norm"),
    "layer norm": ("decompose_layer_norm", lambda: nn.LayerNorm((7, 6)), IMAGE, "aten.layer_norm"),
    "transposed": ("subpixel_convolution", lambda: nn.ConvTranspose2d(4, 6, 4, 2, 1), IMAGE, "aten.conv_transpose2d"),
    "transposed, odd": ("subpixel_convolution", lambda: nn.ConvTranspose2d(4, 6, (5, 3), (3, 2), (1, 2), (2, 1),
                        groups=2, bias=False, dilation=(1, 2)), IMAGE, "aten.conv_transpose2d"),
    "einsum": ("einsum_to_matmul", lambda: Call(lambda p, x: torch.einsum("nchw,ncvw->nhv", x, x.relu())), IMAGE,
               "aten.einsum"),
    "einsum of three": ("einsum_to_matmul", lambda: Call(lambda p, x: torch.einsum(
        "nchw,hk,kd->ncwd", x, torch.ones(7, 3), torch.ones(3, 2))), IMAGE, "aten.einsum"),
    "unfold": ("unfold_to_convolution", lambda: nn.Unfold((3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1)),
               IMAGE, "aten.im2col"),
    "fold": ("fold_to_convolution", lambda: nn.Fold((8, 7), (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 3)),
             (2, 24, 12), "aten.col2im"),
    "fold, no batch": ("fold_to_convolution", lambda: nn.Fold((8, 8), 3, padding=1, stride=2), (18, 16), "aten.col2im"),
    "roll": ("roll_to_slices", lambda: Call(lambda p, x: torch.roll(x, (2, -9), (2, 3))), IMAGE, "aten.roll"),
    "roll, flat": ("roll_to_slices", lambda: Call(lambda p, x: torch.roll(x, 5)), IMAGE, "aten.roll"),
    "shuffle": ("decompose_pixel_shuffle", lambda: nn.PixelShuffle(2), (2, 12, 3, 5), "aten.pixel_shuffle"),
    "unshuffle": ("decompose_pixel_shuffle", lambda: nn.PixelUnshuffle(3), (2, 2, 6, 9), "aten.pixel_unshuffle"),
    **{f"bicubic {options}": ("bicubic_to_convolutions", lambda o=options: Call(
        lambda p, x: functional.interpolate(x, mode="bicubic", **o)), (2, 3, 8, 6), "aten.upsample_bicubic2d")
       for options in ({"scale_factor": 2}, {"size": (24, 12)}, {"scale_factor": 0.5}, {"size": (2, 6)},
                       {"size": (8, 18)})},
    **{f"bicubic in products {options}": ("bicubic_to_products", lambda o=options: Call(
        lambda p, x: functional.interpolate(x, mode="bicubic", **o)), (2, 3, 8, 6), "aten.upsample_bicubic2d")
       for options in ({"size": (7, 5)}, {"scale_factor": 1.5}, {"size": (12, 9), "align_corners": True})},
}  # fmt: skip
LEFT: dict[str, tuple[str, Callable[[], Any], tuple[int, ...]]] = {
    "bn in training mode": ("fold_batch_norm", lambda: Call(lambda p, x: functional.batch_norm(
        x, None, None, training=True)), IMAGE),
    "weight from the input": ("fold_constant_weights", lambda: Call(lambda p, x: functional.conv2d(x, x)), IMAGE),
    "stored statistics": ("decompose_instance_norm", lambda: nn.InstanceNorm2d(4, track_running_stats=True), IMAGE),
    "style for each column": ("static_modulated_convolution", lambda: Modulated(3, flat=True), IMAGE),
    "stride 1": ("subpixel_convolution", lambda: nn.ConvTranspose2d(4, 6, 3), IMAGE),
    "diagonal": ("einsum_to_matmul", lambda: Call(lambda p, x: torch.einsum("nnhw->nh", x[:, :2])), IMAGE),
    "align corners": ("bicubic_to_convolutions", lambda: Call(lambda p, x: functional.interpolate(
        x, scale_factor=2, mode="bicubic", align_corners=True)), IMAGE),
    "antialias": ("bicubic_to_convolutions", lambda: Call(lambda p, x: functional.interpolate(
        x, scale_factor=0.5, mode="bicubic", antialias=True)), (2, 3, 8, 6)),
    "no whole factor": ("bicubic_to_convolutions", lambda: Call(lambda p, x: functional.interpolate(
        x, scale_factor=1.7, mode="bicubic")), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("label", PROGRAMS)
def test_rewritten_program_computes_the_same(label: str) -> None:
    name, make, shape, gone = PROGRAMS[label]
    network = exported(seeded(make), shape)
    assert not gone or gone in operations(network)
    x, rewrite = sample(shape), rewriting.function(name, "program")
    with torch.no_grad():
        wanted = network(x)
        assert rewrite(network)
        assert is_close(wanted, network(x))
        again = exported(network, shape)
        assert is_close(wanted, again(x))
    assert gone not in operations(again)
    assert rewrite(again) == {}
    read = {node.target for node in again.graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in (*again.named_parameters(), *again.named_buffers())} <= read


@pytest.mark.parametrize("label", LEFT)
def test_a_near_miss_of_a_program_is_left(label: str) -> None:
    name, make, shape = LEFT[label]
    network = exported(seeded(make), shape)
    before = str(network.graph)
    assert rewriting.function(name, "program")(network) == {}
    assert str(network.graph) == before


def test_every_program_rewrite_has_a_case() -> None:
    known = {name for name in registry.names("rewrites") if rewriting.function(name, "program")}
    assert known == {case[0] for case in PROGRAMS.values()}


# ---------------------------------------------------------------------------------------------------------- modules


def old_hook(kind: str) -> Callable[[Any], Any]:
    def wrap(layer: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # torch would like the new form
            return getattr(nn.utils, kind)(layer)

    return wrap


MODULES = {
    "weight norm": ("fold_weight_norm", nn.utils.parametrizations.weight_norm),
    "weight norm, old": ("fold_weight_norm", old_hook("weight_norm")),
    "spectral norm": ("fold_spectral_norm", nn.utils.parametrizations.spectral_norm),
    "spectral norm, old": ("fold_spectral_norm", old_hook("spectral_norm")),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("label", MODULES)
def test_folded_norm_leaves_plain_weights(label: str, training: bool) -> None:
    name, wrap = MODULES[label]
    network = seeded(
        lambda: nn.Sequential(wrap(conv(4, 6, 3, groups=2)), nn.Sequential(wrap(nn.ConvTranspose2d(6, 3, 2, 2))))
    )
    x = sample(IMAGE)
    with torch.no_grad():
        wanted = network(x)
        assert network.train(training).training == training
        changed = rewriting.function(name, "module")(network)
        assert list(changed) == ["0.weight", "1.0.weight"]
        assert network.training == training
        assert is_close(wanted, network.eval()(x), 1e-6)
    assert set(network.state_dict()) == {"0.weight", "0.bias", "1.0.weight", "1.0.bias"}
    assert all(isinstance(part.weight, nn.Parameter) for part in (network[0], network[1][0]))
    assert rewriting.function(name, "module")(network) == {}
    copy.deepcopy(network).load_state_dict(network.state_dict())


@pytest.mark.parametrize("label", MODULES)
def test_folding_a_copy_leaves_the_original(label: str) -> None:
    """torch's own remove_parametrizations deletes the weight from the class, which the copies share."""
    name, wrap = MODULES[label]
    network = seeded(lambda: nn.Sequential(wrap(conv(4, 6, 3))))
    with torch.no_grad():
        wanted = network(sample(IMAGE))
        assert rewriting.function(name, "module")(graph_tools.clone(network))
        assert torch.equal(network(sample(IMAGE)), wanted)
    assert "0.weight" not in network.state_dict()


def test_another_parametrization_is_left() -> None:
    network = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))
    assert rewriting.fold_module(network) == {}
    both = nn.Sequential(nn.utils.parametrizations.weight_norm(conv(4, 4, 3)), nn.Conv2d(4, 4, 1))
    assert rewriting.fold_module(both) == {"fold_weight_norm": {"0.weight": "weight norm folded"}}
    mixed = nn.utils.parametrizations.weight_norm(nn.utils.parametrizations.spectral_norm(conv(4, 4, 3)))
    assert rewriting.fold_module(mixed) == {}


# ------------------------------------------------------------------------------------------------------------ cures


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    """Roll and a bicubic enlargement, as ONNX and as a torch program."""

    def enlarge(parts: Any, x: Any) -> Any:
        return functional.interpolate(parts[0](torch.roll(x, 2, 3)), scale_factor=2, mode="bicubic")

    stage = Stage("net", seeded(lambda: Call(enlarge, conv(4, 6, 3))), (TensorSpec("input", IMAGE),), ())
    made = onnx_graph.to_onnx(stage, tmp_path / "graph.onnx")
    return dataclasses.replace(made, program=program.save(stage, tmp_path / "graph.pt2"))


def fake_runtime(monkeypatch: pytest.MonkeyPatch, needs_program: bool) -> None:
    """A runtime that knows neither cubic resizing nor roll, and tells one problem at a time."""

    def supports(graph: Graph, target: Target) -> list[Problem]:
        if needs_program:
            network = program.load(graph.program).module()
            kinds = [(str(getattr(n.target, "overloadpacket", "")), n.name) for n in network.graph.nodes]
            cures = {"aten.roll": "roll_to_slices", "aten.upsample_bicubic2d": "bicubic_to_convolutions"}
        else:
            kinds = [(n.op_type, n.name) for n in onnx.load(graph.onnx).graph.node]
            cures = {"Resize": "bicubic_to_convolutions"}
        return [Problem(kind, name, f"try {cures[kind]}") for kind, name in kinds if kind in cures][:1]

    module = registry.module
    runtime = SimpleNamespace(supports=supports, NEEDS_PROGRAM=needs_program)
    monkeypatch.setattr(registry, "module", lambda kind, name: runtime if name == "fake" else module(kind, name))


FEEDS = {"input": sample(IMAGE).numpy()}


@pytest.mark.parametrize("needs_program", [False, True])
def test_problems_are_cured_by_the_rewrites_that_they_name(
    graph: Graph, needs_program: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    fake_runtime(monkeypatch, needs_program)
    cured = rewriting.cures(graph, "fake", HERE, feeds=FEEDS, out=tmp_path / "cured.onnx")
    wanted = {"bicubic_to_convolutions", "roll_to_slices"} if needs_program else {"bicubic_to_convolutions"}
    assert cured.problems == () and set(cured.changed) == wanted
    if needs_program:
        assert cured.graph.onnx == graph.onnx and cured.graph.program == tmp_path / "cured.pt2"
        stage = Stage("net", program.load(cured.graph.program).module(), graph.inputs, graph.outputs)
        assert onnx_graph.parity(stage, graph, FEEDS).max_rel < 1e-4
    else:
        assert cured.graph.onnx == tmp_path / "cured.onnx" and cured.graph.program is None
        assert cured.graph.macs == onnx_graph.cost(cured.graph.onnx).macs > graph.macs
    again = rewriting.cures(cured.graph, "fake", HERE, feeds=FEEDS, out=tmp_path / "again.onnx")
    assert again.graph is cured.graph and again.changed == {} and not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        ("upsample_bicubic2d", ("bicubic_to_convolutions", "bicubic_to_products")),
        ("aten.upsample_bicubic2d.vec", ("bicubic_to_convolutions", "bicubic_to_products")),
        ("aten::roll", ("roll_to_slices",)),
        ("Einsum", ("einsum_to_matmul",)),
        ("Col2Im", ("fold_to_convolution",)),
        ("aten.col2im.default", ("fold_to_convolution",)),
    ],
)
def test_a_cure_is_found_by_the_operation_that_it_removes(op: str, wanted: tuple[str, ...]) -> None:
    assert rewriting.cures_for("nowhere", [Problem(op, "", "rewrite it")]) == wanted
    assert rewriting.cures_for("nowhere", [Problem("Frobnicate", "", "rewrite it")]) == ()


def test_what_no_cure_changes_is_told(graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = registry.module
    problem = Problem("Frobnicate", "layer", "there is none")
    runtime = SimpleNamespace(supports=lambda graph, target: [problem])
    monkeypatch.setattr(registry, "module", lambda kind, name: runtime if name == "fake" else module(kind, name))
    cured = rewriting.cures(graph, "fake", HERE, feeds=FEEDS, out=tmp_path / "cured.onnx")
    assert (cured.graph, dict(cured.changed), cured.problems) == (graph, {}, (problem,))


def test_a_rewrite_that_changes_the_outputs_is_an_error(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    fake_runtime(monkeypatch, False)

    def wrong(model: onnx.ModelProto) -> dict[str, str]:
        next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Conv"
        weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
        return {"layer": "doubled"}

    monkeypatch.setattr(registry.module("rewrites", "bicubic_to_convolutions"), "bicubic_to_convolutions", wrong)
    with pytest.raises(errors.RuntimeFailed, match="differs from the model"):
        rewriting.cures(graph, "fake", HERE, feeds=FEEDS, out=tmp_path / "cured.onnx")
