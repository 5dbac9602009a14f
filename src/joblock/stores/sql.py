"""PostgreSQL, MariaDB, MySQL and SQLite, over SQLAlchemy 2.

Each verb is one statement, committed by itself, on a connection of its own: it is never part of a
transaction of the caller's, so no rollback takes or frees a lock. The database checks the condition
together with the write.

`python -m joblock.stores.sql URL` prints the statement that creates the table, for a migration.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

from .._store import Blob
from ._etag import is_ours, new_etag
from ._remote import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Pool, Retry, bounded, etag_alone, missing

try:
    from sqlalchemy import (
        Column,
        Engine,
        Executable,
        MetaData,
        String,
        Table,
        Text,
        bindparam,
        create_engine,
        delete,
        insert,
        make_url,
        select,
        text,
        update,
    )
    from sqlalchemy.dialects import mysql, postgresql, sqlite
    from sqlalchemy.exc import (
        DBAPIError,
        IntegrityError,
        InterfaceError,
        InvalidRequestError,
        NoSuchModuleError,
        OperationalError,
    )
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
    from sqlalchemy.pool import SingletonThreadPool, StaticPool
    from sqlalchemy.schema import CreateTable
    from sqlalchemy.types import TypeDecorator
    from sqlalchemy.util import await_only, greenlet_spawn
except ModuleNotFoundError as _error:
    raise missing(__name__, _error, "sql") from _error

__all__ = ["AsyncSqlBlobStore", "SqlBlobStore", "connect", "connect_async"]

_T = TypeVar("_T")

_DIALECTS = ("postgresql", "mysql", "mariadb", "sqlite")
_LONGEST_KEY = 1024  # bytes: MariaDB would cut a longer one silently where it is not strict
_PAGE = 1000
_bounded = partial(bounded, longest=_LONGEST_KEY)


class _Key(TypeDecorator[str]):
    """Text that is compared byte by byte: neither case nor spaces at the end make two keys one."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Any) -> Any:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Text(collation="C"))
        if dialect.name == "sqlite":
            return dialect.type_descriptor(Text())
        return dialect.type_descriptor(mysql.VARBINARY(_LONGEST_KEY))

    def process_bind_param(self, value: str | None, dialect: Any) -> Any:
        return value.encode() if value is not None and _is_binary(dialect) else value

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value.decode("utf-8", "replace") if _is_binary(dialect) else value


def _is_binary(dialect: Any) -> bool:
    return dialect.name in ("mysql", "mariadb")


def _table(name: str) -> Table:
    text = Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), "mysql", "mariadb")
    return Table(
        name,
        MetaData(),
        Column("key", _Key(), primary_key=True),
        Column("value", text, nullable=False),
        Column("etag", String(32), nullable=False),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )


class SqlBlobStore:
    """A conditional store in one table, over the SQLAlchemy `Engine` that it is given.

    Make the table with `create_table()`, or by a migration with the statement `ddl`. `table` is its
    name. `engine` is the engine, whose connections `engine.dispose()` closes.

    Each call takes a connection from the engine's pool, autocommits one statement, whatever
    isolation level the engine has, and gives it back. An engine whose pool hands the same
    connection to everybody, as for SQLite in memory, is refused: a transaction of yours would
    be committed. A request that had no answer is sent again, three times at most; then what
    SQLAlchemy raises reaches the caller.

    Jobs that keep connections while they run may leave none for their own renewals, and lose their
    locks: then give the store an engine of its own, with `pool_size=1`.

    Safe from any thread. In a child after fork the engine's pool is dropped before the first call,
    without closing the parent's connections.
    """

    def __init__(self, engine: Engine, *, table: str = "joblock") -> None:
        self.engine = engine
        if engine.dialect.is_async:
            raise ValueError(f"{engine.dialect.driver} is async: use AsyncSqlBlobStore")
        self._rows = _Rows(engine, table, _RETRY)

    def __repr__(self) -> str:
        return f"SqlBlobStore({self._rows!r})"

    @property
    def ddl(self) -> str:
        """The statement that creates the table, for a migration (Alembic, Django's `RunSQL`)."""
        return self._rows.ddl

    def create_table(self) -> None:
        """Create the table, if it is not there."""
        self._rows.create_table()

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        return self._rows.get(key)

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._rows.set(key, value)

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        self._rows.delete(key)

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        return self._rows.get_with_etag(key)

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        return etag_alone(self._rows.set_if_new_or_get(key, value))

    def set_if_new_or_get(self, key: str, value: str) -> str | Blob | None:
        """As `set_if_new`, but where it writes nothing PostgreSQL returns what is there."""
        return self._rows.set_if_new_or_get(key, value)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        return self._rows.set_if_match(key, value, etag)

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        return self._rows.delete_if_match(key, etag)

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in the order of their bytes."""
        after = ""
        while page := self._rows.page(prefix, after):
            yield from page
            after = page[-1]

    def server_time_ms(self, _key: str) -> tuple[float, float] | None:
        """Return between which epoch milliseconds the database's clock is; for `check_store`.

        None for SQLite, which has this host's.
        """
        return self._rows.server_time_ms()


class AsyncSqlBlobStore:
    """As `SqlBlobStore`, over an `AsyncEngine`, for `joblock.aio` under asyncio."""

    def __init__(self, engine: AsyncEngine, *, table: str = "joblock") -> None:
        self.engine = engine
        retry = Retry(_unanswered, _RETRY.pauses_s, lambda s: await_only(asyncio.sleep(s)))
        self._rows = _Rows(engine.sync_engine, table, retry)

    def __repr__(self) -> str:
        return f"AsyncSqlBlobStore({self._rows!r})"

    @property
    def ddl(self) -> str:
        """As `SqlBlobStore.ddl`."""
        return self._rows.ddl

    async def create_table(self) -> None:
        """As `SqlBlobStore.create_table`."""
        await greenlet_spawn(self._rows.create_table)

    async def get(self, key: str) -> str | bytes | None:
        """As `SqlBlobStore.get`."""
        return await greenlet_spawn(self._rows.get, key)

    async def set(self, key: str, value: str) -> None:
        """As `SqlBlobStore.set`."""
        await greenlet_spawn(self._rows.set, key, value)

    async def delete(self, key: str) -> None:
        """As `SqlBlobStore.delete`."""
        await greenlet_spawn(self._rows.delete, key)

    async def get_with_etag(self, key: str) -> Blob | None:
        """As `SqlBlobStore.get_with_etag`."""
        return await greenlet_spawn(self._rows.get_with_etag, key)

    async def set_if_new(self, key: str, value: str) -> str | None:
        """As `SqlBlobStore.set_if_new`."""
        return etag_alone(await self.set_if_new_or_get(key, value))

    async def set_if_new_or_get(self, key: str, value: str) -> str | Blob | None:
        """As `SqlBlobStore.set_if_new_or_get`."""
        return await greenlet_spawn(self._rows.set_if_new_or_get, key, value)

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """As `SqlBlobStore.set_if_match`."""
        return await greenlet_spawn(self._rows.set_if_match, key, value, etag)

    async def delete_if_match(self, key: str, etag: str) -> bool:
        """As `SqlBlobStore.delete_if_match`."""
        return await greenlet_spawn(self._rows.delete_if_match, key, etag)

    async def list_keys(self, prefix: str) -> AsyncIterator[str]:
        """As `SqlBlobStore.list_keys`."""
        after = ""
        while page := await greenlet_spawn(self._rows.page, prefix, after):
            for key in page:
                yield key
            after = page[-1]

    async def server_time_ms(self, _key: str) -> tuple[float, float] | None:
        """As `SqlBlobStore.server_time_ms`."""
        return await greenlet_spawn(self._rows.server_time_ms)


class _Rows:
    """The statements, made once. SQLAlchemy runs the same code for both kinds of engine."""

    def __init__(self, engine: Engine, table: str, retry: Retry) -> None:
        name = engine.dialect.name
        if name not in _DIALECTS:
            raise ValueError(f"the database must be one of {', '.join(_DIALECTS)}, not {name}")
        if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
            raise ValueError("the engine's pool has one connection for all: give it another")
        self._url = engine.url.render_as_string(hide_password=True)
        # MariaDB's drivers would ask the server to switch to it and back, each time; and if it did
        # not answer the second time, SQLAlchemy's pool would have lost the connection for good.
        autocommit = {} if name in ("mysql", "mariadb") else {"isolation_level": "AUTOCOMMIT"}
        self._engine = engine.execution_options(**autocommit)
        self._retry = retry
        # A forked child forgets its parent's connections, and does not close them.
        self._pool = Pool(lambda: SimpleNamespace(close=partial(engine.dispose, close=False)))

        self._table = rows = _table(table)
        at, current = rows.c.key == bindparam("at"), rows.c.etag == bindparam("current")
        self._read = select(rows.c.value, rows.c.etag).where(at)
        self._update = update(rows).where(at)
        self._update_current = self._update.where(current)
        self._delete = delete(rows).where(at)
        self._delete_current = self._delete.where(current)
        # No pattern, since LIKE has its own view of case.
        begins = (rows.c.key >= bindparam("first"), rows.c.key < bindparam("beyond"))
        page = select(rows.c.key).where(*begins, rows.c.key > bindparam("after"))
        self._page = page.order_by(rows.c.key).limit(_PAGE)
        self._insert: Any = insert(rows)
        self._insert_tells = name in _INSERTS
        if self._insert_tells:
            # One that fails is an error in PostgreSQL's log, and the rowcount is not told.
            made = _INSERTS[name](rows).values(
                key=bindparam("key"), value=bindparam("value"), etag=bindparam("etag")
            )
            self._insert = made.on_conflict_do_nothing().returning(rows.c.value, rows.c.etag)
        if name == "postgresql":  # in one statement, also what was there before it
            new = self._insert.cte("new")
            self._insert = select(new.c.value, new.c.etag).union_all(self._read)

    def __repr__(self) -> str:
        return f"{self._url!r}, table={self._table.name!r}"

    @property
    def ddl(self) -> str:
        create = CreateTable(self._table, if_not_exists=True)
        return str(create.compile(dialect=self._engine.dialect)).strip()

    def create_table(self) -> None:
        self._execute(CreateTable(self._table, if_not_exists=True))

    def get(self, key: str) -> str | bytes | None:
        blob = self.get_with_etag(key)
        return None if blob is None else blob.value

    def set(self, key: str, value: str) -> None:
        etag = new_etag()
        updated = partial(self._changed, self._update, at=_bounded(key), value=value, etag=etag)
        while not (
            self._write(updated, key, value, etag) or etag_alone(self.set_if_new_or_get(key, value))
        ):
            pass

    def delete(self, key: str) -> None:
        self._retry.ask(partial(self._changed, self._delete, at=_bounded(key)))

    def get_with_etag(self, key: str) -> Blob | None:
        return _blob(self._ask(self._read, at=_bounded(key)))

    def set_if_new_or_get(self, key: str, value: str) -> str | Blob | None:
        row = {"key": _bounded(key), "value": value, "etag": new_etag()}
        send = partial(self._inserted, row)
        return self._retry.write(send, partial(self.get_with_etag, key), value)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        new, at = new_etag(), _bounded(key)
        if not is_ours(etag):
            return None
        statement = self._update_current
        updated = partial(self._changed, statement, at=at, current=etag, value=value, etag=new)
        return self._write(updated, key, value, new)

    def delete_if_match(self, key: str, etag: str) -> bool:
        if not is_ours(etag):
            return False
        deleted = partial(self._changed, self._delete_current, at=_bounded(key), current=etag)
        return self._retry.delete(deleted, partial(self.get_with_etag, key))

    def page(self, prefix: str, after: str) -> list[str]:
        """The next keys that begin so."""
        beyond = f"{prefix}\U0010ffff"
        return [row[0] for row in self._ask(self._page, first=prefix, beyond=beyond, after=after)]

    def server_time_ms(self) -> tuple[float, float] | None:
        statement = _TIMES.get(self._engine.dialect.name)
        if statement is None:
            return None
        time_ms = float(self._ask(text(statement))[0][0]) * 1000
        return time_ms, time_ms

    def _write(self, wrote: Callable[[], bool], key: str, value: str, etag: str) -> str | None:
        def send() -> str | None:
            return etag if wrote() else None

        return self._retry.write(send, partial(self.get_with_etag, key), value)

    def _ask(self, statement: Executable, **values: str) -> list[Any]:
        answer, _ = self._retry.ask(partial(self._execute, statement, **values))
        return answer[1] if answer else []

    def _changed(self, statement: Executable, **values: str) -> bool:
        return self._execute(statement, **values)[0] > 0

    def _execute(self, statement: Executable, **values: str) -> tuple[int, list[Any]]:
        """Return how many rows were changed, and those that were read."""
        self._pool.check()
        with self._engine.begin() as connection:
            result: Any = connection.execute(statement, values)
            return result.rowcount, list(result) if result.returns_rows else []

    def _inserted(self, row: dict[str, str]) -> str | Blob | None:
        """The etag of what was inserted, or what is there if the database tells it."""
        if self._insert_tells:
            rows = self._execute(self._insert, **row, at=row["key"])[1]
            # Its own row is in it by this request, or by one before, whose answer was lost.
            if any(etag == row["etag"] for _, etag in rows):
                return row["etag"]
            return _blob(rows)
        try:
            return row["etag"] if self._changed(self._insert, **row) else None
        except IntegrityError:  # the key is there
            return None


def _blob(rows: list[Any]) -> Blob | None:
    return Blob(rows[0][0].encode(), rows[0][1]) if rows else None


_TIMES = {
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
    "mysql": "SELECT unix_timestamp(now(6))",
    "mariadb": "SELECT unix_timestamp(now(6))",
}
_INSERTS: dict[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


def connect(url: str) -> SqlBlobStore:
    """Return the store of the database at this SQLAlchemy URL; the table must be there."""
    return SqlBlobStore(_engine(create_engine, url))


def connect_async(url: str) -> AsyncSqlBlobStore | None:
    """As `connect`, for `joblock.aio`; None if the URL's driver is not async."""
    try:
        return AsyncSqlBlobStore(_engine(create_async_engine, url))
    except InvalidRequestError:
        return None


# Time-outs, and no prepared statements, which PgBouncer gives to another client's connection.
_CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_timeout": round(CONNECT_TIMEOUT_S), "prepare_threshold": None},
    "asyncpg": {
        "timeout": CONNECT_TIMEOUT_S,
        "command_timeout": READ_TIMEOUT_S,
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
    },
    "pymysql": {
        "connect_timeout": round(CONNECT_TIMEOUT_S),
        "read_timeout": round(READ_TIMEOUT_S),
        "write_timeout": round(READ_TIMEOUT_S),
    },
    "asyncmy": {"connect_timeout": round(CONNECT_TIMEOUT_S)},
}


def _engine(make: Callable[..., _T], url: str) -> _T:
    try:
        parsed = make_url(url)
    except ValueError as error:
        raise ValueError("SQLAlchemy takes no such URL") from error
    try:
        driver = parsed.get_driver_name()
        return make(parsed, connect_args=_CONNECT_ARGS.get(driver, {}))
    except NoSuchModuleError as error:
        raise ValueError(f"SQLAlchemy knows no {parsed.drivername!r}") from error
    except ModuleNotFoundError as error:
        raise missing(__name__, error, "sql", driver=True) from error


# What PostgreSQL (by SQLSTATE) and MariaDB (by number) say of a statement that they gave up for
# another one's sake: it has done nothing, and may be sent again.
_GIVEN_UP = {"40001", "40P01", 1205, 1213, 1020}


def _unanswered(error: Exception) -> bool:
    if isinstance(error, DBAPIError):
        codes = {getattr(error.orig, "sqlstate", None), *getattr(error.orig, "args", ())[:1]}
        broken = isinstance(error, (OperationalError, InterfaceError))
        return broken or error.connection_invalidated or not codes.isdisjoint(_GIVEN_UP)
    return isinstance(error, (OSError, TimeoutError))


_RETRY = Retry(_unanswered)


def _main(arguments: list[str]) -> int:
    """Print the statement that creates the table in the database of a URL."""
    if len(arguments) != 1:
        print("usage: python -m joblock.stores.sql URL", file=sys.stderr)  # noqa: T201
        return 64
    print(connect(arguments[0]).ddl + ";")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
