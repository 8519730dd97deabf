"""Caching: with its own step's cache the partial network is the full one; both export, and the sampler uses both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgegen import graph, onnx_graph, samplers  # noqa: E402
from edgegen.models import ddpm_unet, sinddm  # noqa: E402
from edgegen.nn import diffusion  # noqa: E402
from edgegen.nn.cached import Full, Partial  # noqa: E402
from edgegen.types import Stage, TensorSpec  # noqa: E402

pytestmark = pytest.mark.slow  # importing diffusers alone takes many seconds


def unet(labels: int = 0):
    torch.manual_seed(0)
    return ddpm_unet.create(widths=(8, 16, 16), attention=(False, False, True), groups=4, size=16, labels=labels).eval()


@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_two_networks_are_one_when_the_cache_is_fresh(labels: int, keep: int):
    net = unet(labels)
    given = [torch.randn(2, 1, 16, 16), torch.tensor([700.0, 30.0]), *([torch.tensor([1.0, 3.0])] if labels else [])]
    full, partial = Full(net, keep), Partial(net, keep)
    with torch.no_grad():
        wanted = net(*given)
        made, cache = full(*given)
        assert torch.allclose(made, wanted, atol=1e-5)
        assert torch.allclose(partial(*given, cache), wanted, atol=1e-5)
        assert not torch.allclose(partial(*given, 0.5 * cache), wanted, atol=1e-3)
    macs = [graph.cost(m, args).macs for m, args in ((full, given), (partial, [*given, cache]))]
    assert macs[1] < {1: 0.75, 2: 0.9}[keep] * macs[0]


def test_what_cannot_be_cached_is_refused():
    with pytest.raises(ValueError, match="keep must be from 1 to 2"):
        Full(unet(), 3)
    with pytest.raises(ValueError, match="caching is for DiT and for U-Nets"):
        Full(sinddm.create(channels=1, width=8, blocks=1))


def test_both_graphs_run_in_the_sampler(tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    net = unet()
    sample, time = TensorSpec("sample", (1, 1, 16, 16)), TensorSpec("timestep", (1,))
    with torch.no_grad():
        cache = TensorSpec("cache", tuple(Full(net)(torch.zeros(1, 1, 16, 16), torch.zeros(1))[1].shape))
    out = TensorSpec("output", (1, 1, 16, 16))
    stages = {"full": Stage("full", Full(net).eval(), (sample, time), (out, cache)),
              "partial": Stage("partial", Partial(net).eval(), (sample, time, cache), (out,))}  # fmt: skip
    files = {name: onnx_graph.to_onnx(stage, tmp_path / f"{name}.onnx") for name, stage in stages.items()}
    assert files["partial"].macs < 0.75 * files["full"].macs
    runs = {}
    for name, file in files.items():
        session = ort.InferenceSession(str(file.onnx), providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        runs[name] = lambda feeds, s=session, n=names: dict(zip(n, s.run(n, feeds), strict=True))
    settings = {"name": "ddim", "steps": 6, "prediction": "v", "schedule": "cosine", "cache_every": 1}
    x = np.random.default_rng(0).standard_normal((1, 1, 16, 16)).astype(np.float32)
    plain = samplers.generate(settings, diffusion.runner(net), x)
    assert np.abs(samplers.generate(settings, runs, x) - plain).max() < 1e-3
    cached = samplers.generate({**settings, "cache_every": 2}, runs, x)
    assert 1e-6 < np.abs(cached - plain).max() < 1.0
