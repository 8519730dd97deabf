"""Plans of INT8 builds: which layers stay in float, how narrow weights get, and what recipes and the cache keep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny
from int8_builds import DATA, RUNTIMES, TARGET, image_model, job, needy, skip_without, sorted_by_class, wrong
from torch import nn

from edgegen import errors, onnx_graph, recipe, registry, steps, variants
from edgegen.devices import local
from edgegen.passes import _sensitivity
from edgegen.passes.quantize import quantize
from edgegen.types import Model, PrecisionPlan, Stage, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ plans


def test_the_layers_in_need_are_found_and_left_in_float():
    """Between the last two layers is the tensor whose channels differ a thousandfold: either one in INT8 rounds it."""
    model = needy()
    result = quantize(model, job(), budget="quality:40", samples=4)
    noise = result.notes["sqnr_db"]
    assert noise["0/Conv"] > 50 and max(noise["3/Conv"], noise["5/Conv"]) < 30
    assert result.notes["int8_sqnr_db"] < 30 and result.notes["reached_sqnr_db"] >= 40
    assert set(result.model.plan.float_layers) == {"3/Conv", "5/Conv"}
    assert set(result.changed) == {"0"} and "budget quality:40" in result.skipped["3"]
    with pytest.raises(ValueError, match="the budget asks for"):
        quantize(model, job(), budget="size:0.1", samples=1)


def test_a_budget_in_size_is_kept_with_the_least_noise():
    model = needy()
    result = quantize(model, job(), budget="size:0.6", samples=4)
    weights = {"0/Conv": 224, "3/Conv": 80, "5/Conv": 27}  # with biases, as the graph counts them
    kept = set(result.model.plan.float_layers)
    size = sum(4 * n if name in kept else n for name, n in weights.items()) / (4 * sum(weights.values()))
    assert size <= 0.6 and kept


def test_a_budget_in_latency_counts_the_macs_at_the_targets_rates():
    model, macs = needy(), {"0/Conv": 55296, "3/Conv": 18432, "5/Conv": 6144}
    for peaks, faster in (({}, 4.0), ({"fp32": 1e9, "int8": 2e9}, 2.0)):
        target = dataclasses.replace(TARGET, peak_macs_per_s=peaks)
        result = quantize(model, dataclasses.replace(job(), target=target), budget="latency:0.8", samples=2)
        kept = set(result.model.plan.float_layers)
        took = sum(n if name in kept else n / faster for name, n in macs.items()) / sum(macs.values())
        assert took <= 0.8 and kept
        share = 1 - sum(macs[name] for name in kept) / sum(macs.values())
        assert result.notes["int8_macs_share"] == pytest.approx(share)
    with pytest.raises(ValueError, match="the budget asks for"):
        quantize(model, dataclasses.replace(job(), target=target), budget="latency:0.4", samples=1)


def spiky() -> Model:
    """Five convolutions, of which 4 bits cannot hold the middle one: one weight of each row is ten times the largest of
    the others, and meets a channel that is 0."""
    torch.manual_seed(3)
    convs = [nn.Conv2d(*ends, 3, padding=1) for ends in ((3, 16), (16, 16), (16, 16), (16, 16), (16, 3))]
    with torch.no_grad():
        convs[1].weight[0], convs[1].bias[0] = 0.0, -1.0
        convs[2].weight[:, 0] = 10 * convs[2].weight.abs().max()
    return image_model(nn.Sequential(*[part for conv in convs for part in (conv, nn.ReLU())][:-1]))


BOTH = {"weights": ["int8", "int4"], "samples": 4}


def test_each_layer_gets_8_or_4_bits_for_its_weights_under_a_budget():
    model = spiky()
    with pytest.raises(ValueError, match="all layers in INT8 take off"):
        quantize(model, job(), budget="size:0.2", samples=2)
    result = quantize(model, job(), budget="size:0.2", **BOTH)
    plan, notes = result.model.plan, result.notes
    assert notes["weights"] == ["int4"] and not plan.float_layers
    assert "4/Conv" in plan.eight_bits and "4/Conv" not in notes["in_four_bits"]
    assert {*plan.eight_bits, *notes["in_four_bits"]} == {f"{2 * i}/Conv" for i in range(5)}
    assert quantize(model, job(), budget="size:0.25", **BOTH).notes["weights"] == ["int8"]


@pytest.mark.parametrize("name", RUNTIMES)
def test_builds_have_the_widths_that_were_chosen(name: str, tmp_path: Path):
    skip_without(name)
    model, runtime = spiky(), registry.module("runtimes", name)
    graph = onnx_graph.to_onnx(model.stage, tmp_path / "float.onnx")
    np.save(tmp_path / "input.npy", DATA.images)
    plan = runtime.int8_from_int4(TARGET, local.cpu_flags())[0]
    told = {}
    for wide in ((), ("2/Conv", "4/Conv")):
        chosen = dataclasses.replace(graph, plan=dataclasses.replace(plan, eight_bits=wide))
        built = runtime.build(chosen, tmp_path / "built", calibration=tmp_path, target=TARGET)
        told[wide] = {layer for layer, precision in runtime.inspect(built).layers.items() if "int4" in precision}
        assert ("but 2 layers" in built.plan.label) == bool(wide)
    four = {f"{2 * i}/Conv" for i in range(5)}
    assert told == {(): four, ("2/Conv", "4/Conv"): four - {"2/Conv", "4/Conv"}}


def test_a_budget_of_quality_takes_4_bits_where_they_cost_little():
    model = spiky()
    found = {db: quantize(model, job(), budget=f"quality:{db}", **BOTH) for db in (30, 38)}
    for db, result in found.items():
        assert result.notes["reached_sqnr_db"] >= db
        assert "4/Conv" not in result.notes["in_four_bits"]
    assert len(found[30].notes["in_four_bits"]) > len(found[38].notes["in_four_bits"]) > 0


class TwoHeads(nn.Module):
    """A picture as the sum of two branches, and a mask, made before it in the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.mask, self.fine, self.coarse = (nn.Conv2d(*ends, 3, padding=1)
                                                        for ends in ((3, 8), (8, 1), (8, 3), (8, 3)))  # fmt: skip

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.body(x))
        mask = torch.sigmoid(self.mask(y))
        return 1e-3 * mask, torch.tanh(self.fine(y) + self.coarse(y))


def two_heads() -> Model:
    model = image_model(TwoHeads())
    outputs = (TensorSpec("mask", (1, 1, 16, 16)), TensorSpec("picture", (1, 3, 16, 16)))
    return dataclasses.replace(model, stages=(dataclasses.replace(model.stage, outputs=outputs),))


def test_the_layers_that_make_the_outputs_stay_in_float():
    result = quantize(two_heads(), job(), last_layer="float")
    assert set(result.model.plan.float_layers) == {"mask/Conv", "fine/Conv", "coarse/Conv"}
    assert set(result.changed) == {"body"}
    assert quantize(needy(), job(), last_layer="float").model.plan.float_layers == ("5/Conv",)


def test_every_output_counts_in_the_sensitivity_however_quiet_it_is():
    found = quantize(two_heads(), job(), sensitivity="output", samples=2).notes["sqnr_db"]
    assert all(10 < found[f"{name}/Conv"] < 60 for name in ("body", "mask", "fine", "coarse"))
    with pytest.raises(ValueError, match="judges one output, and net has 2"):
        quantize(two_heads(), job(), sensitivity="metric", samples=2)


def test_builds_with_narrow_weights_alone_are_tried_where_a_recipe_asks_for_them():
    run = SimpleNamespace(target=TARGET, bench=SimpleNamespace(plans=lambda quantized: []))
    for asked, wanted in ([], set()), (["int8"], {"int8"}), (["int8", "int4"], {"int8", "int4"}):
        notes = quantize(needy(), job(), weights_only=asked).notes
        found = [plan for _, plan in variants._quantized_plans(run, notes)]
        assert {plan.weights for plan in found} == wanted and {plan.precision for plan in found} <= {"fp32"}


def test_sensitivity_sees_every_class_of_sorted_data_and_scores_the_samples_that_it_ran(tmp_path: Path):
    model, found = sorted_by_class(tmp_path, 64)
    asked = job(data=found)
    chosen = _sensitivity.samples_of(model, asked, 16)
    assert len(chosen) == 16 and {sample.label for sample in chosen} == {0, 1}
    assert {found[i].label for i in range(16)} == {0}  # what the first ones would be
    inputs, source = _sensitivity.inputs_of(model, asked, 16)
    assert source == "data" and all(np.array_equal(a[0][0], b.input) for a, b in zip(inputs, chosen, strict=True))
    score = _sensitivity.figure(model, asked, 16)
    assert score(np.eye(2)[[sample.label for sample in chosen]]) == 100.0
    assert score(np.eye(2)[[1 - sample.label for sample in chosen]]) == 0.0
    result = quantize(model, asked, sensitivity="metric", samples=16)
    assert result.notes["int8_figure"] == 100.0 and result.notes["sensitivity"] == "metric"
    assert result.notes["recovers"] == {"0/Conv": 0.0, "4/Gemm": 0.0}
    plan = dataclasses.replace(model.plan, scales=(("input", -1e-3, 1e-3),))  # all that it sees is clipped to black
    broken = quantize(dataclasses.replace(model, plan=plan), asked, sensitivity="metric", samples=16)
    assert broken.notes["int8_figure"] < 75 and broken.notes["recovers"]["0/Conv"] > 25


def test_a_metric_without_its_data_is_refused():
    with pytest.raises(ValueError, match="needs data with labels or reference images"):
        quantize(needy(), job(), sensitivity="metric", samples=2)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_narrow_weights_shrink_the_file_and_are_read_back(runtime: str, tmp_path: Path):
    skip_without(runtime)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64)).eval()
    specs = (TensorSpec("input", (1, 16, 64)),), (TensorSpec("output", (1, 16, 64)),)
    made = onnx_graph.to_onnx(Stage("main", net, *specs), tmp_path / "float.onnx")
    module, x = registry.module("runtimes", runtime), np.random.default_rng(0).normal(size=(1, 16, 64))
    exact = net(torch.from_numpy(x.astype(np.float32))).detach().numpy()
    sizes, misses = [], []
    for plan in (PrecisionPlan(), *module.weights_only(TARGET, frozenset())):
        artifact = module.build(
            dataclasses.replace(made, plan=plan), tmp_path / (plan.weights or "fp32"), calibration=None, target=TARGET
        )
        with module.load(artifact) as run:
            misses.append(wrong(exact, run({"input": x.astype(np.float32)})["output"]))
        sizes.append(artifact.size_bytes)
        wanted = f"fp32 (weights {plan.weights})" if plan.weights else "fp32"
        assert set(module.inspect(artifact).layers.values()) == {wanted}
        assert set(module.inspect(artifact).layers) == {"0/MatMul", "3/MatMul"}
    assert sizes[0] > 2 * sizes[1] > 2.5 * sizes[2] * 0.8
    assert misses[0] < 1e-6 < misses[1] < 1e-3 < misses[2] < 5e-2


def test_weights_that_nothing_could_hold_are_refused(tmp_path: Path):
    model = make_tiny("residual")
    made = onnx_graph.to_onnx(model.stage, tmp_path / "float.onnx")
    module = registry.module("runtimes", "onnxruntime")
    with pytest.raises(errors.RuntimeFailed, match="no matrix product"):
        module.build(dataclasses.replace(made, plan=PrecisionPlan("fp32", weights="int4")), tmp_path / "out",
                     calibration=None, target=TARGET)  # fmt: skip
    with pytest.raises(errors.UsageError, match=r"cannot build fp32 \(weights palette4"):
        module.build(dataclasses.replace(made, plan=PrecisionPlan("fp32", weights="palette4")), tmp_path / "out",
                     calibration=None, target=TARGET)  # fmt: skip


# ------------------------------------------------------------------------------------------------ recipes and steps


def test_passes_that_prepare_are_a_group_of_their_own():
    names = ["prune_channels", "distill", "equalize", "correct_bias", "prune_blocks", "quantize_aware", "quantize"]
    made = recipe.Recipe(steps=tuple(recipe.Step(name=name) for name in names))
    assert [[step.name for step in group] for group in recipe.groups(made)] == [
        ["prune_channels", "distill"], ["equalize", "correct_bias"], ["prune_blocks"], ["quantize_aware"]
    ]  # fmt: skip


def test_learned_ranges_survive_the_cache_and_fall_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    model = needy()
    step = recipe.Step(name="quantize_aware", options={"steps": 20, "batch": 4, "lr": 2e-3, "samples": 4})
    first, again = (steps.run_step(step, model, model, job(teacher=model), "data") for _ in range(2))
    assert again.notes["from"] == "cache" and again.model.plan == first.model.plan and first.model.plan.scales
    after = steps.run_step(recipe.Step(name="correct_bias", options={"samples": 4}), first.model, model, job(), "data")
    assert after.changed and after.model.plan.scales == ()
