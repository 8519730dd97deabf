"""Feature extractors by name: those of `nn.features`, and CLIP, DINOv2, timm's networks and a user's own file.

| name | network | weights |
|---|---|---|
| cifar, mnist | shipped | shipped |
| inception | FID's Inception-v3 | torch hub's cache, or inception:FILE |
| clip | ViT-B/16 of OpenAI, image embedding (512) | Hugging Face's cache, or clip:FILE, or clip:FOLDER |
| clip-l | ViT-L/14 at 336 pixels, CMMD's (768) | the same |
| dinov2 | ViT-S/14, class token (384) | the same |
| timm:NAME=FILE | any network of timm, pooled | FILE |
| FILE.py:FACTORY | a module: images in 0..1 -> pooled (N, D), or (maps, pooled) | what the factory loads |

FOLDER is one of transformers (config.json and model.safetensors). Nothing is downloaded: what is not here is said in
one line, with where it comes from. The hash in a figure is that of the weights file, or of the module's state.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import files
from edgegen.errors import DataError, MissingExtra, ModelError
from edgegen.nn.features import ALLOWED, FeatureExtractor, load_features

# name -> timm's network, which has mean, std and size with it
NETWORKS = {
    "clip": "vit_base_patch16_clip_224.openai",
    "clip-l": "vit_large_patch14_clip_336.openai",
    "dinov2": "vit_small_patch14_dinov2.lvd142m",
}
_SIZES = {"dinov2": 224}  # 518 is what it was trained on last; figures are made at 224 (Oquab et al., 2023)


def load(spec: str) -> FeatureExtractor:
    """The extractor behind a name; see the table above.

    Raises:
        DataError: unknown name, or weights that are missing, damaged or do not fit. MissingExtra: a package is absent.
    """
    name, _, rest = spec.partition(":")
    try:
        if name in NETWORKS:
            return _named(name, Path(rest)) if rest else _named(name, _cached(NETWORKS[name], name))
        if name == "timm":
            network, _, file = rest.partition("=")
            return _timm(network, Path(file), network, None)
        if name.endswith(".py") and rest:
            return _own(Path(name), rest)
    except ModelError as error:
        raise DataError(f"feature extractor {spec}: {error}") from error
    try:
        return load_features(spec)
    except DataError as error:
        if not str(error).startswith("unknown feature extractor"):
            raise
        more = ", ".join((*NETWORKS, "timm:NAME=FILE", "FILE.py:FACTORY"))
        raise DataError(f"unknown feature extractor {spec!r}; allowed are {ALLOWED}, {more}") from error


def _cached(network: str, name: str) -> Path:
    """The weights in Hugging Face's cache.

    Raises:
        DataError: they are not there; says how to get them.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError as error:
        raise MissingExtra("huggingface_hub", f"to find the weights of {name} in its cache", "timm") from error
    found = try_to_load_from_cache(f"timm/{network}", "model.safetensors")
    if not isinstance(found, str):
        raise DataError(
            f"the weights of {name} are not in Hugging Face's cache; get them with `hf download timm/{network}"
            f" model.safetensors`, or give a file as {name}:FILE.safetensors"
        )
    return Path(found)


def _named(name: str, path: Path) -> FeatureExtractor:
    return _transformers(name, path) if path.is_dir() else _timm(NETWORKS[name], path, name, _SIZES.get(name))


def _timm(network: str, path: Path, name: str, size: int | None) -> FeatureExtractor:
    """A network of timm with weights from a file, as it was meant to be fed."""
    from edgegen import origins, weights

    timm = origins.require("timm")
    origins.check_timm(network.split(".")[0])
    if not path.is_file():
        raise DataError(f"feature extractor weights {path} do not exist; give a file as timm:{network}=FILE")
    options: dict[str, Any] = {"img_size": size} if size else {}
    try:
        module = timm.create_model(network, pretrained=False, **options)
    except RuntimeError as error:
        raise DataError(f"timm has no network {network!r} ({str(error).splitlines()[0]})") from error
    told = timm.data.resolve_model_data_config(module)
    if size:  # timm's record says what the weights were trained at, whatever size the network is built for
        told["input_size"] = (3, size, size)
    state = weights.read_state(path)
    if size:  # the place of each patch, from the size that the file was trained at
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, module)
    weights.load_into(module, state, str(path))
    if not name.startswith("clip") and hasattr(module, "reset_classifier"):
        module.reset_classifier(0)  # features, not classes; CLIP's last layer is its projection
    return _fed(module.eval().requires_grad_(False), name, files.sha256(path), told, lambda y: y)


def _transformers(name: str, folder: Path) -> FeatureExtractor:
    """CLIP or DINOv2 from a folder of transformers."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", f"to read the folder {folder}", "diffusion") from error
    file = folder / "model.safetensors"
    if not file.is_file() or not (folder / "config.json").is_file():
        raise DataError(f"{folder} has no config.json and model.safetensors; give a folder of transformers")
    kind = transformers.AutoModel if name == "dinov2" else transformers.CLIPVisionModelWithProjection
    try:
        module = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{folder} does not hold {name} ({str(error).splitlines()[0]})") from error
    size = getattr(module.config, "image_size", 224)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if name != "dinov2":
        mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    else:
        size = _SIZES[name]
    told = {"input_size": (3, size, size), "mean": mean, "std": std}
    pick: Callable[[Any], Any] = (lambda y: y.pooler_output) if name == "dinov2" else (lambda y: y.image_embeds)
    return _fed(module.eval().requires_grad_(False), f"{name} (transformers)", files.sha256(file), told, pick)


def _fed(module: Any, name: str, sha256: str, told: dict[str, Any], pick: Callable[[Any], Any]) -> FeatureExtractor:
    """A module that takes RGB of one size, normalised: images in 0..1 are resized to it and normalised."""
    import torch
    from torch.nn import functional

    height, width = told["input_size"][1:]
    mean, std = (torch.tensor(told[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        with torch.inference_mode():
            x = torch.from_numpy(images)
            if tuple(x.shape[2:]) != (height, width):
                x = functional.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
            return [], pick(module((x - mean) / std)).numpy()

    return FeatureExtractor(name, sha256, run, resize=f"{height} x {width}, bicubic, antialiased, aspect not kept")


def _own(path: Path, factory: str) -> FeatureExtractor:
    """A user's module: images (N, 3, H, W) in 0..1 -> (N, D), or (maps, (N, D))."""
    import torch

    from edgegen import origins, weights

    module = origins.call(origins.factory(path, factory), {}, f"{path}:{factory}").eval().requires_grad_(False)

    def run(images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        with torch.inference_mode():
            found = module(torch.from_numpy(images))
        maps, pooled = found if isinstance(found, tuple) else ([], found)
        if pooled.ndim != 2 or len(pooled) != len(images):
            raise DataError(f"{path}:{factory} gives features {tuple(pooled.shape)}; they must be (N, D)")
        return [m.numpy() for m in maps], pooled.numpy()

    return FeatureExtractor(f"{path.name}:{factory}", weights.state_hash(module), run, resize="as the module does it")
