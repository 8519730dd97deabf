"""Train edgegen/models/weights/pix2pix_paint.safetensors: `python benchmarks/train/paint.py`.

Photos and what the Kuwahara filter makes of them, in random squares of 128 pixels at several sizes, L1 loss. The photos
are those of edsr.py: learnt from kodak24 and photos-permissive, judged on others. What ships is the average of the
weights at the last step, its batch norm statistics measured anew, whatever the curve says.
"""

from __future__ import annotations

from pathlib import Path

import common
import dcgan
import edsr
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import uniform_filter

from edgegen.models import pix2pix_paint

SIDE, RADIUS, BATCH, PEAK, DECAY = 128, 4, 16, 2e-3, 0.999
SHORTER = (144, 184, 236, 304)  # pixels of the shorter side: from the whole scene to a part of it
WEIGHTS = Path(pix2pix_paint.__file__).parent / "weights" / "pix2pix_paint.safetensors"
Pair = tuple[np.ndarray, np.ndarray]


def painted(photo: np.ndarray, radius: int = RADIUS) -> np.ndarray:
    """The Kuwahara filter of (H, W, 3) uint8: each pixel the mean of the calmest of four squares of radius + 1 pixels.

    radius: even. Calm is a small variance of the luminance; edges are mirrored.
    """
    half, side, colours = radius // 2, radius + 1, photo.astype(np.float64)
    luminance = colours @ (0.299, 0.587, 0.114)
    means = uniform_filter(colours, (side, side, 1), mode="mirror")
    spread = uniform_filter(luminance**2, side, mode="mirror") - uniform_filter(luminance, side, mode="mirror") ** 2
    edge = ((half, half), (half, half))
    means, spread = np.pad(means, (*edge, (0, 0)), mode="reflect"), np.pad(spread, edge, mode="reflect")
    height, width = photo.shape[:2]
    corners = [(y, x) for y in (0, 2 * half) for x in (0, 2 * half)]
    calmest = np.argmin([spread[y:y + height, x:x + width] for y, x in corners], 0)
    candidates = np.stack([means[y:y + height, x:x + width] for y, x in corners])
    return np.take_along_axis(candidates, calmest[None, :, :, None], 0)[0].round().astype(np.uint8)


def fitted(photo: np.ndarray, shorter: int) -> np.ndarray:
    """The photo with its shorter side at `shorter` pixels, by PIL's bicubic antialiased reduction."""
    return edsr.reduced(photo, min(photo.shape[:2]) / shorter)


def pairs(photos: list[np.ndarray]) -> list[list[Pair]]:
    """For each photo, at each size, itself and its painting."""
    sizes = [[fitted(photo, shorter) for shorter in SHORTER] for photo in photos]
    return [[(photo, painted(photo)) for photo in row] for row in sizes]


def batch(data: list[list[Pair]], seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos and paintings (N, 3, 128, 128), -1..1, a function of (seed, step)."""
    rng = common.generator(seed, step)
    taken = []
    for _ in range(BATCH):
        sizes = data[rng.integers(len(data))]
        pair = sizes[rng.integers(len(sizes))]
        y, x = (int(rng.integers(size - SIDE + 1)) for size in pair[0].shape[:2])
        which = int(rng.integers(8))
        taken.append([common.dihedral(image[y:y + SIDE, x:x + SIDE], which) for image in pair])
    photos, paintings = (np.stack(images) for images in zip(*taken, strict=True))
    return tensor(photos), tensor(paintings)


def tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float -1..1, channels last in memory."""
    return edsr.tensor(images) * 2 - 1


def judged() -> dict[str, Pair]:
    """Name -> photo and painting, 128 x 128, of photos that are not learnt from: the middle of the whole scene."""
    found = {}
    for name, photo in edsr.evaluation_photos().items():
        small = fitted(photo, SIDE)
        y, x = ((size - SIDE) // 2 for size in small.shape[:2])
        found[name] = (small[y:y + SIDE, x:x + SIDE], painted(small)[y:y + SIDE, x:x + SIDE])
    return found


@torch.no_grad()
def made(module: torch.nn.Module, photo: np.ndarray) -> np.ndarray:
    """(128, 128, 3) uint8 to the network's painting, float 0..1."""
    return ((module.eval()(tensor(photo[None]))[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def figures(module: torch.nn.Module) -> dict[str, dict[str, float]]:
    """PSNR to the filter's painting, of the photo itself and of the network's painting, in dB."""
    found = {}
    for name, (photo, painting) in judged().items():
        scores = {"photo": photo / 255, "network": made(module, photo)}
        found[name] = {key: round(edsr.psnr(painting / 255, image), 3) for key, image in scores.items()}
    means = {key: round(float(np.mean([f[key] for f in found.values()])), 3) for key in ("photo", "network")}
    return {**found, "mean": means}


def picture(module: torch.nn.Module, path: Path) -> None:
    """Photo, the filter's painting and the network's, a column each, as a PNG."""
    rows = [np.concatenate([photo, painting, np.uint8(made(module, photo) * 255 + 0.5)], 1)
            for photo, painting in judged().values()]  # fmt: skip
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    options = common.arguments(__doc__, steps=6000)
    data = pairs([photo for photo, _ in edsr.training_photos()])
    model = pix2pix_paint.create().to(memory_format=torch.channels_last).train()
    average = common.Average(model, DECAY)
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK, betas=(0.9, 0.99))
    run = common.Run("pix2pix_paint", options.steps, options.seed, common.checkpoint(options, "pix2pix_paint"),
                     {"model": model, "average": average, "optimizer": optimizer})

    step = common.regression(
        model, average, optimizer, lambda index: batch(data, options.seed, index), options.steps, PEAK
    )

    def measure_norms(batches: int) -> None:  # averaged weights, and batches of their own
        dcgan.measure_norms(average.module, batches, lambda index: batch(data, options.seed + 1, index)[0])

    def evaluate() -> dict[str, float]:
        measure_norms(8)
        return {"psnr": figures(average.module)["mean"]["network"]}

    common.train(run, step, evaluate=evaluate, every=250)
    measure_norms(64)
    common.write_weights(average.module, WEIGHTS, half=True)
    picture(average.module, common.RESULTS / "pix2pix_paint.png")
    common.record(run, settings={"side": SIDE, "radius": RADIUS, "batch": BATCH, "peak_rate": PEAK, "loss": "L1",
                                 "average_decay": DECAY, "shorter_sides": SHORTER, "precision": common.PRECISION},
                  figures={"psnr_rgb_db_to_the_filter": figures(average.module)}, weights=WEIGHTS, module=model,
                  data=f"{len(data)} photos of kodak24 and photos-permissive")


if __name__ == "__main__":
    main()
