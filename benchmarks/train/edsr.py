"""Train edgegen/models/weights/edsr.safetensors: `python benchmarks/train/edsr.py`.

Photos of kodak24 and photos-permissive, less those that scikit-image and scikit-learn carry too: on these it is judged.
Pairs are (PIL's bicubic antialiased reduction x4 of the uint8 photo, photo), L1 loss. The curve's PSNR is for looking
at only; what ships is the average of the weights at the last step, whatever the curve says.
"""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image

from edgegen.models import edsr

SCALE, PATCH, BATCH, PEAK, DECAY = 4, 24, 16, 5e-4, 0.999
FACTORS = (1.0, 1.26, 1.59, 2.0)
WEIGHTS = Path(edsr.__file__).parent / "weights" / "edsr.safetensors"
Pair = tuple[np.ndarray, np.ndarray]


def evaluation_photos() -> dict[str, np.ndarray]:
    """Colour photos that scikit-image and scikit-learn ship: name -> (H, W, 3) uint8."""
    import skimage.data
    import sklearn.datasets

    photos = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    photos |= {name: sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {name: np.asarray(photo) for name, photo in photos.items()}


def training_photos() -> list[tuple[np.ndarray, bool]]:
    """(photo (H, W, 3) uint8, came as JPEG), without any photo that is in `evaluation_photos` by name or content."""
    held = evaluation_photos()
    paths = [*sorted((common.ASSETS / "kodak24").glob("*.png"))]
    paths += sorted(p for p in (common.ASSETS / "photos-permissive").iterdir() if p.suffix in (".png", ".jpg"))
    photos = [(p, np.asarray(Image.open(p).convert("RGB"))) for p in paths if p.stem not in held]
    same = [p.name for p, photo in photos if any(np.array_equal(photo, other) for other in held.values())]
    return [(photo, p.suffix == ".jpg") for p, photo in photos if p.name not in same]


def reduced(photo: np.ndarray, factor: float) -> np.ndarray:
    """PIL's bicubic antialiased reduction of a uint8 photo by `factor`."""
    height, width = (round(size / factor) for size in photo.shape[:2])
    return np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.BICUBIC))


def pair(photo: np.ndarray) -> Pair:
    """(low, high) uint8, the high one cropped to a multiple of 4."""
    height, width = (size // SCALE * SCALE for size in photo.shape[:2])
    high = np.ascontiguousarray(photo[:height, :width])
    return reduced(high, SCALE), high


def pairs(photos: list[tuple[np.ndarray, bool]]) -> list[list[Pair]]:
    """For each photo its pairs at several sizes. JPEGs are never used at full size: their blocks would be learnt."""
    smallest = PATCH * SCALE
    return [
        [pair(reduced(photo, f)) for f in FACTORS if not (jpeg and f < 1.2) and min(photo.shape[:2]) / f > smallest]
        for photo, jpeg in photos
    ]


def batch(data: list[list[Pair]], seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low (N, 3, 24, 24) and high (N, 3, 96, 96), 0..1, a function of (seed, step)."""
    rng = common.generator(seed, step)
    lows, highs = [], []
    for _ in range(BATCH):
        sizes = data[rng.integers(len(data))]
        low, high = sizes[int(len(sizes) * rng.random() ** 1.5)]
        y, x = (int(rng.integers(size - PATCH + 1)) for size in low.shape[:2])
        which = int(rng.integers(8))
        lows.append(common.dihedral(low[y:y + PATCH, x:x + PATCH], which))
        y, x, side = y * SCALE, x * SCALE, PATCH * SCALE
        highs.append(common.dihedral(high[y:y + side, x:x + side], which))
    return tensor(np.stack(lows)), tensor(np.stack(highs))


def tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float 0..1, channels last in memory."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """In dB, over all pixels and channels of two images in 0..1."""
    return float(-10 * np.log10(np.mean((reference - candidate) ** 2)))


@torch.no_grad()
def enlarge(module: torch.nn.Module, low: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to (4H, 4W, 3) float 0..1, clamped."""
    return module(tensor(low[None])).clamp(0, 1)[0].permute(1, 2, 0).numpy()


def bicubic(low: np.ndarray) -> np.ndarray:
    """PIL's bicubic enlargement x4, 0..1: what to beat."""
    height, width = low.shape[:2]
    large = Image.fromarray(low).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC)
    return np.asarray(large, dtype=np.float32) / 255


def main() -> None:
    options = common.arguments(__doc__, steps=5200)
    data = pairs(training_photos())
    judged = {name: pair(photo) for name, photo in evaluation_photos().items()}
    model = edsr.create().to(memory_format=torch.channels_last).train()
    average = common.Average(model, DECAY)
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK, betas=(0.9, 0.99))
    run = common.Run("edsr", options.steps, options.seed, common.checkpoint(options, "edsr"),
                     {"model": model, "average": average, "optimizer": optimizer})

    step = common.regression(
        model, average, optimizer, lambda index: batch(data, options.seed, index), options.steps, PEAK
    )

    def evaluate() -> dict[str, float]:
        scores = [psnr(high / 255.0, enlarge(average.module, low)) for low, high in judged.values()]
        return {"psnr": float(np.mean(scores))}

    common.train(run, step, evaluate=evaluate, every=200)
    common.write_weights(average.module, WEIGHTS, half=True)
    figures = {
        name: {"bicubic": round(psnr(high / 255.0, bicubic(low)), 3),
               "edsr": round(psnr(high / 255.0, enlarge(average.module, low)), 3)}
        for name, (low, high) in judged.items()
    }
    figures["mean"] = {key: round(float(np.mean([f[key] for f in figures.values()])), 3) for key in ("bicubic", "edsr")}
    common.record(run, settings={"patch": PATCH, "batch": BATCH, "peak_rate": PEAK, "average_decay": DECAY,
                                 "factors": FACTORS, "loss": "L1", "precision": common.PRECISION},
                  figures={"psnr_rgb_db": figures}, weights=WEIGHTS, module=model,
                  data=f"{len(data)} photos of kodak24 and photos-permissive")


if __name__ == "__main__":
    main()
