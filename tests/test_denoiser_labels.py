"""Denoisers with classes learn from images with their own classes: the data's, or those the teacher made them from."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_distill_steps import FACTS, TARGET, Affine, Exact, denoiser  # noqa: E402

from edgegen import data, samplers  # noqa: E402
from edgegen.errors import DataError  # noqa: E402
from edgegen.nn import diffusion  # noqa: E402
from edgegen.passes import _denoising, _lessons, distill_steps  # noqa: E402
from edgegen.types import Job, Model, TensorSpec  # noqa: E402

MEANS = (-0.6, 0.0, 0.6, 0.9)  # of each class, and of "no class"
SPREAD = 0.1


class Classes(Exact):
    """v of the best denoiser of pixels N(MEANS[label], SPREAD^2)."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.best(sample, timestep, torch.tensor(MEANS)[label.long()].view(-1, 1, 1, 1), SPREAD)


class Learning(Classes):
    """The same, and a shift that it may learn."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return super().forward(sample, timestep, label) + self.moved


def labelled(steps: int = 16, **more) -> Model:
    base = denoiser(Classes(), steps)
    stage = dataclasses.replace(base.stage, inputs=(*base.stage.inputs, TensorSpec("label", (1,))))
    options = {**base.options, "labels": 3, "sampler": {**base.options["sampler"], **more}}
    return dataclasses.replace(base, stages=(stage,), options=options)


def pictures(labels: np.ndarray | None) -> data.Dataset:
    """Real images of one grey each: that of their class."""
    order = np.arange(12) % 3 if labels is None else labels
    greys = np.rint((np.array(MEANS)[order] + 1) / 2 * 255).astype(np.uint8)
    return data.Dataset(data.ArraySource("a", np.broadcast_to(greys[:, None, None, None], (12, 4, 4, 1)), labels),
                        labelled())  # fmt: skip


def means_by_label(model: Model, job: Job) -> dict[int, np.ndarray]:
    """The mean of each image that `distill_steps` learns from, by the label that goes with it."""
    settings = samplers.of(model.options)
    teacher = _denoising.Teacher(Classes(), settings)
    lesson = distill_steps._Lesson(model, job, teacher, settings, "consistency", 4, 64, 1, 0.0, "cifar")
    found, labels = lesson.images(0)
    assert np.array_equal(lesson._noised(0)[2].numpy(), labels)
    return {int(label): found[labels == label].mean((1, 2, 3)) for label in np.unique(labels)}


@pytest.mark.parametrize(("real", "tolerance"), [(True, 0.005), (False, 0.15)])
def test_an_image_has_its_own_label(real: bool, tolerance: float):
    work = Job(TARGET, data=pictures(np.arange(12) % 3) if real else None)
    found = means_by_label(labelled(), work)
    assert sorted(found) == [0, 1, 2]
    for label, means in found.items():
        assert np.abs(means - MEANS[label]).max() < tolerance
        assert np.abs(means - MEANS[(label + 1) % 3]).min() > 0.3  # so that the line before can fail


def test_batches_of_other_passes_leave_some_classes_out():
    at, said = _lessons.batches(labelled(), Job(TARGET, data=pictures(np.arange(12) % 3)), 400)
    x, t, label = at(0)["input"]
    alpha = diffusion.Levels(FACTS).at(t, x)[0]
    shown = (x / alpha).mean((1, 2, 3)).numpy()  # where there is little noise, the image
    for number in range(3):
        assert np.allclose(shown[(label == number) & (t < 100)], MEANS[number], atol=0.15)
    assert 0.04 < float((label == 3).float().mean()) < 0.17  # one in ten
    assert said == "12 real images, noised"


def test_real_images_without_classes_are_not_given_random_ones():
    found, said = _denoising.images(labelled(), 64, 0, pictures(None))
    made, labels = found(0)
    assert said == "256 images of the denoiser itself, noised; the real ones have no classes"
    assert np.abs(made.mean((1, 2, 3)) - np.array(MEANS)[labels]).max() < 0.15


def test_classes_that_cannot_be_the_networks_are_refused():
    with pytest.raises(DataError, match="a has 4 classes, net has 3"):
        _denoising.images(labelled(), 8, 0, pictures(np.arange(12) % 4))
    assert pictures(None).real_labels() is None
    part = data.split(pictures(np.arange(12) % 3), (0.5, 0.5), seed=0)[0]
    assert [MEANS[label] for label in part.real_labels()] == pytest.approx(
        [2 * part.real_image(i).mean() - 1 for i in range(part.real_count())], abs=0.005)


def test_a_student_of_classes_makes_the_images_of_the_class_it_is_asked_for():
    options = {"method": "consistency", "steps": 2, "train": 6, "batch": 8, "lr": 1e-4, "precision": "fp32"}
    model = labelled().with_module(Learning())
    result = distill_steps.distill_steps(model, Job(TARGET, data=pictures(np.arange(12) % 3), threads=1), **options)
    latents = np.random.default_rng(0).standard_normal((30, 1, 4, 4)).astype(np.float32)
    asked = np.arange(30) % 3
    made = samplers.generate(samplers.of(result.model.options), diffusion.runner(result.model.stage.module), latents,
                             asked)  # fmt: skip
    assert np.abs(made.mean((1, 2, 3)) - np.array(MEANS)[asked]).max() < 0.15


@pytest.mark.parametrize("thinned", [{}, {"guidance_every": 3}, {"guidance_interval": [0.3, 0.7]}], ids=str)
def test_the_teacher_is_guided_where_its_sampler_is(thinned: dict):
    model = labelled(8, guidance=3.0, **thinned)
    settings, latents = samplers.of(model.options), np.random.default_rng(0).standard_normal((4, 1, 4, 4))
    asked = np.array([0, 1, 2, 1])
    wanted = samplers.generate(settings, diffusion.runner(Classes()), latents, asked)
    teacher, x = _denoising.Teacher(Classes(), settings), torch.from_numpy(latents).float()
    grid = _denoising.times(settings, 8)
    for t, end in pairwise(grid):
        x = teacher.step(x, t.expand(4), end.expand(4), torch.from_numpy(asked).float())
    assert np.abs(x.numpy() - wanted).max() < 2e-4
    plain = samplers.generate({**settings, "guidance_every": 1, "guidance_interval": [0.0, 1.0]},
                              diffusion.runner(Classes()), latents, asked)  # fmt: skip
    assert (np.abs(plain - wanted).max() > 0.05) == bool(thinned)  # so that the comparison can fail
    between = (grid[3] + grid[4]) / 2
    assert torch.equal(teacher.guided(between.expand(1)), teacher.guided(grid[3].expand(1)))


def test_a_teacher_whose_output_means_something_else_is_refused():
    other = denoiser(Exact())
    other = dataclasses.replace(other, options={**other.options, "prediction": "epsilon"})
    with pytest.raises(ValueError, match="teacher and student must have the same prediction: epsilon and v"):
        distill_steps.distill_steps(denoiser(Affine()), Job(TARGET, teacher=other))
