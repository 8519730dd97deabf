"""What every pass promises, swept over all passes by name and the tiny models; a new pass is tested by existing."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Any

import pytest
import torch

from edgegen import graph, registry
from edgegen.errors import RecipeError
from edgegen.types import Job, Model, PassResult, Target

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = Target("testbed", "", ("onnxruntime",), precisions=("fp32", "fp16", "int8"), channel_multiple={"int8": 8})
# Options that make a pass quick; every other pass runs with its defaults.
QUICK: dict[str, dict[str, Any]] = {
    "distill": {"steps": 3, "batch": 2, "precision": "fp32"},
    "distill_gan": {"steps": 3, "batch": 2, "precision": "fp32"},
    "prune_blocks": {"ratio": 0.5},
    "equalize": {"samples": 2},
    "correct_bias": {"samples": 2},
    "round_adaptively": {"samples": 2, "steps": 5},
    "quantize_aware": {"steps": 3, "batch": 2, "samples": 2},
    "slim_to_latency": {"ratio": 0.7, "samples": 2},
    "train_supernet": {"steps": 3, "batch": 2, "samples": 2, "precision": "fp32"},
    "slice_widths": {"samples": 8},
}
# Passes that find nothing to do in some of the tiny models.
NOWHERE = (
    "reconstruct", "prune_blocks", "substitute_modconv", "distill_gan", "round_adaptively", "quantize_aware",
    "commute_upsample", "share_weights", "train_supernet", "slice_widths", "dilate",
    "prune_tokens", "downsample_kv", "replace_attention", "distill_steps", "tune_sampler", "cache_steps",
)  # fmt: skip

# pass, options, message
WRONG = [
    ("prune_channels", {"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
    ("prune_channels", {"ratio": -0.1}, r"ratio must lie in \[0, 1\), got -0.1"),
    ("prune_channels", {"importance": "l3"}, "importance must be one of l2, l1, group, random, .*got 'l3'"),
    ("prune_channels", {"scope": "all"}, "scope must be one of local, global, got 'all'"),
    ("prune_channels", {"min_width": 0}, "min_width must be at least 1, got 0"),
    ("prune_channels", {"round_to": 0}, "round_to must be at least 1, got 0"),
    ("prune_channels", {"skip": ["nowhere"]}, "no layer 'nowhere' in"),
    ("prune_channels", {"ratios": {"0": 1.0}}, r"ratios of 0 must lie in \[0, 1\), got 1.0"),
    ("prune_channels", {"ratios": {"nowhere": 0.5}}, "no layer 'nowhere' in"),
    ("prune_channels", {"iterations": 0}, "iterations must be at least 1, got 0"),
    ("prune_channels", {"recover_steps": 5}, "at least 2, got 5 with iterations 1; after the last, use distill"),
    ("distill", {"losses": ["outputs"]}, "unknown loss 'outputs'; there are: output, l2"),
    ("distill", {"losses": {"output": 0.0}}, "the weight of loss output must be above 0, got 0.0"),
    ("distill", {"losses": []}, "losses must name at least one of"),
    ("distill", {"batch": 0}, "batch must be at least 1, got 0"),
    ("distill", {"steps": 0}, "steps must be at least 1, got 0"),
    ("distill", {"lr": -1.0}, "lr must be above 0, got -1.0"),
    ("distill", {"warmup": 1.5}, r"warmup must lie in \[0, 1\), got 1.5"),
    ("distill", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ("distill", {"crop": 0}, "crop must be at least 1 pixel"),
    ("distill", {"precision": "fp16"}, "precision must be one of auto, bf16, fp32, got 'fp16'"),
    ("distill", {"losses": ["labels"]}, "loss labels needs samples with a label"),
    ("distill", {"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ("distill", {"every": -1}, "every and patience must be 0 or more, got -1 and 0"),
    ("distill_gan", {"loss": "wgan"}, "loss must be one of hinge, r3gan, got 'wgan'"),
    ("distill_gan", {"adversarial_after": 1.0}, r"adversarial_after must lie in \[0, 1\), got 1.0"),
    ("distill_gan", {"critic_lr": 0.0}, "critic_lr must be above 0, got 0.0"),
    ("distill_gan", {"features": -1.0}, "features must be 0 or more, got -1.0"),
    ("prune_blocks", {"ratio": 1.0}, r"ratio must lie in \[0, 1\) and samples be at least 1, got 1.0"),
    ("distill", {"margin": 3, "crop": 6}, "margin must be 0, or less than half of crop, got 3 with crop 6"),
    ("distill", {"optimizer": "lion"}, "optimizer must be one of adamw, adam, sgd, muon, got 'lion'"),
    ("reconstruct", {"samples": 0}, "samples, positions and ridge must be positive, got 0"),
    ("distill_steps", {"method": "magic"},
     "method must be one of progressive, pairs, consistency, distribution, got 'magic'"),
    ("distill_steps", {"steps": 0}, "steps must be at least 1, got 0"),
    ("distill_steps", {"perceptual": 1.0}, "perceptual must be 0 or more and is for method pairs, got 1.0"),
    ("tune_sampler", {"methods": ["ddpm"]}, "methods must be among ddim, euler, heun, dpmpp_2m, got 'ddpm'"),
    ("tune_sampler", {"images": 0}, "images 1 or more, got 0, 1, 0, 0"),
    ("tune_sampler", {"skips": [0.0]}, "rhos, skips and backbones must be above 0"),
    ("cache_steps", {"every": 1}, "every must be at least 2, depth and images at least 1, psnr and feedback 0 or more"),
    ("quantize", {"precision": "int4"}, "precision must be one of int8, got 'int4'"),
    ("quantize", {"formats": ["s4s4"]}, r"formats must name at least one of u8s8, s8s8, got \['s4s4'\]"),
    ("quantize", {"rest": "bf16"}, "rest: target testbed has no bf16; it has: fp32, fp16, int8"),
    ("quantize", {"float_types": ["Convolution"]}, "'Convolution' is no ONNX operation"),
    ("quantize", {"float_layers": ["nowhere"]}, "no layer 'nowhere' in"),
    ("quantize", {"weights": ["int2"]}, r"weights must name at least one of int8, int4, got \['int2'\]"),
    ("quantize", {"weights": []}, "weights must name at least one of int8, int4"),
    ("quantize_aware", {"weights": "int2"}, "weights must be one of int8, int4, got 'int2'"),
    ("quantize_aware", {"output": 0.0}, "weights of losses must be 0 or more, and one of them above, got output 0.0"),
    ("round_adaptively", {"weights": "int2"}, "weights must be one of int8, int4, got 'int2'"),
    ("quantize", {"weights_only": ["int2"]}, r"weights_only may name int8, int4, got \['int2'\]"),
    ("quantize", {"sensitivity": "hessian"}, "sensitivity must be one of output, metric, got 'hessian'"),
    ("quantize", {"budget": "size:2"}, r"budget must be size:FRACTION .* got 'size:2'"),
    ("quantize", {"last_layer": "int8"}, "last_layer must be empty or float, got 'int8'"),
    ("quantize", {"samples": 0}, "samples must be at least 1, got 0"),
    ("equalize", {"smooth": 2.0}, r"smooth lie in \[0, 1\], got 20, 2, 2.0"),
    ("correct_bias", {"samples": 0}, "samples must be at least 1, got 0"),
    ("round_adaptively", {"steps": 0}, "steps, batch and lr must be positive"),
    ("round_adaptively", {"layers": ["nowhere"]}, "layers: no layer 'nowhere' in"),
    ("quantize_aware", {"steps": 0}, "batch, samples, steps and temperature must be positive"),
    ("quantize_aware", {"labels": 1.0}, "the loss labels needs samples with a label"),
    ("quantize_aware", {"crop": 0}, "crop must be at least 1 pixel"),
    ("cast", {"precision": "fp8"}, "precision must be one of fp16, bf16, fp32, got 'fp8'"),
    ("prune_tokens", {"ratio": 0.6}, r"ratio must lie in \(0, 0.5\] for merge, got 0.6"),
    ("prune_tokens", {"method": "skip"}, "method must be one of merge, drop, got 'skip'"),
    ("prune_tokens", {"by": "size"}, "by must be one of class, norm, got 'size'"),
    ("downsample_kv", {"factor": 1}, "factor must be at least 2 and min_tokens at least 1, got 1"),
    ("downsample_kv", {"mode": "max"}, "mode must be one of average, stride, nearest, got 'max'"),
    ("downsample_kv", {"layers": ["nowhere"]}, "no self-attention 'nowhere' in"),
    ("replace_attention", {"to": "identity"}, "to must be one of conv, window, linear, ffn, got 'identity'"),
    ("replace_attention", {"blocks": "some"}, "blocks must be auto, all or a list of names, got 'some'"),
    ("replace_attention", {"threshold": 2.0}, r"threshold must lie in \[0, 1\] and radius be above 0, got 2.0"),
    ("replace_attention", {"samples": 0}, "samples and window at least 1, got 200, 50, 0, 4"),
    ("substitute_modconv", {"min_size": 0}, "min_size must be at least 1, got 0"),
    ("substitute_modconv", {"skip": ["nowhere"]}, "no modulated convolution .nowhere. in"),
    ("cast", {"precision": "bf16"}, "target testbed has no bf16; it has: fp32, fp16, int8"),
    ("factorize_svd", {"by": "rank"}, "by must be one of ratio, energy, drop, latency, got 'rank'"),
    ("factorize_svd", {"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
    ("factorize_svd", {"energy": 0.0}, r"energy must lie in \(0, 1\], got 0.0"),
    ("factorize_svd", {"drop": 0.0}, "drop must be above 0, got 0.0"),
    ("factorize_svd", {"by": "latency"}, "needs a target that can be measured, and this job has none"),
    ("factorize_svd", {"kernels": "depth"}, "kernels must be one of channel, spatial, got 'depth'"),
    ("factorize_svd", {"round_to": 0}, "round_to must be at least 1, got 0"),
    ("factorize_svd", {"layers": ["nowhere"]}, "no layer 'nowhere' in"),
    ("factorize_tucker", {"sweeps": -1}, "sweeps must be at least 0, got -1"),
    ("factorize_tucker", {"fit": "inputs"}, "fit must be one of outputs, weights, got 'inputs'"),
    ("factorize_cp", {"sweeps": 0}, "sweeps and growth must be at least 1, got 0"),
    ("factorize_cp", {"samples": 0}, "samples must be at least 1, got 0"),
    ("substitute_conv", {"kind": "shift"}, "kind must be one of depthwise_separable, groups, ghost, split_large, got"),
    ("substitute_conv", {"ghosts": 1}, "ghosts at least 2"),
    ("substitute_conv", {"branch": 0.5}, r"branch must lie in \(0, 1/3\], got 0.5"),
    ("commute_upsample", {"skip": ["nowhere"]}, "no layer 'nowhere' in"),
    ("share_weights", {"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
    ("share_weights", {"groups": [["1", "9"]]}, "no block '9' in residual that could share its weights"),
    ("share_weights", {"groups": [["1"]]}, "groups must be lists of two or more blocks"),
    ("share_weights", {"groups": [["1", "2"], ["2", "1"]]}, "block '1' is named twice in groups"),
    ("slim_to_latency", {"max_latency": 0.0}, "max_latency must be above 0 ms, got 0.0"),
    ("slim_to_latency", {"max_latency": 5.0}, "max_latency needs a target with latencies, and there are none"),
    ("slim_to_latency", {"ratio": 1.0}, r"ratio must lie in \(0, 1\), got 1.0"),
    ("slim_to_latency", {"most": 1.0}, r"most must lie in \(0, 1\), got 1.0"),
    ("slim_to_latency", {"ratio": 1e-6}, "is out of reach: the narrowest network is predicted to take"),
    ("slim_to_latency", {"importance": "l3"}, "importance must be one of l2, l1, .*got 'l3'"),
    ("slim_to_latency", {"widths": 1}, "widths must be at least 2, got 1"),
    ("slim_to_latency", {"layers": ["nowhere"]}, "no layer 'nowhere' in"),
    ("dilate", {"window": 4}, "window must be odd and at least 3, patterns at least 1 .*got 4, 4 and 5"),
    ("dilate", {"patterns": 0}, "patterns at least 1 and min_window above window, got 3, 0 and 5"),
    ("train_supernet", {"steps": -1}, "steps and between must be 0 or more, got -1 and 2"),
    ("train_supernet", {"shares": [0.0]}, r"shares must lie in \(0, 1\], got \[0.0\]"),
    ("train_supernet", {"batch": 1}, "batch must be at least 2, got 1"),
    ("train_supernet", {"samples": 0}, "samples and round_to must be at least 1, got 0"),
    ("slice_widths", {"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
    ("slice_widths", {"ratios": {"nowhere": 0.5}}, "no layer 'nowhere' in"),
    ("slice_widths", {"samples": 0}, "samples and round_to must be at least 1, got 0"),
    ("prune_weights", {"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0"),
    ("prune_weights", {"scope": "local"}, "scope must be one of layer, global, got 'local'"),
    ("prune_weights", {"pattern": "4:2"}, 'pattern must be "N:M" with 0 < N < M'),
]


def apply(name: str, model: Model, options: dict[str, Any] | None = None, **job: Any) -> PassResult:
    """Run a pass with an original beside it as the teacher."""
    function = getattr(registry.module("passes", name), name)
    chosen = QUICK.get(name, {}) | (options or {})
    return function(model, Job(TARGET, **({"teacher": model, "threads": 1, "seed": 7} | job)), **chosen)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def facts(module: torch.nn.Module) -> list[Any]:
    """All that is not weights: modes, gradient flags, plain attributes and hooks of every module."""
    plain = (int, float, str, bool, tuple, type(None))
    return [
        (name, part.training, len(part._forward_hooks), len(part._forward_pre_hooks),
         [(key, value) for key, value in vars(part).items() if isinstance(value, plain)],
         [parameter.requires_grad for parameter in part.parameters(recurse=False)])
        for name, part in module.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("name", registry.names("passes"))
def test_the_input_is_untouched_bit_for_bit(name: str, tiny_model: Model):
    module = tiny_model.stage.module
    module.train()  # a mode that a careless pass would lose
    next(module.parameters()).requires_grad_(False)
    before, before_facts, copy = state(module), facts(module), dataclasses.replace(tiny_model)
    apply(name, tiny_model)
    assert equal(state(module), before)
    assert facts(module) == before_facts
    assert tiny_model == copy


@pytest.mark.parametrize("change", ["weight", "mode", "flag"])
def test_the_check_for_untouched_can_fail(change: str, conv_chain: Model):
    module = conv_chain.stage.module
    before = (state(module), facts(module))
    if change == "weight":
        module[0].weight.data[0, 0, 0, 0] += 1e-6
    elif change == "mode":
        module[1].train()
    else:
        module[0].weight.requires_grad_(False)
    assert not (equal(state(module), before[0]) and facts(module) == before[1])


@pytest.mark.parametrize("name", registry.names("passes"))
def test_the_same_seed_gives_the_same_result(name: str, tiny_model: Model):
    first, second = apply(name, tiny_model), apply(name, tiny_model)
    assert equal(state(first.model.stage.module), state(second.model.stage.module))
    assert (first.model.plan, first.changed, first.skipped) == (second.model.plan, second.changed, second.skipped)


@pytest.mark.parametrize("name", registry.names("passes"))
def test_outputs_keep_their_shapes_and_are_finite(name: str, tiny_model: Model):
    result = apply(name, tiny_model)
    inputs = graph.example_inputs(tiny_model.stage, seed=1)
    before = graph.outputs(tiny_model.stage.module, inputs)
    after = graph.outputs(result.model.stage.module, inputs)
    assert [out.shape for out in after] == [out.shape for out in before]
    assert all(torch.isfinite(out).all() for out in after)
    assert not any(part.training for part in result.model.stage.module.modules()) or name in ("quantize", "cast")


@pytest.mark.parametrize("name", registry.names("passes"))
def test_the_report_accounts_for_every_layer_and_is_json(name: str, tiny_model: Model):
    result = apply(name, tiny_model)
    # reconstruct mends what lost inputs, and nothing here did; a chain has no blocks; no modulated convolutions here
    assert result.changed or (name in NOWHERE and result.skipped)
    assert set(graph.layers(tiny_model.stage.module)) <= set(result.changed) | set(result.skipped)
    assert all(isinstance(reason, str) and reason for reason in [*result.changed.values(), *result.skipped.values()])
    assert json.loads(json.dumps(result.notes)) == result.notes
    assert all(math.isfinite(value) for value in result.notes.values() if isinstance(value, float))


@pytest.mark.parametrize("name", registry.names("passes"))
def test_options_are_keyword_only_with_defaults(name: str):
    function = getattr(registry.module("passes", name), name)
    first, second, *options = inspect.signature(function).parameters.values()
    assert (first.name, second.name) == ("model", "job")
    assert all(option.kind is option.KEYWORD_ONLY and option.default is not option.empty for option in options)
    assert function.__doc__


@pytest.mark.parametrize(("name", "options", "message"), WRONG, ids=[f"{n}-{o}" for n, o, _ in WRONG])
def test_a_wrong_option_is_named(name: str, options: dict[str, Any], message: str, residual: Model):
    with pytest.raises(ValueError, match=message):
        apply(name, residual, options)


def test_every_pass_has_wrong_options_here():
    assert {name for name, _, _ in WRONG} == set(registry.names("passes"))


def test_precision_errors_are_recipe_errors(residual: Model):
    for name in ("quantize", "cast"):
        with pytest.raises(RecipeError):
            apply(name, residual, {"precision": "int3"})


@pytest.mark.parametrize("name", ["prune_channels", "distill"])
def test_an_onnx_file_cannot_be_changed_by_structural_passes(name: str, residual: Model):
    stage = dataclasses.replace(residual.stage, module=None)
    with pytest.raises(ValueError, match="is an ONNX file; use quantize or cast"):
        apply(name, dataclasses.replace(residual, stages=(stage,)))


@pytest.mark.parametrize("name", ["quantize", "cast"])
def test_an_onnx_file_can_be_planned(name: str, residual: Model):
    stage = dataclasses.replace(residual.stage, module=None)
    result = apply(name, dataclasses.replace(residual, stages=(stage,)))
    assert result.model.plan.precision == ("int8" if name == "quantize" else "fp16")
    assert result.changed
