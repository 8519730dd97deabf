"""`edgegen compare`: what is worse beyond noise is said and ends with 1; what cannot be compared never is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bundles_for_devices
import pytest
from test_report import measured, sample

from edgegen import cli, comparing, files
from edgegen.errors import BundleError, UsageError

pytest.importorskip("onnxruntime", reason="the bundles are for ONNX Runtime")


def psnr(samples: list[float]) -> dict[str, Any]:
    value = sum(samples) / len(samples)
    conditions = {"n": len(samples), "seed": 0}
    return measured("PSNR", value, "dB", direction="higher", samples=tuple(samples), conditions=conditions)


def bundle(out: Path, *, side: int = 16, size: int = 1000, samples: list[float] | None = None, **report: Any) -> Path:
    """A bundle that runs, with a report that says what the test wants."""
    path = bundles_for_devices.tiny(out, side=side)
    told = sample() | {"data": {"test": {"count": 8, "sha256": "ab"}}, "images": []} | report
    told["result"] |= {"size_bytes": size, "quality": [psnr(samples or [30.0 + i / 10 for i in range(8)])]}
    rewrite(path, told)
    return path


def rewrite(path: Path, report: dict[str, Any]) -> None:
    """Another report.json in a bundle, and its hash in the manifest."""
    (path / "report.json").write_text(json.dumps(report))
    manifest = json.loads((path / "manifest.json").read_text())
    size = (path / "report.json").stat().st_size
    manifest["files"]["report.json"] = {"sha256": files.sha256(path / "report.json"), "bytes": size}
    (path / "manifest.json").write_text(json.dumps(manifest))


def verdicts(found: comparing.Comparison) -> dict[str, str]:
    return {line.name: line.verdict for line in found.lines}


def test_a_bundle_is_the_same_as_its_copy(tmp_path: Path) -> None:
    found = comparing.compare(bundle(tmp_path / "a"), bundle(tmp_path / "b"), measure=False)
    assert found.worse == ()
    assert set(verdicts(found).values()) == {"same", "not comparable"}
    assert verdicts(found)["latency p50"] == "not comparable"
    assert "not interleaved" in found.lines[0].how


@pytest.mark.parametrize(("before", "after", "verdict"), [(-1, -6, "worse"), (-6, 1, "better"), (1, 6, "worse")])
def test_a_shift_is_worse_the_farther_it_is_from_zero_on_either_side(before: float, after: float, verdict: str) -> None:
    told = {"n": 4, "seed": 0, "two_sided": True}
    old, new = (measured("brightness shift", v, "/255", samples=(v,) * 4, conditions=told) for v in (before, after))
    assert comparing._figure("brightness shift", old, new, True, 0.0).verdict == verdict


def test_latency_is_measured_now_and_slower_is_worse(tmp_path: Path) -> None:
    fast, slow = bundle(tmp_path / "a"), bundle(tmp_path / "b", side=384)
    found = comparing.compare(fast, slow, rounds=3)
    line = found.lines[0]
    assert line.verdict == "worse"
    assert line.how.startswith("measured now, in 3 turns on ")
    assert line.ratio is not None
    assert line.interval is not None
    assert line.interval[0] > 1
    assert comparing.compare(slow, fast, rounds=3).lines[0].verdict == "better"


@pytest.mark.parametrize(
    ("moved", "allowed", "verdict"),
    [
        pytest.param(-0.5, 0.0, "worse", id="every sample a little lower"),
        pytest.param(-0.5, 0.6, "same", id="within what is allowed"),
        pytest.param(0.5, 0.0, "better", id="higher"),
        pytest.param(0.0, 0.0, "same", id="the same"),
    ],
)
def test_quality_is_paired_by_sample(tmp_path: Path, moved: float, allowed: float, verdict: str) -> None:
    """Samples lie 14 dB apart, so unpaired intervals overlap whatever happens."""
    before = [20.0 + 2 * i for i in range(8)]
    after = [value + moved + (0.01 * (i % 3 - 1)) * bool(moved) for i, value in enumerate(before)]
    sides = [bundle(tmp_path / name, samples=values) for name, values in (("a", before), ("b", after))]
    found = comparing.compare(*sides, measure=False, quality_drop=allowed)
    assert verdicts(found)["PSNR"] == verdict
    assert "8 samples, paired" in comparing.markdown(found)


def test_other_data_is_not_comparable(tmp_path: Path) -> None:
    other = {"data": {"test": {"count": 8, "sha256": "cd"}}}
    found = comparing.compare(bundle(tmp_path / "a"), bundle(tmp_path / "b", samples=[1.0] * 8, **other), measure=False)
    assert verdicts(found)["PSNR"] == "not comparable"
    assert found.worse == ()


def test_a_larger_file_is_worse_only_beyond_noise(tmp_path: Path) -> None:
    small, same, large = (bundle(tmp_path / str(size), size=size) for size in (1000, 1015, 1500))
    assert verdicts(comparing.compare(small, same, measure=False))["size"] == "same"
    assert verdicts(comparing.compare(small, large, measure=False))["size"] == "worse"
    assert verdicts(comparing.compare(small, large, measure=False, noise=0.6))["size"] == "same"
    assert verdicts(comparing.compare(large, small, measure=False))["size"] == "better"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    good = bundle(tmp_path / "a")
    with pytest.raises(UsageError, match="noise must lie in"):
        comparing.compare(good, good, noise=1.5)
    (good / "report.json").write_text("{}")
    with pytest.raises(BundleError, match="no report to compare"):
        comparing.compare(good, good, measure=False)
    with pytest.raises(BundleError, match="is not a bundle"):
        comparing.compare(tmp_path, good)


@pytest.mark.parametrize(("size", "code"), [(1000, 0), (2000, 1)])
@pytest.mark.parametrize("form", ["--markdown", "--json", ""])
def test_the_command_ends_with_one_when_worse(
    tmp_path: Path, capsys: Any, monkeypatch: Any, size: int, code: int, form: str
) -> None:
    a, b = bundle(tmp_path / "a"), bundle(tmp_path / "b", size=size)
    arguments = ["edgegen", "compare", str(a), str(b), "--no-measure", *([form] if form else [])]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    shown = capsys.readouterr().out
    if form == "--json":
        told = json.loads(shown)
        assert told["worse"] is bool(code)
        assert {line["name"] for line in told["lines"]} >= {"latency p50", "size", "PSNR", "passes kept", "build"}
    else:
        assert ("is worse than" in shown.replace("\n", " ")) is bool(code)
        row = "| size | 1.00 kB | 2.00 kB | 2.00x more | **worse** |"
        assert (row in shown) is (form == "--markdown" and bool(code))


def test_the_sentence_says_what_was_better_and_what_was_not_compared() -> None:
    def line(name: str, verdict: str) -> comparing.Line:
        return comparing.Line(name, "1", "2", verdict=verdict)

    same, better, worse = (line("memory", "same"), line("size", "better"), line("PSNR", "worse"))
    lost = line("latency p50", "not comparable")
    for lines, expected in (
        ((same,), "b is not worse than a"),
        ((same, better), "b is not worse than a, and better in size"),
        ((lost, better), "b is not worse than a in what was compared, and better in size; not comparable: latency p50"),
        ((lost, better, worse), "b is worse than a in PSNR; better in size; not comparable: latency p50"),
    ):
        assert comparing.Comparison("a", "b", lines).headline == expected
