"""Early stopping on the task's metric: what a recipe's `every` asks is the gate's figure on the part that decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgegen import graph, run, run_jobs, run_quality, steps  # noqa: E402
from edgegen.errors import DataError  # noqa: E402
from edgegen.request import Request  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORKS = '''
from torch import nn
GREY = {"shape": [1, 1, 8, 8], "value_range": [0, 1], "mean": [], "std": []}
RECORDS = {
    "classifier": {"task": "classification", "input": GREY, "output": {"shape": [1, 2]}},
    "restorer": {"task": "restoration", "input": GREY, "output": {"value_range": [0, 1]}},
    "generator": {"task": "unconditional", "input": {"shape": [1, 4]}, "output": {"value_range": [-1, 1]}},
}
def classifier(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
def restorer(): return nn.Conv2d(1, 1, 3, padding=1)
def generator(): return nn.Sequential(nn.Linear(4, 192), nn.Tanh(), nn.Unflatten(1, (3, 8, 8)))
'''


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call with a network's name (and options of its distillation): a run of it."""
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nets.py").write_text(NETWORKS, encoding="utf-8")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (60, 8, 8, 1)).astype(np.uint8), np.arange(60) % 2
    np.savez(tmp_path / "classifier.npz", x=x, y=y)
    np.savez(tmp_path / "restorer.npz", x=x, y=255 - x)

    def make(name: str, **options: Any) -> run.Run:
        given = ", ".join(f"{key} = {value}" for key, value in {"steps": 4, "batch": 4, **options}.items())
        recipe = tmp_path / "r.toml"
        recipe.write_text(f"schema = 1\n[[steps]]\npass = 'distill'\noptions = {{ {given}, precision = 'fp32' }}\n")
        torch.manual_seed(1)
        exec(NETWORKS, space := {})
        module = space[name]()
        torch.save(module.state_dict(), tmp_path / f"{name}.pth")
        data = tmp_path / f"{name}.npz"
        request = Request(
            model=f"{tmp_path / 'nets.py'}:{name}", weights=tmp_path / f"{name}.pth", recipe=str(recipe), samples=20,
            data=data if data.exists() else None, out=tmp_path / "out", threads=1,
        )  # fmt: skip
        return run.open_run(request, run.quiet)

    return make


def distilled(opened: run.Run) -> Any:
    (step,) = opened.recipe.steps
    return steps.run_step(step, opened.model, opened.model, run_jobs.job_of(opened), run.data_key(opened))


def test_a_classifier_is_judged_by_top1_on_images_that_it_does_not_learn_from(opened: Any):
    found = opened("classifier", losses='["labels"]', lr=0.1, every=2)
    result = distilled(found)
    scores = dict(result.notes["scores"])
    assert set(scores) == {2, 4}
    samples = [found.data.select[i] for i in range(len(found.data.select))]
    logits = graph.outputs(result.model.stage.module, [torch.from_numpy(np.stack([s.input for s in samples]))])[0]
    right = (logits.argmax(1).numpy() == [s.label for s in samples]).mean()
    assert scores[result.notes["best_step"]] == pytest.approx(-right, abs=1e-9)  # more is better, scores are not
    assert not found.data.select.keys() & (found.data.train.keys() | found.data.test.keys())


def test_a_restorer_is_judged_by_the_figure_of_its_gate(opened: Any):
    found = opened("restorer")
    figure = run_jobs.job_of(found).quality(found.model)
    assert (figure.name, figure.direction) == ("PSNR to the reference", "higher")
    select = [found.data.select[i] for i in range(len(found.data.select))]
    made = graph.outputs(found.model.stage.module, [torch.from_numpy(np.stack([s.input for s in select]))])[0].numpy()
    wrong = [((m.clip(0, 1) - s.reference) ** 2).mean() for m, s in zip(made, select, strict=True)]
    assert figure.value == pytest.approx(np.mean(-10 * np.log10(wrong)), abs=1e-3)


def test_a_generator_is_judged_by_its_distance_to_other_samples_of_the_teacher(opened: Any):
    found = opened("generator")
    job = run_jobs.job_of(found)
    same = job.quality(found.model)
    worse = graph.clone(found.model.stage.module)
    with torch.no_grad():
        worse[0].weight.zero_()
    assert same.name == "KID"
    assert job.quality(found.model.with_module(worse)).value > same.value


def test_without_data_and_for_denoisers_there_is_none(opened: Any):
    found = opened("classifier")
    unjudged = dataclasses.replace(found, data=dataclasses.replace(found.data, select=None))
    assert run_quality.judge(unjudged) is None
    options = {"prediction": "v", "schedule": "cosine", "sampler": {"name": "ddim", "steps": 20}}
    loop = dataclasses.replace(found, model=dataclasses.replace(found.model, options=options))
    assert run_quality.judge(loop) is None


def test_other_data_to_judge_on_are_another_result_only_where_it_was_asked(opened: Any):
    for options, again in (({"every": 2}, False), ({}, True)):
        found = opened("classifier", **options)
        distilled(found)
        fewer = dataclasses.replace(found, data=dataclasses.replace(found.data, select=found.data.select.select(5, 0)))
        assert (distilled(fewer).notes.get("from") == "cache") is again


def test_a_denoiser_of_few_steps_is_judged_on_enough_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("diffusers")
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    recipe, found = tmp_path / "r.toml", {}
    for name, more in (("distill_steps", {}), ("cache_steps", {}), ("distill_steps", {"samples": 30})):
        recipe.write_text(f"schema = 1\n[[steps]]\npass = '{name}'\n")
        request = Request(model="ddpm_unet", recipe=str(recipe), out=tmp_path / "out", **more)
        found[name, *more] = len(run.open_run(request, run.quiet).data.test)
    assert found == {("distill_steps",): 2000, ("cache_steps",): 200, ("distill_steps", "samples"): 30}


def test_unknown_features_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="unknown feature extractor 'none'"):
        run.open_run(Request(model="dcgan", features="none", out=tmp_path / "out"), run.quiet)
    assert not (tmp_path / "runs").exists()
