"""replace_attention: the locality profile in closed form, what each block can learn, and that only blocks learn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgegen import architecture, graph, onnx_graph
from edgegen.nn import mixers
from edgegen.passes import _attention, _locality
from edgegen.passes.replace_attention import KINDS, replace_attention
from edgegen.training import distributed
from edgegen.types import Job, Model, PassResult, Stage, Target, TensorSpec

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")


def vit(**config: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5} | config
    return VisionTransformer(**options).eval()


class Attention(nn.Module):
    """Self-attention on a map of width 3, one head; `far` makes the logits depend on the place alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Places(nn.Module):
    """Tokens that are (y, x, |y, x|^2, 1), and attention over them."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.attn = Attention()
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        place = torch.stack([y, x, y**2 + x**2, torch.ones(8, 8)], -1).reshape(1, 64, 4)
        self.register_buffer("place", place)
        with torch.no_grad():  # q.k/2 = sharpness * (2 y y' + 2 x x' - |place'|^2) = constant - sharpness * distance^2
            self.attn.q.weight.copy_(sharpness * torch.diag(torch.tensor([2.0, 2.0, 0.0, 1.0])))
            self.attn.k.weight.copy_(2 * torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, -1.0, 0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.place + 0 * x.mean())


def model_of(module: nn.Module, size: int = 16) -> Model:
    out = graph.outputs(module, [torch.zeros(1, 3, size, size)])[0]
    stage = Stage("main", module, (TensorSpec("input", (1, 3, size, size), value_range=(0.0, 1.0)),),
                  (TensorSpec("output", tuple(out.shape)),))  # fmt: skip
    return Model("net", "classification", (stage,))


def run(module: nn.Module, size: int = 16, **options: Any) -> PassResult:
    quick = {"steps": 0, "joint_steps": 0, "samples": 1, "blocks": "all"} | options
    return replace_attention(model_of(module, size), Job(Target("t", "", ()), threads=1), **quick)


# ------------------------------------------------------------------------------------------------- locality profile


def test_even_attention_has_the_share_of_the_area():
    net = Places(0.0)
    sites = _attention.find(net, [torch.zeros(1, 3, 4, 4)])
    assert sites["attn"].grid == (8, 8)
    found = _locality.profile(net, sites, [[torch.zeros(1, 3, 4, 4)]], 1.0)["attn"]
    # within distance 1: itself and its neighbours, 64 + 2 * 2 * 7 * 8 pairs of 64 * 64
    assert found["1"] == found["even"] == pytest.approx((64 + 224) / 64**2, abs=1e-4)


def test_sharp_attention_lies_within_the_radius():
    net = Places(20.0)
    sites = _attention.find(net, [torch.zeros(1, 3, 4, 4)])
    found = _locality.profile(net, sites, [[torch.zeros(1, 3, 4, 4)]], 0.5)["attn"]
    assert found["0.5"] == pytest.approx(1.0, abs=1e-3)


def test_auto_takes_what_looks_near_by():
    assert "attn" in run(Places(20.0), 8, blocks="auto").changed
    far = run(Places(0.0), 8, blocks="auto", radius=1.0)
    assert far.changed == {}
    assert far.skipped["attn"] == "looks far: 0.07 of its mass lies within 1 tokens, threshold 0.6"
    assert far.notes["locality"]["attn"]["1"] == pytest.approx(0.0703, abs=1e-4)


def test_the_profile_of_a_fused_attention_is_that_of_its_weights():
    net = vit(class_token=False, global_pool="avg")
    x = torch.rand(1, 3, 16, 16)
    sites = _attention.find(net, [x])
    attn = net.blocks[1].attn
    attn.fused_attn = False
    seen: list[torch.Tensor] = []
    handle = attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    graph.outputs(net, [x])
    handle.remove()
    near = _locality._near((8, 8), 2.0)
    want = float((seen[0][0] * near).sum(-1).mean())
    assert _locality.profile(net, sites, [[x]], 2.0)["blocks.1.attn"]["2"] == pytest.approx(want, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ blocks


def test_additive_attention_in_closed_form():
    block = mixers.AdditiveAttention(4, 4, [1, 2], 0, False, heads=2)
    x = torch.randn(1, 2, 4)
    q, k = block.qk(x).chunk(2, -1)
    v = block.value(x)
    share = (block.weight(q) * 2**-0.5).softmax(1)
    query = torch.cat([(share[..., h : h + 1] * q[..., 2 * h : 2 * h + 2]).sum(1) for h in range(2)], -1)
    torch.testing.assert_close(block(x), block.proj(query[:, None] * k * v))


def test_a_pyramid_starts_as_the_mean_of_what_is_near():
    block = mixers.PyramidConv(2, 2, [4, 4], 0, False, levels=1, kernel=3)
    value = torch.ones(1, 16, 2)
    out = block.mix(value, value).reshape(4, 4, 2)
    assert torch.allclose(out[1, 1], torch.ones(2))  # half a full neighbourhood, half the mean of all
    assert torch.allclose(out[0, 0], torch.full((2,), 0.5 + 0.5 * 4 / 9))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_comes_back(kind: str, tmp_path: Path):
    module = vit()
    result = run(module, to=kind, steps=25, joint_steps=4, batch=2, lr=3e-4, radius=2.0)
    net = result.model.stage.module
    before, after = result.notes["errors"]["blocks.0.attn"]
    assert after < before and result.needs_recovery
    assert set(result.notes["curves"]) == {"blocks", "together"}
    old, new = module.state_dict(), net.state_dict()
    for name in old.keys() & new.keys():
        if ".attn." not in name:
            assert torch.equal(old[name], new[name]), name  # frozen
    fresh = architecture.rebuild(vit(), json.loads(json.dumps(architecture.describe(net, module)))).eval()
    fresh.load_state_dict(new)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(graph.outputs(fresh, [x])[0], graph.outputs(net, [x])[0])
    single = torch.cat([graph.outputs(net, [row[None]])[0] for row in x])
    torch.testing.assert_close(graph.outputs(net, [x])[0], single, rtol=1e-4, atol=1e-5)


def test_the_blocks_run_in_onnx_runtime_and_openvino(tmp_path: Path):
    ort, ov = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    model = model_of(vit(depth=3))
    for index, kind in enumerate(("conv", "linear", "ffn")):
        options = {"to": kind, "steps": 0, "joint_steps": 0, "samples": 1, "blocks": [f"blocks.{index}.attn"]}
        model = replace_attention(model, Job(Target("t", "", ())), **options).model
    onnx_graph.to_onnx(model.stage, tmp_path / "net.onnx", opset=18)
    x = np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)
    want = graph.outputs(model.stage.module, [torch.from_numpy(x)])[0].numpy()
    path = str(tmp_path / "net.onnx")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input": x})[0], want, rtol=1e-4, atol=1e-4)
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([x])[0], want, rtol=1e-4, atol=1e-4)


def test_a_map_with_its_residual():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.proj_out = (nn.Conv2d(8, 8, 1) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
            weight = (q.transpose(1, 2) @ k * 8**-0.5).softmax(-1)
            return x + self.proj_out((v @ weight.transpose(1, 2)).reshape(x.shape))

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), nn.Conv2d(8, 3, 3, padding=1)).eval()
    result = run(module, 8, to="conv", steps=20, joint_steps=0, batch=2)
    assert result.model.stage.module[1].config["residual"]
    before, after = result.notes["errors"]["1"]
    assert after < before < 1
    assert "has no qkv layer" in run(module, 8, to="window").skipped["1"]


def test_the_same_seed_gives_the_same_weights_and_the_input_is_untouched():
    module = vit()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    runs = [run(module, to="conv", steps=3, joint_steps=2, batch=2).model.stage.module.state_dict() for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_block_that_training_makes_worse_is_put_back():
    result = run(vit(), to="window", steps=25, batch=2, lr=0.3, radius=2.0)
    before, after = result.notes["errors"]["blocks.0.attn"]
    assert before == after
    assert before == pytest.approx(run(vit(), to="window", radius=2.0).notes["errors"]["blocks.0.attn"][1])


@pytest.mark.parametrize(("options", "why"), [
    ({"to": "window", "window": 3}, "window must divide the grid 8x8, got 3"),
    ({"to": "conv", "levels": 5}, "5 levels need a grid that divides by 16"),
    ({"blocks": ["blocks.0.attn"]}, "not named in blocks"),
    ({"skip": ["blocks.1.attn"]}, "is named in skip"),
])  # fmt: skip
def test_it_says_why_not(options: dict[str, Any], why: str):
    assert why in run(vit(), **options).skipped["blocks.1.attn"]


def test_wrong_names():
    with pytest.raises(ValueError, match=r"no self-attention 'blocks.7.attn' in net, did you mean"):
        run(vit(), blocks=["blocks.7.attn"])


def test_blocks_learn_on_the_device_of_their_process_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "own_device", lambda device: "cpu")
    model = model_of(vit(depth=1))
    job = Job(Target("t", "", ()), threads=1, teacher=model, device="cuda:99")  # anything put there would be an error
    result = replace_attention(model, job, steps=1, joint_steps=1, batch=2, samples=1, blocks="all")
    assert set(result.notes["curves"]) == {"blocks", "together"}


def test_training_together_that_makes_it_worse_is_put_back():
    model = model_of(vit(depth=2))
    options: dict[str, Any] = {"steps": 3, "batch": 2, "samples": 1, "blocks": "all"}
    job = Job(Target("t", "", ()), threads=1, teacher=model)
    before = replace_attention(model, job, joint_steps=0, **options)
    assert before.notes["together"] == ""
    worse = replace_attention(model, job, joint_steps=5, lr=30.0, **{**options, "steps": 0})
    assert worse.notes["together"].endswith(": put back")
    state = replace_attention(model, job, joint_steps=0, **{**options, "steps": 0}).model.stage.module.state_dict()
    for name, value in worse.model.stage.module.state_dict().items():
        assert torch.equal(value, state[name]), name
    image = dataclasses.replace(model, task="restoration")  # the random network's classes are all alike
    better = replace_attention(image, job, joint_steps=30, **{**options, "steps": 0})
    first, last = (float(part) for part in better.notes["together"].removeprefix("loss ").split(" -> "))
    assert last < first
