"""The offers together, in their order, on the networks that they are for: exact, and nothing where nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="the built-in networks are torch modules")
pytest.importorskip("onnxruntime", reason="a rewritten graph is checked in ONNX Runtime")

import torch
from torch import nn

from edgegen import onnx_graph, registry, rewriting
from edgegen.types import Graph, Stage, TensorSpec


class Published(nn.Module):
    """A modulated convolution as the published StyleGAN2 code has it: a kernel a sample, computed from the style.

    The built-in stylegan2 is written as scale, static convolution, scale, so there is nothing to offer for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, 8, 8, 3, 3)), nn.Linear(16, 8)
        self.constant = nn.Parameter(torch.randn(1, 8, 8, 8))

    def forward(self, z: Any) -> Any:
        kernel = self.weight * (1 + self.style(z)).view(1, 1, 8, 1, 1)
        kernel = kernel * torch.rsqrt((kernel * kernel).sum((2, 3, 4), keepdim=True) + 1e-8)
        return nn.functional.conv2d(self.constant, kernel.view(8, 8, 3, 3), padding=1)


class HandWritten(nn.Module):
    """Instance normalization by its formula."""

    def forward(self, x: Any) -> Any:
        centred = x - x.mean((2, 3), keepdim=True)
        return centred / torch.sqrt((centred * centred).mean((2, 3), keepdim=True) + 1e-5)


def ugatit() -> nn.Module:
    return registry.module("models", "ugatit").create(width=4, blocks=1, light=True)


CASES = {
    "static_modulated_convolution": (Published, (1, 16)),
    "merge_adalin": (ugatit, (1, 3, 32, 32)),
    "fuse_instance_norm": (HandWritten, (1, 4, 9, 9)),
}


def exported(make: Callable[[], nn.Module], shape: tuple[int, ...], folder: Path) -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
        with torch.no_grad():
            for parameter in module.parameters():  # fresh networks have zeros that hide a mistake
                parameter.add_(0.05 * torch.randn_like(parameter))
            out = tuple(module(torch.zeros(shape)).shape)
    stage = Stage("model", module, (TensorSpec("input", shape),), (TensorSpec("output", out),))
    return onnx_graph.to_onnx(stage, folder / "graph.onnx")


@pytest.mark.parametrize("name", CASES)
def test_the_offers_are_exact_on_the_networks_that_they_are_for(name: str, tmp_path: Path) -> None:
    make, shape = CASES[name]
    graph = exported(make, shape, tmp_path)
    feeds = {"input": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    made, changed = rewriting.rewritten(graph, rewriting.OFFERS, tmp_path / "r.onnx", feeds=feeds, tolerance=1e-4)
    assert name in changed
    before, after = (len(onnx.load(file).graph.node) for file in (graph.onnx, made.onnx))
    assert made.sha256 != graph.sha256 and before != after
    content = onnx.load(made.onnx)
    assert rewriting.apply(content, [name]) == {}  # a second time there is nothing left to do


def test_the_built_in_stylegan2_is_static_already(tmp_path: Path) -> None:
    make = registry.module("models", "stylegan2").create
    graph = exported(lambda: make(size=8, width=8, latent=16, style=16, layers=2), (1, 16), tmp_path)
    assert "static_modulated_convolution" not in rewriting.apply(onnx.load(graph.onnx), rewriting.OFFERS)


def test_an_offer_that_would_hide_anothers_pattern_comes_behind_it() -> None:
    offers = rewriting.OFFERS
    assert offers.index("merge_adalin") < offers.index("fuse_instance_norm")
    assert set(offers) <= set(registry.names("rewrites"))
