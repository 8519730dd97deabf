"""The database behind a search: its address, how it is opened, and what is said when it cannot be reached."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from edgegen.errors import MissingExtra, UsageError


def address(url: str) -> str:
    """The database address for SQLAlchemy: a path is a SQLite file, PostgreSQL is reached by psycopg.

    Raises:
        UsageError: another kind of database.
    """
    scheme, sign, rest = url.partition("://")
    if not sign:
        return f"sqlite:///{url}"
    if scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        return f"postgresql+psycopg://{rest}"
    if scheme == "sqlite":
        return url
    raise UsageError(f"--study {scheme}://...: unknown kind of database; give postgresql://USER@HOST/NAME or a file")


def shown(url: str) -> str:
    """The address without its password."""
    from sqlalchemy.engine import make_url

    try:
        return make_url(address(url)).render_as_string(hide_password=True).replace("+psycopg", "")
    except ValueError:
        return url.partition("://")[0] + "://..."


def unreachable(url: str, error: BaseException) -> UsageError:
    """The one line for a database that cannot be reached; no password in it."""
    from sqlalchemy.engine import make_url

    said = " ".join(str(getattr(error, "orig", None) or error).split())
    with contextlib.suppress(ValueError):
        password = make_url(address(url)).password
        said = said.replace(str(password), "***") if password else said
    return UsageError(
        f"--study {shown(url)}: cannot be reached or used ({said[:300]}); check the address and the server"
    )


def open_storage(url: str) -> Any:
    """Optuna's storage at `url`; its tables are made when they are not there.

    Raises:
        MissingExtra: optuna or psycopg is not installed. UsageError: not reachable, or tables of another Optuna.
    """
    try:
        import optuna
        import sqlalchemy.exc
    except ImportError as error:
        raise MissingExtra("optuna", "to search", "search") from error
    optuna.logging.set_verbosity(logging.ERROR)
    place = address(url)
    wait = {"timeout": 60} if place.startswith("sqlite") else {"connect_timeout": 10}
    try:
        storage = optuna.storages.RDBStorage(place, engine_kwargs={"connect_args": wait})
        if place.startswith("sqlite"):
            _write_ahead(storage)
        return storage
    except ImportError as error:
        raise MissingExtra("psycopg", "to keep a study in PostgreSQL", "search") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise unreachable(url, error) from error
    except RuntimeError as error:
        raise UsageError(f"--study {shown(url)}: {' '.join(str(error).split())}") from error


def _write_ahead(storage: Any) -> None:
    """SQLite's write-ahead log: readers do not wait for writers, and a commit does not wait for the disk.

    A killed process loses nothing; a machine that loses its power may lose the last commits, never the file.
    """
    import sqlalchemy.event

    def connected(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL").close()
        connection.execute("PRAGMA synchronous=NORMAL").close()

    sqlalchemy.event.listen(storage.engine, "connect", connected)
    storage.remove_session()
    storage.engine.dispose()  # connections made before get it too
