"""A bundle's own sample runs the artifact on an image, on classes and on latents."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_bundles import artifact_of, contents_of, file_of, network_of

from edgegen import bundle, bundle_samples
from edgegen.types import Model, Preprocessing, TensorSpec


def _sample(model: Model, file: Path, tmp_path: Path, *arguments: str) -> str:
    """What the bundle's own sample prints."""
    pytest.importorskip("onnxruntime")
    written = bundle.write(tmp_path / "b", contents_of(model, model, file))
    done = subprocess.run(
        [sys.executable, "-I", str(written.path / "run_cpu.py"), *arguments],
        capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not bundle.verify(written.path)
    return done.stdout


def test_the_sample_turns_an_image_into_an_image(tmp_path: Path) -> None:
    from PIL import Image

    model = network_of("image-to-image", (1, 3, 6, 8), (1, 3, 6, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    np.save(tmp_path / "in.npy", pixels)
    file = file_of(tmp_path / "built", "Relu", (1, 3, 6, 8), (1, 3, 6, 8))
    for given in ("in.png", "in.npy"):
        assert _sample(model, file, tmp_path, given, "--out", "out.png").strip() == "out.png"
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), pixels)


@pytest.mark.parametrize("size", [(16, 16), (61, 37), (9, 40)])
def test_the_sample_restores_photos_of_any_size_in_tiles(size: tuple[int, int], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = network_of("restoration", (1, 3, 16, 16), (1, 3, 16, 16))
    file = file_of(tmp_path / "built", "AveragePool", (1, 3, 16, 16), (1, 3, 16, 16), kernel_shape=[3, 3],
                   pads=[1, 1, 1, 1])  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    np.save(tmp_path / "in.npy", pixels)
    _sample(model, file, tmp_path, "in.npy", "--out", "out.npy")
    whole = torch.from_numpy(pixels.transpose(2, 0, 1)[None] / np.float32(255))
    wanted = torch.nn.functional.avg_pool2d(whole, 3, 1, 1, count_include_pad=False).numpy()
    found = np.load(tmp_path / "out.npy")
    inner = (..., slice(size[0] - (size[0] < 16)), slice(None))  # a photo smaller than a tile is mirrored at its end
    np.testing.assert_allclose(found[inner], wanted[inner], rtol=0, atol=1e-5)
    assert found.shape == wanted.shape and np.abs(found - whole.numpy()).max() > 0.1


def test_the_sample_prepares_images_as_edgegen_does(tmp_path: Path) -> None:
    from PIL import Image

    from edgegen import images

    how = Preprocessing((0.0, 2.0), (0.5, 0.6, 0.7), (0.2, 0.3, 0.4), resize=10, crop=(6, 6))
    model = network_of("image-to-image", (1, 3, 6, 6), (1, 3, 6, 6), preprocessing=how)
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    file = file_of(tmp_path / "built", "Identity", (1, 3, 6, 6), (1, 3, 6, 6))
    _sample(model, file, tmp_path, "in.png", "--out", "out.npy")
    expected = images.network_input(images.view(pixels, how, 6, 6), how)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy")[0], expected, rtol=0, atol=1e-5)


def test_the_sample_names_classes(tmp_path: Path) -> None:
    names = {"classes": ["red", "green", "blue"]}
    model = network_of("classification", (1, 3, 1, 1), (1, 3), options=names)
    np.save(tmp_path / "in.npy", np.array([[[0, 255, 0]]], dtype=np.uint8))
    file = file_of(tmp_path / "built", "Flatten", (1, 3, 1, 1), (1, 3))
    lines = _sample(model, file, tmp_path, "in.npy").splitlines()
    assert lines[0].split() == ["57.61%", "green"] and len(lines) == 3  # e / (e + 2)


def test_the_sample_draws_latents_from_the_seed(tmp_path: Path) -> None:
    model = network_of("unconditional", (1, 1, 4, 4), (1, 1, 4, 4))
    file = file_of(tmp_path / "built", "Identity", (1, 1, 4, 4), (1, 1, 4, 4))
    _sample(model, file, tmp_path, "--seed", "5", "--out", "out.npy")
    expected = np.random.default_rng([5, 0]).standard_normal((1, 4, 4), dtype=np.float32)
    assert np.array_equal(np.load(tmp_path / "out.npy")[0], expected)


def test_the_sample_draws_further_inputs_and_writes_what_is_no_image(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    names = {"input": (1, 4), "noise0": (1, 4), "hot": (1, 4), "output": (1, 4)}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items()]
    ends.insert(3, helper.make_tensor_value_info("label", TensorProto.INT64, (1,)))
    nodes = [helper.make_node("Cast", ["label"], ["number"], to=TensorProto.FLOAT),
             helper.make_node("Sum", ["input", "noise0", "hot", "number"], ["output"])]  # fmt: skip
    made = helper.make_model(helper.make_graph(nodes, "g", ends[:4], ends[4:]),
                             opset_imports=[helper.make_opsetid("", 18)], ir_version=9)  # fmt: skip
    file = tmp_path / "model.onnx"
    onnx.save(made, file)
    model = network_of("unconditional", (1, 4), (1, 4))
    first = dataclasses.replace(model.stage.inputs[0], value_range=None, layout="NC")
    more = (TensorSpec("noise0", (1, 4), layout="NC"), TensorSpec("hot", (1, 4), "float32", (0, 1), "NC"),
            TensorSpec("label", (1,), "int64", (0, 9), "N"))  # fmt: skip
    stage = dataclasses.replace(model.stage, inputs=(first, *more))
    text = bundle_samples.script(
        dataclasses.replace(model, stages=(stage,)), artifact_of(file, dataclasses.replace(model, stages=(stage,))),
        str(file), "cpu",
    )  # fmt: skip
    (tmp_path / "run_cpu.py").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", "run_cpu.py", "--seed", "5"], capture_output=True, text=True,
                          check=False, timeout=60, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng([5, 1])
    drawn = rng.standard_normal((1, 4), dtype=np.float32) + np.eye(4, dtype=np.float32)[rng.integers(4, size=1)]
    wanted = np.random.default_rng([5, 0]).standard_normal((4,), dtype=np.float32) + drawn + rng.integers(10, size=(1,))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, rtol=1e-6)


def test_the_sample_runs_in_openvino(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = network_of("unconditional", (1, 1, 4, 4), (1, 1, 4, 4))
    file = file_of(tmp_path / "built", "Relu", (1, 1, 4, 4), (1, 1, 4, 4))
    network = openvino.Core().read_model(str(file))
    openvino.save_model(network, str(tmp_path / "built" / "model.xml"), compress_to_fp16=False)
    parts = tuple(tmp_path / "built" / name for name in ("model.xml", "model.bin"))
    options = {"threads": 1, "inference_precision": "f32"}
    artifact = artifact_of(parts[0], model, "openvino")
    artifact = dataclasses.replace(artifact, files=parts, options=options)
    written = bundle.write(tmp_path / "b", dataclasses.replace(contents_of(model, model, file), artifacts=(artifact,)))
    command = [sys.executable, "-I", str(written.path / "run_cpu.py"), "--seed", "5", "--out", "out.npy"]
    subprocess.run(command, check=True, timeout=60, cwd=tmp_path, capture_output=True)
    latent = np.random.default_rng([5, 0]).standard_normal((1, 4, 4), dtype=np.float32)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy")[0], np.maximum(latent, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt", "unknown"])
@pytest.mark.parametrize("task", ["classification", "super-resolution", "unconditional", "restoration"])
def test_every_sample_is_python_that_names_its_file(runtime: str, task: str, tmp_path: Path) -> None:
    shape = (1, 16, 4, 4) if task == "restoration" else (1, 3, 4, 4)
    model = network_of(task, shape, (1, 3))
    artifact = artifact_of(file_of(tmp_path, "Relu", shape, shape), model, runtime)
    text = bundle_samples.script(model, artifact, "model.special.bin", "jetson-orin-nano")
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert {"load", "show", "main"} <= functions
    assert ("model.onnx" if runtime == "unknown" else "model.special.bin") in text
    assert "run_jetson_orin_nano.py" in text and max(map(len, text.splitlines())) <= 200
