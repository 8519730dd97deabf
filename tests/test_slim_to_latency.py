"""slim_to_latency against a fake device whose operators take known times, so that the best choice is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import graph
from edgegen.passes import _clock, _slim
from edgegen.passes.slim_to_latency import slim_to_latency
from edgegen.types import Budget, Job, Measurement, Model, Stage, Target, TensorSpec

TARGET = Target("testbed", "", ("onnxruntime",), channel_multiple={"default": 8})


class Branches(nn.Module):
    """Two residual branches of 64 inner channels around 16: one of 3x3, one of 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 16, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1)
        self.end = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.a2(torch.relu(self.a1(x)))
        x = x + self.b2(torch.relu(self.b1(x)))
        return self.end(x)


def network(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    spec = TensorSpec("input", (1, 3, 8, 8), value_range=(0.0, 1.0))
    return Model("branches", "image-to-image", (Stage("main", Branches().eval(), (spec,), ()),))


def rules(three: float, one: float, block: int = 1) -> Any:
    """Fake ms of a convolution: so much for each 64 outputs (of blocks, rounded up) of its window, inputs are free."""
    return lambda window, out: (three if window == 3 else one) * math.ceil(out / block) * block / 64


class FakeDevice:
    """Times as `rules` say, for probes and for whole networks (whose sum is scaled by `off`)."""

    def __init__(self, rule: Any, off: float = 1.0) -> None:
        self.rule, self.off, self.asked, self.timed = rule, off, [], 0

    def operators(self, probes: Any) -> list[Measurement]:
        self.asked = list(probes)
        return [self._one(probe) for probe in probes]

    def _one(self, probe: Any) -> Measurement:
        layer = probe["layers"][0]
        own = self.rule(layer[2], layer[1]) if layer[0] == "conv" else 0.0
        return Measurement("latency", "ms", 0.1 + own, conditions={"table": "fake.json", "spread": 0.05})

    def latency(self, stage: Stage) -> Measurement:
        convs = [part for part in stage.module.modules() if isinstance(part, nn.Conv2d)]
        whole = sum(self.rule(part.kernel_size[0], part.out_channels) for part in convs)
        self.timed += 1
        return Measurement("latency", "ms", whole * (1.0 if self.timed == 1 else self.off))

    def job(self, **more: Any) -> Job:
        return Job(TARGET, threads=1, latency=self.latency, operators=self.operators, **more)


def widths(model: Model) -> tuple[int, int]:
    module: Any = model.stage.module
    return module.a1.out_channels, module.b1.out_channels


INNER = {"layers": ["a1", "b1"], "importance": "l2"}


def test_what_costs_nothing_stays_and_what_costs_goes() -> None:
    device = FakeDevice(rules(4.0, 0.0))  # the 3x3: 1 + 4 + 1 + 3/16; the 1x1 is free
    model = network()
    before = {name: value.clone() for name, value in model.stage.module.state_dict().items()}
    result = slim_to_latency(model, device.job(), max_latency=4.2, **INNER)
    assert widths(result.model) == (32, 64)  # 6.1875 - 4 x 32/64 = 4.1875
    assert result.notes["original_ms"] == pytest.approx(6.1875)
    assert result.notes["predicted_ms"] == pytest.approx(4.1875, rel=1e-3)  # a free operator takes a little
    assert result.notes["latency_ms"] == pytest.approx(4.1875)
    assert result.notes["table_error"] == pytest.approx(0.0, abs=1e-3)
    assert (result.notes["status"], result.notes["reached"], result.notes["table"]) == ("measured", True, "fake.json")
    assert result.needs_recovery and "a1" in result.changed and "b1" in result.skipped
    assert all(torch.equal(before[name], value) for name, value in model.stage.module.state_dict().items())


def test_the_budget_of_a_denoisers_image_is_that_of_all_its_runs() -> None:
    device, times = FakeDevice(rules(4.0, 0.0)), 10

    def latency(stage: Stage) -> Measurement:
        run = device.latency(stage)
        return dataclasses.replace(run, value=times * run.value, conditions={"ms_per_run": run.value, "nfe": times})

    job = dataclasses.replace(device.job(), latency=latency)
    result = slim_to_latency(network(), job, max_latency=times * 4.2, **INNER)
    assert widths(result.model) == (32, 64)  # as of the network that runs once, above
    assert result.notes["original_ms"] == pytest.approx(6.1875) and result.notes["runs"] == pytest.approx(times)
    assert result.notes["table_error"] == pytest.approx(0.0, abs=1e-3)
    enough = slim_to_latency(network(), job, max_latency=times * 6.5, **INNER)
    assert not enough.changed and "takes 6.19 ms a run, within 6.5 ms" in enough.skipped["a1"]


def test_of_equal_costs_the_least_important_goes() -> None:
    model = network()
    with torch.no_grad():
        model.stage.module.b1.weight[:32] *= 1e-3
        model.stage.module.b1.bias[:32] *= 1e-3
    device = FakeDevice(rules(2.0, 2.0))
    result = slim_to_latency(model, device.job(), max_latency=device.latency(model.stage).value - 1.0, **INNER)
    assert widths(result.model) == (64, 32)
    kept: Any = result.model.stage.module
    assert torch.equal(kept.b1.weight, model.stage.module.b1.weight[32:])


def test_widths_that_buy_nothing_are_not_taken() -> None:
    device = FakeDevice(rules(4.0, 0.0, block=32))  # 40 channels take as long as 64
    result = slim_to_latency(network(), device.job(), max_latency=device.latency(network().stage).value - 0.5,
                             widths=8, **INNER)  # fmt: skip
    assert widths(result.model)[0] == 32


def test_a_table_that_is_too_fast_is_corrected_by_measurement() -> None:
    device = FakeDevice(rules(4.0, 0.0), off=1.2)  # whole networks take a fifth more than their operators
    result = slim_to_latency(network(), device.job(), max_latency=4.2, **INNER)
    assert result.notes["corrections"] == 1 and result.notes["reached"]
    assert result.notes["latency_ms"] <= 4.2
    assert result.notes["table_error"] == pytest.approx(1 / 1.2 - 1, abs=1e-3)
    device = FakeDevice(rules(4.0, 0.0), off=1.2)
    once = slim_to_latency(network(), device.job(), max_latency=4.2, corrections=0, **INNER)
    assert not once.notes["reached"] and once.notes["latency_ms"] > 4.2


def test_without_measurements_macs_are_counted_and_it_says_so() -> None:
    model = network()
    result = slim_to_latency(model, Job(TARGET, threads=1), ratio=0.6, **INNER)
    assert result.notes["macs_after"] <= 0.6 * result.notes["macs_before"]
    assert result.notes["status"] == "predicted" and "predicted" in result.notes["source"]
    assert widths(result.model)[0] < 64


@pytest.mark.parametrize("told", ["nothing", "not a number"])
def test_a_latency_that_is_not_known_is_no_limit(told: str) -> None:
    unknown = Measurement("latency", "ms", math.nan, status="not measured", reason="the device is away")
    job = Job(TARGET, threads=1, latency=(lambda stage: unknown) if told == "not a number" else None)
    with pytest.raises(ValueError, match="max_latency needs a target with latencies, and there are none"):
        slim_to_latency(network(), job, max_latency=1.0, **INNER)
    assert slim_to_latency(network(), job, ratio=0.7, **INNER).notes["latency_ms"] is None


def test_an_operator_that_was_not_measured_counts_by_its_macs() -> None:
    device = FakeDevice(rules(4.0, 1.0))

    def some(probes: Any) -> list[Measurement]:
        lost = Measurement("latency", "ms", math.nan, status="not measured", reason="no such kernel")
        return [lost if p["layers"][0][:1] == ["conv"] and p["layers"][0][2] == 1 else device._one(p) for p in probes]

    job = Job(TARGET, threads=1, latency=device.latency, operators=some)
    result = slim_to_latency(network(), job, ratio=0.8, **INNER)
    assert result.notes["not_measured"] > 0 and result.notes["why_not"] == "no such kernel"
    assert set(result.notes["by_macs"]) == {"b1", "b2"}


def test_a_limit_out_of_reach_is_one_line_and_one_that_holds_changes_nothing() -> None:
    device = FakeDevice(rules(4.0, 0.0))
    with pytest.raises(ValueError, match=r"the limit of 0\.1 ms is out of reach: the narrowest network is"):
        slim_to_latency(network(), device.job(), max_latency=0.1, **INNER)
    result = slim_to_latency(network(), device.job(), max_latency=100.0, **INNER)
    assert not result.changed and not result.needs_recovery and result.notes["reached"]
    assert "within 100 ms" in result.skipped["a1"]


def test_the_limit_of_the_budget_holds_where_the_pass_is_told_none() -> None:
    rule, budget = rules(4.0, 0.0), Budget(max_latency_ms=4.2)
    limits = [
        slim_to_latency(network(), FakeDevice(rule).job(budget=given), **told, **INNER, most=0.9).notes["limit_ms"]
        for given, told in ((budget, {}), (budget, {"max_latency": 5.0}), (budget, {"ratio": 0.9}), (Budget(), {}))
    ]
    whole = FakeDevice(rule).latency(network().stage).value
    assert limits == pytest.approx([4.2, 5.0, 0.9 * whole, 0.5 * whole])
    unknown = slim_to_latency(network(), Job(TARGET, threads=1, budget=budget), **INNER, most=0.9)
    assert unknown.notes["limit_ms"] == 0.5 and unknown.notes["status"] == "predicted"


def test_no_group_loses_more_than_it_may() -> None:
    device = FakeDevice(rules(4.0, 0.0))
    assert widths(slim_to_latency(network(), device.job(), max_latency=2.8, most=0.9, **INNER).model)[0] == 8
    with pytest.raises(ValueError, match="is out of reach"):  # 16 of 64 stay: 3.19 ms
        slim_to_latency(network(), FakeDevice(rules(4.0, 0.0)).job(), max_latency=2.8, **INNER)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model.stage.module.a1.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"importance of .* is not finite"):
        slim_to_latency(model, FakeDevice(rules(4.0, 0.0)).job(), **INNER)


def test_each_operator_is_measured_once_at_each_width() -> None:
    device = FakeDevice(rules(4.0, 1.0))
    slim_to_latency(network(), device.job(), ratio=0.7, widths=2, most=0.9, **INNER)
    names = [probe["name"] for probe in device.asked]
    assert len(set(names)) == len(names)
    assert [name for name in names if "3x3 /1 16 to" in name] == [
        "conv 3x3 /1 16 to 8 at 8x8", "conv 3x3 /1 16 to 64 at 8x8", "conv 3x3 /1 16 to 3 at 8x8",
    ]  # fmt: skip
    assert {"image 3x8x8", "image 16x8x8", "image 8x8x8", "image 64x8x8"} == {n for n in names if "image" in n}


def test_between_measured_widths_the_time_is_bilinear() -> None:
    grid = _clock.Grid([8, 16], [8, 32], {(8, 8): 1.0, (16, 8): 2.0, (8, 32): 3.0, (16, 32): 8.0})
    assert grid.at(8, 8) == 1.0 and grid.at(16, 32) == 8.0
    assert grid.at(12, 8) == pytest.approx(1.5)
    assert grid.at(12, 20) == pytest.approx((1.5 + 5.5) / 2)
    assert grid.at(4, 64) == 3.0  # beyond: as at the end


def test_the_clock_of_the_whole_is_its_own_latency() -> None:
    model = network()
    inputs = graph.example_inputs(model.stage, seed=0)
    layers = _clock.layers_of(model.stage.module, inputs)
    device = FakeDevice(rules(4.0, 1.0))
    for original in (20.0, 2.0):  # more than the operators take together, and less
        made = _clock.clock(layers, {}, original, device.job())
        assert made.whole(layers) == pytest.approx(original)
        assert (made.rest > 0) == (original == 20.0) and (made.scale < 1) == (original == 2.0)
        state = _slim.Slimming(layers, made, [])
        assert state.total == pytest.approx(original)


def test_the_time_that_is_kept_up_to_date_is_that_of_the_network() -> None:
    """After moves there and back the running total equals a sum from scratch, and a wrong one would be seen."""
    model = network()
    inputs = graph.example_inputs(model.stage, seed=0)
    result = slim_to_latency(model, FakeDevice(rules(4.0, 1.0)).job(), ratio=0.5, importance="taylor")
    layers = _clock.layers_of(model.stage.module, inputs)
    after = {layer.path: layer.wide for layer in _clock.layers_of(result.model.stage.module, inputs)}
    made = _clock.clock(layers, {}, float(result.notes["original_ms"]), FakeDevice(rules(4.0, 1.0)).job())
    exact = sum(rules(4.0, 1.0)(layer.window, after[layer.path][1]) for layer in layers)
    assert result.notes["predicted_ms"] == pytest.approx(exact)
    assert made.whole(layers) == pytest.approx(result.notes["original_ms"]) and exact < made.whole(layers)


def test_results_of_one_target_are_not_another_ones(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgegen import recipe, steps

    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    step = recipe.Step(name="slim_to_latency", options={"max_latency": 4.2, **INNER})
    dear, cheap = (rules(4.0, 0.0), (32, 64)), (rules(0.1, 5.0), (64, 32))
    for name, place, (rule, wanted) in (("a", "", dear), ("b", "", cheap), ("a", "ssh://b", cheap)):
        device = FakeDevice(rule)
        target = Target(name, "", ("onnxruntime",), channel_multiple={"default": 8})
        job = Job(target, threads=1, latency=device.latency, operators=device.operators, measured_on=place)
        assert widths(steps.run_step(step, network(), network(), job, "data").model) == wanted


def test_another_budget_is_another_result_where_it_is_the_limit(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgegen import recipe, steps

    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    for options, again in ((INNER, False), ({"ratio": 0.7, **INNER}, True)):
        step = recipe.Step(name="slim_to_latency", options=options)
        for ms in (4.2, 6.0):
            job = FakeDevice(rules(4.0, 0.0)).job(budget=Budget(max_latency_ms=ms))
            found = steps.run_step(step, network(), network(), job, "data").notes
        assert (found.get("from") == "cache") is again


@pytest.mark.slow
def test_a_run_times_operators_into_a_table_and_parts_of_the_network(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, conv_chain: Model
) -> None:
    """The real thing, small: two operators of the network, and one of its layers alone, in the run's best runtime."""
    from pathlib import Path

    from edgegen import operator_table, run, run_graphs, run_jobs, targets
    from edgegen.request import Request

    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    one_runtime = dataclasses.replace(targets.load("cpu"), runtimes=("onnxruntime",))
    monkeypatch.setattr(run.targets, "load", lambda name: one_runtime)
    monkeypatch.setattr(run, "_model", lambda request: conv_chain)
    request = Request(model="tiny", out=tmp_path / "out", threads=1, latency_only=True, recipe="post-training")
    opened = run.open_run(request, run.quiet)
    original = run_graphs.export(opened, conv_chain, "original")
    opened.bench.feeds = run_graphs.feeds(opened, original)
    job = run_jobs.job_of(opened)
    assert job.operators is not None and job.latency is not None
    layer = _clock.layers_of(conv_chain.stage.module, graph.example_inputs(conv_chain.stage))[1]
    found = job.operators([layer.probe(16, 32), layer.probe(16, 16), layer.probe(16, 32)])
    assert [m.status for m in found] == ["measured"] * 3 and found[0] == found[2]
    assert all(m.value > 0 and m.conditions["n"] > 0 for m in found)
    table = operator_table.load(Path(found[0].conditions["table"]))
    assert len(table["entries"]) == 2 and table["entries"][0]["samples"]
    spec = TensorSpec("input", (1, 16, 8, 8)), TensorSpec("output", (1, 32, 8, 8))
    alone = Stage("part", nn.Conv2d(16, 32, 3, padding=1).eval(), spec[:1], spec[1:])
    assert job.latency(alone).value > 0  # its input is not the network's
