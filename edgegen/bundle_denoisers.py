"""run_<target>.py of a denoiser's bundle: images from noise by the sampler in `samplers/`, with numpy and the runtime.

What is not a run of the network is the copied sampler; nothing of edgegen is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgegen.bundle_loaders import LOADERS, WRITE_PNG, loader
from edgegen.bundle_manifest import PARTIAL
from edgegen.types import Artifact

_HEAD = '''"""Make images with {title} on {target}: {usage}"""

import argparse
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from samplers import _core  # noqa: E402

SETTINGS = {settings}
PARTIAL = {partial}  # what runs at the steps between, where deep blocks are cached
'''

_REST = '''

def loaded():
    """The network as the sampler takes it; where deep blocks are cached, the full and the partial one."""
    full = one_by_one(load(SETTINGS))
    return {"full": full, "partial": one_by_one(load({**SETTINGS, **PARTIAL}))} if PARTIAL else full


def one_by_one(run):
    """The network takes one image at a time; this takes a stack of them."""

    def stacked(feeds):
        count = len(feeds["sample"])
        parts = [run({name: value[i : i + 1] for name, value in feeds.items()}) for i in range(count)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return stacked


def images(run, count, seed, label=None, sampler=None):
    """(count, C, H, W) in the network's value range; image i is a function of (seed, i)."""
    shape = SETTINGS["shape"][1:]
    latents = [np.random.default_rng([seed, i]).standard_normal(shape, dtype=np.float32) for i in range(count)]
    labels = None if label is None else np.full(count, label)
    return _core.generate(sampler or SETTINGS["sampler"], run, np.stack(latents), labels)


def grid(made):
    """Images as one picture, uint8 (H, W, C)."""
    low, high = SETTINGS["output_range"]
    count, channels, height, width = made.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    page = np.zeros((rows * height, columns * width, channels), np.uint8)
    for i, image in enumerate(np.rint(np.clip((made - low) / (high - low), 0, 1) * 255).astype(np.uint8)):
        top, left = i // columns * height, i % columns * width
        page[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return page


def check_label(label, classes):
    """One line for a class that the network does not have."""
    if label is not None and not classes:
        raise SystemExit(f"--label {label}: this network has no classes; leave it out")
    if label is not None and not 0 <= label < classes:
        raise SystemExit(f"--label must be a class from 0 to {classes - 1}, got {label}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images")
    parser.add_argument("--count", type=int, default=16, help="how many images")
    parser.add_argument("--steps", type=int, default=0, help="steps of the sampler (0: as it was judged)")
    parser.add_argument("--label", type=int, help="class of all images, where the network has classes")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="where the images go (.png or .npy)")
    arguments = parser.parse_args()
    sampler = dict(SETTINGS["sampler"])
    check_label(arguments.label, sampler["labels"])
    if arguments.steps:
        sampler.update(steps=arguments.steps, timesteps=[])
    run, begin = loaded(), time.perf_counter()
    try:
        made = images(run, arguments.count, arguments.seed, arguments.label, sampler)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    seconds, (calls, partial) = time.perf_counter() - begin, _core.calls(sampler)
    if arguments.out.suffix == ".npy":
        np.save(arguments.out, made)
    else:
        write_png(arguments.out, grid(made))
    each = 1000 * seconds / len(made)
    told = f"{calls} runs of the network" + (f", {partial} of them partial," if partial else "")
    print(f"{arguments.out}: {len(made)} images, {told} and {each:.1f} ms each", file=sys.stderr)
    print(arguments.out)


if __name__ == "__main__":
    main()
'''


def script(head: Mapping[str, str], settings: str, partial: str, runtime: str) -> str:
    """Text of the program.

    Args:
        head: title, target and usage.
        settings, partial: the text of the dictionaries of settings.
        runtime: the main artifact's.
    """
    text = _HEAD.format(**head, settings=settings, partial=partial)
    return text + loader(runtime) + WRITE_PNG + _REST


def settings(known: dict[str, Any], loop: Mapping[str, Any], artifact: Artifact) -> dict[str, Any]:
    """The settings of `bundle_samples` with what a sampler needs."""
    if artifact.runtime not in LOADERS:
        known = {**known, "file": "model.onnx", "options": {}}
    return {**known, "sampler": dict(loop)}


def partial(known: dict[str, Any], artifact: Artifact) -> dict[str, Any]:
    """What is different for the partial artifact; nothing where there is none."""
    if artifact.partial is None:
        return {}
    sides = {key: known[key] for key in ("inputs", "outputs", "output_shapes")}
    if artifact.runtime not in LOADERS:
        return {"file": PARTIAL, **sides}
    return {key: known[key] for key in ("file", "options", "disabled_optimizers", "layout")} | sides
