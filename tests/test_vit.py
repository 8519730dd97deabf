"""The built-in vision transformer: its record is so, it refuses to be judged without weights, sizes that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgegen import loading, registry
from edgegen.errors import ModelError
from edgegen.models import vit

pytest.importorskip("timm")


def test_the_record_tells_the_shapes():
    module = vit.create().eval()
    with torch.no_grad():
        out = module(torch.randn(vit.RECORD["input"]["shape"]))
    assert list(out.shape) == vit.RECORD["output"]["shape"]
    block = 4 * 192 + (192 + 1) * 4 * 192 + (192 + 1) * 768 + (768 + 1) * 192
    rest = (3 * 16 + 1) * 192 + (1 + 65) * 192 + 2 * 192 + (192 + 1) * 10  # patches, class token and places, norm, head
    assert sum(p.numel() for p in module.parameters()) == 9 * block + rest


@pytest.mark.skipif(
    (registry.folder("models") / "weights" / "vit.safetensors").is_file(), reason="weights ship by now"
)
def test_without_weights_it_is_for_latency_only():
    with pytest.raises(ModelError, match=r"^vit comes without trained weights: give --weights FILE, or --latency-only"):
        loading.load_model("vit")
    assert loading.load_model("vit", latency_only=True).options["latency_only"]


def test_given_weights_are_loaded(tmp_path: Path):
    from edgegen import weights

    torch.manual_seed(1)
    module = vit.create()
    weights.save_state(module, tmp_path / "vit.safetensors")
    loaded = loading.load_model("vit", weights=tmp_path / "vit.safetensors").stage.module
    assert torch.equal(loaded.head.weight, module.head.weight)


@pytest.mark.parametrize(("config", "message"), [
    ({"size": 30}, "size 30 must be a multiple of patch 4"),
    ({"heads": 5}, "width 192 of heads 5"),
    ({"pool": "max"}, "pool must be token or avg, got 'max'"),
])  # fmt: skip
def test_sizes_that_do_not_fit(config: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vit.create(**config)
