"""A network that INT8 hurts, data for it, its INT8 builds, and how wrong they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgegen import data, graph, onnx_graph, registry
from edgegen.passes import _scaling, _simulate
from edgegen.types import Job, Model, PrecisionPlan, Stage, Target, TensorSpec

TARGET = Target("testbed", "", ("onnxruntime", "openvino"), precisions=("fp32", "bf16", "int8"), threads=1,
                is_host=True)  # fmt: skip
RUNTIMES = ("onnxruntime", "openvino")


class Data:
    """Images in 0..1 with what passes ask of a dataset."""

    def __init__(self, count: int = 16, shape: tuple[int, ...] = (3, 16, 16)) -> None:
        self.images = np.random.default_rng(5).random((count, *shape), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return SimpleNamespace(input=self.images[i], reference=None, label=None)

    def select(self, n: int, seed: int) -> Data:
        return self

    def train_item(self, i: int, rng: Any) -> Any:
        return self[i]


DATA = Data()


def job(**more: Any) -> Job:
    return Job(TARGET, **({"data": DATA, "threads": 1, "seed": 3} | more))


def image_model(module: nn.Module, outputs: int = 3) -> Model:
    spec = TensorSpec("input", (1, 3, 16, 16), value_range=(0.0, 1.0))
    return Model("net", "image-to-image", (Stage("main", module.eval(), (spec,), (TensorSpec("output", ()),)),))


def needy(seed: int = 0) -> Model:
    """Channels whose ranges differ a thousandfold: what one activation scale cannot hold; outputs weigh them alike."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    nn.init.uniform_(net[1].running_var, 0.5, 2)
    factor = torch.logspace(-1.5, 1.5, 8)
    for first, second in ((net[3], net[5]),):
        _scaling.scale_outputs(first, factor)
        _scaling.scale_inputs(second, 1 / factor)
    return image_model(net)


def sorted_by_class(folder: Path, count: int) -> tuple[Model, data.Dataset]:
    """A network that tells dark images from bright ones, and a folder of them, sorted by class."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    net = nn.Sequential(*layers)
    labels = np.repeat([0, 1], count // 2)
    shade = np.random.default_rng(0).integers(0, 60, (count, 16, 16, 3)) + 190 * labels[:, None, None, None]
    np.savez(folder / "sorted.npz", x=shade.astype(np.uint8), y=labels)
    model = dataclasses.replace(image_model(net), task="classification")
    outputs = (TensorSpec("output", (1, 2)),)
    model = dataclasses.replace(model, stages=(dataclasses.replace(model.stage, outputs=outputs),))
    found = data.Dataset(data.open_source(folder / "sorted.npz"), model)
    bright, dark = (torch.from_numpy(found[i].input)[None] for i in (-1, 0))
    with torch.no_grad():
        body = [net[:4](x)[0] for x in (dark, bright)]
        net[4].weight[1], net[4].weight[0] = body[1] - body[0], body[0] - body[1]
        net[4].bias[:] = -(net[4].weight @ ((body[0] + body[1]) / 2))
    return model, found


def out(model: Model, x: torch.Tensor) -> np.ndarray:
    return graph.outputs(model.stage.module, (x,))[0].numpy()


def plan_of(runtime: str) -> PrecisionPlan:
    """The INT8 plan whose sums this processor does not cut off."""
    eight = _simulate.plan_of(TARGET)
    if runtime == "onnxruntime":
        return eight
    return PrecisionPlan("int8", eight.format.replace("u8s8", ""), ranges="minmax")


def built(model: Model, runtime: str, folder: Path, plan: PrecisionPlan | None = None) -> np.ndarray:
    """Outputs of an INT8 build on the data, calibrated on the same."""
    folder.mkdir()
    np.save(folder / "input.npy", DATA.images)
    made = onnx_graph.to_onnx(model.stage, folder / "float.onnx")
    plan = plan or dataclasses.replace(plan_of(runtime), scales=model.plan.scales)
    module = registry.module("runtimes", runtime)
    artifact = module.build(
        dataclasses.replace(made, plan=plan), folder / "out", calibration=folder, target=TARGET
    )
    with module.load(artifact) as run:
        return np.concatenate([run({"input": image[None]})["output"] for image in DATA.images])


def wrong(exact: np.ndarray, found: np.ndarray) -> float:
    """Squared error relative to the power."""
    return float(np.square(exact - found).sum() / np.square(exact).sum())


def skip_without(runtime: str) -> None:
    if reason := registry.module("runtimes", runtime).missing():
        pytest.skip(reason)
