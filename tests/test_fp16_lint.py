"""FP16 range lint: a network whose variance overflows FP16 is named layer by layer, and close to FP32 once kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from edgegen import errors, fp16_lint, onnx_graph
from edgegen.types import Graph, Stage, TensorSpec

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
SAMPLES = np.random.default_rng(0).uniform(0, 1, (6, 3, 10, 12)).astype(np.float32)


class LoudNorm(torch.nn.Module):
    """A convolution whose activations reach hundreds, and a hand-written normalisation that squares them."""

    def __init__(self, gain: float):
        super().__init__()
        self.conv, self.tail = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 3, padding=1)
        self.gain = gain

    def forward(self, x: Any) -> Any:
        y = self.conv(x) * self.gain
        centred = y - y.mean((2, 3), keepdim=True)
        y = centred / (centred * centred).mean((2, 3), keepdim=True).add(1e-5).sqrt()
        return self.tail(y)


def exported(gain: float, folder: Path) -> Graph:
    """The network as a graph, and its calibration set beside it."""
    torch.manual_seed(0)
    stage = Stage("loud", LoudNorm(gain).eval(), (TensorSpec("input", (1, 3, 10, 12)),), ())
    np.save(folder / "input.npy", SAMPLES)
    return onnx_graph.to_onnx(stage, folder / "graph.onnx")


def answer(file: Path) -> np.ndarray:
    """Output for the first sample, each operation in the precision of the file.

    By ONNX's reference: ONNX Runtime on a CPU has few FP16 kernels, computes in FP32 and rounds, and overflows nothing.
    """
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(str(file)).run(None, {"input": SAMPLES[:1]})[0]


def error(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference as a fraction of the peak; infinite where a value is not finite."""
    return float(np.abs(wanted - got).max() / np.abs(wanted).max()) if np.isfinite(got).all() else np.inf


def test_a_variance_that_overflows_is_found_and_kept(tmp_path: Path) -> None:
    graph = exported(1500.0, tmp_path)
    wanted = answer(graph.onnx)
    plain, kept = tmp_path / "plain.onnx", tmp_path / "kept.onnx"
    onnx_graph.to_fp16(graph, plain)
    onnx_graph.to_fp16(graph, kept, calibration=tmp_path)
    assert error(wanted, answer(plain)) > 0.5  # the square is infinity, the quotient zero
    assert error(wanted, answer(kept)) < 5e-3
    found = fp16_lint.lint(graph, tmp_path)
    squares = [n.name for n in onnx.load(graph.onnx).graph.node if n.op_type == "Mul" and n.input[0] == n.input[1]]
    assert squares and set(squares) <= set(found)
    assert "reaches" in found[squares[0]] and "65504" in found[squares[0]]
    assert not any(name.startswith("tail") for name in found)


def test_a_quiet_network_has_nothing_but_its_small_constant(tmp_path: Path) -> None:
    graph = exported(1.0, tmp_path)
    found = fp16_lint.lint(graph, tmp_path)
    assert [text.split("(")[0].strip() for text in found.values()] == [
        next(iter(found.values())).split("(")[0].strip()
    ]
    assert "100% of its weight" in next(iter(found.values()))  # the 1e-5 beside the variance
    onnx_graph.to_fp16(graph, tmp_path / "half.onnx", calibration=tmp_path)
    assert error(answer(graph.onnx), answer(tmp_path / "half.onnx")) < 5e-3


def test_the_limit_is_an_eighth_of_the_end_and_can_be_moved(tmp_path: Path) -> None:
    graph = exported(1.0, tmp_path)
    peaks = fp16_lint.activation_peaks(onnx.load(graph.onnx), graph, tmp_path)
    assert peaks["input"] == pytest.approx(SAMPLES.max())
    loudest = max(peaks, key=lambda name: peaks[name])
    below = fp16_lint.lint(graph, tmp_path, near=0.99 * peaks[loudest])
    above = fp16_lint.lint(graph, tmp_path, near=1.01 * peaks[loudest])
    assert any(repr(loudest) in text for text in below.values())
    assert not any(repr(loudest) in text for text in above.values())
    assert fp16_lint.NEAR == 65504 / 8


@pytest.mark.parametrize(
    ("weight", "share"),
    [([0.0, 1.0, 2.0], 0.0), ([6.0e-5, 1.0, -6.0e-5, 0.0], 2 / 3), ([0.0], 0.0), ([6.2e-5], 0.0), ([1e-5], 1.0)],
)
def test_subnormal_share(weight: list[float], share: float) -> None:
    assert fp16_lint.subnormal_share(np.array(weight, np.float32)) == pytest.approx(share)


def test_a_weight_beyond_fp16_is_kept_where_it_was_refused(tmp_path: Path) -> None:
    graph = exported(1e5, tmp_path)
    with pytest.raises(errors.ModelError, match="reaches 1e\\+05"):
        onnx_graph.to_fp16(graph, tmp_path / "half.onnx")
    onnx_graph.to_fp16(graph, tmp_path / "half.onnx", calibration=tmp_path)
    assert error(answer(graph.onnx), answer(tmp_path / "half.onnx")) < 5e-3


def test_without_samples_it_says_so(tmp_path: Path) -> None:
    graph = exported(1.0, tmp_path)
    with pytest.raises(errors.DataError, match="not a readable calibration file"):
        fp16_lint.lint(dataclasses.replace(graph), tmp_path / "nowhere")
