"""The content of bundles around one ONNX operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgegen import files
from edgegen.bundle import Contents, Golden
from edgegen.types import Artifact, Graph, Model, PrecisionPlan, Stage, TensorSpec


def file_of(folder: Path, op: str, shape: tuple[int, ...], out: tuple[int, ...], **attributes: Any) -> Path:
    """An ONNX file of one operation."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("input", shape), ("output", out))]
    graph = helper.make_graph([helper.make_node(op, ["input"], ["output"], **attributes)], "g", ends[:1], ends[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, folder / "model.onnx")
    return folder / "model.onnx"


def artifact_of(file: Path, model: Model, runtime: str = "onnxruntime") -> Artifact:
    ends = model.stage.inputs, model.stage.outputs
    size = file.stat().st_size
    return Artifact(runtime, file, (file,), PrecisionPlan(), size, *ends, {"threads": 1}, {"onnx": onnx.__version__})


def network_of(task: str, shape: tuple[int, ...], out: tuple[int, ...], **fields: Any) -> Model:
    made = TensorSpec("output", out, value_range=None if task == "classification" else (0.0, 1.0))
    stage = Stage("model", None, (TensorSpec("input", shape, value_range=(0.0, 1.0)),), (made,))
    return Model("net", task, (stage,), origin={"kind": "onnx", "path": "/far/away/net.onnx"}, **fields)


def contents_of(model: Model, original: Model, file: Path, **fields: Any) -> Contents:
    graph = Graph("model", file, model.stage.inputs, model.stage.outputs, sha256=files.sha256(file))
    x = np.random.default_rng(0).random((2, *model.stage.inputs[0].shape[1:]), dtype=np.float32)
    golden = Golden({"input": x}, {"output": np.maximum(x, 0.5)}, 1e-6)
    given = {"golden": (golden,), "report": {"report.html": "<p>", "report.json": "{}"}, "stamps": ("for a test",)}
    return Contents(model, original, (artifact_of(file, model),), graph, "cpu", "seed = 0\n", **{**given, **fields})
