"""What a request's data become: parts that share nothing, and real images for generators to learn from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgegen import inputs
from edgegen.errors import DataError
from edgegen.request import Request
from edgegen.types import Model, Stage, TensorSpec

RNG = np.random.default_rng(0)


@pytest.fixture
def generator() -> Model:
    made = TensorSpec("image", (1, 1, 6, 6), value_range=(0.0, 1.0))
    return Model("g", "unconditional", (Stage("main", None, (TensorSpec("z", (1, 4)),), (made,)),))


def photos(file: Path, x: np.ndarray) -> Path:
    np.savez(file, x=x)
    return file


def test_a_generator_learns_from_real_images_only_where_others_judge(generator: Model, tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (30, 6, 6, 1), dtype=np.uint8)
    mine, judged = photos(tmp_path / "a.npz", x[:10]), photos(tmp_path / "b.npz", x[10:])
    alone = inputs.prepare(Request(model="g", data=judged, samples=8), generator)
    with pytest.raises(DataError, match="no real images"):
        next(alone.train.real_images())
    both = inputs.prepare(Request(model="g", data=mine, eval_data=judged, samples=8), generator)
    learned = np.concatenate(list(both.train.real_images()))
    held_out = [np.concatenate(list(part.real_images())) for part in (both.select, both.test)]
    assert len(learned) == 10 and sum(map(len, held_out)) == 20
    assert not {i.tobytes() for i in learned} & {i.tobytes() for part in held_out for i in part}
    assert both.sources["train"] == f"latents N(0, 1), real images of {mine}"
    assert both.train.digest != alone.train.digest  # other images, other steps in the cache


def test_real_images_that_judge_are_not_learned_from(generator: Model, tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (12, 6, 6, 1), dtype=np.uint8)
    mine, judged = photos(tmp_path / "a.npz", x[:8]), photos(tmp_path / "b.npz", x[6:])
    with pytest.raises(DataError, match="2 images are both in the training and in the evaluation data"):
        inputs.prepare(Request(model="g", data=mine, eval_data=judged, samples=8), generator)


def test_without_judgement_calibration_is_on_what_is_given_and_random_where_that_is_asked(tmp_path: Path) -> None:
    image = TensorSpec("x", (1, 3, 8, 8), value_range=(0.0, 1.0))
    net = Model("net", "image-to-image", (Stage("main", None, (image,), (image,)),))
    given = photos(tmp_path / "a.npz", RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    alone = Request(model="net", latency_only=True, calibration_images=4)
    asked = [
        inputs.prepare(dataclasses.replace(alone, **more), net).calibration
        for more in ({}, {"calibration": "random"}, {"data": given}, {"calibration": str(given)})
    ]
    assert [found and len(found) for found in asked] == [None, None, 4, 4]


def test_without_judgement_a_generator_calibrates_on_latents(generator: Model) -> None:
    alone = Request(model="g", latency_only=True, calibration_images=5)
    found = inputs.prepare(alone, generator)
    drawn = np.stack([found.calibration[i].input for i in range(len(found.calibration))])
    assert drawn.shape == (5, 4) and len(np.unique(drawn)) == 20
    assert found.sources["calibration"] == "latents N(0, 1)"
    assert inputs.prepare(dataclasses.replace(alone, calibration="random"), generator).calibration is None
    steps = dataclasses.replace(generator, options={"prediction": "v", "schedule": "cosine", "train_steps": 10,
                                                    "sampler": {"name": "ddim", "steps": 2}})  # fmt: skip
    assert inputs.prepare(alone, steps).calibration is None
