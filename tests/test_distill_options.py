"""distill: the losses of maps, weights and a discriminator, accumulation, scaled rates, evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import graph
from edgegen.errors import ModelError
from edgegen.passes import _teaching
from edgegen.passes.distill import distill
from edgegen.passes.prune_channels import prune_channels
from edgegen.types import Job, Measurement, Model, Target

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = Target("t", "", (), channel_multiple={"int8": 8})
QUICK = {"steps": 30, "batch": 4, "lr": 3e-3, "precision": "fp32", "batchnorm": "frozen"}


def job(teacher: Model, **more: Any) -> Job:
    return Job(TARGET, teacher=teacher, threads=1, **more)


def noisy(model: Model, amount: float = 0.3) -> Model:
    module = graph.clone(model.stage.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=generator)
    return model.with_module(module)


def pruned(model: Model) -> Model:
    return prune_channels(model, job(model), ratio=0.4, min_width=4, round_to=4).model


@pytest.mark.parametrize("name", ["attention", "relations", "contrast", "weights"])
def test_each_loss_teaches_by_itself(name: str, residual: Model) -> None:
    result = distill(noisy(residual), job(residual), losses=[name], **QUICK)
    assert result.notes["loss_last"] < 0.9 * result.notes["loss_first"]
    assert bool(result.notes["features"]) == (name != "weights")
    assert not any(part._forward_hooks for part in result.model.stage.module.modules())


@pytest.mark.parametrize("model", ["residual", "conv_chain"])
def test_all_losses_of_a_pruned_network_together_resume(model: str, request: pytest.FixtureRequest, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from edgegen import training

    teacher = request.getfixturevalue(model)
    student = pruned(teacher)
    losses = dict.fromkeys(("output", "features", "attention", "relations", "contrast", "discriminator"), 0.1)
    options = QUICK | {"steps": 5, "accumulate": 2, "ema": 0.5, "every": 2, "losses": losses}
    whole = distill(student, job(teacher), **options)
    original, save = training.Loop.advance, training.Checkpoint.save_if_due

    def dying(self: Any, step: int, *rest: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt
        original(self, step, *rest)

    def now(self: Any, state: Any) -> None:
        self.every_s = 0
        save(self, state)

    monkeypatch.setattr(training.Checkpoint, "save_if_due", now)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Loop, "advance", dying)
        distill(student, job(teacher, checkpoints=tmp_path), **options)
    resumed = distill(student, job(teacher, checkpoints=tmp_path), **options)
    a, b = (result.model.stage.module.state_dict() for result in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.notes["scores"] == resumed.notes["scores"]
    assert [step for step, _ in whole.notes["scores"]] == [2, 4, 5]
    assert list(a) == list(student.stage.module.state_dict()), "nothing of what was learned beside it"


def test_losses_of_maps_alone_end_the_teacher_early(residual: Model) -> None:
    result = distill(noisy(residual), job(residual), losses=["attention", "weights"], **QUICK | {"steps": 2})
    assert result.notes["steps"] == 2


def test_weights_without_a_common_layer_are_said(residual: Model) -> None:
    other = residual.with_module(nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="no layer of the student stands for a matrix of its teacher's"):
        distill(residual, job(other), losses=["output", "weights"], **QUICK)


def test_scaled_rates_are_those_of_fewer_inputs(residual: Model) -> None:
    student = pruned(residual)
    batch = {"input": graph.example_inputs(residual.stage, batch=2), "reference": None, "label": None}
    lesson = _teaching.Lesson(student, job(residual), {"output": 1.0}, batch, 4.0, "conv", ("cifar", ""))
    found = lesson.rates(job(residual), batch, "adamw")
    names = {name for name, _ in lesson.learner.named_parameters()}
    assert names == set(found)
    before, after = (model.stage.module[1].conv2.weight.shape[1] for model in (residual, student))
    assert found["student.1.conv2.weight"] == pytest.approx(before / after)
    assert found["student.1.conv2.bias"] == pytest.approx(1.0)
    plain, scaled = (distill(student, job(residual), scale_lr=on, **QUICK | {"steps": 4}) for on in (False, True))
    weights = [result.model.stage.module[1].conv2.weight for result in (plain, scaled)]
    assert not torch.equal(*weights)
    with pytest.raises(ValueError, match="scale_lr follows from the teacher, and the job has none"):
        distill(student, Job(TARGET), scale_lr=True, losses=["labels"], **QUICK)


def test_evaluations_keep_the_best_and_stop(residual: Model) -> None:
    options = QUICK | {"steps": 12, "lr": 0.3, "every": 1, "patience": 3, "grad_clip": 0.0, "warmup": 0.0}
    result = distill(noisy(residual, 0.01), job(residual), **options)
    scores = dict(result.notes["scores"])
    assert result.notes["best_step"] == min(scores, key=scores.__getitem__)
    assert result.notes["steps"] == result.notes["best_step"] + 3, "a rate far too high gets no better"
    assert "3 evaluations brought nothing better" in result.notes["stopped"]


def test_the_jobs_own_judgement_decides(residual: Model) -> None:
    asked: list[Model] = []

    def quality(model: Model) -> Measurement:
        asked.append(model)
        return Measurement("PSNR", "dB", [20.0, 30.0, 25.0][len(asked) - 1], direction="higher")

    result = distill(noisy(residual), job(residual, quality=quality), **QUICK | {"steps": 6, "every": 2})
    assert result.notes["scores"] == [[2, -20.0], [4, -30.0], [6, -25.0]]
    kept, best = result.model.stage.module.state_dict(), asked[1].stage.module.state_dict()
    assert all(torch.equal(kept[name], best[name]) for name in kept)


ENCODER = """
import torch


class Colours(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return [self.mix(x)]


def colours():
    return Colours()
"""


def test_a_perceptual_loss_by_an_encoder_of_ones_own(residual: Model, tmp_path: Path) -> None:
    file, weights = tmp_path / "encoders.py", tmp_path / "colours.pth"
    file.write_text(ENCODER)
    torch.save({"mix.weight": torch.eye(4)[:, :3, None, None], "mix.bias": torch.zeros(4)}, weights)
    student, own = pruned(residual), {"encoder": f"{file}:colours", "encoder_weights": str(weights)}
    options = QUICK | {"steps": 30, "losses": {"perceptual": 1.0}}
    found = distill(student, job(residual), **options, **own)
    assert found.notes["loss_last"] < 0.7 * found.notes["loss_first"]
    other = distill(student, job(residual), **options, encoder=own["encoder"])  # its random weights
    assert other.notes["loss_first"] != pytest.approx(found.notes["loss_first"])
    for wrong, message in (
        ({"encoder": str(file)}, "encoder must be file.py:factory"),
        ({"encoder_weights": str(weights)}, "the encoder cifar has its own"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(student, job(residual), **options, **wrong)
    with pytest.raises(ModelError, match="unknown encoder 'mnits'"):
        distill(student, job(residual), **options, encoder="mnits")
