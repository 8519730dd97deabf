"""Calibration sets by name: calibration/<name>.toml -> `Source`, every file checked against its recorded hash.

A set has two parts that share no content: "train" (what passes learn from and calibrate on) and "eval" (what they are
judged on). Images are read from where they lie (the wheels of scikit-image and scikit-learn, which are not imported, or
beside the TOML file); nothing is downloaded.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgegen import files, registry
from edgegen.errors import DataError, MissingExtra
from edgegen.image_files import ImageSource
from edgegen.sources import ArraySource, LatentSource, Source

SPLITS = ("train", "eval")
Split = Literal["train", "eval"]
_PACKAGE_FOLDERS = {"skimage": ("skimage", "data"), "sklearn": ("sklearn", "datasets/images")}
_PACKAGE_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_DIGITS = ("sklearn", "datasets/data/digits.csv.gz")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Photo(_Strict):
    """One image file: where it lies (`folder`: beside the TOML file), its SHA-256, its part, and whose it is."""

    kind: Literal["skimage", "sklearn", "folder"]
    file: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    split: Split
    licence: str = Field(min_length=1)
    author: str
    source: str


class Rows(_Strict):
    """Rows [start, stop) of a table."""

    start: int = Field(ge=0)
    stop: int = Field(gt=0)


class Latents(_Strict):
    """`count` latents N(0, 1) of a seed."""

    seed: int = Field(ge=0)
    count: int = Field(gt=0)


class _Set(_Strict):
    version: Literal[1]
    description: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    preprocessing: str = Field(min_length=1)


class ImageSet(_Set):
    """Photos, each in one part."""

    kind: Literal["images"]
    photos: tuple[Photo, ...] = Field(min_length=2)


class DigitSet(_Set):
    """The handwritten digits that ship with scikit-learn: 8 x 8 grey, ten classes."""

    kind: Literal["digits"]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    author: str
    source: str
    train: Rows
    eval: Rows


class LatentSet(_Set):
    """Sampled latents; their shape is the model's."""

    kind: Literal["latents"]
    train: Latents
    eval: Latents


CalibrationSet = Annotated[ImageSet | DigitSet | LatentSet, Field(discriminator="kind")]


class _File(_Strict):
    content: CalibrationSet


def read(name: str) -> ImageSet | DigitSet | LatentSet:
    """The parsed file of a set.

    Raises:
        DataError: unknown name (with the near match), or a field that is missing, unknown or out of range (named).
    """
    return read_file(registry.path("calibration", name))


def read_file(path: Path) -> ImageSet | DigitSet | LatentSet:
    """`read`, for a file anywhere."""
    try:
        return _File(content=registry.load_toml(path)).content
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "kind"
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        raise DataError(f"{path.name}: {place}: {first['msg']}{got}; see calibration/photos.toml") from error


def load(name: str) -> Source:
    """The whole set.

    Raises:
        DataError: unknown set, or a file that is missing or is not the recorded one.
        MissingExtra: scikit-image or scikit-learn is absent.
    """
    return open_set(read(name), registry.path("calibration", name), SPLITS)


def load_split(name: str, split: str) -> Source:
    """One part of the set: "train" or "eval"; the two share no content.

    Raises:
        DataError: as `load`; or no such part.
        MissingExtra: scikit-image or scikit-learn is absent.
    """
    if split not in SPLITS:
        raise DataError(f"a calibration set has the parts {' and '.join(SPLITS)}, got {split!r}")
    return open_set(read(name), registry.path("calibration", name), (split,))


def open_set(content: ImageSet | DigitSet | LatentSet, path: Path, splits: tuple[str, ...]) -> Source:
    """The source of the parts `splits` of a parsed set that lies at `path`."""
    name = f"calibration set {path.stem} ({' and '.join(splits)})"
    if isinstance(content, ImageSet):
        return _photos(name, content, path.parent, splits)
    if isinstance(content, DigitSet):
        return _digits(name, content, splits)
    parts = [content.train if split == "train" else content.eval for split in splits]
    return LatentSource(name, [(part.seed, part.count) for part in parts])


def attributions(name: str) -> tuple[str, ...]:
    """One line for each work in the set: what, by whom, licence, where from; for bundles and reports."""
    content = read(name)
    if isinstance(content, ImageSet):
        return tuple(f"{p.file}: {p.author}; {p.licence}; {p.source}" for p in content.photos)
    if isinstance(content, DigitSet):
        return (f"digits: {content.author}; {content.licence}; {content.source}",)
    return (f"{name}: {content.licence}",)


def _photos(name: str, content: ImageSet, folder: Path, splits: tuple[str, ...]) -> ImageSource:
    entries = {}
    for photo in content.photos:
        if photo.split in splits:
            base = folder if photo.kind == "folder" else _package_path(*_PACKAGE_FOLDERS[photo.kind])
            path = _inside(base, photo.file)
            _check(path, photo.sha256)
            entries[photo.file] = path.read_bytes
    return ImageSource(name, entries, {})


def _digits(name: str, content: DigitSet, splits: tuple[str, ...]) -> ArraySource:
    """8 x 8 digits with values 0..16, stretched to 0..255; the last column is the label."""
    path = _package_path(*_DIGITS)
    _check(path, content.sha256)
    with gzip.open(path, "rt") as table:
        values = np.loadtxt(table, delimiter=",")
    rows = np.concatenate([values[part.start : part.stop] for part in _parts(content, splits)])
    images = np.rint(rows[:, :64] * (255.0 / 16.0)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return ArraySource(name, images, rows[:, 64].astype(np.int64), tuple("0123456789"))


def _parts(content: DigitSet, splits: tuple[str, ...]) -> Iterator[Rows]:
    return (content.train if split == "train" else content.eval for split in splits)


def _package_path(package: str, below: str) -> Path:
    """A path inside an installed package, found without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(_PACKAGE_NAMES[package], "for the calibration sets, whose images it carries", "torch")
    return Path(next(iter(found.submodule_search_locations))) / below


def _inside(base: Path, file: str) -> Path:
    path = base / file
    if not path.resolve().is_relative_to(base.resolve()):
        raise DataError(f"calibration file {file!r} lies outside {base}; give a name below it")
    return path


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; install the tested versions of constraints.txt")
    if (found := files.sha256(path)) != sha256:
        raise DataError(
            f"{path} is not the recorded file (SHA-256 {found[:12]}, recorded {sha256[:12]}); install it again"
        )
