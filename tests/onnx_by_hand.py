"""ONNX files made by hand, and networks for what exporting them must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgegen.types import Graph, TensorSpec

IMAGE = TensorSpec("input", (1, 3, 16, 16))


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def onnx_file(
    path: Path, nodes: list[Any], weights: dict[str, Any], inputs: dict[str, Any], outputs: list[str]
) -> Path:
    """A hand-made ONNX file; output shapes are left to inference."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), path)
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def graph_of(path: Path, *inputs: TensorSpec) -> Graph:
    return Graph("hand", path, inputs, (TensorSpec("output", ()),))


def network(kind: str) -> Any:
    import torch
    from torch import nn

    class Shared(nn.Module):
        """One LayerNorm and one linear used twice, GELU between, attention by matrix products of activations."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            for _ in range(2):
                x = x + nn.functional.gelu(self.mix(self.norm(x)))
            return x + torch.softmax(x @ x.transpose(1, 2), -1) @ x

    class Style(nn.Module):
        """Reflection padding, affine InstanceNorm, nearest upsampling, transposed convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.pad, self.conv, self.norm = (
                nn.ReflectionPad2d(1),
                nn.Conv2d(3, 8, 3),
                nn.InstanceNorm2d(8, affine=True),
            )
            self.up, self.deconv = nn.Upsample(scale_factor=2), nn.ConvTranspose2d(8, 3, 2, 2)

        def forward(self, x: Any) -> Any:
            return self.deconv(self.up(torch.relu(self.norm(self.conv(self.pad(x))))))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"shared": Shared, "style": Style}[kind]().eval()
