"""Feature extractors for perceptual distance, FID and KID, by specification; a figure always names its extractor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from edgegen import files
from edgegen.errors import DataError, MissingExtra

AT_ONCE = 32
ALLOWED = "cifar, mnist, inception, inception:FILE, mobilenet_v1_025:FILE.safetensors, or a path to an .onnx file"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
SMALLEST = 32  # the shipped encoders see nothing in less; smaller images are enlarged to it
_ENLARGED = f"shorter side enlarged to {SMALLEST} where it is less, bilinear"

Run = Callable[[np.ndarray], tuple[list[np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class FeatureExtractor:
    """Images (N, C, H, W) in 0..1, float32 -> (list of maps (N, C', H', W'), pooled (N, D)), float32.

    An image that is not finite has features that are NaN. name: what figures state. sha256: of the weights file.
    channels: what it takes; grey is repeated, colour averaged. resize, pixels: what happens to images before the
    network sees them, for figures. head: pooled (N, D) -> logits (N, classes), where the network is a classifier.
    """

    name: str
    sha256: str
    run: Run
    channels: int = 3
    at_once: int = AT_ONCE
    resize: str = "none"
    pixels: str = "float32, not rounded"
    head: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise DataError(f"features need images (N, 1 or 3, H, W) in 0..1, got {images.shape}")
        if images.shape[1] != self.channels:
            grey = images.shape[1] == 1
            images = np.repeat(images, 3, axis=1) if grey else images.mean(axis=1, keepdims=True)
        finite = np.isfinite(images).all(axis=(1, 2, 3))
        images = np.ascontiguousarray(np.where(finite[:, None, None, None], images, 0), dtype=np.float32)
        parts = [self.run(images[i : i + self.at_once]) for i in range(0, len(images), self.at_once)]
        maps = [np.concatenate(layer) for layer in zip(*(p[0] for p in parts), strict=True)]
        pooled = np.concatenate([p[1] for p in parts])
        for found in (*maps, pooled):  # rounding to 8 bit, ReLU and max pooling of some runtimes swallow NaN
            found[~finite] = np.nan
        return maps, pooled


def load_features(spec: str) -> FeatureExtractor:
    """The extractor behind a specification.

    Args:
        spec: "cifar" or "mnist" (shipped), "inception" (FID's Inception-v3, its weights from torch hub's cache or
            "inception:FILE"), "mobilenet_v1_025:FILE.safetensors", or an .onnx file that takes images in 0..1: its last
            2-D output is the pooled vector, its 4-D outputs are the maps.
    Raises:
        DataError: unknown specification, or weights that are missing, damaged, hold code or do not fit.
        MissingExtra: a package is absent.
    """
    name, _, file = spec.partition(":")
    if spec in ("cifar", "mnist"):
        return _shipped(spec)
    if name == "inception":
        return _inception(Path(file) if file else None)
    if name == "mobilenet_v1_025" and file:
        return _mobilenet(_existing(Path(file)))
    if spec.endswith(".onnx"):
        return _onnx(_existing(Path(spec)))
    raise DataError(f"unknown feature extractor {spec!r}; allowed are {ALLOWED}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"feature extractor weights {path} do not exist; allowed are {ALLOWED}")
    return path


def _shipped(name: str) -> FeatureExtractor:
    from edgegen.nn import encoders

    path = encoders.weights_path(name)
    if not path.is_file():
        raise DataError(f"the weights of the encoder {name!r} are not at {path}; install edgegen again")
    module: Any = encoders.create(name)
    classifier = module.body.head if name == "cifar" else module.head
    run = _of_module(module, enlarge=SMALLEST)
    return FeatureExtractor(f"{name} encoder", files.sha256(path), run, resize=_ENLARGED, head=linear_head(classifier))


def linear_head(layer: torch.nn.Linear, bias: bool = True) -> Callable[[np.ndarray], np.ndarray]:
    """A linear layer as a function of pooled features, float32 (N, D) -> (N, classes)."""
    weight = layer.weight.detach().numpy().astype(np.float32)
    offset = layer.bias.detach().numpy().astype(np.float32) if bias and layer.bias is not None else np.float32(0)
    return lambda pooled: np.asarray(pooled, np.float32) @ weight.T + offset


def _mobilenet(path: Path) -> FeatureExtractor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from edgegen.nn.mobilenet_v1 import MobileNetV1

    module = MobileNetV1()
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DataError(f"{path} does not hold MobileNetV1 0.25 ({str(error).splitlines()[0]})") from error
    run = _of_module(module.eval().requires_grad_(False), enlarge=SMALLEST)
    return FeatureExtractor("MobileNetV1 0.25, ImageNet", files.sha256(path), run, resize=_ENLARGED)


def _of_module(module: torch.nn.Module, enlarge: int) -> Run:
    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        with torch.inference_mode():
            x = torch.from_numpy(images)
            if (short := min(x.shape[2:])) < enlarge:
                size = [-(-side * enlarge // short) for side in x.shape[2:]]
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            maps, pooled = module(x)
        return [m.numpy() for m in maps], pooled.numpy()

    return run


def _inception(path: Path | None) -> FeatureExtractor:
    """Inception-v3 as FID uses it; images are rounded to 8 bit, as torch-fidelity takes them."""
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not path.is_file():
            raise DataError(
                f"FID's Inception-v3 weights are not in {path.parent}; fetch {INCEPTION_FILE} (torch-fidelity, release"
                " v0.2.0) and give it as inception:FILE, or use the shipped encoders cifar or mnist"
            )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtra("torch-fidelity", "for Inception-v3 features", "quality") from error
    _refuse_code(_existing(path))
    try:
        module = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise DataError(f"{path} does not hold FID's Inception-v3 ({str(error).splitlines()[0]})") from error

    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.clip(np.rint(images * 255.0), 0, 255).astype(np.uint8))
            pooled = module(pixels)[0].numpy()
        return [], pooled

    return FeatureExtractor(
        "Inception-v3 (torch-fidelity)",
        files.sha256(path),
        run,
        resize="299 x 299, bilinear as in TensorFlow 1",
        pixels="rounded to 8 bit",
        head=linear_head(module.fc, bias=False),  # "logits_unbiased", on which the Inception Score is defined
    )


def _refuse_code(path: Path) -> None:
    """torch-fidelity unpickles whatever it is given: a file that holds more than plain tensors must not reach it."""
    import pickle

    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not plain weights, or damaged ({str(error).splitlines()[0]})") from error


def _onnx(path: Path) -> FeatureExtractor:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", f"to run the feature extractor {path}", "onnxruntime") from error
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NotImplemented) as error:
        raise DataError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0]})") from error
    (entry, *others), outputs = session.get_inputs(), session.get_outputs()
    ranks = [len(o.shape) for o in outputs]
    if others or len(entry.shape) != 4 or 2 not in ranks or entry.shape[1] not in (1, 3):
        raise DataError(f"{path}: a feature extractor takes one image input (N, 1 or 3, H, W) and has a 2-D output")
    pooled_at = max(i for i, rank in enumerate(ranks) if rank == 2)

    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        found: list[Any] = session.run(None, {entry.name: images})
        return [found[i] for i, rank in enumerate(ranks) if rank == 4], found[pooled_at]

    fixed = entry.shape[0] if isinstance(entry.shape[0], int) else AT_ONCE
    return FeatureExtractor(path.name, files.sha256(path), run, channels=int(entry.shape[1]), at_once=fixed)
