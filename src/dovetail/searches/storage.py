"""The storage of an Optuna study: a database, opened by its URL, whose errors say what is wrong with it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._rdb.models import BaseModel
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from dovetail.errors import SearchError

HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120
"""Interval of the heartbeats, and the age of the last one at which a trial on another host counts as lost."""
_OPENINGS = 5
"""How often a storage is opened: workers that start at the same time disturb each other while tables are created."""


def check_url(url: str) -> None:
    """Raise SearchError for a text that is no URL of a storage, or a storage that ends with the process."""
    rule, fix = "a storage is a URL of a database", "pass --storage sqlite:///NAME.db, or leave it out"
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError) as error:
        raise SearchError("storage", found=str(error)[:200], rule=rule, fix=fix) from None
    except ImportError as error:
        raise _missing(parsed, error) from None
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        rule = "other processes and later starts must find the trials: the storage must outlive the process"
        raise SearchError(f"storage {hidden(url)}", found="a database in memory", rule=rule, fix=fix)


def hidden(url: str) -> str:
    """Return a URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


def _missing(parsed: URL, error: ImportError) -> SearchError:
    fix = f"install the package {error.name or parsed.get_driver_name()}"
    if parsed.get_backend_name() == "postgresql":
        fix = "pip install 'dovetail[postgres]', and write postgresql+psycopg://USER@HOST/DATABASE"
    where = f"storage {parsed.render_as_string(hide_password=True)}"
    return SearchError(where, found=str(error), rule="the driver of the database must be installed", fix=fix)


def open_storage(url: str) -> RDBStorage:
    """Open a storage, and make its tables where it is new; SearchError where that is not possible."""
    check_url(url)
    parsed = make_url(url)
    arguments: dict[str, Any] = {}
    if parsed.get_backend_name() == "sqlite":
        arguments = {"timeout": 60}
    elif parsed.get_backend_name() == "postgresql":
        arguments = {"connect_timeout": 10}
    with explained(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for opening in range(_OPENINGS):
            try:
                if parsed.get_backend_name() == "sqlite":
                    _create_tables(url, arguments)
                storage = RDBStorage(
                    url, engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},
                    heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )  # fmt: skip
                if parsed.get_backend_name() == "sqlite":
                    _lock_before_reading(storage.engine)
                return storage
            except ImportError as error:
                raise _missing(parsed, error) from None
            except SQLAlchemyError:
                if opening + 1 == _OPENINGS:
                    raise
                time.sleep(0.2 * (opening + 1))
    raise AssertionError


def _create_tables(url: str, arguments: dict[str, Any]) -> None:
    """Create the tables of a study in SQLite, all or none.

    Optuna creates them one by one. After a kill in between, an index would be missing that keeps names unique.
    """
    engine = create_engine(url, connect_args=arguments)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        BaseModel.metadata.create_all(connection)
        connection.commit()
    engine.dispose()


def _lock_before_reading(engine: Engine) -> None:
    """Let a transaction of SQLite hold the lock of the database from its beginning.

    Else two workers that take a trial at the same time both read that it waits, before the first one writes that it
    does not. Other databases lock the row (FOR UPDATE).
    """

    @event.listens_for(engine, "connect")
    def leave_transactions_to_sqlalchemy(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # the connections before


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn an error of the storage into a SearchError."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ or error
        found = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0][:300]
        rule = "the storage must be reachable and writable"
        fix = "check the URL and the server; what has begun continues when the command is given again"
        raise SearchError(f"storage {hidden(url)}", found=found, rule=rule, fix=fix) from None


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's lines about each trial off the terminal while the block runs."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
