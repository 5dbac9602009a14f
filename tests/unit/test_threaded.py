"""`joblock.aio.ThreadedBlobStore`: any blocking store, for async code."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from joblock import Blob, MemoryBlobStore, aio
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import KEY, UID, VAULT, PlainStore, acquired, held


def test_is_conditional_exactly_when_its_store_is() -> None:
    """The guarantee of the store is the guarantee of the wrapper."""

    async def calls(store: aio.ThreadedBlobStore) -> list[str]:
        won = acquired(await aio.acquire_job_lock(store, UID, VAULT))
        return ["etag" if won.etag else "no etag"]

    assert asyncio.run(calls(aio.ThreadedBlobStore(MemoryBlobStore()))) == ["etag"]
    assert asyncio.run(calls(aio.ThreadedBlobStore(PlainStore()))) == ["no etag"]
    assert not hasattr(aio.ThreadedBlobStore(PlainStore()), "set_if_new")


def test_serves_the_whole_life_of_a_lock(tmp_path: Path) -> None:
    """On a SQLite file, whose verbs all go through."""

    async def life(store: aio.ThreadedBlobStore) -> None:
        won = acquired(await aio.acquire_job_lock(store, UID, VAULT))
        second = held(await aio.acquire_job_lock(store, UID, VAULT))
        assert second.existing == won.record
        renewed = await aio.renew_job_lock(store, UID, VAULT, expected_job_id=won.job_id)
        assert renewed
        assert await aio.peek_job_lock(store, UID, VAULT) == renewed.record
        released = await aio.release_job_lock(
            store, UID, VAULT, expected_job_id=won.job_id, etag=renewed.etag
        )
        assert released.released
        assert await aio.peek_job_lock(store, UID, VAULT) is None
        await store.set(KEY, "x")
        await store.delete(KEY)
        assert await store.get(KEY) is None

    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        asyncio.run(life(aio.ThreadedBlobStore(store)))


def test_calls_the_store_outside_the_event_loops_thread() -> None:
    """A slow store must not stop the service."""
    threads: set[int] = set()

    class Slow(MemoryBlobStore):
        def get_with_etag(self, key: str) -> Blob | None:
            threads.add(threading.get_ident())
            return super().get_with_etag(key)

        def set_if_new(self, key: str, value: str) -> str | None:
            threads.add(threading.get_ident())
            return super().set_if_new(key, value)

    async def contend() -> list[bool]:
        store = aio.ThreadedBlobStore(Slow())
        results = await asyncio.gather(
            *(aio.acquire_job_lock(store, UID, VAULT) for _ in range(20))
        )
        return [result.acquired for result in results]

    assert asyncio.run(contend()).count(True) == 1
    assert threads
    assert threading.get_ident() not in threads


def test_repr_and_bad_stores() -> None:
    """It shows what it wraps, and wraps nothing that is no store."""
    assert (
        repr(aio.ThreadedBlobStore(MemoryBlobStore())) == "ThreadedBlobStore(MemoryBlobStore({}))"
    )
    nothing: Any = object()
    with pytest.raises(TypeError, match="lacks get, set, delete"):
        aio.ThreadedBlobStore(nothing)
