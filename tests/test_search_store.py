"""The state of a search: one row a candidate, any number of workers, one of them killed, on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgegen.errors import UsageError

pytest.importorskip("optuna", reason="optuna is not installed (extra: search)")

from edgegen.search import database, spaces, store, strategies, working
from edgegen.search.store import DONE, Figures
from edgegen.types import Budget

SPACE = spaces.parse(
    {
        "schema": 1,
        "genes": [
            {"name": "channels", "pass": "prune_channels", "option": "ratio",
             "choices": [0.0, *(round(0.04 * i, 2) for i in range(1, 20))], "off": 0.0},
            {"name": "blocks", "pass": "prune_blocks", "option": "ratio",
             "choices": [0.0, *(round(0.05 * i, 2) for i in range(1, 10))], "off": 0.0},
            {"name": "int8", "pass": "quantize", "option": "precision", "choices": ["float", "int8"], "off": "float"},
        ],
    },
    "synthetic",
)  # fmt: skip

# A worker as a program: writes a line for each candidate it begins, and takes `pause` seconds for it.
WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_search_store import SPACE, synthetic
from edgegen.search import spaces, store, strategies, working
url, log, pause, trials, seed = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
kept, study, _ = store.open_study(url, "s", {{"v": 1}}, strategies.make("nsga2", SPACE, trials, seed), grace=2.0)
def objective(choices):
    with log.open("a") as file:
        file.write(spaces.candidate_key(spaces.to_recipe(SPACE, choices, {{}})) + chr(10))
    time.sleep(pause)
    return synthetic(choices)
print(working.work(kept, study, SPACE, {{}}, objective, trials=trials, seed=seed))
"""


def synthetic(choices: dict[str, int]) -> Figures:
    """A front that is known: what is faster is worse; INT8 helps speed and costs a little."""
    strength = choices["channels"] / 19 + choices["blocks"] / 9
    latency = 10.0 - 3.0 * strength - 2.0 * choices["int8"]
    return Figures(latency, latency / 10.0, strength**2 + 0.1 * choices["int8"], 1_000_000 - 100 * choices["channels"])


def opened(url: str, trials: int = 20, name: str = "s", grace: float = 2.0, seed: int = 0) -> tuple:
    found = store.open_study(url, name, {"v": 1}, strategies.make("nsga2", SPACE, trials, seed), grace)
    OPEN.append(found[0])
    return found[:2]


def sampled(folder: Path, name: str, space: spaces.Space = SPACE, trials: int = 24, seed: int = 0) -> tuple:
    sampler = strategies.make(name, space, trials, seed)
    found = store.open_study(str(folder / "s.db"), "s", {}, sampler, 2.0)
    OPEN.append(found[0])
    return found[:2]


OPEN: list[store.Store] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of our own, on a socket and a port of its own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra: search)")
    homes = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    path = os.pathsep.join([os.environ.get("PATH", ""), *homes])
    programs = {name: shutil.which(name, path=path) for name in ("initdb", "postgres")}
    if missing := [name for name, found in programs.items() if found is None]:
        pytest.skip(f"{missing[0]} is not installed (.ci/setup installs it)")
    user: dict = {}
    folder = tmp_path_factory.mktemp("postgres")
    if os.geteuid() == 0:  # the server refuses to run as root
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
    place = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", "check": True, "timeout": 60}
    password = folder / "password"
    password.write_text("se:cr/et\n")
    password.chmod(0o644)
    make = ["-D", str(place), "-U", "edgegen", "-A", "scram-sha-256", f"--pwfile={password}", "-N"]
    subprocess.run([programs["initdb"], *make], **quiet, **user)
    port = _free_port()
    options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
    command = [programs["postgres"], "-D", str(place), *options.split()]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    server = subprocess.Popen(command, **silent, **user)
    url = f"postgresql://edgegen:se%3Acr%2Fet@127.0.0.1:{port}/postgres"
    try:
        _wait_for(url, server)
        yield url
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    import psycopg

    until = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url, connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.1)


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def started(url: str, log: Path, pause: float, trials: int, seed: int) -> subprocess.Popen:
    code = WORKER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, url, str(log), str(pause), str(trials), str(seed)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finished(workers: list[subprocess.Popen]) -> list[int]:
    """How many candidates each worker did."""
    counts = []
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err[-2000:]
        counts.append(int(out.strip().splitlines()[-1]))
    return counts


def check_search_with_a_killed_worker(url: str, folder: Path, count: int, trials: int) -> None:
    kept, _ = opened(url, trials)  # the tables are there before the workers
    logs = [folder / f"{i}.log" for i in range(count)]
    workers = [started(url, logs[i], 0.15, trials, i) for i in range(count)]
    victim_log = logs[0]
    until = time.monotonic() + 60
    while not (victim_log.exists() and victim_log.read_text().count("\n") >= 1):
        assert time.monotonic() < until, workers[0].poll()
        time.sleep(0.01)
    workers[0].send_signal(signal.SIGKILL)
    workers[0].communicate()
    done = finished(workers[1:])
    rows = kept.rows()
    assert len(rows) == trials
    assert {row.state for row in rows} == {DONE}
    assert len({row.key for row in rows}) == trials, "none twice"
    assert sorted(row.slot for row in rows) == list(range(trials))
    begun = [key for log in logs if log.exists() for key in log.read_text().split()]
    assert {row.key for row in rows} == set(begun)
    again = {key for key in begun if begun.count(key) > 1}
    taken_over = {row.key for row in rows if row.attempts > 1}
    assert again == taken_over, "only what the killed worker had was begun twice"
    assert len(taken_over) <= 1
    assert sum(done) >= trials - victim_log.read_text().count("\n")
    for row in rows:
        assert row.figures == synthetic(row.choices)


COUNTS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_sqlite_workers_do_each_candidate_once_and_one_may_die(tmp_path: Path, count: int) -> None:
    check_search_with_a_killed_worker(str(tmp_path / "study.db"), tmp_path, count, 16)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_postgres_workers_do_each_candidate_once_and_one_may_die(postgres: str, tmp_path: Path, count: int) -> None:
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE workers{count}")
    check_search_with_a_killed_worker(postgres.replace("/postgres", f"/workers{count}"), tmp_path, count, 16)


def test_a_search_that_ended_goes_on_with_more_trials_and_repeats_none(tmp_path: Path) -> None:
    url = str(tmp_path / "study.db")
    begun: list[str] = []

    def objective(choices: dict[str, int]) -> Figures:
        begun.append(spaces.candidate_key(spaces.to_recipe(SPACE, choices, {})))
        return synthetic(choices)

    for trials in (8, 8, 14):
        kept, study = opened(url, trials)
        working.work(kept, study, SPACE, {}, objective, trials=trials)
    assert len(begun) == len(set(begun)) == 14
    assert kept.count(DONE) == 14


def test_a_small_space_is_tried_whole_and_then_it_ends(tmp_path: Path) -> None:
    small = SPACE.model_copy(update={"genes": (SPACE.genes[1].model_copy(update={"choices": (0.0, 0.25, 0.5)}),)})
    kept, study = sampled(tmp_path, "random", small, 50)

    def objective(choices: dict[str, int]) -> Figures:
        return Figures(1.0 + choices["blocks"], 1.0, 0.0, 1)

    assert working.work(kept, study, small, {}, objective, trials=50) == 3


@pytest.mark.parametrize("name", strategies.NAMES)
def test_every_sampler_works_with_limits_and_failures(tmp_path: Path, name: str) -> None:
    kept, study = sampled(tmp_path, name)

    def objective(choices: dict[str, int]) -> Figures:
        return Figures(failure="no build runs") if choices["blocks"] == 9 else synthetic(choices)

    limits = Budget(max_latency_ms=7.0, max_quality_drop=1.5)
    assert working.work(kept, study, SPACE, {}, objective, trials=24, budget=limits) == 24
    assert {row.state for row in kept.rows()} <= {store.DONE, store.FAILED}


def test_limits_are_told_as_shares_above_or_below() -> None:
    found = working.violations(Figures(8.0, 0.8, 0.5, 2_000_000), Budget(10.0, 1_000_000, 0.5))
    assert found == pytest.approx({"latency": -0.2, "size": 1.0, "quality": 0.0})
    assert working.violations(Figures(8.0), Budget()) == {}


def test_a_candidate_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    kept, study = opened(str(tmp_path / "s.db"), grace=0.05)
    row = kept.reserve("k", 0, {"channels": 1, "blocks": 0, "int8": 0}, "dead", 1)
    assert isinstance(row, store.Row)
    for attempt in range(2, working.MOST_ATTEMPTS + 2):
        assert kept.take_stale("other") is None, "it has to be seen silent first"
        time.sleep(0.1)
        taken = kept.take_stale("other")
        assert taken is not None
        assert taken.attempts == attempt
    assert not kept.finish(row, Figures(1.0)), "the first worker is too late"
    assert working._done(kept, study, taken, None, lambda choices: 1 / 0, Budget(), lambda row: None) == 1
    assert "died 3 times" in kept.rows()[0].figures.failure


def test_a_beating_candidate_is_not_taken(tmp_path: Path) -> None:
    kept, _ = opened(str(tmp_path / "s.db"), grace=0.4)
    row = kept.reserve("k", 0, {"channels": 1}, "alive", 1)
    assert kept.reserve("k", 1, {"channels": 1}, "other", 2) == "taken"
    assert kept.reserve("l", 1, {"channels": 2}, "other", 1) == "full"
    with kept.beating(row):
        assert kept.take_stale("other") is None
        time.sleep(0.9)
        assert kept.take_stale("other") is None
    assert kept.finish(row, Figures(1.0, rungs=((0.25, 0.5),)))
    assert kept.rows()[0].figures == Figures(1.0, rungs=((0.25, 0.5),))


def test_a_database_that_cannot_be_reached_is_one_line_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra: search)")
    url = f"postgresql://me:hunter2@127.0.0.1:{_free_port()}/db"
    with pytest.raises(UsageError, match=r"postgresql://me:\*\*\*@127.0.0.1:\d+/db: cannot be reached") as caught:
        database.open_storage(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be reached or used"):
        database.open_storage(str(tmp_path / "no" / "folder" / "study.db"))
    with pytest.raises(UsageError, match="unknown kind of database"):
        database.open_storage("redis://host/0")


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_text("not a database, but long enough to be read as one " * 40)
    with pytest.raises(UsageError, match="cannot be reached or used"):
        database.open_storage(str(tmp_path / "s.db"))


def test_another_schema_another_content_and_no_study_are_one_line_each(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    _, study = opened(url)
    with pytest.raises(UsageError, match="has no study 'other'; there are: s"):
        store.open_study(url, "other", None, None)
    with pytest.raises(UsageError, match="was made with another v; use --join"):
        store.open_study(url, "s", {"v": 2}, None)
    study.set_user_attr("edgegen_schema", 99)
    with pytest.raises(UsageError, match="study 's' has schema 99, this edgegen reads 1"):
        store.open_study(url, "s", None, None)


def test_aging_evolution_changes_one_gene_of_a_young_parent(tmp_path: Path) -> None:
    kept, study = sampled(tmp_path, "evolution", trials=32, seed=3)
    working.work(kept, study, SPACE, {}, synthetic, trials=20)
    done = sorted(study.get_trials(), key=lambda trial: trial.number)
    for trial in done[8:]:
        if trial.system_attrs.get("fixed_params"):
            continue
        near = [sum(trial.params[g] != other.params[g] for g in trial.params) for other in done[: trial.number]]
        assert min(near) <= 1
