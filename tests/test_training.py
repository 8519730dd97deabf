"""The training loop: repeatable, resumable to the same bits, stops on what is not finite."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from edgegen import training
from edgegen.training import settings as training_settings
from edgegen.training import state as training_state


def net() -> nn.Module:
    """Convolutions, batch norm and dropout: everything with state of its own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1),
    )  # fmt: skip


def batch_at(step: int) -> torch.Tensor:
    return torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(step))


def loss(module: nn.Module, batch: torch.Tensor, step: int) -> torch.Tensor:
    return (module(batch) - batch.flip(1)).float().abs().mean()


def run(module: nn.Module | None = None, **options) -> training.TrainResult:
    settings = {"steps": 12, "lr": 1e-2, "precision": "fp32", "seed": 3, "threads": 1} | options
    step = settings.pop("loss", loss)
    return training.train(net() if module is None else module, step, settings.pop("batch_at", batch_at), **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Killed(Exception):
    """Stands for SIGKILL: the loop cannot handle it."""


def test_same_can_fail():
    a, b = net(), net()
    assert same(a, b)
    with torch.no_grad():
        b[0].weight[0, 0, 0, 0] += 1e-6
    assert not same(a, b)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_give_the_same_bits_with_two_threads(precision: str):
    first, second = run(precision=precision, threads=2), run(precision=precision, threads=2)
    assert same(first.module, second.module)
    assert first.curve == second.curve


def test_another_seed_gives_other_weights():
    assert not same(run(seed=1).module, run(seed=2).module), "dropout must follow the seed"


def test_global_random_state_and_threads_stay_as_they_were():
    module = net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_num_threads()
    run(module, threads=1 if before > 1 else 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, precision: str, optimizer: str):
    options = {"precision": precision, "optimizer": optimizer, "ema": 0.9, "warmup": 0.2}
    whole = run(**options)

    def dying(module, batch, step):
        if step == 7:
            raise Killed
        return loss(module, batch, step)

    file = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        run(**options, checkpoint=file, every_s=0, loss=dying)
    seen = []

    def watching(module, batch, step):
        seen.append(step)
        return loss(module, batch, step)

    resumed = run(**options, checkpoint=file, every_s=0, loss=watching)
    assert seen == [7, 8, 9, 10, 11], "resumes at the step that did not finish"
    assert same(whole.module, resumed.module)
    assert whole.curve == resumed.curve


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    first = run(checkpoint=tmp_path / "s", every_s=0)
    again = run(checkpoint=tmp_path / "s", every_s=0, loss=None)
    assert same(first.module, again.module)
    assert again.steps == 12


@pytest.mark.parametrize("damage", ["cut", "rubbish", "other settings"])
def test_a_useless_checkpoint_is_not_used(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "state.safetensors"
    run(checkpoint=file, every_s=0, lr=0.5 if damage == "other settings" else 1e-2)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "rubbish":
        file.write_bytes(b"not a checkpoint")
    said: list[str] = []  # not caplog: other packages switch logging off for the whole process
    monkeypatch.setattr(training_state.log, "warning", lambda text, *values: said.append(text % values))
    assert same(run(checkpoint=file, every_s=0).module, run().module)
    assert any("starts anew" in text for text in said)


def test_checkpoint_is_written_only_when_due(tmp_path: Path):
    run(checkpoint=tmp_path / "state", every_s=3600)
    assert not list(tmp_path.iterdir())


def test_loss_falls():
    curve = run(steps=60).curve
    assert curve[-1][1] < 0.8 * curve[0][1]
    assert [step for step, _ in curve] == list(range(1, 61))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_and_keeps_the_last_good_weights(where: str):
    module = net()
    start = {name: value.clone() for name, value in module.state_dict().items()}

    def breaking(module, batch, step):
        good = loss(module, batch, step)
        if step < 5:
            return {"image": good}
        bad = good * math.nan if where == "loss" else (module[0].weight.sum() - module[0].weight.sum()).clamp(0).sqrt()
        return {"image": good, "feature": bad}

    result = run(module, loss=breaking)
    assert result.steps == 5
    assert result.stopped.startswith("stopped at step 5 of 12")
    assert ("feature became nan" if where == "loss" else "gradient norm") in result.stopped
    assert all(torch.equal(value, start[name]) for name, value in module.named_parameters() for value in [value.data]
               if name in start), "the copy of step 0 is the last good one"  # fmt: skip


def test_frozen_batch_norm_keeps_its_statistics_and_momentum():
    frozen, moving = net(), net()
    run(frozen, batchnorm="frozen")
    run(moving)
    assert torch.equal(frozen[1].running_mean, torch.zeros(16))
    assert not torch.equal(moving[1].running_mean, torch.zeros(16))
    assert frozen[1].momentum == moving[1].momentum == 0.1
    assert not frozen.training


def test_average_of_constant_weights_is_the_weights():
    module = net()
    before = {name: value.clone() for name, value in module.named_parameters()}
    run(module, ema=0.5, lr=1e-30)
    for name, value in module.named_parameters():
        torch.testing.assert_close(value.data, before[name], rtol=0, atol=1e-6)


def test_batches_come_in_order_although_they_are_prepared_ahead():
    asked, seen = [], []

    def ask(step: int) -> torch.Tensor:
        asked.append(step)
        return torch.full((1, 3, 4, 4), float(step))

    def look(module, batch, step):
        seen.append((step, int(batch[0, 0, 0, 0])))
        return module(batch).mean()

    run(batch_at=ask, loss=look)
    assert asked == list(range(12))
    assert seen == [(step, step) for step in range(12)]


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_are_prepared_with_one_thread_and_the_steps_are_done_with_those_asked_for(threads: int):
    preparing, learning = set(), set()

    def ask(step: int) -> torch.Tensor:
        batch = batch_at(step)
        torch.rand(1_000_000).exp()  # enough for several threads, where torch may use them
        preparing.add(torch.get_num_threads())
        return batch

    def look(module, batch, step):
        learning.add(torch.get_num_threads())
        return loss(module, batch, step)

    run(batch_at=ask, loss=look, threads=threads)
    assert (preparing, learning) == ({1}, {threads})


def test_an_error_in_a_batch_surfaces():
    def broken(step: int) -> torch.Tensor:
        if step == 2:
            raise OSError("no such image")
        return batch_at(step)

    with pytest.raises(OSError, match="no such image"):
        run(batch_at=broken)


def test_progress_says_loss_and_time_left_at_most_twice_a_second():
    said: list[tuple[str, float]] = []
    run(progress=lambda text, fraction: said.append((text, fraction)))
    assert len(said) <= 4
    text, fraction = said[-1]
    assert text.startswith("step 12/12, loss ")
    assert text.endswith(" left")
    assert fraction == 1.0


def test_rate_warms_up_and_ends_near_zero():
    values = training_settings.Settings(100, 1.0, 0, 0.0, "fp32", "cosine", 0.1, "adamw", 0.0, 1.0, "train", 0.1)
    rates = [values.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1"),
        ({"schedule": "step"}, "schedule must be one of cosine, constant, got 'step'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, adam, sgd, muon, got 'lion'"),
        ({"precision": "fp8"}, "precision must be one of auto, bf16, fp32, got 'fp8'"),
        ({"grad_clip": -1.0}, "grad_clip must be 0 or more, got -1"),
    ],
)
def test_bad_settings_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(**options)


class Fickle(nn.Conv2d):
    """Leaves its weight out of the state while it is all ones, as some fixed shortcuts do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not bool((self.weight == 1).all()):
            super()._save_to_state_dict(destination, prefix, keep_vars)


def test_state_does_not_depend_on_what_a_module_saves():
    module = Fickle(3, 3, 1, bias=False)
    nn.init.ones_(module.weight)
    assert not module.state_dict()
    result = run(module, ema=0.5)
    assert result.module.state_dict()
