"""distill: the student comes nearer to the teacher, from data or without, and says what it did."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgegen import graph
from edgegen.errors import PassError
from edgegen.nn import losses as nn_losses
from edgegen.passes import _lessons, _teaching
from edgegen.passes.distill import distill
from edgegen.passes.prune_channels import prune_channels
from edgegen.types import Job, Model, Preprocessing, Stage, Target, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = Target("t", "", (), channel_multiple={"int8": 8})


@dataclasses.dataclass
class Sample:
    input: np.ndarray
    reference: np.ndarray | None
    label: int | None
    key: str


class Photos:
    """Stands for data.Dataset: noise images with a reference of twice the size and a label, shifted by the rng."""

    def __init__(self, count: int = 12, scale: int = 2) -> None:
        self.count, self.scale, self.asked = count, scale, []

    def __len__(self) -> int:
        return self.count

    def train_item(self, i: int, rng: np.random.Generator) -> Sample:
        self.asked.append(i)
        image = np.random.default_rng(i).random((3, 16, 16), dtype=np.float32)
        image = image if rng.random() < 0.5 else image[:, :, ::-1].copy()
        return Sample(image, image.repeat(self.scale, 1).repeat(self.scale, 2), i % 10, str(i))


def job(teacher: Model | None, **more: Any) -> Job:
    return Job(TARGET, teacher=teacher, threads=1, **more)


def distance(a: Model, b: Model) -> float:
    inputs = graph.example_inputs(a.stage, seed=99, batch=8)
    first, second = (graph.outputs(model.stage.module, inputs)[0] for model in (a, b))
    return (first - second).abs().mean().item()


def noisy(model: Model, amount: float = 0.3) -> Model:
    """A student: the teacher with disturbed weights."""
    module = graph.clone(model.stage.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=generator)
    return model.with_module(module)


def quick(model: Model, work: Job, **options: Any):
    settings = {"steps": 40, "batch": 4, "lr": 3e-3, "precision": "fp32", "batchnorm": "frozen"} | options
    return distill(model, work, **settings)


@pytest.mark.parametrize("data", [None, Photos()], ids=["made up", "data"])
def test_the_student_comes_nearer(tiny_model: Model, data: Any):
    student = noisy(tiny_model)
    result = quick(student, job(tiny_model, data=data))
    assert distance(result.model, tiny_model) < 0.7 * distance(student, tiny_model)
    assert result.notes["loss_last"] < result.notes["loss_first"]
    assert result.notes["inputs"] == ("data" if data else "self-generated: smooth random images with noise")
    assert result.notes["steps"] == 40
    assert not result.needs_recovery


def test_a_pruned_network_recovers(residual: Model):
    pruned = prune_channels(residual, job(residual), ratio=0.4, min_width=4, round_to=4).model
    result = quick(pruned, job(residual), features=0.5, steps=60)
    assert distance(result.model, residual) < 0.65 * distance(pruned, residual)
    assert result.notes["features"] == ["0", "1.conv1", "2.conv1", "2.conv2"]
    assert list(result.model.stage.module.state_dict()) == list(residual.stage.module.state_dict()), "no projections"
    assert not any(part._forward_hooks for part in result.model.stage.module.modules())


def test_a_perfect_student_has_no_loss_and_is_not_moved(residual: Model):
    result = quick(residual, job(residual), steps=3, losses={"output": 1.0, "l2": 2.0})
    assert result.notes["loss_first"] == 0.0
    for name, value in residual.stage.module.state_dict().items():
        torch.testing.assert_close(result.model.stage.module.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_a_frozen_network_learns_and_is_frozen_again(depthwise_generator: Model):
    student = noisy(depthwise_generator)
    student.stage.module.requires_grad_(False)
    result = quick(student, job(depthwise_generator))
    assert result.notes["loss_last"] < result.notes["loss_first"]
    assert not any(parameter.requires_grad for parameter in result.model.stage.module.parameters())


def test_batch_norm_statistics_follow_the_data_unless_frozen(residual: Model):
    start = residual.stage.module[1].norm.running_var
    results = [quick(residual, job(residual), batchnorm=mode).model.stage.module for mode in ("train", "frozen")]
    moving, frozen = (module[1].norm.running_var for module in results)
    assert torch.equal(frozen, start)
    assert not torch.allclose(moving, start, rtol=0, atol=0.05)


def test_labels_teach_without_a_teacher(conv_chain: Model):
    options = {"losses": ["labels"], "steps": 60, "lr": 1e-2, "batch": 12, "batchnorm": "train"}
    result = quick(conv_chain, job(None, data=Photos()), **options)
    assert result.notes["loss_last"] < 0.5 * result.notes["loss_first"]


def test_references_teach_without_a_teacher(depthwise_generator: Model):
    result = quick(depthwise_generator, job(None, data=Photos()), losses=["reference"], crop=8)
    assert result.notes["loss_last"] < result.notes["loss_first"]


def test_all_losses_together(depthwise_generator: Model):
    options = {"losses": ["output", "l2", "perceptual"], "features": 0.1, "reference": 0.2, "projection": "orthogonal"}
    result = quick(noisy(depthwise_generator), job(depthwise_generator, data=Photos()), steps=3, **options)
    assert result.notes["losses"] == {"output": 1, "l2": 1, "perceptual": 1, "features": 0.1, "reference": 0.2}
    assert math.isfinite(result.notes["loss_last"])


def test_a_killed_distillation_resumes_to_the_same_weights(tmp_path: Path, residual: Model, monkeypatch):
    from edgegen import training

    student, options = noisy(residual), {"steps": 8, "features": 0.5, "ema": 0.9}
    whole = quick(student, job(residual), **options)
    original = training.Loop.advance

    def dying(self: Any, step: int, *rest: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt
        original(self, step, *rest)

    monkeypatch.setattr(training.Checkpoint, "save_if_due", _always(training.Checkpoint.save_if_due))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Loop, "advance", dying)
        quick(student, job(residual, checkpoints=tmp_path), **options)
    assert list(tmp_path.glob("*.safetensors"))
    resumed = quick(student, job(residual, checkpoints=tmp_path), **options)
    a, b = (result.model.stage.module.state_dict() for result in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.notes["curve"] == resumed.notes["curve"]


def _always(save: Any) -> Any:
    def now(self: Any, state: Any) -> None:
        self.every_s = 0
        save(self, state)

    return now


def test_each_epoch_sees_every_sample_once():
    photos = Photos(12)
    at = _lessons.from_data(photos, 4, seed=3, crop=None)
    for step in range(6):
        at(step)
    assert sorted(photos.asked[:12]) == sorted(photos.asked[12:]) == list(range(12))
    assert photos.asked[:12] != photos.asked[12:]


def test_batches_are_a_function_of_seed_and_step():
    def at(seed: int, step: int) -> torch.Tensor:
        return _lessons.from_data(Photos(), 4, seed, 8)(step)["input"][0]

    assert torch.equal(at(0, 5), at(0, 5))
    assert not torch.equal(at(0, 5), at(0, 6))
    assert not torch.equal(at(0, 5), at(1, 5))


def test_a_crop_takes_the_same_place_in_the_reference():
    batch = _lessons.from_data(Photos(), 4, 0, 6)(0)
    image, reference = batch["input"][0], batch["reference"]
    assert (image.shape, reference.shape) == ((4, 3, 6, 6), (4, 3, 12, 12))
    assert torch.equal(reference[:, :, ::2, ::2], image)


def test_made_up_images_lie_in_their_range_and_are_normalised():
    spec = TensorSpec("x", (1, 3, 32, 32), value_range=(0.0, 255.0))
    stage = Stage("s", nn.Identity(), (spec,), (spec,))
    plain, _ = _lessons.made_up(Model("m", "image-to-image", (stage,)), 8, 0)
    images = plain(0)["input"][0]
    assert images.min() >= 0
    assert images.max() <= 255
    assert images.std() > 20
    neighbours = (images[..., 1:] - images[..., :-1]).abs().mean()
    assert neighbours < images.std(), "photos are smooth, so are these"
    scaled, _ = _lessons.made_up(
        Model("m", "image-to-image", (stage,), Preprocessing((0.0, 255.0), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0))), 8, 0
    )
    torch.testing.assert_close(scaled(0)["input"][0][:, 2], (images[:, 2] - 3) / 8, rtol=0, atol=1e-4)
    assert torch.equal(plain(3)["input"][0], plain(3)["input"][0])


def test_latents_are_standard_normal():
    spec = TensorSpec("z", (1, 64))
    at, said = _lessons.made_up(Model("m", "unconditional", (Stage("s", nn.Identity(), (spec,), (spec,)),)), 256, 0)
    z = at(0)["input"][0]
    assert z.shape == (256, 64)
    assert abs(z.mean()) < 0.05
    assert abs(z.std() - 1) < 0.05
    assert said == "self-generated: random latents N(0, 1)"


def test_networks_that_do_not_fit_are_one_clear_error(conv_chain: Model, residual: Model):
    with pytest.raises(ValueError, match=r"outputs of student \[\(10,\)\] and teacher \[\(3, 16, 16\)\] differ"):
        quick(conv_chain, job(residual))


def test_no_teacher_is_said(residual: Model):
    with pytest.raises(ValueError, match="losses output need a teacher, and the job has none"):
        quick(residual, job(None))


def test_features_without_common_layers_are_said(residual: Model):
    other = residual.with_module(nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="no layer of the student has a map of the size of one of the teacher's"):
        quick(residual, job(other), features=1.0)


def test_a_loss_that_is_never_finite_is_a_pass_error(residual: Model):
    broken = graph.clone(residual.stage.module)
    with torch.no_grad():
        broken[0].bias.fill_(math.nan)
    with pytest.raises(PassError, match="stopped at step 0 of 40: output became nan"):
        quick(residual, job(residual.with_module(broken)))


# ------------------------------------------------------------------------------------------------------------- losses


def test_losses_vanish_for_equal_inputs_and_have_their_closed_forms():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert nn_losses.absolute(a, a) == nn_losses.squared(b, b) == 0
    assert nn_losses.absolute(a, b) == 0.5
    assert nn_losses.absolute(a * 255, b * 255, 255.0) == 0.5
    assert nn_losses.squared(a, b) == 0.25


def test_divergence_is_kullback_leibler():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.9, 0.1]]))
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert nn_losses.divergence(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)
    assert nn_losses.divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-7)
    assert nn_losses.divergence(teacher + 5, teacher).item() == pytest.approx(0, abs=1e-6), "logits have no origin"


def test_perceptual_distance_is_zero_only_for_equal_images():
    encoder = nn.Conv2d(3, 8, 3)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert nn_losses.perceptual(encoder, x, x) == 0
    assert nn_losses.perceptual(encoder, x, x.flip(3)) > 1e-3
    assert nn_losses.perceptual(encoder, x[:, :1], x[:, :1]) == 0, "grey images are shown as colour"


def net(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Conv2d(width, 3, 3))


def test_pairs_are_layers_with_maps_of_equal_size():
    x = (torch.rand(1, 3, 12, 12),)
    assert nn_losses.pairs(net(8), net(16), x) == ("0", "2")
    assert nn_losses.pairs(net(8), net(16), x, count=1) == ("2",)
    assert nn_losses.pairs(net(8), nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU()), x) == ()


def staged(depth: int, width: int, prefix: str = "") -> nn.Module:
    """`depth` convolutions of 12 pixels, as many of 6, and an output."""
    torch.manual_seed(depth)
    sizes = [(3 if i == 0 else width, width, 3, 2 if i == depth else 1, 1) for i in range(2 * depth)]
    layers = {f"{prefix}{i}": nn.Conv2d(*size) for i, size in enumerate(sizes)}
    return nn.Sequential(OrderedDict({**layers, f"{prefix}out": nn.Conv2d(width, 3, 1)}))


def test_layers_of_other_names_are_paired_by_their_depth():
    x, own, other = (torch.rand(2, 3, 12, 12),), staged(2, 4), staged(4, 8, "stage")
    found = nn_losses.pairs(own, other, x)
    assert found == ("0=stage1", "1=stage3", "2=stage5", "3=stage7")
    assert nn_losses.pairs(own, other, x, count=2) == ("1=stage3", "3=stage7")
    assert nn_losses.pairs(own, other, x, count=1) == ("3=stage7",)
    assert nn_losses.pairs(own, nn.Sequential(OrderedDict(only=nn.Conv2d(3, 3, 1))), x) == ()  # that is the output
    assert nn_losses.named_pairs(own, other, x, ["1=stage3"]) == {"1=stage3": (4, 8)}
    with pytest.raises(ValueError, match=r"'1=stage9' is not called once .* or STUDENT=TEACHER"):
        nn_losses.named_pairs(own, other, x, ["1=stage9"])
    loss = nn_losses.FeatureLoss(own, other, found)
    own(*x), other(*x)
    assert loss().item() > 0 and [layer.weight.shape for layer in loss.projections.values()] == 4 * [(8, 4)]
    loss.close()
    assert not any(part._forward_hooks for part in (*own.modules(), *other.modules()))


@pytest.mark.parametrize("projection", ["conv", "orthogonal"])
def test_feature_loss_projects_where_channels_differ(projection: str):
    student, teacher, x = net(8), net(16), torch.rand(2, 3, 12, 12)
    loss = nn_losses.FeatureLoss(student, teacher, ("0", "2"), projection)
    student(x), teacher(x)
    assert loss().item() > 0
    assert set(loss.projections) == {"0", "2"}
    weight = loss.projections["0"].weight
    assert weight.shape == (16, 8)
    if projection == "orthogonal":  # columns of unit length at right angles: distances of the student are kept
        torch.testing.assert_close(weight.T @ weight, torch.eye(8), rtol=0, atol=1e-5)
    loss.close()
    assert not any(part._forward_hooks for part in (*student.modules(), *teacher.modules()))


def test_feature_loss_of_equal_networks_is_zero_without_projection():
    student, x = net(8), torch.rand(2, 3, 12, 12)
    teacher = graph.clone(student)
    loss = nn_losses.FeatureLoss(student, teacher, ("0", "2"))
    student(x), teacher(x)
    assert loss().item() == 0
    assert len(loss.projections) == 0
    with torch.no_grad():
        teacher[0].weight *= 2
    teacher(x)
    assert loss().item() > 0.01


def test_an_unknown_projection_is_named():
    with pytest.raises(ValueError, match="projection must be one of conv, orthogonal, got 'svd'"):
        nn_losses.FeatureLoss(net(8), net(8), ("0",), "svd")


def test_a_teacher_that_is_asked_for_maps_only_runs_no_further_than_the_last_of_them() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 3, 1))
    calls: list[int] = []
    for number, layer in enumerate(network):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    inputs = (torch.zeros(1, 3, 2, 2),)
    assert _teaching._last_called(network, ["1", "0"], inputs) == "1"
    calls.clear()
    assert _teaching._UpTo(network, "1")(*inputs) == ()
    assert calls == [0, 1]


def test_feature_layers_must_be_in_both_and_fit() -> None:
    a = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 3, 1))
    b = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 3, 1, stride=2))
    inputs = (torch.zeros(1, 3, 4, 4),)
    assert nn_losses.named_pairs(a, b, inputs, ["0"]) == {"0": (4, 8)}
    with pytest.raises(ValueError, match="feature layer '7' is not called once"):
        nn_losses.named_pairs(a, b, inputs, ["7"])
    with pytest.raises(ValueError, match=r"gives \(1, 3, 4, 4\) in the student and \(1, 3, 2, 2\) in the teacher"):
        nn_losses.named_pairs(a, b, inputs, ["1"])


def test_the_psnr_loss_counts_each_image_alike() -> None:
    wanted = torch.zeros(2, 3, 4, 4)
    found = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])  # 20 and 40 dB
    assert math.isclose(nn_losses.decibels(found, wanted).item(), -3.0, abs_tol=1e-5)
    assert math.isclose(nn_losses.decibels(2 * found, wanted, 2.0).item(), -3.0, abs_tol=1e-5)
    assert nn_losses.decibels(found / 10, wanted) < nn_losses.decibels(found, wanted)
