"""`edgegen probe`: shapes are made without training, timed against the original, and what cannot be is a row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import probing, registry
from edgegen.errors import ModelError, RecipeError
from edgegen.passes import prune_channels
from edgegen.request import Request
from edgegen.types import Measurement, Model

NET = '''
from torch import nn

RECORD = {"task": "image-to-image", "input": {"shape": [1, 3, 64, 64], "value_range": [0, 1], "mean": [], "std": []},
          "output": {"value_range": [0, 1]}, "licence": "CC0-1.0"}

def net():
    parts = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    for _ in range(3):
        parts += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*parts, nn.Conv2d(64, 3, 3, padding=1))
'''


def test_the_gain_is_that_of_the_better_build() -> None:
    def ratio(value: float) -> Measurement:
        return Measurement("latency ratio", "", value)

    assert probing.Probe("a", {}, floats=ratio(0.5), int8=ratio(0.25)).gain == 4.0
    assert probing.Probe("a", {}, floats=ratio(0.5)).gain == 2.0
    assert probing.Probe("a", {}, failure="no").gain == 0.0


def test_every_pass_that_states_probes_states_options_that_it_has() -> None:
    from edgegen import recipe

    found = probing.shapes()
    assert ("prune_channels", {"ratio": 0.5}) in found
    for name, options in found:
        assert set(options) <= set(recipe.options_of(name)), name


def test_what_cannot_be_probed_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown pass 'prune'"):
        probing.shapes(["prune"])
    with pytest.raises(RecipeError, match="distill cannot be probed"):
        probing.shapes(["distill"])
    with pytest.raises(ModelError, match="unknown model"):
        probing.probe(Request(model="edsrr", out=Path("nowhere")))


def test_every_pass_is_probed_or_says_why_not() -> None:
    tried = {name for name, _ in probing.shapes()}
    assert {"factorize_cp", "substitute_modconv", "commute_upsample", "cache_steps", "distill_steps"} <= tried
    for name in set(registry.names("passes")) - tried:
        assert probing.why_not(name) != "it states no shapes to try", name


def _opened(model: Model) -> Any:
    return SimpleNamespace(model=model, request=SimpleNamespace(seed=0))


def test_a_fault_in_one_shape_is_a_row(conv_chain: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Model, job: object, **options: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(prune_channels, "prune_channels", broken)
    monkeypatch.setattr(probing.run_jobs, "job_of", lambda opened: None)
    row = probing._shape(_opened(conv_chain), "prune_channels", {"ratio": 0.5}, None, None)  # type: ignore[arg-type]
    assert row.gain == 0 and "IndexError: list index out of range; the traceback is in" in row.failure


def test_fewer_runs_are_arithmetic(conv_chain: Model) -> None:
    ratio = {"floats": Measurement("latency ratio", "", 1.0), "int8": Measurement("latency ratio", "", 0.5)}
    builds: Any = [SimpleNamespace(ratio=value) for value in ratio.values()]
    loop = {"prediction": "v", "schedule": "cosine", "sampler": {"name": "ddim", "steps": 20}}
    denoiser = dataclasses.replace(conv_chain, options=loop)
    row = probing._shape(_opened(denoiser), "distill_steps", {"steps": 2}, *builds)
    assert (row.gain, row.note) == (pytest.approx(20.0), "arithmetic: 2 of 20 runs")
    assert row.floats is not None and (row.floats.value, row.floats.status) == (pytest.approx(0.1), "estimated")
    row = probing._shape(_opened(conv_chain), "distill_steps", {"steps": 2}, *builds)
    assert row.gain == 0 and row.failure == "changes nothing here: the network runs 1 times for an image"


def test_weights_become_random_and_the_module_stays(conv_chain: Model) -> None:
    module = conv_chain.stage.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    made = probing._random(module, 0)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    first, second = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)).weight for net in (made, module))
    assert not torch.equal(first, second)
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        assert float(norm.weight.detach().min()) >= 0.5


@pytest.mark.slow
def test_a_wide_network_gains_by_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET, encoding="utf-8")
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prune_channels, "PROBES", ({"ratio": 0.75}, {"ratio": 0.5, "skip": ["nowhere"]}))
    assert registry.module("passes", "prune_channels") is prune_channels
    request = Request(model=f"{file}:net", out=tmp_path / "out", threads=1)
    found = probing.probe(request, ["prune_channels"])
    original, narrow, wrong = found.rows
    assert original.name == "original" and original.floats is not None and original.floats.value == pytest.approx(1)
    assert narrow.params < 0.1 * original.params and narrow.macs < 0.1 * original.macs
    assert narrow.gain > 1.3  # an eighth of the arithmetic or less
    assert wrong.gain == 0 and "nowhere" in wrong.failure
    assert not (tmp_path / "out").exists()
