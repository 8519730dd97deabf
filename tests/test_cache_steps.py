"""cache_steps: what it tells, and both graphs through the house: timed together, judged on images, in a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgegen import bundle, checking, cli, evaluation_work, loading, measuring, samplers  # noqa: E402
from edgegen.candidates import per_image  # noqa: E402
from edgegen.errors import BundleError  # noqa: E402
from edgegen.latency import summarise  # noqa: E402
from edgegen.models import dit  # noqa: E402
from edgegen.nn import cached  # noqa: E402
from edgegen.passes.cache_steps import cache_steps  # noqa: E402
from edgegen.types import Job, Target  # noqa: E402

JOB = Job(Target("testbed", "", ("onnxruntime",)))
NETWORK = '''
import torch
from edgegen.models import ddpm_unet
RECORD = {
    **ddpm_unet.RECORD, "input": {"shape": [1, 1, 16, 16]}, "output": {"value_range": [-1, 1]}, "weights": "factory",
    "options": {**ddpm_unet.RECORD["options"], "sampler": {"name": "ddim", "steps": 5}},
}
def create():
    torch.manual_seed(0)
    return ddpm_unet.create(widths=(8, 16, 16), attention=(False, False, True), groups=4, size=16)
'''


@pytest.fixture
def network(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    return f"{tmp_path / 'net.py'}:create"


def test_the_latency_of_an_image_is_full_runs_and_partial_runs():
    run = {"run": "a"}
    full, partial = summarise([[4.0, 4.0], [6.0, 6.0], [4.0, 4.0]], run), summarise([[1.0], [2.0], [1.0]], run)
    settings = samplers.complete({"name": "ddim", "steps": 5, "cache_every": 2})
    assert samplers.calls(settings) == (5, 2)
    whole = per_image(full, settings, partial)
    assert whole.value == 3 * 4 + 2 * 1
    assert whole.conditions["round_medians"] == [14.0, 22.0, 14.0]
    assert whole.conditions["ms_per_partial_run"] == 1.0 and whole.conditions["partial_runs"] == 2
    plain = per_image(full, {**settings, "cache_every": 1})
    assert plain.conditions["round_medians"] == [20.0, 30.0, 20.0]
    assert measuring.ratio(whole, plain).value == 14 / 20


def test_fewer_runs_of_the_network_are_a_better_ratio():
    full = summarise([[4.0], [5.0]], {"run": "a"})
    ten, two = (per_image(full, samplers.complete({"name": "ddim", "steps": n})) for n in (10, 2))
    assert measuring.ratio(two, ten).value == pytest.approx(0.2)


@pytest.mark.slow
def test_a_transformer_hands_on_what_its_blocks_add():
    torch.manual_seed(0)
    net = dit.create(size=8, patch=2, layers=4, heads=2, head_width=8, labels=3).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = [torch.randn(2, 3, 8, 8), torch.tensor([700.0, 30.0]), torch.tensor([1.0, 2.0])]
    with torch.no_grad():
        wanted = net(*given)
        for where in ({"keep": 1}, {"blocks": (0, 2)}, {"blocks": (2, 4)}):
            made, cache = cached.Full(net, **where)(*given)
            assert torch.allclose(made, wanted, atol=1e-5)
            partial = cached.Partial(net, **where)
            assert torch.allclose(partial(*given, cache), wanted, atol=1e-4)
            assert not torch.allclose(partial(*given, 0.5 * cache), wanted, atol=1e-3)
    with pytest.raises(ValueError, match="some blocks must be cached and some not: there are 4, got 0 to 4"):
        cached.Full(net, blocks=(0, 4))


@pytest.mark.slow
def test_the_interval_is_lowered_until_the_images_keep_the_floor(network: str):
    model = loading.load_model(network)
    result = cache_steps(model, JOB, every=3, images=2)
    settings = samplers.of(result.model.options)
    assert settings is not None and (settings["cache_every"], settings["steps"]) == (3, 5)
    assert result.model.stage.module is model.stage.module
    assert (result.notes["nfe"], result.notes["partial_runs"]) == (5, 3)
    assert result.notes["macs_partial"] < 0.75 * result.notes["macs_full"]
    found = cache_steps(model, JOB, every=3, images=2, psnr=result.notes["psnr"] + 0.01)
    assert found.notes.get("every") == 2 or not found.changed
    none = cache_steps(model, JOB, every=2, images=2, psnr=150.0)
    assert not none.changed and "keeps 150 dB" in none.skipped["net.conv_in"]


@pytest.mark.slow
def test_both_graphs_are_built_timed_judged_and_bundled(network: str, tmp_path: Path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one.toml").write_text(
        'description = "this host"\nruntimes = ["onnxruntime"]\nis_host = true\nprecisions = ["fp32", "int8"]\n'
        "threads = 1\n", encoding="utf-8",
    )  # fmt: skip
    (tmp_path / "recipe.toml").write_text(
        'schema = 1\n[[steps]]\npass = "cache_steps"\nkeep = true\noptions = {every = 2, images = 2}\n'
        '[[steps]]\npass = "quantize"\nkeep = true\n', encoding="utf-8",
    )  # fmt: skip
    command = ["edgegen", "compress", "--quiet", "--model", network, "--target", "one.toml", "--recipe", "recipe.toml",
               "--samples", "8", "--calibration-images", "4", "--max-quality-drop", "100000",
               "--out", "bundle"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    opened = bundle.read(tmp_path / "bundle")
    artifact = bundle.artifacts(opened)[0]
    assert artifact.partial is not None and artifact.plan.precision == artifact.partial.plan.precision == "int8"
    told = opened.report()["result"]["latency"]["conditions"]
    assert (told["nfe"], told["partial_runs"], told["cache_every"]) == (5, 2, 2)
    assert checking.verify(tmp_path / "bundle") == []
    settings = opened.manifest["graph"]["sampler"]
    script = [sys.executable, "bundle/run_one.py", "--count", "2", "--out", "made.npy"]
    done = subprocess.run(script, check=True, capture_output=True, text=True)
    assert "5 runs of the network, 2 of them partial" in done.stderr
    latents = np.stack([np.random.default_rng([0, i]).standard_normal((1, 16, 16), dtype=np.float32) for i in range(2)])
    chosen = evaluation_work.subject(tmp_path / "bundle").artifact
    with measuring.contextlib.ExitStack() as stack:
        wanted = samplers.generate(settings, measuring.runs(chosen, stack), latents)
    assert np.abs(np.load("made.npy") - wanted).max() < 1e-4
    _a_changed_partial_file_is_found(tmp_path / "bundle", artifact.partial.path)


def _a_changed_partial_file_is_found(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    findings = bundle.verify(folder)
    assert [finding.file for finding in findings] == [file.name]
    with pytest.raises(BundleError, match="is not the file that was bundled"):
        evaluation_work.subject(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["artifacts"][0]["partial"]["path"] = "../outside"
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="leaves the bundle"):
        bundle.read(folder)
