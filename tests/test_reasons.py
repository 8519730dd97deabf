"""Why a step does not pay: each cause from figures that have it, and not from figures that have not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgegen import decide, reasons, recipe, recovery, summary
from edgegen.operators import Kernel
from edgegen.reasons import Build
from edgegen.types import Graph, Inspection, Model, PassResult, Target

BARE = Target("here", "", ("onnxruntime",), channel_multiple={"default": 16})
FACTS = replace(BARE, bandwidth_bytes_per_s=1e9, peak_macs_per_s={"fp32": 1e10})  # 10 MACs a byte


def conv(macs: int, moved: int = 100, width: int = 64, kind: str = "conv3x3", name: str = "c") -> Kernel:
    return Kernel(kind, macs, moved // 2, 10, moved // 2, width, width, 8, 8, (3, 3), name=name)


def build(*kernels: Kernel, ms: float = 1.0, **more: object) -> Build:
    return Build((Kernel("run"), *kernels), ms, **more)  # type: ignore[arg-type]


def test_launch_bound_is_many_short_kernels_and_as_many_as_before() -> None:
    before = build(*[conv(1000)] * 100, ms=0.9)
    text = reasons.launch_bound(build(*[conv(100)] * 100, ms=0.8), before)
    assert "launch-bound (100 kernels, before 100, of 8.0 us each" in text
    assert not reasons.launch_bound(build(*[conv(100)] * 100, ms=1.1), before)  # 11 us each
    assert not reasons.launch_bound(build(*[conv(100)] * 50, ms=0.4), before)  # half as many
    assert not reasons.launch_bound(build(*[conv(100)] * 100, ms=float("nan")), before)


@pytest.mark.parametrize(("moved", "bound"), [(1000, True), (50, False)])
def test_memory_bound_by_the_facts_of_the_target(moved: int, bound: bool) -> None:
    one = build(conv(1000, moved))  # 1010 or 60 bytes for 1000 MACs: 1.01 or 0.06 us to move, 0.1 us to compute
    text = reasons.memory_bound(one, one, FACTS)
    assert bool(text) is bound
    if bound:
        assert "1 bytes a MAC, the target computes 10 MACs a byte" in text


@pytest.mark.parametrize(("ms", "bound"), [(0.95, True), (0.25, False)])
def test_memory_bound_without_facts_is_time_that_follows_the_bytes(ms: float, bound: bool) -> None:
    text = reasons.memory_bound(build(conv(1000, 990), ms=ms), build(conv(4000, 1090), ms=1.0), BARE)
    assert bool(text) is bound
    if bound:
        assert "MACs 4.00x less, moved bytes 1.10x less, and the time followed the bytes: 1.05x less" in text


def test_more_bytes_for_the_same_macs_are_told_as_more() -> None:
    text = reasons.memory_bound(build(conv(1000, 1490), ms=1.5), build(conv(1000, 990), ms=1.0), BARE)
    assert "MACs the same, moved bytes 1.50x more, and the time followed the bytes: 1.50x more" in text


def test_an_unaligned_width_is_named_with_its_layer() -> None:
    before = build(conv(1000), conv(1000))
    text = reasons.unaligned(build(conv(600, width=44, name="body.3"), conv(400)), before, BARE)
    assert "60% of the MACs, before 0%" in text and "body.3: 44 to 44" in text and "round_to = 16" in text
    assert not reasons.unaligned(build(conv(600, width=48), conv(400)), before, BARE)
    assert not reasons.unaligned(build(conv(100, width=44), conv(900)), before, BARE)
    odd = build(conv(600, width=44), conv(400))
    assert not reasons.unaligned(odd, odd, BARE)  # it was so before
    assert not reasons.unaligned(build(conv(600, width=3), conv(400)), before, BARE)  # an image


def test_a_float_island_is_read_from_the_build() -> None:
    seen = Inspection({"a": "int8", "b": "fp32", "c": "fp32"}, 0.5, 0.6)
    text = reasons.float_island(build(conv(10), precision="int8", inspection=seen))
    assert "40% of the MACs stayed in float, 2 of 3 layers, such as b, c" in text
    assert not reasons.float_island(build(conv(10), precision="fp32", inspection=seen))
    assert not reasons.float_island(build(conv(10), precision="int8", inspection=replace(seen, int8_macs_share=0.95)))
    assert not reasons.float_island(build(conv(10), precision="int8"))


def test_a_slower_kernel_has_a_greater_share_than_before() -> None:
    before = build(conv(4_000_000), ms=1.0)
    text = reasons.slower_kernel(build(conv(500_000), conv(500_000, kind="depthwise"), ms=1.0), before)
    assert "50% of the MACs are depthwise, before 0%; 1 GMAC/s altogether, before 4" in text
    assert not reasons.slower_kernel(build(conv(1_000_000)), before)


def test_no_cause_without_evidence_and_a_file_that_is_gone_says_nothing() -> None:
    same = build(conv(10_000), ms=1.0)
    assert reasons.why(same, same, BARE) == [] and reasons.told([]) == ""
    assert reasons.told(["a", "b"]) == "; why: a; b"
    assert reasons.read(Graph("main", Path("nowhere.onnx"), (), ()), "onnxruntime", 1.0) is None


def result(model: Model, needs: bool = True) -> PassResult:
    return PassResult(model, {"a": "x"}, needs_recovery=needs)


def test_only_what_no_training_follows_needs_recovery(conv_chain: Model) -> None:
    prune, distill = recipe.Step(name="prune_channels"), recipe.Step(name="distill")
    assert recovery.open_ends([prune], [result(conv_chain)]) == ["prune_channels"]
    assert recovery.open_ends([prune, distill], [result(conv_chain), result(conv_chain)]) == []
    for tuned in ("tune_sampler", "cache_steps"):  # they train nothing
        pair = [result(conv_chain), result(conv_chain, needs=False)]
        assert recovery.open_ends([prune, recipe.Step(name=tuned)], pair) == ["prune_channels"]
    exact = recipe.Step(name="commute_upsample")
    assert recovery.open_ends([exact], [result(conv_chain, needs=False)]) == []
    assert recovery.open_ends([prune], [replace(result(conv_chain), changed={})]) == []


def test_the_advice_has_the_recipe_and_the_cost() -> None:
    text = recovery.advice(["prune_channels"], 0.3)
    assert text.startswith("needs recovery: after prune_channels put pass = \"distill\"")
    assert "0.3 s a step measured here x 2000 steps = 10 min" in text


def test_a_step_is_measured(conv_chain: Model) -> None:
    run = SimpleNamespace(model=conv_chain, request=SimpleNamespace(seed=0), target=SimpleNamespace(threads=1),
                          train_device="cpu")  # fmt: skip
    assert 0 < recovery.step_seconds(run, conv_chain) < 60  # type: ignore[arg-type]
    assert all(p.grad is None for p in conv_chain.stage.module.parameters())


def test_without_recovery_and_without_quality_there_is_no_success() -> None:
    status, reason = decide.unrecovered("kept", "2.00x", "needs recovery: distill", holds=False)
    assert (status, reason) == ("needs recovery", "needs recovery: distill; 2.00x")
    assert decide.unrecovered("predicted", "2.00x", "A", holds=False)[0] == "needs recovery"
    assert decide.unrecovered("undone", "drop of 3", "A", holds=True) == ("undone", "drop of 3; A")
    assert decide.unrecovered("forced", "drop of 3", "A", holds=False) == ("needs recovery", "A; drop of 3")
    assert decide.unrecovered("forced", "1.00x", "A", holds=True)[0] == "forced"
    kept = decide.unrecovered("kept", "2.00x", "A", holds=True)
    assert kept == ("kept", "2.00x; inside the quality budget without recovery")
    assert summary.unfinished([{"name": "prune_channels", "status": status}]).startswith("Not finished, needs recovery")
    assert summary.unfinished([{"name": "prune_channels", "status": "kept"}]) == ""


@pytest.mark.parametrize(("of", "status"), [("net, rewritten", "kept"), ("net", "undone")])
def test_a_rewrite_that_the_chosen_build_does_not_hold_is_undone(of: str, status: str) -> None:
    chosen = SimpleNamespace(of=of, quantized=False, label=f"{of}: ov fp32")
    record = {"name": "rewrite_graph", "status": "kept", "reason": "1.00x -> 1.03x", "network": "net, rewritten"}
    (told,) = summary.prepared([record], ["net", "net, rewritten"], chosen)  # type: ignore[arg-type]
    assert told["status"] == status and "network" not in told
    assert ("chosen without it: net: ov fp32" in told["reason"]) is (status == "undone")
