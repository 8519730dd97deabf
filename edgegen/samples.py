"""How each task turns a source into samples; `Dataset` is the public face of this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgegen import images
from edgegen.errors import DataError
from edgegen.sources import LatentSource, Source, latent, latent_key
from edgegen.types import Model

# (index in the source, what to take of it: None the whole, else (top, left) of a tile)
Item = tuple[int, tuple[int, int] | None]


@dataclass(frozen=True)
class Sample:
    """One network input with what belongs to it.

    input: float32, as the network takes it, no batch axis. reference: float32 (C, H, W) in the output's value range, or
    None. label: class index or None. key: content hash of the image it comes from.
    """

    input: np.ndarray
    reference: np.ndarray | None
    label: int | None
    key: str


def maker(source: Source | None, model: Model, seed: int) -> Maker:
    """The right maker for a task and a kind of source.

    Raises:
        DataError: they do not go together.
    """
    if model.task == "unconditional":
        return LatentMaker(source, model, seed)
    if source is None:
        raise DataError(
            f"{model.name} ({model.task}) needs data; give a folder of images, an archive of them, or an .npz"
        )
    if source.kind == "latents":
        raise DataError(f"{source.name} holds latents, {model.name} ({model.task}) takes images; choose another set")
    if source.kind == "arrays":
        return ArrayMaker(source, model)
    makers = {
        "classification": ClassificationMaker,
        "super-resolution": SuperResolutionMaker,
        "image-to-image": ImageToImageMaker,
        "restoration": RestorationMaker,
    }
    return makers[model.task](source, model)


class Maker:
    """Base: knows the shapes; the subclasses know the task."""

    def __init__(self, source: Source | None, model: Model):
        self.model, self.skipped = model, 0
        self.spec = model.stages[0].inputs[0]
        self.shape = self.spec.shape[1:]
        if not self.shape or any(isinstance(s, str) for s in self.shape):
            raise DataError(
                f"{model.name}: input {self.spec.name} {tuple(self.spec.shape)} has free dimensions; state its shape"
            )
        if source is not None:
            self.source = source

    def items(self) -> list[Item]:
        """All samples that the source gives."""
        return [(i, None) for i in range(len(self.source))]

    def sample(self, index: int, part: tuple[int, int] | None) -> Sample:
        """The sample of an item."""
        raise NotImplementedError

    def augmented(self, index: int, part: tuple[int, int] | None, rng: np.random.Generator) -> Sample:
        """The sample of an item as training sees it, changed by what `rng` draws; here: unchanged."""
        return self.sample(index, part)

    def key(self, index: int) -> str:
        """Content key of source item `index`."""
        return self.source.key(index)

    def label(self, index: int) -> int | None:
        """Class of source item `index`; only classification has any."""
        return None

    def why_none(self) -> str:
        """What to do when there is no sample at all."""
        return "give more data"


class LatentMaker(Maker):
    """Unconditional: latents from (seed, index), or those of a LatentSource."""

    def __init__(self, source: Source | None, model: Model, seed: int):
        super().__init__(source, model)
        self.seed, self.latents = seed, source if isinstance(source, LatentSource) else None

    def sample(self, index: int, part: tuple[int, int] | None) -> Sample:
        shape = tuple(int(s) for s in self.shape)
        values = self.latents.latent(index, shape) if self.latents else latent(self.seed, index, shape)
        return Sample(values, None, None, self.key(index))

    def augmented(self, index: int, part: tuple[int, int] | None, rng: np.random.Generator) -> Sample:
        if self.latents:
            return self.sample(index, part)
        values = rng.standard_normal([int(s) for s in self.shape], dtype=np.float32)  # there is no end of latents
        return Sample(values, None, None, self.key(index))

    def key(self, index: int) -> str:
        return self.latents.key(index) if self.latents else latent_key(self.seed, index)


class ArrayMaker(Maker):
    """Network inputs as they are; references as they are (float) or scaled (uint8)."""

    def __init__(self, source: Source, model: Model):
        super().__init__(source, model)
        if source.array(0).shape != self.shape:
            raise DataError(
                f"{source.name}: x holds samples of shape {source.array(0).shape}, {model.name} takes {self.shape}"
            )
        if model.task in ("restoration", "super-resolution") and source.reference(0) is None:
            raise DataError(f"{source.name} has no reference images; store them as y, in the order of x")

    def sample(self, index: int, part: tuple[int, int] | None) -> Sample:
        reference = _as_output(self.source.reference(index), self.model)
        return Sample(self.source.array(index), reference, self.label(index), self.key(index))

    def label(self, index: int) -> int | None:
        return self.source.label(index) if self.model.task == "classification" else None


class ImageMaker(Maker):
    """Base of the tasks that take images (C, H, W)."""

    def __init__(self, source: Source, model: Model):
        super().__init__(source, model)
        if len(self.shape) != 3:
            raise DataError(f"{model.name} takes {self.shape}, not an image (C, H, W); give an .npz with such x")
        shape = self.shape if self.spec.layout != "NHWC" else (self.shape[2], *self.shape[:2])
        self.channels, self.height, self.width = (int(s) for s in shape)
        if self.channels not in (1, 3):
            raise DataError(
                f"{model.name} takes {self.channels} channels, images have 1 or 3; give an .npz with such x"
            )

    def network_input(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, any channels) of the right size -> float32 input."""
        image = images.with_channels(image, self.channels)
        return images.network_input(image, self.model.preprocessing, self.spec.layout)


def check_classes(source: Source, classes: int, name: str) -> None:
    """Refuse a source whose classes cannot be the network's.

    Raises:
        DataError: more classes, or another number of them and no numbers as names.
    """
    numbered = source.labels == tuple(str(i) for i in range(len(source.labels)))
    if len(source.labels) > classes or (source.labels and len(source.labels) != classes and not numbered):
        raise DataError(
            f"{source.name} has {len(source.labels)} classes, {name} has {classes}; name the class folders by class"
            " index (0, 217, ...), or give images without class folders"
        )


class ClassificationMaker(ImageMaker):
    """Image and label; augmented (colour only): shifted by up to an eighth, flipped."""

    def __init__(self, source: Source, model: Model):
        super().__init__(source, model)
        classes = model.stages[-1].outputs[0].shape[-1]
        if isinstance(classes, int):
            check_classes(source, classes, model.name)

    def sample(self, index: int, part: tuple[int, int] | None) -> Sample:
        image = images.view(self.source.image(index), self.model.preprocessing, self.height, self.width)
        return Sample(self.network_input(image), None, self.label(index), self.key(index))

    def augmented(self, index: int, part: tuple[int, int] | None, rng: np.random.Generator) -> Sample:
        if self.channels != 3:
            return self.sample(index, part)
        image = images.view(self.source.image(index), self.model.preprocessing, self.height, self.width)
        down, right = self.height // 8, self.width // 8
        padded = np.pad(image, ((down, down), (right, right), (0, 0)), mode="reflect")
        top, left = rng.integers(0, 2 * down + 1), rng.integers(0, 2 * right + 1)
        moved = _flipped(images.crop(padded, int(top), int(left), self.height, self.width), rng)
        return Sample(self.network_input(moved), None, self.label(index), self.key(index))

    def label(self, index: int) -> int | None:
        return self.source.label(index)


class SuperResolutionMaker(ImageMaker):
    """Tiles of the photo (input size x scale) as references, their bicubic reduction as inputs."""

    def __init__(self, source: Source, model: Model):
        super().__init__(source, model)
        scale = model.options.get("scale")
        if not isinstance(scale, int) or scale < 1:
            raise DataError(f"{model.name}: super-resolution needs the option scale, an integer, got {scale!r}")
        self.tile = (self.height * scale, self.width * scale)

    def items(self) -> list[Item]:
        found = [(i, images.tiles(self.source.size(i), *self.tile)) for i in range(len(self.source))]
        self.skipped = sum(not places for _, places in found)
        return [(i, place) for i, places in found for place in places]

    def why_none(self) -> str:
        return f"every photo is smaller than a tile of {self.tile[0]} x {self.tile[1]} pixels; give larger photos"

    def sample(self, index: int, part: tuple[int, int] | None) -> Sample:
        return self._of_tile(index, images.crop(self.source.image(index), *(part or (0, 0)), *self.tile))

    def augmented(self, index: int, part: tuple[int, int] | None, rng: np.random.Generator) -> Sample:
        return self._of_tile(index, _flipped(_random_crop(self.source.image(index), *self.tile, rng), rng))

    def _of_tile(self, index: int, tile: np.ndarray) -> Sample:
        small = images.resize(images.with_channels(tile, self.channels), self.height, self.width)
        return Sample(self.network_input(small), _as_output(tile, self.model), None, self.key(index))


class ImageToImageMaker(ImageMaker):
    """The whole photo, fitted to the input; one at least twice as large also gives tiles at half its fitted scale.

    Where the source has reference images (uint8 y, as large as x), they are fitted and cut in the same way.
    """

    def __init__(self, source: Source, model: Model):
        super().__init__(source, model)
        reference, made = source.reference(0), model.stages[-1].outputs[0].shape[-2:]
        if reference is not None and (reference.dtype != np.uint8 or reference.shape[:2] != source.size(0)):
            got = f"{source.name}: y is {reference.dtype} {reference.shape}"
            raise DataError(f"{got}; references of image-to-image are uint8 images as large as x, {source.size(0)}")
        if reference is not None and made != (self.height, self.width):
            raise DataError(f"{source.name} has reference images, and {model.name} makes images of another size than it"
                            f" takes ({made}, {(self.height, self.width)}); give images alone")  # fmt: skip

    def items(self) -> list[Item]:
        found: list[Item] = []
        for i in range(len(self.source)):
            height, width = self.source.size(i)
            found.append((i, None))
            if height >= 2 * self.height and width >= 2 * self.width:
                scale = max(2 * self.height / height, 2 * self.width / width)
                size = (max(2 * self.height, round(height * scale)), max(2 * self.width, round(width * scale)))
                found += [(i, place) for place in images.tiles(size, self.height, self.width)]
        return found

    def sample(self, index: int, part: tuple[int, int] | None) -> Sample:
        def fitted(image: np.ndarray) -> np.ndarray:
            if part is None:
                return images.view(image, self.model.preprocessing, self.height, self.width)
            image = images.cover(image, 2 * self.height, 2 * self.width)
            return images.crop(image, *part, self.height, self.width)

        return self._of(index, fitted)

    def augmented(self, index: int, part: tuple[int, int] | None, rng: np.random.Generator) -> Sample:
        image = self.source.image(index)
        room = min(image.shape[0] / self.height, image.shape[1] / self.width)
        zoom = rng.uniform(1.0, min(2.0, max(1.0, room)))
        tall, wide = round(zoom * self.height), round(zoom * self.width)
        state = rng.bit_generator.state

        def fitted(image: np.ndarray) -> np.ndarray:
            rng.bit_generator.state = state  # input and reference take the same place
            return _flipped(_random_crop(images.cover(image, tall, wide), self.height, self.width, rng), rng)

        return self._of(index, fitted)

    def _of(self, index: int, fitted: Callable[[np.ndarray], np.ndarray]) -> Sample:
        """The photo and its reference, if there is one, both fitted in the same way."""
        reference = self.source.reference(index)
        made = None if reference is None else _as_output(fitted(reference), self.model)
        return Sample(self.network_input(fitted(self.source.image(index))), made, None, self.key(index))


class RestorationMaker(ImageMaker):
    """uint8 x of an .npz as inputs, y as reference images."""

    def __init__(self, source: Source, model: Model):
        super().__init__(source, model)
        if source.reference(0) is None:
            raise DataError(f"{source.name} has no reference images; restoration needs an .npz with x and images y")
        if source.size(0) != (self.height, self.width):
            raise DataError(
                f"{source.name}: images are {source.size(0)}, {model.name} takes {(self.height, self.width)}; crop them"
            )

    def sample(self, index: int, part: tuple[int, int] | None) -> Sample:
        reference = _as_output(self.source.reference(index), self.model)
        return Sample(self.network_input(self.source.image(index)), reference, None, self.key(index))


def _as_output(image: np.ndarray | None, model: Model) -> np.ndarray | None:
    """uint8 (H, W, C) -> float32 (C, H, W) in the output's value range and channels; float images as they are."""
    if image is None or image.dtype != np.uint8:
        return image
    spec = model.stages[-1].outputs[0]
    if len(spec.shape) == 4 and spec.shape[1] in (1, 3):
        image = images.with_channels(image, int(spec.shape[1]))
    return images.scaled(image, spec.value_range or (0.0, 1.0))


def _random_crop(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    top = rng.integers(0, image.shape[0] - height + 1)
    left = rng.integers(0, image.shape[1] - width + 1)
    return images.crop(image, int(top), int(left), height, width)


def _flipped(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image[:, ::-1] if rng.random() < 0.5 else image
