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


def test_a_cluster_elsewhere_needs_a_database_that_it_can_reach(tmp_path: Path) -> None:
    from edgegen.search import cluster

    with pytest.raises(UsageError, match="workers elsewhere cannot open the file"):
        cluster.work("ray://host:10001", 2, str(tmp_path / "study.db"), "s", 20.0)
