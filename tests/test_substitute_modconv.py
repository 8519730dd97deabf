"""StyleGAN2 to MobileStyleGAN: exact where a kernel is separable, the published factors at the published size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgegen import architecture, graph, onnx_graph, registry  # noqa: E402
from edgegen.nn import modulated  # noqa: E402
from edgegen.passes import substitute_modconv as module_of_pass  # noqa: E402
from edgegen.types import Job, Model, Stage, Target, TensorSpec  # noqa: E402

substitute_modconv = module_of_pass.substitute_modconv
JOB = Job(Target("testbed", "", ("onnxruntime",)))
TINY = {"size": 16, "width": 8, "latent": 12, "style": 12, "layers": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def stylegan2(**config: Any) -> Model:
    torch.manual_seed(0)
    config = TINY | config
    module = registry.module("models", "stylegan2").create(**config).eval()
    size = (1, 3, config["size"], config["size"])
    stage = Stage("model", module, (TensorSpec("input", (1, 12), layout="NC"),), (TensorSpec("output", size),))
    origin = {"kind": "builtin", "name": "stylegan2", "config": config}
    return Model("stylegan2", "unconditional", (stage,), origin=origin)


@pytest.mark.parametrize("up", [False, True])
def test_a_separable_kernel_becomes_the_same_convolution(up: bool):
    torch.manual_seed(0)
    dense = modulated.StyledConv(6, 8, 5, 16, up=up).eval()
    with torch.no_grad():
        kernel = torch.randn(8, 6, 1, 1) * torch.randn(8, 1, 3, 3)
        dense.conv.weight.copy_(kernel.transpose(0, 1) if up else kernel)
        block, error = module_of_pass.separated(dense)
        x, w = torch.randn(2, 6, 8, 8) if up else torch.randn(2, 6, 16, 16), torch.randn(2, 5)
        assert error < 1e-6
        assert torch.allclose(block(x, w), dense(x, w), atol=1e-5)
        dense.conv.weight.add_(torch.randn_like(dense.conv.weight))
        assert not torch.allclose(block(x, w), dense(x, w), atol=1e-2)


def test_the_rank_one_part_is_the_best_one():
    torch.manual_seed(0)
    dense = modulated.StyledConv(6, 3, 5, 8).eval()
    block, error = module_of_pass.separated(dense)
    made = (block.pointwise.weight * block.depthwise.weight).detach()  # (out, in, 3, 3)
    wanted = dense.conv.weight.detach()
    best = 1 - sum(torch.linalg.svdvals(row.flatten(1))[0] ** 2 for row in wanted) / wanted.square().sum()
    assert error == pytest.approx(float(best), abs=1e-5)
    assert float((made - wanted).square().sum() / wanted.square().sum()) == pytest.approx(error, abs=1e-5)


def test_haar_is_inverted():
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(modulated.InverseHaar()(modulated.haar(x)), x, atol=1e-6)
    constant = modulated.haar(torch.full((1, 1, 4, 4), 3.0))
    assert torch.equal(constant[:, 0], torch.full((1, 2, 2), 6.0)) and not constant[:, 1:].any()


def test_the_last_block_starts_as_nearest_enlargement_of_the_image_before():
    model = stylegan2()
    result = substitute_modconv(model, JOB, min_size=64)  # no convolution is replaced
    half = registry.module("models", "stylegan2").create(**TINY | {"size": 8}).eval()
    state = {n: t for n, t in model.stage.module.state_dict().items() if n in half.state_dict()}
    half.load_state_dict(state)
    z = torch.randn(2, 12)
    with torch.no_grad():
        wanted = torch.nn.functional.interpolate(half(z), scale_factor=2)
        assert torch.allclose(result.model.stage.module(z), wanted, atol=1e-5)
    assert set(result.changed) == {f"synthesis.b16.{part}.{layer}" for part in ("conv0", "conv1", "to_rgb")
                                   for layer in ("affine", "conv")}  # fmt: skip
    assert "smaller than 64 pixels" in result.skipped["synthesis.b8.conv0.conv"]


def test_what_stays_stays():
    result = substitute_modconv(stylegan2(), JOB, skip=["synthesis.b8.conv1"], wavelet=False)
    module = result.model.stage.module
    assert isinstance(module.synthesis.b8.conv1, modulated.StyledConv)
    assert isinstance(module.synthesis.b16.conv1, modulated.SeparableStyledConv)
    assert result.skipped["synthesis.b8.conv1.conv"] == "skipped by name"
    assert result.needs_recovery and result.notes["params_after"] < result.notes["params_before"]


@pytest.mark.parametrize("config", [{}, {"part": "synthesis"}, {"noise": "none"}])
def test_the_result_is_described_made_again_and_exported(config: dict[str, Any], tmp_path: Path):
    model = stylegan2(**config)
    result = substitute_modconv(model, JOB)
    module = result.model.stage.module
    base = registry.module("models", "stylegan2").create(**TINY | config)
    told = json.loads(json.dumps(architecture.describe(module, base)))
    again = architecture.rebuild(registry.module("models", "stylegan2").create(**TINY | config), told)
    again.load_state_dict(module.state_dict())
    z = torch.randn(1, 12)
    with torch.no_grad():
        assert torch.equal(again.eval()(z), module(z))
    if not config:
        made = onnx_graph.to_onnx(result.model.stage, tmp_path / "model.onnx")
        onnx_graph.parity(result.model.stage, made, {"input": np.ones((1, 12), np.float32)}, atol=1e-4, rtol=1e-4)


def test_elsewhere_it_says_why_not():
    image = TensorSpec("image", (1, 3, 4, 4))
    stage = Stage("model", torch.nn.Conv2d(3, 3, 1), (image,), (image,))
    result = substitute_modconv(Model("conv", "image-to-image", (stage,)), JOB)
    assert result.changed == {} and not result.needs_recovery
    with pytest.raises(ValueError, match="is an ONNX file"):
        substitute_modconv(Model("x", "image-to-image", (dataclasses.replace(stage, module=None),)), JOB)


def test_at_published_size_it_reaches_the_published_factors():
    """MobileStyleGAN, arXiv:2104.04767: 3.5 times fewer parameters, 9.5 times fewer MACs, synthesis at 1024 pixels."""
    with torch.device("meta"):
        module = registry.module("models", "stylegan2").create(size=1024, part="synthesis").eval()
        small = graph.clone(module)
        for name, part in list(small.named_modules()):
            if isinstance(part, modulated.StyledConv):
                module_of_pass._put(small, name, modulated.SeparableStyledConv(**part.config))
        last = small.b1024.conv0.config
        module_of_pass._put(small, "b1024", modulated.WaveletOutput(last["inputs"], last["style"]))
    x = [torch.empty(1, 512, device="meta")]
    before, after = graph.cost(module, x), graph.cost(small.eval(), x)
    assert graph.outputs(small, x)[0].shape == (1, 3, 1024, 1024)
    assert before.params / after.params > 3.5 and before.params / after.params == pytest.approx(3.83, abs=0.01)
    assert before.macs / after.macs > 9.5 and before.macs / after.macs == pytest.approx(10.10, abs=0.01)
