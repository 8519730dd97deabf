"""The run log: what is finished is replayed, a line cut off by a kill is not."""

import pytest

from edgegen.runlog import RunLog


def test_a_finished_value_is_replayed_and_not_computed_again(tmp_path):
    first = RunLog(tmp_path / "log.jsonl")
    assert first.once("a", lambda: {"ms": [1.5, 2]}) == {"ms": [1.5, 2]}
    again = RunLog(tmp_path / "log.jsonl")
    assert again.once("a", lambda: pytest.fail("computed twice")) == {"ms": [1.5, 2]}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_off_by_a_kill_runs_again_and_the_log_stays_readable(tmp_path, cut):
    file = tmp_path / "log.jsonl"
    log = RunLog(file)
    log.once("a", lambda: 1)
    log.once("b", lambda: 2)
    file.write_bytes(file.read_bytes()[:-cut])
    resumed = RunLog(file)
    assert "a" in resumed
    assert "b" not in resumed
    assert resumed.once("b", lambda: 3) == 3
    assert RunLog(file).once("b", lambda: 4) == 3


def test_a_computation_that_fails_leaves_no_trace(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    with pytest.raises(ZeroDivisionError):
        log.once("a", lambda: 1 / 0)
    assert "a" not in RunLog(tmp_path / "log.jsonl")
