"""Records of devices: their findings, results files, and what they must not tell."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bundles_for_devices import measured_here

from edgegen import device_items, device_records, errors, files, on_device
from edgegen.device_records import Record

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def record(bundles: Any) -> Record:
    """A record whose rounds are given: eight, steady, 10 ms."""
    common = {"settings": {"rounds": 8, "run": "abc"}}
    (item,) = device_items.in_bundles([bundles("good")])
    about = item.known(common, "runner", files.sha256(on_device.RUNNER))
    rounds = [{"session": 1, "ms": [10.0, 10.1, 9.9], "bare_ms": [9.0], "state": state(2400, 50)} for _ in range(8)]
    return Record(
        **about, device={"kind": "ssh", "facts": {"model": "Board"}}, status="measured",
        rounds=[device_records.Round(**one) for one in rounds],
    )  # fmt: skip


def state(mhz: float, celsius: float) -> dict[str, Any]:
    return {"mhz": {"policy0": mhz, "policy0 max": 2400.0}, "celsius": {"cpu": celsius}}


def with_rounds(record: Record, *rounds: tuple[float, float, float]) -> Record:
    made = [device_records.Round(session=1, ms=[ms] * 3, state=state(mhz, heat)) for ms, mhz, heat in rounds]
    return record.model_copy(update={"rounds": made})


def test_a_steady_run_has_no_findings_and_throttling_is_found(record: Record) -> None:
    assert device_records.findings(record) == []
    hot = with_rounds(record, *[(10, 2400, 50)] * 3, *[(11, 2000, 70)] * 3, *[(15, 1500, 84)] * 3)
    (finding,) = device_records.findings(hot)
    drift = "the clock fell from 2400 to 1500 MHz, it warmed from 50 to 84 degrees"
    assert finding == f"later rounds are 50% slower than the first: {drift}"
    fell = with_rounds(record, *[(10, 2400, 50)] * 3, *[(10, 1500, 51)] * 3)
    assert device_records.findings(fell) == ["the clock fell from 2400 to 1500 MHz"]
    jumpy = with_rounds(record, *[(ms, 2400, 50) for ms in (10, 14, 10, 14, 10, 14, 10, 14, 10)])
    assert device_records.findings(jumpy) == ["rounds lie 40% apart"]
    throttled = record.model_copy(update={"after": {"throttled": "throttled=0x50005"}})
    assert "under-voltage or throttling (0x50005)" in device_records.findings(throttled)[0]
    conditions = device_records.measurements(hot)[0].conditions
    assert conditions["steady"] is False and conditions["findings"] == [finding]


def test_records_are_submitted_and_read_again(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "results" / "board.json"
    assert device_records.submit([record], file, by="A. N. Other") == 1
    again = record.model_copy(update={"reason": "", "peak_bytes": 5})
    assert device_records.submit([again], file) == 2
    first, second = device_records.load_records(file.parent)
    assert first.provenance.by == "A. N. Other" and second.peak_bytes == 5
    assert first.model_copy(update={"provenance": record.provenance}) == record
    assert device_records.load_records(tmp_path / "none") == []
    with pytest.raises(errors.UsageError, match="holds this measurement of net already"):
        device_records.submit([record], file)


def test_only_figures_are_submitted(record: Record, tmp_path: Path) -> None:
    failed = record.model_copy(update={"status": "not measured", "reason": "no runtime"})
    with pytest.raises(errors.UsageError, match="only measured records are submitted, got: no runtime"):
        device_records.submit([failed], tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r.update(extra=1), r"records\[0\]\.extra"),
        (lambda r: r["rounds"][0]["ms"].append(-1.0), r"records\[0\]\.rounds\.0\.ms\.3"),
        (lambda r: r["provenance"].update(made="yesterday"), r"records\[0\]\.provenance\.made"),
        (lambda r: r.update(schema=2), r"records\[0\]\.schema"),
        (lambda r: r.pop("network"), r"records\[0\]\.network"),
    ],
)
def test_a_damaged_record_is_refused_by_file_and_field(record: Record, tmp_path: Path, change: Any, where: str) -> None:
    device_records.submit([record], tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    change(content["records"][0])
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(errors.UsageError, match=rf"r\.json: {where}"):
        device_records.load_records(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 9, "records": []}', '{"schema": 1}'])
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(errors.UsageError, match=r"r\.json: "):
        device_records.load_records(tmp_path)


def test_a_record_tells_nothing_about_who_or_where(bundles: Any) -> None:
    pytest.importorskip("onnxruntime")
    (made,) = measured_here(bundles("good"))
    text = json.dumps(device_records.to_json(made))
    for private in (os.uname().nodename, str(Path.home()), str(bundles("good").parent), "/far/away"):
        assert len(private) < 3 or private not in text
