"""What a network with replaced layers must survive: architecture.json and weights, ONNX, ONNX Runtime."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import nn

from edgegen import architecture, graph, onnx_graph, weights
from edgegen.types import Job, Model, Preprocessing, Stage, Target, TensorSpec

TARGET = Target("testbed", "", ("onnxruntime",), precisions=("fp32", "int8"), channel_multiple={"int8": 4})
JOB = Job(TARGET, threads=1, seed=3)


def model_of(module: nn.Module, *shape: int) -> Model:
    """A model around a module that takes (1, *shape) in 0..1."""
    x = torch.zeros(1, *shape)
    out = tuple(graph.outputs(module.eval(), [x])[0].shape)
    stage = Stage("main", module, (TensorSpec("input", (1, *shape), value_range=(0.0, 1.0)),), (TensorSpec("y", out),))
    return Model("net", "image-to-image", (stage,), Preprocessing())


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Greatest difference, relative to the greatest value of `b`; infinite for other shapes."""
    return float((a - b).abs().max() / b.abs().max()) if a.shape == b.shape else float("inf")


def survive(original: Model, new: Model, folder: Path) -> onnx.ModelProto:
    """Rebuild it from JSON and weights (bit for bit), export it and run it (1e-4); the exported model."""
    module = new.stage.module
    text = json.dumps(architecture.describe(module, original.stage.module), allow_nan=False)
    weights.save_state(module, folder / "w.safetensors")
    again = architecture.rebuild(copy.deepcopy(original.stage.module), json.loads(text)).eval()
    weights.load_into(again, weights.read_state(folder / "w.safetensors"), "w")
    x = graph.example_inputs(original.stage, seed=5)
    expected = graph.outputs(module, x)[0]
    assert torch.equal(graph.outputs(again, x)[0], expected)
    made = onnx_graph.to_onnx(new.stage, folder / "net.onnx")
    session = ort.InferenceSession(made.onnx, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x[0].numpy()})[0]
    assert far(torch.from_numpy(got), expected) < 1e-4
    return onnx.load(made.onnx)
