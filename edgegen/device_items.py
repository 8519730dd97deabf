"""What a device measures: one artifact of one bundle, the files it needs there, and what its record says of it.

What stays the same however it is measured, by the runner or by a vendor's tool (see `on_device`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import __version__, bundle, errors, files, serial
from edgegen.device_records import Built, Network, Provenance
from edgegen.types import Artifact, Bundle

COREML_UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
_TWIN = "twin.onnx"


@dataclass(frozen=True)
class Item:
    """One artifact of one bundle, in one variant."""

    bundle: Bundle
    artifact: Artifact
    golden: dict[str, Any] | None

    @property
    def needed(self) -> list[Path]:
        """Files of the artifact without the twin, which stands in for it where the device is not."""
        return [file for file in self.artifact.files if file.name != _TWIN]

    @property
    def sources(self) -> dict[str, Path]:
        """Name in the bundle -> file, of all that the device needs."""
        wanted = [*self.needed, *([self.bundle.path.absolute() / self.golden["file"]] if self.golden else [])]
        return {file.relative_to(self.bundle.path.absolute()).as_posix(): file for file in wanted}

    @property
    def folder(self) -> str:
        """Where its files lie on the device: the same files, the same folder."""
        listed = self.bundle.manifest["files"]
        return f"bundles/{files.key({name: listed[name]['sha256'] for name in self.sources})}"

    def told(self) -> dict[str, Any]:
        """What the runner wants to know; its run folder lies two levels below."""
        artifact, home = self.artifact, self.bundle.path.absolute()
        listed = [file.relative_to(home).as_posix() for file in self.needed]
        return serial.to_json({
            "runtime": artifact.runtime, "label": artifact.label, "folder": f"../../{self.folder}",
            "file": artifact.path.relative_to(home).as_posix(), "files": listed, "inputs": artifact.inputs,
            "outputs": artifact.outputs, "options": artifact.options, "golden": self.golden,
        })  # fmt: skip

    def known(self, common: dict[str, Any], tool: str, tool_hash: str = "") -> dict[str, Any]:
        """The fields of a record that are known before anything runs."""
        artifact, manifest = self.artifact, self.bundle.manifest
        manifest_file = self.bundle.path / "manifest.json"
        model, graph, digest = manifest["model"], manifest["graph"], self.folder.rpartition("/")[2]
        return {
            "provenance": Provenance(
                edgegen=__version__,
                made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                tool=tool,
                tool_sha256=tool_hash,
                bundle_sha256=files.sha256(manifest_file) if manifest_file.is_file() else digest,
            ),
            "network": Network(
                name=model["name"],
                task=model["task"],
                weights_sha256=str(model["provenance"].get("weights_sha256", "")),
                graph_sha256=str(graph.get("sha256", "")),
                macs=int(graph.get("macs", 0)),
                params=int(graph.get("params", 0)),
            ),
            "target": manifest["target"],
            "artifact": Built(
                runtime=artifact.runtime,
                precision=artifact.plan.label,
                sha256=digest,
                size_bytes=artifact.size_bytes,
                inputs=serial.to_json(artifact.inputs),
                options=serial.to_json(artifact.options),
                versions=dict(artifact.versions),
            ),
            **common,
        }


def in_bundles(paths: Sequence[Path]) -> Iterator[Item]:
    """Every artifact of the bundles, one each (Core ML: one for each compute unit).

    Raises:
        BundleError: a file of a bundle is missing or was changed.
    """
    for path in paths:
        opened = bundle.read(path)
        if wrong := [found for found in bundle.verify(path) if found.kind in ("missing", "changed")]:
            raise errors.BundleError(f"{path}: {wrong[0]}; nothing of it is measured")
        cases = {case["artifact"]: case for case in opened.manifest["golden"]}
        for number, artifact in enumerate(bundle.artifacts(opened)):
            case = cases.get(number)
            golden = {"file": case["file"], "tolerance": case["tolerance"]} if case else None
            for unit in COREML_UNITS if artifact.runtime == "coreml" else ("",):
                more = {"compute_unit": unit} if unit else {}
                yield Item(opened, dataclasses.replace(artifact, options={**artifact.options, **more}), golden)


def unbundled(artifact: Artifact, target: str) -> Item:
    """An artifact that is in no bundle yet; its folder is told as a bundle is."""
    home = artifact.path.absolute().parent
    listed = {file.absolute().relative_to(home).as_posix(): {"sha256": files.sha256(file)} for file in artifact.files}
    model = {"name": "candidate", "task": "", "provenance": {}}
    manifest = {"files": listed, "model": model, "graph": {}, "target": target}
    return Item(Bundle(home, manifest), artifact, None)
