"""Spaces as data, fronts and the points picked from them, limits out of reach, and one small search from end to end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgegen import cli, cli_search, measuring, recipe, registry
from edgegen.errors import BudgetError, UsageError
from edgegen.search import front, measured, session, spaces
from edgegen.search.order import Order
from edgegen.search.store import DONE, FAILED, Figures, Row
from edgegen.types import Budget

TINY: dict[str, Any] = {
    "schema": 1,
    "order": ["prune_channels", "distill", "quantize"],
    "options": {"distill": {"batch": 4}},
    "genes": [
        {"name": "channels", "pass": "prune_channels", "option": "ratio", "choices": [0.0, 0.5, 0.75], "off": 0.0},
        {"name": "training", "pass": "distill", "option": "steps", "choices": [0, 10], "off": 0},
        {"name": "int8", "pass": "quantize", "option": "precision", "choices": ["float", "int8"], "off": "float"},
    ],
}
SPACE = spaces.parse(TINY, "tiny.toml")


@pytest.mark.parametrize("name", registry.names("spaces"))
def test_every_built_in_space_is_sound_and_its_ends_are_recipes(name: str) -> None:
    space = spaces.load(name)
    assert space.description
    dense = dict.fromkeys(("model.1", "model.7", "model.10.conv_block.1"), "Conv2d")
    layers = dense | dict.fromkeys(("project.0", "up1.0", "up2.0", "model.19"), "ConvTranspose2d")
    fitted, left = spaces.fitted(space, layers)
    assert not left
    ends = [spaces.to_recipe(fitted, one, layers) for one in spaces.extremes(fitted)]
    assert len({recipe.to_toml(one) for one in ends}) == len(ends)
    for one in ends:
        recipe.check(one, name)
    assert {step.name for step in ends[1].steps} == {gene.pass_name for gene in space.genes}


def test_what_changes_nothing_is_no_other_candidate() -> None:
    def made(channels: int, training: int, int8: int) -> list[str]:
        found = spaces.to_recipe(SPACE, {"channels": channels, "training": training, "int8": int8}, {})
        return [step.name for step in found.steps]

    assert made(0, 0, 0) == made(0, 1, 0) == []
    assert made(0, 1, 1) == ["quantize"]
    assert made(1, 0, 0) == ["prune_channels"]
    assert made(2, 1, 1) == ["prune_channels", "distill", "quantize"]
    full = spaces.to_recipe(SPACE, {"channels": 2, "training": 1, "int8": 0}, {})
    assert [step.options for step in full.steps] == [{"ratio": 0.75}, {"batch": 4, "steps": 10}]


def test_a_gene_for_layers_gives_a_table_and_is_left_out_where_there_are_none() -> None:
    gene = {"name": "inside", "pass": "prune_channels", "option": "ratios", "layers": ["body.*.conv1"],
            "choices": [0.0, 0.5], "off": 0.0}  # fmt: skip
    space = spaces.parse({**TINY, "genes": [gene, TINY["genes"][2]], "order": [], "options": {}}, "t")
    layers = {"head": "Conv2d", "body.0.conv1": "Conv2d", "body.1.conv1": "Conv2d"}
    found = spaces.to_recipe(space, {"inside": 1, "int8": 0}, layers)
    assert found.steps[0].options == {"ratios": {"body.0.conv1": 0.5, "body.1.conv1": 0.5}}
    fitted, left = spaces.fitted(space, {"head": "Conv2d"})
    assert [gene.name for gene in fitted.genes] == ["int8"]
    assert left == {"inside": "no layer of the network matches body.*.conv1"}
    with pytest.raises(UsageError, match="fits the network nowhere"):
        spaces.fitted(space.model_copy(update={"genes": space.genes[:1]}), {})


def _gene(**changed: Any) -> dict[str, Any]:
    return {**TINY, "genes": [{**TINY["genes"][0], **changed}], "order": [], "options": {}}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        pytest.param(_gene(choices=[]), r"t: genes.0.choices: .* at least 1 item", id="no choices"),
        pytest.param(_gene(choices=[0.0, 0.5, 0.5]), "t: genes.0: gene channels: choices must all differ", id="twice"),
        pytest.param(_gene(off=0.9), r"off must be one of its choices \[0.0, 0.5, 0.75\], got 0.9", id="off"),
        pytest.param(_gene(option="ration"), "has no option 'ration', did you mean 'ratio'", id="option"),
        pytest.param(_gene(**{"pass": "prune"}), "unknown pass 'prune'", id="pass"),
        pytest.param(_gene(choises=[1]), "genes.0.choises: unknown field, did you mean 'choices'", id="field"),
        pytest.param(_gene(choices=[0.0, "much"]), "ratio must be a number, got 'much'", id="value"),
        pytest.param({**TINY, "schema": 2}, "space schema must be 1, got 2", id="schema"),
        pytest.param({**TINY, "order": ["cast"]}, "'cast' in order or options is the pass of no gene", id="order"),
        pytest.param({**TINY, "genes": [*TINY["genes"], TINY["genes"][0]]}, "two genes are named", id="name"),
        pytest.param({"schema": 1}, "genes: Field required", id="no genes"),
        pytest.param({**TINY, "options": {"distill": {"step": 1}}}, "distill has no option 'step'", id="fixed option"),
    ],
)
def test_a_space_with_an_error_is_one_line(table: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        spaces.parse(table, "t")
    assert "\n" not in str(caught.value)


def test_an_unknown_space_names_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown space 'recipes', did you mean 'recipe'"):
        spaces.load("recipes")
    (tmp_path / "s.toml").write_text("genes = [")
    with pytest.raises(UsageError, match="not a readable TOML file"):
        spaces.load(str(tmp_path / "s.toml"))


def _row(slot: int, ratio: float, drop: float | None, size: int = 100, **more: Any) -> Row:
    figures = Figures(10 * ratio, ratio, drop, size, **more)
    state = FAILED if figures.failure else DONE
    return Row(f"k{slot}", slot, slot, {"channels": slot % 3, "training": 1, "int8": 0}, state, figures=figures)


ROWS = [
    _row(0, 1.0, 0.0, 400), _row(1, 0.5, 0.5, 200), _row(2, 0.6, 0.6, 200), _row(3, 0.4, 2.0), _row(4, 0.1, None),
    _row(5, 0.2, 0.1, stopped="slow"), _row(6, 0.1, 0.1, failure="no build"), _row(7, 0.5, 0.5, 200),
]  # fmt: skip


def test_the_front_is_what_nothing_beats_inside_the_limits() -> None:
    assert [row.slot for row in front.best(ROWS, Budget())] == [3, 1, 0]
    assert [row.slot for row in front.best(ROWS, Budget(max_quality_drop=1.0))] == [1, 0]
    assert [row.slot for row in front.best(ROWS, Budget(max_latency_ms=5.0))] == [3, 1]


def _written(folder: Path) -> Path:
    found = front.best(ROWS, Budget())
    content = front.Front(model="edsr", target="cpu", unit="dB", points=tuple(front.points(found, SPACE)))
    return front.write(folder, content, found, SPACE, {})


def test_a_front_is_read_back_and_the_best_point_inside_the_limits_is_picked(tmp_path: Path) -> None:
    path = _written(tmp_path / "front")
    found = front.read(path)
    assert [point.name for point in found.points] == ["01", "02", "03"]
    assert front.pick(found, Budget(max_latency_ms=8.0)).name == "02"
    assert front.pick(found, Budget()).name == "03"
    with pytest.raises(BudgetError, match=r"nearest: 01 with 4 ms, 0.0001 MB, drop 2 dB; it breaks --max-latency"):
        front.pick(found, Budget(max_latency_ms=3.0))
    told = recipe.load(str(path.parent / found.points[1].recipe))
    assert [step.name for step in told.steps] == ["prune_channels", "distill"]
    file, keep, limits = cli_search.picked(path, "edsr", "cpu", "", Budget(max_latency_ms=8.0))
    assert (Path(file).name, keep) == ("02.toml", ["prune_channels", "distill"])
    assert limits == Budget(8.0, None, 1.0), "twice what the search found, on other data"
    assert front.allowed(found.model_copy(update={"default_drop": 2.0}), found.points[1], None) == 2.0
    assert front.allowed(found, found.points[1], 0.3) == 0.3


def test_a_front_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    path = _written(tmp_path)
    with pytest.raises(UsageError, match="is the front of --model edsr, got dcgan"):
        cli_search.picked(path, "dcgan", "cpu", "", Budget())
    with pytest.raises(UsageError, match="gives the recipe, got --recipe balanced too"):
        cli_search.picked(path, "edsr", "cpu", "balanced", Budget())
    path.write_text(json.dumps({"schema": 9}))
    with pytest.raises(UsageError, match="schema must be 1, got 9"):
        front.read(path)
    path.write_text(json.dumps({"schema": 1, "model": "edsr", "target": "cpu", "unit": "dB", "points": [{"name": 3}]}))
    with pytest.raises(UsageError, match=r"points.0.name: .* got 3"):
        front.read(path)
    with pytest.raises(UsageError, match=r"not a readable front\.json"):
        front.read(tmp_path / "none.json")


def test_the_page_has_the_front(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: report)")
    content = front.read(_written(tmp_path))
    page = front.draw(tmp_path / "front.html", content, ROWS, SPACE)[0].read_text(encoding="utf-8")
    assert "3 points of edsr on cpu" in page
    told = [page.index(f'<th scope="row">{name}') for name in ("point 01", "point 02", "point 03", "candidate 2")]
    assert told == sorted(told), "the front first"
    assert "channels 0.5, training 10" in page
    assert "candidate 6" not in page, "it failed"
    assert page.count("<title>point 01\n4.000 ms") == 2, "in the light and in the dark picture"


def test_a_limit_out_of_reach_names_the_nearest_end() -> None:
    ends = [("", Figures(10.0, 1.0, None, 4_000_000)), ("prune_channels", Figures(3.0, 0.3, None, 1_000_000)),
            ("broken", Figures(failure="no build"))]  # fmt: skip
    assert measured.unreachable(Budget(max_latency_ms=3.0, max_size_bytes=1_000_000), ends) == ""
    said = measured.unreachable(Budget(max_latency_ms=2.0), ends)
    assert "under 2 ms: it reaches 3 to 10 ms; nearest: prune_channels with 3 ms, 1 MB" in said
    assert "under 0.5 MB" in measured.unreachable(Budget(max_size_bytes=500_000), ends)


def test_a_candidate_is_stopped_when_a_finished_one_is_faster_and_clearly_better_after_as_much_training() -> None:
    better = Figures(5.0, 0.5, 0.1, 100, rungs=((0.25, 0.4), (1.0, 0.1)))
    mine = Figures(8.0, 0.8, 0.7, 200, rungs=((0.25, 0.7),))
    assert "slower and larger" in measured.beaten(mine, 0.25, [better])
    assert measured.beaten(dataclasses.replace(mine, rungs=((0.25, 0.3),)), 0.25, [better]) == ""
    assert measured.beaten(dataclasses.replace(mine, rungs=((0.25, 0.5),)), 0.25, [better]) == "", "curves cross"
    ahead = dataclasses.replace(better, rungs=((0.25, -0.4), (1.0, -0.4)))  # better than the original
    assert measured.beaten(dataclasses.replace(mine, rungs=((0.25, -0.5),)), 0.25, [ahead]) == ""
    assert "slower and larger" in measured.beaten(dataclasses.replace(mine, rungs=((0.25, 0.0),)), 0.25, [ahead])
    assert measured.beaten(dataclasses.replace(mine, size_bytes=50), 0.25, [better]) == ""
    assert measured.beaten(dataclasses.replace(mine, ratio=0.505), 0.25, [better]) == "", "not beyond noise"
    assert measured.beaten(mine, 0.25, [dataclasses.replace(better, stopped="slow")]) == ""


def test_a_share_of_the_training_is_a_share_of_its_steps() -> None:
    made = spaces.to_recipe(SPACE, {"channels": 1, "training": 1, "int8": 1}, {})
    assert [step.name for step in measured.shortened(made, 0.0).steps] == ["prune_channels", "quantize"]
    assert measured.shortened(made, 0.5).steps[1].options["steps"] == 5
    assert measured.shortened(made, 1.0) == made


NET = '''
from torch import nn

RECORD = {"task": "image-to-image", "input": {"shape": [1, 3, 32, 32], "value_range": [0, 1], "mean": [], "std": []},
          "output": {"value_range": [0, 1]}, "licence": "CC0-1.0"}

def net():
    return nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(48, 3, 3, padding=1))
'''


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A request for a tiny network with weights, thirty images, and a target with one runtime."""
    pytest.importorskip("optuna", reason="optuna is not installed (extra: search)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from edgegen.request import Request

    real = measuring.time_interleaved

    def few(*given: Any, **more: Any) -> Any:  # a real timing, of a few runs
        return real(*given, **{**more, "rounds": 2, "iterations": 5, "warm_seconds": 0.01})

    monkeypatch.setattr(measuring, "time_interleaved", few)
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(NET)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    torch.manual_seed(0)
    save_file(scope["net"]().state_dict(), str(tmp_path / "w.safetensors"))
    images = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "one.toml").write_text(TARGET)
    (tmp_path / "space.toml").write_text(_toml())
    return Request(
        model=f"{tmp_path}/net.py:net", weights=tmp_path / "w.safetensors", data=tmp_path / "images",
        target=str(tmp_path / "one.toml"), samples=4, threads=1,
    )  # fmt: skip


TARGET = '''
description = "this machine, with one runtime"
runtimes = ["onnxruntime"]
is_host = true
precisions = ["fp32"]
'''


def _toml() -> str:
    lines = ["schema = 1", 'order = ["prune_channels", "distill"]', "[options.distill]", "batch = 4"]
    for gene in TINY["genes"][:2]:
        lines += ["[[genes]]", *(f"{key} = {json.dumps(value)}" for key, value in gene.items())]
    return "\n".join(lines)


def _edgegen(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """Exit code of the command, run here."""
    monkeypatch.setattr(sys, "argv", ["edgegen", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_ends_in_bundles_and_a_front_that_compress_takes(
    request_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model", request_.model, "--weights", request_.weights, "--data", request_.data, "--target",
             request_.target, "--samples", 4, "--threads", 1, "--quiet"]  # fmt: skip
    out = tmp_path / "out"
    order = ["search", *given, "--space", tmp_path / "space.toml", "--trials", 2, "--max-size", "0.05MB", "--out", out]
    assert _edgegen(monkeypatch, *order) == 0
    found = front.read(out / "front" / "front.json")
    assert (found.counts, found.notes) == ({"done": 2, "failed": 0, "stopped early": 1}, ())
    (point,) = found.points
    assert (point.status, point.choices) == ("measured", {"channels": 0.75, "training": 10})
    assert (out / "front.html").is_file()
    report = json.loads((out / "front" / point.bundle / "report.json").read_text(encoding="utf-8"))
    assert point.measured["latency_ms"] == report["result"]["latency"]["value"]
    assert session.join(str(out / "study.db")) == 0, "all is done, and nothing is loaded for it"
    took = ["--from-front", out / "front" / "front.json", "--max-size", "0.05MB", "--out", tmp_path / "bundle"]
    assert _edgegen(monkeypatch, "compress", *given, *took) == 0
    report = json.loads((tmp_path / "bundle" / "report.json").read_text(encoding="utf-8"))
    assert report["result"]["latency"]["status"] == "measured"
    assert report["result"]["size_bytes"] < 50_000, "of the graph as it is, or rewritten"
    assert "prune_channels" in report["result"]["label"]


SUPERNET = """
schema = 1
order = ["train_supernet", "slice_widths", "distill"]
options = { train_supernet = { batch = 2, samples = 2, round_to = 8 }, slice_widths = { round_to = 8 } }
genes = [
  { name = "supernet", pass = "train_supernet", option = "steps", choices = [0, 6], ordered = false },
  { name = "width", pass = "slice_widths", option = "ratio", choices = [0.0, 0.5, 0.75], off = 0.0 },
  { name = "training", pass = "distill", option = "steps", choices = [0, 3], off = 0 },
]
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_supernet_is_trained_once_and_both_ways_are_tried_at_the_extremes(request_: Any, tmp_path: Path) -> None:
    (tmp_path / "supernet.toml").write_text(SUPERNET)
    order = Order(request_, tmp_path / "out", str(tmp_path / "supernet.toml"), trials=5, bundles=False)
    found = front.read(session.search(order))
    assert (found.counts["done"], found.counts["failed"]) == (5, 0)
    ways = [note for note in found.notes if note.endswith("is kept")]
    assert [note.split(":")[0] for note in ways] == ["strongest subnet", "mildest subnet"]
    notes = [json.loads(file.read_text())["notes"] for file in (tmp_path / "cache" / "steps").glob("*/result.json")]
    trained = [one for one in notes if "widths" in one and "inputs" in one]
    assert sorted(one.get("steps", 0) for one in trained) == [0, 6], "once sorted, once trained, for all candidates"
    assert {point.choices["width"] for point in found.points} <= {0.0, 0.5, 0.75}


def test_a_fault_in_one_candidate_is_its_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path))
    tidied: list[Any] = []
    monkeypatch.setattr(measured, "_tidy", tidied.append)

    def faulty(*given: Any) -> Any:
        raise KeyError("a layer that is not there")

    monkeypatch.setattr(measured, "_measured", faulty)
    bench: Any = argparse.Namespace(layers={"conv": "Conv2d"})
    found = measured.objective(bench, SPACE, Budget(), lambda: ())({"channels": 1, "training": 1, "int8": 1})
    assert "a fault in edgegen" in found.failure and "a layer that is not there" in found.failure
    assert tidied == [bench]
    assert "in faulty" in next((tmp_path / "faults").glob("*.txt")).read_text(), "the traceback is kept"


@pytest.mark.slow
def test_a_trained_candidate_is_built_in_the_runtime_that_was_the_fastest_untrained(
    request_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    both = tmp_path / "two.toml"
    two = TARGET.replace('"onnxruntime"', '"onnxruntime", "openvino"')
    both.write_text(two.replace('"fp32"', '"fp32", "bf16", "int8"'))
    bench = measured.open_bench(dataclasses.replace(request_, target=str(both)))
    built: dict[float, list[Any]] = {}
    best, build = measured._best, type(bench.run.bench).build

    def begun(*given: Any) -> Any:
        built[given[2]] = []
        return best(*given)

    def counted(*given: Any) -> Any:
        made = build(*given)
        built[list(built)[-1]].append(made)
        return made

    monkeypatch.setattr(measured, "_best", begun)
    monkeypatch.setattr(type(bench.run.bench), "build", counted)
    found = measured.objective(bench, SPACE, Budget(), lambda: ())({"channels": 1, "training": 1, "int8": 1})
    assert all(one.quantized for part in built.values() for one in part), "no float build of what is to be quantized"
    runtimes = {share: {one.runtime for one in part} for share, part in built.items()}
    assert runtimes == {0.0: {"onnxruntime", "openvino"}, 1.0: {found.runtime}}
    assert found.drop is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_limit_that_no_candidate_can_meet_is_answered_before_any_training(request_: Any, tmp_path: Path) -> None:
    out_of_reach = dataclasses.replace(request_, budget=Budget(max_latency_ms=1e-6))
    order = Order(out_of_reach, tmp_path / "out", str(tmp_path / "space.toml"), trials=4, bundles=False)
    with pytest.raises(BudgetError, match=r"under 1e-06 ms: it reaches .* nearest: prune_channels \+ distill"):
        session.search(order)
    steps = [json.loads(file.read_text())["changed"] for file in (tmp_path / "cache" / "steps").glob("*/result.json")]
    assert len(steps) == 1, "the strongest end, pruned and not trained"
    assert "trained" not in steps[0].values()
    assert not list((tmp_path / "cache" / "runs").iterdir()), "nothing is left of the run"
