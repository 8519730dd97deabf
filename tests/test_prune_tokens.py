"""prune_tokens: what merges, what is dropped, that it runs in the runtimes, and where it says why it does not apply."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgegen import architecture, graph, onnx_graph, recipe, steps
from edgegen.nn import tokens
from edgegen.passes.prune_tokens import prune_tokens
from edgegen.types import Job, Model, PassResult, Stage, Target, TensorSpec

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")


def vit(**config: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5} | config
    return VisionTransformer(**options).eval()


def model_of(module: nn.Module, size: int = 16) -> Model:
    out = graph.outputs(module, [torch.zeros(1, 3, size, size)])[0]
    stage = Stage("main", module, (TensorSpec("input", (1, 3, size, size), value_range=(0.0, 1.0)),),
                  (TensorSpec("output", tuple(out.shape)),))  # fmt: skip
    return Model("net", "classification", (stage,))


def run(module: nn.Module, **options: Any) -> PassResult:
    return prune_tokens(model_of(module), Job(Target("t", "", ())), **options)


# ------------------------------------------------------------------------------------------------------- closed form


def test_equal_tokens_merge_first_and_become_their_weighted_mean():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]])  # prefix, a, b, a, b
    sizes = torch.tensor([[[1.0], [1.0], [3.0], [1.0], [1.0]]])
    merged, now = tokens.merge(x, x, sizes, 1, 1)
    # a0 = (1, 0) and b0 = (3, 0) point the same way: (1 * 1 + 3 * 3) / 4; a1 stays, b1 stays
    assert torch.allclose(merged, torch.tensor([[[9.0, 9.0], [0.0, 1.0], [2.5, 0.0], [-1.0, 1.0]]]))
    assert now.flatten().tolist() == [1.0, 1.0, 4.0, 1.0]


def test_several_tokens_merge_into_one():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])  # a, b, a, b
    merged, sizes = tokens.merge(x, x, torch.ones(1, 4, 1), 2, 0)
    assert torch.allclose(merged, torch.tensor([[[4 / 3, 0.0], [0.0, 1.0]]]))
    assert sizes.flatten().tolist() == [3.0, 1.0]


def test_merging_keeps_the_sum_of_all_tokens():
    x, sizes = torch.randn(2, 18, 8), torch.randint(1, 4, (2, 18, 1)).float()
    merged, now = tokens.merge(x, torch.randn(2, 18, 4), sizes, 5, 2)
    assert merged.shape == (2, 13, 8)
    assert torch.allclose((merged * now).sum(1), (x * sizes).sum(1), atol=1e-5)
    assert torch.equal(merged[:, :2], x[:, :2])


def test_the_highest_scores_stay():
    x = torch.arange(6.0).reshape(1, 6, 1)
    kept = tokens.drop(x, torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0]]), 3, 1)
    assert kept[0, 0] == 0 and sorted(kept[0, 1:].flatten().tolist()) == [1.0, 3.0]


def test_the_attention_of_the_class_token_is_the_real_one():
    block = vit().blocks[0]
    x = torch.randn(2, 17, 24)
    block.attn.fused_attn = False
    seen: list[torch.Tensor] = []
    block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    block.attn(x)
    assert torch.allclose(tokens.class_attention(block.attn, x), seen[0].mean(1)[:, 0], atol=1e-6)


def test_keys_are_the_mean_over_heads():
    attn = vit().blocks[0].attn
    x = torch.randn(2, 17, 24)
    k = attn.qkv(x).reshape(2, 17, 3, 3, 8)[:, :, 1]
    assert torch.allclose(tokens.keys(attn, x), k.mean(2), atol=1e-6)


def test_proportional_attention_counts_a_merged_token_twice():
    block = vit().blocks[0]
    x = torch.randn(1, 6, 24)
    twice = torch.cat([x, x[:, 5:]], 1)  # the last token once more
    sizes = torch.ones(1, 6, 1)
    sizes[:, 5] = 2
    assert torch.allclose(tokens.attended(block, x, sizes)[0], tokens.attended(block, twice)[0][:, :6], atol=1e-5)
    assert not torch.allclose(tokens.attended(block, x)[0], tokens.attended(block, twice)[0][:, :6], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("method", tokens.METHODS)
def test_the_tokens_fall_at_the_stages(method: str):
    module = vit()
    result = run(module, ratio=0.25, method=method)
    assert result.notes["tokens"] == {"blocks": [17, 13, 10, 8]}  # 16 patches: 12, 9, 7 and the class token
    assert result.notes["macs_after"] < 0.8 * result.notes["macs_before"]
    assert set(graph.layers(module)) <= {*result.changed, *result.skipped}
    assert result.changed["blocks.2.mlp.fc1"] == "10 of 17 tokens behind its attention"
    x = torch.rand(3, 3, 16, 16)
    out = graph.outputs(result.model.stage.module, [x])[0]
    assert out.shape == (3, 5) and torch.isfinite(out).all()
    single = torch.cat([graph.outputs(result.model.stage.module, [row[None]])[0] for row in x])
    assert torch.allclose(out, single, atol=1e-5)  # each sample chooses for itself


def test_an_image_of_equal_tokens_does_not_notice_merging():
    module = vit(pos_embed="none")
    result = run(module, ratio=0.5)
    x = torch.full((1, 3, 16, 16), 0.3)
    before, after = (graph.outputs(net, [x])[0] for net in (module, result.model.stage.module))
    assert torch.allclose(before, after, atol=1e-5)
    plain = run(module, ratio=0.5, proportional=False).model.stage.module
    assert not torch.allclose(before, graph.outputs(plain, [x])[0], atol=1e-5)  # the counting is what makes it exact


@pytest.mark.parametrize("options", [{"method": "merge"}, {"method": "drop", "by": "norm"}])
def test_it_comes_back_from_json_and_weights(options: dict[str, Any]):
    module = vit()
    changed = run(module, **options).model.stage.module
    text = json.dumps(architecture.describe(changed, module), allow_nan=False)
    fresh = architecture.rebuild(vit(), json.loads(text)).eval()
    fresh.load_state_dict(changed.state_dict())
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(graph.outputs(fresh, [x])[0], graph.outputs(changed, [x])[0])


@pytest.mark.parametrize("config", [
    pytest.param({"class_token": False, "global_pool": "avg"}, id="mean pool"),
    pytest.param({"reg_tokens": 2}, id="registers"),
    pytest.param({"init_values": 0.1, "qk_norm": True}, id="layer scale and norms"),
])  # fmt: skip
def test_kinds_of_vision_transformers(config: dict[str, Any]):
    result = run(vit(**config), ratio=0.25)
    assert result.changed and result.notes["tokens"]["blocks"][-1] < result.notes["tokens"]["blocks"][0]


def test_deit_with_two_heads():
    from timm.models.deit import VisionTransformerDistilled

    module = VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=3).eval()
    assert run(module, method="drop").notes["tokens"]["blocks"] == [18, 14, 11, 9]


@pytest.mark.parametrize(("module", "options", "why"), [
    pytest.param(lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=12,
                                           depths=(2, 2), num_heads=(2, 2)).eval(), {}, "windows needs", id="swin"),
    pytest.param(lambda: vit(class_token=False, global_pool="avg"), {"method": "drop"}, "no class token", id="class"),
    pytest.param(lambda: vit(global_pool=""), {}, "one entry a token", id="all tokens are the output"),
    pytest.param(lambda: vit(block_fn=timm.models.vision_transformer.ResPostBlock), {}, "something else", id="post"),
    pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 5)), {}, "timm's form", id="c"),
])  # fmt: skip
def test_it_says_why_it_does_not_apply(module: Any, options: dict[str, Any], why: str):
    net = module()
    size = 32 if "Swin" in type(net).__name__ else 16
    result = prune_tokens(model_of(net, size), Job(Target("t", "", ())), **options)
    assert result.changed == {} and not result.needs_recovery
    assert any(why in reason for reason in result.skipped.values()), result.skipped
    assert set(graph.layers(net)) <= set(result.skipped)
    x = [torch.rand(1, 3, size, size)]
    assert torch.equal(graph.outputs(net, x)[0], graph.outputs(result.model.stage.module, x)[0])


def test_a_second_time_is_refused_with_its_reason():
    once = run(vit())
    again = prune_tokens(once.model, Job(Target("t", "", ())))
    assert again.changed == {} and "tokens already leave here" in again.skipped.values()


def test_a_stage_that_is_no_block():
    with pytest.raises(ValueError, match=r"stages must lie in 0..3, as blocks has 4 blocks, got 4"):
        run(vit(), stages=[1, 4])


def test_the_input_is_untouched():
    module = vit()
    before = copy.deepcopy(module.state_dict())
    text = str(module)
    run(module)
    assert str(module) == text and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- runtimes


@pytest.mark.parametrize("options", [{"method": "merge"}, {"method": "drop"}], ids=["merge", "drop"])
def test_it_runs_in_onnx_runtime_and_openvino(options: dict[str, Any], tmp_path: Path):
    ort, ov = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    changed = run(vit(), **options).model
    exported = onnx_graph.to_onnx(changed.stage, tmp_path / "net.onnx", opset=18)
    path = tmp_path / "net.onnx"
    assert path.exists(), exported
    import onnx

    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not {kind for kind in kinds if "Scatter" in kind or kind in ("Loop", "If", "NonZero", "Sort")}, kinds
    x = np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)
    want = graph.outputs(changed.stage.module, [torch.from_numpy(x)])[0].numpy()
    got = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([x])[0], want, rtol=1e-4, atol=1e-4)
    assert not math.isclose(float(np.abs(want).max()), 0.0)


def test_the_step_cache_keeps_apart_what_has_equal_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    plain = model_of(vit())
    job = Job(Target("t", "", ()), teacher=plain)
    distill = recipe.Step(name="distill", options={"steps": 2, "batch": 2})
    configs = []
    for ratio in (0.25, 0.5):
        pruned = prune_tokens(plain, job, ratio=ratio).model
        trained = steps.run_step(distill, pruned, plain, job, "data")
        assert "from" not in trained.notes
        configs.append(trained.model.stage.module.blocks.config)
        assert steps.run_step(distill, pruned, plain, job, "data").notes["from"] == "cache"
    assert configs[0] != configs[1]
    assert "from" not in steps.run_step(distill, plain, plain, job, "data").notes
