"""Whole runs on a small network, with real runtimes: what a user gets, and that it says what it did not measure."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="compress needs the extra `torch`")
pytest.importorskip("onnxruntime", reason="these runs build for ONNX Runtime")

import user_network

from edgegen import bundle, checking, cli, loading, onnx_exact, onnx_graph


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a user's network, weights, photos, target and recipe."""
    folder = tmp_path_factory.mktemp("user")
    user_network.write(folder)
    return folder


def run_in(place, patch, out, *arguments):
    """Run `edgegen compress` in that folder, in this process; its report and its bundle's path."""
    patch.chdir(place)
    patch.setenv("EDGEGEN_CACHE", str(place / "cache"))
    patch.setattr(sys, "argv", ["edgegen", "compress", "--quiet", "--out", out, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    return json.loads((place / out / "report.json").read_text()), place / out


@pytest.fixture
def compress(place, monkeypatch):
    """`run_in` that folder."""
    return lambda out, *arguments: run_in(place, monkeypatch, out, *arguments)


@pytest.fixture(scope="module")
def post(place):
    """Report and path of one post-training bundle that several tests look at; whoever changes it copies it first."""
    with pytest.MonkeyPatch.context() as patch:
        return run_in(place, patch, "post", *NET, *DATA, *HERE)


NET = ("--model", "net.py:net", "--weights", "net.safetensors")
DATA = ("--data", "photos", "--calibration-images", "4", "--max-quality-drop", "30")
HERE = ("--target", "one.toml", "--recipe", "post-training")


@pytest.mark.slow
def test_a_post_training_run_ends_with_a_bundle_that_verifies_and_runs(post, place, monkeypatch):
    monkeypatch.chdir(place)
    report, path = post
    assert checking.verify(path) == []
    assert report["result"]["latency"]["status"] == "measured"
    assert len(report["result"]["latency"]["samples"]) >= 25
    labels = {c["label"]: c["verdict"] for c in report["candidates"]}
    assert list(labels.values()).count("chosen") == 1
    for kind in ("u8s7", "s8s7") if onnx_exact.saturates() else ("u8s8", "s8s8"):
        assert any(label.endswith(f"onnxruntime int8 ({kind}, rest fp32)") for label in labels), labels
    assert {row["name"] for row in report["result"]["quality"]} >= {"PSNR to the teacher", "SSIM to the teacher"}
    counts = {name: part["count"] for name, part in report["data"].items()}
    assert counts["train"] + counts["select"] + counts["test"] == 16
    page = (path / "report.html").read_text()
    assert report["headline"].split(":")[0] in page
    text = checking.run_sample(path, Path("photos/00.png"), path.parent / "one.png", 0)
    assert (path.parent / "one.png").read_bytes().startswith(b"\x89PNG"), text


@pytest.mark.slow
def test_a_bundle_is_reproduced_from_its_own_request_and_a_changed_one_is_told(post, place, monkeypatch):
    monkeypatch.chdir(place)
    path = post[1]
    found = checking.reproduce(path, place / "again", lambda step, text, share: None)
    # Which of two INT8 formats is the faster may change from run to run on a small network; what was built may not.
    assert [text for text in found if "another build" not in text] == []
    manifest = json.loads((place / "again" / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"]["sha256"] = "0" * 64
    (place / "again" / "manifest.json").write_text(json.dumps(manifest))
    assert "weights.safetensors differs" in checking.differences(path, place / "again")[0]


@pytest.mark.slow
def test_a_changed_artifact_is_found_and_not_run(post, place):
    path = Path(shutil.copytree(post[1], place / "changed"))
    target = path / bundle.artifacts(bundle.read(path))[0].path.name
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 0xFF
    target.write_bytes(content)
    assert [finding.kind for finding in checking.verify(path)] == ["changed"]


@pytest.mark.slow
def test_an_onnx_file_gets_the_post_training_passes_and_a_torch_recipe_is_refused(compress, place, monkeypatch, capsys):
    import torch  # noqa: F401

    monkeypatch.chdir(place)
    model = loading.load_model("net.py:net", weights=Path("net.safetensors"))
    onnx_graph.to_onnx(model.stage, place / "net.onnx")
    stated = ("--task", "image-to-image", "--value-range", "0,1", "--output-range", "0,1", "--mean", "0,0,0")
    options = ("--model", "net.onnx", *stated, "--std", "1,1,1", *DATA, "--target", "one.toml")
    report, path = compress("from-onnx", *options)
    assert [step["name"] for step in report["steps"]] == ["quantize"]
    assert checking.verify(path) == []
    monkeypatch.setattr(sys, "argv", ["edgegen", "compress", "--out", "no", *options, "--recipe", "balanced"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "post-training" in capsys.readouterr().err
    assert not (place / "no").exists()


@pytest.mark.slow
def test_a_target_that_is_not_here_gets_predictions_that_say_so(compress):
    report, path = compress("jetson", *NET, *DATA, "--target", "jetson", "--recipe", "post-training")
    assert report["result"]["latency"]["status"] == "estimated"
    assert any("not measured" in stamp for stamp in report["stamps"])
    assert "faster" not in report["headline"]
    assert {"model.onnx", "build_engine.py"} <= {p.name for p in path.rglob("*")}
    assert all(": tensorrt " in c["label"] for c in report["candidates"])
    assert checking.verify(path) == []


@pytest.mark.slow
def test_latency_only_needs_no_data_and_stamps_the_bundle(compress):
    report, path = compress("latency", *NET, *HERE, "--latency-only")
    assert report["result"]["quality"] == []
    assert any("not for accuracy" in stamp for stamp in report["stamps"])
    assert "not for accuracy" in (path / "README.md").read_text()


@pytest.mark.slow
def test_a_finished_bundle_is_not_passed_off_as_the_result_of_an_edited_recipe(compress, place, monkeypatch, capsys):
    (place / "edited.toml").write_text('description = "d"\nschema = 1\n\n[[steps]]\npass = "quantize"\n')
    same = ("--data", "photos", "--target", "one.toml", "--recipe", "edited.toml", "--latency-only", "--resume")
    options = [*NET, *same]
    first, path = compress("edited", *options)
    assert compress("edited", *options)[0] == first  # the same request again is answered by what is there
    kept = (path / "manifest.json").read_bytes()
    recipe = (place / "edited.toml").read_text()
    (place / "edited.toml").write_text(recipe + 'options = { float_types = ["Gemm"] }\n')
    monkeypatch.setattr(sys, "argv", ["edgegen", "compress", "--quiet", "--out", "edited", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "request with another recipe" in capsys.readouterr().err
    assert (path / "manifest.json").read_bytes() == kept


@pytest.mark.slow
def test_latency_only_calibrates_on_the_images_that_it_is_given(compress):
    report, path = compress("latency-data", *NET, "--data", "photos", *HERE, "--latency-only")
    assert report["result"]["quality"] == []
    assert "not for accuracy: --latency-only, no quality was measured" in report["stamps"]
    assert report["data"]["calibration"]["count"] > 0
    assert checking.verify(path) == []


@pytest.mark.slow
def test_a_broken_image_is_named_skipped_and_counted_and_a_drop_of_zero_still_ends_with_a_bundle(compress, place):
    shutil.copytree(place / "photos", place / "some-broken")
    (place / "some-broken" / "05.png").write_bytes(b"not a picture")
    arguments = ("--data", "some-broken", "--calibration-images", "4", "--max-quality-drop", "0")
    report, path = compress("zero", *NET, *arguments, *HERE)
    assert list(report["skipped_files"]) == ["05.png"]
    counts = {name: part["count"] for name, part in report["data"].items()}
    assert counts["train"] + counts["select"] + counts["test"] == 15
    assert checking.verify(path) == []
    paired = next(row["value"] for row in report["result"]["quality"] if row["name"] == "PSNR to the teacher")
    assert paired >= 50, "a drop of zero is 50 dB to the teacher or more in this task"


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_is_answered_with_the_nearest_point(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("EDGEGEN_CACHE", str(place / "cache"))
    arguments = ["edgegen", "compress", "--quiet", "--out", "tight", *NET, *DATA, *HERE, "--max-size", "10kB"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert "--max-size" in lines[0]
    assert "Nearest: original" in lines[0]
    assert "onnxruntime int8" in lines[0]
    assert not (place / "tight").exists()


def test_golden_comparison_fails_on_doubled_and_on_zero_outputs():
    expected = np.linspace(0.5, 1, 10, dtype=np.float32)
    assert bundle.compare("y", expected, expected, 0.01) == ""
    assert "differs" in bundle.compare("y", expected, 2 * expected, 0.01)
    assert "differs" in bundle.compare("y", expected, 0 * expected, 0.01)
