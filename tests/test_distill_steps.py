"""Fewer steps: with an exact denoiser of a Gaussian as the teacher, the right answer is known in closed form."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgegen import samplers  # noqa: E402
from edgegen.errors import PassError  # noqa: E402
from edgegen.nn import diffusion  # noqa: E402
from edgegen.passes import _denoising, _lessons, distill_steps  # noqa: E402
from edgegen.types import Job, Model, Stage, Target, TensorSpec  # noqa: E402

MEAN, SPREAD = 0.2, 0.4
FACTS = {"prediction": "v", "schedule": "cosine", "train_steps": 1000}
TARGET = Target("testbed", "", ("onnxruntime",))


class Exact(nn.Module):
    """v of the best denoiser of pixels N(MEAN, SPREAD^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = diffusion.Levels(FACTS)

    def best(self, sample: torch.Tensor, timestep: torch.Tensor, mean, spread) -> torch.Tensor:
        alpha, sigma = self.levels.at(timestep, sample)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        x0 = mean + gain * (sample - alpha * mean)
        return (alpha * sample - x0) / sigma

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.best(sample, timestep, MEAN, SPREAD)


class Affine(nn.Module):
    """v = gain(t) x + shift(t): enough for everything that is asked here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angle = timestep[:, None] / 1000 * (math.pi / 2)
        told = self.net(torch.cat((angle, angle.sin(), angle.cos()), 1)).view(-1, 2, 1, 1, 1)
        return told[:, 0] * sample + told[:, 1]


def denoiser(module: nn.Module, steps: int = 16) -> Model:
    sample = TensorSpec("sample", (1, 1, 4, 4))
    time = TensorSpec("timestep", (1,), value_range=(0.0, 999.0))
    out = TensorSpec("output", (1, 1, 4, 4), value_range=(-1.0, 1.0))
    loop = {"name": "ddim", "steps": steps, "clip": 0}
    return Model("net", "unconditional", (Stage("s", module.eval(), (sample, time), (out,)),),
                 options={**FACTS, "sampler": loop})  # fmt: skip


def images(model: Model, count: int = 200) -> np.ndarray:
    latents = np.random.default_rng(0).standard_normal((count, 1, 4, 4)).astype(np.float32)
    return samplers.generate(samplers.of(model.options), diffusion.runner(model.stage.module), latents)


class Learned(Exact):
    """The best denoiser of pixels of a mean and a spread that it can learn; five times the rate that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = nn.Parameter(torch.zeros(2))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        mean, spread = 5 * self.moved
        return self.best(sample, timestep, MEAN + mean, SPREAD * spread.exp())


def distilled(**options):
    quick = {"steps": 1, "train": 250, "batch": 32, "lr": 5e-3, "precision": "fp32", **options}
    return distill_steps.distill_steps(denoiser(Affine()), Job(TARGET, teacher=denoiser(Exact()), threads=1), **quick)


def test_one_step_of_the_teacher_itself_gives_the_mean_alone():
    assert images(denoiser(Exact(), 1)).std() < 0.02  # so that what follows can fail


@pytest.mark.parametrize(("method", "steps"), [("pairs", 1), ("pairs", 2), ("progressive", 2), ("consistency", 1)])
def test_few_steps_keep_mean_and_spread(method: str, steps: int):
    result = distilled(method=method, steps=steps, pairs=128)
    made = images(result.model)
    settings = samplers.of(result.model.options)
    assert settings is not None and samplers.nfe(settings) == steps
    assert settings["name"] == ("ddim" if method == "progressive" else "consistency")
    assert made.mean() == pytest.approx(MEAN, abs=0.05)
    assert made.std() == pytest.approx(SPREAD, abs=0.08)
    assert result.changed and result.notes["nfe_before"] == 16


def test_images_distributed_as_the_teachers():
    """In one step; of several the estimate of mean and spread sees the mixture alone, which has more than one cause."""
    job = Job(TARGET, teacher=denoiser(Learned()), threads=1)
    result = distill_steps.distill_steps(denoiser(Affine()), job, method="distribution", steps=1, train=800,
                                         batch=32, lr=1e-3, precision="fp32")  # fmt: skip
    before, made = images(denoiser(Affine(), 1)), images(result.model)
    assert abs(before.std() - SPREAD) > 0.1, "so that what follows can fail"
    assert made.mean() == pytest.approx(MEAN, abs=0.05)
    assert made.std() == pytest.approx(SPREAD, abs=0.08)
    assert samplers.of(result.model.options)["name"] == "consistency"
    assert [point["images"] for point in result.notes["rounds"]] == ["noise alone"]


def test_pairs_end_where_the_paths_end():
    result = distilled(method="pairs", pairs=128)
    made, wanted = images(result.model), images(denoiser(Exact(), 16))
    assert np.abs(made - wanted).mean() < 0.06
    assert np.abs(made + wanted).mean() > 0.3


def test_what_progressive_aims_at_makes_one_step_of_two():
    model = denoiser(Exact())
    settings = samplers.of(model.options)
    teacher = _denoising.Teacher(Exact(), settings)
    lesson = distill_steps._Lesson(model, Job(TARGET), teacher, settings, "progressive", 4, 8, 1, 0.0, "cifar")
    x, places = lesson._noised(0)
    grid = lesson.times
    x0 = lesson._target(Exact(), x, places, None)
    (alpha, sigma), (alpha_end, sigma_end) = (
        lesson.levels.at(grid[places], x), _denoising.ends(lesson.levels, grid[places + 2], x))  # fmt: skip
    one = alpha_end * x0 + sigma_end * (x - alpha * x0) / sigma
    near = teacher.step(x, grid[places], grid[places + 1], None)
    two = teacher.step(near, grid[places + 1], grid[places + 2], None)
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, near, atol=1e-2)


def test_training_that_stops_before_a_loss_is_told_keeps_what_it_has(monkeypatch):
    from edgegen import recipe, summary

    loss = distill_steps._Lesson.loss

    def broken(self, student: nn.Module, batch: tuple, step: int) -> dict[str, torch.Tensor]:
        return {name: value * (math.nan if step else 1.0) for name, value in loss(self, student, batch, step).items()}

    monkeypatch.setattr(distill_steps._Lesson, "loss", broken)
    result = distilled(method="consistency", train=2000, batch=4)
    (point,) = result.notes["rounds"]
    assert (point["curve"], point["loss_first"], point["trained"]) == ([], None, 1)
    assert result.notes["stopped"].startswith("1 steps: stopped at step 1 of 2000: ")
    assert np.isfinite(images(result.model, 2)).all()
    step = recipe.Step.model_validate({"pass": "distill_steps"})
    (record,) = summary.step_records([step], [result], "undone", "no gain")
    assert record["reason"] == f"no gain; {result.notes['stopped']}"


def test_a_later_round_that_cannot_begin_leaves_what_the_rounds_before_it_learned(monkeypatch):
    loss = distill_steps._Lesson.loss

    def broken(self, student: nn.Module, batch: tuple, step: int) -> dict[str, torch.Tensor]:
        parts = loss(self, student, batch, step)
        return {name: value * (math.nan if self.steps == 1 else 1.0) for name, value in parts.items()}

    monkeypatch.setattr(distill_steps._Lesson, "loss", broken)
    options = {"method": "progressive", "train": 20}
    whole, kept = distilled(steps=1, **options), distilled(steps=2, **options)
    assert samplers.of(whole.model.options) == samplers.of(kept.model.options) and whole.notes["nfe"] == 2
    weights = [result.model.stage.module.state_dict() for result in (whole, kept)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole.notes["stopped"].startswith("1 steps: stopped at step 0 of 20: ")
    with pytest.raises(PassError, match="lower lr"):
        distilled(method="consistency", steps=1, train=20)


def test_rounds_halve_the_steps():
    assert distill_steps._rounds(50, 4) == [16, 8, 4]
    assert distill_steps._rounds(16, 8) == [8]
    assert distill_steps._rounds(1000, 1)[:2] == [256, 128]


@pytest.mark.parametrize("method", distill_steps.METHODS)
def test_the_same_seed_gives_the_same_weights_and_the_input_is_left_alone(method: str):
    model = denoiser(Affine())
    before = {name: value.clone() for name, value in model.stage.module.state_dict().items()}
    made = [
        distill_steps.distill_steps(model, Job(TARGET, seed=3, threads=1), method=method, steps=1, train=5, pairs=8,
                                    batch=4)
        for _ in range(2)
    ]
    states = [result.model.stage.module.state_dict() for result in made]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(before[name], value) for name, value in model.stage.module.state_dict().items())
    assert not all(torch.equal(before[name], value) for name, value in states[0].items())


def test_nothing_to_do_is_said():
    short = denoiser(Affine(), 2)
    assert "2 times already" in str(distill_steps.distill_steps(short, Job(TARGET), steps=4).skipped)
    plain = dataclasses.replace(short, options={})
    assert "one run" in distill_steps.distill_steps(plain, Job(TARGET)).skipped["net.0"]


def test_lessons_of_a_denoiser_are_noised_images_at_random_times():
    at, said = _lessons.made_up(denoiser(Exact(), 8), 64, 0)
    x, t = at(3)["input"]
    assert said == "256 images of the denoiser itself, noised"
    assert t.min() < 150 and t.max() > 850
    late = x[t > 800].std(), x[t < 200].std()
    assert late[0] > 0.9 and late[1] < 0.6  # noise there, images of spread 0.4 here
    assert torch.equal(at(3)["input"][0], x) and not torch.equal(at(4)["input"][0], x)


class Pictures:
    """Stands for data.Dataset: real images of one grey."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def real_count(self) -> int:
        return 8

    def real_image(self, i: int) -> np.ndarray:
        return np.full((1, 4, 4), 0.75, np.float32)  # 0..1; -1..1 in the network


@pytest.mark.parametrize("make", [
    pytest.param(lambda student, job: _lessons.batches(student, job, 64), id="batches of passes"),
    pytest.param(lambda student, job: distill_steps._Lesson(
        student, job, _denoising.Teacher(Exact(), samplers.of(student.options)), samplers.of(student.options),
        "progressive", 4, 64, 1, 0.0, "cifar"), id="distill_steps"),
])  # fmt: skip
def test_a_student_learns_from_the_images_of_its_teacher_or_from_real_ones(make):
    def drawn(**more) -> tuple[np.ndarray, str]:
        made = make(denoiser(Affine()), Job(TARGET, **more))
        if isinstance(made, tuple):  # noised: at the first times there is hardly any noise
            x, t = made[0](0)["input"]
            return x[t < 100].numpy(), made[1]
        return made.images(0)[0], made.source

    own, said = drawn()
    assert "the denoiser itself" in said
    taught, said = drawn(teacher=denoiser(Exact()))
    assert "its teacher" in said
    assert taught.mean() == pytest.approx(MEAN, abs=0.1) and taught.std() == pytest.approx(SPREAD, abs=0.1)
    assert abs(own.mean() - MEAN) > 0.1 or abs(own.std() - SPREAD) > 0.1  # the untrained student cannot draw these
    real, said = drawn(teacher=denoiser(Exact()), data=Pictures(denoiser(Exact())))
    assert "real images" in said and real.mean() == pytest.approx(0.5, abs=0.1)


def test_distill_of_a_denoiser_sees_its_real_images_and_its_teacher():
    from edgegen.passes.distill import distill

    work = Job(TARGET, teacher=denoiser(Exact()), threads=1)
    quick = {"steps": 2, "batch": 4, "precision": "fp32"}
    assert "its teacher" in distill(denoiser(Affine()), work, **quick).notes["inputs"]
    work = dataclasses.replace(work, data=Pictures(denoiser(Exact())))
    assert "real images" in distill(denoiser(Affine()), work, **quick).notes["inputs"]
