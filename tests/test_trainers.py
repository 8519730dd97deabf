"""`edgegen train`: every kind of network learns something measurable, resumes bit for bit, and says what it needs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

import edgegen  # noqa: E402
from edgegen import cli, loading, samplers, trainers, training  # noqa: E402
from edgegen.errors import DataError, ModelError, RecipeError  # noqa: E402
from edgegen.nn import diffusion, discriminators  # noqa: E402

NETWORKS = '''
import torch
from torch import nn
from edgegen.models import sinddm, dcgan
from edgegen.nn import conditional as conditional_inputs
class Conditional(nn.Module):
    """Four numbers and a class, the larger of the last two, to a grey square whose brightness follows the class."""
    def __init__(self):
        super().__init__()
        self.made, self.embed = nn.Linear(4, 64), nn.Embedding(2, 64)
        nn.init.zeros_(self.embed.weight)
    def forward(self, z):
        z, hot = conditional_inputs.split(z, None, 4, 2, "joined")
        return torch.tanh(self.made(z) + hot @ self.embed.weight).unflatten(1, (1, 8, 8))
GREY = {"shape": [1, 1, 8, 8], "value_range": [0, 1], "mean": [], "std": []}
RECORDS = {
    "denoiser": {**sinddm.RECORD, "input": {"shape": [1, 1, 8, 8]}, "output": {"value_range": [-1, 1]},
        "options": {"prediction": "v", "schedule": "cosine", "train_steps": 1000,
                    "sampler": {"name": "ddim", "steps": 20}}},
    "generator": {**dcgan.RECORD, "input": {"shape": [1, 4]}, "output": {"value_range": [-1, 1]}},
    "conditional": {**dcgan.RECORD, "input": {"shape": [1, 6]}, "output": {"value_range": [-1, 1]},
        "options": {"labels": 2}},
    "classifier": {"task": "classification", "input": GREY},
    "restorer": {"task": "restoration", "input": GREY, "output": {"value_range": [0, 1]}},
}
def denoiser(): return sinddm.create(channels=1, width=8, blocks=2)
def generator(): return nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
def conditional(): return Conditional()
def classifier(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
def restorer(): return nn.Conv2d(1, 1, 3, padding=1)
'''


@pytest.fixture
def order(tmp_path: Path):
    (tmp_path / "nets.py").write_text(NETWORKS, encoding="utf-8")
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = (np.where(y[:, None, None, None] == 1, 200, 40) + rng.integers(-20, 20, (40, 8, 8, 1))).astype(np.uint8)
    np.savez(tmp_path / "labelled.npz", x=x, y=y)
    np.savez(tmp_path / "plain.npz", x=x[y == 1])
    np.savez(tmp_path / "pairs.npz", x=x, y=255 - x)

    def make(name: str, file: str, **more) -> trainers.Order:
        return trainers.Order(f"{tmp_path / 'nets.py'}:{name}", tmp_path / file, tmp_path / f"{name}.safetensors",
                              **{"batch": 8, "precision": "fp32", "threads": 1, "ema": 0.9, **more})  # fmt: skip

    return make


def test_a_denoiser_learns_the_brightness_of_its_images(order):
    made = order("denoiser", "plain.npz", steps=100, lr=5e-3)
    record = trainers.train(made)
    assert record["curve"][-1][1] < 0.5 * record["curve"][0][1]
    assert json.loads(made.out.with_suffix(".json").read_text())["weights_sha256"] == record["weights_sha256"]
    model = loading.load_model(made.model, weights=made.out)
    latents = np.random.default_rng(1).standard_normal((16, 1, 8, 8)).astype(np.float32)
    images = samplers.generate(samplers.of(model.options), diffusion.runner(model.stage.module), latents)
    assert images.mean() == pytest.approx(200 / 127.5 - 1, abs=0.2)


def test_a_generator_learns_the_brightness_of_its_images(order):
    made = order("generator", "plain.npz", steps=200, lr=1e-2)
    trainers.train(made)
    module = loading.load_model(made.model, weights=made.out).stage.module
    with torch.no_grad():
        brightness = float(module(torch.randn(64, 4)).mean())
    assert brightness == pytest.approx(200 / 127.5 - 1, abs=0.25)
    assert len(load_file(made.out)) == len(module.state_dict())  # the discriminator is not among the weights


def test_a_conditional_generator_learns_which_class_is_which(order, tmp_path: Path):
    made = order("conditional", "labelled.npz", steps=200, lr=2e-2)
    trainers.train(made)
    module = loading.load_model(made.model, weights=made.out).stage.module
    z = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        brightness = [float(module(z)[z[:, 4:].argmax(1) == label].mean()) for label in (0, 1)]
    assert brightness == pytest.approx([40 / 127.5 - 1, 200 / 127.5 - 1], abs=0.25)
    with pytest.raises(DataError, match=r"has no class labels .* conditional draws images of 2 classes"):
        trainers.train(order("conditional", "plain.npz", steps=2))
    np.savez(tmp_path / "three.npz", x=np.zeros((3, 8, 8, 1), np.uint8), y=np.arange(3))
    with pytest.raises(DataError, match="has 3 classes, and conditional draws images of 2 classes"):
        trainers.train(order("conditional", "three.npz", steps=2))


def test_the_critic_sees_images_of_any_size_and_the_class():
    for size in ((28, 28), (5, 5), (32, 32), (9, 30)):
        critic = discriminators.Critic(1, size, width=4)
        assert critic(torch.zeros(3, 1, *size)).shape == (3,)
    torch.manual_seed(0)
    critic = discriminators.Critic(1, (28, 28), classes=3, width=4).eval()
    image, labels = torch.rand(1, 1, 28, 28).expand(3, -1, -1, -1), torch.arange(3)
    summed = critic.layers(image).sum((2, 3))
    plain = critic.score(critic.layers(image)).flatten()
    wanted = 8 * (plain + (critic.embed.weight * summed).sum(1))
    assert torch.allclose(critic(image, labels), wanted, atol=1e-5)
    assert not torch.allclose(critic(image, labels.flip(0)), wanted, atol=1e-5)


def test_classifiers_and_restorers_learn(order):
    classified = trainers.train(order("classifier", "labelled.npz", steps=60, lr=5e-2))
    restored = trainers.train(order("restorer", "pairs.npz", steps=150, lr=3e-2))
    assert classified["curve"][-1][1] < 0.3
    assert restored["curve"][-1][1] < 0.3 * restored["curve"][0][1]


@pytest.fixture
def interrupt(monkeypatch):
    """order -> the checkpoint that is left of it when it is interrupted at step 7."""
    original = training.train

    def stopping(module, loss, batch_at, **more):
        def stopped(module, batch, step):
            if step == 7:
                raise KeyboardInterrupt
            return loss(module, batch, step)

        return original(module, stopped, batch_at, **{**more, "every_s": 0.0})

    def interrupted(order: trainers.Order) -> Path:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(training, "train", stopping)
            trainers.train(order)
        return order.out.with_suffix(".checkpoint")

    return interrupted


def test_an_interrupted_training_ends_with_the_same_bits(order, interrupt):
    whole = order("denoiser", "plain.npz", steps=12)
    trainers.train(whole)
    wanted = load_file(whole.out)
    cut = dataclasses.replace(whole, out=whole.out.with_name("cut.safetensors"))
    assert interrupt(cut).is_file()
    trainers.train(dataclasses.replace(cut, resume=True))
    found = load_file(cut.out)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = dataclasses.replace(whole, seed=1, out=whole.out.with_name("other.safetensors"))
    trainers.train(other)
    assert not all(torch.equal(load_file(other.out)[name], wanted[name]) for name in wanted)


def test_a_training_is_resumed_by_the_command_that_was_interrupted_alone(order, interrupt, tmp_path: Path):
    cut = order("restorer", "pairs.npz", steps=12, lr=1e-2)
    checkpoint = interrupt(cut)
    kept = checkpoint.read_bytes()
    with np.load(cut.data) as arrays:
        np.savez(tmp_path / "other.npz", x=arrays["x"], y=arrays["y"] // 2)  # the same x, other references
        np.savez(tmp_path / "moved.npz", x=arrays["x"], y=arrays["y"])
    for change, said in (
        ({"batch": 4}, r"batch 8 there, 4 here\)"),
        ({"steps": 24, "lr": 2e-2}, r"steps 12 there, 24 here; lr 0\.01 there, 0\.02 here\)"),
        ({"data": tmp_path / "other.npz"}, r"\(data \w+ there, \w+ here\)"),
    ):
        with pytest.raises(RecipeError, match=said) as caught:
            trainers.train(dataclasses.replace(cut, resume=True, **change))
        assert "\n" not in str(caught.value) and "start anew without resuming" in str(caught.value)
        assert checkpoint.read_bytes() == kept
    found = trainers.train(dataclasses.replace(cut, resume=True, data=tmp_path / "moved.npz"))
    assert found["steps"] == 12 and not checkpoint.exists()


def test_what_does_not_fit_is_one_line(order, tmp_path: Path):
    with pytest.raises(DataError, match="classification learns from class labels"):
        trainers.train(order("classifier", "plain.npz"))
    with pytest.raises(ModelError, match=r"weights are written as \.safetensors"):
        trainers.train(dataclasses.replace(order("denoiser", "plain.npz"), out=tmp_path / "w.pt"))


@pytest.mark.parametrize(("name", "config", "side"), [
    ("cgan", {"width": 4}, 28),
    ("cgan", {"width": 4, "label": "index"}, 28),
    ("sagan", {"size": 8, "latent": 4, "classes": 10, "width": 4, "attention": 0}, 8),
    ("sagan", {"size": 8, "latent": 4, "classes": 10, "width": 4, "attention": 0, "label": "one-hot"}, 8),
])  # fmt: skip
def test_the_conditional_generators_train(name: str, config: dict, side: int, tmp_path: Path):
    x = np.random.default_rng(0).integers(0, 255, (20, side, side, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(20) % 10)
    np.savez(tmp_path / "plain.npz", x=x)
    order = trainers.Order(name, tmp_path / "x.npz", tmp_path / "w.safetensors", steps=2, batch=4, precision="fp32",
                           threads=1, options=loading.ModelOptions(config=config))  # fmt: skip
    assert trainers.train(order)["steps"] == 2
    with pytest.raises(DataError, match="has no class labels"):
        trainers.train(dataclasses.replace(order, data=tmp_path / "plain.npz"))


def test_image_to_image_learns_from_pairs(tmp_path: Path):
    x = np.random.default_rng(0).integers(0, 255, (4, 40, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "pairs.npz", x=x, y=255 - x)
    np.savez(tmp_path / "alone.npz", x=x)
    options = loading.ModelOptions(config={"width": 2, "levels": 5}, input_shape=(1, 3, 32, 32), resize=32,
                                   crop=(32, 32))  # fmt: skip
    order = trainers.Order("pix2pix", tmp_path / "pairs.npz", tmp_path / "w.safetensors", steps=2, batch=2, threads=1,
                           precision="fp32", options=options)  # fmt: skip
    assert trainers.train(order)["steps"] == 2
    assert loading.load_model("pix2pix", weights=order.out, options=options).stage.outputs[0].shape == (1, 3, 32, 32)
    with pytest.raises(DataError, match=r"image-to-image learns from reference images \(y\)"):
        trainers.train(dataclasses.replace(order, data=tmp_path / "alone.npz"))


def test_the_command(order, tmp_path: Path, monkeypatch, capsys):
    made = order("classifier", "labelled.npz")
    monkeypatch.setattr(sys, "argv", ["edgegen", "train", "--model", made.model, "--data", str(made.data), "--out",
                                      str(made.out), "--steps", "3", "--quiet", "--threads", "1"])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "3 steps in" in capsys.readouterr().out
    told = json.loads(made.out.with_suffix(".json").read_text(encoding="utf-8"))
    other = made.out.with_name("python.safetensors")
    record = edgegen.train(made.model, data=made.data, out=str(other), steps=3, threads=1, progress=False)
    assert record["weights_sha256"] == told["weights_sha256"] and record["curve"] == told["curve"]
    with pytest.raises(RecipeError, match="muun"):
        edgegen.train(made.model, data=made.data, out=other, optimizer="muun", progress=False)


def test_the_command_trains_a_network_of_other_sizes_with_another_optimizer(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("diffusers", reason="dit is diffusers'")
    x = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(16) % 10)

    def run(*more: str) -> int:
        files = ["--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "dit.safetensors")]
        command = ["edgegen", "train", "--model", "dit", *files, "--steps", "2", "--quiet", *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    sizes = "size=8,patch=2,layers=1,heads=2,head_width=8"
    assert run("--config", sizes, "--optimizer", "muon") == 0
    record = json.loads((tmp_path / "dit.json").read_text(encoding="utf-8"))
    assert record["optimizer"] == "muon" and record["origin"]["config"]["size"] == 8
    assert load_file(tmp_path / "dit.safetensors")["net.pos_embed.proj.weight"].shape == (16, 3, 2, 2)
    capsys.readouterr()
    assert run("--config", sizes, "--optimizer", "adagrad") == 2
    assert "optimizer must be one of adamw, adam, sgd, muon, got 'adagrad'" in capsys.readouterr().err
