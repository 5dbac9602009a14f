"""What MemoryBlobStore offers to tests beyond the contract."""

from __future__ import annotations

import asyncio

import pytest

from joblock import MemoryBlobStore, acquire_job_lock, aio
from tests.support import KEY, UID, VAULT, acquired, held


def test_length_iteration_and_repr() -> None:
    """A failing assertion shows what is in the store."""
    store = MemoryBlobStore()
    assert (len(store), list(store), repr(store)) == (0, [], "MemoryBlobStore({})")
    acquire_job_lock(store, "u", "v", clock=lambda: 5, uuid_factory=lambda: "j", ttl_ms=5)
    assert (len(store), list(store)) == (1, ["index-jobs/u/v.json"])
    assert repr(store).startswith('MemoryBlobStore({\'index-jobs/u/v.json\': \'{"jobId":"j",')


def test_an_empty_store_is_true() -> None:
    """`store or DEFAULT` in a service must not drop its test's empty store."""
    assert MemoryBlobStore()


def test_iteration_is_over_a_snapshot() -> None:
    """So that a test can clear the store while it goes over it."""
    store = MemoryBlobStore()
    for key in "abc":
        store.set(key, key)
    for key in store:
        store.delete(key)
    assert len(store) == 0


async def life_of_a_lock() -> None:
    store = aio.AsyncMemoryBlobStore()
    assert store
    won = acquired(await aio.acquire_job_lock(store, UID, VAULT))
    assert held(await aio.acquire_job_lock(store, UID, VAULT)).existing == won.record
    assert (len(store), list(store)) == (1, [KEY])
    assert repr(store).startswith("AsyncMemoryBlobStore({")
    assert [key async for key in store.list_keys("index-jobs/")] == [KEY]
    assert [key async for key in store.list_keys("other/")] == []
    renewed = await aio.renew_job_lock(store, UID, VAULT, expected_job_id=won.job_id)
    assert renewed.renewed is True
    assert await aio.release_job_lock(
        store, UID, VAULT, expected_job_id=won.job_id, etag=renewed.etag
    )
    await store.set(KEY, "x")
    assert await store.get(KEY) == "x"
    await store.delete(KEY)
    assert len(store) == 0


def test_the_async_one() -> None:
    """Awaited, it does the same."""
    asyncio.run(life_of_a_lock())


def test_the_async_one_under_trio() -> None:
    """It waits for nothing, so no event loop is needed, nor any of them in the way."""
    pytest.importorskip("trio").run(life_of_a_lock)
