"""The files of a Core ML artifact: the package, its ONNX twin, and the hash that ties one to the other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx

from edgegen import errors, files

PACKAGE, TWIN_FILE = "model.mlpackage", "twin.onnx"
DIGEST = "edgegen.package"  # key of the twin's metadata that holds the hash of the package it was made from


def digest(package: Path) -> str:
    """Hash over every file of a package with its name."""
    total = hashlib.sha256()
    for file in sorted(p for p in package.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(package).as_posix()}\n{files.sha256(file)}\n".encode())
    return total.hexdigest()


def digest_of(file: Path) -> str:
    """The hash of the package that a twin was made from; empty when it holds none.

    Raises:
        errors.RuntimeFailed: not a readable ONNX file.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(file)
    except (OSError, DecodeError) as error:
        raise errors.RuntimeFailed(f"{file.name}: not a readable ONNX file ({error})") from error
    return next((entry.value for entry in model.metadata_props if entry.key == DIGEST), "")
