"""Feature extractors: the shipped encoders, MobileNetV1, and networks in files of others."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from edgegen.errors import DataError
from edgegen.metrics.perceptual import perceptual
from edgegen.nn import features as extractors
from edgegen.nn.features import load_features

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = Path(__file__).parents[1].parent / "shared" / "assets"
MOBILENET = SHARED / "mobilenet_v1_025-imagenet.safetensors"
needs_shared = pytest.mark.skipif(not MOBILENET.is_file(), reason="../shared/assets is not here")


def pictures(number=6, size=24, seed=0):
    """Smooth images (N, 3, size, size) in 0..1."""
    rng = np.random.default_rng(seed)
    small = rng.random((number, 3, size // 4, size // 4)).astype(np.float32)
    return np.kron(small, np.ones((4, 4), np.float32))


def encoder_or_skip(name):
    from edgegen.nn import encoders

    if not encoders.weights_path(name).is_file():
        pytest.skip(f"the encoder {name} has no weights yet")
    return load_features(name)


@pytest.mark.parametrize("name", ["cifar", "mnist"])
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (5, 1, 28, 28), (2, 3, 64, 48)])
def test_shipped_encoders_take_what_generators_make(name, shape):
    found = encoder_or_skip(name)
    batch = np.random.default_rng(0).random(shape).astype(np.float32)
    maps, pooled = found(batch)
    assert pooled.shape[0] == shape[0] and pooled.ndim == 2 and np.isfinite(pooled).all()
    assert len({m.shape[2] for m in maps}) >= 2 and len(found.sha256) == 64
    np.testing.assert_allclose(found(batch[1:2])[1][0], pooled[1], atol=1e-4)


@pytest.mark.shared
@needs_shared
def test_mobilenet_v1_recognises_photos():
    """58.6 % of the 500 photos (bicubic; 58.4 % bilinear, 58.0 % in the assets' README); here every fourth."""
    from safetensors.torch import load_file

    from edgegen import data, types
    from edgegen.nn.mobilenet_v1 import MobileNetV1

    net = MobileNetV1()
    net.load_state_dict(load_file(MOBILENET))
    source = data.open_source(SHARED / "photos")
    how = types.Preprocessing(resize=256, crop=(224, 224))
    spec = types.Stage("m", None, (types.TensorSpec("x", (1, 3, 224, 224)),), (types.TensorSpec("y", (1, 1000)),))
    dataset = data.Dataset(source, types.Model("m", "classification", (spec,), preprocessing=how))
    chosen = range(0, 500, 4)
    right = 0
    with torch.inference_mode():
        for i in chosen:
            logits = net.eval().classify(torch.from_numpy(dataset[i].input[None]))
            right += int(logits.argmax()) == int(Path(source.names[i]).name[:4])
    assert 0.52 < right / len(chosen) < 0.65


@pytest.mark.shared
@needs_shared
def test_mobilenet_v1_sees_an_image_at_five_resolutions_and_grows_with_noise():
    found = load_features(f"mobilenet_v1_025:{MOBILENET}")
    a = pictures(2, size=64)
    maps, pooled = found(a)
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 2] and pooled.shape == (2, 256)
    noise = np.random.default_rng(0).normal(size=a.shape).astype(np.float32)
    near, far = (perceptual([a], [a + s * noise], features=found).value for s in (0.02, 0.2))
    assert 0 < near < far


def onnx_encoder(path, batch="N"):
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["map"]),
            helper.make_node("GlobalAveragePool", ["map"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["pooled"]),
        ],
        "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [
            helper.make_tensor_value_info("map", TensorProto.FLOAT, [batch, 3, 8, 8]),
            helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [batch, 3]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("batch", ["N", 1])
def test_an_onnx_file_is_an_extractor(tmp_path, batch):
    found = load_features(str(onnx_encoder(tmp_path / "e.onnx", batch)))
    x = pictures(5, size=8)
    maps, pooled = found(x)
    np.testing.assert_allclose(pooled, x.mean((2, 3)), atol=1e-6)
    np.testing.assert_array_equal(maps[0], x)
    np.testing.assert_allclose(found(x[:, :1])[1], np.repeat(x[:, :1].mean((2, 3)), 3, axis=1), atol=1e-6)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("pickle-ran"),))


def test_bad_extractors_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    whole = onnx_encoder(tmp_path / "e.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "x.safetensors").write_bytes(b"none")
    cases = {
        "vgg": "unknown feature extractor 'vgg'; allowed are cifar",
        "gone.onnx": "do not exist",
        "half.onnx": "not a readable ONNX file",
        "inception": "are not in",
        "inception:gone.pth": "do not exist",
        "inception:code.pth": "not plain weights",
        "inception:other.pth": "does not hold FID's Inception-v3",
        "mobilenet_v1_025:x.safetensors": "does not hold MobileNetV1",
    }
    for spec, words in cases.items():
        with pytest.raises(DataError, match=words) as caught:
            load_features(spec)
        assert "\n" not in str(caught.value), spec
    assert not (tmp_path / "pickle-ran").exists()


def test_inception_weights_load_from_a_file_and_see_8_bit_images(tmp_path):
    """With random weights in the real architecture: equal to torch-fidelity's own call on the rounded image."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None

    torch.save({}, tmp_path / "none.pth")
    bare = Bare("bare", ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    torch.save(bare.state_dict(), tmp_path / "w.pth")
    found = load_features(f"inception:{tmp_path / 'w.pth'}")
    x = np.random.default_rng(0).random((2, 1, 16, 16)).astype(np.float32)
    pixels = torch.from_numpy(np.rint(x * 255).astype(np.uint8)).expand(-1, 3, -1, -1)
    np.testing.assert_allclose(found(x)[1], bare(pixels)[0].numpy(), rtol=1e-4, atol=1e-5)
    assert extractors.INCEPTION_FILE.endswith(".pth") and "torch-fidelity" in found.name
