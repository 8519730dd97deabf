"""A step that learns from another network than the original."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="passes need the extra `torch`")

from torch import nn  # noqa: E402

from edgegen import graph, loading, recipe, steps  # noqa: E402
from edgegen.errors import ModelError, RecipeError  # noqa: E402
from edgegen.types import Job, Model, Target  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = """
from torch import nn

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 8, 8], "value_range": RANGE, "mean": [], "std": [], "colour": "RGB"},
    "output": {"shape": [1, 3, 8, 8], "value_range": [0, 1]},
    "licence": "MIT", "source": "a test",
}


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1))


def large():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The network; beside it a larger one with weights, and one for other inputs."""
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, span in (("nets.py", "[0, 1]"), ("others.py", "[-1, 1]")):
        Path(name).write_text(NETWORKS.replace("RANGE", span))
    torch.manual_seed(1)
    large = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    torch.save(large.state_dict(), "large.pth")
    torch.save({key: value + 1 for key, value in large.state_dict().items()}, "moved.pth")
    torch.manual_seed(2)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)).state_dict(), "small.pth")
    return loading.load_model("nets.py:small", weights=Path("small.pth"))


def learned(small: Model, **more: str) -> Model:
    step = recipe.Step(name="distill", options={"steps": 60, "batch": 8, "lr": 1e-2, "precision": "fp32"}, **more)
    job = Job(Target("t", "", ()), teacher=small, threads=1)
    return steps.run_step(step, small, small, job, "data").model


def apart(a: Model, b: Model) -> float:
    inputs = graph.example_inputs(a.stage, seed=5, batch=4)
    pairs = zip(graph.outputs(a.stage.module, inputs), graph.outputs(b.stage.module, inputs), strict=True)
    return sum(float((one - other).abs().mean()) for one, other in pairs)


def test_it_becomes_like_that_teacher_and_another_one_makes_another_network(small: Model):
    large = loading.load_model("nets.py:large", weights=Path("large.pth"))
    found = learned(small, teacher="nets.py:large", teacher_weights="large.pth")
    assert apart(found, large) < 0.5 * apart(small, large)
    assert apart(learned(small), small) < 0.05  # its own teacher is itself
    moved = learned(small, teacher="nets.py:large", teacher_weights="moved.pth")
    assert apart(moved, found) > 0.1, "taken from the cache of another teacher"


def test_a_teacher_that_does_not_fit_is_one_line(small: Model):
    step = recipe.Step(name="distill", teacher="others.py:large", teacher_weights="large.pth")
    with pytest.raises(RecipeError, match=r"distill: teacher others.py:large does not fit: inputs .*; value_range "):
        steps.teacher_of(step, small)
    wide = dataclasses.replace(small, task="restoration")
    with pytest.raises(RecipeError, match="does not fit: task image-to-image, small restoration"):
        steps.teacher_of(step.model_copy(update={"teacher": "nets.py:large"}), wide)
    with pytest.raises(ModelError, match=r"large\.pth"):
        steps.teacher_of(step.model_copy(update={"teacher": "nets.py:small"}), small)
