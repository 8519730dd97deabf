"""A bundle is written whole, says when anything in it changed, and reloads its network."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bundles import contents_of, file_of, network_of
from torch import nn

from edgegen import bundle, bundle_manifest, bundle_writing, files, weights
from edgegen.bundle import Contents, Finding
from edgegen.errors import BundleError, ModelError, RuntimeFailed
from edgegen.loading import load_model
from edgegen.types import Artifact, Provenance

NETWORK = '''
from torch import nn

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 4, 4], "value_range": [0, 1], "mean": [], "std": []},
    "output": {"value_range": [0, 1]},
    "weights": "factory",
    "licence": "MIT",
}

def tiny(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 3, 1))
'''


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    """A pruned network from a user's file, beside its original."""
    (tmp_path / "mine.py").write_text(NETWORK, encoding="utf-8")
    original = load_model(f"{tmp_path / 'mine.py'}:tiny")
    torch.manual_seed(0)
    pruned = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 1)).eval()
    file = file_of(tmp_path / "built", "Relu", (1, 3, 4, 4), (1, 3, 4, 4))
    return contents_of(original.with_module(pruned), original, file)


@pytest.fixture
def written(contents: Contents, tmp_path: Path) -> Path:
    return bundle.write(tmp_path / "out" / "net-cpu", contents).path


def _run(change: Callable[[np.ndarray], Any] = lambda y: y) -> bundle.Runner:
    """A runtime that knows the right answer, spoiled by `change`."""
    return lambda artifact, feeds: {"output": change(np.maximum(feeds["input"], 0.5))}


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _refused(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bundle_has_all_its_parts_and_verifies(written: Path) -> None:
    names = {p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()}
    assert names == {
        "manifest.json", "recipe.toml", "model.onnx", "model.onnxruntime.onnx", "weights.safetensors",
        "architecture.json", "model_code/mine.py", "golden/000.npz", "run_cpu.py", "report.html", "report.json",
        "README.md", "licences/edgegen.txt", "licences/model.txt", "licences/dependencies.txt",
    }  # fmt: skip
    manifest = bundle.read(written).manifest
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert manifest["schema"] == 1 and manifest["stamps"] == ["for a test"]
    assert manifest["model"]["origin"]["path"] == "model_code/mine.py"
    assert str(written.parents[1]) not in (written / "manifest.json").read_text(encoding="utf-8")
    assert "Apache License" in (written / "licences" / "edgegen.txt").read_text(encoding="utf-8")
    assert "MIT" in (written / "licences" / "model.txt").read_text(encoding="utf-8")
    assert "onnx" in (written / "licences" / "dependencies.txt").read_text(encoding="utf-8")
    assert "for a test" in (written / "README.md").read_text(encoding="utf-8")
    assert bundle.verify(written, _run()) == []


def test_two_writes_give_the_same_manifest(contents: Contents, tmp_path: Path) -> None:
    first = bundle.write(tmp_path / "a", contents)
    assert first.manifest == bundle.write(tmp_path / "b", contents).manifest


def test_the_network_reloads_from_the_bundle_alone(written: Path, contents: Contents, tmp_path: Path) -> None:
    (tmp_path / "mine.py").unlink()
    model = bundle.load_model(written)
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(model.stage.module(x), contents.model.stage.module(x))
    assert model.stage.module[0].out_channels == 5
    assert dataclasses.replace(model, stages=(), origin={}) == dataclasses.replace(contents.model, stages=(), origin={})
    assert bundle.verify(written) == []  # loading left nothing behind


@pytest.mark.parametrize("name", ["weights.safetensors", "architecture.json", "model_code/mine.py"])
def test_a_changed_network_is_not_loaded(written: Path, name: str) -> None:
    (written / name).write_bytes((written / name).read_bytes() + b" ")
    with pytest.raises(BundleError, match=f"{name}: is not the file that was bundled"):
        bundle.load_model(written)


def test_another_state_is_noticed(written: Path, contents: Contents) -> None:
    module = copy.deepcopy(contents.model.stage.module)
    nn.init.zeros_(module[0].bias)
    weights.save_state(module, written / "weights.safetensors")
    file = written / "weights.safetensors"
    entry = {"sha256": files.sha256(file), "bytes": file.stat().st_size}
    _edit(written, lambda manifest: manifest["files"].update({"weights.safetensors": entry}))
    with pytest.raises(BundleError, match="does not have the state that was bundled"):
        bundle.load_model(written)


def test_a_built_in_network_reloads(tmp_path: Path) -> None:
    original = load_model("edsr", latency_only=True)
    module = copy.deepcopy(original.stage.module)
    first, second = module.body[0].conv1, module.body[0].conv2
    module.body[0].conv1 = nn.Conv2d(first.in_channels, 24, 3, padding=1)
    module.body[0].conv2 = nn.Conv2d(24, second.out_channels, 3, padding=1)
    file = file_of(tmp_path / "built", "Relu", (1, 3, 64, 64), (1, 3, 64, 64))
    written = bundle.write(tmp_path / "b", contents_of(original.with_module(module), original, file))
    again = bundle.load_model(written.path)
    assert weights.state_hash(again.stage.module) == weights.state_hash(module)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.stage.module(x), module.eval()(x))
    assert again.options["scale"] == 4


def test_an_onnx_model_has_a_graph_and_no_module(tmp_path: Path) -> None:
    model = network_of("image-to-image", (1, 3, 4, 4), (1, 3, 4, 4))
    file = file_of(tmp_path / "built", "Relu", (1, 3, 4, 4), (1, 3, 4, 4))
    written = bundle.write(tmp_path / "b", contents_of(model, model, file))
    assert written.manifest["torch"] is None and "/far/away" not in json.dumps(written.manifest)
    again = bundle.load_model(written.path)
    assert again.stage.module is None and again.stage.onnx == written.path / "model.onnx"


def test_artifacts_come_back_with_their_paths_here(written: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    written.rename(moved)
    (artifact,) = bundle.artifacts(bundle.read(moved))
    assert artifact.path == moved / "model.onnxruntime.onnx" and artifact.path.is_file()
    assert artifact.files == (artifact.path,) and artifact.options == {"threads": 1}
    assert artifact.inputs[0].shape == (1, 3, 4, 4) and artifact.inputs[0].value_range == (0.0, 1.0)


def test_artifact_files_that_belong_together_stay_together(contents: Contents, tmp_path: Path) -> None:
    for folder, names in {"ov": ("model.xml", "model.bin"), "trt": ("model.onnx", "build_engine.py")}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(name, encoding="utf-8")
    one = contents.artifacts[0]

    def several(runtime: str, folder: str, *names: str) -> Artifact:
        found = tuple(tmp_path / folder / name for name in names)
        return dataclasses.replace(one, runtime=runtime, path=found[0], files=found)

    built = (one, one, several("openvino", "ov", "model.xml", "model.bin"),
             several("tensorrt", "trt", "model.onnx", "build_engine.py"))  # fmt: skip
    written = bundle.write(tmp_path / "b", dataclasses.replace(contents, artifacts=built))
    assert [[Path(f).as_posix() for f in entry["files"]] for entry in written.manifest["artifacts"]] == [
        ["model.onnxruntime.onnx"],
        ["model.onnxruntime-2.onnx"],
        ["model.openvino.xml", "model.openvino.bin"],
        ["model.tensorrt/model.onnx", "model.tensorrt/build_engine.py"],
    ]


def test_an_artifact_whose_main_path_is_a_folder_is_read_again(contents: Contents, tmp_path: Path) -> None:
    package = tmp_path / "cm" / "model.mlpackage"
    for name in ("Manifest.json", "Data/weight.bin"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name, encoding="utf-8")
    (tmp_path / "cm" / "twin.onnx").write_text("twin", encoding="utf-8")
    inside = (package / "Manifest.json", package / "Data" / "weight.bin", tmp_path / "cm" / "twin.onnx")
    one = dataclasses.replace(contents.artifacts[0], runtime="coreml", path=package, files=inside)
    made = bundle.write(tmp_path / "b", dataclasses.replace(contents, artifacts=(one,), golden=()))
    (artifact,) = bundle.artifacts(bundle.read(made.path))
    assert artifact.path.is_dir() and artifact.path.name == "model.mlpackage"
    assert sorted(file.name for file in artifact.files) == ["Manifest.json", "twin.onnx", "weight.bin"]
    _edit(made.path, lambda m: m["artifacts"][0].update(path="model.coreml/other.mlpackage"))
    assert "not among its files" in _refused(made.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 2, "differs by"),
        (lambda y: np.zeros_like(y), "differs by"),
        (lambda y: y + 1e-3, "differs by 0.001, allowed 1e-06"),
        (lambda y: y[:, :, :2], "has shape"),
        (lambda y: np.full_like(y, np.nan), "NaN or infinity"),
    ],
)
def test_wrong_golden_outputs_are_found(written: Path, change: Callable[[np.ndarray], Any], message: str) -> None:
    (finding,) = bundle.verify(written, _run(change))
    assert (finding.kind, finding.file) == ("golden", "golden/000.npz") and message in finding.text


def test_golden_tolerance_is_kept(written: Path) -> None:
    assert bundle.verify(written, _run(lambda y: y + 5e-7)) == []


def test_a_runtime_that_crashes_or_forgets_an_output_is_a_finding(written: Path) -> None:
    def crash(artifact: Artifact, feeds: bundle.Arrays) -> bundle.Arrays:
        raise RuntimeFailed("crashed (signal 11) at run")

    assert "did not run: crashed (signal 11)" in str(bundle.verify(written, crash)[0])
    assert "gives no output 'output'" in str(bundle.verify(written, lambda artifact, feeds: {})[0])


def test_missing_changed_and_unexpected_files_are_found(written: Path) -> None:
    (written / "report.html").unlink()
    (written / "recipe.toml").write_text("seed = 1\n", encoding="utf-8")
    (written / "sub").mkdir()
    (written / "sub" / "new.txt").write_text("x", encoding="utf-8")
    found = bundle.verify(written, _run())
    assert {(f.kind, f.file) for f in found} == {
        ("missing", "report.html"), ("changed", "recipe.toml"), ("unexpected", "sub/new.txt"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["model.onnxruntime.onnx", "golden/000.npz"])
def test_a_changed_artifact_is_never_run(written: Path, name: str) -> None:
    content = bytearray((written / name).read_bytes())
    content[len(content) // 2] ^= 1
    (written / name).write_bytes(content)
    ran: list[Artifact] = []
    found = bundle.verify(written, lambda artifact, feeds: ran.append(artifact) or {})
    assert [(f.kind, f.file) for f in found] == [("changed", name)] and not ran


def test_golden_with_pickled_objects_is_refused(written: Path) -> None:
    np.savez(written / "golden" / "000.npz", **{"input:input": np.array([{"a": 1}], dtype=object)})
    file = written / "golden" / "000.npz"
    entry = {"sha256": files.sha256(file), "bytes": file.stat().st_size}
    _edit(written, lambda manifest: manifest["files"].update({"golden/000.npz": entry}))
    (finding,) = bundle.verify(written, _run())
    assert "cannot be read (Object arrays cannot be loaded" in finding.text


def test_a_bundle_without_golden_data_does_not_pass_a_run(contents: Contents, tmp_path: Path) -> None:
    written = bundle.write(tmp_path / "b", dataclasses.replace(contents, golden=()))
    assert bundle.verify(written.path) == []
    assert bundle.verify(written.path, _run()) == [
        Finding("golden", "golden/", "no golden inputs and outputs: nothing was run")
    ]


def test_what_is_no_bundle_is_refused(tmp_path: Path, written: Path) -> None:
    assert "is not a bundle: it has no manifest.json" in _refused(tmp_path / "nowhere")
    whole = (written / "manifest.json").read_text(encoding="utf-8")
    for content, message in {whole[: len(whole) // 2]: "not readable JSON", "": "not readable JSON",
                             "[]": "no schema version", '{"schema": "1"}': "no schema version"}.items():  # fmt: skip
        (written / "manifest.json").write_text(content, encoding="utf-8")
        assert message in _refused(written)
    (written / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "not readable JSON" in _refused(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "has schema version 2, this edgegen knows 1"),
        (lambda m: m.pop("golden"), "golden: Field required"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m.update(artifacts=[]), "artifacts: List should have at least 1 item"),
        (lambda m: m["golden"][0].update(artifact=7), "belongs to artifact 7, which does not exist"),
        (lambda m: m["golden"][0].update(tolerance=float("nan")), "golden.0.tolerance"),
        (lambda m: m["files"].pop("weights.safetensors"), "names 'weights.safetensors', which is not among its files"),
        (lambda m: m["files"].pop("model.onnx"), "names 'model.onnx', which is not among its files"),
    ],
)
def test_damaged_manifests_are_refused(written: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    _edit(written, change)
    assert message in _refused(written)


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/etc/hostname", "a/../../outside.txt", "a\\..\\b", "C:evil", "a//b", "", ".", "a\nb"]
)
def test_names_that_leave_the_bundle_are_refused(written: Path, name: str) -> None:
    (written.parent / "outside.txt").write_text("secret", encoding="utf-8")
    entry = {"sha256": "0" * 64, "bytes": 6}
    _edit(written, lambda manifest: manifest["files"].update({name: entry}))
    assert "refused" in _refused(written)
    with pytest.raises(BundleError, match="refused"):
        bundle_manifest.check_name(name)


@pytest.mark.parametrize("place", ["artifact", "golden", "code", "weights"])
def test_names_used_elsewhere_in_the_manifest_are_checked_too(written: Path, place: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        if place == "artifact":
            manifest["artifacts"][0]["path"] = "../evil.onnx"
        elif place == "golden":
            manifest["golden"][0]["file"] = "../evil.npz"
        elif place == "code":
            manifest["model"]["origin"]["path"] = "../../mine.py"
        else:
            manifest["torch"]["weights"] = "../evil.safetensors"

    _edit(written, change)
    assert "leaves the bundle" in _refused(written)


def test_links_are_refused_or_found(written: Path) -> None:
    outside = written.parent / "outside.txt"
    outside.write_text("x", encoding="utf-8")
    (written / "extra").symlink_to(outside)
    assert [(f.kind, f.file) for f in bundle.verify(written)] == [("unexpected", "extra")]
    (written / "recipe.toml").unlink()
    (written / "recipe.toml").symlink_to(outside)
    assert "is a link or leads out of the bundle" in _refused(written)


def test_a_failed_write_leaves_nothing_and_an_older_bundle_stays(contents: Contents, written: Path) -> None:
    before = (written / "manifest.json").read_bytes()
    broken = dataclasses.replace(contents, extra={"recipe.toml": "twice"})
    for folder in (written, written.parent / "new"):
        with pytest.raises(BundleError, match=r"two files 'recipe\.toml'"):
            bundle.write(folder, broken)
    assert (written / "manifest.json").read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    with pytest.raises(BundleError, match="leaves the bundle"):
        bundle.write(written, dataclasses.replace(contents, extra={"../x": "x"}))
    assert bundle.write(written, dataclasses.replace(contents, stamps=())).manifest["stamps"] == []


def test_a_folder_that_is_no_bundle_is_not_replaced(contents: Contents, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x", encoding="utf-8")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        bundle.write(tmp_path / "photos", contents)
    assert (tmp_path / "photos" / "one.jpg").read_text(encoding="utf-8") == "x"


def test_code_that_changed_during_the_run_is_refused(contents: Contents, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NETWORK + "\n# changed", encoding="utf-8")
    with pytest.raises(BundleError, match="has changed since the model was loaded"):
        bundle.write(tmp_path / "b", contents)


def test_a_network_that_cannot_be_described_is_refused(contents: Contents, tmp_path: Path) -> None:
    other = contents.model.with_module(nn.Sequential(nn.Conv2d(3, 5, 1), nn.GELU(), nn.Conv2d(5, 3, 1)))
    with pytest.raises(ModelError, match="cannot describe 1"):
        bundle.write(tmp_path / "b", dataclasses.replace(contents, model=other))
    assert not (tmp_path / "b").exists()


def test_verify_needs_no_torch(written: Path) -> None:
    code = f"""
        import sys
        for name in ("torch", "onnxruntime", "timm"):
            sys.modules[name] = None
        from pathlib import Path
        import numpy
        from edgegen import bundle
        for least in (0.5, 0.6):
            run = lambda a, feeds: {{"output": numpy.maximum(feeds["input"], least)}}
            found = bundle.verify(Path({str(written)!r}), run)
            print(least, *(finding.kind for finding in found))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60, capture_output=True,
                          text=True)  # fmt: skip
    right, wrong = done.stdout.splitlines()
    assert right == "0.5" and wrong.startswith("0.6 golden")


def test_licences_of_the_caller_go_before_the_notes(contents: Contents, tmp_path: Path) -> None:
    given = {"model.txt": "the real licence", "data.txt": "CC0"}
    written = bundle.write(tmp_path / "b", dataclasses.replace(contents, licences=given)).path
    assert (written / "licences" / "model.txt").read_text(encoding="utf-8") == "the real licence"
    assert (written / "licences" / "data.txt").is_file()
    assert bundle_writing.inside(written / "licences") == ["data.txt", "dependencies.txt", "edgegen.txt", "model.txt"]


def test_provenance_and_options_survive(tmp_path: Path) -> None:
    model = dataclasses.replace(
        network_of("super-resolution", (1, 3, 4, 4), (1, 3, 4, 4), options={"scale": 1}),
        provenance=Provenance("here", "MIT", "a paper", "abc"),
    )
    file = file_of(tmp_path / "built", "Relu", (1, 3, 4, 4), (1, 3, 4, 4))
    again = bundle.load_model(bundle.write(tmp_path / "b", contents_of(model, model, file)).path)
    assert (again.provenance, dict(again.options)) == (model.provenance, {"scale": 1})
