"""What can be done with a finished bundle: verify it, reproduce it, run it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgegen import bundle, bundle_samples, measuring, recipe, serial
from edgegen.errors import BundleError, RuntimeFailed
from edgegen.request import Request
from edgegen.types import Artifact

if TYPE_CHECKING:
    from edgegen.judgement import Progress


def run_artifact(artifact: Artifact, feeds: Any) -> dict[str, np.ndarray]:
    """Outputs of an artifact on stacked feeds, in a worker process."""
    with measuring.Worker(artifact) as worker:
        return worker.run_many(feeds)


def verify(path: Path) -> list[bundle.Finding]:
    """Everything wrong with a bundle: files by hash, golden outputs in its runtime.

    Raises:
        BundleError: not a bundle.
    """
    return bundle.verify(path, run_artifact)


def reproduce(path: Path, out: Path, progress: Progress) -> list[str]:
    """Run the bundle's own request again, with nothing from the cache; what differs, in words.

    Raises:
        BundleError: not a bundle, or it does not hold its request. UsageError: its model or data are gone.
    """
    from edgegen import pipeline  # needs torch; verify and run_sample do not

    old = bundle.read(path)
    file = path / "request.json"
    if not file.is_file():
        raise BundleError(f"{path}: holds no request.json, so it cannot be run again")
    request = serial.from_json(Request, json.loads(file.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="edgegen-reproduce-") as scratch:
        text = Path(scratch) / "recipe.toml"
        text.write_text((path / "recipe.toml").read_text(encoding="utf-8"), encoding="utf-8")
        recipe.load(str(text))
        again = dataclasses.replace(request, out=out, recipe=str(text), resume=False)
        kept = os.environ.get("EDGEGEN_CACHE")
        os.environ["EDGEGEN_CACHE"] = str(Path(scratch) / "cache")
        try:
            new = pipeline.compress(again, progress)
        finally:
            os.environ.pop("EDGEGEN_CACHE")
            if kept is not None:
                os.environ["EDGEGEN_CACHE"] = kept
    return differences(old.path, new.path)


def differences(old: Path, new: Path) -> list[str]:
    """How two bundles of one request differ in recipe, weights and graph; empty when they do not."""
    found = []
    for name in ("recipe.toml", "weights.safetensors", "architecture.json", "model.onnx"):
        entries = [bundle.read(path).manifest["files"].get(name) for path in (old, new)]
        if entries[0] != entries[1]:
            found.append(f"{name} differs between {old} and {new}")
    chosen = [bundle.artifacts(bundle.read(path))[0].label for path in (old, new)]
    if chosen[0] != chosen[1]:
        found.append(f"another build was the fastest: {chosen[0]} then, {chosen[1]} now")
    return found


def run_sample(path: Path, source: Path | None, out: Path, seed: int) -> str:
    """Run the bundle's own sample script; what it printed, and where the output is.

    Raises:
        BundleError: not a bundle. RuntimeFailed: the script failed; its last line.
    """
    opened = bundle.read(path)
    script = path / bundle_samples.script_name(str(opened.manifest["target"]))
    arguments = ["--seed", str(seed)] if opened.manifest["model"]["task"] == "unconditional" else []
    if source is not None:
        arguments.append(str(source))
    command = [sys.executable, str(script), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeFailed(f"{script}: {last}")
    return done.stdout.strip() or str(out)
