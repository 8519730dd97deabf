"""distill_gan: the student comes nearer to its teacher, and to real images; latents, images, resuming, stops."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgegen import graph, recipe, training
from edgegen.errors import PassError
from edgegen.models import dcgan
from edgegen.nn import discriminators, encoders
from edgegen.passes import _game
from edgegen.passes.distill_gan import distill_gan
from edgegen.training import adversarial as turns
from edgegen.types import Job, Model, Stage, Target, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = Target("t", "", ())
QUICK: dict[str, Any] = {"steps": 4, "batch": 4, "precision": "fp32"}
FACTORY = '''
from torch import nn
def small(inputs=3):
    return nn.Sequential(nn.Conv2d(inputs, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.LeakyReLU(0.2),
                         nn.Flatten(), nn.LazyLinear(1))
def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.LeakyReLU(0.2),
                         nn.Conv2d(8, 1, 4))
def pair():
    return nn.Sequential(nn.Conv2d(6, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4))
def grey():
    return nn.Conv2d(1, 1, 4)
'''


def generator(width: int, seed: int = 0) -> Model:
    """A small DCGAN: latents (N, 64) to (N, 1, 32, 32) in -1..1."""
    torch.manual_seed(seed)
    stage = Stage("main", dcgan.create(width=width).eval(), (TensorSpec("z", (1, 64)),),
                  (TensorSpec("image", (1, 1, 32, 32), value_range=(-1.0, 1.0)),))  # fmt: skip
    return Model("small-dcgan", "unconditional", (stage,), options={"features": "mnist"})


def job(teacher: Model | None, **more: Any) -> Job:
    return Job(TARGET, teacher=teacher, threads=1, **more)


def distance(a: Model, b: Model) -> float:
    inputs = graph.example_inputs(a.stage, seed=99, batch=8)
    first, second = (graph.outputs(model.stage.module, inputs)[0] for model in (a, b))
    return (first - second).abs().mean().item()


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return dict(model.stage.module.state_dict())


def equal(a: Model, b: Model) -> bool:
    first, second = weights_of(a), weights_of(b)
    return all(torch.equal(first[name], second[name]) for name in first)


class Digits:
    """Stands for data.Dataset of an unconditional generator: latents, and real images (all white)."""

    def __len__(self) -> int:
        return 16

    def train_item(self, i: int, rng: np.random.Generator) -> Any:
        z = np.random.default_rng(i).standard_normal(64).astype(np.float32)
        return dataclasses.make_dataclass("Sample", ["input", "reference", "label"])(z, None, None)

    def real_count(self) -> int:
        return 6

    def real_image(self, i: int) -> Any:
        return np.ones((1, 32, 32), np.float32)


@pytest.mark.parametrize("loss", ["hinge", "r3gan"])
def test_a_small_generator_comes_nearer_without_data(loss: str) -> None:
    teacher, student = generator(8), generator(4, seed=1)
    result = distill_gan(student, job(teacher), loss=loss, lr=1e-2, **QUICK | {"steps": 20, "ema": 0.5})
    assert distance(result.model, teacher) < 0.8 * distance(student, teacher)
    notes = result.notes
    assert notes["inputs"] == "self-generated: random latents N(0, 1)"
    assert (notes["real"], notes["discriminator"], notes["adversarial_from"]) == ("teacher", "projected, mnist", 10)
    assert [step for step, _ in notes["curve"]["critic"]] == list(range(11, 21)), "it rests before"
    assert all(math.isfinite(value) for curve in notes["curve"].values() for _, value in curve)
    assert not result.needs_recovery


def test_the_adversarial_loss_alone_draws_to_the_real_images() -> None:
    teacher, student = generator(8), generator(4, seed=1)
    alone = {"output": 0.0, "features": 0.0, "adversarial": 1.0, "adversarial_after": 0.0, "augment": False}
    options = QUICK | alone | {"steps": 20, "batch": 2, "lr": 5e-3, "critic_lr": 5e-3, "ema": 0.0}
    result = distill_gan(student, job(teacher, data=Digits()), **options)
    inputs = graph.example_inputs(student.stage, seed=99, batch=8)
    before, after = (graph.outputs(model.stage.module, inputs)[0].mean() for model in (student, result.model))
    assert result.notes["real"] == "data"
    assert after > before + 0.1, "the real images are white"


@pytest.mark.parametrize("options", [{"loss": "r3gan"}, {"online": True, "adversarial_after": 0.0}, {"ema": 0.0}])
def test_a_killed_run_resumes_to_the_same_bits(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = generator(8), generator(4, seed=1)
    more = QUICK | {"steps": 5, "batch": 2, "adversarial_after": 0.3} | options

    def play(**where: Any) -> Any:
        return distill_gan(student, job(teacher, data=Digits(), **where), **more)

    whole = play()
    assert equal(whole.model, play().model), "the same seed gives the same result"
    original, save = training.Loop.advance, training.Checkpoint.save_if_due

    def dying(self: Any, step: int, *rest: Any) -> None:
        if step == 3 and self.module.__class__.__name__ == "Generator":
            raise KeyboardInterrupt
        original(self, step, *rest)

    def now(self: Any, state: Any) -> None:
        self.every_s = 0
        save(self, state)

    monkeypatch.setattr(training.Checkpoint, "save_if_due", now)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Loop, "advance", dying)
        play(checkpoints=tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    resumed = play(checkpoints=tmp_path)
    assert equal(whole.model, resumed.model)
    assert whole.notes["curve"] == resumed.notes["curve"]
    assert not equal(whole.model, student)


def test_images_and_the_teachers_own_discriminator(residual: Model, tmp_path: Path) -> None:
    file = tmp_path / "critic.py"
    file.write_text(FACTORY)
    module = graph.clone(residual.stage.module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    student = residual.with_module(module)
    options = QUICK | {"steps": 14, "batchnorm": "frozen", "discriminator": f"{file}:plain", "ema": 0.0, "lr": 2e-3}
    result = distill_gan(student, job(residual), **options)
    assert distance(result.model, residual) < 0.8 * distance(student, residual)
    assert result.notes["discriminator"] == f"{file}:plain"
    beside = distill_gan(student, job(residual), **options | {"discriminator": f"{file}:pair", "conditional": True})
    assert not equal(beside.model, result.model)
    with pytest.raises(ValueError, match=r"the discriminator does not take images \(4, 3, 16, 16\)"):
        distill_gan(student, job(residual), **options | {"discriminator": f"{file}:grey"})


def test_the_weights_of_the_discriminator_are_read(residual: Model, tmp_path: Path) -> None:
    from edgegen import origins, steps, weights

    file, stored = tmp_path / "critic.py", tmp_path / "critic.safetensors"
    file.write_text(FACTORY)
    torch.manual_seed(9)
    weights.save_state(origins.create({"kind": "file", "path": str(file), "factory": "plain"}), stored)
    student = residual.with_module(nn.Sequential(*(graph.clone(part) for part in residual.stage.module)))
    with torch.no_grad():
        student.stage.module[0].weight.mul_(1.2)
    options = QUICK | {"discriminator": f"{file}:plain", "batchnorm": "frozen"}
    with_file, without = (
        distill_gan(student, job(residual), **options | more) for more in ({"discriminator_weights": str(stored)}, {})
    )
    assert not equal(with_file.model, without.model)
    named = {"discriminator": f"{file}:plain", "discriminator_weights": str(stored), "steps": 4, "loss": "hinge"}
    before = steps._files(named)
    assert set(before) == {"discriminator", "discriminator_weights"}
    file.write_text(f"{FACTORY}\n# changed\n")
    after = steps._files(named)
    assert before["discriminator"] != after["discriminator"]
    assert before["discriminator_weights"] == after["discriminator_weights"]


def test_a_loss_that_becomes_nan_stops_all_players_with_the_last_good_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = generator(8), generator(4, seed=1)
    original = _game.Game.critic_loss

    def breaking(self: Any, critic: nn.Module, batch: Any, step: int) -> Any:
        parts = original(self, critic, batch, step)
        return {name: part * math.nan if step == 3 else part for name, part in parts.items()}

    monkeypatch.setattr(_game.Game, "critic_loss", breaking)
    result = distill_gan(student, job(teacher), adversarial_after=0.0, **QUICK | {"steps": 8})
    assert result.notes["steps"] == 3
    assert result.notes["stopped"].startswith("stopped at step 3 of 8: student became nan")
    assert all(torch.isfinite(value).all() for value in weights_of(result.model).values())


def test_a_teacher_that_gives_nan_is_a_pass_error(residual: Model) -> None:
    broken = graph.clone(residual.stage.module)
    with torch.no_grad():
        broken[0].bias.fill_(math.nan)
    with pytest.raises(PassError, match="distill_gan: stopped at step 0 of 4: output became nan"):
        distill_gan(residual, job(residual.with_module(broken)), **QUICK)


def test_what_is_no_generator_is_left_as_it_is(conv_chain: Model) -> None:
    result = distill_gan(conv_chain, job(conv_chain), **QUICK)
    assert not result.changed
    assert set(result.skipped.values()) == {"no generator: its output is no image"}


@pytest.mark.parametrize(("options", "message"), [
    ({"loss": "wasserstein"}, "loss must be one of hinge, r3gan, got 'wasserstein'"),
    ({"adversarial_after": 1.0}, r"adversarial_after must lie in \[0, 1\), got 1.0"),
    ({"output": 0.0, "features": 0.0, "adversarial": 0.0}, "one of output, features and adversarial must be above 0"),
    ({"real": "data"}, "real = data needs real images, and this data has none"),
    ({"online": True}, "online needs real images, and this data has none"),
    ({"discriminator": "critic"}, "discriminator must be file.py:factory, got 'critic'"),
    ({"discriminator_weights": "x.pt"}, "discriminator_weights are given without a discriminator"),
    ({"encoder": "vgg"}, "encoder must be one of , cifar, mnist, got 'vgg'"),
])  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any], message: str, residual: Model) -> None:
    with pytest.raises(ValueError, match=message):
        distill_gan(residual, job(residual), **QUICK | options)


def test_the_presets_are_judged_with_their_recovery() -> None:
    names = {preset: [[step.name for step in group] for group in recipe.groups(recipe.load(preset))]
             for preset in ("gan", "strong")}  # fmt: skip
    assert names == {"gan": [["prune_channels", "distill_gan"]],
                     "strong": [["prune_blocks", "prune_channels", "reconstruct", "distill"]]}  # fmt: skip
    both = recipe.Recipe(steps=tuple(recipe.Step(name=name) for name in
                                     ("prune_channels", "distill", "distill_gan", "prune_blocks")))  # fmt: skip
    assert [len(group) for group in recipe.groups(both)] == [3, 1], "rounds of training belong together"


def test_no_teacher_is_said(residual: Model) -> None:
    with pytest.raises(ValueError, match="distill_gan needs a teacher"):
        distill_gan(residual, job(None), **QUICK)


# ---------------------------------------------------------------------------------------------- the parts by themselves


def test_the_projected_discriminator_never_moves_its_encoder() -> None:
    critic = discriminators.Projected(encoders.create("mnist"), 1).train()
    assert not critic.encoder.training
    assert critic.heads.training
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores, maps = critic(images)
    assert [seen.shape[1] for seen in maps] == [16, 32, 64, 64]
    assert scores.shape[0] == 2
    scores.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in critic.encoder.parameters())
    assert all(parameter.grad is not None for parameter in critic.heads.parameters())


def test_a_watched_discriminator_shows_all_layers_but_the_last() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 1, 3))
    x = torch.rand(2, 3, 9, 9)
    scores, maps = discriminators.Watched(module)(x)
    assert torch.equal(maps[0], module[0](x))
    assert [seen.shape[1] for seen in maps] == [4, 5]
    assert torch.equal(scores, module(x).flatten(1))


def test_feature_distance_is_relative() -> None:
    a, b = torch.full((1, 2, 2, 2), 3.0), torch.full((1, 2, 2, 2), 2.0)
    assert discriminators.feature_distance([b], [b]).item() == 0
    assert discriminators.feature_distance([a, b], [b, b]).item() == pytest.approx(0.25 / 2)


def test_players_take_turns_each_with_its_own_rate() -> None:
    def player(rate: float, name: str, start: int = 0) -> turns.Player:
        module = nn.Linear(1, 1, bias=False)
        nn.init.ones_(module.weight)
        return turns.Player(module, lambda m, batch, step: told.append((name, step)) or m.weight.sum(), rate, start)

    told: list[tuple[str, int]] = []
    players = {"critic": player(1e-2, "critic", start=1), "maker": player(1e-3, "maker")}
    results = turns.train(players, lambda step: torch.zeros(1), steps=3, precision="fp32")
    assert told == [("maker", 0), ("critic", 1), ("maker", 1), ("critic", 2), ("maker", 2)]
    moved = {name: 1 - result.module.weight.item() for name, result in results.items()}
    rates = [0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    assert moved["maker"] == pytest.approx(1e-3 * sum(rates), rel=1e-3)  # Adam: steps of the rate against the gradient
    assert moved["critic"] == pytest.approx(1e-2 * sum(rates[1:]), rel=1e-3)
