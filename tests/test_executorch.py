"""ExecuTorch: rewrites for the delegate are exact, the .pte is read back, what runs outside the delegate is named."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tiny

from edgegen import errors, onnx_cost, onnx_graph, program, rewriting
from edgegen.runtimes import _executorch_axes, _executorch_file, _executorch_lower, _executorch_rewrite
from edgegen.runtimes import executorch as runtime
from edgegen.types import Graph, PrecisionPlan, Stage, Target, TensorSpec

HERE = Target("here", "", ("executorch",), precisions=("fp32", "fp16", "int8"), threads=1)
IMAGE = (1, 3, 8, 12)

pytestmark = pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing()))


def stage_of(module: Any, shape: tuple[int, ...] = IMAGE) -> Stage:
    import torch

    with torch.no_grad():
        out = tuple(module.eval()(torch.zeros(shape)).shape)
    return Stage("net", module, (TensorSpec("input", shape),), (TensorSpec("output", out),))


def graph_of(stage: Stage, folder: Path) -> Graph:
    """ONNX file and torch program of a stage, with eight calibration samples beside them."""
    samples = np.random.default_rng(0).random((8, *stage.inputs[0].shape[1:]), dtype=np.float32)
    np.save(folder / "input.npy", samples)
    return graph_of_any(stage, folder)


def graph_of_any(stage: Stage, folder: Path) -> Graph:
    """ONNX file and torch program of a stage."""
    graph = onnx_graph.to_onnx(stage, folder / "graph.onnx")
    return dataclasses.replace(graph, program=program.save(stage, folder / "program.pt2"))


def seeded(make: Any) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
        for part in module.modules():
            if getattr(part, "affine", False) or isinstance(part, torch.nn.LayerNorm):
                torch.nn.init.normal_(part.weight, 1, 0.3)
                torch.nn.init.normal_(part.bias)
    return module.eval()


def gap(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference as a share of the peak; infinite for another shape."""
    return float(np.abs(wanted - got).max() / np.abs(wanted).max()) if wanted.shape == got.shape else float("inf")


def test_comparison_can_fail() -> None:
    right = np.arange(1.0, 5.0)
    assert gap(right, right) == 0
    assert min(gap(right, 2 * right), gap(right, 0 * right), gap(right, right[:2])) >= 1


def _windows(x: Any) -> Any:
    """Images to windows of 2 x 6 with the channels in front, over seven axes, as Swin has it."""
    return x.reshape(1, 1, 3, 4, 2, 2, 6).permute(0, 3, 5, 1, 2, 4, 6).reshape(8, 3, 12)


def _trained(norm: Any) -> Any:
    """With statistics that are not 0 and 1."""
    import torch

    norm.running_mean.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    norm.running_var.copy_(torch.tensor([0.3, 2.0, 9.0]))
    return norm.eval()


def _functions() -> dict[str, Any]:
    import torch
    from torch.nn import functional

    return {
        "reflect": lambda x: functional.pad(x, (1, 2, 3, 0), mode="reflect"),
        "replicate": lambda x: functional.pad(x, (1, 2, 3, 0), mode="replicate"),
        "circular": lambda x: functional.pad(x, (1, 2, 3, 0), mode="circular"),
        "crop": lambda x: functional.pad(x, (-1, 2, 0, -3)),
        "softmax_of_an_image": lambda x: functional.softmax(x, -1),
        "global_max": lambda x: functional.adaptive_max_pool2d(x, 1),
        "instance_norm": torch.nn.InstanceNorm2d(3, affine=True),
        "instance_norm_plain": torch.nn.InstanceNorm2d(3),
        "group_norm": torch.nn.GroupNorm(3, 3),
        "batch_norm_plain": _trained(torch.nn.BatchNorm2d(3, affine=False)),
        "nearest": lambda x: functional.interpolate(x, scale_factor=(2, 3), mode="nearest"),
        "attention": lambda x: functional.scaled_dot_product_attention(x, x * 2, x + 1),
        "attention_scaled": lambda x: functional.scaled_dot_product_attention(x, x * 2, x + 1, scale=0.3),
        "matmul": lambda x: x @ x.transpose(-1, -2),
        "unbind": lambda x: x.unbind(2)[1] + x.unbind(2)[3],
        "select": lambda x: x[:, :, -1],
        "windows": _windows,
        "expand": lambda x: x.expand(1, -1, -1, -1) * 2,
    }


@pytest.mark.parametrize("name", [*(() if runtime.missing() else _functions())])
def test_rewrites_for_the_delegate_are_exact(name: str) -> None:
    """The rewritten operation is gone and its numbers are the same, to rounding."""
    import torch

    function = _functions()[name]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = function if isinstance(function, torch.nn.Module) else torch.nn.Identity()

        def forward(self, x: Any) -> Any:
            return self.part(x + 0.5) if isinstance(function, torch.nn.Module) else function(x + 0.5)

    module, value = seeded(Net), torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), _executorch_lower.quiet():
        traced = torch.export.export(module, (value,)).module()
        before = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
        assert _executorch_rewrite.rewrite(traced)
        after = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
        assert before - after or name in ("crop", "softmax_of_an_image", "windows")  # on another shape
        assert gap(module(value).numpy(), traced(value).numpy()) < 1e-5


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_large_norms_are_means_of_means(last: bool) -> None:
    """XNNPACK adds in float32, one after another: no mean may be over millions of values."""
    import torch

    module = seeded(lambda: torch.nn.GroupNorm(1, 4))
    value = torch.randn((1, 4, 160, 160), generator=torch.Generator().manual_seed(1)) + 3
    value = value.to(memory_format=torch.channels_last) if last else value
    with torch.no_grad(), _executorch_lower.quiet():
        traced = torch.export.export(module, (value,)).module()
        assert _executorch_rewrite.rewrite(traced)
        again = torch.export.export(traced, (value,)).module()
        means = [node for node in again.graph.nodes if str(node.target) == "aten.mean.dim"]
        areas = [node.args[0].meta["val"].shape[-2:].numel() for node in means]
        assert len(means) == 4
        assert max(areas) < 1000 < 4 * 160 * 160
        assert gap(module(value).numpy(), again(value).numpy()) < 1e-5


@pytest.mark.parametrize(
    ("shape", "order", "wanted"),
    [
        ((2, 3, 4), (0, 1, 2), ([24], [0])),
        ((2, 3, 4), (2, 0, 1), ([6, 4], [1, 0])),
        ((1, 8, 8, 1, 8, 2, 32), (0, 1, 3, 5, 2, 4, 6), ([8, 64, 2, 32], [0, 2, 1, 3])),
        ((3, 4, 8, 4, 8, 2, 32), (0, 1, 3, 5, 2, 4, 6), ([12, 8, 4, 8, 2, 32], [0, 2, 4, 1, 3, 5])),
        ((1, 1), (1, 0), ([], [])),
    ],
)
def test_axes_that_stay_neighbours_are_one(shape: Any, order: Any, wanted: Any) -> None:
    import torch

    assert _executorch_axes._joined(list(shape), list(order)) == wanted
    value, (sizes, places) = torch.arange(float(np.prod(shape))), wanted
    turned = value.reshape(sizes).permute(places).reshape([shape[axis] for axis in order])
    assert torch.equal(turned, value.reshape(shape).permute(order))


def test_windows_have_no_more_axes_than_the_delegate() -> None:
    import torch

    class Net(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return _windows(x) * 2

    with _executorch_lower.quiet():
        traced = torch.export.export(Net(), (torch.zeros(IMAGE),)).module()
        assert not all(map(_executorch_axes.fits, traced.graph.nodes))
        assert _executorch_rewrite.rewrite(traced)
        again = torch.export.export(traced, (torch.zeros(IMAGE),)).module()
    assert all(map(_executorch_axes.fits, again.graph.nodes))


def test_what_needs_no_rewrite_is_left_alone() -> None:
    import torch

    with _executorch_lower.quiet():
        traced = torch.export.export(make_tiny("residual").stage.module, (torch.zeros(1, 3, 16, 16),)).module()
    assert not _executorch_rewrite.rewrite(traced)


def _style() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="nearest"), nn.ReflectionPad2d(1), nn.Conv2d(8, 3, 3), nn.Sigmoid(),
    )  # fmt: skip


@pytest.mark.slow
def test_a_style_network_runs_wholly_in_the_delegate(tmp_path: Path) -> None:
    """Reflection, instance norm and nearest upsampling each leave it otherwise; INT8 leaves the norm in float."""
    import torch

    stage = stage_of(seeded(_style))
    graph = graph_of(stage, tmp_path)
    value = np.load(tmp_path / "input.npy")[:1]
    with torch.no_grad():
        wanted = stage.module(torch.from_numpy(value)).numpy()
    names = {layer.name for layer in onnx_cost.cost(graph.onnx).layers}
    for plan, tolerance in ((PrecisionPlan(), 1e-5), (PrecisionPlan("int8", ranges="minmax"), 0.1)):
        asked = dataclasses.replace(graph, plan=plan)
        artifact = runtime.build(asked, tmp_path / plan.precision, calibration=tmp_path, target=HERE)
        assert (artifact.options["delegated_share"], artifact.options["undelegated"]) == (1, [])
        with runtime.load(artifact) as run:
            assert gap(wanted, run({"input": value})["output"]) < tolerance
        assert runtime.inspect(artifact).layers == dict.fromkeys(names, plan.precision)


@pytest.mark.slow
def test_kernels_outside_the_delegate_are_named(tmp_path: Path) -> None:
    """A layer norm runs outside; the file has exactly that kernel, and MACs and weights are those of the graph."""
    from torch import nn

    stage = stage_of(seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 4))), (1, 5, 12))
    graph = graph_of(stage, tmp_path)
    artifact = runtime.build(graph, tmp_path / "out", calibration=None, target=HERE)
    assert artifact.options["undelegated"] == [{"op": "native_layer_norm", "layer": "1", "count": 1}]
    content = _executorch_file.read(artifact.path)
    assert content.kernels == ("native_layer_norm",)
    assert content.delegated_share == content.delegated / (content.delegated + 1) < 1
    assert sum(layer.macs for layer in content.layers) == graph.macs == 5 * 16 * (12 + 4)
    assert sum(layer.weight_bytes for layer in content.layers) == 4 * 16 * (12 + 4)


@pytest.mark.slow
def test_patterns_that_are_skipped_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowering without looking for attention and bilinear resizing gives the same bytes."""
    graph = graph_of(make_tiny("residual").stage, tmp_path)
    fast = _executorch_lower.lower(graph, None, "xnnpack").content
    monkeypatch.setattr(_executorch_lower, "_needed_patterns", lambda exported: contextlib.nullcontext())
    assert _executorch_lower.lower(graph, None, "xnnpack").content == fast


@pytest.mark.slow
def test_threads_are_set(tmp_path: Path) -> None:
    from executorch.extension.pybindings import portable_lib

    artifact = runtime.build(
        graph_of(make_tiny("residual").stage, tmp_path), tmp_path / "out", calibration=None, target=HERE
    )
    for count in (2, 1):
        options = {**artifact.options, "threads": count}
        with runtime.load(dataclasses.replace(artifact, options=options)):
            assert portable_lib._threadpool_get_thread_count() == count


def test_without_a_program_it_is_refused(tmp_path: Path) -> None:
    graph = onnx_graph.to_onnx(make_tiny("residual").stage, tmp_path / "graph.onnx")
    (problem,) = runtime.supports(graph, HERE)
    assert problem.op == "graph"
    assert "give the model as a torch network, not as .onnx" in problem.rewrite


def test_shapes_from_data_are_refused_by_name(tmp_path: Path) -> None:
    import torch

    class Net(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x[x > 0].sum()

    stage = Stage("net", Net(), (TensorSpec("input", (4,)),), ())
    graph = Graph("net", tmp_path, stage.inputs, (), program=program.save(stage, tmp_path / "program.pt2"))
    assert [p for p in runtime.supports(graph, HERE) if p.op == "index" and "fix the input shapes" in p.rewrite]


def test_operations_that_fail_when_they_run_are_refused(tmp_path: Path) -> None:
    from torch import nn

    graph = graph_of(stage_of(seeded(lambda: nn.Sequential(nn.Conv3d(2, 2, 1))), (1, 2, 3, 3, 3)), tmp_path)
    (problem,) = runtime.supports(graph, HERE)
    assert (problem.op, problem.layer) == ("conv3d", "0")


def _folding() -> Any:
    from torch import nn

    return seeded(lambda: nn.Sequential(nn.Unfold(3, padding=1, stride=2), nn.Fold((8, 12), 3, padding=1, stride=2)))


def test_fold_with_padding_is_refused(tmp_path: Path) -> None:
    """ExecuTorch cuts the padding off by padding with less than nothing, which fails when it runs."""
    (problem,) = runtime.supports(graph_of(stage_of(_folding()), tmp_path), HERE)
    assert (problem.op, problem.layer) == ("col2im", "1")
    assert rewriting.cures_for("executorch", [problem])[0] == "fold_to_convolution"


@pytest.mark.slow
def test_fold_with_padding_is_cured(tmp_path: Path) -> None:
    made = _folding()
    graph, feeds = graph_of(stage_of(made), tmp_path), {"input": np.load(tmp_path / "input.npy")[:1]}
    cured = rewriting.cures(graph, "executorch", HERE, feeds=feeds, out=tmp_path / "cured.pt2")
    assert (list(cured.changed), cured.problems) == (["fold_to_convolution"], ())
    artifact = runtime.build(cured.graph, tmp_path / "out", calibration=None, target=HERE)
    with runtime.load(artifact) as run:
        assert gap(made(_tensor(feeds["input"])).numpy(), next(iter(run(feeds).values()))) < 1e-6


@pytest.mark.slow
def test_more_axes_than_the_delegate_has_stay_outside_of_it(tmp_path: Path) -> None:
    """XNNPACK has six: with more in it a file is built without a word, and cannot be loaded."""
    import torch

    class Net(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            apart = (x + 1).reshape(1, 3, 2, 2, 2, 2, 2, 3)
            return (apart * 2).permute(0, 7, 6, 5, 4, 3, 2, 1).reshape(1, 3, 8, 12) + x

    graph = graph_of(stage_of(Net()), tmp_path)
    artifact = runtime.build(graph, tmp_path / "out", calibration=None, target=HERE)
    assert {row["op"] for row in artifact.options["undelegated"]} >= {"permute_copy"}
    feeds = {"input": np.load(tmp_path / "input.npy")[:1]}
    with runtime.load(artifact) as run:
        assert gap(Net()(_tensor(feeds["input"])).numpy(), next(iter(run(feeds).values()))) < 1e-6
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.RuntimeFailed, match="cannot load"):
        patch.setattr(_executorch_axes, "fits", lambda node: True)
        runtime.build(graph, tmp_path / "wrong", calibration=None, target=HERE)


def _tensor(value: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(value)


@pytest.mark.slow
def test_groups_that_wait_for_each_other_are_taken_apart(tmp_path: Path) -> None:
    """ExecuTorch ends with "found dependency cycles" on StyleGAN2 of any size."""
    import torch

    from edgegen import graph as graphs
    from edgegen import loading, records

    options = records.ModelOptions(config={"size": 8})
    model = loading.load_model("stylegan2", options=options, latency_only=True)
    artifact = runtime.build(graph_of_any(model.stage, tmp_path), tmp_path / "out", calibration=None, target=HERE)
    generator = torch.Generator().manual_seed(0)
    feeds = [graphs.example_input(spec, generator) for spec in model.stage.inputs]
    with torch.no_grad(), runtime.load(artifact) as run:
        found = run({spec.name: x.numpy() for spec, x in zip(model.stage.inputs, feeds, strict=True)})
        assert gap(model.stage.module(*feeds).numpy(), next(iter(found.values()))) < 1e-4


@pytest.mark.slow
def test_softmax_over_the_width_of_an_image_is_right(tmp_path: Path) -> None:
    """XNNPACK's delegate of 1.5.1 is off by most of the peak after a convolution; the check of outputs finds that."""
    from torch import nn

    graph = graph_of(stage_of(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(-1)))), tmp_path)
    runtime.build(graph, tmp_path / "out", calibration=None, target=HERE)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.RuntimeFailed, match=r"off by .* Conv, Softmax"):
        patch.setattr(_executorch_rewrite, "rewrite", lambda module: False)
        runtime.build(graph, tmp_path / "wrong", calibration=None, target=HERE)


def target(delegate: str) -> Target:
    return dataclasses.replace(HERE, versions={"delegate": delegate, "os": "iOS 17"})


def test_unknown_delegates_are_refused() -> None:
    with pytest.raises(errors.TargetError, match="unknown ExecuTorch delegate 'metal'; there are: xnnpack, vulkan"):
        runtime.plans(target("metal"), frozenset())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # coremltools leaves folders to Python
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("delegate", "backend"), [("vulkan", "VulkanBackend"), ("coreml", "CoreMLBackend")])
def test_files_for_other_delegates_are_lowered_here_and_checked_by_their_twin(
    delegate: str, backend: str, tmp_path: Path
) -> None:
    import torch

    if delegate == "coreml":
        pytest.importorskip("coremltools")
    stage = make_tiny("residual").stage
    graph = graph_of(stage, tmp_path)
    value = np.load(tmp_path / "input.npy")[:1]
    with torch.no_grad():
        wanted = stage.module(torch.from_numpy(value)).numpy()
    assert runtime.plans(target(delegate), frozenset()) == (PrecisionPlan("fp32"), PrecisionPlan("fp16"))
    for plan, tolerance in ((PrecisionPlan(), 1e-5), (PrecisionPlan("fp16"), 1e-2)):
        asked = dataclasses.replace(graph, plan=plan)
        artifact = runtime.build(asked, tmp_path / plan.precision, calibration=None, target=target(delegate))
        assert _executorch_file.read(artifact.path).delegates == (backend,)
        assert artifact.options["undelegated"] == []
        assert artifact.size_bytes == artifact.path.stat().st_size
        assert runtime.twin(artifact).runtime == artifact.options["twin"] == "onnxruntime"
        with runtime.load(artifact) as run:
            assert gap(wanted, run({"input": value})["output"]) < tolerance
