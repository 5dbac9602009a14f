"""`list_job_locks` and `sweep_job_locks`: what is there, and what nobody needs any more."""

from __future__ import annotations

import asyncio
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from joblock import (
    InvalidIdError,
    JobLockRecord,
    MemoryBlobStore,
    acquire_job_lock,
    aio,
    job_lock_key,
    list_job_locks,
    release_job_lock,
    resume_job_lock,
    sweep_job_locks,
)
from joblock._store import WrongStoreError
from joblock.aio import AsyncMemoryBlobStore, ThreadedBlobStore
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import PlainStore, acquired

HOUR = 3_600_000


def listed_sync(store: MemoryBlobStore, uid: str | None = None) -> list[JobLockRecord]:
    return list(list_job_locks(store, uid))


def listed_async(store: MemoryBlobStore, uid: str | None = None) -> list[JobLockRecord]:
    async def collect() -> list[JobLockRecord]:
        return [it async for it in aio.list_job_locks(native(store), uid)]

    return asyncio.run(collect())


def listed_in_threads(store: MemoryBlobStore, uid: str | None = None) -> list[JobLockRecord]:
    async def collect() -> list[JobLockRecord]:
        return [it async for it in aio.list_job_locks(ThreadedBlobStore(store), uid)]

    return asyncio.run(collect())


def native(store: MemoryBlobStore) -> AsyncMemoryBlobStore:
    made = AsyncMemoryBlobStore()
    made._store = store
    return made


Listing = Callable[..., list[JobLockRecord]]


@pytest.fixture(params=[listed_sync, listed_async, listed_in_threads])
def listed(request: pytest.FixtureRequest) -> Listing:
    chosen: Listing = request.param
    return chosen


def swept_sync(store: MemoryBlobStore, **options: Any) -> int:
    return sweep_job_locks(store, **options)


def swept_async(store: MemoryBlobStore, **options: Any) -> int:
    return asyncio.run(aio.sweep_job_locks(native(store), **options))


def swept_in_threads(store: MemoryBlobStore, **options: Any) -> int:
    return asyncio.run(aio.sweep_job_locks(ThreadedBlobStore(store), **options))


@pytest.fixture(params=[swept_sync, swept_async, swept_in_threads])
def swept(request: pytest.FixtureRequest) -> Callable[..., int]:
    chosen: Callable[..., int] = request.param
    return chosen


def take(store: Any, uid: str, vault: str, at: int, ttl_ms: int = HOUR) -> JobLockRecord:
    return acquired(acquire_job_lock(store, uid, vault, clock=lambda: at, ttl_ms=ttl_ms)).record


def test_all_or_one_users(listed: Listing) -> None:
    """Live and expired; a user whose name only begins so is another."""
    store = MemoryBlobStore()
    assert listed(store) == []
    records = [take(store, uid, vault, 5) for uid in ("u", "u2") for vault in ("v", "w")]
    assert listed(store) == records
    assert listed(store, "u") == records[:2]
    assert listed(store, "x") == []


def test_what_is_no_record_is_left_out(listed: Listing) -> None:
    """Junk, tombstones, records without a job, and keys that are none of joblock's."""
    store = MemoryBlobStore()
    record = take(store, "u", "v", 5)
    for number, junk in enumerate(["", "null", "{", "[]", "{}", '{"jobId":7}']):
        store.set(f"index-jobs/u/junk{number}.json", junk)
    store.set("other/u/v.json", record.to_json())
    assert listed(store) == [record]


def test_what_vanishes_meanwhile_is_left_out() -> None:
    """A record is read when it is its turn, not before."""
    store = MemoryBlobStore()
    first, second, third = (take(store, "u", vault, 5) for vault in "abc")
    listing = list_job_locks(store)
    assert next(listing) == first
    store.delete(job_lock_key("u", "b"))
    assert list(listing) == [third]
    assert second not in listed_sync(store)


@pytest.mark.parametrize("uid", ["", "a/b", ".."])
def test_an_id_that_names_no_user(listed: Listing, swept: Callable[..., int], uid: str) -> None:
    """Is refused, sync at once and async at the first step."""
    with pytest.raises(InvalidIdError, match="canister_uid"):
        listed(MemoryBlobStore(), uid)
    with pytest.raises(InvalidIdError, match="canister_uid"):
        swept(MemoryBlobStore(), expired_for_ms=0, canister_uid=uid)


def test_a_store_that_cannot_list() -> None:
    """It says which method is missing, sync at once."""
    store = PlainStore()
    with pytest.raises(WrongStoreError, match="PlainStore has no list_keys"):
        list_job_locks(store)
    with pytest.raises(WrongStoreError, match="PlainStore has no list_keys"):
        sweep_job_locks(store, expired_for_ms=0)


class Listable(PlainStore):
    def list_keys(self, prefix: str) -> Iterator[str]:
        return iter([job_lock_key("u", "v")])


class LeavesNull(MemoryBlobStore):
    leaves_null = True


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        (Listable(), "cannot delete under a condition: a sweep could remove"),
        (LeavesNull(), "it writes null instead, which a sweep cannot remove"),
    ],
)
def test_a_store_that_must_not_be_swept(store: Any, reason: str) -> None:
    """Because it could remove a live lock, or because it would remove nothing."""
    take(store, "u", "v", 5)
    with pytest.raises(WrongStoreError, match=reason):
        sweep_job_locks(store, expired_for_ms=0)
    with pytest.raises(WrongStoreError, match=reason):
        asyncio.run(aio.sweep_job_locks(ThreadedBlobStore(store), expired_for_ms=0))
    assert [record.expires_at for record in list_job_locks(store)] == [5 + HOUR]


def test_what_was_expired_for_so_long_is_removed(swept: Callable[..., int]) -> None:
    """To the millisecond, of all users or of one."""
    store = MemoryBlobStore()
    for uid in ("u", "x"):
        for vault, at in {"old": 1, "edge": 2, "young": 3, "live": 10 * HOUR}.items():
            take(store, uid, vault, at)

    def sweep(**options: Any) -> int:
        return swept(store, expired_for_ms=HOUR, clock=lambda: 2 + 2 * HOUR, **options)

    assert sweep(canister_uid="u") == 2
    assert [it.vault_id for it in list_job_locks(store, "u")] == ["young", "live"]
    assert sweep() == 2
    assert sweep() == 0
    assert len(store) == 4


def test_ended_and_released_ones(swept: Callable[..., int]) -> None:
    """A job that ended keeps its lock for its least time; a tombstone has no time to wait for."""
    store = MemoryBlobStore()
    lock = acquired(acquire_job_lock(store, "u", "v", clock=lambda: 1000, ttl_ms=10))
    assert release_job_lock(
        store, "u", "v", expected_job_id=lock.job_id, at_least_ms=HOUR, clock=lambda: 1001
    )
    store.set(job_lock_key("u", "released"), "null")
    store.set(job_lock_key("u", "junk"), "{")
    store.set(job_lock_key("u", "none of ours"), '{"jobId":"j"}')
    assert swept(store, expired_for_ms=0, clock=lambda: 999 + HOUR) == 1
    assert swept(store, expired_for_ms=timedelta(), clock=lambda: 1000 + HOUR) == 1
    assert sorted(store) == [job_lock_key("u", "junk"), job_lock_key("u", "none of ours")]


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), None, "1h"])
def test_a_time_that_is_none(swept: Callable[..., int], bad: Any) -> None:
    """Nothing is removed."""
    store = MemoryBlobStore()
    take(store, "u", "v", 5)
    with pytest.raises(ValueError, match="expired_for_ms must be"):
        swept(store, expired_for_ms=bad)
    assert len(store) == 1


def test_what_changes_after_it_was_read_stays() -> None:
    """Taken over, or resumed: the etag that was read is out of date."""

    class Changes(MemoryBlobStore):
        def get_with_etag(self, key: str) -> Any:
            blob = super().get_with_etag(key)
            changes.pop()()
            return blob

    store, other = Changes(), MemoryBlobStore()
    other._blobs, other._etags = store._blobs, store._etags
    old = take(store, "u", "v", 5)

    changes: list[Callable[[], object]] = [lambda: take(other, "u", "v", 3 * HOUR)]
    assert sweep_job_locks(store, expired_for_ms=0, clock=lambda: 3 * HOUR) == 0
    (taken,) = list_job_locks(store)
    assert taken.job_id != old.job_id

    def resume() -> None:
        with resume_job_lock(other, "u", "v", expected_job_id=str(taken.job_id)) as lock:
            lock.requeue(ttl_ms=HOUR)

    changes.append(resume)
    assert sweep_job_locks(store, expired_for_ms=0) == 0
    assert [it.job_id for it in list_job_locks(store)] == [taken.job_id]


def test_what_vanishes_before_it_is_swept_is_not_counted() -> None:
    """Another sweep was quicker, or the job's own release."""

    class Vanishes(MemoryBlobStore):
        def get_with_etag(self, key: str) -> Any:
            self.delete(key)
            return super().get_with_etag(key)

    store = Vanishes()
    take(store, "u", "v", 5)
    assert sweep_job_locks(store, expired_for_ms=0) == 0
    assert len(store) == 0


@pytest.mark.slow
def test_a_listing_of_many_keeps_none(tmp_path: Path) -> None:
    """20,000 records would take more than 10 MB."""
    text = JobLockRecord("j", "u", "v", started_at=1, expires_at=2).to_json()
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as connection, connection:
            connection.executemany(
                "INSERT INTO joblock (key, value, etag) VALUES (?, ?, ?)",
                [(f"index-jobs/u/{number}.json", text, f"e{number}") for number in range(20_000)],
            )
        tracemalloc.start()
        try:
            assert sum(1 for _ in list_job_locks(store)) == 20_000
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 2_000_000
