"""What is a database's own: transactions, isolation, its log, its poolers, restarts; and forks."""

from __future__ import annotations

import asyncio
import importlib
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from joblock import (
    Blob,
    JobLockLostError,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
    release_job_lock,
    renew_job_lock,
)
from joblock.conformance import check_store
from joblock.testing import ManualClock
from tests.holding import assert_is_held_natively, assert_outlives_its_server, poll
from tests.integration.test_one_winner import (
    assert_one_winner_of_forks,
    assert_one_winner_of_threads,
)
from tests.servers import LocalServer, mariadb_server, pgbouncer, postgresql_server
from tests.support import KEY, UID, VAULT, acquired, held

sa: Any = pytest.importorskip("sqlalchemy")
sql: Any = pytest.importorskip("joblock.stores.sql")

ASYNC = {"postgresql+psycopg": "postgresql+asyncpg", "mysql+pymysql": "mysql+asyncmy"}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, LocalServer]]:
    """PostgreSQL and MariaDB, each started when it is first needed."""
    with ExitStack() as stack:

        class Servers(dict[str, LocalServer]):
            def __missing__(self, name: str) -> LocalServer:
                pytest.importorskip({"postgresql": "psycopg", "mariadb": "pymysql"}[name])
                start = {"postgresql": postgresql_server, "mariadb": mariadb_server}[name]
                self[name] = stack.enter_context(start())
                return self[name]

        yield Servers()


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest, servers: dict[str, LocalServer]) -> LocalServer:
    name: str = request.param
    return servers[name]


@pytest.fixture
def engine(server: LocalServer) -> Iterator[Any]:
    made = sa.create_engine(server.url, pool_size=20)
    with made.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS joblock"))
    sql.SqlBlobStore(made).create_table()
    yield made
    made.dispose()


def whole_life(store: Any) -> None:
    lock = acquired(acquire_job_lock(store, UID, VAULT, reason="é日🔒", ttl_ms=1e6))
    assert held(acquire_job_lock(store, UID, VAULT)).existing == lock.record
    assert peek_job_lock(store, UID, VAULT) == lock.record
    renewed = renew_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, ttl_ms=2e6)
    assert renewed.renewed is True
    assert release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=renewed.etag)
    assert peek_job_lock(store, UID, VAULT) is None


LEVELS = [None, "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]


@pytest.mark.parametrize("level", LEVELS)
def test_every_isolation_level(server: LocalServer, engine: Any, level: str | None) -> None:
    """One of many threads wins, and no check fails, whatever the engine's connections do."""
    options = {} if level is None else {"isolation_level": level}
    made = sa.create_engine(server.url, pool_size=20, **options)
    store = sql.SqlBlobStore(made)
    whole_life(store)
    assert_one_winner_of_threads(store)
    made.dispose()


@pytest.mark.parametrize("own", [True, False], ids=["its own engine", "the jobs' engine"])
def test_jobs_that_keep_all_connections(server: LocalServer, engine: Any, own: bool) -> None:
    """Nothing renews where none is left for it; an engine of its own is what the README advises."""
    bound: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    jobs = sa.create_engine(server.url, **bound)
    locks = sa.create_engine(server.url, **bound) if own else jobs
    clock = ManualClock()
    with nullcontext() if own else pytest.raises(JobLockLostError) as caught:
        hold = hold_job_lock(sql.SqlBlobStore(locks), UID, VAULT, clock=clock)
        with hold as lock, jobs.connect():
            clock.advance(120_000)
            assert lock.lost is not own
    if caught is not None:
        assert isinstance(caught.value.__cause__, sa.exc.TimeoutError)
    locks.dispose()
    jobs.dispose()


def test_every_check(engine: Any) -> None:
    """With an engine as a user has it."""
    assert [finding for finding in check_store(sql.SqlBlobStore(engine)) if not finding] == []


def test_a_transaction_of_the_callers(engine: Any) -> None:
    """Its rollback neither takes nor frees a lock, and its changes are not committed."""
    store = sql.SqlBlobStore(engine)
    orm: Any = importlib.import_module("sqlalchemy.orm")
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS orders"))
        connection.execute(sa.text("CREATE TABLE orders (id INT)"))
    with orm.Session(engine) as session:
        session.execute(sa.text("INSERT INTO orders VALUES (1)"))
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        session.rollback()
    assert peek_job_lock(store, UID, VAULT) == lock.record
    with orm.Session(engine) as session:
        session.execute(sa.text("INSERT INTO orders VALUES (2)"))
        assert release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)
        session.rollback()
    assert peek_job_lock(store, UID, VAULT) is None
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM orders")).scalar() == 0


def test_what_stands_in_the_table(engine: Any) -> None:
    """The record as it is, also where the database's own character set could not hold it."""
    store = sql.SqlBlobStore(engine)
    lock = acquired(acquire_job_lock(store, UID, VAULT, reason="é日🔒"))
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM joblock")).all()
    ((found, value, _),) = rows
    assert (found if isinstance(found, str) else found.decode()) == KEY
    assert value == lock.record.to_json()


def test_keys_that_databases_take_for_one(engine: Any) -> None:
    """By case, by spaces at the end, by what a character set lacks, or by an accent."""
    store = sql.SqlBlobStore(engine)
    keys = ["a", "A", "a ", "á", "日", "本", "?", "a\u0301"]
    for key in keys:
        assert store.set_if_new(key, key) is not None
    assert [store.get(key).decode() for key in keys] == keys
    assert sorted(store.list_keys("")) == sorted(keys)


def test_a_database_with_another_order(servers: dict[str, LocalServer]) -> None:
    """Where `a_` comes before `A0`, keys are listed by their bytes all the same."""
    server = servers["postgresql"]
    admin = sa.create_engine(server.url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        if connection.dialect.server_version_info < (15,):
            pytest.skip("PostgreSQL before 15 makes no database with an order of ICU's")
        connection.execute(
            sa.text(
                "CREATE DATABASE ordered TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en'"
            )
        )
    admin.dispose()
    store = sql.connect(server.url.replace("/postgres", "/ordered"))
    store.create_table()
    keys = ["A0", "A_", "B", "a0", "a_", "a_b", "b"]
    for key in keys:
        store.set(key, "x")
    assert list(store.list_keys("")) == keys
    assert list(store.list_keys("a_")) == ["a_", "a_b"]
    assert list(store.list_keys("A")) == ["A0", "A_"]
    store.engine.dispose()


def test_keys_and_etags_that_are_refused(engine: Any) -> None:
    """Before any request: a longer key would be cut, another etag is none of ours."""
    store = sql.SqlBlobStore(engine)
    store.set("é" * 512, "x")
    for verb, *values in (
        ("get",),
        ("set", "x"),
        ("set_if_new", "x"),
        ("delete_if_match", "0" * 32),
    ):
        with pytest.raises(ValueError, match="at most 1024 bytes, not 1025"):
            getattr(store, verb)("é" * 512 + "a", *values)
    assert store.set_if_match("é" * 512, "y", "0" * 31 + " ") is None
    assert store.delete_if_match("é" * 512, "0" * 32 + "\n") is False


def test_no_error_in_postgresqls_log(servers: dict[str, LocalServer]) -> None:
    """Not even where eight clients fight for one key: an operator would have to explain each."""
    server = servers["postgresql"]
    made = sa.create_engine(server.url, pool_size=20)
    store = sql.SqlBlobStore(made, table="locks_without_errors")
    store.create_table()
    before = server.log.read_text().count("ERROR")
    assert_one_winner_of_threads(store)
    whole_life(store)
    assert server.log.read_text().count("ERROR") == before
    with pytest.raises(sa.exc.ProgrammingError), made.begin() as connection:
        connection.execute(sa.text("SELECT * FROM nothing"))
    assert server.log.read_text().count("ERROR") == before + 1  # so the log would tell
    made.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_pgbouncer(servers: dict[str, LocalServer], driver: str) -> None:
    """In transaction mode each statement may reach another connection, which prepared none."""
    pytest.importorskip(driver)
    with pgbouncer(servers["postgresql"]) as pooler:
        url = pooler.url.replace("psycopg", driver)
        if driver == "psycopg":
            store = sql.connect(url)
            store.create_table()
            with ThreadPoolExecutor(8) as threads:
                for answer in threads.map(partial(_a_click, store), range(200)):
                    assert answer
            store.engine.dispose()
            return

        async def main() -> None:
            native = sql.connect_async(url)
            await native.create_table()
            for start in range(0, 200, 8):
                clicks = (_an_async_click(native, n) for n in range(start, start + 8))
                assert all(await asyncio.gather(*clicks))
            await native.engine.dispose()

        asyncio.run(main())


def _a_click(store: Any, number: int) -> bool:
    lock = acquired(acquire_job_lock(store, UID, str(number)))
    return bool(release_job_lock(store, UID, str(number), expected_job_id=lock.job_id))


async def _an_async_click(store: Any, number: int) -> bool:
    lock = acquired(await aio.acquire_job_lock(store, UID, str(number)))
    return bool(await aio.release_job_lock(store, UID, str(number), expected_job_id=lock.job_id))


@pytest.mark.parametrize(("name", "number"), [
    ("postgresql", signal.SIGKILL),
    ("postgresql", signal.SIGQUIT),  # what `pg_ctl restart -m immediate` sends
    ("mariadb", signal.SIGKILL),
])  # fmt: skip
def test_a_server_that_is_killed_and_started_again(name: str, number: int) -> None:
    """No lock is lost, and who holds one goes on."""
    pytest.importorskip({"postgresql": "psycopg", "mariadb": "pymysql"}[name])
    start = {"postgresql": postgresql_server, "mariadb": mariadb_server}[name]
    with start() as server:
        store = sql.connect(server.url)
        store.create_table()
        assert_outlives_its_server(store, server, number)
        store.engine.dispose()


def test_one_winner_of_processes(engine: Any) -> None:
    """One store, inherited over fork, raced by its parent's children."""
    store = sql.SqlBlobStore(engine)
    assert_one_winner_of_forks(store)
    whole_life(store)


def test_a_table_that_is_not_there(engine: Any) -> None:
    """Is not made behind the user's back; what makes it is told, and does no harm twice."""
    store = sql.SqlBlobStore(engine, table="other_locks")
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS other_locks"))
    with pytest.raises(sa.exc.ProgrammingError, match="other_locks"):
        acquire_job_lock(store, UID, VAULT)
    with engine.begin() as connection:
        connection.execute(sa.text(store.ddl))
    store.create_table()
    whole_life(store)
    assert "other_locks" in repr(store)


def test_the_statement_for_a_migration(
    server: LocalServer,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Printed by the module, for a URL; without one it says how."""
    command = [sys.executable, "-m", "joblock.stores.sql"]
    ran = subprocess.run([*command, server.url], capture_output=True, text=True, check=True)
    assert ran.stdout == sql.SqlBlobStore(engine).ddl + ";\n"
    assert ran.stdout.startswith("CREATE TABLE IF NOT EXISTS joblock (")

    monkeypatch.delitem(sys.modules, "joblock.stores.sql")
    for arguments, status, shown in (([server.url], 0, ran.stdout), ([], 64, "")):
        monkeypatch.setattr(sys, "argv", ["sql", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("joblock.stores.sql", run_name="__main__")
        assert ended.value.code == status
        assert capsys.readouterr().out == shown


def test_the_async_one(server: LocalServer, engine: Any) -> None:
    """By its URL: a second click is refused, keys are listed, a hold keeps its lock."""
    url = server.url
    for driver, native in ASYNC.items():
        pytest.importorskip(native.partition("+")[2])
        url = url.replace(driver, native)

    async def main() -> None:
        store: Any = aio.open_store(url)
        await store.create_table()
        assert store.ddl == sql.SqlBlobStore(engine).ddl
        await assert_is_held_natively(store)
        await store.engine.dispose()

    asyncio.run(main())


def test_a_refused_click(engine: Any) -> None:
    """One statement in PostgreSQL, which shows who has the lock; two in MariaDB."""
    store = sql.SqlBlobStore(engine)
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    statements: list[object] = []

    def count(*given: object) -> None:
        statements.append(given)

    sa.event.listen(engine, "before_cursor_execute", count)
    assert held(acquire_job_lock(store, UID, VAULT)).existing == lock.record
    assert len(statements) == (1 if engine.dialect.name == "postgresql" else 2)


@pytest.fixture
def on_postgresql(servers: dict[str, LocalServer]) -> Iterator[Any]:
    made = sa.create_engine(servers["postgresql"].url)
    store = sql.SqlBlobStore(made, table="contended")
    store.create_table()
    yield store
    store.delete(KEY)
    made.dispose()


def created_during(store: Any, change: str, **values: str) -> Any:
    """What creating is told that began before another transaction's change was committed."""
    with store.engine.connect() as other, ThreadPoolExecutor(1) as thread:
        transaction = other.begin()
        other.execute(sa.text(change), values)
        answer = thread.submit(store.set_if_new_or_get, KEY, "mine")
        poll(lambda: waits(store.engine))
        transaction.commit()
        return answer.result()


def waits(engine: Any) -> bool:
    """Whether a statement waits for another's transaction."""
    with engine.connect() as connection:
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return bool(connection.execute(waiting).scalar())


def test_a_removal_under_way(on_postgresql: Any) -> None:
    """The row is seen as the statement began, but it is gone: what was written counts."""
    assert on_postgresql.set_if_new(KEY, "theirs")
    etag = created_during(on_postgresql, "DELETE FROM contended")
    assert on_postgresql.get_with_etag(KEY) == Blob(b"mine", etag)


def test_a_creation_under_way(on_postgresql: Any) -> None:
    """The row was not there as the statement began, and is now: refused, and not told."""
    change = "INSERT INTO contended VALUES (:key, 'theirs', 'an etag')"
    assert created_during(on_postgresql, change, key=KEY) is None
    assert on_postgresql.get(KEY) == b"theirs"


def test_sqlite(tmp_path: Path) -> None:
    """For tests of a program that has a database elsewhere: a file, sync and async."""
    pytest.importorskip("aiosqlite")
    store = sql.connect(f"sqlite+pysqlite:///{tmp_path}/jobs.db")
    store.create_table()
    whole_life(store)
    assert [finding for finding in check_store(store) if not finding] == []
    store.engine.dispose()

    async def main() -> None:
        native = sql.connect_async(f"sqlite+aiosqlite:///{tmp_path}/jobs.db")
        assert [finding for finding in await aio.check_store(native) if not finding] == []
        await native.engine.dispose()

    asyncio.run(main())


def test_a_row_that_comes_between(tmp_path: Path) -> None:
    """To set is to update or else to insert, again and again, until one of them has written."""
    store = sql.connect(f"sqlite+pysqlite:///{tmp_path}/jobs.db")
    store.create_table()
    insert = store._rows.set_if_new_or_get

    def another_was_quicker(key: str, value: str) -> None:
        store._rows.set_if_new_or_get = insert
        insert(key, "another's")

    store._rows.set_if_new_or_get = another_was_quicker
    store.set(KEY, "mine")
    assert store.get(KEY) == b"mine"
    store.engine.dispose()


def test_a_child_of_a_fork_drops_its_parents_pool(tmp_path: Path) -> None:
    """Without closing its connections, before its first statement."""
    store = sql.connect(f"sqlite+pysqlite:///{tmp_path}/jobs.db")
    parents = store.engine.pool
    store._rows._pool._pid = 0  # as if that were another process's
    store.create_table()
    assert store.engine.pool is not parents
    store.engine.dispose()


def test_engines_that_are_refused() -> None:
    """With one connection for all, a caller's transaction would be committed; and any other."""
    pool: Any = importlib.import_module("sqlalchemy.pool")
    with pytest.raises(ValueError, match="one connection for all"):
        sql.SqlBlobStore(sa.create_engine("sqlite://", poolclass=pool.StaticPool))
    with pytest.raises(ValueError, match="one connection for all"):
        sql.SqlBlobStore(sa.create_engine("sqlite://"))
    fake = SimpleNamespace(paramstyle="named", version="1", Error=Exception, Cursor=object)
    other = sa.create_engine("mssql+pyodbc://u:hush@host", module=fake)
    with pytest.raises(ValueError, match="postgresql, mysql, mariadb, sqlite, not mssql"):
        sql.SqlBlobStore(other)


@pytest.mark.parametrize(
    ("error", "unanswered"),
    [
        (sa.exc.OperationalError("", {}, Exception("gone")), True),
        (sa.exc.InterfaceError("", {}, Exception("closed")), True),
        (sa.exc.InternalError("", {}, Exception(1020, "changed")), True),
        (sa.exc.DatabaseError("", {}, SimpleNamespace(sqlstate="HY000", args=(1205, ""))), True),
        (sa.exc.DBAPIError("", {}, SimpleNamespace(sqlstate="40001")), True),
        (sa.exc.DBAPIError("", {}, SimpleNamespace(sqlstate="40P01")), True),
        (sa.exc.DBAPIError("", {}, Exception("cut"), connection_invalidated=True), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (sa.exc.ProgrammingError("", {}, Exception(1146, "no table")), False),
        (sa.exc.IntegrityError("", {}, SimpleNamespace(sqlstate="23505")), False),
        (sa.exc.TimeoutError("the pool is exhausted"), False),
        (KeyError("key"), False),
    ],
)
def test_which_errors_are_no_answer(error: Exception, unanswered: bool) -> None:
    """A lost connection, and a statement that was given up for another one's sake."""
    assert sql._unanswered(error) is unanswered
