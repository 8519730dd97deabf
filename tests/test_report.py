"""report.html, report.json and the terminal's table tell the same numbers, escape everything, and load nothing."""

from __future__ import annotations

import io
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from rich.console import Console

from edgegen.errors import BundleError
from edgegen.report import advice, glossary, paired, svg, svg_plots, text
from edgegen.report.grid import BROKEN, CAPTION, GAP, MARGIN, image_grid
from edgegen.report.html import EMBED_BYTES, write_html, write_report
from edgegen.report.schema import Figure, figure, normalise, percentiles
from edgegen.report.terminal import progress, render
from edgegen.types import Measurement

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


def measured(name: str, value: float, unit: str = "ms", **more: Any) -> dict[str, Any]:
    return figure(Measurement(name, unit, value, **more))


def sample() -> dict[str, Any]:
    """A report with every kind of content: measured, estimated, not measured, failed."""
    slow, fast = [35.0 + i / 100 for i in range(101)], [15.0 + i / 50 for i in range(101)]
    psnr = {"name": "PSNR", "unit": "dB", "direction": "higher"}
    return {
        "headline": "edsr runs 2.21x faster",
        "model": "edsr",
        "task": "super-resolution",
        "target": "cpu",
        "command": "edgegen compress --model edsr --target cpu",
        "date": "2026-11-20",
        "seed": 7,
        "duration_s": 412.5,
        "budget": {"max_quality_drop": 0.5, "max_size_bytes": None},
        "baseline": {
            "label": "openvino bf16",
            "latency": measured("latency", 35.5, interval=(35.4, 35.6), samples=tuple(slow)),
            "macs": 2_531_000_000,
            "params": 1_280_123,
            "size_bytes": 2_571_001,
            "peak_memory_bytes": 161_000_003,
            "quality": [{**psnr, "value": 28.123, "interval": (27.9, 28.4)}],
            "precision": {"plan": "bf16", "int8_weight_share": 0.0, "int8_macs_share": 0.0},
        },
        "result": {
            "label": "openvino int8",
            "latency": measured("latency", 16.0, interval=(15.9, 16.1), samples=tuple(fast), conditions={"threads": 2}),
            "ratio": measured("ratio", 0.4525, "", interval=(0.44, 0.46)),
            "macs": 1_110_000_000,
            "params": 561_007,
            "size_bytes": 504_009,
            "quality": [
                {**psnr, "value": 27.843, "interval": (27.6, 28.1)},
                measured("perceptual distance", math.nan, "", status="not measured", reason="no encoder was given"),
            ],
            "precision": {"plan": "int8", "int8_weight_share": 0.943, "layers": {"head": "int8", "tail": "bf16"}},
        },
        "steps": [
            {"name": "prune_channels", "options": {"ratio": 0.4}, "status": "kept", "changed": {"body.0": "64 to 40"}},
            {"name": "cast", "status": "undone", "reason": "0.97x: not faster"},
            {"name": "quantize", "status": "forced", "reason": "kept on request"},
        ],
        "candidates": [
            {
                "label": "openvino bf16",
                "latency": measured("latency", 35.5),
                "size_bytes": 2571001,
                "verdict": "baseline",
            },
            {"label": "ort int8", "verdict": "failed", "reason": "onnxruntime: crashed (signal 11) at build"},
            {
                "label": "jetson",
                "latency": measured("latency", 3.25, status="estimated", interval=(2.0, 5.0)),
                "verdict": "rejected",
            },
            {"label": "openvino int8", "latency": measured("latency", 16.0), "verdict": "chosen"},
        ],
        "images": [{"file": "images/pairs.png", "caption": "teacher beside student"}],
        "data_source": "photos",
        "data": {"test": {"count": 1200, "sha256": "ab12"}},
        "skipped_files": {"broken.jpg": "truncated"},
        "provenance": {"source": "somewhere", "licence": "Apache-2.0"},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "two cores"},
        "reproduce": "edgegen reproduce out/demo",
        "stamps": [],
    }


class Page(HTMLParser):
    """Collects <data> elements, all attributes, all text, and whether every tag is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.data: list[tuple[str, str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._bound: dict[str, str] | None = None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self._bound = {name: value or "" for name, value in attrs}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self._bound is not None:
            self.data.append((self._bound["data-path"], self._bound["value"], data))
            self._bound = None


def at(report: Any, path: str) -> Any:
    for key in path.split("."):
        report = report[int(key)] if isinstance(report, list) else report[key]
    return report


def readable(shown: str) -> float:
    """The number at the start of a shown text, with its decimal suffix, as a float."""
    words = shown.removeprefix("about ").replace(",", "").replace("%", " %").removesuffix("/s").split()
    unit = words[1] if len(words) > 1 else ""
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "%": 0.01}.get(unit.removesuffix("B"), 1.0)
    return float(words[0]) * factor


def mismatches(page: Page, report: dict[str, Any]) -> list[str]:
    """Shown numbers that are not the report's: exactly in the attribute, to three digits in the text."""
    wrong = []
    for path, value, shown in page.data:
        true = float(at(report, path))
        close = math.isclose(readable(shown), true, rel_tol=6e-3, abs_tol=1e-12)
        if float(value) != true or not close:
            wrong.append(f"{path}: {shown} ({value}) is not {true}")
    return wrong


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "pairs.png").write_bytes(PNG)
    return tmp_path


@pytest.fixture
def page(folder: Path) -> Page:
    write_report(folder, sample())
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_every_number_of_the_page_is_report_json(page: Page, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert mismatches(page, report) == []
    paths = {path for path, _, _ in page.data}
    for side in ("baseline", "result"):
        needed = {"latency.value", "latency.interval.0", "latency.percentiles.p90", "latency.percentiles.p99"}
        needed |= {"macs", "params", "size_bytes", "quality.0.value", "quality.0.interval.1"}
        assert {f"{side}.{name}" for name in needed} <= paths
    assert {"result.ratio.value", "result.precision.int8_weight_share", "candidates.3.latency.value"} <= paths


def test_the_comparison_fails_on_another_report(page: Page, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report["result"]["latency"]["value"] *= 2
    report["baseline"]["macs"] = 0
    assert len(mismatches(page, report)) == 2


def test_the_page_is_whole_and_loads_nothing(page: Page, folder: Path) -> None:
    assert page.open == []
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    assert "@import" not in source
    assert "url(" not in source
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:image/", "#")), f"<{tag} {name}={value[:60]}>"
        assert tag not in ("script", "link", "iframe", "object")


def test_derived_texts(page: Page) -> None:
    words = " ".join(page.words)
    for expected in ("2.21x faster", "0.28 dB lower", "5.10x less", "2.28x less", "94.3%", "6 min 52 s"):
        assert expected in words, expected


def test_estimated_and_unmeasured_are_marked(page: Page) -> None:
    words = " ".join(page.words)
    assert "no encoder was given" in words
    assert "about 3.25 ms" in words
    assert words.count("estimated") == 2, "the candidate and the legend"
    assert "crashed (signal 11)" in words
    assert "nan" not in words.lower()


def test_not_measured_latency(folder: Path) -> None:
    report = sample()
    nothing = {"name": "latency", "unit": "ms", "status": "not measured", "reason": "no device"}
    report["baseline"]["latency"] = report["result"]["latency"] = nothing
    report["result"]["ratio"] = nothing
    checked = write_report(folder, report)
    assert checked["result"]["latency"]["value"] is None
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    assert words.count("no device") == 4, "below the sentence, and in three cells"
    assert "faster" not in words.replace(report["headline"], "").replace("0.97x: not faster", "")


def test_an_estimate_is_predicted_never_faster(folder: Path) -> None:
    report = sample() | {"headline": "", "steps": []}
    report["result"]["ratio"] = measured("ratio", 0.5, "", status="estimated", interval=(0.3, 0.8))
    write_report(folder, report)
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    console = Console(file=io.StringIO(), width=160)
    render(report, console)
    for shown in (words, console.file.getvalue()):  # type: ignore[attr-defined]
        assert "predicted 2.00x" in shown
        assert "faster" not in shown


def test_nan_becomes_null_with_a_reason() -> None:
    found = Figure(name="FID", value=math.nan, interval=(math.nan, 1.0), samples=[1.0, math.inf])
    assert (found.value, found.interval, found.samples, found.status) == (None, None, [1.0], "not measured")
    assert "not a finite number" in found.reason
    json.dumps(normalise(sample()), allow_nan=False)


def test_everything_is_escaped(folder: Path) -> None:
    evil = "<script>alert('&\"')</script>"

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            keep = key in ("latency", "quality", "ratio", "precision", "baseline", "result", "data") or not value
            named = {name: poison(item, name) for name, item in value.items()}
            return named if keep or key not in _FREE else named | {evil: evil}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        return (
            value + evil if isinstance(value, str) and key not in ("status", "verdict", "file", "direction") else value
        )

    report = poison(sample())
    report["stamps"] = [evil]
    write_report(folder, report)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert source.count("&lt;script&gt;") > 30
    page = Page(source)
    assert page.open == []
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert evil in " ".join(page.words)


_FREE = {"options", "changed", "layers", "skipped_files", "provenance", "versions", "machine", "budget", "conditions"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("images/none.png", "does not exist", id="absent"),
        pytest.param("../secret.png", "outside", id="outside"),
        pytest.param("report.json", "not a picture", id="kind"),
    ],
)
def test_bad_images_are_refused(folder: Path, name: str, message: str) -> None:
    (folder.parent / "secret.png").write_bytes(PNG)
    report = sample() | {"images": [{"file": name}]}
    with pytest.raises(BundleError, match=message):
        write_html(folder / "report.html", report)
    assert not (folder / "report.html").exists()


def test_the_page_stays_under_5_mb(folder: Path) -> None:
    images = []
    for index in range(4):
        (folder / f"{index}.png").write_bytes(PNG + bytes(EMBED_BYTES // 3))
        images.append({"file": f"{index}.png", "caption": f"picture {index}"})
    many = [0.001 * i for i in range(50_000)]
    report = sample() | {"images": images}
    report["result"]["latency"]["samples"] = many
    write_html(folder / "report.html", report)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert len(source.encode()) < 5_000_000
    assert source.count("data:image/png") == 2
    assert "Not in this page (too large): 3.png" in source


@pytest.mark.parametrize("key", ["hedline", "baseline.size", "steps.0.why"])
def test_misspelt_fields_are_refused(key: str) -> None:
    report = sample()
    *path, last = key.split(".")
    (at(report, ".".join(path)) if path else report)[last] = "x"
    with pytest.raises(ValueError, match=last):
        normalise(report)


def test_percentiles_are_numpys() -> None:
    samples = list(np.random.default_rng(0).gamma(2.0, size=57))
    found = percentiles(samples)
    assert found is not None
    expected = np.percentile(samples, [50, 90, 99])
    np.testing.assert_allclose([found.p50, found.p90, found.p99], expected, rtol=1e-12)
    assert found.n == 57
    assert percentiles([]) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.number(0.000512), "0.000512"),
        (text.number(12345.6), "12,346"),
        (text.number(2.394), "2.39"),
        (text.number(0), "0"),
        (text.count(1_372_000), "1.37 M"),
        (text.size(812), "812 B"),
        (text.size(1_372_000), "1.37 MB"),
        (text.share(0.9999), "99.9%"),
        (text.figure(measured("throughput", 41.63, "1/s")), "41.6/s"),
        (text.share(1.0), "100%"),
        (text.speed(measured("ratio", 0.47)), "2.13x faster"),
        (text.speed(measured("ratio", 1.2)), "1.20x slower"),
        (text.speed(measured("ratio", 1.001)), "same speed"),
        (text.speed(measured("ratio", 0.997)), "same speed"),
        (text.speed(measured("ratio", 0.5, status="estimated")), "predicted 2.00x"),
        (text.percent_less(100, 58), "42.0% less"),
        (text.percent_less(100, 25), "4.00x less"),
        (text.percent_less(100, 107), "7% more"),
        (text.seconds(185), "3 min 5 s"),
        (text.plain({"ratio": 0.4, "on": True, "layers": ["a", "b"]}), "ratio 0.4, on yes, layers a, b"),
    ],
)
def test_numbers_as_text(shown: str, expected: str) -> None:
    assert shown == expected


def test_samples_beyond_the_axis_are_counted() -> None:
    samples = [10.0] * 995 + [500.0] * 5
    picture = svg.strip([("a", "base", measured("latency", 10.0, samples=tuple(samples)))])
    assert "5 beyond the axis, up to 500 ms" in picture
    assert picture.count("<circle") == svg.DOTS
    assert svg.strip([("a", "base", measured("latency", 10.0))]) == ""


def test_terminal_shows_the_numbers_of_the_page() -> None:
    console = Console(file=io.StringIO(), width=160)
    render(sample() | {"stamps": ["not for accuracy"], "model": "[red]x"}, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (
        "edsr runs 2.21x faster",
        "not for accuracy",
        "35.5 ms",
        "16.0 ms",
        "2.21x faster (ratio 0.453, 0.440 to 0.460)",
        "27.84 dB",
        "0.28 dB lower",
        "not measured: no encoder was given",
        "504 kB",
        "undone",
        "signal 11",
        "about 3.25 ms",
    ):
        assert expected in shown, expected


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tell_a_run(console: Console, **options: Any) -> str:
    """A step of 40 s that builds a candidate for 30 s on the way; a short step; one that never says how far it is."""
    clock = Clock()
    with progress(console=console, clock=clock, **options) as tell:
        for second in range(1, 41):
            tell("distill", f"epoch {second} [x]", second / 40)
            clock.now += 1
            if second == 20:
                tell("build", "openvino int8", 0.0)
                clock.now += 30
        tell("export", "main", 0.0)
        clock.now += 0.5
        tell("export", "main", 1.0)
        tell("score", "", math.nan)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_lines_without_a_terminal() -> None:
    lines = tell_a_run(Console(file=io.StringIO(), width=60)).splitlines()
    assert lines == [
        "distill: 28%, about 26 s left, epoch 11 [x]",
        "build: openvino int8",
        "distill: 52%, about 18 s left, epoch 21 [x]",
        "distill: 78%, about 8.7 s left, epoch 31 [x]",
        "distill: done in 39 s",
    ]


def test_a_step_that_starts_again_is_told_again() -> None:
    clock, console = Clock(), Console(file=io.StringIO())
    with progress(console=console, clock=clock) as tell:
        for _ in range(2):
            tell("time", "3 builds", 0.0)
            clock.now += 5
            tell("time", "3 builds", 1.0)
            tell("time", "3 builds", 1.0)
            clock.now += 100
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["time: done in 5.0 s", "time: 3 builds", "time: done in 5.0 s"]


def test_a_step_that_speaks_seldom_is_heard_among_others() -> None:
    clock, console = Clock(), Console(file=io.StringIO())
    with progress(console=console, clock=clock) as tell:
        for second in range(1, 25):
            tell("distill", "", second / 25)
            clock.now += 1
            if second in (1, 14, 17):
                tell("search", f"candidate {second}", 0.5)
                clock.now += 0.01  # until another step speaks
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line for line in lines if "candidate" in line] == ["search: 50%, candidate 14"]


def test_quiet_progress_says_nothing() -> None:
    assert tell_a_run(Console(file=io.StringIO()), quiet=True) == ""
    assert tell_a_run(Console(file=io.StringIO(), force_terminal=True), quiet=True) == ""


def test_progress_bars_on_a_terminal() -> None:
    shown = tell_a_run(Console(file=io.StringIO(), force_terminal=True, width=100))
    for expected in ("distill", "build", "39 s", "epoch 40 [x]", "\u2501"):
        assert expected in shown, expected


def read(png: bytes) -> np.ndarray:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with image.open(io.BytesIO(png)) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened.convert("RGB"))


def test_grid_enlarges_without_smoothing_and_keeps_pixels(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    small = np.arange(16, dtype=np.float32).reshape(4, 4) / 15
    large = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    sheet = read(image_grid([[small, large]], ["input", "output"], min_side=32, out=tmp_path / "grid.png"))
    assert read((tmp_path / "grid.png").read_bytes()).shape == sheet.shape
    assert sheet.shape == (2 * MARGIN + CAPTION + 32, 2 * MARGIN + 64 + GAP, 3)
    top = MARGIN + CAPTION
    shown = sheet[top : top + 32, MARGIN : MARGIN + 32]
    np.testing.assert_array_equal(shown[3::8, 3::8, 0], np.rint(small * 255))
    assert len(np.unique(shown)) == 16, "no new values: nearest neighbours"
    right = sheet[top : top + 32, MARGIN + 32 + GAP : MARGIN + 64 + GAP]
    np.testing.assert_array_equal(right[::4, ::4], np.rint(large * 255))


def test_grid_shows_broken_pixels_and_clips() -> None:
    picture = np.full((32, 32, 3), 2.0)
    picture[0, 0, 1] = np.nan
    sheet = read(image_grid([[picture]], ["x" * 400], row_labels=["photo"], min_side=32))
    assert tuple(sheet[MARGIN + CAPTION, MARGIN]) == BROKEN
    assert tuple(sheet[MARGIN + CAPTION + 1, MARGIN]) == (255, 255, 255)


def test_grid_refuses_what_is_no_picture() -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    with pytest.raises(ValueError, match=r"\(H, W, 3\), got \(3, 8, 8\)"):
        image_grid([[np.zeros((3, 8, 8))]], ["a"])
    with pytest.raises(ValueError, match="1 pictures for 2 columns"):
        image_grid([[np.zeros((8, 8))]], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        image_grid([], [])


def full_sample() -> dict[str, Any]:
    """`sample` with layers, throughput, a calibration curve and a device that states its peak."""
    report = sample()
    report["layers"] = [
        {"name": "head", "op": "Conv", "macs": 4_000_000, "params": 900, "bytes": 80_000, "ms": 0.04, "n": 20,
         "kernel": "jit_int8", "promised": "int8", "obtained": "int8", "sqnr_db": 31.5},
        {"name": "tail", "op": "Conv", "macs": 8_000_000, "bytes": 2_000_000, "ms": 0.4, "n": 20,
         "promised": "int8", "obtained": "fp32", "recovers": 0.02},
        {"name": "grow", "op": "Resize", "ms": 0.06, "n": 20, "kernel": "ref"},
    ]  # fmt: skip
    report["roof"] = {"peak_macs_per_s": {"int8": 2e11, "fp32": 5e10}, "bytes_per_s": 1e10}
    batches = [measured("throughput", 90.0, "1/s", direction="higher", conditions={"batch": 8})]
    report["result"]["throughput"] = batches
    report["calibration_curve"] = [
        {"images": n, "quality": measured("PSNR", value, "dB", interval=(value - 0.1, value + 0.1))}
        for n, value in ((8, 27.1), (32, 27.6), (128, 27.8))
    ]
    return report


def test_layers_tell_time_share_of_the_peak_and_broken_promises(folder: Path) -> None:
    write_report(folder, full_sample())
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    words = " ".join(page.words)
    assert mismatches(page, json.loads((folder / "report.json").read_text(encoding="utf-8"))) == []
    # 4e6 MACs in 0.04 ms are 1e11 a second, half of 2e11; 8e6 in 0.4 ms are 2e10, two fifths of 5e10
    for expected in ("50.0%", "40.0%", "asked: int8", "31.5", "jit_int8", "80.0%", "12.0% of it went to kernels"):
        assert expected in words, expected
    assert "90.0" in words
    assert "calibrated on more and more" in words
    paths = {path for path, _, _ in page.data}
    assert {"layers.0.ms", "layers.1.macs", "layers.0.sqnr_db", "result.throughput.0.value"} <= paths


def test_what_layers_lack_is_said(folder: Path) -> None:
    report = full_sample()
    for layer in report["layers"]:
        layer |= {"ms": None, "sqnr_db": None, "recovers": None}
    report |= {"layers_reason": "this runtime tells no times", "calibration_curve": [], "roof": {}}
    report["data"]["calibration"] = {"count": 37}
    write_report(folder, report)
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    absent = ("this runtime tells no times", "SQNR and recovers if left in float", "changes with their number")
    for expected in absent:
        assert expected in words, expected
    assert 'aria-label="efficiency gap"' not in (folder / "report.html").read_text(encoding="utf-8")


def test_the_peak_is_the_makers_or_the_fastest_layer() -> None:
    rows = [{"macs": 10, "ms": 1.0, "obtained": "int8"}, {"macs": 10, "ms": 4.0, "obtained": "int8"}]
    assert svg_plots.reached(rows, {"peak_macs_per_s": {"int8": 20_000.0}, "bytes_per_s": 0})[0] == [0.5, 0.125]
    shares, named = svg_plots.reached(rows, {"peak_macs_per_s": {"fp32": 1.0}, "bytes_per_s": 0})
    assert shares == [1.0, 0.25]
    assert "fastest layer" in named
    assert svg_plots.reached([{"macs": 10, "ms": None, "obtained": ""}], {"peak_macs_per_s": {}})[0] == [None]


def test_layers_below_the_waterline_are_marked() -> None:
    rows = full_sample()["layers"][:2]
    roof = {"peak_macs_per_s": {"int8": 1e11, "fp32": 1e11}, "bytes_per_s": 1e10}
    drawn = svg_plots.waterline(rows, roof)  # 50 and 4 MACs a byte around the device's 10
    assert (drawn.count('circle class="result"'), drawn.count('circle class="base"')) == (1, 1)


def test_what_to_do_next_comes_from_the_report() -> None:
    report = normalise(sample())
    assert advice.next_steps(report)[-2].startswith("quantize was kept only because")
    assert advice.next_steps(report)[-1].startswith("To use it: out/demo/README.md")
    report["result"]["latency"] |= {"status": "not measured", "value": None, "reason": "no device"}
    assert "edgegen profile out/demo --device" in advice.next_steps(report)[0]
    report["data"]["test"]["count"] = 4
    assert any("4 held-out samples" in text for text in advice.next_steps(report))
    report["result"]["quality"] = []
    assert any("No quality was measured" in text for text in advice.next_steps(report))


def test_the_terminal_says_the_chosen_build_instead_of_its_long_name() -> None:
    report = sample()
    report["baseline"]["label"], report["result"]["label"] = "original: openvino bf16", "pruned: openvino int8"
    report["candidates"][1]["reason"] = "slower than pruned: openvino int8 (1x against 2x)"
    console = Console(width=200, record=True, file=io.StringIO())
    render(report, console)
    assert "slower than the chosen build (1x against 2x)" in console.export_text()


def test_a_runtime_that_was_not_tried_is_named() -> None:
    report = normalise({**sample(), "untried": {"litert": "its converter is slow; --thorough tries it"}})
    assert "perhaps faster: litert (its converter is slow; --thorough tries it)." in advice.next_steps(report)[0]


def test_a_curve_that_still_rises_asks_for_more_samples() -> None:
    report = normalise(full_sample())
    assert not any("still rose" in sentence for sentence in advice.next_steps(report))  # 27.6 to 27.8 dB
    report["calibration_curve"][-1]["quality"]["value"] = 28.6
    assert any("1.0 dB higher from 32 to 128 samples" in sentence for sentence in advice.next_steps(report))


def test_the_curve_of_a_share_is_drawn_in_percent() -> None:
    ends = {"unit": "share", "interval": (0.95, 0.99), "direction": "higher", "name": "top-1", "value": 0.97}
    drawn = svg_plots.curve([{"images": n, "quality": ends} for n in (8, 64)])
    assert ">99.00</text>" in drawn and ">95.00</text>" in drawn and "top-1 (%) over calibration images" in drawn


def test_throughput_tells_how_many_ran_at_once_and_why_not(folder: Path) -> None:
    report = sample()
    for side, value in (("baseline", 40.0), ("result", 100.0)):
        told = {"streams": 2, "threads": 1, "batch": 1}
        report[side]["throughput"] = [measured("throughput", value, "1/s", direction="higher", conditions=told)]
    write_report(folder, report)
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    assert "samples a second, 2 at once (1 thread each)" in words
    assert "2.50x more" in words
    for side in ("baseline", "result"):
        missing = {"name": "throughput", "unit": "1/s", "status": "not measured", "reason": "one thread alone"}
        report[side]["throughput"] = [missing]
    write_report(folder, report)
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    assert "samples a second, several at once" in words
    assert words.count("one thread alone") == 2


def test_what_the_run_took_stands_beside_what_its_plan_said(folder: Path) -> None:
    spent = {"seconds": 200.0, "memory_bytes": 900_000_000, "disk_bytes": 30_000_000}
    report = sample() | {"cost": {"predicted": spent, "used": spent | {"seconds": 125.0}, "resumed": True}}
    write_report(folder, report)
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    for expected in ("3 min 20 s", "2 min 5 s", "900 MB", "30.0 MB", "The run was resumed"):
        assert expected in words, expected


def test_a_share_is_told_in_percent_and_its_change_in_points(folder: Path) -> None:
    top1 = {"name": "top-1", "unit": "share", "direction": "higher"}
    before, after = top1 | {"value": 0.9}, top1 | {"value": 0.8945}
    assert text.figure(Figure(**after).model_dump()) == "89.45%"
    assert text.difference(before, after) == "0.55 points lower"
    report = sample()
    report["baseline"]["quality"], report["result"]["quality"] = [before], [after | {"interval": (0.88, 0.91)}]
    checked = write_report(folder, report)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert mismatches(page, checked) == []
    assert "88.00%" in " ".join(page.words)


def test_a_change_inside_the_intervals_is_neither_better_nor_worse(folder: Path) -> None:
    write_report(folder, sample())  # 27.9 to 28.4 dB, and 27.6 to 28.1
    page = (folder / "report.html").read_text(encoding="utf-8")
    note = '<span class="sub">the intervals overlap, so it may be none</span>'
    assert f'<td><span class="">0.28 dB lower</span>{note}</td>' in page
    report = sample()
    report["result"]["quality"][0]["interval"] = (27.8, 27.89)
    write_report(folder, report)
    assert '<span class="worse">0.28 dB lower</span>' in (folder / "report.html").read_text(encoding="utf-8")


def with_samples(before: list[float], after: list[float]) -> dict[str, Any]:
    """The sample with PSNR as the mean of samples; each alone has a wide interval."""
    report = sample()
    for side, samples in (("baseline", before), ("result", after)):
        value = sum(samples) / len(samples)
        told = measured("PSNR", value, "dB", direction="higher", interval=(20.0, 40.0), samples=tuple(samples))
        report[side]["quality"] = [told]
    return report


def test_a_change_on_the_same_samples_is_told_sample_by_sample(folder: Path) -> None:
    """Samples of 24 to 36 dB that each lose 0.1 dB: each mean is vague, the loss is not."""
    before = [24.0, 28.0, 32.0, 36.0]
    write_report(folder, with_samples(before, [value - 0.1 for value in before]))
    page = (folder / "report.html").read_text(encoding="utf-8")
    expected = '<span class="sub">on the same samples: 95% 0.10 to 0.10 dB lower</span>'
    assert f'<span class="worse">0.10 dB lower</span>{expected}' in page
    write_report(folder, with_samples(before, [23.0, 29.1, 31.0, 37.1]))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert '<span class="">0.050 dB higher</span>' in page
    assert "dB higher, so it may be none" in page


def test_samples_are_paired_only_where_a_figure_is_their_mean() -> None:
    before, after = (measured("PSNR", value, "dB", samples=(value, value)) for value in (30.0, 29.0))
    assert paired.interval(before, after) == (-1.0, -1.0)
    assert paired.interval(before, after | {"value": 28.0}) is None
    assert paired.interval(before, after | {"samples": [29.0]}) is None
    subsets = measured("KID", 29.0, "", samples=(29.0, 29.0), conditions={"n": 2000})
    assert paired.interval(before, subsets) is None, "means of subsets are no samples of their own"


@pytest.mark.parametrize(
    ("ends", "unit", "shown"),
    [
        pytest.param((-0.19, -0.03), "dB", "0.030 to 0.19 dB lower", id="lower"),
        pytest.param((0.001, 0.02), "share", "0.10 to 2.0 points higher", id="higher"),
        pytest.param((-0.2, 0.1), "dB", "0.20 dB lower to 0.10 dB higher", id="either"),
    ],
)
def test_an_interval_of_a_change_in_words(ends: tuple[float, float], unit: str, shown: str) -> None:
    assert text.difference_span(ends, unit) == shown


def test_what_a_pass_reported_is_told_in_words() -> None:
    figures = {"from": "cache", "groups": 10, "loss_first": 0.0106, "loss_last": 0.00265, "macs_after": 701_890_560,
               "macs_before": 2_687_238_144, "nfe_before": 50, "nfe": 15, "seconds": 96.13, "stopped": ""}  # fmt: skip
    assert text.notes(figures) == (
        "taken from the cache of finished steps, groups 10, loss 0.0106 to 0.00265, MACs 2.69 G to 702 M, "
        "runs of the network for an image 50 to 15, took 1 min 36 s"
    )
    assert text.notes({}) == ""


def test_limits_that_were_not_given_are_told_last(folder: Path) -> None:
    budget = {"quality drop": "0.5 dB", "latency": "no limit", "size": "no limit"}
    write_report(folder, sample() | {"budget": budget})
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Asked for: quality drop at most 0.5 dB; no limit of latency or size; seed 7." in page


def test_reasons_name_the_baseline_and_the_chosen_build_and_not_their_labels() -> None:
    report = normalise(sample())
    report["baseline"]["label"], report["result"]["label"] = "original: ov bf16", "original: ov int8 (mean)"
    report["candidates"] = [report["candidates"][0] | {"label": name} for name in ("original: ov int8", "net: ov int8")]
    row = report["candidates"][0]
    said = glossary.plainly("slower than original: ov int8 (mean) (1.1x); original: ov bf16", report, row)
    assert said == "slower than the chosen build (1.1x); the baseline"
    said = glossary.plainly("chosen without it: original: ov int8 (mean); original: ov bf16", report)
    assert said == "chosen without it: original: ov int8 (mean); the baseline"
    assert glossary.plainly("ov int8: ov int8: crashed", report, row) == "crashed"
    assert glossary.plainly("fast against edsr", sample() | {"candidates": []}) == "fast against edsr"


def test_builds_stand_in_the_order_of_their_ratios(folder: Path) -> None:
    report = sample()
    for row, ratio in zip(report["candidates"], (1.0, None, 0.9, 0.45), strict=True):
        row["ratio"] = ratio and measured("ratio", ratio, "")
    for row, quality in zip(report["candidates"], (30.0, None, 29.0, 25.0), strict=True):
        row["quality"] = quality and measured("PSNR", quality, "dB")
    checked = write_report(folder, report)
    source = (folder / "report.html").read_text(encoding="utf-8")
    places = [source.index(f'data-path="candidates.{i}.ratio.value"') for i in (3, 2, 0)]
    assert places == sorted(places) and places[-1] < source.index("crashed (signal 11)")
    page = Page(source)
    assert mismatches(page, checked) == []
    words = " ".join(page.words)
    assert words.count("on other samples") == 1 and "cannot be compared with the others in it" in words


def test_the_words_that_a_page_uses_are_explained(folder: Path) -> None:
    report = sample()
    report["result"]["quality"][0]["name"] = "top-1"
    write_report(folder, report)
    source = (folder / "report.html").read_text(encoding="utf-8")
    for word in ("baseline", "p50, p90, p99", "MACs", "top-1"):
        assert f"<dt>{word}</dt>" in source, word
    assert "<dt>KID</dt>" not in source


def test_the_same_build_twice_is_drawn_once(folder: Path) -> None:
    report = sample()
    report["result"]["label"] = report["baseline"]["label"]
    write_report(folder, report)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert source.count('class="name"') == 1
    assert "in turns between the two builds" not in source


def test_a_few_bytes_of_peak_memory_are_no_change(folder: Path) -> None:
    report = sample()
    for more, kind in ((1.04, ""), (1.2, "worse"), (0.5, "better")):
        report["baseline"]["peak_memory_bytes"] = 100_000_000
        report["result"]["peak_memory_bytes"] = int(100_000_000 * more)
        write_report(folder, report)
        said = text.percent_less(100_000_000, int(100_000_000 * more))
        assert f'<span class="{kind}">{said}</span>' in (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_says_on_what_it_was_measured(folder: Path) -> None:
    report = sample()
    write_report(folder, report)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "on this machine, 2 threads, batch 1, in turns with the baseline." in page
    report["result"]["latency"] = {"name": "latency", "status": "not measured", "reason": "no device"}
    write_report(folder, report)
    assert "latency on cpu: no device." in (folder / "report.html").read_text(encoding="utf-8")


MADE = Path(__file__).parents[1] / "out"
PAGES = {name: MADE / name for name in ("demo", "goals/resnet56", "goals/style-mosaic", "goals/taef2", "goals/ddpm")}


def wrong_in(seen: Any, report: dict[str, Any]) -> list[str]:
    """What a browser saw that a page must not do."""
    found = [*seen.errors, *(f"asks for {url}" for url in seen.requests)]
    found += [f"not loaded: {name}" for name, good in seen.answer["images"] if not good]
    found += [f"not drawn: {name}" for name, good in seen.answer["plots"] if not good]
    found += [f"{seen.answer['wide']} pixels too wide"] * (seen.answer["wide"] > 0)
    values = seen.answer["numbers"]
    return found + [f"{path}: {value}" for path, value in values if float(value) != float(at(report, path))]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with browser.browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def test_a_browser_finds_the_page_whole_in_every_light(folder: Path, tab: Any) -> None:
    report = write_report(folder, full_sample())
    for options in ({}, {"dark": True}, {"width": 390, "height": 844}):
        seen = tab.open(folder / "report.html", **options)
        assert wrong_in(seen, report) == []
        names = [name for name, _ in seen.answer["plots"]]
        assert names == ["latency samples", "efficiency gap", "waterline", "calibration curve"]
        assert len(seen.answer["images"]) == 1
        assert len(seen.answer["numbers"]) > 40
        assert seen.answer["focus"] > 15, "reached by the keyboard"


def test_the_browser_notices_what_is_wrong(folder: Path, tab: Any) -> None:
    report = write_report(folder, full_sample())
    source = (folder / "report.html").read_text(encoding="utf-8").replace("default-src 'none'; img-src data:; ", "")
    bad = '<img alt="gone" src="http://127.0.0.1:9/x.png"><script>console.error("x"); throw 1</script>'
    bad += '<data data-path="seed" value="8">8</data><div style="width:3000px">w</div><svg aria-label="empty"></svg>'
    (folder / "bad.html").write_text(source.replace("<main>", "<main>" + bad), encoding="utf-8")
    found = " ".join(wrong_in(tab.open(folder / "bad.html"), report))
    for expected in ("asks for http://127.0.0.1:9", "not loaded: gone", "not drawn: empty", "too wide", "seed: 8"):
        assert expected in found, expected


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_of_real_bundles(name: str, tmp_path: Path, tab: Any) -> None:
    """Drawn anew from the bundle's report.json, as this version draws it."""
    if not (PAGES[name] / "report.json").is_file():
        pytest.skip(f"out/{name} is not here (make demo, make bench)")
    shutil.copytree(PAGES[name], tmp_path / "b", ignore=shutil.ignore_patterns("*.onnx", "*.bin", "*.safetensors"))
    report = write_report(tmp_path / "b", json.loads((PAGES[name] / "report.json").read_text(encoding="utf-8")))
    assert (tmp_path / "b" / "report.html").stat().st_size < 5_000_000
    seen = tab.open(tmp_path / "b" / "report.html")
    assert wrong_in(seen, report) == []
    assert len(seen.answer["numbers"]) > 20
