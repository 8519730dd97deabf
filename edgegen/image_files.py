"""Folders and archives of encoded images, and `open_source`, which opens whatever `--data` names."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edgegen import archives, files
from edgegen.archives import Reader
from edgegen.errors import DataError
from edgegen.images import broken_image_errors, decode
from edgegen.sources import BROKEN_SHARE_LIMIT, ArraySource, Source, content_key

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
_DECODED_BYTES = 64 << 20
_SCAN_CACHED_FROM = 256


class ImageSource(Source):
    """Encoded images. All are decoded once, when opened, to find the broken ones, their sizes and their hashes.

    Args:
        entries: name -> reader of the file's bytes.
        class_names: the class of each entry, or empty.
        stamp: identifies the files' state; a scan of many images is kept in the cache under it.
    Raises:
        DataError: no images, or more than 10 % of them broken.
    """

    def __init__(self, name: str, entries: dict[str, Reader], class_names: dict[str, str], stamp: Any = None):
        if not entries:
            raise DataError(f"{name}: no images there; allowed are {', '.join(IMAGE_SUFFIXES)}")
        found = _scanned(entries, stamp)
        broken = tuple(n for n in entries if n not in found)
        if len(broken) > BROKEN_SHARE_LIMIT * len(entries):
            first = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
            found_broken = f"{len(broken)} of {len(entries)} images are broken (allowed: 10 %)"
            raise DataError(f"{name}: {found_broken}: {first}; mend or remove them")
        labels, self._index_of = _label_table(class_names)
        super().__init__(name, labels, broken)
        self.names = tuple(found)
        self._classes, self._found, self._readers = class_names, found, entries
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> np.ndarray:
        """Image i as uint8 (H, W, C); the last 64 MiB of decoded images are kept."""
        with self._lock:
            if i in self._decoded:
                self._decoded.move_to_end(i)
                return self._decoded[i]
        try:
            image = decode(self._readers[self.names[i]]())
        except broken_image_errors() as error:
            raise DataError(f"{self.name}: {self.names[i]} cannot be read any more ({error})") from error
        with self._lock:
            self._decoded[i] = image
            while sum(a.nbytes for a in self._decoded.values()) > _DECODED_BYTES and len(self._decoded) > 1:
                self._decoded.popitem(last=False)
        return image

    def size(self, i: int) -> tuple[int, int]:
        """(H, W) as found when opened."""
        _, height, width = self._found[self.names[i]]
        return height, width

    def label(self, i: int) -> int | None:
        """Index of the class folder, or None."""
        return self._index_of[self._classes[self.names[i]]] if self._classes else None

    def key(self, i: int) -> str:
        """Hash of the decoded pixels."""
        return self._found[self.names[i]][0]


def open_source(path: str | Path) -> Source:
    """Open a folder of images (recursive), a .zip or .tar of one, or an .npz with `x` and perhaps `y`.

    Class labels: when all images lie in at least two top folders, the folders are the classes, sorted by name; folders
    named by numbers are class indices. Broken images are skipped and named in `broken`.

    Raises:
        DataError: nothing there, no images, unreadable, a pickle, or more than 10 % broken.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"data {path} does not exist; give a folder of images, a .zip or .tar of one, or an .npz")
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() == ".npz":
        arrays = archives.npz_arrays(path)
        if "x" not in arrays:
            raise DataError(f"{path} has no array x; store images or inputs as x, labels or references as y")
        return ArraySource(str(path), arrays["x"], arrays.get("y"))
    if archives.is_archive(path):
        entries = {n: r for n, r in sorted(archives.members(path).items()) if _is_image(PurePosixPath(n))}
        state = path.stat()
        stamp = (str(path.resolve()), state.st_size, state.st_mtime_ns)
        return ImageSource(str(path), entries, _classes(entries), stamp)
    allowed = ", ".join((".npz", *archives.SUFFIXES))
    raise DataError(f"data {path}: unknown kind {path.suffix!r}; allowed are a folder of images, {allowed}")


def _folder(path: Path) -> ImageSource:
    paths = sorted(p for p in path.rglob("*") if _is_image(p.relative_to(path)) and p.is_file())
    entries: dict[str, Reader] = {p.relative_to(path).as_posix(): p.read_bytes for p in paths}
    states = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return ImageSource(str(path), entries, _classes(entries), [str(path.resolve()), states])


def _is_image(path: Any) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _classes(names: Iterable[str]) -> dict[str, str]:
    """name -> class folder; empty when there are no class folders. A folder around everything does not count."""
    parts = {name: PurePosixPath(name).parts[:-1] for name in names}
    while parts and all(parts.values()):
        first = {p[0] for p in parts.values()}
        if len(first) > 1:
            return {name: p[0] for name, p in parts.items()}
        parts = {name: p[1:] for name, p in parts.items()}
    return {}


def _label_table(class_names: dict[str, str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in label order, and class folder -> label. Folders named by numbers are their own label."""
    folders = sorted(set(class_names.values()))
    if folders and all(f.isascii() and f.isdigit() and int(f) < 100_000 for f in folders):
        index = {f: int(f) for f in folders}
        return tuple(str(i) for i in range(max(index.values()) + 1)), index
    return tuple(folders), {f: i for i, f in enumerate(folders)}


def _scanned(entries: dict[str, Reader], stamp: Any) -> dict[str, tuple[str, int, int]]:
    """name -> (content key, H, W) of every image that decodes, in order; long scans are kept in the cache."""
    kept = files.cache_folder() / "scan" / f"{files.key(stamp, 1)}.json"
    keep = stamp is not None and len(entries) >= _SCAN_CACHED_FROM
    if keep and kept.exists():
        return {n: (str(k), int(h), int(w)) for n, (k, h, w) in json.loads(kept.read_text()).items()}
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(_facts, entries.values())
        found = {name: facts for name, facts in zip(entries, results, strict=True) if facts is not None}
    if keep:
        files.write_text(kept, json.dumps(found))
    return found


def _facts(reader: Reader) -> tuple[str, int, int] | None:
    try:
        image = decode(reader())
    except broken_image_errors():
        return None
    return content_key(image), image.shape[0], image.shape[1]
