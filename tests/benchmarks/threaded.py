"""A blocking store behind `ThreadedBlobStore`: what the hop into a thread costs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Generator, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeVar

from joblock import acquire_job_lock, aio, release_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID, VAULT, acquired

from .table import Row, microseconds

T = TypeVar("T")

EMPTY = "an empty asyncio.to_thread"
ACQUIRE, RELEASE = "ThreadedBlobStore on SQLite, acquire", "ThreadedBlobStore on SQLite, release"
BY_HAND = "asyncio.to_thread(acquire_job_lock)"


def threaded(*, quick: bool) -> Iterator[Row]:
    """Acquire and release of a free lock, from an event loop, one call of each kind in turn."""
    with (
        _on_one_processor(),
        tempfile.TemporaryDirectory() as folder,
        SqliteBlobStore(Path(folder, "jobs.db")) as store,
    ):
        rounds = asyncio.run(_rounds(store, quick))
    for name in (ACQUIRE, RELEASE, BY_HAND, EMPTY):
        ratio = median(it[name] / it[EMPTY] for it in rounds)
        against = "" if name == EMPTY else f"{ratio:.2f} x {EMPTY}"
        yield Row(name, microseconds(median(it[name] for it in rounds)), against)


@contextlib.contextmanager
def _on_one_processor() -> Generator[None]:
    """On two, a hop takes twice as long to a thread that happens to be on the other one."""
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _rounds(store: SqliteBlobStore, quick: bool) -> list[dict[str, float]]:
    wrapped = aio.ThreadedBlobStore(store)
    calls = 20 if quick else 400
    try:
        return [await _round(store, wrapped, calls) for _ in range(3 if quick else 15)]
    finally:
        wrapped.close()


async def _round(
    store: SqliteBlobStore, wrapped: aio.ThreadedBlobStore, calls: int
) -> dict[str, float]:
    """Seconds for each kind of call."""
    seconds: defaultdict[str, float] = defaultdict(float)

    async def timed(name: str, call: Awaitable[T]) -> T:
        begun = perf_counter()
        answer = await call
        seconds[name] += (perf_counter() - begun) / calls
        return answer

    for _ in range(calls):
        lock = acquired(await timed(ACQUIRE, aio.acquire_job_lock(wrapped, UID, VAULT)))
        release = partial(aio.release_job_lock, wrapped, UID, VAULT, expected_job_id=lock.job_id)
        await timed(RELEASE, release(etag=lock.etag))
        await timed(EMPTY, asyncio.to_thread(int))
        lock = acquired(
            await timed(BY_HAND, asyncio.to_thread(acquire_job_lock, store, UID, VAULT))
        )
        release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)
    return dict(seconds)
