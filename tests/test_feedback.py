"""The block that corrects cached features: nothing at first, nearer to the full network once trained, and exported."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from test_cached import unet  # noqa: E402
from test_distill_steps import TARGET  # noqa: E402

from edgegen import architecture, onnx_graph, samplers  # noqa: E402
from edgegen.models import dit  # noqa: E402
from edgegen.nn import cached, diffusion  # noqa: E402
from edgegen.nn.feedback import Feedback  # noqa: E402
from edgegen.passes import _feedback  # noqa: E402
from edgegen.passes.cache_steps import cache_steps  # noqa: E402
from edgegen.types import Job, Model, Stage, TensorSpec  # noqa: E402

pytestmark = pytest.mark.slow  # importing diffusers alone takes many seconds


def transformer():
    torch.manual_seed(0)
    net = dit.create(channels=1, size=16, patch=4, layers=4, heads=2, head_width=8, labels=3).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def model(net: torch.nn.Module, labels: int = 0, steps: int = 8) -> Model:
    inputs = [TensorSpec("sample", (1, 1, 16, 16)), TensorSpec("timestep", (1,), value_range=(0.0, 999.0))]
    inputs += [TensorSpec("label", (1,), value_range=(0.0, 2.0))] if labels else []
    out = TensorSpec("output", (1, 1, 16, 16), value_range=(-1.0, 1.0))
    options = {"prediction": "v", "schedule": "cosine", "train_steps": 1000, "labels": labels,
               "sampler": {"name": "ddim", "steps": steps}}  # fmt: skip
    return Model("net", "unconditional", (Stage("s", net, tuple(inputs), (out,)),), options=options)


def given(labels: int) -> list[torch.Tensor]:
    told = [torch.tensor([1.0, 2.0])] if labels else []
    return [torch.randn(2, 1, 16, 16), torch.tensor([700.0, 30.0]), *told]


@pytest.mark.parametrize(("make", "labels"), [(unet, 0), (transformer, 3)])
def test_a_fresh_block_changes_nothing_and_another_does(make, labels: int):
    plain, x = make(), given(labels)
    net = copy.deepcopy(plain)
    with torch.no_grad():
        _, cache = cached.Full(plain)(*x)
        wanted = cached.Partial(plain)(*x, 0.7 * cache)
        block = cached.add_feedback(net, cache.shape, 0)
        assert torch.equal(net(*x), plain(*x))
        assert torch.equal(cached.Partial(net)(*x, 0.7 * cache), wanted)
        torch.nn.init.normal_(block.give.weight)
        assert torch.equal(net(*x), plain(*x)), "the full network never runs it"
        assert not torch.allclose(cached.Partial(net)(*x, 0.7 * cache), wanted, atol=1e-3)
        cached.add_feedback(net, cache.shape, 0)  # a second one takes the place of the first
        assert torch.equal(cached.Partial(net)(*x, 0.7 * cache), wanted)
    assert sum(isinstance(part, Feedback) for part in net.modules()) == 1


@pytest.mark.parametrize(("make", "labels", "steps"), [(unet, 0, 120), (transformer, 3, 30)])
def test_training_brings_it_nearer_to_the_full_network(make, labels: int, steps: int, monkeypatch):
    monkeypatch.setattr(_feedback, "POINTS", 64)
    monkeypatch.setattr(_feedback, "LATENTS", 16)
    original = model(make(), labels)
    before = {name: value.clone() for name, value in original.stage.module.state_dict().items()}
    settings = samplers.of(original.options) | {"cache_every": 3}
    found = [_feedback.trained(original, Job(TARGET, threads=1), settings, steps) for _ in range(2)]
    (net, notes), (again, _) = found
    assert notes["feedback_error"] < 0.9 * notes["feedback_error_before"]
    assert notes["feedback"]["steps"] == steps and notes["stopped"] == ""
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in original.stage.module.state_dict().items())
    x = given(labels)
    with torch.no_grad():
        assert torch.equal(net(*x), original.stage.module(*x))


def test_the_pass_keeps_a_block_that_helps_and_says_by_how_much(monkeypatch):
    monkeypatch.setattr(_feedback, "POINTS", 64)
    monkeypatch.setattr(_feedback, "LATENTS", 16)
    result = cache_steps(model(unet()), Job(TARGET, threads=1), every=3, images=4, feedback=30)
    notes = result.notes
    assert notes["psnr"] == max(notes["psnr_with"], notes["psnr_without"]) and notes["psnr_with"] != 99.0
    held = any(isinstance(part, Feedback) for part in result.model.stage.module.modules())
    assert held == (notes["psnr_with"] > notes["psnr_without"])
    assert ("corrected by a trained block" if held else "left as it is") in result.changed["cache"]
    with pytest.raises(ValueError, match=r"psnr and feedback 0 or more, got 2, 1, 8, 0\.0, -1"):
        cache_steps(model(unet()), Job(TARGET), feedback=-1)


def test_a_network_with_a_block_reloads_and_both_graphs_export(tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    net = unet()
    cache = cached.Full(net)(*given(0))[1]
    block = cached.add_feedback(net, cache.shape, 0)
    torch.nn.init.normal_(block.give.weight, std=0.1)
    rebuilt = architecture.rebuild(unet(), architecture.describe(net, unet()))
    rebuilt.load_state_dict(net.state_dict())
    settings = samplers.of(model(net).options) | {"cache_every": 2}
    runs = {}
    for name, stage in zip(("full", "partial"), cached.stages(model(rebuilt.eval()).stage, settings), strict=True):
        file = onnx_graph.to_onnx(stage, tmp_path / f"{name}.onnx").onnx
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        runs[name] = lambda feeds, s=session, n=names: dict(zip(n, s.run(n, feeds), strict=True))
    x = np.random.default_rng(0).standard_normal((1, 1, 16, 16)).astype(np.float32)
    made = samplers.generate(settings, runs, x)
    assert np.abs(made - samplers.generate(settings, cached.runs(net, settings), x)).max() < 1e-3
    assert np.abs(made - samplers.generate(settings, cached.runs(unet(), settings), x)).max() > 1e-2
    assert np.abs(made - samplers.generate(settings, diffusion.runner(net), x)).max() > 1e-2
