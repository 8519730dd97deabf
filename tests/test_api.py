"""`import edgegen` is the command line as functions: light until used, typed, and shown in a notebook."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bundles_for_devices
import pytest

import edgegen
from edgegen import api, errors, types

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_sorted_complete_and_there() -> None:
    assert edgegen.__all__ == sorted(edgegen.__all__)
    for name in edgegen.__all__:
        assert getattr(edgegen, name)
        assert name in dir(edgegen)
        assert name.startswith("_") or "edgegen" in (getattr(edgegen, name).__doc__ or "") or name == "load"
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        edgegen.compres  # type: ignore[attr-defined] # noqa: B018


def test_importing_and_looking_at_a_name_imports_nothing_heavy() -> None:
    code = "import sys, edgegen; edgegen.compress; print([n for n in ('torch', 'onnx', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_notebook_shows_the_report_in_a_frame(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<p class="x">5 < 6</p>')
    (tmp_path / "report.json").write_text(json.dumps({"headline": "faster"}))
    bundle = types.Bundle(tmp_path, {})
    shown = bundle._repr_html_()
    assert shown.startswith("<iframe sandbox ")
    assert "&lt;p class=&quot;x&quot;&gt;" in shown
    assert bundle.report()["headline"] == "faster"
    assert "iframe" not in types.Bundle(tmp_path / "<gone>", {})._repr_html_()


def test_bundles_are_opened_profiled_and_compared(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the bundle is for ONNX Runtime")
    opened = edgegen.load(bundles_for_devices.tiny(tmp_path / "a"))
    assert opened.manifest["model"]["name"] == "net"
    with pytest.raises(errors.BundleError, match="is not a bundle"):
        edgegen.load(tmp_path)
    with pytest.raises(errors.BundleError, match="no report to compare"):
        edgegen.compare(opened, opened.path, measure=False)


def test_what_is_no_model_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    with pytest.raises(errors.ModelError, match="got int"):
        edgegen.compress(5)  # type: ignore[arg-type]
    with pytest.raises(errors.ModelError, match="needs model_options"):
        edgegen.compress(torch.nn.Conv2d(3, 3, 1))


def test_a_module_becomes_a_file_that_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    module = torch.nn.Conv2d(3, 5, 3)
    file = api._saved(module, {"input_shape": (1, 3, 8, 8)})
    assert file == api._saved(module, {"input_shape": (1, 3, 8, 8)})
    assert file.is_relative_to(tmp_path)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(x), module(x))
    other = type("Conv2d", (torch.nn.Conv2d,), {"forward": lambda self, x: self._conv_forward(x, -self.weight, None)})
    module.__class__ = other  # the same name and weights, other code: not the file of before
    assert api._saved(module, {"input_shape": (1, 3, 8, 8)}) != file


@pytest.mark.slow
def test_a_module_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="builds for ONNX Runtime")
    import user_network

    user_network.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    from edgegen.loading import load_model

    module = load_model("net.py:net", weights=Path("net.safetensors")).stage.module
    told: list[str] = []
    bundle = edgegen.compress(
        module, target="one.toml", data="photos", out="made", max_quality_drop=30, calibration_images=4,
        progress=lambda step, text, fraction: told.append(step),
        model_options={"task": "image-to-image", "input_shape": (1, 3, 64, 64), "value_range": (0, 1),
                       "output_range": (0, 1), "mean": (), "std": ()},
    )  # fmt: skip
    assert bundle.report()["result"]["latency"]["status"] == "measured"
    assert "build" in told
    assert "<iframe" in bundle._repr_html_()
