"""When, where and with what figures were made: what every file of results says beside them."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from edgegen.devices import local

# What changes latency or quality; those that are not installed are left out.
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "openvino", "nncf", "ai-edge-litert", "executorch", "ncnn",
            "coremltools", "torch-pruning", "optuna", "numpy")  # fmt: skip


def conditions(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """date (ISO), machine (processor), cores (that this process may use), system, python, versions (of packages)."""
    facts = local.probe()
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(), "machine": facts["cpu_model"] or "unknown", "cores": facts["cores"],
        "system": facts["os"], "python": facts["python"], "versions": versions,
    }  # fmt: skip
