"""A blocking store behind `ThreadedBlobStore`: what the hop into a thread costs."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from joblock import acquire_job_lock, aio, release_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID, VAULT, acquired

from .table import Row, microseconds
from .turns import Case, Turns

THREADED = "joblock.aio, ThreadedBlobStore on SQLite"
BY_HAND, EMPTY = "asyncio.to_thread(acquire and release)", "two empty asyncio.to_thread"


def threaded(*, quick: bool) -> Iterator[Row]:
    """Acquire and release of a free lock, from an event loop."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SqliteBlobStore(Path(folder, "jobs.db")) as store,
        closing(asyncio.new_event_loop()) as loop,
    ):
        wrapped = aio.ThreadedBlobStore(store)

        async def cycle() -> None:
            won = acquired(await aio.acquire_job_lock(wrapped, UID, VAULT))
            release = partial(aio.release_job_lock, wrapped, UID, VAULT, etag=won.etag)
            await release(expected_job_id=won.job_id)

        async def by_hand() -> None:
            won = acquired(await asyncio.to_thread(acquire_job_lock, store, UID, VAULT))
            release = partial(release_job_lock, store, UID, VAULT, etag=won.etag)
            await asyncio.to_thread(release, expected_job_id=won.job_id)

        async def empty() -> None:
            await asyncio.to_thread(int)
            await asyncio.to_thread(int)

        def case(work: Callable[[], Awaitable[None]]) -> Case:
            return lambda: loop.run_until_complete(work())

        cases = {THREADED: case(cycle), BY_HAND: case(by_hand), EMPTY: case(empty)}
        turns = Turns(cases, quick=quick)
        for name in cases:
            against = [
                f"{turns.ratio(name, other):.2f} x {other}" for other in cases if other != name
            ]
            yield Row(name, microseconds(turns.median(name)), ", ".join(against))
        wrapped.close()
        loop.run_until_complete(loop.shutdown_default_executor())
