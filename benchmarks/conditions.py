"""When, where and with what figures were made: what every file of results says beside them; and how it is written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgegen import files
from edgegen.devices import local

_NUMBERS = re.compile(r"\[\s*(-?\d[^\s,\]]*(?:,\s*-?\d[^\s,\]]*)*)\s*\]")

# What changes latency or quality; those that are not installed are left out.
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "openvino", "nncf", "ai-edge-litert", "executorch", "ncnn",
            "coremltools", "torch-pruning", "optuna", "numpy")  # fmt: skip


def conditions(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """date (ISO), machine (processor), instructions, cores (that this process may use), system, python, versions."""
    facts = local.probe()
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(), "machine": facts["cpu_model"] or "unknown",
        "instructions": facts.get("instructions", "unknown"), "cores": facts["cores"],
        "system": facts["os"], "python": facts["python"], "versions": versions,
    }  # fmt: skip


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole, lists of numbers on one line: raw samples would make it hundreds of thousands of lines."""
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(value, indent=1, sort_keys=True))
    files.write_text(file, text + "\n")
