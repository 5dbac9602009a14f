"""Locks that are broken on purpose, each in one way, for the checker to catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from joblock import (
    Acquired,
    Held,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    Lost,
    ReleaseResult,
    Renewed,
    _protocol,
)
from tests.model.world import TTL, UID, VAULT, Algorithm

Clock = Callable[[], int]
KEY = "k"


def new_record(now: int, job: str) -> JobLockRecord:
    return JobLockRecord(job, UID, VAULT, started_at=now, expires_at=now + TTL)


async def reads_then_writes(
    store: Any, *_: str, clock: Clock, uuid_factory: Callable[[], str], **__: object
) -> Acquired | Held:
    """The original's acquire."""
    now = clock()
    current = JobLockRecord.from_json(await store.get(KEY))
    if current is not None and current.is_live(now):
        return Held(current)
    record = new_record(now, uuid_factory())
    await store.set(KEY, record.to_json())
    return Acquired(uuid_factory(), record, None, current)


def conditional_acquire(
    *, etag: bool = True, write: bool = True, live_at_deadline: bool = False
) -> Callable[..., Any]:
    """An acquire that creates, reads and takes over, less what it is told to leave out."""

    async def acquire(
        store: Any, *_: str, clock: Clock, uuid_factory: Callable[[], str], **__: object
    ) -> Acquired | Held:
        job = uuid_factory()
        record = new_record(clock(), job)
        new = await store.set_if_new(KEY, record.to_json())
        current = None
        while new is None:
            blob = await store.get_with_etag(KEY)
            current = JobLockRecord.from_json(blob.value) if blob else None
            now = clock()
            if current is not None and current.is_live(now - live_at_deadline):
                return Held(current)
            record = new_record(now, job)
            if blob is None:
                new = await store.set_if_new(KEY, record.to_json())
            elif not write:
                new = blob.etag
            elif etag:
                new = await store.set_if_match(KEY, record.to_json(), blob.etag)
            else:
                await store.set(KEY, record.to_json())
                new = "unknown"
        return Acquired(job, record, new, current)

    return acquire


async def reads_then_deletes(
    store: Any, *_: str, expected_job_id: str, **__: object
) -> ReleaseResult:
    """The original's release."""
    current = JobLockRecord.from_json(await store.get(KEY))
    if current is None or current.job_id != expected_job_id:
        return ReleaseResult(released=False, reason="lock_already_gone")
    await store.delete(KEY)
    return ReleaseResult(released=True)


async def reads_then_renews(
    store: Any, *_: str, expected_job_id: str, clock: Clock, **__: object
) -> Renewed | Lost:
    """A renewal that compares the owner but not the version."""
    current = JobLockRecord.from_json(await store.get(KEY))
    if current is None or current.job_id != expected_job_id:
        return Lost("lock_owned_by_other_job" if current else "lock_already_gone", current)
    record = new_record(clock(), expected_job_id)
    await store.set(KEY, record.to_json())
    return Renewed(record, None)


BROKEN = {
    "read-then-write acquire": Algorithm(acquire=reads_then_writes),
    "read-then-delete release": Algorithm(release=reads_then_deletes),
    "read-then-write renewal": Algorithm(renew=reads_then_renews),
    "takeover without the etag": Algorithm(acquire=conditional_acquire(etag=False)),
    "live at its deadline on one side": Algorithm(
        acquire=conditional_acquire(live_at_deadline=True)
    ),
    "a lock that was only read": Algorithm(acquire=conditional_acquire(write=False)),
    "an etag that repeats after delete": Algorithm(etags_repeat=True),
}


async def keeps_by_job_id(store: Any, *ids: str, run: object, **keywords: Any) -> Renewed | Lost:
    return await _protocol.renew(store, *ids, run=None, **keywords)


async def leaves_by_job_id(store: Any, *ids: str, run: object, **keywords: Any) -> ReleaseResult:
    return await _protocol.release(store, *ids, run=None, **keywords)


async def leaves_at_once(store: Any, *ids: str, at_least_ms: int, **keywords: Any) -> ReleaseResult:
    return await _protocol.release(store, *ids, **keywords)


async def keeps_for_ever(
    store: Any, *ids: str, at_most_ms: int | None, **keywords: Any
) -> Renewed | Lost:
    return await _protocol.renew(store, *ids, **keywords)


async def requeues_by_job_id(
    store: Any, *_: str, run: JobLockRecord, clock: Clock, **__: object
) -> Renewed | Lost:
    while True:
        blob = await store.get_with_etag(KEY)
        current = JobLockRecord.from_json(blob.value) if blob else None
        if current is None or current.job_id != run.job_id:
            return Lost("lock_already_gone", current)
        expires_at = max(current.expires_at or 0, clock() + TTL)
        record = current.__replace__(run_id=None, expires_at=expires_at)
        etag = await store.set_if_match(KEY, record.to_json(), blob.etag)
        if etag is not None:
            return Renewed(record, etag)


def resuming(*, etag: bool = True, live: bool = True) -> Callable[..., Any]:
    """A resume, less what it is told to leave out."""

    async def resume(
        store: Any,
        *_: str,
        expected_job_id: str,
        clock: Clock,
        uuid_factory: Callable[[], str],
        **__: object,
    ) -> Acquired:
        while True:
            blob = await store.get_with_etag(KEY)
            current = JobLockRecord.from_json(blob.value) if blob else None
            if current is None or current.job_id != expected_job_id or current.ended_at is not None:
                raise JobLockLostError(expected_job_id, "lock_already_gone", current)
            now = clock()
            if live and current.run_id is not None and current.is_live(now):
                raise JobLockHeldError(current, now)
            most = (current.started_at or 0) + 150
            if most <= now:
                raise JobLockLostError(expected_job_id, "lease_expired", current)
            expires_at = min(now + TTL, most)
            record = current.__replace__(run_id=uuid_factory(), expires_at=expires_at)
            if etag:
                new = await store.set_if_match(KEY, record.to_json(), blob.etag)
            else:
                await store.set(KEY, record.to_json())
                new = "unknown"
            if new is not None:
                died = None if current.run_id is None else current
                return Acquired(expected_job_id, record, new, died)

    return resume


# Each with the promise that it breaks.
BROKEN_RUNS = {
    "a keeper that compares the job's id only": (
        Algorithm(keep=keeps_by_job_id),
        "touched the record of",
    ),
    "a release that compares the job's id only": (
        Algorithm(leave=leaves_by_job_id),
        "touched the record of",
    ),
    "a requeue by the job's id": (Algorithm(requeue=requeues_by_job_id), "touched the record of"),
    "a resume without the etag": (Algorithm(resume=resuming(etag=False)), "ran beside"),
    "a resume beside a live run": (Algorithm(resume=resuming(live=False)), "ran beside"),
    "a release within the minimum hold": (
        Algorithm(leave=leaves_at_once),
        "a lock under its minimum hold was freed",
    ),
    "a renewal beyond the longest time": (
        Algorithm(keep=keeps_for_ever),
        "beyond the job's longest time",
    ),
}
SOUND = Algorithm(acquire=conditional_acquire(), resume=resuming())
