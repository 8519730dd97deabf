"""Several fixed input sizes in one bundle: what is refused before any work, what the sample picks, a whole run."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch", reason="resizing a network needs the extra `torch`")
pytest.importorskip("onnxruntime", reason="these bundles are for ONNX Runtime")

import torch
import user_network
from PIL import Image
from torch import nn

from edgegen import bundle, bundle_samples, checking, cli, files, loading, resizing, resolutions
from edgegen.candidates import Candidate
from edgegen.errors import ModelError, RecipeError, RuntimeFailed
from edgegen.report import resolutions as table
from edgegen.report import schema, terminal
from edgegen.request import parse_resolutions
from edgegen.types import Artifact, Graph, Measurement, Model, PrecisionPlan, Preprocessing, Stage, TensorSpec


def network(module: Any, side: int = 8, task: str = "image-to-image", **fields: Any) -> Model:
    """A model of side x side images around a module that keeps their size."""
    ends = (TensorSpec("input", (1, 3, side, side), value_range=(0, 1)),), (TensorSpec("output", (1, 3, side, side)),)
    return Model("net", task, (Stage("model", module.eval(), *ends),), **fields)


def strided(stride: int) -> nn.Module:
    """Down by a stride, back up by a pixel shuffle, and added to its input: takes multiples of the stride alone."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 3 * stride * stride, stride, stride=stride)
            self.up = nn.PixelShuffle(stride)

        def forward(self, x: Any) -> Any:
            return x + self.up(self.down(x))

    return Net()


class Placed(nn.Module):
    """Adds a value to every pixel of an 8x8 image: takes that size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 8, 8))

    def forward(self, x: Any) -> Any:
        return x + self.position


def test_sizes_are_height_then_width_once_each() -> None:
    assert parse_resolutions(["256x256", " 384X640 ", "256x256"]) == ((256, 256), (384, 640))
    for bad in ("256", "0x8", "axb", "8x", "8x8x8", "8.5x8", "-8x8"):
        with pytest.raises(RecipeError, match=f"--resolution must be HEIGHTxWIDTH.*got '{bad}'"):
            parse_resolutions([bad])


def test_a_network_for_another_size_has_its_shapes_and_no_resize_of_its_own() -> None:
    model = network(strided(4), preprocessing=Preprocessing(resize=9, crop=(8, 8)))
    made = resizing.at(model, (12, 20))
    assert (made.stage.inputs[0].shape, made.stage.outputs[0].shape) == ((1, 3, 12, 20), (1, 3, 12, 20))
    assert (made.preprocessing.resize, made.preprocessing.crop) == (None, None)
    assert made.stage.module is model.stage.module and model.stage.inputs[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("stride", "size", "said"),
    [
        (4, (10, 12), "height and width must be multiples of 4; the next size is 12x12"),
        (4, (63, 66), "multiples of 4; the next size is 64x68"),  # 64x66 would do for a stride of 2
        (3, (16, 16), "multiples of 3; the next size is 18x18"),
        (14, (64, 64), "multiples of 14; the next size is 70x70"),
    ],
)
def test_a_size_that_a_stride_does_not_divide_is_refused_with_the_multiple(
    stride: int, size: tuple[int, int], said: str
) -> None:
    with pytest.raises(ModelError, match=f"net does not take {size[0]}x{size[1]}: .*{said}"):
        resizing.at(network(strided(stride), 2 * stride), size)


def test_a_network_of_one_size_is_refused_with_that_size() -> None:
    with pytest.raises(ModelError, match="only 8x8 is known to work"):
        resizing.at(network(Placed()), (16, 16))
    with pytest.raises(ModelError, match="it gives 8x8 there, of 8x8 it makes 8x8"):
        resizing.at(network(nn.AdaptiveAvgPool2d(8)), (16, 16))


def test_classifiers_and_generators_from_latents_are_refused() -> None:
    with pytest.raises(ModelError, match=r"is for super-resolution, .*net is for classification; its resize and crop"):
        resizing.at(network(nn.Identity(), task="classification"), (16, 16))
    with pytest.raises(ModelError, match="net is for unconditional; a latent has no height"):
        resizing.at(network(nn.Identity(), task="unconditional"), (16, 16))


def written(file: Path, sides: list[Any], kind: str = "Relu") -> Path:
    """An ONNX file of one operation on (1, 3, *sides)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, *sides]) for n in ("input", "output")]
    graph = helper.make_graph([helper.make_node(kind, ["input"], ["output"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    return file


def test_a_file_with_free_sides_takes_the_sizes_and_a_fixed_one_does_not(tmp_path: Path) -> None:
    image = {"task": "image-to-image", "value_range": (0, 1), "output_range": (0, 1), "mean": (), "std": ()}
    free = str(written(tmp_path / "free.onnx", ["h", "w"]))
    options = resizing.options_for(free, image, (6, 10))
    assert options["input_shape"] == (1, 3, 6, 10)
    model = loading.load_model(free, options=loading.ModelOptions(**options))
    assert resizing.at(model, (8, 4)).stage.outputs[0].shape == (1, 3, 8, 4)
    fixed = str(written(tmp_path / "fixed.onnx", [6, 10]))
    assert resizing.options_for(fixed, image, (6, 10)) == image
    model = loading.load_model(fixed, options=loading.ModelOptions(**image))
    assert resizing.at(model, (6, 10)).stage.inputs[0].shape == (1, 3, 6, 10)
    with pytest.raises(ModelError, match=r"fixed\.onnx has a fixed input of 6x10; export it with free height"):
        resizing.at(model, (8, 4))


def artifact(file: Path, size: tuple[int, int]) -> Artifact:
    """One operation built for one size."""
    ends = (TensorSpec("input", (1, 3, *size), value_range=(0, 1)),), (TensorSpec("output", (1, 3, *size)),)
    return Artifact("onnxruntime", written(file, list(size)), (file,), PrecisionPlan(), 1, *ends, {"threads": 1})


def several(folder: Path, *sizes: tuple[int, int]) -> Path:
    """A bundle with an artifact a size."""
    built = [artifact(folder / f"{h}x{w}" / "model.onnx", (h, w)) for h, w in sizes]
    stage = Stage("model", None, built[0].inputs, built[0].outputs)
    model = Model("net", "image-to-image", (stage,), origin={"kind": "onnx", "path": "net.onnx"})
    graph = Graph("model", built[0].path, *(built[0].inputs, built[0].outputs), sha256=files.sha256(built[0].path))
    images = [np.random.default_rng(0).random((2, 3, *size), dtype=np.float32) for size in sizes]
    golden = tuple(bundle.Golden({"input": x}, {"output": x}, 1e-6, place) for place, x in enumerate(images))
    told = bundle.Contents(model, model, tuple(built), graph, "cpu", "seed = 0\n", golden)
    return bundle.write(folder / "out", told).path


def test_the_sample_picks_the_network_by_the_images_size(tmp_path: Path) -> None:
    path = several(tmp_path, (6, 6), (4, 8))
    assert checking.verify(path) == []

    def run(size: tuple[int, int], name: str) -> tuple[tuple[int, ...], str]:
        pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
        np.save(tmp_path / name, pixels) if name.endswith(".npy") else Image.fromarray(pixels).save(tmp_path / name)
        command = [sys.executable, "-I", str(path / "run_cpu.py"), name, "--out", "out.png"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
        if done.returncode:
            return (), done.stderr
        made = np.asarray(Image.open(tmp_path / "out.png"))
        assert made.shape[:2] != size or np.array_equal(made, pixels)
        return made.shape[:2], done.stderr

    assert run((4, 8), "wide.png") == ((4, 8), "")
    assert run((6, 6), "square.npy") == ((6, 6), "")
    size, said = run((170, 300), "photo.png")
    assert size == (4, 8) and said == "photo.png is 170x300, there is 6x6, 4x8: scaled and cropped to 4x8\n"
    assert "must hold uint8" in run((5, 5), "odd.npy")[1]  # arrays are never scaled
    assert "`model.onnxruntime-2.onnx`" in (path / "README.md").read_text()


def test_where_python_cannot_run_the_artifact_the_sample_has_a_graph_a_size(tmp_path: Path) -> None:
    built = [
        dataclasses.replace(artifact(tmp_path / f"{h}" / "model.mlpackage", (h, w)), runtime="coreml")
        for h, w in ((6, 6), (4, 8))
    ]
    model = Model("net", "image-to-image", (Stage("model", None, built[0].inputs, built[0].outputs),))
    text = bundle_samples.script(model, built[0], "model.coreml/x", "iphone", bundle_samples.further(built))
    told = ast.literal_eval(next(n.value for n in ast.parse(text).body if ast.unparse(n).startswith("SETTINGS")))
    assert [one["file"] for one in told["sizes"]] == ["model.onnx", "model-4x8.onnx"]
    _, final, found = run_of(tmp_path)
    assert set(resolutions.graphs(found, bundle_samples.runs_graph(built[0]))) == {"model-8x4.onnx", "model-2x2.onnx"}
    assert resolutions.graphs(found, bundle_samples.runs_graph(final.chosen.artifact)) == {}


def test_a_wrong_output_at_a_further_size_is_found(tmp_path: Path) -> None:
    path = several(tmp_path, (6, 6), (4, 8))

    def spoiled(built: Artifact, feeds: Any) -> dict[str, np.ndarray]:
        wrong = built.inputs[0].shape[-1] == 8
        return {"output": 2 * feeds["input"] if wrong else feeds["input"]}

    assert [finding.file for finding in bundle.verify(path, spoiled)] == ["golden/001.npz"]


def run_of(folder: Path) -> tuple[Any, Any, list[resolutions.Resolution]]:
    """A run, its end, and three further sizes: one that is good, one over the budget, one that failed."""

    def candidate(name: str, size: tuple[int, int], ms: float) -> Candidate:
        built = artifact(folder / name / "model.onnx", size)
        graph = Graph("model", built.path, built.inputs, built.outputs)
        figure, ratio = Measurement("latency", "ms", ms), Measurement("latency ratio", "", 0.5)
        return Candidate(name, "onnxruntime", graph, built, latency=figure, ratio=ratio)

    final = types.SimpleNamespace(baseline=candidate("original", (6, 6), 4.0), chosen=candidate("a", (6, 6), 2.0))
    sizes = ((6, 6), (4, 8), (8, 4), (2, 2))
    golden = [bundle.Golden({}, {}, 0.1), bundle.Golden({}, {}, 0.2)]
    found = [
        resolutions.Resolution((4, 8), reason="it crashed"),
        resolutions.Resolution((8, 4), candidate("b", (8, 4), 3.0), golden[0]),
        resolutions.Resolution((2, 2), candidate("c", (2, 2), 1.0), golden[1], over="drop of 3 is over the budget"),
    ]
    return types.SimpleNamespace(request=types.SimpleNamespace(resolutions=sizes)), final, found


def test_each_size_is_a_row_with_its_artifact_and_what_is_missing_is_stamped(tmp_path: Path) -> None:
    run, final, found = run_of(tmp_path)
    rows = resolutions.rows(run, final, found)
    assert [row["artifact"] for row in rows] == [0, None, 1, 2]
    assert [row["latency"] and row["latency"]["value"] for row in rows] == [2.0, None, 3.0, 1.0]
    assert [case.artifact for case in resolutions.golden(found)] == [1, 2]
    assert resolutions.stamps(found) == [
        "4x8 is not in this bundle: it crashed", "at 2x2: drop of 3 is over the budget",
    ]  # fmt: skip
    checked = [schema.Resolution.model_validate(row).model_dump(mode="json") for row in rows]
    page = table.section({"resolutions": checked})
    assert "8x4" in page and 'data-path="resolutions.2.latency.value">3.00 ms' in page and "it crashed" in page
    assert table.section({"resolutions": []}) == "" and len(terminal._sizes(checked).rows) == 4
    run.request.resolutions = ()
    assert resolutions.rows(run, final, []) == []


def test_a_size_that_fails_at_the_end_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(run: Any, model: Any, final: Any, size: tuple[int, int]) -> resolutions.Resolution:
        if size == (4, 8):
            raise RuntimeFailed("it crashed")
        return resolutions.Resolution(size)

    monkeypatch.setattr(resolutions, "_at", one)
    request = types.SimpleNamespace(resolutions=((6, 6), (4, 8), (8, 4)))
    run: Any = types.SimpleNamespace(request=request, progress=lambda *_: None)
    found = resolutions.further(run, None, None)  # type: ignore[arg-type]
    assert [(r.size, r.reason) for r in found] == [((4, 8), "it crashed"), ((8, 4), "")]


def compress(folder: Path, patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.chdir(folder)
    patch.setenv("EDGEGEN_CACHE", str(folder / "cache"))
    given = ("--model", "net.py:net", "--weights", "net.safetensors", "--data", "photos", "--target", "one.toml")
    more = ("--recipe", "recipe.toml", "--max-quality-drop", "30", "--calibration-images", "4", "--out", "out")
    patch.setattr(sys, "argv", ["edgegen", "compress", "--quiet", *given, *more, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_one_bundle_for_two_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    user_network.write(tmp_path)
    (tmp_path / "recipe.toml").write_text('schema = 1\n[[steps]]\npass = "quantize"\n')
    assert compress(tmp_path, monkeypatch, "--resolution", "64x64", "--resolution", "47x80") == 2
    assert "multiples of 2; the next size is 48x80" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert compress(tmp_path, monkeypatch, "--resolution", "64x64", "--resolution", "48x80") == 0
    path = tmp_path / "out"
    assert checking.verify(path) == []
    report = json.loads((path / "report.json").read_text())
    rows = report["resolutions"]
    assert [(row["size"], row["artifact"], row["latency"]["status"]) for row in rows] == [
        ([64, 64], 0, "measured"), ([48, 80], 1, "measured"),
    ]  # fmt: skip
    assert all(row["quality"][0]["name"] == "PSNR to the teacher" and row["size_bytes"] for row in rows)
    built = bundle.artifacts(bundle.read(path))
    assert built[0].plan == built[1].plan and built[1].inputs[0].shape == (1, 3, 48, 80)
    assert [case["artifact"] for case in bundle.read(path).manifest["golden"]] == [0, 1]
    for size in ((64, 64), (48, 80)):
        Image.new("RGB", size[::-1], (200, 30, 30)).save(tmp_path / "in.png")
        checking.run_sample(path, tmp_path / "in.png", tmp_path / "made.png", 0)
        with Image.open(tmp_path / "made.png") as made:
            assert made.size == size[::-1]
