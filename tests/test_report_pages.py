"""Reports of whole small runs in a browser: a generator as in the demo, a classifier, a diffusion model.

Each run is the installed program in a process of its own, with its own memory, as a user starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import test_report
import user_network

pytest.importorskip("torch", reason="compress needs the extra `torch`")
pytest.importorskip("onnxruntime", reason="these runs build for ONNX Runtime")
# a whole run, on a machine that may have other work: half a minute alone
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLASSIFIER = '''
import torch
from torch import nn

RECORD = {
    "task": "classification",
    "input": {"shape": [1, 3, 16, 16], "value_range": [0, 1], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "output": {"shape": [1, 2]}, "weights": "factory", "licence": "CC0-1.0", "source": "made for a test",
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
'''
DENOISER = '''
import torch
from edgegen.models import sinddm

RECORD = {
    **sinddm.RECORD, "input": {"shape": [1, 1, 16, 16]}, "output": {"value_range": [-1, 1]}, "weights": "factory",
    "options": {"features": "mnist", "prediction": "v", "schedule": "cosine", "train_steps": 1000,
                "sampler": {"name": "ddim", "steps": 3}},
}


def net():
    torch.manual_seed(0)
    return sinddm.create(channels=1, width=8, blocks=2)
'''
POST = 'schema = 1\n[[steps]]\npass = "quantize"\noptions = { formats = ["u8s8"] }\n'
KEEP = ("--keep", "quantize")  # untrained networks need not be faster in INT8
THOROUGH = "--thorough"  # on a slow machine the curve would have fewer points
FORMAT = 'options = { formats = ["u8s8"] }\n'
PLOTS = ["latency samples", "efficiency gap", "waterline"]


def generator(folder: Path) -> tuple[str, ...]:
    """The demo's kind: pruned, distilled, quantized, with pictures."""
    arguments = user_network.write(folder)
    (folder / "one.toml").write_text(user_network.TARGET.replace("threads = 1", "threads = 2"))
    (folder / "recipe.toml").write_text(user_network.RECIPE + FORMAT)
    return arguments


def classifier(folder: Path) -> tuple[str, ...]:
    """Two classes, dark and light, in folders of their own."""
    from PIL import Image

    (folder / "net.py").write_text(CLASSIFIER)
    (folder / "one.toml").write_text(user_network.TARGET)
    (folder / "recipe.toml").write_text(POST)
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(low, low + 127, (16, 16, 3), dtype=np.uint8)).save(
                folder / "images" / name / f"{i}.png"
            )
    return ("--model", "net.py:net", "--data", "images", "--target", "one.toml", "--recipe", "recipe.toml",
            "--max-quality-drop", "60", "--calibration-images", "8", *KEEP)  # fmt: skip


def diffusion(folder: Path) -> tuple[str, ...]:
    """Three steps from noise to an image."""
    (folder / "net.py").write_text(DENOISER)
    (folder / "one.toml").write_text(user_network.TARGET)
    (folder / "recipe.toml").write_text(POST)
    return ("--model", "net.py:net", "--target", "one.toml", "--recipe", "recipe.toml", "--samples", "8",
            "--max-quality-drop", "100000", "--calibration-images", "8", *KEEP)  # fmt: skip


@pytest.fixture(scope="module", params=[generator, classifier, diffusion], ids=lambda kind: kind.__name__)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(kind, its bundle)."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind.__name__)
    command = [sys.executable, "-m", "edgegen.cli", "compress", "--quiet", *kind(folder), THOROUGH, "--out", "made"]
    environment = {**os.environ, "EDGEGEN_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return kind.__name__, folder / "made"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with browser.browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def told(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "report.json").read_text(encoding="utf-8"))


def test_the_page_is_whole_in_a_browser(made: tuple[str, Path], tab: Any) -> None:
    """No console error, no request, every plot drawn, every image loaded, every number that of report.json."""
    kind, bundle = made
    report = told(bundle)
    for options in ({}, {"dark": True}, {"width": 390, "height": 844}):
        seen = tab.open(bundle / "report.html", **options)
        assert test_report.wrong_in(seen, report) == []
        assert [name for name, _ in seen.answer["plots"]] == [*PLOTS, "calibration curve"]
        assert len(seen.answer["images"]) == {"generator": 2, "classifier": 0, "diffusion": 2}[kind]
        assert len(seen.answer["numbers"]) > 50
        shown = {path for path, _ in seen.answer["numbers"]}
        assert {"result.latency.value", "result.size_bytes", "result.quality.0.value"} <= shown


def test_the_page_answers_what_a_reader_asks(made: tuple[str, Path], tab: Any) -> None:
    """Faster or not, by how much, than what, on which device, at what cost in quality, and what to do next."""
    kind, bundle = made
    report = told(bundle)
    tab.open(bundle / "report.html")
    shown = tab.call("Runtime.evaluate", expression="document.body.innerText")["result"]["value"]
    sentence = report["headline"]
    assert sentence in shown
    for expected in ("x faster", "x slower", "nothing faster"):
        if expected in sentence:
            break
    else:
        raise AssertionError(sentence)
    assert "the best unquantized build (onnxruntime fp32)" in sentence
    figure = {"generator": "PSNR to the teacher", "classifier": "top-1", "diffusion": "KID"}[kind]
    assert f"; {figure} " in sentence
    assert f"on {report['machine']['cpu_model']}, " in shown
    assert "What to do next" in shown


def test_the_curve_ends_at_the_chosen_build(made: tuple[str, Path]) -> None:
    kind, bundle = made
    report = told(bundle)
    points = report["calibration_curve"]
    assert [p["images"] for p in points] == ([1, 2, 4] if kind == "generator" else [1, 2, 4, 8])
    assert all(p["quality"]["status"] == "measured" for p in points)
    name = points[-1]["quality"]["name"]
    assert points[-1]["quality"]["value"] == next(q["value"] for q in report["result"]["quality"] if q["name"] == name)
    assert report["calibration_reason"] == ""


def test_throughput_is_measured_with_two_threads_and_not_with_one(made: tuple[str, Path]) -> None:
    kind, bundle = made
    (rate,) = told(bundle)["result"]["throughput"]
    if kind != "generator":
        assert (rate["status"], rate["reason"][:25]) == ("not measured", "the target has one thread")
        return
    assert (rate["conditions"]["streams"], rate["conditions"]["threads"], rate["status"]) == (2, 1, "measured")
    assert rate["interval"][0] <= rate["value"] <= rate["interval"][1]
    assert len(rate["samples"]) == 5


def test_the_plan_was_right_to_a_factor_of_three(made: tuple[str, Path]) -> None:
    """The report keeps what the plan said beside what was used."""
    report = told(made[1])
    cost, machine = report["cost"], report["machine"]
    assert cost["resumed"] is False
    busy = machine.get("load", 0) > 1.5 * machine["cores"]  # then the time is that of what else ran
    for name, predicted in cost["predicted"].items():
        if name == "seconds" and busy:
            continue
        assert 1 / 3 < predicted / cost["used"][name] < 3, (name, cost)
