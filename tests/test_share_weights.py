"""share_weights: which blocks share, that the file has the weights once, and what it says of speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from swap_checks import JOB, model_of, survive
from torch import nn

from edgegen import graph, onnx_graph, onnx_qdq
from edgegen.passes.share_weights import candidates, share_weights
from edgegen.types import Model, PrecisionPlan


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x)).relu()


def _net() -> nn.Module:
    """Four blocks; the second and the third nearly have the same weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Block() for _ in range(4)), nn.Conv2d(8, 3, 1))
    net[3].conv.weight.data.copy_(net[2].conv.weight + 0.01)
    for block in list(net)[1:5]:
        block.norm.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture
def model() -> Model:
    return model_of(_net(), 3, 8, 8)


def _kernels(model: onnx.ModelProto) -> int:
    """How many 3x3 kernels of eight channels the file holds."""
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)  # all folded, shared or not
    return sum(tuple(t.dims) == (8, 8, 3, 3) for t in model.graph.initializer)


def test_the_nearest_neighbours_share_their_mean(model: Model, tmp_path: Path) -> None:
    result = share_weights(model, JOB, ratio=0.34)  # one of the three that could
    new, old = result.model.stage.module, model.stage.module
    assert result.notes["groups"] == [["2", "3"]] and new[2] is new[3] and new[1] is not new[2]
    assert torch.allclose(new[2].conv.weight, (old[2].conv.weight + old[3].conv.weight) / 2)
    assert torch.allclose(new[2].norm.running_var, (old[2].norm.running_var + old[3].norm.running_var) / 2)
    assert set(result.changed) == {"2.conv", "3.conv"} and "size only" in result.changed["2.conv"]
    assert result.skipped["1.conv"] == "its block keeps its weights" and "in no block" in result.skipped["0"]
    assert result.needs_recovery and result.notes["macs_after"] == result.notes["macs_before"]
    assert result.notes["gain"] == "size only; latency stays"
    assert graph.params(old) - graph.params(new) == graph.params(old[2])
    assert _kernels(survive(model, result.model, tmp_path)) == 3
    assert _kernels(onnx_graph_of(model, tmp_path)) == 4


def onnx_graph_of(model: Model, folder: Path) -> onnx.ModelProto:
    return onnx.load(onnx_graph.to_onnx(model.stage, folder / "before.onnx").onnx)


def test_given_groups_share_and_others_do_not(model: Model) -> None:
    result = share_weights(model, JOB, groups=[["1", "4"]])
    new = result.model.stage.module
    assert new[1] is new[4] and set(result.changed) == {"1.conv", "4.conv"}
    assert share_weights(model, JOB, ratio=0.99, skip=["1"]).notes["groups"] == [["2", "3", "4"]]
    assert not share_weights(model, JOB, ratio=0.0).changed


def test_own_norms_stay_but_then_the_kernel_is_in_the_file_twice(model: Model, tmp_path: Path) -> None:
    """The batch norm is folded into the kernel at export; that is why `norms` is on by default."""
    result = share_weights(model, JOB, groups=[["2", "3"]], norms=False)
    new = result.model.stage.module
    assert new[2].conv is new[3].conv and new[2].norm is not new[3].norm
    assert _kernels(survive(model, result.model, tmp_path)) == 4


def test_blocks_that_differ_cannot_share() -> None:
    net = nn.Sequential(Block(8), nn.Conv2d(8, 6, 1), Block(6), Block(6), nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()))
    net[3].norm.eps = 1e-3  # another setting
    assert candidates(net) == []
    model = model_of(net, 8, 8, 8)
    assert "in no block" in share_weights(model, JOB).skipped["0.conv"]
    two = model_of(nn.Sequential(Block(), Block(), nn.Conv2d(8, 4, 1), Block(4), Block(4)), 8, 8, 8)
    with pytest.raises(ValueError, match="differ in shapes or settings and cannot share"):
        share_weights(two, JOB, groups=[["0", "3"]])


def test_an_int8_build_has_the_weights_once_too(tmp_path: Path) -> None:
    """Q/DQ of ONNX Runtime: in the three blocks that share, one kernel in INT8."""
    model = model_of(_net(), 3, 8, 8)
    counts = []
    for name, each in (("before", model), ("after", share_weights(model, JOB, ratio=0.99).model)):
        made = onnx_graph.to_onnx(each.stage, tmp_path / f"{name}.onnx")
        np.save(tmp_path / "input.npy", np.random.default_rng(0).random((4, 3, 8, 8), np.float32))
        plan = PrecisionPlan("int8", "u8s8")
        file = onnx_qdq.insert_qdq(made, tmp_path / f"{name}.int8.onnx", calibration=tmp_path, plan=plan).onnx
        kernels = [t for t in onnx.load(file).graph.initializer if tuple(t.dims) == (8, 8, 3, 3)]
        assert all(numpy_helper.to_array(tensor).dtype == np.int8 for tensor in kernels)
        counts.append(len(kernels))
    assert counts == [4, 2]
