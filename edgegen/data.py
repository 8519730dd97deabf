"""Datasets: a source seen through a network's input contract, by task; streaming, splits by content, calibration files.

Nothing here holds more than a few decoded images at a time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgegen import files, images, samples
from edgegen.errors import DataError
from edgegen.image_files import ImageSource, open_source
from edgegen.samples import Sample
from edgegen.sources import ArraySource, LatentSource, Source
from edgegen.types import Model

__all__ = [
    "ArraySource",
    "Batch",
    "Dataset",
    "ImageSource",
    "LatentSource",
    "Sample",
    "Source",
    "batches",
    "open_source",
    "overlap",
    "split",
    "split_real",
    "write_calibration",
]

# Samples of an unconditional generator when nobody says how many: enough for a full-rank FID of 2,048 features.
DEFAULT_LATENTS = 2048


@dataclass(frozen=True)
class Batch:
    """Stacked samples: input (n, ...), reference (n, ...) or None, label int64 (n,) or None, keys of length n."""

    input: np.ndarray
    reference: np.ndarray | None
    label: np.ndarray | None
    keys: tuple[str, ...]


class Dataset:
    """Samples for `model` from `source`, by index, each a pure function of (source, model, seed, index).

    | task | input | reference | label |
    |---|---|---|---|
    | classification | the image, preprocessed | - | its class |
    | super-resolution | a tile, reduced bicubically by options["scale"] | the tile | - |
    | image-to-image | the image; a large photo in tiles as well | y, where the source has it | - |
    | restoration | x | y | - |
    | unconditional | latent (seed, index) | - | - |

    A source of arrays (.npz with float x) is taken as it is, for every task. Reference images are in the output's value
    range. `skipped`: names or numbers of photos that are too small for one tile.

    Args:
        source: None only for `unconditional`; there, images are the real ones (`real_images`).
        seed: of the latents, and of the choice when `length` is less than there is.
        length: at most this many samples; for `unconditional` the number of latents (2,048).
    Raises:
        DataError: the source does not fit the model; the message says how.
    """

    def __init__(self, source: Source | None, model: Model, *, seed: int = 0, length: int | None = None):
        self.source, self.model, self.seed = source, model, seed
        self._maker = samples.maker(source, model, seed)
        self._real: tuple[int, ...] | None = None
        self._items: tuple[samples.Item, ...]
        if model.task == "unconditional" and not isinstance(source, LatentSource):
            self._items = tuple((i, None) for i in range(DEFAULT_LATENTS if length is None else length))
        else:
            self._items = tuple(self._maker.items())
            if length is not None and length < len(self._items):
                self._items = self.select(length, seed)._items
        self.skipped = self._maker.skipped
        if not self._items:
            name = source.name if source else "latents"
            raise DataError(f"{name}: no sample for {model.name}; {self._maker.why_none()}")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self._maker.sample(*self._items[i])

    def train_item(self, i: int, rng: np.random.Generator) -> Sample:
        """Sample i with random crop and flip where the task allows them; a new latent; otherwise `self[i]`."""
        return self._maker.augmented(*self._items[i], rng)

    def key(self, i: int) -> str:
        """Content key of sample i without making it; tiles of one photo share the photo's key."""
        return self._maker.key(self._items[i][0])

    def place(self, i: int) -> int:
        """Which item of the source sample i comes from."""
        return self._items[i][0]

    def keys(self) -> frozenset[str]:
        """All content keys."""
        return frozenset(self._maker.key(index) for index, _ in self._items)

    @property
    def digest(self) -> str:
        """Hash of what the dataset holds: with seed and count it names the data behind a figure."""
        beside = self.source if self.model.task == "unconditional" else None  # the real images beside the latents
        real = [beside.key(i) for i in range(len(beside))] if beside is not None and beside.kind == "images" else []
        return files.key(sorted(self.keys()), len(self), self.seed, *([real, self._real] if real else []))

    @property
    def labelled(self) -> bool:
        """Whether samples carry class labels."""
        return bool(len(self)) and self._maker.label(self._items[0][0]) is not None

    def subset(self, indices: Iterable[int]) -> Dataset:
        """The samples at `indices`, in that order. May be empty."""
        part = object.__new__(Dataset)
        part.__dict__.update(self.__dict__)
        part._items = tuple(self._items[i] for i in indices)
        return part

    def select(self, n: int, seed: int) -> Dataset:
        """n samples without replacement (all, when there are fewer); a larger n keeps those of a smaller one."""
        if n >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))[: max(0, n)]
        return self.subset(sorted(int(i) for i in order))

    def real_images(self, size: int = 32) -> Iterator[np.ndarray]:
        """Real images for an unconditional generator: float32 batches (n, C, H, W) in 0..1, fitted to its output.

        Raises:
            DataError: there is no source of images.
        """
        for part in _chunks(range(self.real_count()), size):
            yield np.stack([self.real_image(i) for i in part])

    def real_count(self) -> int:
        """How many real images there are.

        Raises:
            DataError: there is no source of images, or the network's output is none.
        """
        shape = self.model.stages[-1].outputs[0].shape[1:]
        if self.source is None or self.source.kind != "images":
            raise DataError(f"{self.model.name}: no real images to compare with; give --data with images")
        if len(shape) != 3 or any(isinstance(s, str) for s in shape):
            raise DataError(f"{self.model.name}: output {shape} is not an image (C, H, W) of fixed size")
        return len(self.source) if self._real is None else len(self._real)

    def real_labels(self) -> np.ndarray | None:
        """The class of each real image, int64 (real_count(),); None where the network or the source has no classes.

        Raises:
            DataError: there is no source of images, or its classes cannot be the network's.
        """
        count, classes = self.real_count(), int(self.model.options.get("labels", 0))
        if not classes or self.source is None or not self.source.labels:
            return None
        samples.check_classes(self.source, classes, self.model.name)
        found = [self.source.label(i) for i in (range(count) if self._real is None else self._real)]
        return None if None in found else np.array(found, np.int64)

    def real_image(self, i: int) -> np.ndarray:
        """Real image i, float32 (C, H, W) in 0..1, fitted to the output of an unconditional generator.

        Raises:
            DataError: there is no source of images, or the output is none.
        """
        if i >= self.real_count() or self.source is None:
            raise IndexError(f"real image {i} of {self.real_count()}")
        channels, height, width = (int(s) for s in self.model.stages[-1].outputs[0].shape[1:])
        found = self.source.image(i if self._real is None else self._real[i])
        return images.scaled(images.fit(images.with_channels(found, channels), height, width), (0.0, 1.0))


def split(dataset: Dataset, fractions: tuple[float, ...], seed: int) -> list[Dataset]:
    """Cut by content: samples with equal keys (equal images, tiles of one photo) never fall into two parts.

    Deterministic in (keys, fractions, seed). Each part gets at least one key when there are enough of them. Real images
    of an unconditional dataset are cut in the same way.

    Raises:
        DataError: a fraction is not positive or they sum to more than 1.
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise DataError(f"split fractions must be positive and sum to at most 1, got {fractions}")
    part_of = _assign(dataset.keys(), fractions, seed)
    places: list[list[int]] = [[] for _ in fractions]
    for i in range(len(dataset)):
        if (part := part_of.get(dataset.key(i))) is not None:
            places[part].append(i)
    parts = [dataset.subset(p) for p in places]
    source = dataset.source
    if dataset.model.task == "unconditional" and source is not None and source.kind == "images":
        real = dataset._real if dataset._real is not None else tuple(range(len(source)))
        real_part = _assign(frozenset(source.key(i) for i in real), fractions, seed)
        for number, part_set in enumerate(parts):
            part_set._real = tuple(i for i in real if real_part.get(source.key(i)) == number)
    return parts


def split_real(parts: list[Dataset], seed: int) -> list[Dataset]:
    """The same latents, each part with real images of its own: equal images never fall into two parts.

    Raises:
        DataError: fewer than two different real images for each part.
    """
    source = parts[0].source
    if source is None:
        raise DataError(f"{parts[0].model.name}: no real images to share out; give --data with images")
    keys = frozenset(source.key(i) for i in range(len(source)))
    if len(keys) < 2 * len(parts):
        raise DataError(f"{source.name}: {len(keys)} different images; {len(parts)} parts need two each: give more")
    share = _assign(keys, (1.0 / len(parts),) * len(parts), seed)
    found = [part.subset(range(len(part))) for part in parts]
    for number, part in enumerate(found):
        part._real = tuple(i for i in range(len(source)) if share.get(source.key(i)) == number)
    return found


def _assign(keys: frozenset[str], fractions: tuple[float, ...], seed: int) -> dict[str, int]:
    """key -> part: keys in the order of hash(seed, key), cut by cumulative share."""
    order = sorted(keys, key=lambda k: files.key(seed, k))
    total, parts = len(order), len(fractions)
    ends = [round(total * share) for share in itertools.accumulate(fractions)]
    if total >= parts:
        for j in range(parts):
            ends[j] = max(ends[j], (ends[j - 1] if j else 0) + 1)
        for j in reversed(range(parts)):
            ends[j] = min(ends[j], total - (parts - 1 - j))
    starts = [0, *ends[:-1]]
    return {key: j for j, (start, end) in enumerate(zip(starts, ends, strict=True)) for key in order[start:end]}


def overlap(a: Dataset, b: Dataset) -> int:
    """Number of content keys that are in both."""
    return len(a.keys() & b.keys())


def batches(dataset: Dataset, size: int) -> Iterator[Batch]:
    """All samples in order, stacked; two threads decode at most two batches ahead."""
    with ThreadPoolExecutor(2) as pool:
        ahead: deque[Future[Sample]] = deque()
        following = iter(range(len(dataset)))
        for start in range(0, len(dataset), size):
            room = 2 * size - len(ahead)
            ahead.extend(pool.submit(dataset.__getitem__, i) for i in itertools.islice(following, room))
            yield stack([ahead.popleft().result() for _ in range(min(size, len(dataset) - start))])


def stack(found: list[Sample]) -> Batch:
    """Samples of equal shapes -> one batch."""
    references = [s.reference for s in found if s.reference is not None]
    labels = [s.label for s in found if s.label is not None]
    return Batch(
        np.stack([s.input for s in found]),
        np.stack(references) if len(references) == len(found) else None,
        np.array(labels, np.int64) if len(labels) == len(found) else None,
        tuple(s.key for s in found),
    )


def write_calibration(dataset: Dataset, out: Path, input_name: str, limit: int) -> Path:
    """Write the first `limit` inputs to `out`/<input_name>.npy, float32 (n, ...), streamed; returns the file.

    Raises:
        DataError: the dataset is empty, or the name cannot be a file name.
    """
    number = min(limit, len(dataset))
    if number < 1:
        raise DataError("calibration needs at least one sample, got none; give more data")
    if Path(input_name).name != input_name:
        raise DataError(f"input name {input_name!r} cannot be a file name; rename the network's input")
    path = out / f"{input_name}.npy"
    with files.whole(path) as temporary:
        first = dataset[0].input
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(number, *first.shape))
        at = 0
        for batch in batches(dataset.subset(range(number)), 16):
            array[at : at + len(batch.input)] = batch.input
            at += len(batch.input)
        array.flush()
        del array
    return path


def _chunks(places: range, size: int) -> Iterator[range]:
    return (places[i : i + size] for i in range(0, len(places), size))
