"""Workers on a Ray cluster join a study and do each candidate once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgegen.errors import UsageError

pytest.importorskip("optuna", reason="optuna is not installed (extra: search)")
pytest.importorskip("ray", reason="ray is not installed (extra: ray)")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_workers_on_a_local_cluster_of_ray_do_each_candidate_once(tmp_path: Path) -> None:
    from edgegen.search import cluster, store

    url = str(tmp_path / "study.db")
    tests = str(Path(__file__).parent)

    def joined(url: str, name: str, grace: float) -> int:
        import sys
        import time

        sys.path.insert(0, tests)
        from test_search_store import SPACE, synthetic

        from edgegen.search import strategies, working

        def objective(choices):
            time.sleep(0.1)
            return synthetic(choices)

        seed = os.getpid()
        kept, study, _ = store.open_study(url, name, None, strategies.make("nsga2", SPACE, 12, seed), grace)
        return working.work(kept, study, SPACE, {}, objective, trials=12, seed=seed)

    kept, _, _ = store.open_study(url, "s", {"v": 1}, None)
    done = cluster.work("local", 2, url, "s", 20.0, joined)
    rows = kept.rows()
    kept.close()
    assert sum(done) == len(rows) == len({row.key for row in rows}) == 12
    assert {row.state for row in rows} == {store.DONE}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_two_nodes_lose_nothing_when_a_worker_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    from edgegen.search import cluster, store

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    url, tests, killed = f"sqlite:///{tmp_path}/study.db", str(Path(__file__).parent), tmp_path / "killed"

    def joined(url: str, name: str, grace: float) -> int:
        import signal
        import sys
        import time

        sys.path.insert(0, tests)
        from test_search_store import SPACE, synthetic

        from edgegen.search import strategies, working

        def objective(choices):
            time.sleep(0.2)
            try:
                killed.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)  # the first candidate of all takes its worker along
            except FileExistsError:
                pass
            return synthetic(choices)

        seed = os.getpid()
        kept, study, _ = store.open_study(url, name, None, strategies.make("nsga2", SPACE, 12, seed), grace)
        return working.work(kept, study, SPACE, {}, objective, trials=12, seed=seed)

    kept, _, _ = store.open_study(url, "s", {"v": 1}, None)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        cluster.work(nodes.address, 2, url, "s", 10.0, joined)
    finally:
        nodes.shutdown()
    rows = kept.rows()
    kept.close()
    assert killed.exists()
    assert len(rows) == len({row.key for row in rows}) == 12
    assert {row.state for row in rows} == {store.DONE}
    assert sorted(row.attempts for row in rows) == [1] * 11 + [2], "the one that was lost was done again"


def test_a_cluster_elsewhere_needs_a_database_that_it_can_reach(tmp_path: Path) -> None:
    from edgegen.search import cluster

    with pytest.raises(UsageError, match="workers elsewhere cannot open the file"):
        cluster.work("ray://host:10001", 2, str(tmp_path / "study.db"), "s", 20.0)
