"""Redis and PostgreSQL on loopback: beside what people use there today, and natively async."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any

from joblock import acquire_job_lock, aio, release_job_lock
from tests.servers import postgresql_server, redis_server
from tests.stream_proxy import stream_proxy
from tests.support import UID, VAULT, acquired

from .table import Row, microseconds, where_installed
from .turns import Case, Turns

TTL_S = 960
CLIENTS = 50


@where_installed("Redis")
def on_redis(*, quick: bool) -> Iterator[Row]:
    """Acquire and release, and a refused click, beside three locks for the same client."""
    with ExitStack() as stack:
        redis: Any = import_module("redis")
        redis_lock: Any = import_module("redis_lock")
        pottery: Any = import_module("pottery")
        server = stack.enter_context(redis_server("--appendonly", "no"))
        logging.getLogger("redis_lock").addHandler(logging.NullHandler())
        client = stack.enter_context(redis.Redis.from_url(server.url))
        store = import_module("joblock.stores.redis").RedisBlobStore(client)
        lock = client.lock("redis-py", timeout=TTL_S)
        other = redis_lock.Lock(client, "python-redis-lock", expire=TTL_S)
        redlock = partial(pottery.Redlock, masters={client}, auto_release_time=TTL_S)
        third = redlock(key="pottery")
        yield from _beside(
            "joblock",
            {
                "joblock": _cycle(store),
                "redis-py Lock": _both(lock.acquire, lock.release),
                "python-redis-lock": _both(other.acquire, other.release),
                "pottery Redlock": _both(third.acquire, third.release),
            },
            quick,
        )
        acquired(acquire_job_lock(store, UID, "held"))
        held, mine = (client.lock("held", timeout=TTL_S) for _ in range(2))
        theirs, also_mine = (redis_lock.Lock(client, "held", expire=TTL_S) for _ in range(2))
        not_mine, nor_mine = redlock(key="held"), redlock(key="held")
        for lock in (held, theirs, not_mine):
            lock.acquire()
        yield from _beside(
            "joblock, refused",
            {
                "joblock, refused": lambda: acquire_job_lock(store, UID, "held"),
                "redis-py Lock, refused": lambda: mine.acquire(blocking=False),
                "python-redis-lock, refused": lambda: also_mine.acquire(blocking=False),
                "pottery Redlock, refused": lambda: nor_mine.acquire(blocking=False),
            },
            quick,
        )
        yield from _lost_reply(redis, redis_lock, pottery, server.port)
        client.flushall()


def _lost_reply(redis: Any, redis_lock: Any, pottery: Any, port: int) -> Iterator[Row]:
    """What comes of an acquire of a free lock whose reply was lost."""
    with ExitStack() as stack:
        proxy = stack.enter_context(stream_proxy("127.0.0.1", port))
        client = stack.enter_context(redis.Redis(host="127.0.0.1", port=proxy.port))
        client.flushall()
        store = import_module("joblock.stores.redis").RedisBlobStore(client)
        lock = client.lock("redis-py lost", timeout=TTL_S)
        other = redis_lock.Lock(client, "python-redis-lock lost", expire=TTL_S)
        third = pottery.Redlock(key="lost", masters={client}, auto_release_time=TTL_S)
        attempts: dict[str, Callable[[], Any]] = {
            "joblock": lambda: bool(acquire_job_lock(store, UID, "lost")),
            "redis-py Lock": lambda: lock.acquire(blocking=False),
            "python-redis-lock": lambda: other.acquire(blocking=False),
            "pottery Redlock": lambda: third.acquire(blocking=False),
        }
        for name, acquire in attempts.items():
            client.ping()
            proxy.cut(0, lambda request: b"lost" in request)
            try:
                answer = "takes the lock" if acquire() else "refused by its own write"
            except Exception as error:
                answer = f"raises {type(error).__name__}"
            yield Row(f"{name}, the reply was lost", "-", answer)


@where_installed("PostgreSQL")
def on_postgresql(*, quick: bool) -> Iterator[Row]:
    """Beside the two bare statements by the same engine, and an advisory lock; and refused."""
    with ExitStack() as stack:
        sa: Any = import_module("sqlalchemy")
        import_module("psycopg")
        server = stack.enter_context(postgresql_server(fsync="on"))
        engine = sa.create_engine(server.url)
        stack.callback(engine.dispose)
        store = import_module("joblock.stores.sql").SqlBlobStore(engine)
        store.create_table()
        record = acquired(acquire_job_lock(store, UID, "record")).record.to_json()
        bare = engine.execution_options(isolation_level="AUTOCOMMIT")
        insert = sa.text(
            "INSERT INTO joblock VALUES (:key, :value, :etag) ON CONFLICT DO NOTHING RETURNING etag"
        )
        delete = sa.text("DELETE FROM joblock WHERE key = :key AND etag = :etag")
        take, free = (sa.text(f"SELECT pg_advisory_{it}(1)") for it in ("lock", "unlock"))

        def statements() -> None:
            etag = os.urandom(16).hex()
            with bare.connect() as connection:
                connection.execute(insert, {"key": "k", "value": record, "etag": etag}).all()
            with bare.connect() as connection:
                connection.execute(delete, {"key": "k", "etag": etag})

        def advisory() -> None:
            with bare.connect() as connection:
                connection.execute(take)
                connection.execute(free)

        cases: dict[str, Case] = {
            "joblock": _cycle(store),
            "the two bare statements": statements,
            "advisory lock, which writes nothing": advisory,
        }
        yield from _beside("joblock", cases, quick)
        acquired(acquire_job_lock(store, UID, "held"))
        stack.enter_context(bare.connect()).execute(sa.text("SELECT pg_advisory_lock(2)"))

        def refused() -> None:
            with bare.connect() as connection:
                connection.execute(sa.text("SELECT pg_try_advisory_lock(2)"))

        yield from _beside(
            "joblock, refused",
            {
                "joblock, refused": lambda: acquire_job_lock(store, UID, "held"),
                "advisory lock, refused": refused,
            },
            quick,
        )


@where_installed("Redis")
def natively(*, quick: bool) -> Iterator[Row]:
    """Acquires and releases per second, of 50 tasks at once, each with a lock of its own."""
    with ExitStack() as stack:
        redis: Any = import_module("redis")
        native: Any = import_module("redis.asyncio")
        server = stack.enter_context(redis_server("--appendonly", "no"))
        stores: Any = import_module("joblock.stores.redis")

        async def main() -> list[tuple[float, float]]:
            client = native.Redis.from_url(server.url)
            blocking = redis.Redis.from_url(server.url)
            threaded = aio.ThreadedBlobStore(stores.RedisBlobStore(blocking))
            rounds = [
                (
                    await _per_second(stores.AsyncRedisBlobStore(client), quick),
                    await _per_second(threaded, quick),
                )
                for _ in range(3 if quick else 9)
            ]
            threaded.close()
            await client.aclose()
            blocking.close()
            return rounds

        rounds = sorted(asyncio.run(main()), key=lambda pair: pair[0] / pair[1])
        middle, threaded = rounds[len(rounds) // 2]
        ratio = f"{middle / threaded:.2f} x ThreadedBlobStore"
        yield Row("joblock.aio, AsyncRedisBlobStore", f"{middle:,.0f} /s", ratio)
        yield Row("joblock.aio, ThreadedBlobStore", f"{threaded:,.0f} /s")


async def _per_second(store: Any, quick: bool) -> float:
    cycles = CLIENTS * (4 if quick else 40)
    numbers = itertools.count()

    async def client() -> None:
        while (number := next(numbers)) < cycles:
            lock = acquired(await aio.acquire_job_lock(store, UID, str(number)))
            release: Callable[..., Awaitable[Any]] = aio.release_job_lock
            await release(store, UID, str(number), expected_job_id=lock.job_id, etag=lock.etag)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return cycles / (time.perf_counter() - begun)


def _beside(mine: str, cases: dict[str, Case], quick: bool) -> Iterator[Row]:
    turns = Turns(cases, quick=quick)
    for name in cases:
        against = "" if name == mine else f"joblock takes {turns.ratio(mine, name):.2f} of its time"
        yield Row(name, microseconds(turns.median(name)), against)


def _cycle(store: Any) -> Case:
    def cycle() -> None:
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)

    return cycle


def _both(first: Case, then: Case) -> Case:
    def cycle() -> None:
        first()
        then()

    return cycle
