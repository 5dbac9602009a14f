"""The lock itself, written once, as coroutines over an async store. Nothing else decides.

The rules it keeps on a conditional store:

- A record is written only over nothing, over what is no record, or over an expired record, and
  only if the store confirms that this very version is still there.
- A record is renewed or removed only by the job whose id it has, under the same confirmation. An
  etag that is still current is proof of that by itself, since only the owner was given it; only a
  release without a job id removes whatever is there.
- What keeps a lock compares its run: the job's id, `started_at` and `run_id`. A job is resumed
  only while no run of it is live, and never once it has ended.
- A refused write decides nothing: the record is read again, a bounded number of times.
- Whether a record is live is judged by a clock that is read after the record, and a deadline is
  set by a clock that is read immediately before its write.

On a plain store it does what the JavaScript original does, call for call: read, then write.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TypeAlias

from ._errors import InvalidIdError, JobLockHeldError, JobLockLostError, StoreContentionError
from ._ids import check_text, job_lock_key, new_id
from ._log import debug, warning
from ._record import JobLockRecord, as_number, epoch_ms
from ._results import Acquired, Held, Lost, ReleaseResult, Renewed
from ._store import (
    TELLING,
    TOMBSTONE,
    AsyncBlobStore,
    AsyncConditionalBlobStore,
    Blob,
    WrongStoreError,
    creating,
    is_conditional,
)

JOB_LOCK_TTL_MS = 16 * 60 * 1000
"""Milliseconds: just past the 15 minutes that the original's background functions may run."""

HOLD_TTL_MS = 60_000
"""Milliseconds: a lease that is renewed may be short, so that a crash frees the lock soon."""

# Nearly every refusal means that another client's write went through, so a few rounds are plenty.
# The bound is there for a store that refuses for ever.
ROUNDS = 16

RELEASED = ReleaseResult(released=True)

ACQUIRE_NEEDS = RENEW_NEEDS = ("get", "set")
PEEK_NEEDS = LIST_NEEDS = ("get",)
HOLD_NEEDS = ("get", "set", "delete")


def release_needs(expected_job_id: str | None, at_least_ms: float) -> tuple[str, ...]:
    if expected_job_id is None:
        return ("delete",)
    return HOLD_NEEDS if at_least_ms else ("get", "delete")


Writing: TypeAlias = Callable[[JobLockRecord, JobLockRecord | None], object]
"""Is told, just before a lock is taken, the record that is written and what it replaces."""


def _nobody(_written: JobLockRecord, _replaced: JobLockRecord | None) -> None:
    pass


async def acquire(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    described: Callable[..., JobLockRecord],
    ttl_ms: float,
    at_most_ms: float | None = None,
    clock_skew_ms: float,
    clock: Callable[[], float],
    uuid_factory: Callable[[], uuid.UUID | str],
    id_is_new: bool,
    writing: Writing = _nobody,
) -> Acquired | Held:
    """`id_is_new`: no other call can have this job id, so a record just like ours is ours."""
    key = job_lock_key(canister_uid, vault_id)
    _check_skew(clock_skew_ms)

    def new_record(job_id: str, now_ms: float) -> JobLockRecord:
        expires_at = _deadline(now_ms, now_ms + ttl_ms, at_most_ms)
        return described(job_id, started_at=now_ms, expires_at=expires_at)

    if not is_conditional(store):
        now_ms = _now(clock)
        current = await _read_plain(store, key)
        if current is not None and current.is_live(now_ms - clock_skew_ms):
            return _held(key, current, now_ms, clock_skew_ms)
        job_id = new_id(uuid_factory, "job id")
        record = new_record(job_id, now_ms)
        writing(record, current)
        await store.set(key, record.to_json())
        return _acquired(key, job_id, record, None, current)

    job_id = new_id(uuid_factory, "job id")
    blob: Blob | None = None  # the key is most likely free: then this is the only request
    current = None
    now_ms = _now(clock)
    for _ in range(ROUNDS):
        record = new_record(job_id, now_ms)
        text = record.to_json()
        writing(record, current)
        if blob is None:
            etag, blob = await _create(store, key, text)
        else:
            etag = _etag("set_if_match", await store.set_if_match(key, text, blob.etag))
            blob = await _read(store, key) if etag is None else None
        if blob is not None and id_is_new and _is_text(blob.value, text):
            etag = blob.etag  # the client repeated its request, which was refused by itself
        if etag is not None:
            return _acquired(key, job_id, record, etag, current)
        current = JobLockRecord.from_json(blob.value) if blob is not None else None
        now_ms = _now(clock)
        if current is not None and current.is_live(now_ms - clock_skew_ms):
            return _held(key, current, now_ms, clock_skew_ms)
    raise StoreContentionError(key, ROUNDS)


async def release(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str | None,
    etag: str | None,
    record: JobLockRecord | None = None,
    run: JobLockRecord | None = None,
    at_least_ms: float = 0,
    clock: Callable[[], float] = epoch_ms,
) -> ReleaseResult:
    key = job_lock_key(canister_uid, vault_id)
    _check_etag(etag)
    if expected_job_id is None:
        if etag is not None or at_least_ms:
            given = "at_least_ms" if etag is None else "an etag"
            raise InvalidIdError("expected_job_id", f"must be given with {given}")
        await store.delete(key)
        debug("%r was removed, whoever had it", key)
        return RELEASED
    check_text("expected_job_id", expected_job_id)

    def kept(owned: JobLockRecord | None) -> JobLockRecord | None:
        """What stays for the rest of the minimum hold, or None if that is over."""
        if not at_least_ms or owned is None or owned.started_at is None:
            return None
        now_ms = _now(clock)
        until = as_number(owned.started_at + at_least_ms)
        if until is None or until <= now_ms:
            return None
        if owned.ended_at is not None:  # by an earlier try, whose answer was lost
            return owned
        return owned.__replace__(expires_at=until, ended_at=now_ms)

    if not is_conditional(store):
        owned = _owned(await _read_plain(store, key), expected_job_id, run, ended_too=True)
        if isinstance(owned, Lost):
            return ReleaseResult(released=False, reason=owned.reason)
        ended = kept(owned)
        if ended is None:
            await store.delete(key)
        elif ended is not owned:
            await store.set(key, ended.to_json())
        return _released(key, expected_job_id)

    for _ in range(ROUNDS):
        if etag is None or (at_least_ms and record is None):
            blob = await _read(store, key)
            read = _owned_blob(blob, expected_job_id, run, ended_too=True)
            if isinstance(read, Lost):
                return ReleaseResult(released=False, reason=read.reason)
            record, etag = read
        ended = kept(record)
        if ended is None:
            done = _deleted(await store.delete_if_match(key, etag))
        elif ended is not record:
            done = bool(_etag("set_if_match", await store.set_if_match(key, ended.to_json(), etag)))
        else:
            done = True
        if done:
            return _released(key, expected_job_id)
        etag = None
    raise StoreContentionError(key, ROUNDS)


async def peek(store: AsyncBlobStore, canister_uid: str, vault_id: str) -> JobLockRecord | None:
    key = job_lock_key(canister_uid, vault_id)
    if not is_conditional(store):
        return await _read_plain(store, key)
    value = await store.get(key)
    _check_value(value)
    return JobLockRecord.from_json(value)


async def look(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    clock_skew_ms: float,
    clock: Callable[[], float],
) -> Held | None:
    """Say who has the lock, if an acquire would be refused: in one request instead of two."""
    current = await peek(store, canister_uid, vault_id)
    now_ms = _now(clock)
    if current is not None and current.is_live(now_ms - clock_skew_ms):
        return Held(current, now_ms, clock_skew_ms)
    return None


async def listed(store: AsyncBlobStore, key: str) -> JobLockRecord | None:
    """The record under a key that was listed, or None if it is gone by now, or is no record."""
    value = await store.get(key)
    if is_conditional(store):
        _check_value(value)
    record = JobLockRecord.from_json(value)
    return None if record is None or record.job_id is None else record


async def sweep(store: AsyncConditionalBlobStore, key: str, *, expired_by: float) -> Blob | None:
    """Remove what is there, if its lease was over at `expired_by`, and return it; else None."""
    blob = await _read(store, key)
    if blob is None:
        return None
    if not _is_text(blob.value, TOMBSTONE):  # which has no time: nobody waits for it
        record = JobLockRecord.from_json(blob.value)
        if record is None or not was_expired(record, expired_by):
            return None
    return blob if _deleted(await store.delete_if_match(key, blob.etag)) else None


def was_expired(record: JobLockRecord, by: float) -> bool:
    """Whether its lease was over by then; one that has no end never is."""
    return record.expires_at is not None and record.expires_at <= by


def expired_by(expired_for_ms: float, clock: Callable[[], float]) -> float:
    return _now(clock) - expired_for_ms


async def renew(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str,
    ttl_ms: float,
    at_most_ms: float | None = None,
    clock: Callable[[], float],
    etag: str | None,
    record: JobLockRecord | None,
    run: JobLockRecord | None = None,
) -> Renewed | Lost:
    def renewed(owned: JobLockRecord) -> JobLockRecord:
        expires_at = _deadline(owned.started_at, _now(clock) + ttl_ms, at_most_ms)
        # Not back: the clock may have been set back, and others count on what they have read.
        if expires_at is not None and owned.is_live(expires_at):
            return owned
        return owned.__replace__(expires_at=expires_at)

    key = job_lock_key(canister_uid, vault_id)
    return await _rewrite(store, key, expected_job_id, renewed, etag=etag, record=record, run=run)


async def resume(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str,
    ttl_ms: float,
    at_most_ms: float | None,
    clock_skew_ms: float,
    clock: Callable[[], float],
    uuid_factory: Callable[[], uuid.UUID | str],
    id_is_new: bool,
    writing: Writing = _nobody,
) -> Acquired:
    """Give the job's lock to a new run of it, or raise that it is held or lost.

    `took_over` is the record of the run before, if that died. `id_is_new`: as in `acquire`.
    """
    key = job_lock_key(canister_uid, vault_id)
    _check_skew(clock_skew_ms)
    run_id = new_id(uuid_factory, "run id")
    died: JobLockRecord | None = None

    def resumed(owned: JobLockRecord) -> JobLockRecord:
        nonlocal died
        now_ms = _now(clock)
        died = None if owned.run_id is None else owned
        if died is not None and died.is_live(now_ms - clock_skew_ms):
            held = _held(key, died, now_ms, clock_skew_ms)
            raise JobLockHeldError(held.existing, held.now_ms, held.clock_skew_ms)
        # Not as in a renewal: the lease for the time in the queue may end later than this one.
        expires_at = _deadline(owned.started_at, now_ms + ttl_ms, at_most_ms)
        if expires_at is not None and expires_at <= now_ms:
            raise JobLockLostError(expected_job_id, "lease_expired", owned)
        record = owned.__replace__(expires_at=expires_at, run_id=run_id)
        writing(record, owned)
        return record

    result = await _rewrite(store, key, expected_job_id, resumed, id_is_new=id_is_new)
    if isinstance(result, Lost):
        raise JobLockLostError(expected_job_id, result.reason, result.current)
    if died is None:
        debug("job %r resumed %r, run %r", expected_job_id, key, run_id)
    else:
        dead = died.run_id
        warning("job %r resumed %r, run %r, since run %r died", expected_job_id, key, run_id, dead)
    return Acquired(expected_job_id, result.record, result.etag, died)


async def requeue(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    run: JobLockRecord,
    etag: str | None,
    ttl_ms: float,
    at_least_ms: float,
    clock: Callable[[], float],
) -> Renewed | Lost:
    """Let no run have the job's lock, which stays the job's for the time in the queue."""

    def requeued(owned: JobLockRecord) -> JobLockRecord:
        queued_until = _now(clock) + ttl_ms
        at_least_until = (owned.started_at or 0) + at_least_ms
        # Not back, as in a renewal.
        expires_at = max(queued_until, at_least_until, owned.expires_at or 0)
        return owned.__replace__(expires_at=as_number(expires_at), run_id=None)

    key = job_lock_key(canister_uid, vault_id)
    return await _rewrite(store, key, str(run.job_id), requeued, etag=etag, record=run, run=run)


async def undo(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    written: JobLockRecord,
    replaced: JobLockRecord | None,
    etag: str | None = None,
) -> object:
    """Take back what `writing` was told of, whether it was written or not."""
    job_id = str(written.job_id)
    if replaced is None or replaced.job_id != job_id:
        return await release(
            store, canister_uid, vault_id, expected_job_id=job_id, etag=etag, run=written
        )
    before = replaced
    key = job_lock_key(canister_uid, vault_id)
    return await _rewrite(
        store, key, job_id, lambda _: before, etag=etag, record=written, run=written
    )


async def _rewrite(
    store: AsyncBlobStore,
    key: str,
    job_id: str,
    change: Callable[[JobLockRecord], JobLockRecord],
    *,
    etag: str | None = None,
    record: JobLockRecord | None = None,
    run: JobLockRecord | None = None,
    id_is_new: bool = True,
) -> Renewed | Lost:
    """Write what `change` makes of the job's record, unless the job has ended."""
    check_text("expected_job_id", job_id)
    _check_etag(etag)
    if record is not None and record.job_id != job_id:
        raise InvalidIdError("record", f"is job {record.job_id!r}'s, not {job_id!r}'s")

    if not is_conditional(store):
        # The original has no such call to be true to: here a failed read is not a lost lock.
        owned = _owned(JobLockRecord.from_json(await store.get(key)), job_id, run)
        if isinstance(owned, Lost):
            return owned
        record = change(owned)
        await store.set(key, record.to_json())
        return Renewed(record, etag=None)

    text = ""
    for _ in range(ROUNDS):
        if etag is None or record is None:
            blob = await _read(store, key)
            if blob is not None and record is not None and id_is_new and _is_text(blob.value, text):
                return Renewed(record, blob.etag)  # refused by itself, as in acquire
            read = _owned_blob(blob, job_id, run)
            if isinstance(read, Lost):
                return read
            record, etag = read
        record = change(record)
        text = record.to_json()
        etag = _etag("set_if_match", await store.set_if_match(key, text, etag))
        if etag is not None:
            return Renewed(record, etag)
    raise StoreContentionError(key, ROUNDS)


async def _read_plain(store: AsyncBlobStore, key: str) -> JobLockRecord | None:
    try:
        text = await store.get(key)
    except WrongStoreError:
        raise
    except Exception:  # the original's rule: a failed read must not block the job for ever
        return None
    return JobLockRecord.from_json(text)


async def _create(
    store: AsyncConditionalBlobStore, key: str, text: str
) -> tuple[str | None, Blob | None]:
    """Write to a free key: the new etag, or what is there instead, if it still is."""
    answer = await creating(store)(key, text)
    if isinstance(answer, Blob):
        _check_blob(TELLING, answer)
        return None, answer
    etag = _etag("set_if_new", answer)
    return etag, await _read(store, key) if etag is None else None


async def _read(store: AsyncConditionalBlobStore, key: str) -> Blob | None:
    blob = await store.get_with_etag(key)
    if blob is not None:
        _check_blob("get_with_etag", blob)
    return blob


def _owned_blob(
    blob: Blob | None, job_id: str, run: JobLockRecord | None, *, ended_too: bool = False
) -> tuple[JobLockRecord, str] | Lost:
    if blob is None:
        return Lost("lock_already_gone", None)
    owned = _owned(JobLockRecord.from_json(blob.value), job_id, run, ended_too=ended_too)
    return owned if isinstance(owned, Lost) else (owned, blob.etag)


def _owned(
    current: JobLockRecord | None,
    job_id: str,
    run: JobLockRecord | None,
    *,
    ended_too: bool = False,
) -> JobLockRecord | Lost:
    """What is there, if it is this job's and, where its `run` is known, that run's."""
    if current is None:
        return Lost("lock_already_gone", None)
    if current.job_id != job_id or not (run is None or _same_run(current, run)):
        return Lost("lock_owned_by_other_job", current)
    if current.ended_at is not None and not ended_too:
        return Lost("lock_already_gone", current)
    return current


def _same_run(one: JobLockRecord, other: JobLockRecord) -> bool:
    return one.started_at == other.started_at and one.run_id == other.run_id


def _deadline(started_at: float | None, lease_end: float, at_most_ms: float | None) -> float | None:
    """When a lease ends, which is not after the job's last moment."""
    if at_most_ms is None or started_at is None:
        return as_number(lease_end)
    return as_number(min(lease_end, started_at + at_most_ms))


def _held(key: str, existing: JobLockRecord, now_ms: float, clock_skew_ms: float) -> Held:
    debug("%r is held by job %r", key, existing.job_id)
    return Held(existing, now_ms, clock_skew_ms)


def _acquired(
    key: str, job_id: str, record: JobLockRecord, etag: str | None, took_over: JobLockRecord | None
) -> Acquired:
    if took_over is None:
        debug("job %r acquired %r", job_id, key)
    else:
        crashed = took_over.job_id
        warning("job %r took over %r from job %r, whose lease expired", job_id, key, crashed)
    return Acquired(job_id, record, etag, took_over)


def _released(key: str, job_id: str) -> ReleaseResult:
    debug("job %r released %r", job_id, key)
    return RELEASED


def _check_blob(method: str, blob: Blob) -> None:
    _check_value(blob.value)
    _etag(method, blob.etag or False)


def _check_value(value: object) -> None:
    # On a plain store this is no record, as in the original. Here everybody would win.
    if value is not None and not isinstance(value, (str, bytes, bytearray, memoryview)):
        kind = type(value).__name__
        raise WrongStoreError(
            f"the store must return text, bytes or None for a value, not a {kind}"
        )


def _is_text(value: str | bytes, text: str) -> bool:
    return (value if isinstance(value, str) else bytes(value).decode("utf-8", "replace")) == text


def _etag(method: str, answer: object) -> str | None:
    # A store that refuses with False, or writes and says True, must not let everybody win.
    if answer is None or (isinstance(answer, str) and answer):
        return answer
    raise WrongStoreError(f"{method} must return the new etag, a str, or None, not {answer!r}")


def _deleted(answer: object) -> bool:
    if isinstance(answer, bool):
        return answer
    raise WrongStoreError(f"delete_if_match must return True or False, not {answer!r}")


def _now(clock: Callable[[], float]) -> float:
    now_ms = as_number(clock())
    if now_ms is None:
        raise TypeError("clock must return epoch milliseconds, a finite number")
    return now_ms


def _check_etag(etag: object) -> None:
    if etag is not None:
        check_text("etag", etag)


def _check_skew(clock_skew_ms: float) -> None:
    skew = as_number(clock_skew_ms)
    if skew is None or skew < 0:
        raise ValueError(f"clock_skew_ms must be a finite number, 0 or more: {clock_skew_ms!r}")
