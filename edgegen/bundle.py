"""The output folder of a run: written whole or not at all, checked before anything in it is used.

Reading and verifying need numpy and the runtime alone; only `load_model` needs torch. The function that runs an
artifact is handed in, so that this module knows no runtime.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import bundle_writing, files, serial
from edgegen.bundle_manifest import MANIFEST, check_name, parse
from edgegen.bundle_writing import Arrays, Contents, Golden, inside
from edgegen.errors import BundleError, EdgegenError, UsageError
from edgegen.types import Artifact, Bundle, Model, Preprocessing, Provenance, Stage, TensorSpec

__all__ = ["Contents", "Finding", "Golden", "Runner", "artifacts", "compare", "load_model", "read", "verify", "write"]

Runner = Callable[[Artifact, Arrays], Arrays]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a bundle. kind: "missing", "changed", "unexpected" or "golden"."""

    kind: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


def write(out: Path, contents: Contents) -> Bundle:
    """Write the bundle to the folder `out`, whole or not at all. An older bundle there is replaced.

    Raises:
        BundleError: `out` holds something that is not a bundle, or a file name is not allowed.
        ModelError: the compressed network cannot be told as a difference from its original.
    """
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise BundleError(f"{out} exists and is not a bundle; choose another folder")
    with files.whole(out) as folder:
        folder.mkdir()
        bundle_writing.fill(folder, contents)
    return read(out)


def read(path: Path) -> Bundle:
    """Open a bundle: parse and check its manifest, touch nothing else.

    Raises:
        BundleError: not a bundle, a damaged manifest, an unknown schema version, or a name that leaves the folder.
    """
    return Bundle(Path(path), parse(Path(path)))


def artifacts(bundle: Bundle) -> tuple[Artifact, ...]:
    """The bundle's artifacts with the paths they have here; the chosen one first."""
    return tuple(_placed(_from(Artifact, entry), bundle.path.absolute()) for entry in bundle.manifest["artifacts"])


def verify(path: Path, run: Runner | None = None) -> list[Finding]:
    """Everything that is wrong with a bundle; an empty list is a verified bundle.

    Args:
        run: (artifact, feeds stacked on the first axis) -> outputs stacked alike. None: hashes only. An artifact whose
            own files are not as the manifest says is not run.
    Raises:
        BundleError: as for `read`.
    """
    bundle = read(path)
    found = _check_files(bundle)
    if run is None:
        return found
    wrong = {finding.file for finding in found}
    cases = bundle.manifest["golden"]
    if not cases:
        found.append(Finding("golden", "golden/", "no golden inputs and outputs: nothing was run"))
    for case in cases:
        artifact = bundle.manifest["artifacts"][case["artifact"]]
        artifact = artifact["partial"] if case.get("partial") else artifact
        if not wrong & {case["file"], *artifact["files"]}:
            found += _check_golden(bundle, case, run)
    return found


def load_model(path: Path) -> Model:
    """The compressed model: its torch network rebuilt from the original architecture, architecture.json and weights.

    A model that came from a Python file runs the copy of it in model_code/. One that came as .onnx or .pt2 has no
    module, only its graph.

    Raises:
        BundleError: damaged or changed files. ModelError: the architecture cannot be made again here.
    """
    bundle = read(path)
    told = bundle.manifest["model"]
    origin = dict(told["origin"])
    torch_part = bundle.manifest["torch"]
    needed = {"model.onnx"} if torch_part is None else set(torch_part.values())
    if bad := [finding for finding in _check_files(bundle) if finding.file in needed]:
        raise BundleError(f"{path}: {bad[0]}; the bundle was changed or damaged after it was written")
    if origin.get("kind") == "file":
        origin["path"] = str(bundle.path.absolute() / check_name(origin["path"]))
    inputs, outputs = (tuple(_from(TensorSpec, spec) for spec in told[side]) for side in ("inputs", "outputs"))
    if torch_part is None:
        stage = Stage(told["stage"], None, inputs, outputs, bundle.path.absolute() / "model.onnx")
    else:
        stage = Stage(told["stage"], _rebuilt(bundle, origin), inputs, outputs)
    return Model(
        name=told["name"],
        task=told["task"],
        stages=(stage,),
        preprocessing=_from(Preprocessing, told["preprocessing"]),
        provenance=_from(Provenance, told["provenance"]),
        origin=origin,
        options=told["options"],
    )


def _rebuilt(bundle: Bundle, origin: Mapping[str, Any]) -> Any:
    from edgegen import architecture, origins, weights

    try:
        told = json.loads((bundle.path / "architecture.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{bundle.path / 'architecture.json'}: not JSON ({error})") from error
    module = architecture.rebuild(origins.create(origin).float(), told["description"]).eval()
    file = bundle.path / "weights.safetensors"
    weights.load_into(module, weights.read_state(file), str(file))
    if weights.state_hash(module) != told["state_sha256"]:
        raise BundleError(f"{bundle.path}: the rebuilt network does not have the state that was bundled")
    return module


def _check_files(bundle: Bundle) -> list[Finding]:
    found, listed = [], bundle.manifest["files"]
    for name, entry in listed.items():
        file = bundle.path / name
        if not file.is_file():
            found.append(Finding("missing", name, "is missing"))
        elif file.stat().st_size != entry["bytes"] or files.sha256(file) != entry["sha256"]:
            found.append(Finding("changed", name, "is not the file that was bundled (its hash differs)"))
    extra = [name for name in inside(bundle.path) if name not in listed and name != MANIFEST]
    return found + [Finding("unexpected", name, "is not in the manifest") for name in extra]


def _check_golden(bundle: Bundle, case: Mapping[str, Any], run: Runner) -> list[Finding]:
    file, whole = case["file"], artifacts(bundle)[case["artifact"]]
    artifact = whole.partial if case.get("partial") and whole.partial is not None else whole
    try:
        with np.load(bundle.path / file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        return [Finding("golden", file, f"cannot be read ({error})")]
    feeds = {name.removeprefix("input:"): value for name, value in arrays.items() if name.startswith("input:")}
    wanted = {name.removeprefix("output:"): value for name, value in arrays.items() if name.startswith("output:")}
    try:
        outputs = run(artifact, feeds)
    except EdgegenError as error:
        return [Finding("golden", file, f"{artifact.label} did not run: {error}")]
    texts = [compare(name, value, outputs.get(name), case["tolerance"]) for name, value in wanted.items()]
    return [Finding("golden", file, f"{artifact.label}: {text}") for text in texts if text]


def compare(name: str, expected: np.ndarray, got: np.ndarray | None, tolerance: float) -> str:
    """What is wrong with an output; empty when it lies within `tolerance` (absolute) everywhere."""
    if got is None:
        return f"gives no output {name!r}"
    if got.shape != expected.shape:
        return f"output {name!r} has shape {got.shape}, expected {expected.shape}"
    if not np.isfinite(got).all():
        return f"output {name!r} has NaN or infinity"
    worst = float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
    return "" if worst <= tolerance else f"output {name!r} differs by {worst:.4g}, allowed {tolerance:.4g}"


def _placed(artifact: Artifact, folder: Path) -> Artifact:
    placed = tuple(folder / file for file in artifact.files)
    partial = _placed(artifact.partial, folder) if artifact.partial is not None else None
    return dataclasses.replace(artifact, path=folder / artifact.path, files=placed, partial=partial)


def _from(kind: type[Any], data: Any) -> Any:
    try:
        return serial.from_json(kind, data)
    except UsageError as error:
        raise BundleError(f"{MANIFEST}: {error}") from error
