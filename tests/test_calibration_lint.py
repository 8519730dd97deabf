"""The calibration linter: a finding for each fault, none for good data, and a curve that ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgegen import calibration_lint
from edgegen.calibration_lint import Point
from edgegen.errors import DataError
from edgegen.types import Model, Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photos(count: int = 40, seed: int = 0) -> np.ndarray:
    """Different pictures (N, 3, 16, 16) in 0..1 with the channel means of the record, a black and a white corner."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, 3, 4, 4))
    images = np.kron(coarse, np.ones((1, 1, 4, 4))) * 0.5 + np.array(MEAN).reshape(1, 3, 1, 1) - 0.25
    images[:, :, 0, 0], images[:, :, -1, -1] = 0.0, 1.0
    return images.clip(0, 1)


def dataset(inputs: np.ndarray, labels: Any = None) -> Any:
    given = [None] * len(inputs) if labels is None else labels
    return [SimpleNamespace(input=x.astype(np.float32), label=y, reference=None) for x, y in zip(inputs, given)]


def normalised(images: np.ndarray) -> np.ndarray:
    return (images - np.array(MEAN).reshape(1, 3, 1, 1)) / np.array(STD).reshape(1, 3, 1, 1)


@pytest.fixture
def model(conv_chain: Model) -> Model:
    return dataclasses.replace(conv_chain, preprocessing=Preprocessing(mean=MEAN, std=STD))


def kinds(model: Model, inputs: np.ndarray, labels: Any = None) -> set[str]:
    return {finding.kind for finding in calibration_lint.lint(model, dataset(inputs, labels))}


def test_good_images_have_no_findings(model: Model):
    assert kinds(model, normalised(photos()), [i % 10 for i in range(40)]) == set()


def black(images: np.ndarray) -> np.ndarray:
    return np.concatenate([images, np.zeros((1, 3, 16, 16))])


FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "few": ("count", lambda p: normalised(p[:8])),
    "copies": ("diversity", lambda p: normalised(np.repeat(p[:10], 4, 0) + 1e-5 * np.arange(40)[:, None, None, None])),
    "not normalised by 255": ("preprocessing", lambda p: normalised(p * 255)),
    "scaled twice": ("preprocessing", lambda p: normalised(p / 255)),
    "not normalised": ("preprocessing", lambda p: normalised(normalised(p))),
    "blue first": ("colour", lambda p: normalised(p[:, ::-1])),
    "grey": ("colour", lambda p: normalised(np.repeat(p[:, :1], 3, 1))),
    "black": ("black", lambda p: normalised(black(p))),
    "no white": ("white", lambda p: normalised(p * 0.6)),
    "clipped": ("white", lambda p: normalised(np.where(p > np.quantile(p, 0.6), 1.0, p))),
    "NaN": ("finite", lambda p: np.concatenate([normalised(p), np.full((1, 3, 16, 16), np.nan)])),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_told(fault: str, model: Model):
    kind, spoil = FAULTS[fault]
    assert kind in kinds(model, spoil(photos()))


def test_few_classes_are_told(model: Model):
    assert kinds(model, normalised(photos()), [i % 3 for i in range(40)]) == {"classes"}


@pytest.mark.parametrize(
    ("decibels", "wanted"),
    [((10, 20, 30, 30.1, 30.2), 4), ((10, 20, 30, 40), None), ((48.3, 48.0, 47.5), 1), ((10,), None)],
)
def test_enough_is_where_nothing_more_is_gained(decibels: tuple[float, ...], wanted: int | None):
    points = [Point(2**i, value) for i, value in enumerate(decibels)]
    assert calibration_lint.enough(points) == wanted


def test_the_curve_rises_with_the_images(model: Model):
    images = photos(12) * np.linspace(0.05, 1, 12).reshape(-1, 1, 1, 1)  # dark ones first: ranges grow
    points = calibration_lint.curve(model, dataset(normalised(images)), held_out=4)
    assert [point.images for point in points] == [1, 2, 4, 8]
    assert points[-1].sqnr_db > points[0].sqnr_db


def test_the_curve_of_a_denoiser_is_over_inputs_on_its_way(monkeypatch):
    import torch
    from test_distill_steps import denoiser

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.conv(sample) + timestep.view(-1, 1, 1, 1) / 1000

    seen: list[dict[str, np.ndarray]] = []
    insert = calibration_lint.onnx_qdq.insert_qdq

    def watched(graph: Any, out: Any, *, calibration: Any, plan: Any) -> Any:
        seen.append({name: np.load(calibration / f"{name}.npy") for name in ("sample", "timestep")})
        return insert(graph, out, calibration=calibration, plan=plan)

    monkeypatch.setattr(calibration_lint.onnx_qdq, "insert_qdq", watched)
    latents = np.random.default_rng(0).standard_normal((12, 1, 4, 4))
    points = calibration_lint.curve(denoiser(Net(), 8), dataset(latents), held_out=4)
    assert [point.images for point in points] == [1, 2, 4, 8]
    assert all(np.isfinite(point.sqnr_db) for point in points) and points[-1].sqnr_db > 15
    assert [len(one["sample"]) for one in seen] == [len(one["timestep"]) for one in seen] == [1, 2, 4, 8]
    assert len(set(seen[-1]["timestep"])) == 8 and len(set(seen[1]["timestep"])) == 2  # every step, mixed


def test_a_curve_of_several_inputs_is_refused(model: Model):
    stage = dataclasses.replace(model.stage, inputs=(*model.stage.inputs, *model.stage.outputs))
    with pytest.raises(DataError, match=r"a curve is for networks that take one input; .* takes input, output"):
        calibration_lint.curve(dataclasses.replace(model, stages=(stage,)), dataset(normalised(photos(4))))
