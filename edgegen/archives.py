"""Read-only random access to the members of .zip, .tar and .npz files without unpacking them into memory.

What is compressed as a whole (.tgz, a compressed array inside an .npz) is unpacked once into the cache folder, under
the hash of the file's content. Nothing is ever unpickled and no member name becomes a path on disk.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgegen import files
from edgegen.errors import DataError

# One image file larger than this is refused: it is a decompression bomb or not an image.
MEMBER_LIMIT_BYTES = 1 << 29
SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")
_DAMAGE = (zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, *_DAMAGE)
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

Reader = Callable[[], bytes]


def is_archive(path: Path) -> bool:
    """Whether the file name says that it is an archive that `members` can open."""
    return path.name.lower().endswith(SUFFIXES)


def members(path: Path) -> dict[str, Reader]:
    """Member name -> function that reads its bytes, for every regular file of a .zip or .tar archive.

    Raises:
        DataError: the archive cannot be read.
    """
    try:
        return _zip_members(path) if path.name.lower().endswith(".zip") else _tar_members(_plain_tar(path))
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable archive ({error}); pack it again or give the folder") from error


def _zip_members(path: Path) -> dict[str, Reader]:
    archive = zipfile.ZipFile(path)  # stays open: members are read by name later
    found: dict[str, Reader] = {}
    for info in archive.infolist():
        if not info.is_dir():
            found[info.filename] = partial(_zip_read, archive, info)
    return found


def _zip_read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MEMBER_LIMIT_BYTES:
        raise OSError(f"{info.filename} is {info.file_size} byte, more than {MEMBER_LIMIT_BYTES}")
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise OSError(str(error)) from error


def _plain_tar(path: Path) -> Path:
    """`path` itself when it is not compressed, else its unpacked copy in the cache: only that has random access."""
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        return path
    copy = files.cache_folder() / "tar" / f"{files.sha256(path)[:24]}.tar"
    if not copy.exists():
        with files.whole(copy) as temporary, opener(path, "rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return copy


def _tar_members(path: Path) -> dict[str, Reader]:
    with tarfile.open(path, "r:") as archive:
        places = {m.name: (m.offset_data, m.size) for m in archive if m.isreg() and not m.issparse()}
    return {name: partial(_read_at, path, at, size) for name, (at, size) in places.items()}


def _read_at(path: Path, offset: int, size: int) -> bytes:
    if size > MEMBER_LIMIT_BYTES:
        raise OSError(f"a member of {path} is {size} byte, more than {MEMBER_LIMIT_BYTES}")
    with path.open("rb") as handle:
        handle.seek(offset)
        return handle.read(size)


def npz_arrays(path: Path, names: tuple[str, ...] = ("x", "y")) -> dict[str, np.ndarray]:
    """The named arrays of an .npz, memory-mapped: in place when stored uncompressed, else from an unpacked copy.

    Raises:
        DataError: not a readable .npz, or an array holds Python objects (a pickle).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {Path(i.filename).stem: i for i in archive.infolist() if i.filename.endswith(".npy")}
            return {name: _npz_array(path, archive, infos[name]) for name in names if name in infos}
    except DataError:
        raise
    except (*_UNREADABLE, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable .npz ({error}); write it again with numpy.savez") from error


def _npz_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        shape, fortran, dtype = _header(member)
        header_bytes = member.tell()
    if dtype.hasobject:
        raise DataError(f"{path}: {info.filename} is a pickle, which is never loaded; store plain numbers")
    if header_bytes + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} is cut off")
    if info.compress_type == zipfile.ZIP_STORED:
        place = _data_offset(path, info) + header_bytes
        return np.memmap(path, dtype, mode="r", offset=place, shape=shape, order="F" if fortran else "C")
    copy = files.cache_folder() / "npz" / files.sha256(path)[:24] / Path(info.filename).name
    if not copy.exists():
        with files.whole(copy) as temporary, archive.open(info) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return np.load(copy, mmap_mode="r", allow_pickle=False)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its local header, whose extra field may differ from the central one."""
    with path.open("rb") as handle:
        handle.seek(info.header_offset + 26)
        name_bytes = int.from_bytes(handle.read(2), "little")
        extra_bytes = int.from_bytes(handle.read(2), "little")
    return info.header_offset + 30 + name_bytes + extra_bytes
