"""`edgegen export`: several targets at once, rows that say where each number is from, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import bundles_for_devices
import pytest

import edgegen
from edgegen import cli, errors, exporting, serial
from edgegen.request import Request


def figure(status: str, **more: object) -> dict:
    """A latency as report.json holds it."""
    return {"value": 1.5, "status": status, "reason": "", "interval": None, "conditions": {}, **more}


def test_a_latency_says_where_it_is_from() -> None:
    told = exporting.latency_text
    assert told(figure("measured", conditions={"device": "local"})) == "1.5 ms, measured on local"
    estimated = figure("estimated", interval=[1.0, 2.0], conditions={"method": "roofline, unvalidated"})
    assert told(estimated) == "not measured: no device; estimated 1 to 2 ms (roofline, unvalidated)"
    assert told(figure("not measured", value=None, reason="it crashed")) == "not measured: it crashed"


def test_unknown_targets_and_taken_folders_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(errors.TargetError, match="did you mean 'jetson'"):
        exporting.export(Request(model="edsr"), ["jetsn"], tmp_path, lambda *_: None)
    taken = tmp_path / "edsr-cpu"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(errors.BundleError, match="not empty"):
        exporting.export(Request(model="edsr"), ["cpu"], tmp_path, lambda *_: None)
    assert (taken / "mine.txt").read_text() == "mine"


def test_a_target_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(request: Request, progress: object) -> object:
        raise errors.RuntimeFailed(f"no build runs on {request.target}")

    monkeypatch.setattr(exporting.pipeline, "compress", compress)
    rows = exporting.export(Request(model="edsr"), ["cpu", "jetson"], tmp_path, lambda *_: None)
    assert [(row.target, row.failure) for row in rows] == [
        ("cpu", "no build runs on cpu"), ("jetson-orin-nano", "no build runs on jetson"),
    ]  # fmt: skip
    assert not any(row.good for row in rows)


def test_a_fault_of_ours_is_a_row_with_its_traceback_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(request: Request, progress: object) -> object:
        raise AttributeError("no PROJECT")

    monkeypatch.setattr(exporting.pipeline, "compress", compress)
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    rows = exporting.export(Request(model="edsr"), ["cpu"], tmp_path, lambda *_: None)
    assert "a fault in edgegen, not in your input: AttributeError: no PROJECT; the traceback is in" in rows[0].failure
    kept = list((tmp_path / "cache").rglob("faults/*.txt"))
    assert len(kept) == 1 and "in compress" in kept[0].read_text()
    monkeypatch.setenv("EDGEGEN_TRACEBACK", "1")
    with pytest.raises(AttributeError):
        exporting.export(Request(model="edsr"), ["cpu"], tmp_path / "b", lambda *_: None)


def test_what_is_wrong_with_the_model_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match="unknown model 'edsrr'"):
        exporting.export(Request(model="edsrr"), ["cpu", "jetson"], tmp_path, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_an_export_takes_the_data_of_the_bundles_own_run(tmp_path: Path) -> None:
    with pytest.raises(errors.BundleError):
        exporting.request_of(tmp_path)


def test_the_sampler_of_a_model_is_the_users_to_choose_and_that_of_a_bundle_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="export needs the extra `torch`")
    asked: list[Request] = []
    monkeypatch.setattr(exporting, "export", lambda request, *rest: asked.append(request) or [])

    def run(*more: str) -> object:
        monkeypatch.setattr(sys, "argv", ["edgegen", "export", "--target", "cpu", "--quiet", *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert run("--model", "ddpm_unet", "--sampler", "heun,rho=5", "--steps", "9") == 0
    edgegen.export("ddpm_unet", ["cpu"], model_options={"sampler": {"name": "heun", "rho": 5, "steps": 9}}, data="a")
    assert asked[0].model_options == asked[1].model_options == {"sampler": {"name": "heun", "rho": 5, "steps": 9}}
    assert asked[1].data == Path("a") and asked[0].data is None
    made = bundles_for_devices.tiny(tmp_path / "a")
    (made / "request.json").write_text(json.dumps(serial.to_json(Request(model="net"))))
    assert run("--bundle", str(made), "--steps", "9") == 2
    assert "--steps are for --model; a bundle carries its own" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bundle_is_exported_again_and_verifies(tmp_path: Path) -> None:
    first = exporting.export(Request(model="edsr", samples=2), ["jetson"], tmp_path / "a", lambda *_: None)[0]
    assert first.good, first
    assert "twin in onnxruntime" in first.checked
    request = dataclasses.replace(exporting.request_of(first.out), samples=2)
    again = exporting.export(request, ["jetson"], tmp_path / "b", lambda *_: None)[0]
    assert again.good, again
    architectures = [json.loads((row.out / "architecture.json").read_text()) for row in (first, again)]
    assert architectures[0] == architectures[1]
