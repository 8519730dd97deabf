"""A minimal Swift package for a Core ML bundle: the model with its own pre- and post-processing, and a benchmark.

The Swift files lie in `_swift/`; @NAMES@ in them are filled in here.

The benchmark runs on a Mac (`swift run`) and, as an app playground that Xcode opens, on an iPhone or iPad; both write
the same JSON record: cold load, first run and every steady run, for each compute unit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edgegen.types import Artifact, Preprocessing

_FOLDER = Path(__file__).parent / "_swift"
_PLACES = {
    "README.md": "README.md",
    "Package.swift": "Package.swift",
    "Sources/Generator/Facts.swift": "Facts.swift",
    "Sources/Generator/Generator.swift": "Generator.swift",
    "Sources/Generator/Images.swift": "Images.swift",
    "Sources/Generator/Benchmark.swift": "Benchmark.swift",
    "Sources/edgegen-benchmark/main.swift": "main.swift",
    "BenchmarkApp.swiftpm/Package.swift": "AppPackage.swift",
    "BenchmarkApp.swiftpm/App.swift": "App.swift",
}
_OLDEST_MAC = {16: 13, 17: 14, 18: 15}


def files(
    artifact: Artifact,
    model_name: str,
    preprocessing: Preprocessing,
    task: str,
    value_range: tuple[float, float] | None,
) -> dict[str, str]:
    """File name -> text of the Swift project.

    Args:
        artifact: a Core ML artifact; its `options["input"]` says whether the package takes an image.
        value_range: of the output image, or None (classes).
    """
    values = {
        **_facts(artifact, preprocessing, task, value_range),
        **_systems(artifact),
        "TITLE": model_name,
        "NAME": json.dumps(model_name),
    }
    return {name: _filled((_FOLDER / source).read_text(encoding="utf-8"), values) for name, source in _PLACES.items()}


def _filled(template: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        template = template.replace(f"@{name}@", value)
    return template


def _systems(artifact: Artifact) -> dict[str, str]:
    number = int(str(artifact.options.get("minimum_os", "iOS 17")).split()[-1])
    return {"IOS": str(number), "MACOS": str(_OLDEST_MAC.get(number, number))}


def _facts(
    artifact: Artifact, how: Preprocessing, task: str, value_range: tuple[float, float] | None
) -> dict[str, str]:
    """Swift literals of what the code needs to know about this model."""
    given, made = artifact.inputs[0], artifact.outputs[0]
    is_image = "pixels" in artifact.options.get("input", {})
    kind = "image" if is_image else "pixels" if given.value_range is not None and len(given.shape) == 4 else "latent"
    channels = int(given.shape[1]) if len(given.shape) == 4 else 1
    low, high = value_range or (0.0, 1.0)
    crop = how.crop or ((int(given.shape[2]), int(given.shape[3])) if len(given.shape) == 4 else (0, 0))
    return {
        "INPUT": json.dumps(given.name),
        "OUTPUT": json.dumps(made.name),
        "KIND": f".{kind}",
        "SHAPE": json.dumps([int(d) for d in given.shape]),
        "RESIZE": str(how.resize or 0),
        "CROP": f"({crop[0]}, {crop[1]})",
        "LOW_IN": repr(float(how.value_range[0])),
        "HIGH_IN": repr(float(how.value_range[1])),
        "MEAN": json.dumps(_channels(how.mean, 0.0, channels)),
        "STD": json.dumps(_channels(how.std, 1.0, channels)),
        "CLASSES": "true" if task == "classification" else "false",
        "LOW_OUT": repr(float(low)),
        "HIGH_OUT": repr(float(high)),
    }


def _channels(values: tuple[float, ...], default: float, channels: int) -> list[float]:
    found = [float(v) for v in values] or [default]
    return found * channels if len(found) == 1 else found
