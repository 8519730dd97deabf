"""The networks of the comparison, and the files that every peer gets of each: one ONNX file, one set of images.

The evaluation images fall into two halves. `judge` is what edgegen's search may look at; every figure of the table is
from `held`, which no tool sees. All tools calibrate on the same `calibration` images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ASSETS, DATA = ROOT.parent / "shared" / "assets", ROOT / "out" / "data"
NETWORKS, RECIPES = ROOT / "benchmarks" / "networks", ROOT / "benchmarks" / "recipes"
PICTURES = (".png", ".webp", ".jpg", ".jpeg")
HELD_MOST = 4000  # images of the table's quality figures


@dataclass(frozen=True)
class Case:
    """model, weights: as `edgegen compress` takes them. train, evaluation: under out/data; empty: latents. trained:
    False where only output error can be told. best: arguments of edgegen's best recipe; empty: the preset.
    enlarge: calibration photos are first brought to squares of this size, where they are smaller than the output."""

    name: str
    model: str
    weights: str = ""
    train: str = ""
    evaluation: str = ""
    calibration: int = 100
    trained: bool = True
    best: tuple[str, ...] = ()
    enlarge: int = 0


def _file(name: str, factory: str) -> str:
    return f"{NETWORKS / name}.py:{factory}"


_CIFAR = {"train": "cifar/calibration.npz", "evaluation": "cifar/test.npz", "calibration": 300}
_PHOTOS = {"train": "photos/train", "evaluation": "photos/eval"}
_IMAGENET = {"train": "imagenet/train.npz", "evaluation": "imagenet/eval.npz"}
CASES = {
    case.name: case
    for case in (
        Case("resnet20", _file("resnet_cifar", "resnet20"), "resnet20-cifar10.th", **_CIFAR),
        Case("resnet56", _file("resnet_cifar", "resnet56"), "resnet56-cifar10.th", **_CIFAR),
        Case("style-mosaic", _file("style", "style"), "style-mosaic.safetensors", **_PHOTOS,
             best=("--recipe", str(RECIPES / "style.toml"), "--min-psnr", "25.6")),
        Case("rlfn", _file("rlfn", "rlfn"), "rlfn-x4.pth", "photos/train", str(ASSETS / "kodak24"), enlarge=512),
        Case("taef2-decoder", _file("taef2", "decoder"), "taef2-decoder.pth", "taef2/train.npz", "taef2/eval.npz",
             best=("--recipe", str(RECIPES / "taef2-four-bits.toml"))),
        Case("mobilenet_v2", _file("mobilenet_v2", "mobilenet_v2"), "mobilenet_v2-imagenet.safetensors", **_IMAGENET),
        Case("mobilenet_v1", _file("mobilenet_v1", "mobilenet_v1_025"), "mobilenet_v1_025-imagenet.safetensors",
             **_IMAGENET),
        Case("edsr", "edsr", "", **_PHOTOS, best=("--recipe", "balanced")),
        Case("dcgan", "dcgan", "", best=("--recipe", "gan")),
        Case("ddpm_unet", "ddpm_unet", ""),
        Case("efficientformer_l1", "timm:efficientformer_l1", "", **_IMAGENET, trained=False),
        Case("deit_tiny", "timm:deit_tiny_patch16_224", "", **_IMAGENET, trained=False),
    )
}  # fmt: skip


def weights(case: Case) -> Path | None:
    """The file of trained weights; None: those that ship, or random ones."""
    return ASSETS / case.weights if case.weights else None


def spread(count: int, total: int) -> np.ndarray:
    """`count` places evenly spread over 0..total-1 (files are in class order); all where there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def part(source: Path, out: Path, choose: Callable[[int], Sequence[int]]) -> Path:
    """Some images of an .npz or a folder as one of the same kind at `out`; choose(number) -> places."""
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        chosen = list(choose(len(arrays["x"])))
        np.savez(out.with_suffix(".npz"), **{name: array[chosen] for name, array in arrays.items()})
        return out.with_suffix(".npz")
    found = sorted(file for file in source.iterdir() if file.suffix.lower() in PICTURES)
    out.mkdir(parents=True)
    for place in choose(len(found)):
        shutil.copyfile(found[place], out / found[place].name)
    return out


def load(case: Case) -> Any:
    """The edgegen `Model` of a case."""
    from edgegen import loading

    return loading.load_model(case.model, weights=weights(case), latency_only=not case.trained)


def datasets(case: Case, folder: Path) -> dict[str, Path | None]:
    """calibration, judge and held under `folder`; None each where the network takes latents."""
    if not case.train:
        return dict.fromkeys(("calibration", "judge", "held"))
    evaluation = DATA / case.evaluation
    calibration = part(DATA / case.train, folder / "calibration", lambda n: spread(case.calibration, n))
    if case.enlarge:
        _enlarge(calibration, case.enlarge)
    return {
        "calibration": calibration,
        "judge": part(evaluation, folder / "judge", lambda n: range(0, n, 2)[:HELD_MOST]),
        "held": part(evaluation, folder / "held", lambda n: range(1, n, 2)[:HELD_MOST]),
    }


def _enlarge(folder: Path, size: int) -> None:
    """Centre squares of the images of a folder at `size`, as PNG; what a network of x4 sees of them is a reduction."""
    from PIL import Image
    from prepare_data import centre

    for file in sorted(folder.iterdir()):
        Image.fromarray(centre(file, size, size)).save(file.with_suffix(".png"))
        if file.suffix != ".png":
            file.unlink()


def dataset(model: Any, path: Path | None, seed: int, length: int) -> Any:
    """Images as the network takes them, or `length` latents of a seed."""
    from edgegen import data

    return data.Dataset(data.open_source(path), model) if path else data.Dataset(None, model, seed=seed, length=length)


def stack(model: Any, found: Any, count: int) -> dict[str, np.ndarray]:
    """Input name -> samples, and "y": labels or references where there are any.

    A denoiser's are those of its own way from noise to images, over all of its steps and 32 latents.
    """
    from edgegen import samplers
    from edgegen.nn import diffusion

    settings = samplers.of(model.options)
    samples = [found[i] for i in range(len(found) if settings is None else min(32, len(found)))]
    inputs = np.stack([s.input for s in samples]).astype(np.float32)
    if settings is not None:
        return samplers.trajectory(settings, diffusion.runner(model.stage.module), inputs, count)
    arrays = {model.stage.inputs[0].name: inputs}
    if samples[0].reference is not None:
        arrays["y"] = np.stack([s.reference for s in samples]).astype(np.float32)
    elif samples[0].label is not None:
        arrays["y"] = np.array([s.label for s in samples])
    return arrays


def prepare(case: Case, out: Path) -> Path:
    """All files of a case in the folder `out`, whole or not at all; a finished one is kept.

    model.onnx; state.pt and case.json (how to make the module); calibration-inputs.npz and held-inputs.npz (each input
    by its name; y labels or references); the images of the three parts as edgegen takes them.
    """
    if (out / "case.json").is_file():
        return out
    import torch

    from edgegen import onnx_graph, samplers

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = load(case)
    graph = onnx_graph.to_onnx(model.stage, partial / "model.onnx")
    torch.save(model.stage.module.state_dict(), partial / "state.pt")
    paths = datasets(case, partial)
    for number, name in enumerate(("calibration", "held")):
        length = case.calibration if name == "calibration" else 500
        found = dataset(model, paths[name], number, length)
        np.savez(partial / f"{name}-inputs.npz", **stack(model, found, length))
    told = {
        "name": case.name, "model": case.model, "task": model.task, "inputs": [spec.name for spec in graph.inputs],
        "input_shapes": [list(spec.shape) for spec in graph.inputs], "output": graph.outputs[0].name,
        "output_shape": list(graph.outputs[0].shape), "value_range": graph.outputs[0].value_range,
        "denoiser": samplers.of(model.options) is not None, "macs": graph.macs, "params": graph.params,
        "data": {name: path.name if path else None for name, path in paths.items()},
    }  # fmt: skip
    (partial / "case.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out
