"""The part of a bundle's sample that runs photos of any size through an engine of one size: `tiling`, as it is.

For networks whose result at a pixel depends on what is near it: super-resolution and restoration.
"""

from __future__ import annotations

import inspect

from edgegen import tiling

TASKS = ("super-resolution", "restoration")
_FUNCTIONS = (tiling.run_tiled, tiling._at_least, tiling._starts, tiling._weights)

_ERROR = '''
Run = "function of one tile, (1, C, H, W), to its result"  # for the annotations below


class DataError(ValueError):
    """A photo, or tiles, that do not fit."""
'''

_WHOLE = '''

def pixels(file):
    """uint8 (H, W, C) of a photo, at its own size."""
    if file.suffix == ".npy":
        image = np.load(file, allow_pickle=False)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != SETTINGS["channels"]:
            raise SystemExit(f"{file} must hold uint8 (H, W, {SETTINGS['channels']}), got {image.dtype} {image.shape}")
        return image
    from PIL import Image

    image = Image.open(file).convert(SETTINGS["colour"])
    return np.asarray(image).reshape(image.height, image.width, -1)


def whole(file):
    """The result for a photo of any size: in overlapping tiles of what the network takes."""
    network, tile = load(SETTINGS), tuple(SETTINGS["size"])
    overlap = min(tile) // 4

    def run(x):
        return network({SETTINGS["inputs"][0]: x})[SETTINGS["outputs"][0]]

    return run_tiled(run, prepare(pixels(file)), tile, overlap=overlap, blend=overlap // 2)
'''


def text() -> str:
    """Functions of the sample: `whole(file)` takes the place of `called(prepare(read(file)))`."""
    return _ERROR + "".join(f"\n\n{inspect.getsource(function)}" for function in _FUNCTIONS) + _WHOLE
