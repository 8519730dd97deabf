"""Networks exported for Core ML with what torch says to them, and the comparison with what a package says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import onnx_graph, program
from edgegen.runtimes import coreml
from edgegen.types import Graph, PrecisionPlan, Preprocessing, Stage, Target

PRECISIONS = ("fp32", "fp16", "int8")
PHONE = Target("phone", "", ("coreml",), precisions=PRECISIONS, threads=1, versions={"os": "iOS 17"})
NEWER = dataclasses.replace(PHONE, versions={"os": "macOS 15"})
FP16, W8A8 = PrecisionPlan("fp16"), PrecisionPlan("int8", rest="fp16")
# Largest difference as a fraction of the output's peak, random weights: sums in another order; 11 bits of mantissa in
# the weights; 8-bit steps a channel; 64 and 16 values a tensor; 8-bit steps in activations as well.
TOLERANCE = {"": 4e-3, "int8": 3e-2, "palette6": 0.1, "palette4": 0.4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph with its program, calibration folder, one input, and what torch says to it."""

    graph: Graph
    calibration: Path
    feed: np.ndarray
    wanted: np.ndarray

    def build(self, plan: PrecisionPlan, out: Path, target: Target = PHONE) -> Any:
        graph = dataclasses.replace(self.graph, plan=plan)
        return coreml.build(graph, out, calibration=self.calibration, target=target)


def case(stage: Stage, folder: Path, samples: np.ndarray, preprocessing: Preprocessing | None = None) -> Case:
    """Export a stage both ways; `samples` are network inputs."""
    import torch

    np.save(folder / f"{stage.inputs[0].name}.npy", samples)
    graph = onnx_graph.to_onnx(stage, folder / "graph.onnx")
    graph = dataclasses.replace(
        graph, program=program.save(stage, folder / "graph.pt2"), preprocessing=preprocessing
    )
    with torch.no_grad():
        wanted = stage.module(torch.from_numpy(samples[:1])).numpy()
    return Case(graph, folder, samples[:1], wanted)


def run(artifact: Any, feed: np.ndarray) -> np.ndarray:
    with coreml.load(artifact) as runner:
        return runner({artifact.inputs[0].name: feed})[artifact.outputs[0].name]


def is_close(wanted: np.ndarray, got: np.ndarray, tolerance: float) -> bool:
    """Same shape, and nowhere further apart than `tolerance` of the expected peak."""
    return wanted.shape == got.shape and float(np.abs(wanted - got).max()) <= tolerance * float(np.abs(wanted).max())


def network_input(pixels: np.ndarray, how: Preprocessing) -> np.ndarray:
    """uint8 (1, C, H, W) as the network takes it, by the definition in types.Preprocessing."""
    low, high = how.value_range
    shape = (1, -1, 1, 1)
    value = low + (high - low) * pixels.astype(np.float64) / 255
    mean, std = np.reshape(how.mean or (0.0,), shape), np.reshape(how.std or (1.0,), shape)
    return ((value - mean) / std).astype(np.float32)
