"""joblock for async stores: the same names, to be awaited.

The functions run under asyncio, trio or any other event loop. `hold_job_lock`, `resume_job_lock`
and `ThreadedBlobStore` are for asyncio, and so is what `acquire_job_lock` does when cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import itertools
import os
import re
import uuid
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
)
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import MethodType, SimpleNamespace, TracebackType
from typing import Any, ParamSpec, TypeAlias, TypeVar

from . import _protocol
from ._given import Duration, described, lenient_ttl, not_negative, positive
from ._hold import OwnedJobLock
from ._ids import check_text, job_lock_key, job_lock_prefix
from ._lease import Keeper, Once, Timer, log_unreleased, over, way_out
from ._locks import view
from ._protocol import HOLD_TTL_MS, JOB_LOCK_TTL_MS
from ._record import JobLockRecord, JsonValue, epoch_ms
from ._results import Acquired, Held, Lost, ReleaseResult, Renewed
from ._store import (
    CONDITIONAL,
    MARK_ASYNC,
    TELLING,
    AsyncBlobStore,
    Blob,
    BlobStore,
    WrongStoreError,
    blocking,
    is_conditional,
    leaves_null,
    lister,
    not_sweepable,
    require,
    run,
    tells,
)
from .conformance import Finding
from .conformance import check_store as _check_store
from .stores import open_store as _open_store
from .stores.memory import AsyncMemoryBlobStore

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Async: TypeAlias = Callable[_P, Coroutine[Any, Any, _T]]

__all__ = [
    "AsyncMemoryBlobStore",
    "ThreadedBlobStore",
    "acquire_job_lock",
    "check_store",
    "hold_job_lock",
    "list_job_locks",
    "open_store",
    "peek_job_lock",
    "release_job_lock",
    "renew_job_lock",
    "resume_job_lock",
    "sweep_job_locks",
]


async def acquire_job_lock(
    store: AsyncBlobStore,
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

    Under asyncio, a call that is cancelled leaves no lock behind: its write is awaited, then the
    lock is released, and the cancellation goes on. If it is cancelled again and again, or the
    store takes longer than 10 seconds, that goes on in the background. Elsewhere a call that is
    cancelled may have taken the lock, as one whose write raised.

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
        TypeError: the store lacks methods or is blocking, or the clock gives no finite number.
            Nothing was written. Or a write's answer is neither an etag nor None: then it may be.
        ValueError: `clock_skew_ms` is negative or not a finite number, or `extra` is not what JSON
            has or names a known field. Nothing was written.
        StoreContentionError: others changed the record each time. The lock is not this caller's.
        Exception: what the store raised. If a write raised, the lock may have been taken with the
            id that `uuid_factory` gave: release that id, or leave the lease to expire.
    """
    last: list[tuple[JobLockRecord, JobLockRecord | None]] = []

    def note(written: JobLockRecord, replaced: JobLockRecord | None) -> None:
        last[:] = [(written, replaced)]

    async def undo() -> None:
        for written, replaced in last:
            take_back = partial(
                _protocol.undo,
                canister_uid=canister_uid,
                vault_id=vault_id,
                written=written,
                replaced=replaced,
            )
            try:
                await _begun(store, _protocol.HOLD_NEEDS, take_back)
            except Exception as error:
                key = job_lock_key(canister_uid, vault_id)
                log_unreleased(written.job_id, key, error)

    acquire = partial(
        _protocol.acquire,
        canister_uid=canister_uid,
        vault_id=vault_id,
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
        writing=note,
    )
    return await _undone_if_cancelled(_begun(store, _protocol.ACQUIRE_NEEDS, acquire), undo)


async def release_job_lock(
    store: AsyncBlobStore,
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

    A call that is cancelled may have removed the lock; releasing the same job id again is safe.

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
        TypeError: the store lacks methods or is blocking. Nothing was removed. Or it does not say
            whether it removed the record: then it may be gone.
        StoreContentionError: the record changed each time. It was not removed; retry.
        Exception: what the store raised. If the delete raised, the lock may be gone or not;
            releasing the same job id again is safe.
    """
    least_ms = not_negative("at_least_ms", at_least_ms)
    release = partial(
        _protocol.release,
        canister_uid=canister_uid,
        vault_id=vault_id,
        expected_job_id=expected_job_id,
        etag=etag,
        at_least_ms=least_ms,
        clock=clock,
    )
    return await _begun(store, _protocol.release_needs(expected_job_id, least_ms), release)


async def peek_job_lock(
    store: AsyncBlobStore, canister_uid: str, vault_id: str
) -> JobLockRecord | None:
    """Return the stored record, live or expired (ask its `is_live`), or None. Changes nothing.

    Args:
        store: Where the lock is.
        canister_uid: The user or tenant, the first part of the lock's name.
        vault_id: What the job works on, the second part.

    Raises:
        InvalidIdError: an id cannot name a lock.
        TypeError: the store lacks `get` or is blocking.
        Exception: what a conditional store raised. On a plain store a failed read is None.
    """
    peek = partial(_protocol.peek, canister_uid=canister_uid, vault_id=vault_id)
    return await _begun(store, _protocol.PEEK_NEEDS, peek)


async def renew_job_lock(
    store: AsyncBlobStore,
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

    After a call that is cancelled the lock has its old or its new deadline; count on the old one.

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
        TypeError: the store lacks methods or is blocking, or the clock gives no finite number.
            Nothing was written. Or a write's answer is neither an etag nor None: then it may be.
        StoreContentionError: the record changed each time. The deadline is unchanged by this
            call; retry before it passes.
        Exception: what the store raised. The lock has its old or its new deadline; count on the
            old one, and retry before it passes.
    """
    renew = partial(
        _protocol.renew,
        canister_uid=canister_uid,
        vault_id=vault_id,
        expected_job_id=expected_job_id,
        ttl_ms=positive("ttl_ms", ttl_ms),
        clock=clock,
        etag=etag,
        record=record,
    )
    return await _begun(store, _protocol.RENEW_NEEDS, renew)


def hold_job_lock(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    renew_every_ms: float | Duration | None = None,
    actor_uid: str | None = None,
    chunks_to_embed: float | None = None,
    estimated_seconds: float | None = None,
    reason: str | None = None,
    extra: Mapping[str, JsonValue] | None = None,
    ttl_ms: float | Duration = HOLD_TTL_MS,
    wait_ms: float | Duration = 0,
    at_least_ms: float | Duration = 0,
    at_most_ms: float | Duration | None = None,
    clock_skew_ms: float = 0,
    clock: Callable[[], float] = epoch_ms,
    uuid_factory: Callable[[], uuid.UUID | str] = uuid.uuid4,
) -> AbstractAsyncContextManager[OwnedJobLock]:
    """Hold the lock of `(canister_uid, vault_id)` while the `async with` block runs, under asyncio.

    Entering acquires, and gives an `OwnedJobLock`. A task renews the lock, so a job may run for
    hours with a TTL of a minute, and if its process is killed the lock is free within that minute.
    That task calls the store, in a copy of the caller's context variables. Whatever the block
    raises, leaving releases the lock. A block that keeps the event loop busy for longer than the
    lease loses its lock.

    The lock is this job's by its job id and its `started_at`. It is lost when another has it, when
    its record is gone, or when no renewal succeeded before the lease's deadline: by real time, no
    later than for any host whose clock agrees, and by the caller's `clock`, by which others on
    this host decide. No renewal moves the deadline back. `lost` and `check()` tell the block,
    which is not interrupted. Leaving it then raises `JobLockLostError`, or adds a note to what the
    block itself raised, and releases nothing.

    Entering that fails, or is cancelled, also while it waits, leaves no lock behind, as
    `acquire_job_lock`. A block that is cancelled releases the lock like any other, and so does one
    that is cancelled again while leaving; the cancellation goes on once the store has answered.
    After the fourth nobody waits any more, and the task goes on in the background. A release that
    fails is only logged, since the job is done and its lease will expire. What this returns is for
    one `async with` block.

    The logger "joblock" writes a WARNING for a takeover, a failed renewal or a failed release, and
    an ERROR for a loss.

    Args:
        store: Where the lock is.
        canister_uid: The user or tenant, the first part of the lock's name.
        vault_id: What the job works on, the second part.
        renew_every_ms: A third of the TTL by default, so that an outage of the store that swallows
            two renewals is survived: one that failed is retried after a quarter of it.
        actor_uid: Who starts the job, for people to read.
        chunks_to_embed: How much there is to do, likewise.
        estimated_seconds: How long it may take, likewise.
        reason: Why, likewise. What is of a wrong type is recorded as null, with a `JobLockWarning`.
        extra: Fields of your own, JSON values under names that the record does not have yet, such
            as a queue's task id. They are kept when the lock is renewed or resumed.
        ttl_ms: The lease, for how long a crash keeps the lock from others. All times are
            milliseconds, or a `timedelta`.
        wait_ms: For how long to wait for a lock that is held. It is looked at again after pauses
            that grow from 0.1 s to 5 s, each shortened at random by up to a half, and no later
            than at the holder's deadline: 20 to 35 reads in a minute.
        at_least_ms: From `started_at`, the least time for which the lock is kept, also when the
            block raises. A job that ends sooner leaves its record, with `ended_at`, for the rest
            of it, so that another host's cron, a little late, does not start the job again.
        at_most_ms: From `started_at`, the time beyond which no renewal moves the deadline: a job
            that hangs loses its lock then.
        clock_skew_ms: For how much longer than its own deadline another's lease is honoured: the
            most by which the clocks of your hosts may differ.
        clock: Returns epoch milliseconds.
        uuid_factory: Returns the new job's id.

    Raises:
        JobLockHeldError: on entering; another job has the lock, also after `wait_ms`. Nothing was
            written.
        JobLockLostError: on leaving; another job may have run at the same time.
        InvalidIdError, TypeError, StoreContentionError: on entering, as `acquire_job_lock`.
        ValueError: also if `ttl_ms` or `at_most_ms` is not more than 0, `wait_ms` or `at_least_ms`
            less than 0, or one of them not finite; if `at_least_ms` is more than `at_most_ms`; or
            if `renew_every_ms` is not more than 0, and less than the TTL by more than a
            millisecond. Nothing was written.
        RuntimeError: it is left in another event loop than it was entered in. The lock is released.
        Exception: what the store raised on entering, as `acquire_job_lock`.
    """
    _require_async(store, _protocol.HOLD_NEEDS)
    return _Hold(
        Keeper(
            store,
            canister_uid,
            vault_id,
            take=partial(
                _protocol.acquire,
                described=described(
                    canister_uid,
                    vault_id,
                    actor_uid=actor_uid,
                    chunks_to_embed=chunks_to_embed,
                    estimated_seconds=estimated_seconds,
                    reason=reason,
                    extra=extra,
                ),
            ),
            renew_every_ms=renew_every_ms,
            ttl_ms=ttl_ms,
            wait_ms=wait_ms,
            at_least_ms=at_least_ms,
            at_most_ms=at_most_ms,
            clock_skew_ms=clock_skew_ms,
            clock=clock,
            uuid_factory=uuid_factory,
        )
    )


def resume_job_lock(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str,
    renew_every_ms: float | Duration | None = None,
    ttl_ms: float | Duration = HOLD_TTL_MS,
    at_least_ms: float | Duration = 0,
    at_most_ms: float | Duration | None = None,
    clock_skew_ms: float = 0,
    clock: Callable[[], float] = epoch_ms,
    uuid_factory: Callable[[], uuid.UUID | str] = uuid.uuid4,
) -> AbstractAsyncContextManager[OwnedJobLock]:
    """Keep the lock taken for `expected_job_id` while the `async with` block runs, under asyncio.

    For the worker that a job is handed to. Entering makes the lock this run's, by one conditional
    write: the record gets a `run_id`, from `uuid_factory`, and a lease of `ttl_ms`, which is then
    renewed as by `hold_job_lock`, and leaving releases it, whatever the block raises. For a retry,
    call `requeue()` of what this gives.

    One run has the lock at a time. Of any number of simultaneous deliveries of a job one enters; a
    second one is refused while the first one runs. If that dies, its lease ends, and the next
    delivery enters, with the dead run's record in `took_over`. A job whose lock is gone, ended, or
    taken over by another job is not run any more. On a plain store, which cannot exclude two
    winners, two deliveries may both enter.

    The lock is this run's by its job id, `started_at` and `run_id`; a run that is not the lock's
    any more renews, releases and requeues nothing.

    Entering that fails, or is cancelled, writes back the record that it may have replaced, so that
    the next delivery can enter. For cancellation and event loops see `hold_job_lock`. A lock that
    `hold_job_lock` keeps is taken from it by this: it is for the job's id of `acquire_job_lock`.

    Args:
        store: Where the lock is.
        canister_uid: The user or tenant, the first part of the lock's name.
        vault_id: What the job works on, the second part.
        expected_job_id: The job that this worker was handed.
        renew_every_ms: A third of the TTL by default, so that an outage of the store that swallows
            two renewals is survived: one that failed is retried after a quarter of it.
        ttl_ms: The lease of this run, which may be shorter than that for the time in the queue.
            All times are milliseconds, or a `timedelta`.
        at_least_ms: As in `hold_job_lock`, from when the lock was acquired: the time in the queue,
            and that of earlier runs, count too.
        at_most_ms: Likewise.
        clock_skew_ms: For how much longer than its own deadline another's lease is honoured: the
            most by which the clocks of your hosts may differ.
        clock: Returns epoch milliseconds.
        uuid_factory: Returns the id of this run.

    Raises:
        JobLockHeldError: on entering; another run of the job is live. Nothing was written. Deliver
            the job again later, or drop this delivery: the other one runs it.
        JobLockLostError: on entering, before the job began: its lock is gone, ended, another
            job's, or `at_most_ms` is over ("lease_expired"). Nothing was written. Do not run the
            job. On leaving: another run or job may have run at the same time.
        InvalidIdError: an id cannot name a lock, `expected_job_id` is not a non-empty string, or
            `uuid_factory` gave none that can name a run. Nothing was written.
        TypeError: the store lacks methods or is blocking, or the clock gives no finite number.
            Nothing was written. Or a write's answer is neither an etag nor None: then it may be.
        ValueError: as in `hold_job_lock`. Nothing was written.
        StoreContentionError: others changed the record each time. The lock is as it was.
        Exception: what the store raised. The lock is as it was; or, if writing it back failed too,
            which is logged, it is nobody's until `ttl_ms` is over.
    """
    check_text("expected_job_id", expected_job_id)
    _require_async(store, _protocol.HOLD_NEEDS)
    return _Hold(
        Keeper(
            store,
            canister_uid,
            vault_id,
            take=partial(_protocol.resume, expected_job_id=expected_job_id),
            renew_every_ms=renew_every_ms,
            ttl_ms=ttl_ms,
            at_least_ms=at_least_ms,
            at_most_ms=at_most_ms,
            clock_skew_ms=clock_skew_ms,
            clock=clock,
            uuid_factory=uuid_factory,
        )
    )


async def list_job_locks(
    store: AsyncBlobStore, canister_uid: str | None = None
) -> AsyncIterator[JobLockRecord]:
    """Yield the records of all locks, or of one user's, live or not, in no order.

    Each is read once, when it is its turn: what vanishes in the meantime, and what is no record, is
    left out. Errors are raised by the first step.

    Args:
        store: It needs `get` and `list_keys(prefix)`, which every store that ships has.
        canister_uid: Whose locks; all by default.

    Raises:
        InvalidIdError: `canister_uid` cannot be part of a lock's key.
        TypeError: the store lacks a method or is blocking.
        Exception: what the store raised; the listing ends with it.
    """
    keys = lister(store)(job_lock_prefix(canister_uid))
    async for key in keys:
        record = await _begun(store, _protocol.LIST_NEEDS, partial(_protocol.listed, key=key))
        if record is not None:
            yield record


async def sweep_job_locks(
    store: AsyncBlobStore,
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

    A call that is cancelled may have removed one more lock than it was known to.

    Args:
        store: It must delete under a condition, and have `list_keys(prefix)`.
        expired_for_ms: Milliseconds or a `timedelta`, 0 or more, by `clock`.
        canister_uid: Whose locks; all by default.
        clock: Returns epoch milliseconds.

    Raises:
        InvalidIdError: `canister_uid` cannot be part of a lock's key. Nothing was removed.
        ValueError: `expired_for_ms` is negative or not finite. Nothing was removed.
        TypeError: the store lacks a method, is blocking, or cannot delete under a condition.
            Nothing was removed.
        Exception: what the store raised. What was removed by then is gone; sweeping again is safe.
    """
    _methods(store, _protocol.HOLD_NEEDS)
    list_keys = lister(store)
    if not is_conditional(store) or leaves_null(store):
        raise not_sweepable(store)
    by = _protocol.expired_by(not_negative("expired_for_ms", expired_for_ms), clock)
    removed = 0
    async for key in list_keys(job_lock_prefix(canister_uid)):
        sweep: Any = partial(_protocol.sweep, key=key, expired_by=by)
        if await _begun(store, _protocol.HOLD_NEEDS, sweep) is not None:
            removed += 1
    return removed


def open_store(url: str | None = None) -> AsyncBlobStore:
    """Return the async store that `url` names, as `joblock.stores.open_store` does.

    That is an `AsyncRedisBlobStore` for `redis:` and `rediss:`, an `AsyncSqlBlobStore` for a
    database whose driver is async, an `AsyncMemoryBlobStore` for `memory:`, and else a
    `ThreadedBlobStore`. All but the last of these named are for asyncio.
    """
    url = os.environ.get("JOBLOCK_STORE") if url is None else url
    native: AsyncBlobStore | None = None
    if url == "memory:":
        native = AsyncMemoryBlobStore()
    elif url is not None and re.match("rediss?:", url):
        from .stores.redis import connect_async as connect_redis

        native = connect_redis(url)
    elif url is not None and re.match("[a-z]+[+]", url):
        from .stores.sql import connect_async as connect_sql

        native = connect_sql(url)
    return native or ThreadedBlobStore(_open_store(url))


async def check_store(
    store: AsyncBlobStore, *, timeout_s: float = 120, clock_skew_ms: float = 1000
) -> list[Finding]:
    """As `joblock.conformance.check_store`, of an async store, under asyncio.

    A call that is cancelled goes on in a thread until its time is over, or it has ended. One that
    returned because the store did not answer deletes no key later.
    """
    loop = asyncio.get_running_loop()
    left_behind: list[bool] = []  # true once nobody waits any more for a call that hangs

    def calling(method: Callable[..., Coroutine[Any, Any, object]]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if left_behind:
                raise RuntimeError("the check is over, and its event loop may be closed")
            return asyncio.run_coroutine_threadsafe(method(*args), loop).result()

        return call

    _require_async(store, _EVERY_STORE)
    more = [name for name in ("cautions", "server_time_ms") if hasattr(store, name)]
    names = [*_methods(store, _EVERY_STORE), *more]
    methods = {name: calling(getattr(store, name)) for name in names}
    called: Any = SimpleNamespace(**methods)
    check = partial(_check_store, called, timeout_s=timeout_s, clock_skew_ms=clock_skew_ms)
    findings = await asyncio.to_thread(check)
    left_behind.append(True)
    return findings


_EVERY_STORE = ("get", "set", "delete")


def _begun(
    store: AsyncBlobStore,
    needed: tuple[str, ...],
    function: Callable[[AsyncBlobStore], Coroutine[Any, Any, _T]],
) -> Awaitable[_T]:
    if isinstance(store, ThreadedBlobStore):  # the whole of it in one thread, not verb by verb
        return store._threads.begin(partial(run, function(view(store._store, needed))))
    _require_async(store, needed)
    return function(store)


_UNDO_S = 10.0  # for a store that does not answer
_CANCELLING_S = 1.0  # for a store that does not heed it
# One more than the cancellations that are waited through. An event loop that shuts down cancels
# every task once. anyio cancels what it has cancelled in each turn of the loop again, until it
# ends: who waited on would keep the loop busy.
_PATIENCE = 4

_background: set[asyncio.Task[Any]] = set()  # the event loop itself keeps only weak references


def _in_background(work: Coroutine[Any, Any, _T], name: str | None = None) -> asyncio.Task[_T]:
    task = asyncio.create_task(work, name=name)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


async def _undone_if_cancelled(
    work: Awaitable[_T],
    undo: Callable[[], Coroutine[Any, Any, object]],
    stop: Callable[[], object] = bool,
) -> _T:
    """Return what `work` returns; if that is cancelled, undo it once it has ended, and go on.

    `stop` is called at once, to end it soon.
    """
    if not isinstance(work, asyncio.Future):
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # trio's or another: there is no way to outlive a cancellation
            return await work
        work = _in_background(_awaited(work))
    try:
        return await asyncio.shield(work)
    except GeneratorExit:  # nobody runs this any more
        raise
    except BaseException as error:
        if work.done() and not work.cancelled() and work.exception() is error:
            raise  # the work's own, and no cancellation
        stop()  # a cancellation, or what a signal handler raised
        await _patiently(_in_background(_undo(work, undo)), _UNDO_S)
        raise


async def _awaited(work: Awaitable[_T]) -> _T:
    return await work


async def _undo(work: asyncio.Future[Any], undo: Callable[[], Coroutine[Any, Any, object]]) -> None:
    async def undone() -> None:
        await asyncio.wait({work})
        await undo()

    try:
        await undone()
    except asyncio.CancelledError:  # an event loop that shuts down cancels every task once
        await _within(_UNDO_S, undone())
    with contextlib.suppress(BaseException):
        work.exception()  # or asyncio complains that nobody looked


async def _patiently(task: asyncio.Task[Any], seconds: float) -> asyncio.CancelledError | None:
    """Wait so long for the task, also through a few cancellations; return the last of them."""
    cancelled: asyncio.CancelledError | None = None
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    for _ in range(_PATIENCE):
        try:
            await asyncio.wait({task}, timeout=max(0, until - loop.time()))
            break
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


class _Hold:
    bound_way_out: weakref.ref[MethodType] | None = None

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._enter = Once()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> OwnedJobLock:
        self._loop = asyncio.get_running_loop()  # no asyncio, no lock
        self._enter()
        self._ended = asyncio.Event()
        self._lock = OwnedJobLock(self._keeper)
        self._keeper.is_over = over(self._lock, self.bound_way_out)
        try:
            enter = self._keeper.enter(partial(_pause, self._keeper.timer, self._ended))
            await _undone_if_cancelled(enter, self._keeper.finish, self._stop)
            self._task = self._start()
            self._keeper.begun = True
            return self._lock
        except GeneratorExit:
            raise
        except BaseException:
            self._keeper.begun = False
            self._keeper.end()  # what still enters in the background then leaves again
            if self._keeper.entered:
                await self._finish()
            raise

    @way_out
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._keeper.forked:
            return
        if asyncio.get_running_loop() is not self._loop:
            await self._leave_elsewhere(exc)
            return
        interrupt: BaseException | None = None
        try:
            interrupt = await self._finish()
        except GeneratorExit:  # the task still releases the lock
            raise
        except BaseException as error:  # a signal handler's: it goes on after the release
            interrupt = error
            await self._finish()
        going_on = self._task is not None and not self._task.done()
        self._keeper.leave(interrupt or exc, going_on=going_on)
        if interrupt is not None:
            raise interrupt

    def _stop(self) -> None:
        self._keeper.end()
        self._ended.set()

    def _start(self) -> asyncio.Task[None]:
        work = _keep(self._keeper, self._ended)
        task = _in_background(work, f"joblock {self._keeper.key}")
        if self._keeper.timer is not None:
            self._keeper.timer.starts(task)
        return task

    async def _finish(self) -> asyncio.CancelledError | None:
        """Have the task release the lock, and wait for it; return what cancels the waiting."""
        keeper = self._keeper
        self._stop()
        cancelled: asyncio.CancelledError | None = None
        for _ in range(_PATIENCE):
            if self._task is None or (self._task.done() and not keeper.finished):
                self._task = self._start()
            cancelled = await _patiently(self._task, keeper.left_s()) or cancelled
            if keeper.finished or not self._task.done():
                break
        if self._task is not None and not self._task.done() and keeper.left_s() == 0:
            self._task.cancel()
            cancelled = await _patiently(self._task, _CANCELLING_S) or cancelled
        return cancelled

    async def _leave_elsewhere(self, exc: BaseException | None) -> None:
        """In another event loop there is no task to wait for: release, and say what is wrong."""
        keeper = self._keeper
        keeper.end()
        await keeper.finish()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ended.set)
        wrong = (
            f"the hold of {keeper.key!r} was entered in one event loop and left in another: "
            "its lock was not renewed since the first one stopped, and was released from here"
        )
        keeper.leave(exc)
        if exc is None:
            raise RuntimeError(wrong)
        exc.add_note(wrong)


async def _pause(timer: Timer | None, ended: asyncio.Event, seconds: float) -> None:
    if timer is None:
        await _within(seconds, ended.wait())
    else:
        await timer.pause_async(seconds)


async def _sleep(timer: Timer | None, ended: asyncio.Event, seconds: float) -> None:
    if timer is None:
        await _within(seconds, ended.wait())
    else:
        await timer.sleep_async(seconds, ended)


async def _within(seconds: float, work: Awaitable[object]) -> None:
    """Wait for it, and end it when the time is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


async def _keep(keeper: Keeper, ended: asyncio.Event) -> None:
    try:
        await keeper.keep(partial(_sleep, keeper.timer, ended))
    except asyncio.CancelledError as error:
        if not keeper.ended:
            keeper.died(error)
        elif left_s := keeper.left_s():  # as in _undo
            await _within(min(left_s, _UNDO_S), keeper.finish())
        raise
    except Exception as error:
        keeper.died(error)


class ThreadedBlobStore:
    """An async store that calls a blocking one in worker threads, under asyncio.

    It has the conditional methods if `store` has them. `store` must be safe to use from any
    thread. A call that is cancelled goes on in its thread: its write may still take effect, and
    may do so after whatever its caller does next. Each function of `joblock.aio` is one call in
    one thread; it runs in a copy of the caller's context variables.

    The threads, 32 at most, are its own: jobs that fill asyncio's default executor do not keep a
    renewal waiting. They start when they are needed, and end with the store, with `close()`, or
    with the main thread, which waits for calls that are under way; for a job that outlives it, the
    calls go on in its own thread. In a child after fork there are new ones. `executor` is for
    threads of your own, which you close.
    """

    def __init__(self, store: BlobStore, *, executor: Executor | None = None) -> None:
        methods = _methods(store, _EVERY_STORE)
        if any(inspect.iscoroutinefunction(getattr(store, name)) for name in methods):
            raise WrongStoreError(f"{type(store).__name__} is async already: use it as it is")
        self._store = store
        self._threads = threads = _Threads(executor)
        self._get = threads.calling(store.get)
        self._set = threads.calling(store.set)
        self._delete = threads.calling(store.delete)
        if is_conditional(store):
            self.get_with_etag: _Async[[str], Blob | None] = threads.calling(store.get_with_etag)
            self.set_if_new: _Async[[str, str], str | None] = threads.calling(store.set_if_new)
            self.set_if_match: _Async[[str, str, str], str | None] = threads.calling(
                store.set_if_match
            )
            self.delete_if_match: _Async[[str, str], bool] = threads.calling(store.delete_if_match)
        self.leaves_null: bool = leaves_null(store)
        listing: Callable[[str], Iterable[str]] | None = getattr(store, "list_keys", None)
        if listing is not None:
            self.list_keys: Callable[[str], AsyncIterator[str]] = threads.iterating(listing)

    def __repr__(self) -> str:
        return f"ThreadedBlobStore({self._store!r})"

    def close(self) -> None:
        """End its threads once the calls under way have ended; a later call starts new ones."""
        self._threads.close()

    async def get(self, key: str) -> str | bytes | None:
        """As `BlobStore.get`."""
        return await self._get(key)

    async def set(self, key: str, value: str) -> None:
        """As `BlobStore.set`."""
        await self._set(key, value)

    async def delete(self, key: str) -> None:
        """As `BlobStore.delete`."""
        await self._delete(key)


class _Threads:
    """The worker threads of one `ThreadedBlobStore`."""

    def __init__(self, given: Executor | None) -> None:
        self._given = given
        self._own: ThreadPoolExecutor | None = None
        self._pid = os.getpid()

    def begin(self, function: Callable[[], _T]) -> asyncio.Future[_T]:
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        try:
            return loop.run_in_executor(self._executor(), partial(context.run, function))
        except RuntimeError as error:
            if self._given is not None or "cannot schedule new futures" not in str(error):
                raise
        # Executors end with the main thread, and Python 3.12 starts no thread any more, but a job
        # in another thread's event loop may still run, and is to keep its lock.
        answer: asyncio.Future[_T] = loop.create_future()
        try:
            answer.set_result(context.run(function))
        except Exception as error:
            answer.set_exception(error)
        return answer

    def calling(self, method: Callable[_P, _T]) -> _Async[_P, _T]:
        async def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            return blocking(await self.begin(partial(method, *args, **kwargs)))

        return call

    def iterating(self, method: Callable[_P, Iterable[_T]]) -> Callable[_P, AsyncGenerator[_T]]:
        async def iterate(*args: _P.args, **kwargs: _P.kwargs) -> AsyncGenerator[_T]:
            items = iter(await self.begin(partial(method, *args, **kwargs)))
            while batch := await self.begin(lambda: list(itertools.islice(items, 1000))):
                for item in batch:
                    yield item

        return iterate

    def close(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.shutdown(wait=False)

    def _executor(self) -> Executor:
        if self._given is not None:
            return self._given
        if self._own is None or self._pid != os.getpid():  # a fork takes no threads along
            self._own = ThreadPoolExecutor(32, thread_name_prefix="joblock store")
            self._pid = os.getpid()
        return self._own


def _methods(store: BlobStore | AsyncBlobStore, needed: tuple[str, ...]) -> tuple[str, ...]:
    require(store, needed)
    if not is_conditional(store):
        return needed
    return (*needed, *CONDITIONAL, TELLING) if tells(store) else (*needed, *CONDITIONAL)


def _require_async(store: AsyncBlobStore, needed: tuple[str, ...]) -> None:
    for name in _methods(store, needed):
        if not _is_async_def(getattr(store, name)):
            raise WrongStoreError(
                f"{type(store).__name__}.{name} is not `async def`: if the store is blocking, use "
                "the functions of joblock, or wrap it in joblock.aio.ThreadedBlobStore; if it is "
                f"async, {MARK_ASYNC}"
            )


def _is_async_def(method: object) -> bool:
    # Nearly every method has its flag in plain sight; `inspect` takes microseconds to look further.
    code = getattr(method, "__code__", None)
    if code is not None and code.co_flags & inspect.CO_COROUTINE:
        return True
    return inspect.iscoroutinefunction(method)
