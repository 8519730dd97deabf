"""ncnn: what pnnx loses is rewritten, what ncnn has not is refused by name, what it gets wrong is caught."""

from __future__ import annotations

import dataclasses
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_tiny

from edgegen import errors, loading, onnx_cost, onnx_files, onnx_graph, registry
from edgegen.runtimes import _ncnn_convert, _ncnn_file, _ncnn_prepare, _outputs
from edgegen.runtimes import ncnn as runtime
from edgegen.types import Graph, PrecisionPlan, Stage, Target, TensorSpec

HERE = Target("here", "", ("ncnn",), precisions=("fp32", "fp16"), threads=1)
FLOAT = PrecisionPlan()
EXACT = 1e-5  # of the peak: sums in another order

pytestmark = pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing()))


def graph_of(path: Path, nodes: list[Any], shape: tuple[int, ...], out: tuple[int, ...], **consts: Any) -> Graph:
    """An ONNX graph from `x` to `y`, of nodes given as (operator, inputs, output, attributes)."""
    made = [onnx.helper.make_node(op, i, [o], name=f"layer/{op}", **(a[0] if a else {})) for op, i, o, *a in nodes]
    values = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", shape), ("y", out))]
    stored = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in consts.items()]
    graph = onnx.helper.make_graph(made, "g", values[:1], values[1:], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx_files.tidy(model), path)
    return Graph("net", path, (TensorSpec("x", shape),), (TensorSpec("y", out),))


def reference(graph: Graph, value: np.ndarray) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(str(graph.onnx)).run(None, {graph.inputs[0].name: value})[0]


def gap(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference as a share of the peak; infinite for another shape."""
    same = wanted.shape == got.shape
    return float(np.abs(wanted - got).max() / np.abs(wanted).max()) if same else float("inf")


def built(graph: Graph, out: Path, plan: PrecisionPlan = FLOAT) -> Any:
    assert runtime.supports(graph, HERE) == []
    return runtime.build(dataclasses.replace(graph, plan=plan), out, calibration=None, target=HERE)


def run(artifact: Any, value: np.ndarray) -> np.ndarray:
    with runtime.load(artifact) as runner:
        return runner({artifact.inputs[0].name: value})[artifact.outputs[0].name]


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def test_comparison_can_fail() -> None:
    right = noise((1, 4))
    assert gap(right, right) == 0
    assert gap(right, 2 * right) == pytest.approx(1)
    assert gap(right, 0 * right) == pytest.approx(1)
    assert gap(right, right[:, :2]) > 1


S, I64 = (1, 16, 8, 12), np.int64
KEEP, DROP = {"keepdims": 1}, {"keepdims": 0}
CONSTRUCTS = [
    pytest.param([("ReduceMean", ["x", "a"], "y", KEEP)], S, (1, 1, 8, 12), {"a": I64([1])}, id="mean-channel"),
    pytest.param([("ReduceMean", ["x", "a"], "y", DROP)], S, (1, 16, 12), {"a": I64([2])}, id="mean-height"),
    pytest.param([("ReduceSum", ["x", "a"], "y", DROP)], S, (1, 16, 8), {"a": I64([-1])}, id="sum-width"),
    pytest.param([("ReduceL2", ["x", "a"], "y", KEEP)], S, (1, 1, 8, 12), {"a": I64([1])}, id="norm-channel"),
    pytest.param([("ReduceMax", ["x", "a"], "y", KEEP)], S, (1, 1, 8, 12), {"a": I64([1])}, id="max-channel"),
    pytest.param([("ReduceMin", ["x", "a"], "y", DROP)], S, (1, 16), {"a": I64([2, 3])}, id="min-plane"),
    pytest.param([("Pow", ["x", "p"], "y")], S, S, {"p": np.float32(3)}, id="cube-below-zero"),
    pytest.param([("Slice", ["x", "s", "e", "a", "t"], "y")], S, (1, 16, 4, 12),
                 {"s": I64([1]), "e": I64([99]), "a": I64([2]), "t": I64([2])}, id="every-second-row"),
    pytest.param([("Tile", ["x", "r"], "y")], S, (1, 32, 8, 24), {"r": I64([1, 2, 1, 2])}, id="tile"),
    pytest.param([("Gather", ["x", "i"], "y", {"axis": 1})], S, (1, 4, 8, 12), {"i": I64([3, 4, 5, 0])}, id="pick"),
    pytest.param([("Pad", ["x", "p"], "y", {"mode": "wrap"})], S, (1, 16, 11, 13),
                 {"p": I64([0, 0, 1, 1, 0, 0, 2, 0])}, id="circular-padding"),
    pytest.param([("Reshape", ["x", "r"], "v"), ("Transpose", ["v"], "w", {"perm": [0, 2, 4, 3, 5, 1]}),
                  ("Reshape", ["w", "q"], "y")], S, (1, 96, 16),
                 {"r": I64([1, 16, 2, 4, 3, 4]), "q": I64([1, 96, 16])}, id="windows"),
    pytest.param([("Reshape", ["x", "r"], "v"), ("Transpose", ["v"], "w", {"perm": [2, 0, 3, 1, 4]}),
                  ("Slice", ["w", "one", "two", "zero"], "k"), ("Squeeze", ["k", "zero"], "y")],
                 (1, 5, 24), (1, 2, 5, 4), {"r": I64([1, 5, 3, 2, 4]), "zero": I64([0]), "one": I64([1]),
                                            "two": I64([2])}, id="key-of-attention"),
    pytest.param([("Reshape", ["x", "r"], "v"), ("Transpose", ["v"], "w", {"perm": [2, 0, 3, 1, 4]}),
                  ("Gather", ["w", "i"], "y", {"axis": 0})],
                 (1, 5, 24), (1, 2, 5, 4), {"r": I64([1, 5, 3, 2, 4]), "i": I64(1)}, id="key-by-its-number"),
    pytest.param([("Reshape", ["x", "r"], "v"), ("InstanceNormalization", ["v", "s", "b"], "w"),
                  ("Reshape", ["w", "q"], "y")], S, S,
                 {"r": I64([1, 4, 384]), "q": I64(S), "s": np.ones(4, np.float32), "b": np.zeros(4, np.float32)},
                 id="group-norm-of-rows"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "shape", "out", "consts"), CONSTRUCTS)
def test_what_pnnx_loses_is_rewritten_exactly(
    nodes: list[Any], shape: tuple[int, ...], out: tuple[int, ...], consts: Any, tmp_path: Path
) -> None:
    """Each of these comes out wrong or unconverted when pnnx gets it as it is."""
    graph, value = graph_of(tmp_path / "g.onnx", nodes, shape, out, **consts), noise(shape)
    wanted = reference(graph, value)
    prepared = dataclasses.replace(graph, onnx=tmp_path / "prepared.onnx")
    onnx_files.write(_ncnn_prepare.prepare(onnx.load(graph.onnx)), prepared.onnx)
    assert gap(wanted, reference(prepared, value)) < EXACT
    assert gap(wanted, run(built(graph, tmp_path / "out"), value)) < EXACT


def test_prepared_networks_are_kept_without_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared once a process; another network of the same structure gets its own weights, and copies are no views."""
    nodes = [("Conv", ["x", "w"], "v"), ("ReduceMean", ["v", "a"], "y", KEEP)]
    weights = {"w": noise((33, 16, 3, 3)), "a": I64([1])}
    graph = graph_of(tmp_path / "g.onnx", nodes, S, (1, 1, 6, 10), **weights)
    model = onnx.load(graph.onnx)
    first = _ncnn_prepare.prepare(model)
    kept = first.SerializeToString(deterministic=True)
    monkeypatch.setattr(_ncnn_prepare, "_applied", lambda *_: pytest.fail("prepared again"))
    del first.graph.node[:]
    assert _ncnn_prepare.prepare(model).SerializeToString(deterministic=True) == kept
    weights["w"] = 2 * weights["w"]
    graph_of(tmp_path / "other.onnx", nodes, S, (1, 1, 6, 10), **weights)
    other = _ncnn_prepare.prepare(onnx.load(tmp_path / "other.onnx"))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in other.graph.initializer}
    assert np.array_equal(stored["w"], weights["w"])


def test_transposes_with_an_axis_less_are_exact(tmp_path: Path) -> None:
    """What is tried where pnnx loses sight of the batch: four axes in all, whatever the order of five or six."""
    for number, order in enumerate(([0, 2, 4, 3, 1], [2, 0, 3, 1, 4], [0, 1, 3, 2, 4], [3, 1, 5, 0, 4, 2])):
        sizes = (1, 3, 4, 2, 5)[: len(order)] if len(order) == 5 else (2, 3, 4, 2, 5, 3)
        out = tuple(sizes[axis] for axis in order)
        flat = (1, int(np.prod(sizes)))
        nodes = [("Reshape", ["x", "r"], "v"), ("Transpose", ["v"], "w", {"perm": order}), ("Reshape", ["w", "q"], "y")]
        graph = graph_of(tmp_path / f"{number}.onnx", nodes, flat, flat, r=I64(sizes), q=I64(flat))
        value, made = noise(flat), tmp_path / f"{number}-prepared.onnx"
        onnx_files.write(_ncnn_prepare.prepare(onnx.load(graph.onnx), 3), made)
        shapes = onnx_cost.static_shapes(onnx.load(made))
        assert max(map(len, shapes.values())) <= 4, out
        assert gap(reference(graph, value), reference(dataclasses.replace(graph, onnx=made), value)) == 0


def answers(make: Callable[[], Any], shape: tuple[int, ...], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A torch network's output on noise, as ONNX Runtime and as ncnn computes it; its weights come from a seed."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = make().eval()
        out = tuple(module(torch.zeros(shape)).shape)
    stage = Stage("network", module, (TensorSpec("x", shape),), (TensorSpec("y", out),))
    graph, value = onnx_graph.to_onnx(stage, folder / "g.onnx"), noise(shape)
    return reference(graph, value), run(built(graph, folder / "out"), value)


def test_answers_of_two_heads_are_averaged(tmp_path: Path) -> None:
    """CrossViT's: stacked along a first axis, which pnnx takes for the batch and loses."""
    import torch

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)

        def forward(self, x: Any) -> Any:
            x = self.body(x).mean((2, 3))
            return torch.stack([self.one(x), self.two(x)]).mean(0)

    assert gap(*answers(Heads, (1, 3, 16, 16), tmp_path)) < EXACT


@pytest.mark.parametrize(
    "cut",
    [np.s_[:, :, ::2, 1::2], np.s_[:, :, 1::3, 2:9:4], np.s_[:, 3::2, :5:2, :]],
    ids=["odd", "window", "channels"],
)
def test_every_nth_element(cut: Any, tmp_path: Path) -> None:
    """Of sizes that the step does not divide, from any place (LeViT takes every second token of 7)."""
    import torch

    class Cut(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Conv2d(3, 8, 1)

        def forward(self, x: Any) -> Any:
            return self.body(x)[cut] + 1

    assert gap(*answers(Cut, (1, 3, 7, 11), tmp_path)) < EXACT


def test_windows_whose_batch_pnnx_loses(tmp_path: Path) -> None:
    """Attention in windows: their number stands where the batch was, and pnnx leaves `Tensor.reshape` of five axes."""
    import torch

    class Windows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.qkv, self.out = torch.nn.Conv2d(3, 8, 2, 2), torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            x = self.patch(x).permute(0, 2, 3, 1)
            x = x.reshape(1, 2, 4, 2, 4, 8).transpose(2, 3).reshape(4, 16, 8)
            q, k, v = self.qkv(x).reshape(4, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            x = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(4, 16, 8)
            return self.out(x).reshape(1, 2, 2, 4, 4, 8).transpose(2, 3).reshape(1, 8, 8, 8)

    assert gap(*answers(Windows, (1, 3, 16, 16), tmp_path)) < EXACT


def test_shifted_windows_with_a_mask(tmp_path: Path) -> None:
    """Swin's: the image is rolled, and which windows may look where is added to five axes, a constant of six times."""
    import torch

    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.qkv, self.out = torch.nn.Conv2d(3, 8, 2, 2), torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
            self.bias, self.mask = torch.nn.Parameter(torch.randn(2, 16, 16)), torch.randn(4, 16, 16)

        def forward(self, x: Any) -> Any:
            x = torch.roll(self.patch(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
            x = x.view(1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(4, 16, 8)
            q, k, v = self.qkv(x).reshape(4, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            seen = (q @ k.transpose(-2, -1) + self.bias).view(-1, 4, 2, 16, 16) + self.mask[None, :, None]
            x = (seen.view(4, 2, 16, 16).softmax(-1) @ v).transpose(1, 2).reshape(4, 16, 8)
            x = self.out(x).view(1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(1, 8, 8, 8)
            return torch.roll(x, (2, 2), (1, 2))

    assert gap(*answers(Shifted, (1, 3, 16, 16), tmp_path)) < EXACT


@pytest.mark.parametrize("width", [16, 24])
def test_class_attention(width: int, tmp_path: Path) -> None:
    """CaiT's and XCiT's one query: in pnnx's MultiHeadAttention its packed channels are rows, past its memory."""
    import torch

    class Query(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.q, self.k, self.v, self.out = torch.nn.Conv2d(3, width, 4, 4), *(
                torch.nn.Linear(width, width) for _ in range(4)
            )

        def forward(self, x: Any) -> Any:
            x = self.patch(x).flatten(2).transpose(1, 2)
            q = self.q(x[:, 0]).unsqueeze(1).reshape(1, 1, 2, width // 2).permute(0, 2, 1, 3)
            k, v = (f(x).reshape(1, 16, 2, width // 2).permute(0, 2, 1, 3) for f in (self.k, self.v))
            one = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 1, width)
            return torch.cat([self.out(one), x[:, 1:]], 1)

    assert gap(*answers(Query, (1, 3, 16, 16), tmp_path)) < EXACT


@pytest.mark.parametrize(
    ("shape", "other", "least"),
    [((1, 4, 3, 5, 5), (1, 4, 1, 5, 5), 4), ((2, 2, 3, 5, 2, 2), (3, 1, 1, 1), 4), ((2, 3, 1, 2, 5), (), 2)],
    ids=["mask", "six-axes", "number"],
)
def test_operations_of_two_with_too_many_axes(
    shape: tuple[int, ...], other: tuple[int, ...], least: int, tmp_path: Path
) -> None:
    """Axes that are broadcast alike become one; the operation is left with no more than it must have."""
    flat = (1, int(np.prod(shape)))
    nodes = [("Reshape", ["x", "r"], "v"), ("Sub", ["c", "v"], "w"), ("Reshape", ["w", "q"], "y")]
    graph = graph_of(tmp_path / "g.onnx", nodes, flat, flat, r=I64(shape), q=I64(flat), c=noise(other))
    value, made = noise(flat), tmp_path / "prepared.onnx"
    onnx_files.write(_ncnn_prepare.prepare(onnx.load(graph.onnx), 3), made)
    prepared = onnx.load(made)
    shapes = onnx_cost.static_shapes(prepared)
    assert max(len(shapes[name]) for node in prepared.graph.node for name in node.output) == least
    assert gap(reference(graph, value), reference(dataclasses.replace(graph, onnx=made), value)) == 0
    assert gap(reference(graph, value), run(built(graph, tmp_path / "out"), value)) < EXACT


@pytest.mark.parametrize("pool", ["max", "mean", "all"])
def test_convolutions_of_each_head(pool: str, tmp_path: Path) -> None:
    """MViT's: heads stand where the batch was, and share their weights."""
    import torch

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.each = torch.nn.Conv2d(3, 12, 2, 2), torch.nn.Conv2d(4, 6, 3, 2, 1, groups=2)
            self.pool = {"max": torch.nn.MaxPool2d(2), "mean": torch.nn.AvgPool2d(2), "all": torch.nn.Identity()}[pool]

        def forward(self, x: Any) -> Any:
            x = self.pool(self.each(self.body(x).reshape(3, 4, 8, 8)))
            return x.mean((2, 3)).reshape(1, 18) if pool == "all" else x.reshape(1, 18, 2, 2)

    assert gap(*answers(Heads, (1, 3, 16, 16), tmp_path)) < EXACT


def test_plain_conversion_of_a_channel_mean_is_wrong(tmp_path: Path) -> None:
    """The reason for the rewrite, and proof that the check of outputs can fail."""
    nodes = [("ReduceMean", ["x", "a"], "y", KEEP)]
    graph = graph_of(tmp_path / "g.onnx", nodes, S, (1, 1, 8, 12), a=I64([1]))
    good = built(graph, tmp_path / "out")
    onnx_files.write(onnx.load(graph.onnx), tmp_path / "model.onnx")
    for made, kept in zip(_ncnn_convert.convert(tmp_path / "model.onnx", tmp_path), good.files[::-1]):
        kept.write_bytes(made.read_bytes())
    with pytest.raises(errors.RuntimeFailed, match=r"output 'y'.*(shape|off by)"), runtime.load(good) as runner:
        _outputs.check(runner, graph, None, 1e-2)


@pytest.mark.parametrize("wrong", [lambda y: 2 * y, np.zeros_like, lambda y: y * np.nan])
def test_check_of_outputs_fails_on_wrong_ones(wrong: Any, tmp_path: Path) -> None:
    graph = graph_of(tmp_path / "g.onnx", [("Relu", ["x"], "y")], S, S)
    _outputs.check(lambda feed: {"y": np.maximum(feed["x"], 0)}, graph, None, 1e-2)
    with pytest.raises(errors.RuntimeFailed, match=r"off by .* one of these is computed wrongly: Relu"):
        _outputs.check(lambda feed: {"y": wrong(np.maximum(feed["x"], 0))}, graph, None, 1e-2)


REFUSED = [
    pytest.param([("ArgMax", ["x"], "i", {"axis": 1}), ("Cast", ["i"], "y", {"to": 1})], (1, 1, 8, 12), {},
                 "ArgMax", "outside the network", id="argmax"),
    pytest.param([("CumSum", ["x", "a"], "y")], S, {"a": I64(1)}, "CumSum", "triangular", id="cumsum"),
    pytest.param([("Greater", ["x", "z"], "c"), ("Where", ["c", "x", "z"], "y")], S, {"z": np.float32(0)},
                 "Where", "Clip", id="where"),
    pytest.param([("Pow", ["x", "p"], "y")], S, {"p": np.float32(11)}, "Pow", "below zero", id="power"),
    pytest.param([("Resize", ["x", "", "s"], "y", {"mode": "linear", "antialias": 1})], (1, 16, 4, 6),
                 {"s": np.float32([1, 1, 0.5, 0.5])}, "Resize", "antialias", id="antialias"),
    pytest.param([("Reshape", ["x", "r"], "v"), ("Conv", ["v", "w"], "u"), ("Reshape", ["u", "q"], "y")],
                 (1, 18432, 12), {"r": I64([8, 16, 1, 12]), "q": I64([1, 18432, 12]),
                                  "w": np.zeros((2304, 16, 1, 1), np.float32)}, "Conv", "8 images", id="many-images"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "out", "consts", "op", "cure"), REFUSED)
def test_refusals_name_operator_layer_and_cure(
    nodes: list[Any], out: tuple[int, ...], consts: Any, op: str, cure: str, tmp_path: Path
) -> None:
    graph = graph_of(tmp_path / "g.onnx", nodes, S, out, **consts)
    found = {problem.op: problem for problem in runtime.supports(graph, HERE)}
    assert found[op].layer == f"layer/{op}"
    assert cure in found[op].rewrite


def test_a_batch_is_refused(tmp_path: Path) -> None:
    graph = graph_of(tmp_path / "g.onnx", [("Relu", ["x"], "y")], (2, 3, 4, 4), (2, 3, 4, 4))
    assert ["x" in p.layer and "batch to 1" in p.rewrite for p in runtime.supports(graph, HERE)] == [True]


def test_layers_that_ncnn_does_not_have_are_named(tmp_path: Path) -> None:
    """pnnx succeeds on them: they are found in the file."""
    graph = graph_of(tmp_path / "g.onnx", [("CumSum", ["x", "a"], "y")], S, S, a=I64(1))
    with pytest.raises(errors.RuntimeFailed, match=r"ncnn fp32: pnnx left .*pnnx.Expression \(.*; rewrite them"):
        runtime.build(graph, tmp_path / "out", calibration=None, target=HERE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("print('reading'); print('cannot read weights'); raise SystemExit(3)", "ended with 3 .*: cannot read weights"),
        ("import os; print('halfway', flush=True); os.kill(os.getpid(), 11)", r"crashed \(signal 11\) .*: halfway"),
        ("print('done')", "wrote no model.param and model.bin: done"),
    ],
)
def test_failing_converter_is_a_reported_result(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pnnx

    fake = tmp_path / "pnnx"
    fake.write_text(f"#!{sys.executable}\n{script}\n", encoding="utf-8")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(pnnx, "EXEC_PATH", str(fake))
    graph = graph_of(tmp_path / "g.onnx", [("Relu", ["x"], "y")], S, S)
    with pytest.raises(errors.RuntimeFailed, match=f"ncnn fp32: pnnx {told}"):
        runtime.build(graph, tmp_path / "out", calibration=None, target=HERE)


def test_only_the_two_files_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pnnx's by-products stay out of the artifact, and out of the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    graph = graph_of(tmp_path / "g.onnx", [("Relu", ["x"], "y")], S, S)
    artifact = built(graph, tmp_path / "out")
    assert [file.name for file in artifact.files] == ["model.bin", "model.param"]
    assert artifact.size_bytes == sum(file.stat().st_size for file in artifact.files)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("name", ["edsr", "cifar_resnet", "dcgan"])
def test_built_in_models(name: str, tmp_path: Path) -> None:
    """Outputs of ONNX Runtime; FP16 stores every weight of a layer in half the bytes, rounded to nearest."""
    graph = onnx_graph.to_onnx(loading.load_model(name).stage, tmp_path / "g.onnx")
    value = np.random.default_rng(0).random([int(d) for d in graph.inputs[0].shape], dtype=np.float32)
    wanted = reference(graph, value)
    wide, small = (built(graph, tmp_path / p, PrecisionPlan(p)) for p in ("fp32", "fp16"))
    assert gap(wanted, run(wide, value)) < 1e-4
    assert gap(wanted, run(small, value)) < 1e-2
    names = {layer.name for layer in onnx_cost.cost(onnx.load(graph.onnx)).layers}
    assert runtime.inspect(wide).layers == dict.fromkeys(names, "fp32")
    assert runtime.inspect(small).layers == dict.fromkeys(names, "fp16 weights, fp32")
    stored = [_ncnn_file.weights(a.path, a.path.with_suffix(".bin")) for a in (wide, small)]
    for full, half in zip(*stored):
        wanted_values = full.values.astype(np.float16) if full.large else full.values
        assert np.array_equal(half.values, wanted_values)
    assert small.size_bytes < 0.56 * wide.size_bytes


def test_what_fp16_does_not_hold_stays_fp32(tmp_path: Path) -> None:
    weight = np.full((8, 16, 1, 1), 1e6, np.float32)
    graph = graph_of(tmp_path / "g.onnx", [("Conv", ["x", "w"], "y")], S, (1, 8, 8, 12), w=weight)
    with pytest.raises(errors.RuntimeFailed, match=r"promised fp16, layers are \['fp32'\]"):
        built(graph, tmp_path / "out", PrecisionPlan("fp16"))


@pytest.mark.parametrize("kind", ["style", "vit"])
def test_normalising_and_attending_networks(kind: str, tmp_path: Path) -> None:
    """InstanceNorm, reflection padding, nearest upsampling; and attention cut as timm cuts it."""
    assert gap(*answers(_style if kind == "style" else _Vit, (1, 3, 16, 16), tmp_path)) < 1e-4


def _style() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.GELU(approximate="tanh"),
        nn.Upsample(scale_factor=2, mode="nearest"), nn.ReflectionPad2d(1), nn.Conv2d(16, 3, 3), nn.Sigmoid(),
    )  # fmt: skip


def _Vit() -> Any:
    import torch
    from torch import nn

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.norm, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 48)
            self.out, self.head, self.token = nn.Linear(16, 16), nn.Linear(16, 10), nn.Parameter(torch.randn(1, 1, 16))

        def forward(self, x: Any) -> Any:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            b, n, c = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.head((x + self.out(mixed.transpose(1, 2).reshape(b, n, c)))[:, 0])

    return Vit()


def test_two_inputs_and_two_outputs_keep_their_names(tmp_path: Path) -> None:
    values = [onnx.helper.make_tensor_value_info(n, 1, [1, 2, 3, 3]) for n in ("b", "a", "difference", "sum")]
    nodes = [onnx.helper.make_node(op, ["a", "b"], [out]) for op, out in (("Sub", "difference"), ("Add", "sum"))]
    graph = onnx.helper.make_graph(nodes, "g", values[:2], values[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    specs = [TensorSpec(value.name, (1, 2, 3, 3)) for value in values]
    artifact = built(Graph("two", tmp_path / "g.onnx", tuple(specs[:2]), tuple(specs[2:])), tmp_path / "out")
    a, b = noise((1, 2, 3, 3)), np.ones((1, 2, 3, 3), np.float32)
    with runtime.load(artifact) as runner:
        found = runner({"a": a, "b": b})
    assert np.allclose(found["difference"], a - b)
    assert np.allclose(found["sum"], a + b)


def test_damaged_weights_are_refused_before_ncnn_reads_them(tmp_path: Path) -> None:
    graph = onnx_graph.to_onnx(make_tiny("residual").stage, tmp_path / "g.onnx")
    artifact = built(graph, tmp_path / "out")
    binary = artifact.path.with_suffix(".bin")
    content = binary.read_bytes()
    for damaged, told in ((content[:-4], "ends within"), (content + b"1234", "4 bytes more"), (b"?" * 99, "unknown")):
        binary.write_bytes(damaged)
        with pytest.raises(errors.RuntimeFailed, match=f"ncnn fp32: cannot load: model.bin.*{told}"):
            run(artifact, noise((1, 3, 16, 16)))


def test_names_of_the_layer_list_are_operators() -> None:
    assert registry.module("runtimes", "ncnn") is runtime
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    from edgegen.runtimes import _ncnn_refusals

    assert known >= _ncnn_refusals._WORKING
