"""Fill the folder of a bundle: artifacts, weights and architecture, golden data, texts, and last the manifest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edgegen import __version__, bundle_samples, bundle_text, files, samplers, serial
from edgegen.bundle_manifest import MANIFEST, PARTIAL, SCHEMA, check_name
from edgegen.errors import BundleError
from edgegen.types import Artifact, Graph, Model

REBUILT = ("builtin", "timm", "file")
"""Kinds of origin from which a network's architecture is made again; .pt2 and .onnx hold a graph alone."""
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Golden:
    """Inputs and the outputs that an artifact must give on them.

    feeds, outputs: name -> array whose first axis is the samples (no batch axis). tolerance: largest absolute
    difference. artifact: position in `Contents.artifacts`. partial: they are of its partial one.
    """

    feeds: Arrays
    outputs: Arrays
    tolerance: float
    artifact: int = 0
    partial: bool = False


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle.

    model: the compressed one; original: the unchanged one that it came from. artifacts: the chosen one first. recipe:
    text of recipe.toml. report, extra, licences: file name -> text, bytes, or a file to copy (a licence's name is
    below licences/). stamps: such as "not for accuracy". versions: of the tools, package -> version.
    """

    model: Model
    original: Model
    artifacts: tuple[Artifact, ...]
    graph: Graph
    target: str
    recipe: str
    golden: tuple[Golden, ...] = ()
    report: Mapping[str, str | bytes | Path] = field(default_factory=dict)
    licences: Mapping[str, str | bytes | Path] = field(default_factory=dict)
    extra: Mapping[str, str | bytes | Path] = field(default_factory=dict)
    stamps: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def fill(folder: Path, contents: Contents) -> None:
    """Write every file of a bundle into an empty folder.

    Raises:
        BundleError: a file name is not allowed or comes twice. ModelError: the network cannot be described.
    """
    shutil.copyfile(contents.graph.onnx, folder / "model.onnx")
    if contents.graph.partial is not None:
        shutil.copyfile(contents.graph.partial.onnx, folder / PARTIAL)
    artifacts = _copy_artifacts(folder, contents.artifacts)
    main, script = artifacts[0], bundle_samples.script_name(contents.target)
    own = {
        "recipe.toml": contents.recipe,
        script: bundle_samples.script(
            contents.model, main, main.path.as_posix(), contents.target, bundle_samples.further(artifacts)
        ),
    }
    loop = samplers.of(contents.model.options)
    copied: dict[str, str | bytes | Path] = {}
    if loop is not None:
        copied = {f"samplers/{name}": file for name, file in samplers.sources(loop).items()}
    for name, content in [*copied.items(), *own.items(), *contents.report.items(), *contents.extra.items()]:
        _put(folder, name, content)
    for name, content in {**bundle_text.licences(contents.model, artifacts), **contents.licences}.items():
        _put(folder, f"licences/{name}", content)
    origin = _write_torch(folder, contents)
    golden = [_write_golden(folder, number, case) for number, case in enumerate(contents.golden)]
    listed = [*inside(folder), "README.md", MANIFEST]
    told = (contents.model, artifacts, contents.target, contents.stamps, listed, _headline(folder))
    _put(folder, "README.md", bundle_text.readme(*told))
    manifest = _manifest(contents, artifacts, origin, golden)
    manifest["files"] = {
        name: {"sha256": files.sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in inside(folder)
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _headline(folder: Path) -> str:
    """The sentence of the report that lies there; empty without one."""
    file = folder / "report.json"
    return str(json.loads(file.read_text(encoding="utf-8")).get("headline", "")) if file.is_file() else ""


def _manifest(
    contents: Contents, placed: tuple[Artifact, ...], origin: Mapping[str, Any], golden: list[dict[str, Any]]
) -> dict[str, Any]:
    model, made = contents.model, contents.model.stage.outputs[0]
    images = {"kind": "image", "value_range": list(made.value_range or (0.0, 1.0)), "clip": True}
    classes = {"kind": "classes", "names": list(model.options.get("classes", []))}
    torch_files = {"weights": "weights.safetensors", "architecture": "architecture.json"}
    if origin.get("kind") == "file":
        torch_files["code"] = str(origin["path"])
    return serial.to_json({
        "schema": SCHEMA,
        "edgegen": __version__,
        "target": contents.target,
        "stamps": contents.stamps,
        "versions": contents.versions,
        "model": {
            "name": model.name,
            "task": model.task,
            "stage": model.stage.name,
            "origin": origin,
            "options": model.options,
            "preprocessing": model.preprocessing,
            "postprocessing": classes if model.task == "classification" else images,
            "provenance": model.provenance,
            "inputs": model.stage.inputs,
            "outputs": model.stage.outputs,
        },
        "graph": _graph(contents.graph),
        "artifacts": placed,
        "golden": golden,
        "torch": torch_files if model.stage.module is not None and origin.get("kind") in REBUILT else None,
    })  # fmt: skip


def _graph(graph: Graph) -> Graph:
    """The graph with the names of its files in the bundle."""
    between = graph.partial
    if between is not None:
        between = dataclasses.replace(between, onnx=Path(PARTIAL), program=None, samples=None)
    return dataclasses.replace(graph, onnx=Path("model.onnx"), partial=between)


def _copy_artifacts(folder: Path, built: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    """Copy each artifact's files; the artifacts with paths relative to the folder."""
    placed = []
    for artifact in built:
        base = f"model.{artifact.runtime}"
        made = _copy_artifact(folder, artifact, base)
        if artifact.partial is not None:
            made = dataclasses.replace(made, partial=_copy_artifact(folder, artifact.partial, f"{base}.partial"))
        placed.append(made)
    return tuple(placed)


def _copy_artifact(folder: Path, artifact: Artifact, base: str) -> Artifact:
    names = _artifact_names(artifact, base, taken={p.split("/")[0] for p in inside(folder)})
    for source, name in names.items():
        if source.is_file():
            _put(folder, name, source)
    listed = tuple(Path(name) for source, name in names.items() if source.is_file())
    return dataclasses.replace(artifact, path=Path(names[artifact.path]), files=listed)


def _artifact_names(artifact: Artifact, base: str, taken: set[str]) -> dict[Path, str]:
    """Source -> name in the bundle: <base>.<suffix>; a folder where files refer to each other by name.

    An artifact whose main path is a folder (.mlpackage) keeps what is below it as it is.
    """
    stem, home = artifact.path.stem, artifact.path.parent
    sources = dict.fromkeys((artifact.path, *artifact.files))
    same_stem = all(source.stem == stem and source.suffix and source.is_file() for source in sources)
    number, plain = 1, base
    while any(name == base or name.startswith(f"{base}.") for name in taken):
        number += 1
        base = f"{plain}-{number}"
    if same_stem and (len(sources) == 1 or artifact.path.suffix != ".onnx"):
        return {source: f"{base}{source.suffix}" for source in sources}
    return {source: f"{base}/{source.relative_to(home).as_posix()}" for source in sources}


def _write_torch(folder: Path, contents: Contents) -> dict[str, Any]:
    """weights.safetensors, architecture.json and the user's code, if there is a torch network; the origin to tell."""
    origin = dict(contents.original.origin)
    module = contents.model.stage.module
    if origin.get("kind") in ("pt2", "onnx"):
        origin["path"] = Path(origin["path"]).name
    if module is None or origin.get("kind") not in REBUILT:
        return origin
    from edgegen import architecture, origins, weights

    if origin["kind"] == "file":
        name = f"model_code/{Path(origin['path']).name}"
        _put(folder, name, Path(origin["path"]))
        if files.sha256(folder / name) != origin["sha256"]:
            raise BundleError(f"{origin['path']} has changed since the model was loaded from it; run again")
        origin["path"] = name
    # Not `original.stage.module`: a model that was loaded from a bundle is itself a variant of its architecture.
    description = architecture.describe(module, origins.create(contents.original.origin))
    told = {"description": description, "state_sha256": weights.state_hash(module)}
    _put(folder, "architecture.json", json.dumps(told, indent=1, sort_keys=True) + "\n")
    weights.save_state(module, folder / "weights.safetensors")
    return origin


def _write_golden(folder: Path, number: int, case: Golden) -> dict[str, Any]:
    name = f"golden/{number:03d}.npz"
    (folder / "golden").mkdir(exist_ok=True)
    arrays = {f"input:{key}": value for key, value in case.feeds.items()}
    arrays |= {f"output:{key}": value for key, value in case.outputs.items()}
    np.savez_compressed(folder / name, allow_pickle=False, **arrays)
    told = {"file": name, "artifact": case.artifact, "tolerance": float(case.tolerance)}
    return {**told, "partial": True} if case.partial else told


def _put(folder: Path, name: str, content: str | bytes | Path) -> None:
    """Write one file of the bundle under a checked name that is not taken."""
    target = folder / check_name(name)
    if target.exists() or PurePosixPath(name).name == MANIFEST:
        raise BundleError(f"the bundle has two files {name!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, target)
    else:
        target.write_bytes(content.encode() if isinstance(content, str) else content)


def inside(folder: Path) -> list[str]:
    """The files below a folder, relative, sorted; links too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink())
