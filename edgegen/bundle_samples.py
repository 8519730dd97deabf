"""run_<target>.py of a bundle: a program of one page that feeds the artifact as the network wants to be fed.

It needs numpy and the runtime, and Pillow for image files; .npy files do without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgegen import bundle_denoisers, bundle_tiles, samplers
from edgegen.bundle_loaders import LOADERS, PACKAGES, WRITE_PNG, loader
from edgegen.types import Artifact, Model, TensorSpec

_HEAD = '''"""Run {title} on {target}: {usage}"""

import argparse
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SETTINGS = {settings}
'''

_READ_IMAGE = '''

def read(file):
    """uint8 (H, W, C) as the network sees it: resized, cropped, RGB or grey."""
    height, width = SETTINGS["size"]
    if file.suffix == ".npy":
        image = np.load(file, allow_pickle=False)
        if image.dtype != np.uint8 or image.shape != (height, width, SETTINGS["channels"]):
            raise SystemExit(f"{file} must hold uint8 {height}x{width}x{SETTINGS['channels']}, got {image.shape}")
        return image
    from PIL import Image

    image = Image.open(file).convert(SETTINGS["colour"])
    if SETTINGS["resize"]:
        image = scaled(image, SETTINGS["resize"] / min(image.size), int)
    if SETTINGS["crop"]:
        image = cropped(image, *SETTINGS["crop"])
    if image.size != (width, height):
        image = cropped(scaled(image, max(height / image.height, width / image.width), round), height, width)
    return np.asarray(image).reshape(height, width, -1)


def scaled(image, factor, whole):
    size = [whole(side * factor + (1e-6 if whole is int else 0)) for side in image.size]
    return image.resize(size, 3)  # 3: bicubic, antialiased


def cropped(image, height, width):
    left, top = max(0, round((image.width - width) / 2)), max(0, round((image.height - height) / 2))
    return image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))


def prepare(image):
    """uint8 (H, W, C) to the network's input (1, C, H, W)."""
    low, high = SETTINGS["input_range"]
    x = image.transpose(2, 0, 1).astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
    if SETTINGS["mean"]:
        x = (x - np.float32(SETTINGS["mean"])[:, None, None]) / np.float32(SETTINGS["std"])[:, None, None]
    return np.ascontiguousarray(x[None])
'''

_READ_ARRAY = '''

def read(file):
    """The network's input from a .npy file, float32, with or without the batch axis."""
    return np.load(file, allow_pickle=False).astype(np.float32).reshape(SETTINGS["shape"])


def prepare(array):
    return array
'''

_LATENT = '''

def latent(seed, index=0):
    """A standard normal latent of the network's input shape."""
    shape = SETTINGS["shape"][1:]
    return np.random.default_rng([seed, index]).standard_normal(shape, dtype=np.float32)[None]
'''

_FURTHER = '''

def further(seed):
    """The network's other inputs: noise N(0, 1), or the class that the seed draws, as an index or one-hot."""
    rng, given = np.random.default_rng([seed, 1]), {}
    for name, (shape, kind) in SETTINGS["further"].items():
        if kind == "noise":
            given[name] = rng.standard_normal(shape, dtype=np.float32)
        elif kind == "one-hot":
            given[name] = np.eye(shape[1], dtype=np.float32)[rng.integers(shape[1], size=1)]
        else:
            given[name] = rng.integers(kind, size=shape)
    return given
'''

_PICK = '''

def pick(file):
    """Take the network for the file's size, or for the nearest one, and say so."""
    if file.suffix == ".npy":
        shape = np.load(file, allow_pickle=False, mmap_mode="r").shape
        sides = list(shape[:2] if SETTINGS["channels"] in (1, 3) else shape[-2:])
    else:
        from PIL import Image

        with Image.open(file) as image:
            sides = [image.height, image.width]

    def away(one):
        tall, wide = np.log(np.divide(sides, one["size"]))
        return abs(tall + wide) + 4 * abs(tall - wide)  # another shape is cropped, which costs more than scaling

    nearest = min(SETTINGS["sizes"], key=away)
    SETTINGS.update(nearest)
    if nearest["size"] != sides:
        known = ", ".join("x".join(map(str, one["size"])) for one in SETTINGS["sizes"])
        taken = "x".join(map(str, nearest["size"]))
        print(f"{file} is {sides[0]}x{sides[1]}, there is {known}: scaled and cropped to {taken}", file=sys.stderr)
'''

_WRITE_IMAGE = '''

def finish(y):
    """The network's output (1, C, H, W) to uint8 (H, W, C)."""
    low, high = SETTINGS["output_range"]
    return np.rint(np.clip((y[0] - low) / (high - low), 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def show(y, out):
    if out.suffix == ".npy":
        np.save(out, y)
    else:
        write_png(out, finish(y))
    print(out)
'''

_WRITE_VECTOR = '''

def show(y, out):
    np.save(out, y)
    print(out)
'''

_SHOW_CLASSES = '''

def show(y, out):
    """The five best classes with their probabilities."""
    odds = np.exp(y[0] - y[0].max())
    for i in np.argsort(-odds)[:5]:
        print(f"{odds[i] / odds.sum():7.2%}  {SETTINGS['classes'][i] if SETTINGS['classes'] else f'class {i}'}")
'''

_CALL = '''

def called(x, **more):
    """The network's output for one input, and others where it takes any."""
    return load(SETTINGS)({SETTINGS["inputs"][0]: x, **more})[SETTINGS["outputs"][0]]
'''

_MAIN_FILE = '''

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, help="an image, or a .npy file")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="where an image result goes (.png or .npy)")
    arguments = parser.parse_args()
    show(called(prepare(read(arguments.input))), arguments.out)


if __name__ == "__main__":
    main()
'''

_MAIN_LATENT = '''

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed, another image")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="where the image goes (.png or .npy)")
    arguments = parser.parse_args()
    show(called(latent(arguments.seed)), arguments.out)


if __name__ == "__main__":
    main()
'''


def script(model: Model, artifact: Artifact, file: str, target: str, more: Sequence[Artifact] = ()) -> str:
    """Text of the sample.

    Args:
        artifact: the bundle's main artifact.
        file: its main file, relative to the bundle.
        target: name of the target; the script is called run_<target>.py.
        more: the same network for other input sizes, with paths relative to the bundle; picked by the image's size.
    """
    settings = _settings(model, artifact, file)
    if (loop := samplers.of(model.options)) is not None:
        told = _literal(bundle_denoisers.settings(settings, loop, artifact))
        half = artifact.partial
        known = {} if half is None else _settings(model, half, half.path.as_posix())
        between = bundle_denoisers.partial(known, artifact)
        partial = _literal(between) if between else "{}"
        head = {"title": model.name, "target": target, "usage": f"python3 {script_name(target)} --seed 1 --out out.png"}
        return bundle_denoisers.script(head, told, partial, artifact.runtime)
    latents = model.task == "unconditional"
    usage = f"python3 {script_name(target)} " + ("--seed 1 --out out.png" if latents else "photo.png --out out.png")
    given = _LATENT if latents else _READ_IMAGE if settings["channels"] in (1, 3) else _READ_ARRAY
    if more:
        settings["sizes"] = [_placed(settings), *(_placed(_settings(model, one, _file(one))) for one in more)]
        given += _PICK
    text = _HEAD.format(title=model.name, target=target, usage=usage, settings=_literal(settings))
    if model.task == "classification":
        text = text.replace("import struct\n", "").replace("import zlib\n", "")
    result = _SHOW_CLASSES if model.task == "classification" else WRITE_PNG + _WRITE_IMAGE
    main = _MAIN_LATENT if latents else _MAIN_FILE
    if settings["further"]:
        given += _FURTHER
        main = main.replace("latent(arguments.seed)", "latent(arguments.seed), **further(arguments.seed)")
    if latents and len(artifact.outputs[0].shape) != 4:  # a mapping's styles
        result = _WRITE_VECTOR
        main = main.replace("out.png", "out.npy").replace("image goes (.png or .npy)", "numbers go")
        text = text.replace("out.png", "out.npy").replace("import struct\n", "").replace("import zlib\n", "")
    if _tiled(model, settings) and not more:
        given += bundle_tiles.text()
        main = main.replace("called(prepare(read(arguments.input)))", "whole(arguments.input)")
    if more:
        main = main.replace("    show(called(", "    pick(arguments.input)\n    show(called(")
    return text + loader(artifact.runtime) + given + result + _CALL + main


def _tiled(model: Model, settings: Mapping[str, Any]) -> bool:
    """Whether a photo of any size can go through the network in tiles, instead of being scaled and cropped to it."""
    fitted = settings["resize"] or settings["crop"] or settings["further"]
    return model.task in bundle_tiles.TASKS and settings["channels"] in (1, 3) and not fitted


def further(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The artifacts after the first that are the same network for another input size."""
    first = artifacts[0]
    return [one for one in artifacts[1:] if one.runtime == first.runtime and one.inputs != first.inputs]


def runs_graph(artifact: Artifact) -> bool:
    """Whether the sample runs the ONNX graph, because Python cannot run the artifact itself."""
    return artifact.runtime not in LOADERS


def graph_name(size: tuple[int, int]) -> str:
    """Name in the bundle of the graph of a further input size (H, W)."""
    return f"model-{size[0]}x{size[1]}.onnx"


def _file(artifact: Artifact) -> str:
    height, width = artifact.inputs[0].shape[-2:]
    return graph_name((int(height), int(width))) if runs_graph(artifact) else artifact.path.as_posix()


def _placed(settings: dict[str, Any]) -> dict[str, Any]:
    """What differs from one input size to another."""
    return {key: settings[key] for key in ("file", "size", "shape", "output_shapes", "options", "layout")}


def script_name(target: str) -> str:
    """run_<target>.py with the target's dashes as underscores, so that it can be imported too."""
    return f"run_{target.replace('-', '_')}.py"


def needs(artifact: Artifact) -> str:
    """The runtime's package, as pip names it."""
    name = artifact.runtime if artifact.runtime in LOADERS else "onnxruntime"
    return PACKAGES.get(name, name)


def _settings(model: Model, artifact: Artifact, file: str) -> dict[str, Any]:
    given, made = artifact.inputs[0], artifact.outputs[0]
    how, shape = model.preprocessing, list(given.shape)
    known = artifact.runtime in LOADERS
    return {
        "file": file if known or file.startswith("model-") else "model.onnx",
        "inputs": [spec.name for spec in artifact.inputs],
        "further": {spec.name: [list(spec.shape), _kind(spec)] for spec in artifact.inputs[1:]},
        "outputs": [spec.name for spec in artifact.outputs],
        "threads": int(artifact.options.get("threads", 0)),
        "options": {k: v for k, v in artifact.options.items() if isinstance(v, str | int | float)} if known else {},
        "disabled_optimizers": list(artifact.options.get("disabled_optimizers", [])),
        "layout": dict(artifact.options.get("layout", {})),
        "shape": shape,
        "output_shapes": [list(spec.shape) for spec in artifact.outputs],
        "size": shape[-2:],
        "channels": shape[1] if len(shape) == 4 else 0,
        "colour": how.colour,
        "resize": how.resize,
        "crop": how.crop and list(how.crop),
        "input_range": list(how.value_range),
        "mean": list(how.mean),
        "std": list(how.std),
        "output_range": list(made.value_range or (0.0, 1.0)),
        "classes": list(model.options.get("classes", [])),
    }


def _kind(spec: TensorSpec) -> str | int:
    """How a further input is drawn: "noise", "one-hot", or the number of values of an index."""
    if spec.value_range is None:
        return "noise"
    return "one-hot" if spec.dtype.startswith("float") else int(spec.value_range[1]) + 1


def _literal(settings: dict[str, Any]) -> str:
    lines = [f"    {json.dumps(key)}: {value!r}," for key, value in settings.items()]
    return "{\n" + "\n".join(lines) + "\n}"
