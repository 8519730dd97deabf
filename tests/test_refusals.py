"""Networks that some runtime, or some pass, cannot take: refused before any work, with operator, layer and cure.

Flows (pruning across an invertible layer) are in test_prune_architectures.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from edgegen import onnx_graph, program, registry, targets  # noqa: E402
from edgegen.errors import ModelError  # noqa: E402
from edgegen.types import Graph, PrecisionPlan, Problem, Stage, Target, TensorSpec  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class StateSpace(nn.Module):
    """A selective scan over the tokens of an image (Gu and Dao, 2023, Mamba, arXiv:2312.00752) as cumulative sums."""

    def __init__(self, width: int = 8, states: int = 4) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, width, 4, 4), nn.ConvTranspose2d(width, 3, 4, 4)
        self.pace, self.read, self.write = nn.Linear(width, width), nn.Linear(width, states), nn.Linear(width, states)
        self.decay = nn.Parameter(torch.arange(1.0, states + 1).repeat(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.into(x)
        tokens = maps.flatten(2).transpose(1, 2)
        pace = F.softplus(self.pace(tokens))[..., None] * 0.1  # (N, L, C, 1)
        fading = torch.cumsum(-pace * self.decay, 1)
        given = pace * tokens[..., None] * self.write(tokens)[:, :, None]
        state = torch.exp(fading) * torch.cumsum(given * torch.exp(-fading), 1)
        y = (state * self.read(tokens)[:, :, None]).sum(-1)
        return self.out(y.transpose(1, 2).reshape(maps.shape))


class Deformable(nn.Module):
    """A deformable convolution (Dai et al., 2017, arXiv:1703.06211): its sampling places depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        ops = pytest.importorskip("torchvision.ops")
        self.into, self.offset = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 3, padding=1)
        self.deformed, self.out = ops.DeformConv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.into(x))
        return self.out(self.deformed(x, self.offset(x)))


class Conditional(nn.Module):
    """CondConv (Yang et al., 2019, arXiv:1904.04971): the kernel is a mixture that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.route, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4), nn.Conv2d(8, 3, 1)
        self.experts = nn.Parameter(torch.randn(4, 8 * 8 * 3 * 3) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.into(x))
        mixture = torch.sigmoid(self.route(x.mean((2, 3))))
        kernel = (mixture @ self.experts).reshape(8, 8, 3, 3)
        return self.out(F.conv2d(x, kernel, padding=1))


class Involution(nn.Module):
    """Li et al., 2021, arXiv:2103.06255: a kernel for each place, made from that place."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.kernel, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 9, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.into(x))
        patches = F.unfold(x, 3, padding=1).reshape(x.shape[0], 8, 9, *x.shape[2:])
        return self.out((patches * self.kernel(x)[:, None]).sum(2))


class Chosen(nn.Module):
    """Tokens above a threshold go on, as many as there are (Havtorn et al., 2023, MSViT, arXiv:2307.02321)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.score, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.into(x).flatten(2).transpose(1, 2)[0]
        kept = tokens[self.score(tokens)[:, 0] > 0]
        return self.out(kept.sum(0, keepdim=True))


def stage_of(create: Callable[[], nn.Module]) -> Stage:
    torch.manual_seed(0)
    return Stage("net", create().eval(), (TensorSpec("input", (1, 3, 16, 16)),), (TensorSpec("output", ()),))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], nn.Module]], Graph]:
    made: dict[Callable[[], nn.Module], Graph] = {}

    def graph_of(create: Callable[[], nn.Module]) -> Graph:
        if create not in made:
            folder, stage = tmp_path_factory.mktemp("graph"), stage_of(create)
            graph = onnx_graph.to_onnx(stage, folder / "model.onnx")
            made[create] = dataclasses.replace(graph, program=program.save(stage, folder / "model.pt2"))
        return made[create]

    return graph_of


def refused(graph: Graph, runtime: str, **versions: str) -> list[Problem]:
    module = registry.module("runtimes", runtime)
    if absent := getattr(module, "cannot_build", module.missing)():
        pytest.skip(absent)
    return module.supports(graph, Target("t", "", (runtime,), threads=1, versions=versions))


def test_a_scan_is_refused_where_there_are_no_cumulative_sums(graphs):
    found = refused(graphs(StateSpace), "ncnn")
    assert {problem.op for problem in found} == {"CumSum"} and all(problem.layer for problem in found)
    assert all("triangular matrix" in problem.rewrite for problem in found)
    assert not refused(graphs(StateSpace), "onnxruntime")  # has it: refused where it is lacking, and only there


def test_a_deformable_convolution_is_refused_for_every_target(tmp_path: Path):
    with pytest.raises(ModelError, match=r"DeformConv at deformed is not in ONNX opset 18, so no target takes it: put"):
        onnx_graph.to_onnx(stage_of(Deformable), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_depends_on_the_input_is_refused_by_the_dla_and_not_quantized(graphs):
    from edgegen import onnx_qdq
    from edgegen.runtimes import tensorrt

    graph = graphs(Conditional)
    model = onnx.load(graph.onnx)
    computed = next(node.name for node in model.graph.node if node.op_type == "Conv" and "experts" not in node.name
                    and node.input[1] not in {tensor.name for tensor in model.graph.initializer})  # fmt: skip
    found = {problem.layer: problem for problem in tensorrt.dla(graph.onnx, targets.load("jetson-orin-nx"))}
    assert found[computed].op == "Conv" and "computed from the input" in found[computed].rewrite
    plan = PrecisionPlan("int8", "u8s8")
    quantized = onnx_qdq.quantized_nodes(model, plan)
    assert computed not in quantized and "into/Conv" in quantized
    assert not refused(graph, "onnxruntime")


def test_a_kernel_for_each_place_is_refused_where_patches_cannot_be_taken(graphs):
    found = refused(graphs(Involution), "ncnn")
    assert found and found[0].op == "Gather" and found[0].layer
    assert any("slices" in problem.rewrite for problem in found)


@pytest.mark.parametrize(("runtime", "op", "cure"), [
    ("ncnn", "NonZero", "weigh them by the mask"),
    ("executorch", "index", "take no shapes from data"),
    pytest.param("litert", "_assert_scalar", "weigh them by the mask", marks=pytest.mark.slow),
    pytest.param("coreml", "non_zero", "weigh them by the mask", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_number_of_tokens_that_depends_on_the_data_is_refused(runtime: str, op: str, cure: str, graphs):
    found = {problem.op: problem for problem in refused(graphs(Chosen), runtime)}
    assert cure in found[op].rewrite and found[op].layer
