"""Files that appear whole or not at all, hashes, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(file: Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def key(*parts: Any) -> str:
    """Stable 24-digit hex key over JSON-like values; the same values give the same key on every machine."""
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


# Folders that edgegen makes in the cache folder.
CACHED = (
    "runs", "steps", "features", "checkpoints", "scan", "tar", "npz", "probes", "operators", "modules", "faults",
    "search", "device",
)  # fmt: skip


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place on success, remove it on any error.

    Works for a file and for a folder. An existing folder at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = holder / path.name
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            os.rename(path, holder / ".old")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, sorted and indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def cache_folder() -> Path:
    """Where finished steps are kept: $EDGEGEN_CACHE, else $XDG_CACHE_HOME/edgegen, else ~/.cache/edgegen."""
    if chosen := os.environ.get("EDGEGEN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgegen"


def tree_size(path: Path) -> tuple[int, int]:
    """(number of files, bytes) below a folder; (0, 0) when it does not exist."""
    sizes = [p.stat().st_size for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
    return len(sizes), sum(sizes)
