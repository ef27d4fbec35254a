"""The tables of the registry, on SQLite or PostgreSQL, with one writer at a time.

Writers wait for each other (``BEGIN IMMEDIATE``; an advisory lock on PostgreSQL). So entries are numbered without gaps,
become visible in the order of their numbers, and their chain never forks: after entry ``n`` has been read, no ``m < n`` appears.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError, MissingExtra
from expunge.ledger.errors import LedgerFailed

try:
    import sqlalchemy as sql
    from sqlalchemy.engine import make_url
except ImportError:  # pragma: no cover
    raise MissingExtra("The ledger", "serve") from None

#: Version of the tables.
SCHEMA = "1"

_LOCK = 0x657870756E6765  # of writers on PostgreSQL: "expunge"
_WAIT = 10_000  # milliseconds that a writer waits for another one

_metadata = sql.MetaData()

facts = sql.Table(
    "expunge_facts", _metadata,
    sql.Column("name", sql.String(40), primary_key=True),
    sql.Column("value", sql.String(200), nullable=False),
)  # fmt: skip

targets = sql.Table(
    "expunge_targets", _metadata,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("idempotency", sql.String(64), nullable=False, unique=True),
    sql.Column("number", sql.BigInteger, nullable=False, unique=True),  # of the entry that asked for it
    sql.Column("state", sql.String(16), nullable=False, index=True),
    sql.Column("basis", sql.String(16), nullable=False),
    sql.Column("scope", sql.String(120), nullable=False),
    sql.Column("requested", sql.String(32), nullable=False),
    sql.Column("until", sql.String(32), nullable=True, index=True),
    sql.Column("ended", sql.String(32), nullable=True),
    sql.Column("body", sql.String(64), nullable=False),
    sql.Column("sealed", sql.LargeBinary, nullable=True),
)  # fmt: skip

entries = sql.Table(
    "expunge_entries", _metadata,
    sql.Column("seq", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("target", sql.String(32), nullable=False, index=True),
    sql.Column("line", sql.Text, nullable=False),
    sql.Column("hash", sql.String(64), nullable=False),
)  # fmt: skip


class Database:
    """Connections to one database.

    Args:
        where: path of an SQLite file, which is made for its owner alone, or a URL (``postgresql://user@host/name``).

    Raises:
        InputError: a URL that is none, or of another kind of database.
        MissingExtra: the driver of PostgreSQL is not installed.
    """

    def __init__(self, where: str | Path) -> None:
        url = _url(where)
        self.kind = url.get_backend_name()
        options: dict[str, Any] = {"hide_parameters": True}  # what is written must not stand in messages of errors
        if self.kind == "sqlite":
            _own(Path(url.database or ""))
            options["connect_args"] = {"timeout": _WAIT / 1000, "check_same_thread": False}
        else:
            options |= {"pool_pre_ping": True, "connect_args": {"connect_timeout": _WAIT // 1000}}
        try:
            self._engine = sql.create_engine(url, **options)
        except ModuleNotFoundError:
            raise MissingExtra("A registry on PostgreSQL", "postgres") from None
        if self.kind == "sqlite":
            sql.event.listen(self._engine, "connect", _prepare)
            sql.event.listen(self._engine, "begin", _begin)

    @contextmanager
    def write(self) -> Iterator[sql.Connection]:
        """A transaction that is alone among writers; it is committed when the block ends, or nothing of it is.

        Raises:
            LedgerFailed: it could not be committed.
        """
        with _explained("written"), self._engine.execution_options(expunge_write=True).begin() as connection:
            if self.kind != "sqlite":
                connection.execute(sql.text(f"SET LOCAL lock_timeout = {_WAIT}"))
                connection.execute(sql.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            yield connection

    @contextmanager
    def read(self) -> Iterator[sql.Connection]:
        """A transaction that only reads, and sees one state of all tables.

        Raises:
            LedgerFailed: the database does not answer.
        """
        level = {} if self.kind == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        with _explained("read"), self._engine.execution_options(**level).begin() as connection:
            yield connection

    def create(self, connection: sql.Connection) -> None:
        """Make the tables that are not there."""
        _metadata.create_all(connection)

    def close(self) -> None:
        """End all connections."""
        self._engine.dispose()


def _url(where: str | Path) -> sql.URL:
    if isinstance(where, Path) or not re.match(r"[a-z0-9+]{2,}:/", where):
        return sql.URL.create("sqlite", database=str(where))
    try:
        url = make_url(where)
        kind = url.get_backend_name()
    except (sql.exc.ArgumentError, sql.exc.NoSuchModuleError):
        raise InputError("The URL of the registry is none.", "Write postgresql://USER@HOST/NAME, or a path.") from None
    if kind == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite" or not url.database:
        raise InputError(f"The registry cannot stand in {kind}.", "Give a path of an SQLite file, or a URL of PostgreSQL.")
    return url


def _own(path: Path) -> None:
    if not str(path) or str(path) == ":memory:":
        raise InputError("The registry needs a file that stays.", "Give a path.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise InputError(f"The registry {str(path)!r} cannot be opened: {error.strerror}.", "Choose another path.") from None


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where _begin says, not where the driver guesses
    for setting in ("busy_timeout=" + str(_WAIT), "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: sql.Connection) -> None:
    writes = connection.get_execution_options().get("expunge_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (sql.exc.DBAPIError, sql.exc.TimeoutError) as error:
        cause = getattr(error, "orig", None) or error
        said, text = type(cause).__name__, str(cause).lower()
        full = "full" in text or "disk i/o" in text or "no space" in text
        why = (
            "the disk is full or fails" if full else "another writer holds it" if "lock" in text else f"the database said {said}"
        )
        raise LedgerFailed(
            f"The registry could not be {what}: {why}.",
            "Nothing of this was acknowledged, all that was before is kept; ask again with the same idempotency key.",
            full=full,
        ) from None
