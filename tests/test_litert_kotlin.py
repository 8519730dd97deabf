"""The Android sample: complete, parsed as Kotlin, and, where a Kotlin compiler is, compiled and run on this machine.

A compiler comes by `npm install kotlin-compiler` (it needs Java); `kotlinc` on the path, or EDGEGEN_KOTLINC, is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from edgegen import images
from edgegen.runtimes import _litert_kotlin
from edgegen.types import Artifact, PrecisionPlan, Preprocessing, TensorSpec

KOTLINC = os.environ.get("EDGEGEN_KOTLINC") or shutil.which("kotlinc")
compiled = pytest.mark.skipif(
    not (KOTLINC and shutil.which("java")), reason="no kotlinc and java here: npm install kotlin-compiler"
)
HOW = Preprocessing((-1.0, 1.0), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), resize=20, crop=(16, 16))
SHAPES = {"classification": (1, 10), "image-to-image": (1, 3, 16, 16)}


def artifact(task: str = "image-to-image", layout: str = "NHWC") -> Artifact:
    out = TensorSpec("output", SHAPES[task], value_range=None if task == "classification" else (-1.0, 1.0))
    given = TensorSpec("input", (1, 3, 16, 16), value_range=(-1.0, 1.0))
    options = {
        "threads": 2,
        "layout": {"input": layout, "output": layout if len(out.shape) == 4 else ""},
        "gpu_delegate": {"eligible": False, "refused": ["ROUND: no such operation on the GPU"]},
    }
    path = Path("model.tflite")
    return Artifact("litert", path, (path,), PrecisionPlan(), 1, (given,), (out,), options)


def project(task: str = "image-to-image", name: str = 'a "net" for $5', layout: str = "NHWC") -> dict[str, str]:
    return _litert_kotlin.files(artifact(task, layout), name, HOW, task, (-1.0, 1.0))


def test_every_place_is_filled_and_the_manifest_is_xml() -> None:
    found = project(name='a <b> & "c"')
    assert {"settings.gradle.kts", "app/build.gradle.kts", "app/src/main/AndroidManifest.xml"} < set(found)
    assert not [name for name, text in found.items() if re.search(r"@[A-Z_]+@", text)]
    label = ElementTree.fromstring(found["app/src/main/AndroidManifest.xml"])[0].attrib
    assert label["{http://schemas.android.com/apk/res/android}label"] == 'a <b> & "c"'
    assert "ROUND: no such operation on the GPU" in found["README.md"]


def test_facts_are_the_models() -> None:
    facts = project()["app/src/main/java/edgegen/sample/Facts.kt"]
    assert 'const val NAME = "a \\"net\\" for \\$5"' in facts
    assert "val INPUT_SHAPE = intArrayOf(1, 16, 16, 3)" in facts
    assert "val MEAN = floatArrayOf(0.1f, 0.2f, 0.3f)" in facts
    assert "const val INPUT_CHANNELS_LAST = true" in facts
    assert "intArrayOf(1, 3, 16, 16)" in project(layout="")["app/src/main/java/edgegen/sample/Facts.kt"]
    assert "const val GIVES_CLASSES = true" in project("classification")["app/src/main/java/edgegen/sample/Facts.kt"]


def broken(text: str) -> bool:
    """Whether a Kotlin parser finds an error in it."""
    why = "no Kotlin parser here: pip install tree-sitter tree-sitter-kotlin"
    tree_sitter = pytest.importorskip("tree_sitter", reason=why)
    kotlin = pytest.importorskip("tree_sitter_kotlin", reason=why)
    parser = tree_sitter.Parser(tree_sitter.Language(kotlin.language()))
    return bool(parser.parse(text.encode()).root_node.has_error)


def test_kotlin_parses() -> None:
    assert broken("class { fun (")
    assert [name for name, text in project().items() if name.endswith((".kt", ".kts")) and broken(text)] == []


# What the sample uses of Android and LiteRT, so that a compiler can check its types without their libraries.
STUBS = {
    "Content": """package android.content
        import android.content.res.AssetManager
        open class Context {
            val assets = AssetManager()
            val filesDir = java.io.File(".")
            fun getExternalFilesDir(kind: String?): java.io.File? = null
            fun getSystemService(name: String): Any = name
            companion object { const val POWER_SERVICE = "power" }
        }""",
    "Resources": """package android.content.res
        class AssetFileDescriptor : java.io.Closeable {
            val fileDescriptor = java.io.FileDescriptor()
            val startOffset = 0L
            val declaredLength = 0L
            override fun close() {}
        }
        class AssetManager { fun openFd(name: String) = AssetFileDescriptor() }""",
    "Graphics": """package android.graphics
        class Bitmap(val width: Int, val height: Int) {
            enum class Config { ARGB_8888 }
            fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int) {}
            companion object {
                fun createBitmap(pixels: IntArray, width: Int, height: Int, config: Config) = Bitmap(width, height)
            }
        }""",
    "Os": """package android.os
        class Bundle
        class PowerManager { val currentThermalStatus = 0 }
        object Build {
            const val MANUFACTURER = ""
            const val MODEL = ""
            const val HARDWARE = ""
            object VERSION {
                const val RELEASE = ""
                const val SDK_INT = 35
            }
        }""",
    "App": """package android.app
        open class Activity : android.content.Context() {
            open fun onCreate(savedInstanceState: android.os.Bundle?) {}
            fun setContentView(view: android.widget.TextView) {}
            fun runOnUiThread(action: () -> Unit) = action()
        }""",
    "Widget": """package android.widget
        class TextView(context: android.content.Context) { var text: CharSequence = "" }""",
    "Lite": """package org.tensorflow.lite
        interface Delegate : java.io.Closeable
        class Interpreter(model: java.nio.ByteBuffer, options: Options) : AutoCloseable {
            class Options {
                fun setNumThreads(count: Int): Options = this
                fun setUseXNNPACK(use: Boolean): Options = this
                fun addDelegate(delegate: Delegate): Options = this
            }
            fun run(input: Any, output: Any) {}
            override fun close() {}
        }""",
    "Gpu": """package org.tensorflow.lite.gpu
        class GpuDelegate : org.tensorflow.lite.Delegate { override fun close() {} }""",
}
CHECK = """package edgegen.sample
import java.io.File
fun main(given: Array<String>) {
    val numbers = File(given[0]).readText().trim().split(" ").map { it.toInt() }
    val picture = Picture(numbers[0], numbers[1], numbers.drop(2).toIntArray())
    println(Pixels.input(picture).joinToString(" "))
    val values = File(given[1]).readText().trim().split(" ").map { it.toFloat() }.toFloatArray()
    println(Pixels.picture(values).pixels.joinToString(" "))
    println(Pixels.latent(3).joinToString(" "))
    println(Pixels.best(floatArrayOf(0f, 3f, 1f), 2))
    val one = DelegateRecord("GPU", 1.5, 2.0, listOf(0.5, 0.25), "no \\"GPU\\"\\n")
    print(Record("a", "b", "c", listOf(one)).json())
}
"""


def compile_all(sources: dict[str, str], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in sources.items():
        (folder / f"{name}.kt").write_text(text, encoding="utf-8")
    jar = folder / "out.jar"
    command = [str(KOTLINC), *map(str, sorted(folder.glob("*.kt"))), "-include-runtime", "-nowarn", "-d", str(jar)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return jar


@pytest.fixture(scope="module")
def jar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole sample with what it needs of Android stubbed, and a main function."""
    sources = {Path(name).stem: text for name, text in project().items() if name.endswith(".kt")}
    return compile_all({**sources, **STUBS, "Check": CHECK}, tmp_path_factory.mktemp("kotlin"))


@compiled
@pytest.mark.slow
def test_pixels_are_those_of_edgegen(jar: Path, tmp_path: Path) -> None:
    """Pre-processing within one grey level of edgegen's (rounding between the two passes of the resize)."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = images.resize(small, 37, 29)
    packed = (np.int64(255) << 24) | (image.astype(np.int64) @ np.array([65536, 256, 1]))
    signed = packed.astype(np.uint32).view(np.int32).reshape(-1)
    (tmp_path / "in.txt").write_text(f"29 37 {' '.join(map(str, signed))}")
    values = random.uniform(-1.3, 1.3, (16, 16, 3)).astype(np.float32)
    (tmp_path / "out.txt").write_text(" ".join(f"{v:.9g}" for v in values.reshape(-1)))
    command = ["java", "-cp", str(jar), "edgegen.sample.CheckKt", str(tmp_path / "in.txt"), str(tmp_path / "out.txt")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    first, second, third, fourth, record = told.split("\n", 4)
    got = np.array(first.split(), dtype=np.float32).reshape(16, 16, 3)
    wanted = images.network_input(images.view(image, HOW, 16, 16), HOW)
    wanted = wanted.reshape(3, 16, 16).transpose(1, 2, 0)
    level = 2 / 255 / np.array(HOW.std)
    assert (np.abs(got - wanted) <= 1.01 * level).all()
    assert (np.abs(got - wanted) <= 1e-5).mean() > 0.95
    pixels = np.array(second.split(), dtype=np.int64).reshape(16, 16)
    drawn = np.stack([(pixels >> shift) & 255 for shift in (16, 8, 0)], axis=-1)
    assert np.array_equal(drawn, np.rint(np.clip((values + 1) / 2, 0, 1) * np.float32(255)).astype(int))
    noise = np.array(third.split(), dtype=np.float64)
    assert noise.shape == (768,)
    assert abs(noise.mean()) < 0.15
    assert 0.85 < noise.std() < 1.15
    assert fourth == "[(1, 3.0), (2, 1.0)]"
    (one,) = json.loads(record)["delegates"]
    times = {"load_ms": 1.5, "first_ms": 2.0, "samples_ms": [0.5, 0.25]}
    assert one == {"delegate": "GPU", **times, "failed": 'no "GPU"\n'}
