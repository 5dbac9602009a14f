"""The functions for blocking stores. They carry; `_protocol` decides.

The rules are coroutines over an async store. A blocking store is shown to them through a view
whose methods are `async def` and never suspend, so one `send` runs a coroutine to its end.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from . import _protocol
from ._given import Duration, described, lenient_ttl, not_negative, positive
from ._ids import job_lock_prefix
from ._protocol import JOB_LOCK_TTL_MS
from ._record import JobLockRecord, JsonValue, epoch_ms
from ._results import Acquired, Held, Lost, ReleaseResult, Renewed
from ._store import (
    AsyncBlobStore,
    Blob,
    BlobStore,
    ConditionalBlobStore,
    blocking,
    creating,
    is_conditional,
    leaves_null,
    lister,
    not_sweepable,
    require,
    run,
)

S = TypeVar("S", bound=BlobStore)
T = TypeVar("T")


def acquire_job_lock(
    store: BlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    actor_uid: str | None = None,
    chunks_to_embed: float | None = None,
    estimated_seconds: float | None = None,
    reason: str | None = None,
    extra: Mapping[str, JsonValue] | None = None,
    ttl_ms: float | Duration = JOB_LOCK_TTL_MS,
    clock_skew_ms: float = 0,
    clock: Callable[[], float] = epoch_ms,
    uuid_factory: Callable[[], uuid.UUID | str] = uuid.uuid4,
) -> Acquired | Held:
    """Take the lock of `(canister_uid, vault_id)` unless a live one is there.

    Returns `Acquired`, or `Held` with the record of the job that has it. An expired lock is taken
    over, and so is anything in the store that is not a lock record. On a conditional store at
    most one of any number of simultaneous calls gets `Acquired`, with one request if the key is
    free; on a plain store several may.

    Args:
        store: Where the lock is. A plain one cannot exclude two simultaneous winners.
        canister_uid: The user or tenant, the first part of the lock's name.
        vault_id: What the job works on, the second part.
        actor_uid: Who starts the job, for people to read.
        chunks_to_embed: How much there is to do, likewise.
        estimated_seconds: How long it may take, likewise.
        reason: Why, likewise. What is of a wrong type is recorded as null, with a `JobLockWarning`.
        extra: Fields of your own, JSON values under names that the record does not have yet, such
            as a queue's task id. They are kept when the lock is renewed or resumed.
        ttl_ms: The lease in milliseconds, or a `timedelta`, from just before the write. What is
            not positive and finite is the default, with a `JobLockWarning`.
        clock_skew_ms: For how much longer than its own deadline another's lease is honoured: the
            most by which the clocks of your hosts may differ.
        clock: Returns epoch milliseconds.
        uuid_factory: Returns the new job's id.

    Raises:
        InvalidIdError: an id cannot name a lock, or `uuid_factory` gave none that can name a job.
            Nothing was written.
        TypeError: the store lacks methods or is async, or the clock gives no finite number.
            Nothing was written. Or a write's answer is neither an etag nor None: then it may be.
        ValueError: `clock_skew_ms` is negative or not a finite number, or `extra` is not what JSON
            has or names a known field. Nothing was written.
        StoreContentionError: others changed the record each time. The lock is not this caller's.
        Exception: what the store raised. If a write raised, the lock may have been taken with the
            id that `uuid_factory` gave: release that id, or leave the lease to expire.
    """
    return run(
        _protocol.acquire(
            view(store, _protocol.ACQUIRE_NEEDS),
            canister_uid,
            vault_id,
            described=described(
                canister_uid,
                vault_id,
                actor_uid=actor_uid,
                chunks_to_embed=chunks_to_embed,
                estimated_seconds=estimated_seconds,
                reason=reason,
                extra=extra,
            ),
            ttl_ms=lenient_ttl(ttl_ms, JOB_LOCK_TTL_MS),
            clock_skew_ms=clock_skew_ms,
            clock=clock,
            uuid_factory=uuid_factory,
            id_is_new=uuid_factory is uuid.uuid4,
        )
    )


def release_job_lock(
    store: BlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str | None = None,
    etag: str | None = None,
    at_least_ms: float | Duration = 0,
    clock: Callable[[], float] = epoch_ms,
) -> ReleaseResult:
    """Remove the lock if it is `expected_job_id`'s; without a job id, remove whatever is there.

    Returns `ReleaseResult`: `released`, or the `reason` why not: "lock_owned_by_other_job" (it
    expired and was taken over; the other job's record stays) or "lock_already_gone". An expired
    lock that nobody took over is released. Without a job id it is always `released`, also if
    there was nothing.

    Args:
        store: Where the lock is.
        canister_uid: The user or tenant, the first part of the lock's name.
        vault_id: What the job works on, the second part.
        expected_job_id: Whose lock it must be. Without it whatever is there is removed.
        etag: From this job's `Acquired` or `Renewed`: it saves a request. While it is current the
            record is removed unread, so the job id is not compared; if it is out of date, the
            owner is looked up as without it. A plain store has no etags.
        at_least_ms: Milliseconds or a `timedelta`: the least time for which the job keeps the lock,
            from its `started_at`. A release before that is `released`, too: the record stays, live
            until then, with `ended_at`, by `clock`.
        clock: Returns epoch milliseconds.

    Raises:
        InvalidIdError: an id cannot name a lock, `expected_job_id` or `etag` is not a non-empty
            string, or an etag or `at_least_ms` came without a job id. Nothing was removed.
        ValueError: `at_least_ms` is negative or not finite. Nothing was removed.
        TypeError: the store lacks methods or is async. Nothing was removed. Or it does not say
            whether it removed the record: then it may be gone.
        StoreContentionError: the record changed each time. It was not removed; retry.
        Exception: what the store raised. If the delete raised, the lock may be gone or not;
            releasing the same job id again is safe.
    """
    least_ms = not_negative("at_least_ms", at_least_ms)
    return run(
        _protocol.release(
            view(store, _protocol.release_needs(expected_job_id, least_ms)),
            canister_uid,
            vault_id,
            expected_job_id=expected_job_id,
            etag=etag,
            at_least_ms=least_ms,
            clock=clock,
        )
    )


def peek_job_lock(store: BlobStore, canister_uid: str, vault_id: str) -> JobLockRecord | None:
    """Return the stored record, live or expired (ask its `is_live`), or None. Changes nothing.

    Args:
        store: Where the lock is.
        canister_uid: The user or tenant, the first part of the lock's name.
        vault_id: What the job works on, the second part.

    Raises:
        InvalidIdError: an id cannot name a lock.
        TypeError: the store lacks `get` or is async.
        Exception: what a conditional store raised. On a plain store a failed read is None.
    """
    return run(_protocol.peek(view(store, _protocol.PEEK_NEEDS), canister_uid, vault_id))


def renew_job_lock(
    store: BlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str,
    ttl_ms: float | Duration = JOB_LOCK_TTL_MS,
    clock: Callable[[], float] = epoch_ms,
    etag: str | None = None,
    record: JobLockRecord | None = None,
) -> Renewed | Lost:
    """Move the deadline of `expected_job_id`'s lock to `ttl_ms` from now, but never back.

    Returns `Renewed`, or `Lost` with the reason (those of a release) and the record that is there
    now. A lock that has expired but was not taken over is renewed; one that has ended is
    "lock_already_gone".

    Args:
        store: Where the lock is.
        canister_uid: The user or tenant, the first part of the lock's name.
        vault_id: What the job works on, the second part.
        expected_job_id: Whose lock it must be.
        ttl_ms: Milliseconds or a `timedelta`, from now.
        clock: Returns epoch milliseconds.
        etag: That of the last `Acquired` or `Renewed`. With both it and `record` it is one request
            instead of two, if it still is the current one; alone it saves nothing.
        record: That of the last `Acquired` or `Renewed`.

    Raises:
        InvalidIdError: an id cannot name a lock, `expected_job_id` or `etag` is not a non-empty
            string, or `record` is another job's. Nothing was written.
        ValueError: `ttl_ms` is not a positive finite number or a timedelta. Nothing was written.
        TypeError: the store lacks methods or is async, or the clock gives no finite number.
            Nothing was written. Or a write's answer is neither an etag nor None: then it may be.
        StoreContentionError: the record changed each time. The deadline is unchanged by this
            call; retry before it passes.
        Exception: what the store raised. The lock has its old or its new deadline; count on the
            old one, and retry before it passes.
    """
    return run(
        _protocol.renew(
            view(store, _protocol.RENEW_NEEDS),
            canister_uid,
            vault_id,
            expected_job_id=expected_job_id,
            ttl_ms=positive("ttl_ms", ttl_ms),
            clock=clock,
            etag=etag,
            record=record,
        )
    )


def view(store: BlobStore, needed: tuple[str, ...]) -> AsyncBlobStore:
    """Show a blocking store, which must have the methods `needed`, as an async one."""
    require(store, needed)
    return _ConditionalView(store) if is_conditional(store) else _PlainView(store)


def list_job_locks(store: BlobStore, canister_uid: str | None = None) -> Iterator[JobLockRecord]:
    """Yield the records of all locks, or of one user's, live or not, in no order.

    Each is read once, when it is its turn: what vanishes in the meantime, and what is no record, is
    left out.

    Args:
        store: It needs `get` and `list_keys(prefix)`, which every store that ships has.
        canister_uid: Whose locks; all by default.

    Raises:
        InvalidIdError: `canister_uid` cannot be part of a lock's key.
        TypeError: the store lacks a method or is async.
        Exception: what the store raised; the listing ends with it.
    """
    viewed, keys = view(store, _protocol.LIST_NEEDS), lister(store)
    return _listed(viewed, keys, job_lock_prefix(canister_uid))


def _listed(
    store: AsyncBlobStore, list_keys: Callable[[str], Iterable[str]], prefix: str
) -> Iterator[JobLockRecord]:
    for key in blocking(list_keys(prefix)):
        record = run(_protocol.listed(store, key))
        if record is not None:
            yield record


def sweep_job_locks(
    store: BlobStore,
    *,
    expired_for_ms: float | Duration,
    canister_uid: str | None = None,
    clock: Callable[[], float] = epoch_ms,
) -> int:
    """Remove the locks whose lease has been over for so long; return how many that were.

    Of all users, or of one. Each is read, and removed only if it has not changed since: a lock that
    is renewed, resumed or taken over meanwhile stays. Records of jobs that ended and `null`s that a
    release left are removed as well, but never what has no deadline and is none of joblock's. A
    late delivery of a job whose lock was removed is told that it is gone.

    Args:
        store: It must delete under a condition, and have `list_keys(prefix)`.
        expired_for_ms: Milliseconds or a `timedelta`, 0 or more, by `clock`.
        canister_uid: Whose locks; all by default.
        clock: Returns epoch milliseconds.

    Raises:
        InvalidIdError: `canister_uid` cannot be part of a lock's key. Nothing was removed.
        ValueError: `expired_for_ms` is negative or not finite. Nothing was removed.
        TypeError: the store lacks a method, is async, or cannot delete under a condition. Nothing
            was removed.
        Exception: what the store raised. What was removed by then is gone; sweeping again is safe.
    """
    expired_by = _protocol.expired_by(not_negative("expired_for_ms", expired_for_ms), clock)
    return sum(1 for _ in swept(store, canister_uid, expired_by))


def swept(
    store: BlobStore, canister_uid: str | None, expired_by: float
) -> Iterator[tuple[str, Blob]]:
    """Yield the key of each lock that was removed, and what it was."""
    viewed, list_keys = view(store, _protocol.HOLD_NEEDS), lister(store)
    if not is_conditional(viewed) or leaves_null(store):
        raise not_sweepable(store)
    for key in blocking(list_keys(job_lock_prefix(canister_uid))):
        blob = run(_protocol.sweep(viewed, key, expired_by=expired_by))
        if blob is not None:
            yield key, blob


class _PlainView(Generic[S]):
    def __init__(self, store: S) -> None:
        self._store = store

    async def get(self, key: str) -> str | bytes | None:
        return blocking(self._store.get(key))

    async def set(self, key: str, value: str) -> None:
        blocking(self._store.set(key, value))

    async def delete(self, key: str) -> None:
        blocking(self._store.delete(key))


class _ConditionalView(_PlainView[ConditionalBlobStore]):
    async def get_with_etag(self, key: str) -> Blob | None:
        return blocking(self._store.get_with_etag(key))

    async def set_if_new(self, key: str, value: str) -> str | Blob | None:
        answer: str | Blob | None = creating(self._store)(key, value)
        return blocking(answer)

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return blocking(self._store.set_if_match(key, value, etag))

    async def delete_if_match(self, key: str, etag: str) -> bool:
        return blocking(self._store.delete_if_match(key, etag))
