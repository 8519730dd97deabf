"""The loss `generator` of distill: another network learns what a generator sees in images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="passes need the extra `torch`")

from torch import nn  # noqa: E402

from edgegen import graph, recipe, steps  # noqa: E402
from edgegen.nn import diffusion, dreams  # noqa: E402
from edgegen.passes import _dreams  # noqa: E402
from edgegen.passes.distill import distill  # noqa: E402
from edgegen.types import Job, Model, Preprocessing, Stage, Target, TensorSpec  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = Target("t", "", ())
SAMPLER = {"sampler": {"name": "ddim", "steps": 4}, "prediction": "epsilon", "schedule": "linear", "train_steps": 100}
HOW = Preprocessing(value_range=(0.0, 1.0), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


class Small(nn.Module):
    """A classifier of images with maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.stem(x)).mean((2, 3)))


class Denoiser(nn.Module):
    """Twice the size of the classifier's images, and one channel: all of what has to be brought together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 8, 3, 2, 1)
        self.outer = nn.Conv2d(1, 3, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)
        self.out = nn.Conv2d(11, 1, 3, padding=1)
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append((x, t))
        return self.out(torch.cat([self.outer(x).relu(), self.up(self.inner(x).relu())], 1))


def model_of(module: nn.Module, task: str, inputs: tuple[TensorSpec, ...], out: TensorSpec, **options: Any) -> Model:
    torch.manual_seed(0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    stage = Stage("main", inputs=inputs, outputs=(out,), module=module.eval())
    return Model(name="it", task=task, stages=(stage,), preprocessing=HOW, options=options)


def image(name: str, channels: int, side: int, low: float = -1.0) -> TensorSpec:
    return TensorSpec(name, ("N", channels, side, side), "float32", (low, 1.0))


@pytest.fixture
def small() -> Model:
    return model_of(Small(), "classification", (image("x", 3, 8, 0.0),), TensorSpec("logits", ("N", 5), "float32"))


@pytest.fixture
def denoiser() -> Model:
    inputs = (TensorSpec("x", ("N", 1, 16, 16), "float32"), TensorSpec("t", ("N",), "float32", (0, 99)))
    return model_of(Denoiser(), "unconditional", inputs, image("eps", 1, 16), **SAMPLER)


@pytest.fixture
def gan() -> Model:
    network = nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    return model_of(network, "unconditional", (TensorSpec("z", ("N", 12), "float32"),), image("image", 3, 8))


def test_a_map_is_what_has_places():
    tokens = torch.arange(2 * 5 * 3).view(2, 5, 3).float()
    found = dreams.as_map(tokens)
    assert torch.equal(found, tokens[:, 1:].transpose(1, 2).reshape(2, 3, 2, 2))
    assert torch.equal(dreams.as_map(tokens[:, 1:]), found)
    for other in (tokens[:, :3], torch.zeros(2, 4, 1, 1), torch.zeros(2, 4), torch.zeros(2, 3, 4, 4).long(), (tokens,)):
        assert dreams.as_map(other) is None


def test_the_last_map_of_each_size_and_not_the_output(small: Model, denoiser: Model):
    inputs = (torch.zeros(2, 3, 8, 8),)
    assert dreams.stages(small.stage.module, lambda: small.stage.module(*inputs)) == {
        (4, 4): ("down", 6), (8, 8): ("stem", 4)
    }  # fmt: skip
    inputs = (torch.zeros(1, 1, 16, 16), torch.zeros(1))
    assert dreams.stages(denoiser.stage.module, lambda: denoiser.stage.module(*inputs)) == {
        (8, 8): ("inner", 8), (16, 16): ("up", 8)
    }  # fmt: skip


def test_the_distance_is_0_for_the_normalised_map_alone():
    maps = [torch.randn(2, 3, 4, 4) * 5 + 2]
    whole = [nn.functional.layer_norm(maps[0], (3, 4, 4))]
    assert dreams.distance(whole, maps).item() < 1e-10
    assert dreams.distance(whole, [3 * maps[0] - 1]).item() < 1e-8, "scale and offset of the generator's maps count"
    assert dreams.distance(maps, maps).item() > 1
    assert dreams.distance([whole[0].flip(3)], maps).item() > 0.5


def test_unnormalise_takes_back_what_normalise_does():
    images = torch.rand(2, 3, 4, 4)
    assert (graph.unnormalise(graph.normalise(images, HOW), HOW) - images).abs().max() < 1e-6
    assert torch.equal(graph.unnormalise(images, dataclasses.replace(HOW, mean=(), std=())), images)


def test_a_denoiser_sees_the_students_images_with_noise_on_them(small: Model, denoiser: Model):
    images = torch.rand(4, 3, 8, 8)
    inputs = (graph.normalise(images, HOW),)
    dream = _dreams.Dream(small, small.stage.module, denoiser, inputs, 0.3, 7)
    assert dream.inputs(inputs, 5) == inputs
    x, t = dream.network.seen[-1]
    levels = diffusion.Levels(SAMPLER)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(7 * 1_000_003 + 5))
    grey = nn.functional.interpolate(images.mean(1, keepdim=True) * 2 - 1, size=(16, 16), mode="bilinear",
                                     align_corners=False, antialias=True)  # fmt: skip
    assert t.tolist() == [30.0] * 4
    assert (x - levels.noised(grey, t, eps)).abs().max() < 1e-5
    assert dream.names == ("inner", "up")


def test_a_generators_own_images_reach_the_student_as_it_takes_them(small: Model, gan: Model):
    inputs = (torch.zeros(4, 3, 8, 8),)
    dream = _dreams.Dream(small, small.stage.module, gan, inputs, 0.1, 0)
    (given,) = dream.inputs(inputs, 3)
    z = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    made = gan.stage.module(z)
    assert (given - graph.normalise((made + 1) / 2, HOW)).abs().max() < 1e-6
    assert not torch.equal(dream.inputs(inputs, 4)[0], given)


@pytest.mark.parametrize("kind", ["denoiser", "gan"])
def test_the_student_learns_its_maps(small: Model, kind: str, request: pytest.FixtureRequest):
    teacher = request.getfixturevalue(kind)
    before = [value.clone() for value in small.stage.module.state_dict().values()]
    job = Job(TARGET, teacher=teacher, threads=1)
    result = distill(small, job, steps=200, batch=8, lr=1e-2, losses=["generator"], precision="fp32", noise=0.0)
    assert result.notes["loss_last"] < 0.6 * result.notes["loss_first"]
    module = result.model.stage.module
    assert not torch.equal(module.stem[0].weight, small.stage.module.stem[0].weight)
    assert set(module.state_dict()) == set(small.stage.module.state_dict()), "the pyramid is no part of the result"
    assert not any(part._forward_hooks for part in module.modules())
    after = small.stage.module.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_cannot_be_is_one_line(small: Model, denoiser: Model, gan: Model):
    def refused(model: Model, teacher: Model | None, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            distill(model, Job(TARGET, teacher=teacher, threads=1), steps=2, batch=2, **options)

    refused(small, None, "needs a denoiser .*, and the job has none", losses=["generator"])
    refused(small, small, "needs a denoiser .*, and it is none", losses=["generator", "labels"])
    refused(small, denoiser, "is a denoiser: loss output cannot be beside", losses=["output", "generator"])
    refused(small, gan, "makes the images that are learned from: loss labels", losses=["labels", "generator"])
    refused(small, denoiser, "noise must lie in", losses=["generator"], noise=1.5)
    refused(small, denoiser, "scale_lr .* a generator is no such one", losses=["generator"], scale_lr=True)
    refused(gan, denoiser, "is for networks of one image", losses=["generator"])


def test_a_step_names_a_generator_that_ships(small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    step = recipe.Step(
        name="distill", options={"steps": 2, "batch": 2, "losses": ["generator"]}, teacher="ddpm_unet"
    )
    result = steps.run_step(step, small, small, Job(TARGET, teacher=small, threads=1), "data")
    assert len(result.notes["features"]) > 1
    assert np.isfinite(result.notes["loss_last"])
