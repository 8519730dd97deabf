"""Make the benchmarks' data from ../shared/assets: uncompressed .npz files and image folders, never committed.

    python benchmarks/prepare_data.py [--assets ../shared/assets] [--out out/data]

    cifar/calibration.npz   300 training images (30 a class)                   x uint8 (N, 32, 32, 3), y int64 (N,)
    cifar/train.npz         10,000 other training images
    cifar/train-all.npz     all 49,700 other ones
    cifar/test.npz          the 8,000 test images
    photos/train, eval      image folders: every fifth photo is for evaluation
    tiles/train             100 pictures of 512 x 512, each four of the photos for training side by side
    imagenet/train, eval    .npz of the same photos, shorter side 256, centre 224; y = ImageNet class
    taef2/train, eval       .npz of the same photos, 256: x float32 latents (N, 32, 32, 32), y uint8 photos; the
                            centre, and for training 8 views of other places and scales, and 24 of each of kodak24
    mnist/train, test       .npz: x uint8 (N, 28, 28, 1), y int64 (N,); vit.safetensors, see networks/vit_mnist.py

Only evaluation files may be used for reported quality.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "shared" / "assets"
PICTURES = (".png", ".webp", ".jpg")
CALIBRATION_PER_CLASS, TRAIN_PER_CLASS, EVAL_EVERY = 30, 1000, 5
AT_ONCE = 8


def network_module(name: str) -> ModuleType:
    """benchmarks/networks/<name>.py, imported from its path."""
    spec = importlib.util.spec_from_file_location(f"networks_{name}", HERE / "networks" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no network file {name}.py in {HERE / 'networks'}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def centre(photo: Path, size: int, resize: int) -> np.ndarray:
    """Centre crop uint8 (size, size, 3) of a photo whose shorter side is first brought to `resize` pixels."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    if min(image.size) != resize:
        factor = resize / min(image.size)
        shape = (round(image.width * factor), round(image.height * factor))
        image = image.resize(shape, Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def split_photos(assets: Path) -> dict[str, list[Path]]:
    """{"train": 400 photos, "eval": 100 photos}: every fifth, by name, is for evaluation."""
    photos = sorted((assets / "photos").glob("*.jpg"))
    held_out = photos[::EVAL_EVERY]
    return {"train": [p for p in photos if p not in set(held_out)], "eval": held_out}


def cifar(assets: Path, out: Path) -> None:
    """Calibration, training and test arrays; the training sheets are 50 rows of 100 images, a sheet a class."""
    parts: dict[str, list[np.ndarray]] = {"calibration": [], "train": [], "train-all": []}
    for sheet in sorted((assets / "cifar10-train").glob("*.webp"), key=lambda p: int(p.name.split("_")[0])):
        with Image.open(sheet) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        images = pixels.reshape(50, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
        calibration, others = np.split(np.random.default_rng(0).permutation(len(images)), [CALIBRATION_PER_CLASS])
        parts["calibration"].append(images[calibration])
        parts["train"].append(images[others[:TRAIN_PER_CLASS]])
        parts["train-all"].append(images[others])
    for name, classes in parts.items():
        # interleave the classes, so that every prefix of the file is balanced
        x = np.stack(classes, axis=1).reshape(-1, 32, 32, 3)
        np.savez(out / f"{name}.npz", x=x, y=np.tile(np.arange(len(classes)), len(classes[0])))
    with np.load(assets / "cifar10-test.npz", allow_pickle=False) as test:
        np.savez(out / "test.npz", x=test["x"], y=test["y"].astype(np.int64))


def photos(assets: Path, out: Path) -> None:
    """Image folders train/ and eval/, unchanged files."""
    for part, files in split_photos(assets).items():
        (out / part).mkdir()
        for file in files:
            shutil.copyfile(file, out / part / file.name)


def tiles(assets: Path, out: Path) -> None:
    """Image folder train/, for networks whose output is larger than a photo: enlarging one would blur it."""
    (out / "train").mkdir()
    files = split_photos(assets)["train"]
    for number, four in enumerate(zip(*[iter(files)] * 4, strict=True)):
        a, b, c, d = (centre(file, 256, 256) for file in four)
        Image.fromarray(np.block([[[a], [b]], [[c], [d]]])).save(out / "train" / f"{number:03}.png")


def imagenet(assets: Path, out: Path) -> None:
    """x uint8 (N, 224, 224, 3), y the class index 0..999 that the file name starts with."""
    for part, files in split_photos(assets).items():
        x = np.stack([centre(file, 224, 256) for file in files])
        np.savez(out / f"{part}.npz", x=x, y=np.array([int(file.name[:4]) for file in files], np.int64))


def views(photo: Path, size: int, count: int) -> list[np.ndarray]:
    """Squares of `size` from all over a photo, at 0.6 to 1 of its shorter side, every second one mirrored."""
    rng = np.random.default_rng(zlib.crc32(photo.name.encode()))
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    found = []
    for number in range(count):
        side = round(min(image.size) * rng.uniform(0.6, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
        square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        found.append(np.asarray(square)[:, :: -1 if number % 2 else 1])
    return found


def taef2(assets: Path, out: Path) -> None:
    """x float32 latents (N, 32, 32, 32) made by the encoder from y, uint8 photos (N, 256, 256, 3)."""
    import torch

    from edgegen import training

    encoder = network_module("taef2").encoder().eval().to(memory_format=torch.channels_last)
    state = torch.load(assets / "taef2-encoder.pth", map_location="cpu", weights_only=True)
    encoder.load_state_dict({key: value.float() for key, value in state.items()})
    unfinished = out / "unfinished.npy"
    for part, files in split_photos(assets).items():
        images = [centre(file, 256, 256) for file in files]
        if part == "train":
            images += [view for file in files for view in views(file, 256, 8)]
            images += [view for file in sorted((assets / "kodak24").iterdir()) if file.suffix in PICTURES
                       for view in views(file, 256, 24)]  # fmt: skip
        # Training latents in BF16 where the processor has it, four times as fast; what is judged on is FP32.
        precision = training.resolve_precision("auto" if part == "train" else "fp32")
        with torch.no_grad(), training.autocast(precision):
            for start in range(0, len(images), AT_ONCE):
                chunk = out / f"{part}-{start:05}.npy"
                if not chunk.is_file():  # half an hour where there is no BF16: what is done is kept
                    print(f"\rtaef2: {part} {start} of {len(images)} photos ", end="", file=sys.stderr, flush=True)
                    batch = torch.from_numpy(np.stack(images[start : start + AT_ONCE])).permute(0, 3, 1, 2) / 255
                    found = encoder(batch.contiguous(memory_format=torch.channels_last)).float().numpy()
                    np.save(unfinished, found)
                    unfinished.rename(chunk)
        print(file=sys.stderr)
        chunks = sorted(out.glob(f"{part}-*.npy"))
        np.savez(out / f"{part}.npz", x=np.concatenate([np.load(chunk) for chunk in chunks]), y=np.stack(images))
    for chunk in out.glob("*.npy"):
        chunk.unlink()


def mnist(assets: Path, out: Path) -> None:
    """The images as they are, and the weights of networks/vit_mnist.py under the names of its layers."""
    import torch
    from safetensors.torch import save_file

    for part in ("train", "test"):
        shutil.copyfile(assets / f"mnist-{part}.npz", out / f"{part}.npz")
    state = torch.load(assets / "vit-mnist.pth", map_location="cpu", weights_only=True)
    save_file(network_module("vit_mnist").from_published(state), out / "vit.safetensors")


Maker = Callable[[Path, Path], None]
MAKERS: dict[str, Maker] = {
    "cifar": cifar, "photos": photos, "tiles": tiles, "imagenet": imagenet, "taef2": taef2, "mnist": mnist,
}  # fmt: skip
RESUMES = ("taef2",)


def make(name: str, assets: Path, out: Path) -> Path:
    """Make one data folder, whole or not at all; one that exists is kept, and what RESUMES goes on.

    Raises:
        FileNotFoundError: the assets folder is absent.
    """
    if not assets.is_dir():
        raise FileNotFoundError(f"no assets in {assets}; give their folder with --assets")
    folder, partial = out / name, out / f".{name}.partial"
    if not folder.is_dir():
        if name not in RESUMES:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        MAKERS[name](assets, partial)
        partial.rename(folder)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "data")
    parser.add_argument("--only", choices=sorted(MAKERS), action="append", help="repeatable; default: all")
    options = parser.parse_args()
    for name in options.only or MAKERS:
        print(make(name, options.assets, options.out))


if __name__ == "__main__":
    main()
