"""Runs in a peer's own environment: python inside.py JOB.json. Calls `compress` of the peer's file and writes what it
gave. Standard library and numpy alone, so that it runs in every environment."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """The network as a peer may take it. folder: what cases.prepare made; told: its case.json."""

    folder: Path
    told: Mapping[str, Any]

    @property
    def onnx(self) -> Path:
        """Float32, static shapes."""
        return self.folder / "model.onnx"

    @property
    def inputs(self) -> list[str]:
        """Names of the ONNX file's inputs; a denoiser has two, the sample and the time."""
        return list(self.told["inputs"])

    def samples(self, calibration: Path) -> list[dict[str, Any]]:
        """The calibration samples: input name -> array of batch 1."""
        import numpy as np

        with np.load(calibration) as file:
            arrays = {name: file[name] for name in self.inputs}
        return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(len(arrays[self.inputs[0]]))]

    def module(self) -> Any:
        """The trained torch module in eval mode."""
        import torch

        spec = self.told["model"]
        if spec.startswith("timm:"):
            made = importlib.import_module("timm").create_model(spec.removeprefix("timm:"), pretrained=False)
        elif ".py:" in spec:
            path, factory = spec.rsplit(":", 1)
            made = getattr(_imported(Path(path)), factory)()
        else:
            made = importlib.import_module(f"edgegen.models.{spec}").create()
        made.load_state_dict(torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True))
        return made.eval()


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}_{path.parent.name}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look themselves up
    spec.loader.exec_module(module)
    return module


def versions() -> dict[str, str]:
    """Every distribution of this environment."""
    return {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}


def main() -> None:
    """One cell: load the peer, compress, tell."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Nothing is sent anywhere: openvino-telemetry obeys CI, Olive its own switch, Hugging Face its own.
    os.environ.update({"CI": "true", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"})
    folder, out = Path(job["folder"]), Path(job["out"])
    source = Source(folder, json.loads((folder / "case.json").read_text(encoding="utf-8")))
    peer = _imported(Path(job["peer"]))
    started = time.monotonic()
    made = peer.compress(source, folder / "calibration-inputs.npz", out, job["options"])
    seconds = time.monotonic() - started
    told = {**made, "path": str(made["path"]), "seconds_inside": seconds, "versions": versions()}
    Path(job["result"]).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
