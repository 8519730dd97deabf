"""A minimal Android project for a LiteRT bundle: the model with its own pre- and post-processing, and a benchmark.

The files lie in `_kotlin/`; @NAMES@ in them are filled in here. `Pixels.kt`, `Facts.kt` and `Record.kt` need nothing of
Android and run on any JVM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from edgegen.types import Artifact, Preprocessing, TensorSpec

_FOLDER = Path(__file__).parent / "_kotlin"
_CODE = "app/src/main/java/edgegen/sample"
_PLACES = {
    "README.md": "README.md",
    "settings.gradle.kts": "settings.gradle.kts",
    "build.gradle.kts": "build.gradle.kts",
    "app/build.gradle.kts": "app.gradle.kts",
    "app/src/main/AndroidManifest.xml": "AndroidManifest.xml",
    **{f"{_CODE}/{name}": name for name in
       ("Facts.kt", "Pixels.kt", "Record.kt", "Generator.kt", "Benchmark.kt", "MainActivity.kt")},
}  # fmt: skip
_PROPERTIES = "android.useAndroidX=true\norg.gradle.jvmargs=-Xmx2g\n"


def files(
    artifact: Artifact,
    model_name: str,
    preprocessing: Preprocessing,
    task: str,
    value_range: tuple[float, float] | None,
) -> dict[str, str]:
    """File name -> text of the Android project.

    Args:
        artifact: a LiteRT artifact with one input and one output; its `options["layout"]` says how images lie.
        value_range: of the output image, or None (classes, or 0..1).
    """
    values = _facts(artifact, model_name, preprocessing, task, value_range)
    found = {}
    for name, source in _PLACES.items():
        xml = {"TITLE": escape(values["TITLE"], {'"': "&quot;"})} if name.endswith(".xml") else {}
        found[name] = _filled((_FOLDER / source).read_text(encoding="utf-8"), {**values, **xml})
    return {**found, "gradle.properties": _PROPERTIES}


def _filled(template: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        template = template.replace(f"@{name}@", value)
    return template


def _facts(
    artifact: Artifact, model_name: str, how: Preprocessing, task: str, value_range: tuple[float, float] | None
) -> dict[str, str]:
    """Kotlin literals of what the code needs to know about this model."""
    given, made = artifact.inputs[0], artifact.outputs[0]
    layout = artifact.options["layout"]
    channels, height, width = _image(given)
    out_channels, out_height, out_width = _image(made)
    pictures = given.value_range is not None and channels in (1, 3)
    low, high = value_range or (0.0, 1.0)
    crop = how.crop or (0, 0)
    gpu = artifact.options.get("gpu_delegate", {})
    refused = "; ".join(gpu.get("refused", ()))
    return {
        "TITLE": " ".join(model_name.split()).replace("*/", ""),
        "NAME": _text(model_name),
        "MODEL": _text(artifact.path.name),
        "MODEL_FILE": artifact.path.name,
        "KIND": _text("latent" if task == "unconditional" else "image" if pictures else "array"),
        "INPUT_SHAPE": _shape(given, layout[given.name]),
        "OUTPUT_SHAPE": _shape(made, layout[made.name]),
        "INPUT_LAST": _truth(layout[given.name] == "NHWC"),
        "OUTPUT_LAST": _truth(layout[made.name] == "NHWC"),
        "WIDTH": str(width),
        "HEIGHT": str(height),
        "CHANNELS": str(channels),
        "OUT_WIDTH": str(out_width),
        "OUT_HEIGHT": str(out_height),
        "OUT_CHANNELS": str(out_channels),
        "RESIZE": str(how.resize or 0),
        "CROP_HEIGHT": str(crop[0]),
        "CROP_WIDTH": str(crop[1]),
        "LOW_IN": _float(how.value_range[0]),
        "HIGH_IN": _float(how.value_range[1]),
        "MEAN": _channels(how.mean, 0.0, channels),
        "STD": _channels(how.std, 1.0, channels),
        "CLASSES": _truth(task == "classification"),
        "LOW_OUT": _float(low),
        "HIGH_OUT": _float(high),
        "THREADS": str(int(artifact.options["threads"])),
        "LAYOUT": "channels-last (NHWC)" if layout[given.name] == "NHWC" else "as the network has them (NCHW)",
        "GPU": f"Predicted, not measured: left to the CPU by the GPU delegate: {refused}." if refused else
               "Predicted, not measured: the GPU delegate takes every operation.",
    }  # fmt: skip


def _image(spec: TensorSpec) -> tuple[int, int, int]:
    """Channels, height, width; 1, 1, 1 for what is not an image."""
    sizes = [int(d) for d in spec.shape]
    return (sizes[1], sizes[2], sizes[3]) if len(sizes) == 4 else (1, 1, 1)


def _shape(spec: TensorSpec, layout: str) -> str:
    sizes = [int(d) for d in spec.shape]
    return ", ".join(str(d) for d in ([sizes[0], *sizes[2:], sizes[1]] if layout == "NHWC" else sizes))


def _text(value: str) -> str:
    """A Kotlin string literal: JSON's, with the sign that would start a template escaped."""
    return json.dumps(value).replace("$", "\\$")


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _float(value: float) -> str:
    return f"{float(value)!r}f"


def _channels(values: tuple[float, ...], default: float, channels: int) -> str:
    found = [float(v) for v in values] or [default]
    return ", ".join(_float(v) for v in (found * channels if len(found) == 1 else found))
