"""The trade-off page: the front by hand, intervals, what is not known; drawn, and opened in a browser."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import pytest
from test_comparing import bundle, rewrite

from edgegen import cli, device_records, profile_report
from edgegen.errors import UsageError
from edgegen.report import tradeoff
from edgegen.report.tradeoff import Moment, Point

pytest.importorskip("matplotlib", reason="needs the extra `report`")


def point(latency: float, quality: float, label: str = "p") -> Point:
    return Point(label, (latency, latency - 0.1, latency + 0.1), (quality, quality, quality), {"precision": "int8"})


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [point(1, 20), point(2, 30), point(3, 25), point(4, 40), point(5, 40), Point("x", None, (9, 9, 9))]
    assert tradeoff.front(points, "higher") == [0, 1, 3]
    assert tradeoff.front(points, "lower") == [0]
    assert tradeoff.front([], "higher") == []


def test_points_judged_on_other_data_do_not_beat_each_other() -> None:
    points = [replace(point(1, 40), data="a"), replace(point(2, 30), data="b"), replace(point(3, 35), data="b")]
    assert tradeoff.fronts(points, "higher") == [[0], [1, 2]]
    assert tradeoff.front(points, "higher") == [0, 1, 2]


def test_what_all_points_share_is_said_once_and_other_samples_are_named(sides: list[Path], tmp_path: Path) -> None:
    facts = {"precision": "int8", "batch": "1"}
    points = [replace(point(1, 40), facts=facts), replace(point(2, 41), facts=facts | {"batch": "8"})]
    page = tradeoff.write(tmp_path / "t.html", "two", points, "PSNR", "higher")[0].read_text(encoding="utf-8")
    assert "All of them: precision int8." in page
    assert '<th scope="col">batch</th>' in page and '<th scope="col">precision</th>' not in page
    from edgegen import on_device
    from edgegen.devices._shell import Options

    settings, options = on_device.Settings(rounds=3, iterations=3, cold=1), Options("", str(tmp_path / "device"), None)
    records = on_device.profile(sides, "local", settings=settings, options=options)
    page = profile_report.write(tmp_path / "u.html", sides, records)[0].read_text(encoding="utf-8")
    assert "not all judged on the same samples" not in page
    report = json.loads((sides[1] / "report.json").read_text())
    report["data"]["test"]["sha256"] = "cd"
    (sides[1] / "report.json").write_text(json.dumps(report))
    page = profile_report.write(tmp_path / "u.html", sides, records)[0].read_text(encoding="utf-8")
    assert "not all judged on the same samples" in page
    assert page.count("on the front") == 2


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_figures_give_the_same_picture(kind: str) -> None:
    points = [point(1, 20), point(200, 30)]
    first, again = (tradeoff.draw(points, "PSNR", "higher", kind=kind) for _ in range(2))
    assert first == again
    assert first != tradeoff.draw([point(1, 20), point(200, 31)], "PSNR", "higher", kind=kind)
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    if kind == "png":
        with image.open(io.BytesIO(first)) as opened:
            assert opened.size[0] > 1000


def test_the_page_has_every_point_and_is_whole_in_a_browser(tmp_path: Path) -> None:
    points = [point(1.5, 20.25, "fast<b>"), point(2, 30), Point("lost", None, None, {}, "no device")]
    run = [Moment(float(i), 1.0 + i / 100, 2.0, 2000.0 - i, 50.0 + i) for i in range(30)]
    made = tradeoff.write(tmp_path / "t.html", "3 builds", points, "PSNR", "higher", notes=["a note"], run=run)
    assert [file.name for file in made] == ["t.html", "t-tradeoff.svg", "t-tradeoff.png", "t-run.svg", "t-run.png"]
    page = made[0].read_text(encoding="utf-8")
    for expected in ("1.500 ms (1.400 to 1.600)", "20.25", "fast&lt;b&gt;", "not measured", "no device", "a note"):
        assert expected in page, expected
    assert page.count("on the front") == 2
    with browser.browser(tmp_path) as tab:
        for dark in (False, True):
            seen = tab.open(made[0], dark=dark)
            assert (seen.errors, seen.requests, seen.answer["wide"]) == ([], [], 0)
            assert seen.answer["drawn"] == [not dark, dark] * 2, "of each picture the form that the browser asks for"


def test_a_page_without_points_says_so(tmp_path: Path) -> None:
    made = tradeoff.write(tmp_path / "t.html", "none", [Point("lost", None, None)], "PSNR", "higher")
    assert len(made) == 1
    assert "No picture" in made[0].read_text(encoding="utf-8")


@pytest.fixture
def sides(tmp_path: Path) -> list[Path]:
    pytest.importorskip("onnxruntime", reason="the bundles are for ONNX Runtime")
    made = [bundle(tmp_path / "a"), bundle(tmp_path / "b", side=64, samples=[40.0 + i for i in range(8)])]
    for path in made:
        report = json.loads((path / "report.json").read_text())
        report["result"]["precision"] = {"plan": "fp32"}
        rewrite(path, report)
    return made


def profile(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["edgegen", "profile", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_draws_what_it_measured(
    sides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place = ["--device-folder", str(tmp_path / "device"), "--rounds", "3", "--iterations", "3"]
    assert profile(monkeypatch, *map(str, sides), "--plot", str(tmp_path / "out" / "t.html"), "--json", *place) == 0
    shown = capsys.readouterr().out
    records = [device_records.Record.model_validate(one) for one in json.loads(shown[shown.index("[") :])]
    page = (tmp_path / "out" / "t.html").read_text(encoding="utf-8")
    for record in records:
        assert f"{device_records.measurements(record)[0].value:.3g}"[:3] in page
    names = ('<th scope="row">a<', '<th scope="row">b<')
    for expected in ("PSNR (dB)", "43.50", "30.35", "64 x 64", "fp32", *names):
        assert expected in page, expected


@pytest.fixture
def record(sides: list[Path], tmp_path: Path) -> device_records.Record:
    """Of the first bundle, measured here."""
    from edgegen import on_device
    from edgegen.devices._shell import Options

    settings = on_device.Settings(rounds=3, iterations=3, cold=1)
    options = Options("", str(tmp_path / "device"), None)
    return on_device.profile([sides[0]], "local", settings=settings, options=options)[0]


def test_the_latency_of_a_denoiser_is_that_of_an_image(record: device_records.Record) -> None:
    """15 runs make an image; with cached blocks another network takes some of the turns, which was not timed."""
    (once, *_), _ = profile_report._latency(record, profile_report._Side("a", {}))
    (image, *_), _ = profile_report._latency(record, profile_report._Side("a", {}, runs=15))
    assert image == pytest.approx(15 * once)
    assert profile_report._latency(record, profile_report._Side("a", {}, 15, partial=5))[0] is None
    point = profile_report._point(record, profile_report._Side("a", {}, runs=30, steps=15), "KID")
    assert (point.facts["steps"], point.facts["runs an image"]) == ("15", "30")


def test_quality_is_that_of_the_size_that_was_measured(record: device_records.Record) -> None:
    """A bundle for several sizes has a figure for each; the artifact for 16 x 16 must not get that of another."""
    psnr = {"name": "PSNR", "unit": "dB", "interval": None}
    result = {"precision": {"plan": "fp32"}, "quality": [psnr | {"value": 40.0}]}
    sizes = [{"size": [s, s], "quality": [psnr | {"value": value}]} for s, value in ((32, 40.0), (16, 35.0))]
    assert profile_report._quality(record, {"result": result}, "PSNR")[0] == (40.0, 40.0, 40.0)
    assert profile_report._quality(record, {"result": result, "resolutions": sizes}, "PSNR")[0] == (35.0, 35.0, 35.0)
    lost = {"result": result, "resolutions": sizes[:1]}
    assert profile_report._quality(record, lost, "PSNR") == (None, "PSNR not measured")


def test_a_share_is_drawn_in_percent(record: device_records.Record) -> None:
    top1 = {"name": "top-1", "unit": "share", "value": 0.94, "interval": (0.93, 0.95), "direction": "higher"}
    report = {"result": {"precision": {"plan": "fp32"}, "quality": [top1]}}
    assert profile_report._axis([report], "") == ("top-1", "higher", "%")
    assert profile_report._quality(record, report, "top-1")[0] == pytest.approx((94.0, 93.0, 95.0))


def test_bundles_of_one_name_are_told_by_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / folder for folder in ("x/a", "y/b", "y/a")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(str(path))
    assert list(profile_report.names(paths[:2]).values()) == ["a", "b"]
    assert list(profile_report.names(paths).values()) == [str(path) for path in paths]


def test_a_long_run_is_many_rounds(sides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ["--device-folder", str(tmp_path / "device"), "--minutes", "0.05"]
    assert profile(monkeypatch, str(sides[0]), "--plot", str(tmp_path / "t.html"), *place) == 0
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "in the first third" in page
    assert (tmp_path / "t-run.svg").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(["--plot", "t.png"], "must end in .html", id="not a page"),
        pytest.param(["--plot", "t.html", "--quality", "FID"], "in no report; there are: PSNR", id="no such figure"),
        pytest.param(["--minutes", "1", "again"], "with one bundle", id="long run of two"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_measuring(
    sides: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, more: list[str], message: str
) -> None:
    assert profile(monkeypatch, str(sides[0]), *[str(sides[1]) if m == "again" else m for m in more]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_figure_is_an_error(sides: list[Path]) -> None:
    profile_report.check(sides, "PSNR")
    with pytest.raises(UsageError, match="--quality x: in no report"):
        profile_report.check(sides, "x")


def test_the_table_tells_bundles_of_one_network_apart(
    sides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place = ["--device-folder", str(tmp_path / "device"), "--rounds", "3", "--iterations", "3"]
    assert profile(monkeypatch, *map(str, sides), *place) == 0
    shown = capsys.readouterr().out
    assert "a onnxruntime fp32" in shown and "b onnxruntime fp32" in shown
