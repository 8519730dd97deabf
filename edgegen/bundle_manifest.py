"""manifest.json: its schema, and the check that no name in it leaves the bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgegen.errors import BundleError

SCHEMA = 1
MANIFEST = "manifest.json"
PARTIAL = "model.partial.onnx"  # the graph of the steps between, where blocks are cached
_MAX_BYTES = 64 * 2**20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _File(_Strict):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class _Golden(_Strict):
    file: str
    artifact: Annotated[int, Field(ge=0)]
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    partial: bool = False


class _Artifact(BaseModel):
    """The parts that name files; the whole is read by `serial`."""

    path: str
    files: list[str]
    partial: _Artifact | None = None


class _Model(BaseModel):
    name: str
    task: str
    stage: str
    origin: dict[str, Any]
    options: dict[str, Any]
    preprocessing: dict[str, Any]
    provenance: dict[str, Any]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


class _Manifest(_Strict):
    schema_: Annotated[int, Field(alias="schema")]
    edgegen: str
    target: str
    stamps: list[str]
    versions: dict[str, str]
    model: _Model
    graph: dict[str, Any]
    artifacts: Annotated[list[_Artifact], Field(min_length=1)]
    golden: list[_Golden]
    torch: dict[str, str] | None
    files: dict[str, _File]


def parse(folder: Path) -> dict[str, Any]:
    """The checked manifest of a bundle.

    Raises:
        BundleError: no bundle, damaged, an unknown schema version, or a name that leaves the folder.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
    if file.stat().st_size > _MAX_BYTES:
        raise BundleError(f"{file}: larger than {_MAX_BYTES >> 20} MiB; not a manifest of edgegen")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{file}: not readable JSON ({str(error)[:120]})") from error
    version = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{file}: not a manifest of edgegen (it has no schema version)")
    if version != SCHEMA:
        raise BundleError(f"{file}: has schema version {version}, this edgegen knows {SCHEMA}; use the matching one")
    try:
        checked = _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for name in _names(checked):
        _check_inside(folder, name)
    if unknown := [name for name in _used(checked) if name not in checked.files]:
        raise BundleError(f"{file}: names {unknown[0]!r}, which is not among its files")
    if bad := [case for case in checked.golden if case.artifact >= len(checked.artifacts)]:
        raise BundleError(f"{file}: {bad[0].file} belongs to artifact {bad[0].artifact}, which does not exist")
    if bad := [case for case in checked.golden if case.partial and checked.artifacts[case.artifact].partial is None]:
        raise BundleError(f"{file}: {bad[0].file} belongs to a partial artifact, which does not exist")
    return manifest


def check_name(name: str) -> str:
    """A relative name with forward slashes that stays inside its folder.

    Raises:
        BundleError: absolute, empty, with `..`, a backslash, a drive, or a control character.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c in "\\:" for c in name)
    if bad or PurePosixPath(name).is_absolute():
        raise BundleError(f"file name {name[:80]!r} leaves the bundle or is not portable; refused")
    return name


def _check_inside(folder: Path, name: str) -> None:
    """Refuse a name that leads out of the bundle, through links too."""
    file = folder / check_name(name)
    if not file.resolve().is_relative_to(folder.resolve()) or file.is_symlink():
        raise BundleError(f"{file} is a link or leads out of the bundle; refused")


def _used(manifest: _Manifest) -> Iterator[str]:
    for artifact in _all(manifest):
        below = f"{artifact.path}/"  # the main path may be a folder of its files: model.mlpackage
        if not any(name.startswith(below) for name in artifact.files):
            yield artifact.path
        yield from artifact.files
    yield from (case.file for case in manifest.golden)
    yield from (manifest.torch or {}).values()
    yield "model.onnx"
    if manifest.artifacts[0].partial is not None:
        yield PARTIAL
    if manifest.torch and manifest.model.origin.get("kind") == "file":
        yield str(manifest.model.origin.get("path"))


def _all(manifest: _Manifest) -> Iterator[_Artifact]:
    """Every artifact, the partial ones too; one of these has none of its own."""
    for artifact in manifest.artifacts:
        yield artifact
        if artifact.partial is not None:
            yield artifact.partial


def _names(manifest: _Manifest) -> Iterator[str]:
    yield from manifest.files
    yield from (artifact.path for artifact in _all(manifest))
    yield from _used(manifest)
