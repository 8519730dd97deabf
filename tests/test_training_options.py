"""What training can do beside its plain loop: accumulation, early stopping, rates by layer, fp16; all resumable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import training
from edgegen.training import loop as training_loop
from edgegen.training import settings as training_settings
from edgegen.training import state as training_state

OPTIONS = {"steps": 8, "lr": 1e-2, "precision": "fp32", "seed": 3, "threads": 1}


def net(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )


def batch_at(step: int, size: int = 4) -> torch.Tensor:
    return torch.rand((size, 3, 8, 8), generator=torch.Generator().manual_seed(step))


def loss(module: nn.Module, batch: torch.Tensor, step: int) -> torch.Tensor:
    return (module(batch) - batch.flip(1)).float().square().mean()


def run(module: nn.Module | None = None, **options: Any) -> training.TrainResult:
    settings = OPTIONS | options
    step, batches = settings.pop("loss", loss), settings.pop("batch_at", batch_at)
    return training.train(net() if module is None else module, step, batches, **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def far(module: nn.Module) -> float:
    """How far the network is from what it should learn, on images of its own."""
    return loss(module, batch_at(10_000), 0).item()


# ------------------------------------------------------------------------------------------------------- accumulation


def test_accumulated_batches_are_one_large_batch() -> None:
    def large(step: int) -> torch.Tensor:
        return torch.cat([batch_at(3 * step + part) for part in range(3)])

    split, whole = (run(net(norm=False), **more) for more in ({"accumulate": 3}, {"batch_at": large}))
    for name, value in whole.module.state_dict().items():
        torch.testing.assert_close(split.module.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)
    assert [loss for _, loss in split.curve] == pytest.approx([loss for _, loss in whole.curve], abs=1e-5)
    plain = run(net(norm=False))
    assert not torch.allclose(plain.module[0].weight, whole.module[0].weight, rtol=0, atol=1e-5), "the check can fail"


def test_each_batch_is_asked_for_once_and_in_order() -> None:
    asked = []
    run(accumulate=2, steps=3, batch_at=lambda step: asked.append(step) or batch_at(step))
    assert asked == list(range(6))


# ----------------------------------------------------------------------------------------------------- early stopping


def judged(scores: list[float], **options: Any) -> tuple[training.TrainResult, list[dict[str, torch.Tensor]]]:
    """A run whose evaluations say `scores` in turn, and the weights that they saw."""
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(module: nn.Module) -> float:
        assert not module.training
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return scores[len(seen) - 1]

    return run(evaluate=evaluate, **({"every": 1} | options)), seen


def test_the_best_weights_are_kept_and_training_ends_when_it_gets_no_better() -> None:
    result, seen = judged([5.0, 3.0, 4.0, math.nan, 2.0], patience=2)
    assert (result.steps, result.best_step) == (4, 2)
    assert result.stopped == "stopped at step 4 of 8: 2 evaluations brought nothing better than step 2"
    assert result.scores == ((1, 5.0), (2, 3.0), (3, 4.0), (4, math.inf))
    kept = result.module.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())
    assert not all(torch.equal(kept[name], value) for name, value in seen[3].items()), "the check can fail"


def test_without_patience_all_steps_are_done_and_the_best_is_kept() -> None:
    result, seen = judged([3.0, 1.0, 2.0, 2.0], every=2)
    assert (result.steps, result.best_step, result.stopped) == (8, 4, "")
    assert all(torch.equal(result.module.state_dict()[name], value) for name, value in seen[1].items())


def test_evaluation_sees_the_average_and_training_goes_on_from_the_weights() -> None:
    result, seen = judged([float(-n) for n in range(8)], ema=0.9)
    assert same(result.module, run(ema=0.9).module), "the last average is the best, and looking changed nothing"
    assert not torch.equal(seen[-1]["0.weight"], run().module[0].weight), "the average is not the last weights"


def test_a_module_that_becomes_nan_ends_with_the_best_weights() -> None:
    def breaking(module: nn.Module, batch: torch.Tensor, step: int) -> torch.Tensor:
        return loss(module, batch, step) * (math.nan if step == 5 else 1)

    result, seen = judged([3.0, 1.0, 2.0, 4.0, 5.0], loss=breaking)
    assert "loss became nan" in result.stopped
    assert all(torch.equal(result.module.state_dict()[name], value) for name, value in seen[1].items())


def test_patience_without_an_evaluation_is_named() -> None:
    with pytest.raises(ValueError, match="every and patience are for evaluations"):
        run(patience=2)


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("options", [
    {"accumulate": 2, "ema": 0.9},
    {"evaluate": far, "every": 2, "patience": 3},
    {"evaluate": far, "every": 1, "patience": 2, "ema": 0.5, "lr": 0.5, "schedule": "constant"},
    {"rates": {"0.weight": 0.1}, "optimizer": "muon"},
], ids=["accumulate", "evaluate", "stops early", "rates"])  # fmt: skip
def test_a_killed_run_resumes_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    whole, batches = run(**options), 0

    def dying(module: nn.Module, batch: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if step == min(5, whole.steps - 1) and batches % options.get("accumulate", 1) == 0:
            raise KeyboardInterrupt
        return loss(module, batch, step)

    file = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(**options, checkpoint=file, every_s=0, loss=dying)
    steps = []
    resumed = run(**options, checkpoint=file, every_s=0,
                  loss=lambda module, batch, step: steps.append(step) or loss(module, batch, step))  # fmt: skip
    assert steps[0] == min(5, whole.steps - 1)
    assert same(whole.module, resumed.module)
    assert (whole.curve, whole.scores, whole.stopped) == (resumed.curve, resumed.scores, resumed.stopped)


def test_defaults_that_came_later_do_not_invalidate_checkpoints() -> None:
    first = (8, 1e-2, 3, 0.0, "fp32", "cosine", 0.0, "adamw", 0.0, 1.0, "train", 0.1)
    plain = training_settings.Settings(*first)
    assert list(plain.named().values()) == list(first)
    assert training_settings.Settings(*first, accumulate=2).named() == plain.named() | {"accumulate": 2}


# --------------------------------------------------------------------------------------------------------- rates, fp16


def test_a_factor_scales_the_step_of_its_parameter_alone() -> None:
    start = net().state_dict()

    def moved(**more: Any) -> dict[str, float]:
        module = run(net(), steps=1, optimizer="sgd", grad_clip=0.0, **more).module
        return {name: (value - start[name]).abs().sum().item() for name, value in module.named_parameters()}

    plain, scaled = moved(), moved(rates={"0.weight": 0.25})
    assert scaled.pop("0.weight") == pytest.approx(0.25 * plain.pop("0.weight"), rel=1e-4)
    assert scaled == plain


def test_fp16_scales_its_loss_and_leaves_out_steps_that_overflow() -> None:
    values = training_settings.Settings(8, 1e-2, 3, 0.0, "fp16", "constant", 0.0, "sgd", 0.0, 0.0, "train", 0.1)
    module = net()
    player = training_loop.Loop(module, values, "cpu", loss)
    assert player.scaler is not None
    module.train()
    player.advance(0, [batch_at(0)])
    first = {name: value.clone() for name, value in module.named_parameters()}
    assert not torch.equal(first["0.weight"], net()[0].weight)
    scale = player.scaler.get_scale()
    player.loss_step = lambda module, batch, step: loss(module, batch, step) * 1e36  # finite; times 65536 it is not
    player.advance(1, [batch_at(1)])
    assert not player.stopped
    assert player.scaler.get_scale() == scale / 2
    assert all(torch.equal(value, first[name]) for name, value in module.named_parameters())
    tensors, numbers = player.state()
    other = training_loop.Loop(net(), values, "cpu", loss)
    other.restore(tensors, numbers)
    assert other.scaler.state_dict() == player.scaler.state_dict()


def test_fp16_is_for_cuda() -> None:
    with pytest.raises(ValueError, match="precision must be one of auto, bf16, fp32, got 'fp16'"):
        training_settings.resolve_precision("fp16", "cpu")
    assert training_settings.resolve_precision("fp16", "cuda:1") == "fp16"


@pytest.mark.parametrize(("options", "message"), [
    ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ({"evaluate": far, "patience": -1}, "every and patience must be 0 or more"),
    ({"rates": {"0.weight": 0.0}}, "the rate of 0.weight must be a factor above 0, got 0.0"),
])  # fmt: skip
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_prefixes_are_undone() -> None:
    tensors = {"a.b": torch.zeros(1), "c/d": torch.ones(1)}
    found = training_state.by_prefix(training_state.with_prefix("module", tensors), ("module", "good"))
    assert found == {"module": tensors, "good": {}}
