"""Small bundles to measure on devices: one hand-made ONNX convolution (no torch), and the edsr that ships; and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgegen import bundle, files, on_device
from edgegen.bundle import Contents, Golden
from edgegen.device_records import Record
from edgegen.devices._shell import Options
from edgegen.types import Artifact, Graph, Model, PrecisionPlan, Stage, Target, TensorSpec

HERE = Target("here", "", ("onnxruntime", "openvino"), precisions=("fp32", "bf16", "int8"), threads=1)
QUICK = on_device.Settings(rounds=6, iterations=5, warm_seconds=0.01, cold=2, limit_s=60)
WEIGHT = np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32)


def answer(x: np.ndarray) -> np.ndarray:
    """What the convolution gives, by hand: (N, 3, H, W) to the same."""
    return np.einsum("oc,nchw->nohw", WEIGHT[:, :, 0, 0], x).astype(np.float32)


def tiny(out: Path, *, runtime: str = "onnxruntime", wrong: float = 0.0, side: int = 16, **options: object) -> Path:
    """A bundle of one 1x1 convolution; `wrong` is added to its golden outputs. Any runtime name can be claimed."""
    shape = (1, 3, side, side)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("input", "output")]
    nodes = [helper.make_node("Conv", ["input", "w"], ["output"], name="conv")]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(WEIGHT, "w")])
    file = out.with_name(f"{out.name}.onnx")
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    specs = (TensorSpec("input", shape, value_range=(0.0, 1.0)),), (TensorSpec("output", shape),)
    stage = Stage("model", None, *specs)
    model = Model("net", "image-to-image", (stage,), origin={"kind": "onnx", "path": "/far/away/net.onnx"})
    settings = {"threads": 1, "execution": "sequential", "graph_optimization": "all", **options}
    artifact = Artifact(runtime, file, (file,), PrecisionPlan(), file.stat().st_size, *specs, settings, {})
    graph = Graph("model", file, *specs, macs=9 * side * side, params=9, sha256=files.sha256(file))
    x = np.random.default_rng(1).random((3, *shape[1:]), dtype=np.float32)
    golden = Golden({"input": x}, {"output": answer(x) + np.float32(wrong)}, 1e-4)
    report: dict[str, str | bytes | Path] = {"report.html": "<p>", "report.json": "{}"}
    return bundle.write(
        out, Contents(model, model, (artifact,), graph, "cpu", "seed = 0\n", (golden,), report)
    ).path


def edsr(out: Path) -> Path:
    """The edsr that ships, as an FP32 file for ONNX Runtime and one for OpenVINO; golden outputs of each."""
    from edgegen import onnx_graph, registry
    from edgegen.loading import load_model

    model = load_model("edsr")
    graph = onnx_graph.to_onnx(model.stage, out.with_name("edsr.onnx"))
    x = np.random.default_rng(0).random((2, *model.stage.inputs[0].shape[1:]), dtype=np.float32)
    built, golden = [], []
    for number, runtime in enumerate(("onnxruntime", "openvino")):
        module = registry.module("runtimes", runtime)
        artifact = module.build(graph, out.with_name(f"built-{runtime}"), calibration=None, target=HERE)
        with module.load(artifact) as run:
            outputs = np.concatenate([run({"input": one[None]})["output"] for one in x])
        built.append(artifact)
        golden.append(Golden({"input": x}, {"output": outputs}, 1e-3, number))
    report: dict[str, str | bytes | Path] = {"report.html": "<p>", "report.json": "{}"}
    contents = Contents(model, model, tuple(built), graph, "cpu", "seed = 0\n", tuple(golden), report)
    return bundle.write(out, contents).path


def made_once(folder: Path) -> Callable[..., Path]:
    """A function of (name, **how) that makes each tiny bundle once, in `folder`."""
    made: dict[str, Path] = {}

    def make(name: str, **how: object) -> Path:
        if name not in made:
            made[name] = tiny(folder / name, **how)
        return made[name]

    return make


def measured_here(*paths: Path, settings: on_device.Settings = QUICK, python: str = "") -> list[Record]:
    """Records of bundles on this host."""
    return on_device.profile(paths, "local", settings=settings, options=Options(python=python))


def script(file: Path, text: str) -> None:
    """An executable file."""
    file.write_text(text)
    file.chmod(0o755)
