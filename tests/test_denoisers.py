"""Denoisers through the house: loaded with their inputs, fed along their own way, timed by image, bundled."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgegen import (  # noqa: E402
    bundle_samples,
    cli,
    cli_options,
    loading,
    onnx_graph,
    program,
    registry,
    rewriting,
    samplers,
)
from edgegen.bundle_loaders import LOADERS  # noqa: E402
from edgegen.candidates import per_image  # noqa: E402
from edgegen.errors import DataError, ModelError, UsageError  # noqa: E402
from edgegen.nn import diffusion  # noqa: E402
from edgegen.records import ModelOptions  # noqa: E402
from edgegen.types import Artifact, Measurement, Model, PrecisionPlan, Target  # noqa: E402

NETWORK = '''
import torch
from edgegen.models import sinddm
RECORD = {
    **sinddm.RECORD, "input": {"shape": [1, 1, 16, 16]}, "output": {"value_range": [-1, 1]}, "weights": "factory",
    "options": {"features": "mnist", "prediction": "v", "schedule": "cosine", "train_steps": 1000,
                "sampler": {"name": "ddim", "steps": 5}},
}
def create():
    torch.manual_seed(0)
    return sinddm.create(channels=1, width=8, blocks=2)
'''


@pytest.fixture
def network(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    return f"{tmp_path / 'net.py'}:create"


def test_a_denoiser_takes_a_sample_and_a_time_and_names_its_sampler(network: str):
    model = loading.load_model(network)
    assert [(spec.name, spec.shape) for spec in model.stage.inputs] == [("sample", (1, 1, 16, 16)), ("timestep", (1,))]
    assert model.stage.inputs[1].value_range == (0.0, 999.0)
    settings = samplers.of(model.options)
    assert settings is not None
    assert (settings["name"], settings["steps"], settings["prediction"]) == ("ddim", 5, "v")


def test_the_user_may_choose_another_sampler(network: str):
    chosen = cli_options.sampler("heun,spacing=karras,rho=5.5", 7)
    assert chosen == {"name": "heun", "spacing": "karras", "rho": 5.5, "steps": 7}
    lists = cli_options.sampler("timesteps=900:500.5,cache_blocks=2:4,guidance_interval=0:0.5", 0)
    assert lists == {"timesteps": [900, 500.5], "cache_blocks": [2, 4], "guidance_interval": [0, 0.5]}
    assert samplers.complete({**lists})["cache_blocks"] == [2, 4]  # whole numbers, as it wants them
    alone = samplers.complete(cli_options.sampler("timesteps=500", 0))
    assert (alone["steps"], [level.t for level in samplers.levels(alone)[:-1]]) == (1, [500.0])
    settings = samplers.of(loading.load_model(network, options=ModelOptions(sampler=chosen)).options)
    assert settings is not None and samplers.nfe(settings) == 13
    fewer = samplers.of(loading.load_model(network, options=ModelOptions(sampler={"steps": 3})).options)
    assert fewer is not None and (fewer["name"], fewer["steps"]) == ("ddim", 3)
    with pytest.raises(UsageError, match="did you mean 'heun'"):
        loading.load_model(network, options=ModelOptions(sampler={"name": "huen"}))
    with pytest.raises(ModelError, match="takes no sampler"):
        loading.load_model("edsr", options=ModelOptions(sampler={"steps": 3}))
    with pytest.raises(ModelError, match="is not NAME=VALUE"):
        cli_options.sampler("ddim,eta", 0)


@pytest.mark.parametrize(("channels", "clip"), [(1, 1.0), (4, 0.0)])
def test_latents_are_not_clipped_unless_it_is_asked_for(channels: int, clip: float, tmp_path: Path):
    text = NETWORK.replace("[1, 1, 16, 16]", f"[1, {channels}, 16, 16]").replace("channels=1", f"channels={channels}")
    (tmp_path / "net.py").write_text(text, encoding="utf-8")

    def clipped(**chosen) -> float:
        model = loading.load_model(f"{tmp_path / 'net.py'}:create", options=ModelOptions(sampler=chosen))
        return samplers.of(model.options)["clip"]

    assert clipped() == clipped(name="heun") == clip
    assert clipped(clip=2.5) == 2.5


@pytest.mark.parametrize("prediction", samplers._core.PREDICTIONS)
def test_noised_images_and_targets_fit_together(prediction: str):
    levels = diffusion.Levels({"prediction": prediction, "schedule": "cosine", "train_steps": 100})
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 1, 4, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0.0, 10, 40, 60, 80, 90])
    x = levels.noised(x0, t, eps)
    assert torch.allclose(levels.image(levels.target(x0, t, eps), x, t), x0, atol=2e-4)
    assert not torch.allclose(levels.image(-levels.target(x0, t, eps), x, t), x0, atol=2e-1)


def test_a_network_in_torch_gives_the_same_images_as_its_exact_formula():
    class Gaussian(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return 0.5 * torch.ones_like(sample)  # x0 is 0.5 everywhere

    settings = {"name": "dpmpp_2m", "steps": 6, "prediction": "x0"}
    made = samplers.generate(settings, diffusion.runner(Gaussian(), at_once=2), np.zeros((5, 1, 4, 4)))
    assert np.allclose(made, 0.5)


def test_calibration_follows_the_way_from_noise_to_image_and_the_naive_one_does_not(network: str):
    model = loading.load_model(network)
    settings = samplers.of(model.options)
    latents = np.random.default_rng(0).standard_normal((4, 1, 16, 16)).astype(np.float32)
    runner = diffusion.runner(model.stage.module)
    found = samplers.trajectory(settings, runner, latents, 10)
    assert found["sample"].shape == (10, 1, 16, 16)
    assert sorted(set(found["timestep"])) == sorted(level.t for level in samplers.levels(settings)[:-1])
    assert np.array_equal(found["sample"][0], latents[0])
    naive = samplers.trajectory(settings, runner, latents, 10, naive=True)
    assert set(naive["timestep"]) == {999.0}
    assert not np.allclose(naive["sample"].std((1, 2, 3)), found["sample"].std((1, 2, 3)), atol=0.05)


def test_the_latency_of_an_image_is_that_of_all_its_runs():
    latency = Measurement("latency", "ms", 2.0, (1.5, 3.0), (1.0, 2.0, 4.0), conditions={"rounds": 3})
    settings = samplers.complete({"name": "heun", "steps": 4})
    whole = per_image(latency, settings)
    assert (whole.value, whole.interval, whole.samples) == (14.0, (10.5, 21.0), (7.0, 14.0, 28.0))
    assert whole.conditions["nfe"] == 7 and whole.conditions["ms_per_run"] == 2.0
    assert per_image(latency, None) is latency


@pytest.mark.parametrize("runtime", [*LOADERS, "coreml"])
def test_the_sample_script_is_a_program(network: str, runtime: str):
    model = loading.load_model(network)
    artifact = Artifact(runtime, Path("model.x"), (), PrecisionPlan(), 1, model.stage.inputs, model.stage.outputs)
    text = bundle_samples.script(model, artifact, "model.x", "my-target")
    compile(text, "run", "exec")
    assert "edgegen" not in text
    assert ('"file": \'model.onnx\'' in text) == (runtime == "coreml")


def bundled(model: Model, runtime: str, folder: Path) -> None:
    """Build a denoiser into folder / "b", with its script and its sampler."""
    made = onnx_graph.to_onnx(model.stage, folder / "graph" / "model.onnx")
    if getattr(registry.module("runtimes", runtime), "NEEDS_PROGRAM", False):
        made = dataclasses.replace(made, program=program.save(model.stage, folder / "graph" / "model.pt2"))
    target = Target("here", "", (runtime,), precisions=("fp32",), threads=1)
    settings = samplers.of(model.options)
    shape = (1, *(int(d) for d in model.stage.inputs[0].shape[1:]))
    feeds = samplers.feeds(settings, np.random.default_rng(0).standard_normal(shape))
    cured = rewriting.cures(made, runtime, target, feeds=feeds, out=folder / "cured.onnx")
    assert not cured.problems
    artifact = registry.module("runtimes", runtime).build(
        cured.graph, folder / "b" / "model", calibration=None, target=target)
    inside = dataclasses.replace(artifact, path=artifact.path.relative_to(folder / "b"))
    (folder / "b" / "run_here.py").write_text(bundle_samples.script(model, inside, str(inside.path), "here"))
    for name, file in samplers.sources(settings).items():
        (folder / "b" / "samplers").mkdir(exist_ok=True)
        (folder / "b" / "samplers" / Path(name).name).write_bytes(file.read_bytes())


def scripted(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-I", "run_here.py", "--count", "2", "--out", "made.npy", *more]
    return subprocess.run(command, cwd=folder / "b", capture_output=True, text=True, timeout=120)


CLASSES = '''
import torch
RECORD = {"task": "unconditional", "input": {"shape": [1, 1, 4, 4]}, "output": {"value_range": [-1, 1]},
          "weights": "factory", "options": {"prediction": "x0", "schedule": "cosine", "train_steps": 1000, "labels": 3,
                                            "sampler": {"name": "ddim", "steps": 2}}}
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.greys = torch.nn.Parameter(torch.tensor([-0.5, 0.0, 0.5, 0.9]))
    def forward(self, sample, timestep, label):
        return self.greys[label.long()].view(-1, 1, 1, 1) + 0 * sample + 0 * timestep.view(-1, 1, 1, 1)
def create():
    return Net()
'''


def test_the_sample_script_makes_the_class_it_is_asked_for_and_refuses_those_that_are_none(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.py").write_text(CLASSES, encoding="utf-8")
    bundled(loading.load_model(f"{tmp_path / 'net.py'}:create"), "onnxruntime", tmp_path)
    done = scripted(tmp_path, "--label", "2")
    assert done.returncode == 0, done.stderr
    assert np.allclose(np.load(tmp_path / "b" / "made.npy"), 0.5, atol=1e-5)
    done = scripted(tmp_path, "--label", "3")  # 3 is how the network is told "no class"
    assert done.returncode and done.stderr == "--label must be a class from 0 to 2, got 3\n"


@pytest.mark.filterwarnings("ignore")  # executorch and torchao warn at their import; a worker process does not mind
@pytest.mark.parametrize("runtime", [
    pytest.param(name, marks=pytest.mark.slow if name in ("litert", "executorch") else ())  # their converters take long
    for name in LOADERS if name != "tensorrt"
])  # fmt: skip
def test_the_sample_script_makes_the_images_in_every_runtime(runtime: str, network: str, tmp_path: Path):
    """A network with several inputs, built, and run by the script with numpy, the runtime and the copied sampler."""
    if registry.module("runtimes", runtime).missing():
        pytest.skip(f"{runtime} does not run here")
    model = loading.load_model(network)
    bundled(model, runtime, tmp_path)
    settings = samplers.of(model.options)
    latents = np.stack([np.random.default_rng([0, i]).standard_normal((1, 16, 16), dtype=np.float32) for i in range(2)])
    done = scripted(tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "b" / "made.npy")
    wanted = samplers.generate(settings, diffusion.runner(model.stage.module), latents)
    assert np.abs(found - wanted).max() < 5e-3
    assert np.abs(found - wanted[::-1]).max() > 5e-2  # the comparison can fail
    if runtime == "onnxruntime":  # the same line in all
        done = scripted(tmp_path, "--label", "0")
        assert done.returncode and done.stderr == "--label 0: this network has no classes; leave it out\n"


@pytest.mark.slow
def test_a_denoiser_is_compressed_judged_on_images_and_runs_from_its_bundle_alone(network: str, tmp_path: Path,
                                                                                    monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one.toml").write_text(
        'description = "this host"\nruntimes = ["onnxruntime"]\nis_host = true\n'
        'precisions = ["fp32", "int8"]\nthreads = 1\n', encoding="utf-8",
    )  # fmt: skip
    command = ["edgegen", "compress", "--quiet", "--model", network, "--target", "one.toml",
               "--recipe", "post-training", "--samples", "8",
               "--calibration-images", "4", "--max-quality-drop", "100000", "--out", "bundle",
               "--sampler", "dpmpp_2m", "--steps", "3"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["graph"]["sampler"]["name"] == "dpmpp_2m"
    report = (tmp_path / "bundle" / "report.json").read_text(encoding="utf-8")
    assert '"nfe": 3' in report
    command = [sys.executable, "bundle/run_one.py", "--count", "3", "--out", "made.npy"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "3 runs of the network" in done.stderr
    made = np.load(tmp_path / "made.npy")
    model = loading.load_model(network, options=ModelOptions(sampler={"name": "dpmpp_2m", "steps": 3}))
    latents = np.stack([np.random.default_rng([0, i]).standard_normal((1, 16, 16), dtype=np.float32) for i in range(3)])
    wanted = samplers.generate(samplers.of(model.options), diffusion.runner(model.stage.module), latents)
    if manifest["artifacts"][0]["plan"]["precision"] == "fp32":
        assert np.abs(made - wanted).max() < 1e-3
    else:
        assert np.abs(made - wanted).mean() < 0.2


def test_a_denoiser_calibrates_on_its_own_inputs(network: str, tmp_path: Path, monkeypatch, capsys):
    from edgegen import inputs
    from edgegen.request import Request

    with pytest.raises(DataError, match="give trajectory or naive"):
        inputs.prepare(Request(model=network, calibration="photos", samples=4), loading.load_model(network))
