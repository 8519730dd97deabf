"""Losses between maps, weights and players: closed forms, nothing for equals, and gradients that point home."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen import graph
from edgegen.nn import losses_adversarial as adversarial
from edgegen.nn import losses_maps as maps


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def falls(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, rate: float, steps: int = 30) -> float:
    """Loss at the end of gradient descent, relative to its start."""
    x = start.clone().requires_grad_()
    first = loss(x).item()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = (x - rate * gradient).detach().requires_grad_()
    return loss(x).item() / first


# --------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 16, 6), (2, 6, 40, 40), (2, 300, 6)])
@pytest.mark.parametrize("loss", [maps.attention, maps.relations])
def test_equal_maps_have_no_loss_and_others_do(loss: Callable, shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    assert loss(x, x).item() == 0
    assert loss(3 * x, x).item() == pytest.approx(0, abs=1e-6), "the scale of a map says nothing"
    assert loss(noise(*shape, seed=1), x).item() > 1e-3


def test_attention_is_the_distance_of_unit_maps_of_energy() -> None:
    student = torch.zeros(1, 2, 1, 2)
    student[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # all energy in the first place
    teacher = torch.zeros(1, 3, 1, 2)
    teacher[0, 0, 0, 1] = 1.0  # all in the second: two unit vectors at right angles
    assert maps.attention(student, teacher).item() == pytest.approx(2.0)
    teacher[0, 0, 0, 0] = 1.0  # (1, 1) / sqrt 2 against (1, 0)
    assert maps.attention(student, teacher).item() == pytest.approx(2 - math.sqrt(2), rel=1e-5)


def test_relations_are_differences_of_cosines() -> None:
    alike = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])  # two tokens of one direction: cosines 1
    apart = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])  # at right angles: 0 off the diagonal; another width
    assert maps.relations(alike, apart).item() == pytest.approx(2 / 4)
    assert maps.relations(alike, -alike).item() == pytest.approx(0, abs=1e-12), "relations know no direction"


def test_contrast_finds_the_same_pixel_among_all() -> None:
    pixels = torch.eye(4).view(1, 4, 4)  # four tokens at right angles
    others = 3 * math.exp(-1 / 0.2)
    assert maps.contrast(pixels, pixels).item() == pytest.approx(math.log(1 + others), rel=1e-5)
    turned = pixels.roll(1, 1)  # each like another's counterpart
    expected = math.log(math.exp(1 / 0.2) + 3)
    assert maps.contrast(turned, pixels).item() == pytest.approx(expected, rel=1e-5)
    same = torch.ones(2, 3, 2, 2)
    assert maps.contrast(same, same).item() == pytest.approx(math.log(8)), "pixels that are alike cannot be told apart"


@pytest.mark.parametrize(("name", "rate"), [("attention", 1.0), ("relations", 30.0), ("contrast", 3.0)])
def test_the_gradient_leads_to_the_teacher(name: str, rate: float) -> None:
    teacher = noise(2, 8, 3, 3, seed=2)
    loss = maps.KINDS[name]
    start = teacher + 0.7 * noise(2, 8, 3, 3, seed=3)
    assert falls(lambda x: loss(x, teacher), start, rate) < 0.7
    assert falls(lambda x: loss(x, teacher), start, -rate, steps=3) > 1, "the check can fail"


def net(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Conv2d(width, 3, 3))


@pytest.mark.parametrize("kind", list(maps.KINDS))
def test_map_losses_catch_the_maps_of_both_and_project_only_to_contrast(kind: str) -> None:
    student, teacher, x = net(4), net(8), torch.rand(2, 3, 10, 10)
    loss = maps.MapLoss(kind, student, teacher, ("0", "2"))
    student(x), teacher(x)
    value = loss()
    value.backward()
    assert value.item() > 0
    assert student[0].weight.grad.abs().sum() > 0
    assert set(loss.projections) == ({"0", "2"} if kind == "contrast" else set())
    loss.close()
    assert not any(part._forward_hooks for part in (*student.modules(), *teacher.modules()))


@pytest.mark.parametrize("kind", ["attention", "relations"])
def test_map_losses_of_equal_networks_are_zero(kind: str) -> None:
    student, x = net(4), torch.rand(2, 3, 10, 10)
    teacher = graph.clone(student)
    loss = maps.MapLoss(kind, student, teacher, ("0", "2"))
    student(x), teacher(x)
    assert loss().item() == 0


# ------------------------------------------------------------------------------------------------------------ weights


def test_a_chain_of_two_stands_for_one_matrix() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 5, 1))
    dense = nn.Conv2d(3, 5, 3)
    with torch.no_grad():
        dense.weight.copy_(maps.recovered(chain).view(5, 3, 3, 3))
        dense.bias.copy_(chain[1](chain[0].bias.view(1, 2, 1, 1)).flatten())
    x = noise(1, 3, 6, 6)
    torch.testing.assert_close(chain(x), dense(x), rtol=0, atol=1e-5)
    assert maps.recovered(nn.Conv2d(4, 4, 3, groups=2)) is None
    assert maps.recovered(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 5, 3))) is None
    assert maps.recovered(nn.ReLU()) is None


def test_weight_distance_is_relative_and_zero_for_equals() -> None:
    teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Linear(2, 2))
    student = graph.clone(teacher)
    names = maps.weight_pairs(student, teacher)
    assert names == ("0", "2", "3")
    assert maps.weight_distance(student, teacher, names).item() == 0
    with torch.no_grad():
        student[0].weight.mul_(1.5)
    assert maps.weight_distance(student, teacher, names).item() == pytest.approx(0.25 / 3)
    student[0] = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 6))  # rank 2
    student[2] = nn.Linear(5, 2)  # pruned: other inputs
    assert maps.weight_pairs(student, teacher) == ("0", "3")
    assert falls_to_svd(student, teacher)


def falls_to_svd(student: nn.Module, teacher: nn.Module) -> bool:
    """Minimising the distance of a rank-2 chain must end at the error of the best rank-2 matrix."""
    optimizer = torch.optim.Adam(student[0].parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        maps.weight_distance(student, teacher, ("0",)).backward()
        optimizer.step()
    values = torch.linalg.svdvals(teacher[0].weight)
    best = (values[2:].square().sum() / values.square().sum()).item()
    return maps.weight_distance(student, teacher, ("0",)).item() == pytest.approx(best, rel=1e-2)


# -------------------------------------------------------------------------------------------------------- adversaries


@pytest.mark.parametrize(("shape", "logits"), [((10,), True), ((3, 8, 8), False), ((5,), False)])
def test_a_fresh_discriminator_cannot_tell_and_teaches_nothing(shape: tuple[int, ...], logits: bool) -> None:
    judge = adversarial.OutputDiscriminator(shape, logits)
    student, teacher = noise(4, *shape).requires_grad_(), noise(4, *shape, seed=1)
    loss = judge.loss(student, teacher)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert student.grad.abs().sum() == 0
    assert judge.body[-1].weight.grad.abs().sum() > 0, "but it learns"


def test_the_student_is_led_to_what_the_discriminator_takes_for_the_teacher() -> None:
    judge = adversarial.OutputDiscriminator((3,), logits=False)
    teacher = noise(64, 3, seed=1) * 0.1 + torch.tensor([1.0, -1.0, 2.0])
    start = noise(64, 3, seed=2) * 0.1
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = judge.loss(start, teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3, "it can tell them apart"
    student = start.clone().requires_grad_()
    judge.loss(student, teacher).backward()
    moved = start - 10 * student.grad
    assert (moved - teacher.mean(0)).norm(dim=1).mean() < (start - teacher.mean(0)).norm(dim=1).mean()
    assert judge(moved).mean() > judge(start).mean()


def test_adversarial_losses_have_their_closed_forms() -> None:
    real, made = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0])
    assert adversarial.critic_loss("hinge", real, made).item() == pytest.approx((0.5 + 0) / 2 + (0 + 1) / 2)
    assert adversarial.maker_loss("hinge", real, made).item() == pytest.approx(1.5)
    expected = (math.log1p(math.exp(-3.5)) + math.log1p(math.exp(-2.0))) / 2
    assert adversarial.critic_loss("r3gan", real, made).item() == pytest.approx(expected, rel=1e-5)
    expected = (math.log1p(math.exp(3.5)) + math.log1p(math.exp(2.0))) / 2
    assert adversarial.maker_loss("r3gan", real, made).item() == pytest.approx(expected, rel=1e-5)
    assert adversarial.maker_loss("r3gan", real, real).item() == pytest.approx(math.log(2)), "nobody is ahead"


def test_gradient_penalty_of_a_linear_score_is_its_squared_slope() -> None:
    slope = noise(3, 4, 4)
    images = noise(5, 3, 4, 4, seed=1).requires_grad_()
    scores = (images * slope).sum((1, 2, 3))
    assert adversarial.gradient_penalty(scores, images).item() == pytest.approx(slope.square().sum().item(), rel=1e-5)
    places = scores[:, None].expand(5, 7)  # a score of many places counts as their mean
    assert adversarial.gradient_penalty(places, images).item() == pytest.approx(slope.square().sum().item(), rel=1e-5)
    twice = adversarial.gradient_penalty(images.square().sum((1, 2, 3)) / 2, images)  # the gradient is x itself
    assert twice.item() == pytest.approx(images.square().sum((1, 2, 3)).mean().item(), rel=1e-5)
    assert twice.requires_grad, "it can be minimised"


def test_augmentation_is_the_same_for_both_and_differentiable() -> None:
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(1)
    first, second = adversarial.augmented(x, x)
    assert torch.equal(first, second)
    assert not torch.equal(first, adversarial.augmented(x)[0]), "and other the next time"
    torch.manual_seed(1)
    assert torch.equal(adversarial.augmented(x)[0], first), "but a function of the seed"
    first.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(((first[i] == 0).all(0)).sum() >= 16 for i in range(6)), "each image has a hole"


def test_shifts_and_holes_are_where_they_should_be() -> None:
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    down, right = torch.tensor([[1]]), torch.tensor([[-1]])
    expected = F.pad(x, (0, 1, 1, 0))[:, :, :4, 1:]
    assert torch.equal(adversarial._shifted(x, down, right), expected)
    holed = adversarial._hole(x, torch.tensor([[-1]]), torch.tensor([[2]]))
    assert torch.equal(holed == 0, torch.tensor([[0, 0, 1, 1], [0] * 4, [0] * 4, [0] * 4]).bool().view(1, 1, 4, 4))
    light, satur, contr = (torch.full((1, 1, 1, 1), value) for value in (0.75, 0.0, 0.5))
    grey = adversarial._coloured(x, light, satur, contr)
    torch.testing.assert_close(grey, x + 0.25, rtol=0, atol=1e-6)
