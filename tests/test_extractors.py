"""Feature extractors by name: what each sees, whose weights it states, and what is said when they are not here."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from edgegen.errors import DataError
from edgegen.metrics import _extractors
from edgegen.metrics.cmmd import cmmd

OWN = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, width, 3)
    def forward(self, x):
        maps = self.conv(x)
        return [maps], maps.mean((2, 3))
def both():
    return Net(5)
def pooled():
    net = Net(5)
    return torch.nn.Sequential(net.conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
def wrong():
    return Net(5).conv
"""


def pictures(n=3, size=40, channels=3):
    return np.random.default_rng(0).random((n, channels, size, size)).astype(np.float32)


def test_a_users_module_is_an_extractor_and_its_state_is_its_hash(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    both, pooled = (_extractors.load(f"{tmp_path / 'mine.py'}:{name}") for name in ("both", "pooled"))
    maps, found = both(pictures())
    assert maps[0].shape == (3, 5, 38, 38) and found.shape == (3, 5)
    np.testing.assert_allclose(found, pooled(pictures())[1], atol=1e-6)
    assert len(both.sha256) == 64 and both.name == "mine.py:both"
    value = cmmd([pictures(8)], [1 - pictures(8)], features=both)
    assert value.conditions["extractor_sha256"] == both.sha256 and "resize" in value.conditions
    with pytest.raises(DataError, match="they must be"):
        _extractors.load(f"{tmp_path / 'mine.py'}:wrong")(pictures())
    with pytest.raises(DataError, match="did you mean 'pooled'"):
        _extractors.load(f"{tmp_path / 'mine.py'}:poled")


@pytest.mark.slow  # it imports torchvision
def test_a_network_of_timm_sees_what_timm_would_feed_it(tmp_path):
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_vit", pretrained=False, num_classes=10).eval()
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    module.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")}, strict=False)
    module.reset_classifier(0)
    found = _extractors.load(f"timm:test_vit={tmp_path / 'w.pth'}")
    told = timm.data.resolve_model_data_config(module)
    size = told["input_size"][1]
    x = pictures(2, size)
    mean, std = (np.array(told[key], np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = module(torch.from_numpy((x - mean) / std)).numpy()
    np.testing.assert_allclose(found(x)[1], expected, atol=1e-5)
    assert found.sha256 == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert f"{size} x {size}" in found.resize
    assert found(pictures(2, 28, 1))[1].shape == expected.shape  # grey and of another size


@pytest.mark.slow
def test_dinov2_from_a_file_sees_the_size_at_which_figures_are_made(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    published = timm.create_model(_extractors.NETWORKS["dinov2"], pretrained=False)  # for 518, as its file is
    torch.save(published.state_dict(), tmp_path / "w.pth")
    found = _extractors.load(f"dinov2:{tmp_path / 'w.pth'}")
    whole, enlarged = found(pictures(1, 224)), found(pictures(1, 32))
    assert whole[1].shape == enlarged[1].shape == (1, 384) and np.isfinite(whole[1]).all()
    assert "224 x 224" in found.resize


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in torchao, which transformers imports
def test_clip_and_dinov2_come_from_folders_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    clip = transformers.CLIPVisionConfig(**small, intermediate_size=8, projection_dim=12)
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    transformers.Dinov2Model(transformers.Dinov2Config(**small)).save_pretrained(tmp_path / "dino")
    for name, folder, width in (("clip", "clip", 12), ("dinov2", "dino", 16)):
        found = _extractors.load(f"{name}:{tmp_path / folder}")
        pooled = found(pictures())[1]
        assert pooled.shape == (3, width) and np.isfinite(pooled).all()
        assert np.abs(pooled - found(1 - pictures())[1]).max() > 1e-4
        assert found.sha256 == hashlib.sha256((tmp_path / folder / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(DataError, match="has no config"):
        _extractors.load(f"clip:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("clip", "hf download timm/vit_base_patch16_clip_224.openai"),
        ("dinov2", "give a file as dinov2:FILE"),
        ("clip:none.safetensors", "do not exist"),
        ("timm:resnet18=none.pth", "do not exist"),
        ("timm:resnet1888=none.pth", "unknown timm model"),
        ("nothing", "allowed are cifar.*clip.*FILE.py:FACTORY"),
        ("none.py:net", "no such file"),
    ],
)
def test_what_is_not_here_is_said_in_one_line(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=words) as caught:
        _extractors.load(spec)
    assert "\n" not in str(caught.value)


def test_the_shipped_ones_are_classifiers_too():
    from edgegen.metrics.inception_score import probabilities

    found = _extractors.load("mnist")
    p, _ = probabilities(found(pictures(4, 32, 1))[1], found)
    assert p.shape == (4, 10) and p.sum(axis=1) == pytest.approx(1.0)
