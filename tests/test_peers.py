"""The pure parts of benchmarks/peers, scaling.py and startup.py: what is read, compared, and drawn, and that it can
fail. No peer is installed or run here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling  # noqa: E402
import startup  # noqa: E402
from peers import cases, environments, inside, judge, launch, report  # noqa: E402
from peers import lane as lane_module  # noqa: E402
from peers import run as peer_run  # noqa: E402

PEERS = environments.names()


def lane(p50: float, quality: float, to_own: tuple[float, float], rounds: int = 9) -> dict:
    """A timed lane whose rounds wobble by 2 %; to_own: interval of its quality less edgegen's."""
    medians = [p50 * factor for factor in np.linspace(0.99, 1.01, rounds)]
    return {"p50_ms": p50, "interval_ms": [min(medians), max(medians)], "round_medians": medians,
            "quality": {"value": quality, "interval": [quality - 0.1, quality + 0.1], "n": 100},
            "differences": {"edgegen default @ openvino": {"value": 0.0, "interval": list(to_own)}}}  # fmt: skip


def cell(peer: str, seconds: float = 10.0, peak: float = 500.0, **more: object) -> dict:
    """A finished cell on the case "net"."""
    return {"kind": "cell", "case": "net", "peer": peer, "setting": "default", "seconds": seconds, "peak_mb": peak,
            "lines": 7, "exit": "ok", "size_bytes": 2_000_000, "versions": {"numpy": "2.4.6"}, **more}  # fmt: skip


def rows(own_ms: float = 1.0, rival_ms: float = 2.0, to_own: tuple[float, float] = (-0.1, 0.1)) -> dict:
    """Lines of one case: edgegen, a fast peer of the given quality, a slow unquantized build of equal quality."""
    lanes = {
        "edgegen default @ openvino": lane(own_ms, 30.0, (0.0, 0.0)),
        "rival default @ onnxruntime": lane(rival_ms, 30.0, to_own),
        "unquantized default @ openvino": lane(4.0, 31.0, (0.5, 1.5)),
    }
    timing = {"kind": "timing", "case": "net", "figure": "PSNR dB", "higher": True, "lanes": lanes}
    lines = [cell("edgegen", 20.0, 900.0), cell("rival"), timing]
    return {report.key(row): row for row in lines}


def verdicts(found: dict) -> dict[str, bool | None]:
    """The first word that tells which goal it is -> whether it is met."""
    named = {}
    for _, text, met in report.checks(found, "default"):
        kind = next(word for word in ("geometric", "time", "memory", "fast", "no") if word in text.split())
        named[kind] = met
    return named


def test_ratio_is_the_factor_between_two_lanes_paired_by_round() -> None:
    slow, fast = [2.0, 20.0, 4.0, 6.0], [1.0, 10.0, 2.0, 3.0]  # one round was disturbed, for both alike
    found = report.ratio(slow, fast)
    assert found["value"] == pytest.approx(2.0)
    assert found["interval"] == pytest.approx((2.0, 2.0))
    assert report.ratio(fast, slow)["value"] == pytest.approx(0.5)


def test_ratio_of_noise_has_an_interval_that_holds_one() -> None:
    rng = np.random.default_rng(0)
    low, high = report.ratio(rng.lognormal(0, 0.1, 30), rng.lognormal(0, 0.1, 30))["interval"]
    assert low < 1 < high
    assert high - low > 0.01


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_ratio_refuses_rounds_that_are_no_pairs(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="same rounds"):
        report.ratio(above, below)


def test_geometric_mean_of_factors() -> None:
    found = report.geometric_mean([([4.0, 4.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.0])])
    assert found is not None
    assert found["value"] == pytest.approx(2.0)
    assert found["interval"] == pytest.approx((2.0, 2.0))
    assert report.geometric_mean([]) is None


def test_the_rival_is_the_fastest_lane_of_equal_quality() -> None:
    told = report.verdict(rows()[("net",)], "default")
    assert told is not None
    assert told["rival"] == "rival default @ onnxruntime"
    assert told["ratio"]["value"] == pytest.approx(2.0)


def test_a_lane_shown_to_be_worse_is_no_rival() -> None:
    told = report.verdict(rows(to_own=(-2.0, -1.0))[("net",)], "default")
    assert told is not None
    assert told["rival"] == "unquantized default @ openvino"
    assert told["ratio"]["value"] == pytest.approx(4.0)


def test_where_lower_is_better_the_comparison_turns_round() -> None:
    worse = {"differences": {"own": {"interval": [1.0, 2.0]}}}
    assert report.as_good(worse, "own", higher=True)
    assert not report.as_good(worse, "own", higher=False)
    assert not report.as_good({"differences": {"own": {"interval": [float("nan"), 2.0]}}}, "own", higher=True)
    assert not report.as_good({}, "own", higher=True)


def test_goals_are_met_and_missed() -> None:
    assert verdicts(rows(own_ms=1.0, rival_ms=2.0)) == {
        "fast": True, "time": False, "memory": False, "geometric": True
    }  # fmt: skip
    lost = rows(own_ms=2.0, rival_ms=1.0)
    assert verdicts(lost)["fast"] is False
    assert verdicts(lost)["geometric"] is False
    between = rows(own_ms=1.0, rival_ms=1.2)  # faster, and not 1.5 times
    assert verdicts(between)["fast"] is True
    assert verdicts(between)["geometric"] is False


def test_time_and_memory_within_their_limits() -> None:
    found = rows()
    found["net", "edgegen", "default"] |= {"seconds": 11.9, "peak_mb": 549.0}
    assert verdicts(found) == {"fast": True, "time": True, "memory": True, "geometric": True}


def test_without_a_lane_of_ours_nothing_is_claimed() -> None:
    found = rows()
    found[("net",)]["lanes"]["edgegen default @ openvino"] = {"failure": "died"}
    assert [(met, text) for _, text, met in report.checks(found, "default")] == [(None, "edgegen has no lane")]


def test_best_falls_back_to_the_default_setting() -> None:
    told = report.chosen(rows()[("net",)], "best")
    assert told is not None
    assert told["own"] == "edgegen default @ openvino"


def test_failures_stay_in_the_table() -> None:
    found = rows()
    found["net", "broken", "default"] = {
        "kind": "cell", "case": "net", "peer": "broken", "setting": "default", "lines": 3,
        "exit": "killed by SIGSEGV", "failure": "last words",
    }  # fmt: skip
    found[("net",)]["lanes"]["rival default @ openvino"] = {"failure": "no such kernel"}
    text = report.markdown(found, {"cpu_model": "some"})
    assert "| broken default | | | | |  |  |  | 3 | killed by SIGSEGV: last words |" in text
    assert "fails to run: no such kernel" in text
    assert "| net | 2.00x (2.00 to 2.00) as fast as rival default @ onnxruntime | yes |" in text
    assert "**no**" in text  # time and memory
    columns = {line.count("|") for line in text.split("### net")[1].splitlines() if line.startswith("|")}
    assert columns == {11}


def test_lines_are_read_newest_last_and_a_cut_off_end_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "peers.jsonl"
    old, new = cell("rival", 1.0), cell("rival", 2.0)
    file.write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n" + json.dumps(cell("edgegen"))[:40], encoding="utf-8")
    assert report.read(file) == {("net", "rival", "default"): new}
    file.write_text(json.dumps(old)[:40] + "\n" + json.dumps(new) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        report.read(file)
    assert report.read(tmp_path / "none.jsonl") == {}


def test_the_plot_shows_every_timed_lane(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(rows(), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert text.count("<use") >= 3
    report.plot({}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_keeps_the_contract(peer: str) -> None:
    file = environments.HERE / peer / "peer.py"
    settings = launch.literal(file, "SETTINGS")
    assert set(settings) == {"default", "best"}
    assert settings["default"] != settings["best"]
    assert set(launch.literal(file, "RUNS")) <= {"onnxruntime", "openvino", "litert", "executorch", "bundle"}
    assert 1 <= launch.user_lines(file.read_text(encoding="utf-8")) < 60
    compile(file.read_text(encoding="utf-8"), str(file), "exec")


@pytest.mark.parametrize("peer", [name for name in PEERS if name != environments.OWN])
def test_every_requirement_is_pinned_and_names_no_place(peer: str) -> None:
    text = (environments.HERE / peer / "requirements.txt").read_text(encoding="utf-8")
    named = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert named
    for line in named:
        name, pin, version = line.partition("==")
        assert name and pin and version and "/" not in line, line


def test_peers_that_share_a_runtime_with_us_pin_our_version() -> None:
    ours = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for peer in PEERS:
        file = environments.HERE / peer / "requirements.txt"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        for package in ("onnxruntime", "openvino", "torch"):
            for line in text.splitlines():
                if line.split("==")[0] == package:
                    assert line.split("==")[1] == ours[package], (peer, line)


def test_user_lines_are_those_between_the_markers() -> None:
    text = "import os\n# user: begin\nimport nncf\n\n# why\n    model = nncf.quantize(\n        x)\n# user: end\nx\n"
    assert launch.user_lines(text) == 3
    with pytest.raises(ValueError, match="one"):
        launch.user_lines("no markers")
    with pytest.raises(ValueError, match="one"):
        launch.user_lines("# user: end\nx\n# user: begin\n")


def test_a_crash_is_a_result(tmp_path: Path) -> None:
    def ended(code: str) -> dict:
        return launch.measured([sys.executable, "-c", code], tmp_path / "log")

    died = ended("import os; os.kill(os.getpid(), 11)")
    assert launch.ending(died["code"]) == "killed by SIGSEGV"
    raised = ended("print('before'); raise ValueError('all | is lost')")
    assert launch.ending(raised["code"]) == "exit 1"
    assert launch.last_words(tmp_path / "log") == "ValueError: all / is lost"
    assert ended("pass")["code"] == 0
    assert launch.measured([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 0.2)["code"] == -9


def test_peak_memory_counts_the_children(tmp_path: Path) -> None:
    child = "import time; x = bytearray(60_000_000); time.sleep(0.5)"
    two = f"import subprocess, sys; a = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in '12']; " \
          "[p.wait() for p in a]"  # fmt: skip
    found = launch.measured([sys.executable, "-c", two], tmp_path / "log")
    assert found["code"] == 0
    assert 120_000_000 < found["peak_bytes"] < 400_000_000
    assert found["seconds"] >= 0.5


def test_peak_memory_is_not_that_of_the_process_that_measures(tmp_path: Path) -> None:
    mine = np.ones(50_000_000)  # 400 MB
    found = launch.measured([sys.executable, "-c", "import time; time.sleep(0.4)"], tmp_path / "log")
    assert mine.nbytes > 8 * found["peak_bytes"] > 0


def test_cells_of_a_peer_that_cannot_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(peer: str) -> Path:
        raise environments.CannotInstall("no such version")

    monkeypatch.setattr(environments, "python", refuse)
    found = launch.cell(cases.CASES["resnet20"], "olive_onnx", "default", {}, tmp_path, tmp_path / "out")
    assert (found["exit"], found["failure"]) == ("cannot install", "no such version")


def test_a_timing_is_never_taken_without_its_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine a finished case stays as it is, and a case with a new cell makes all its artifacts again."""
    ran: list[str] = []

    def fake_cell(case: cases.Case, peer: str, setting: str, given: object, folder: Path, out: Path) -> dict:
        ran.append(peer)
        (tmp_path / peer).touch()
        return {"case": case.name, "peer": peer, "setting": setting, "exit": "ok", "path": peer}

    monkeypatch.setattr(cases, "ROOT", tmp_path)
    monkeypatch.setattr(cases, "prepare", lambda case, out: out)
    monkeypatch.setattr(launch, "cell", fake_cell)
    monkeypatch.setattr(peer_run, "now", lambda: f"run {len(ran)}")
    monkeypatch.setattr(judge, "measure", lambda folder, ready, **given: {"rounds": given["rounds"], "of": len(ready)})
    output = tmp_path / "peers.jsonl"
    old = {"kind": "cell", "case": "resnet20", "setting": "default", "exit": "ok", "date": "2026-01-01"}
    peer_run.append(output, {**old, "peer": "nncf_onnx", "path": "gone"})
    peer_run.append(output, {"kind": "timing", "case": "resnet20", "rounds": 3, "of": 1,
                             "made": [["nncf_onnx", "default", "2026-01-01"]]})  # fmt: skip
    options = argparse.Namespace(output=output, peer=["nncf_onnx"], setting=["default"], again=False, no_timing=False,
                                 rounds=3, threads=1, seconds=0.1)  # fmt: skip
    peer_run.run_case(cases.CASES["resnet20"], options)
    assert ran == []
    options.peer = ["nncf_onnx", "olive_onnx"]
    peer_run.run_case(cases.CASES["resnet20"], options)
    assert ran == ["nncf_onnx", "olive_onnx"]
    assert report.read(output)["resnet20",]["of"] == 2
    (tmp_path / "nncf_onnx").unlink()
    options.peer, options.again = ["olive_onnx"], True
    with pytest.raises(ValueError, match="no timing without the artifacts of nncf_onnx default"):
        peer_run.run_case(cases.CASES["resnet20"], options)


def test_files_with_integer_inputs_get_integers() -> None:
    x = np.array([-9.0, -0.26, 0.0, 0.5, 9.0], np.float32)
    codes = lane_module.encode(x, np.int8, 0.05, 3)
    assert codes.tolist() == [-128, -2, 3, 13, 127]
    assert lane_module.decode(codes, 0.05, 3)[1:4] == pytest.approx([-0.25, 0.0, 0.5])
    assert lane_module.encode(x, np.float32, 0.0, 0) is x
    assert lane_module.decode(x, 0.0, 0) is x


def test_inputs_are_matched_by_name_else_by_place() -> None:
    assert lane_module.matched(["sample", "timestep"], ["timestep", "sample"]) == ["sample", "timestep"]
    assert lane_module.matched(["sample", "timestep"], ["x", "t"]) == ["x", "t"]
    with pytest.raises(ValueError, match=r"\['sample', 'timestep'\], the file \['x'\]"):
        lane_module.matched(["sample", "timestep"], ["x"])


def test_samples_of_a_network_of_two_inputs_have_batch_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", sample=np.zeros((3, 1, 4, 4), np.float32), timestep=np.arange(3, dtype=np.float32))
    found = inside.Source(tmp_path, {"inputs": ["sample", "timestep"]}).samples(tmp_path / "c.npz")
    assert [(s["sample"].shape, s["timestep"].tolist()) for s in found] == [((1, 1, 4, 4), [i]) for i in range(3)]


def test_edgegen_never_sees_the_images_of_the_table(tmp_path: Path) -> None:
    x = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    np.savez(tmp_path / "all.npz", x=x, y=np.arange(20))
    judge = cases.part(tmp_path / "all.npz", tmp_path / "judge", lambda n: range(0, n, 2))
    held = cases.part(tmp_path / "all.npz", tmp_path / "held", lambda n: range(1, n, 2))
    seen, kept = (set(np.load(file)["x"].ravel().tolist()) for file in (judge, held))
    assert seen | kept == set(range(20))
    assert not seen & kept
    assert np.load(held)["y"].tolist() == sorted(kept)
    assert cases.spread(3, 9).tolist() == [0, 4, 8]
    assert cases.spread(9, 3).tolist() == [0, 1, 2]


def test_edgegen_gets_the_preset_or_the_recipe_of_the_case() -> None:
    best = launch.options(cases.CASES["rlfn"], "edgegen", "best")
    assert best["arguments"] == ["--recipe", "post-training", "--thorough"]
    assert launch.options(cases.CASES["edsr"], "edgegen", "best")["arguments"][-2:] == ["balanced", "--thorough"]
    given = launch.options(cases.CASES["deit_tiny"], "edgegen", "default")
    assert given["arguments"] == ["--recipe", "post-training", "--latency-only"]
    for case in cases.CASES.values():
        for argument in case.best:
            assert "/" not in argument or Path(argument).is_file()


def test_one_line_has_no_bars_and_no_addresses() -> None:
    text = environments.one_line("a | b\n see https://host.example/x for\tmore")
    assert text == "a / b see for more"
    assert len(environments.one_line("word " * 500)) <= 304


def test_exponents_of_known_growth() -> None:
    sizes = [1e3, 1e4, 1e5]
    assert scaling.slope(sizes, [2 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert scaling.slope(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="two positive"):
        scaling.slope([1.0], [1.0])


def test_growth_that_is_too_steep_is_said_so() -> None:
    def made(power: float) -> str:
        return scaling.table([{"kind": "evaluate", "size": n, "seconds": n**power, "peak_mb": 300.0, "ended": "ok"}
                              for n in (1e3, 1e4, 1e5)])  # fmt: skip

    assert "| evaluate | seconds | 2.00 | 2.00 | 1.1 | **no** |" in made(2.0)
    assert "| evaluate | seconds | 1.00 | 1.00 | 1.1 | yes |" in made(1.0)
    assert "| evaluate | peak_mb | 0.00 | 0.00 | 0.1 | yes |" in made(1.0)
    assert "| parameters | seconds | | | 1.1 | cannot be told |" in made(1.0)


def test_the_import_profile_is_parsed() -> None:
    text = "import time: self [us] | cumulative | imported package\nimport time:   150 |   1150 |   numpy.core\nx\n"
    assert startup.profile(text) == [
        {"module": "numpy.core", "self_ms": 0.15, "total_ms": 1.15, "depth": 1}
    ]


def test_a_slow_start_is_said_so() -> None:
    assert startup.met({"goal_s": 0.3, "median_s": 0.2}) == "yes"
    assert startup.met({"goal_s": 0.3, "median_s": 0.4}) == "**no**"
    assert startup.met({"goal_s": None, "median_s": 0.4}) == ""
