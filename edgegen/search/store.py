"""The state of a search in one database: SQLite or PostgreSQL, shared by any number of workers.

Optuna keeps its trials there. Beside them stands one row a candidate, which is what counts: a row is reserved before
the work begins (its key and its slot are unique, so that no candidate is run twice and no more are run than were asked
for), it beats while its worker lives, and a worker that finds it silent for `grace` seconds takes it over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgegen.errors import UsageError
from edgegen.search import database

SCHEMA = 1
OBJECTIVES = ("latency_ms", "drop", "size_mb")
UNKNOWN = 1e6  # what a sampler is told in place of a figure that was never reached, such as the quality of a slow one
RUNNING, DONE, FAILED = "running", "done", "failed"


@dataclass(frozen=True)
class Figures:
    """What a candidate came to. latency_ms: p50 as timed; ratio: to the baseline, from one interleaved run.

    drop: loss of quality in the unit of the task's gate (None: not scored). rungs: (share of the training, drop) in the
    order in which they were reached. stopped: why no further work was put into it. failure: why there are no figures.
    """

    latency_ms: float = UNKNOWN
    ratio: float = UNKNOWN
    drop: float | None = None
    size_bytes: int = 0
    status: str = "measured"
    build: str = ""
    rungs: tuple[tuple[float, float], ...] = ()
    stopped: str = ""
    failure: str = ""

    @property
    def runtime(self) -> str:
        """Name of the runtime of the build."""
        return self.build.partition(" ")[0]

    @property
    def values(self) -> tuple[float, float, float]:
        """What the sampler is told: latency (ms), drop, size (MB), all lower is better."""
        drop = UNKNOWN if self.drop is None else min(self.drop, UNKNOWN)
        return self.latency_ms, drop, self.size_bytes / 1e6


@dataclass(frozen=True)
class Row:
    """One candidate of a study. trial: its number in Optuna's study. attempts: how many workers began it."""

    key: str
    slot: int
    trial: int
    choices: dict[str, int]
    state: str = RUNNING
    owner: str = ""
    beat: int = 0
    attempts: int = 1
    figures: Figures | None = None


@dataclass
class Store:
    """An open study. grace: seconds without a beat after which a candidate's worker counts as dead."""

    url: str
    name: str
    storage: Any
    table: Any
    grace: float = 60.0
    seen: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def close(self) -> None:
        """Close every connection."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def reserve(self, key: str, trial: int, choices: Mapping[str, int], owner: str, limit: int) -> Row | str:
        """The row of a candidate that is now this worker's; "full" when `limit` candidates have rows, "taken" when
        the candidate has a row already."""
        from sqlalchemy.exc import IntegrityError

        while True:
            slot = self.count()
            if slot >= limit:
                return "full"
            row = Row(key, slot, trial, dict(choices), owner=owner)
            told = {"study": self.name, "key": key, "slot": slot, "trial": trial, "choices": json.dumps(row.choices),
                    "state": RUNNING, "owner": owner, "beat": 0, "attempts": 1, "figures": ""}  # fmt: skip
            try:
                with self._begin() as connection:
                    connection.execute(self.table.insert().values(**told))
                return row
            except IntegrityError:  # another worker was first: with this candidate, or with this slot
                if self.find(key) is not None:
                    return "taken"

    def find(self, key: str) -> Row | None:
        """The row of a candidate."""
        return next(iter(self._rows(self.table.c.key == key)), None)

    def rows(self) -> list[Row]:
        """All rows, by slot."""
        return sorted(self._rows(), key=lambda row: row.slot)

    def count(self, state: str = "") -> int:
        """How many candidates have a row (of one state)."""
        from sqlalchemy import func, select

        query = select(func.count()).select_from(self.table).where(self.table.c.study == self.name)
        query = query.where(self.table.c.state == state) if state else query
        with self._begin() as connection:
            return int(connection.execute(query).scalar_one())

    def finish(self, row: Row, figures: Figures) -> bool:
        """Write the figures; False when another worker has taken the candidate over meanwhile."""
        state = FAILED if figures.failure else DONE
        text = json.dumps(dataclasses.asdict(figures))
        return self._update(row, {"state": state, "figures": text})

    def beat(self, row: Row, number: int) -> bool:
        """Say that the worker lives; False when the candidate is no longer its own."""
        return self._update(row, {"beat": number})

    def take_stale(self, owner: str) -> Row | None:
        """A candidate whose worker was silent for `grace` seconds by this worker's clock; it is ours from now on."""
        now = time.monotonic()
        running = self._rows(self.table.c.state == RUNNING)
        self.seen = {row.key: self.seen[row.key] for row in running if row.key in self.seen}
        for row in running:
            sign = (row.owner, row.attempts, row.beat)
            known = self.seen.get(row.key)
            if known is None or known[0] != sign:
                self.seen[row.key] = (sign, now)
            elif now - known[1] > self.grace:
                mine = {"owner": owner, "attempts": row.attempts + 1, "beat": 0}
                if self._update(row, mine, beat=row.beat):
                    return dataclasses.replace(row, owner=owner, attempts=row.attempts + 1, beat=0)
        return None

    @contextlib.contextmanager
    def beating(self, row: Row) -> Iterator[None]:
        """Beat four times in `grace` seconds while the block runs."""
        ended = threading.Event()

        def work() -> None:
            number = 0
            while not ended.wait(self.grace / 4):
                number += 1
                with contextlib.suppress(UsageError):  # unreachable for a moment: the next beat may get through
                    self.beat(row, number)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _update(self, row: Row, values: Mapping[str, Any], **also: Any) -> bool:
        query = self.table.update().where(
            self.table.c.study == self.name, self.table.c.key == row.key, self.table.c.owner == row.owner,
            self.table.c.attempts == row.attempts, self.table.c.state == RUNNING,
            *(self.table.c[name] == value for name, value in also.items()),
        )  # fmt: skip
        with self._begin() as connection:
            return connection.execute(query.values(**values)).rowcount == 1

    def _rows(self, *where: Any) -> list[Row]:
        from sqlalchemy import select

        with self._begin() as connection:
            found = connection.execute(select(self.table).where(self.table.c.study == self.name, *where)).mappings()
            return [_row(entry) for entry in found]

    @contextlib.contextmanager
    def _begin(self) -> Iterator[Any]:
        from sqlalchemy.exc import OperationalError

        try:
            with self.storage.engine.begin() as connection:
                yield connection
        except OperationalError as error:
            raise database.unreachable(self.url, error) from error


def _row(entry: Mapping[str, Any]) -> Row:
    told = json.loads(entry["figures"]) if entry["figures"] else None
    figures = Figures(**{**told, "rungs": tuple(tuple(rung) for rung in told["rungs"])}) if told else None
    names = ("key", "slot", "trial", "state", "owner", "beat", "attempts")
    return Row(**{name: entry[name] for name in names}, choices=json.loads(entry["choices"]), figures=figures)


def _table(storage: Any) -> Any:
    from sqlalchemy import Column, Integer, MetaData, String, Table, Text, UniqueConstraint
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    table = Table(
        "edgegen_candidates", MetaData(),
        Column("study", String(200), primary_key=True), Column("key", String(64), primary_key=True),
        Column("slot", Integer, nullable=False), Column("trial", Integer, nullable=False),
        Column("choices", Text, nullable=False), Column("state", String(16), nullable=False),
        Column("owner", String(120), nullable=False), Column("beat", Integer, nullable=False),
        Column("attempts", Integer, nullable=False), Column("figures", Text, nullable=False),
        UniqueConstraint("study", "slot"),
    )  # fmt: skip
    for last in (False, True):  # two workers may make it at the same moment; then it is there
        try:
            table.metadata.create_all(storage.engine)
            break
        except (IntegrityError, OperationalError, ProgrammingError):
            if last:
                raise
            time.sleep(0.5)
    return table


def names(url: str) -> list[str]:
    """The studies of edgegen in a database."""
    import optuna

    storage = database.open_storage(url)
    try:
        found = optuna.get_all_study_summaries(storage)
    finally:
        storage.engine.dispose()
    return [summary.study_name for summary in found if "edgegen_schema" in summary.user_attrs]


def open_study(url: str, name: str, content: Mapping[str, Any] | None, sampler: Any, grace: float = 60.0) -> Any:
    """(Store, Optuna study, content). content: what a new study keeps for its workers (JSON); None: it must be there.

    Raises:
        UsageError: no such study, one of another schema version, or one with another content.
    """
    import optuna

    storage = database.open_storage(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if content is None:
                study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
            else:
                study = optuna.create_study(
                    storage=storage, sampler=sampler, study_name=name, load_if_exists=True,
                    directions=["minimize"] * len(OBJECTIVES),
                )  # fmt: skip
        table = _table(storage)
        told = _agreed(study, content, url, name)
    except KeyError as error:
        there = ", ".join(names(url)) or "none"
        raise UsageError(f"--study {database.shown(url)}: has no study {name!r}; there are: {there}") from error
    except optuna.exceptions.StorageInternalError as error:
        raise database.unreachable(url, error) from error
    return Store(url, name, storage, table, grace), study, told


def _agreed(study: Any, content: Mapping[str, Any] | None, url: str, name: str) -> dict[str, Any]:
    """The content of the study; a new one gets it. The schema is checked before anything else is read."""
    attributes = study.user_attrs
    known = attributes.get("edgegen_schema")
    if known is None and not attributes and content is not None and not study.get_trials(deepcopy=False):
        study.set_user_attr("edgegen", json.loads(json.dumps(content)))
        study.set_user_attr("edgegen_schema", SCHEMA)
        return dict(study.user_attrs["edgegen"])
    if known != SCHEMA:
        raise UsageError(
            f"--study {database.shown(url)}: study {name!r} has schema {known}, this edgegen reads {SCHEMA}; use the"
            " edgegen that made it, or another --name"
        )
    told = dict(attributes["edgegen"])
    mine = json.loads(json.dumps(content)) if content is not None else told
    if changed := [key for key in sorted({*mine, *told}) if mine.get(key) != told.get(key)]:
        raise UsageError(
            f"--study {database.shown(url)}: study {name!r} was made with another {', '.join(changed)}; use --join to"
            " work on it as it is, or another --name"
        )
    return told
