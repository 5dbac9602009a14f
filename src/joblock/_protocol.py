"""The lock itself, written once, as coroutines over an async store. Nothing else decides.

The rules it keeps on a conditional store:

- A record is written only over nothing, over what is no record, or over an expired record, and
  only if the store confirms that this very version is still there.
- A record is renewed or removed only by the job whose id it has, under the same confirmation. An
  etag that is still current is proof of that by itself, since only the owner was given it; only a
  release without a job id removes whatever is there.
- A refused write decides nothing: the record is read again, a bounded number of times.
- Whether a record is live is judged by a clock that is read after the record, and a deadline is
  set by a clock that is read immediately before its write.

On a plain store it does what the JavaScript original does, call for call: read, then write.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from ._errors import InvalidIdError, StoreContentionError
from ._ids import check_text, job_lock_key, new_job_id
from ._log import debug, warning
from ._record import JobLockRecord, as_number
from ._results import Acquired, Held, Lost, ReleaseResult, Renewed
from ._store import AsyncBlobStore, AsyncConditionalBlobStore, Blob, WrongStoreError, is_conditional

JOB_LOCK_TTL_MS = 16 * 60 * 1000
"""Milliseconds: just past the 15 minutes that the original's background functions may run."""

# Nearly every refusal means that another client's write went through, so a few rounds are plenty.
# The bound is there for a store that refuses for ever.
ROUNDS = 16

RELEASED = ReleaseResult(released=True)

ACQUIRE_NEEDS = RENEW_NEEDS = ("get", "set")
PEEK_NEEDS = ("get",)
HOLD_NEEDS = ("get", "set", "delete")


def release_needs(expected_job_id: str | None) -> tuple[str, ...]:
    return ("delete",) if expected_job_id is None else ("get", "delete")


async def acquire(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    described: JobLockRecord,
    ttl_ms: float,
    clock_skew_ms: float,
    clock: Callable[[], float],
    uuid_factory: Callable[[], uuid.UUID | str],
    id_is_new: bool,
) -> Acquired | Held:
    """`id_is_new`: no other call can have this job id, so a record just like ours is ours."""
    key = job_lock_key(canister_uid, vault_id)
    _check_skew(clock_skew_ms)

    def new_record(job_id: str, now_ms: float) -> JobLockRecord:
        expires_at = as_number(now_ms + ttl_ms)
        return described.__replace__(job_id=job_id, started_at=now_ms, expires_at=expires_at)

    if not is_conditional(store):
        now_ms = _now(clock)
        current = await _read_plain(store, key)
        if current is not None and current.is_live(now_ms - clock_skew_ms):
            return _held(key, current, now_ms, clock_skew_ms)
        job_id = new_job_id(uuid_factory)
        record = new_record(job_id, now_ms)
        await store.set(key, record.to_json())
        return _acquired(key, job_id, record, None, current)

    job_id = new_job_id(uuid_factory)
    blob: Blob | None = None  # the key is most likely free: then this is the only request
    current = None
    now_ms = _now(clock)
    for _ in range(ROUNDS):
        record = new_record(job_id, now_ms)
        text = record.to_json()
        if blob is None:
            etag = _etag("set_if_new", await store.set_if_new(key, text))
        else:
            etag = _etag("set_if_match", await store.set_if_match(key, text, blob.etag))
        if etag is None:
            blob = await _read(store, key)
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
    run: JobLockRecord | None = None,
) -> ReleaseResult:
    key = job_lock_key(canister_uid, vault_id)
    _check_etag(etag)
    if expected_job_id is None:
        if etag is not None:
            raise InvalidIdError("expected_job_id", "must be given with an etag")
        await store.delete(key)
        debug("%r was removed, whoever had it", key)
        return RELEASED
    check_text("expected_job_id", expected_job_id)

    if not is_conditional(store):
        owned = _owned(await _read_plain(store, key), expected_job_id, run)
        if isinstance(owned, Lost):
            return ReleaseResult(released=False, reason=owned.reason)
        await store.delete(key)
        return _released(key, expected_job_id)

    for _ in range(ROUNDS):
        if etag is None:
            read = _owned_blob(await _read(store, key), expected_job_id, run)
            if isinstance(read, Lost):
                return ReleaseResult(released=False, reason=read.reason)
            _, etag = read
        if _deleted(await store.delete_if_match(key, etag)):
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


async def renew(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str,
    ttl_ms: float,
    clock: Callable[[], float],
    etag: str | None,
    record: JobLockRecord | None,
    run: JobLockRecord | None = None,
) -> Renewed | Lost:
    key = job_lock_key(canister_uid, vault_id)
    check_text("expected_job_id", expected_job_id)
    _check_etag(etag)
    if record is not None and record.job_id != expected_job_id:
        raise InvalidIdError("record", f"is job {record.job_id!r}'s, not {expected_job_id!r}'s")

    def renewed(owned: JobLockRecord) -> JobLockRecord:
        expires_at = as_number(_now(clock) + ttl_ms)
        # Not back: the clock may have been set back, and others count on what they have read.
        if expires_at is not None and owned.is_live(expires_at):
            return owned
        return owned.__replace__(expires_at=expires_at)

    if not is_conditional(store):
        # The original has no renewal to be true to: here a failed read is not a lost lock.
        current = JobLockRecord.from_json(await store.get(key))
        owned = _owned(current, expected_job_id, run)
        if isinstance(owned, Lost):
            return owned
        record = renewed(owned)
        await store.set(key, record.to_json())
        return Renewed(record, etag=None)

    text = ""
    for _ in range(ROUNDS):
        if etag is None or record is None:
            blob = await _read(store, key)
            if blob is not None and record is not None and _is_text(blob.value, text):
                return Renewed(record, blob.etag)  # refused by itself, as in acquire
            read = _owned_blob(blob, expected_job_id, run)
            if isinstance(read, Lost):
                return read
            record, etag = read
        record = renewed(record)
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


async def _read(store: AsyncConditionalBlobStore, key: str) -> Blob | None:
    blob = await store.get_with_etag(key)
    if blob is not None:
        _check_value(blob.value)
        _etag("get_with_etag", blob.etag or False)
    return blob


def _owned_blob(
    blob: Blob | None, job_id: str, run: JobLockRecord | None
) -> tuple[JobLockRecord, str] | Lost:
    if blob is None:
        return Lost("lock_already_gone", None)
    owned = _owned(JobLockRecord.from_json(blob.value), job_id, run)
    return owned if isinstance(owned, Lost) else (owned, blob.etag)


def _owned(
    current: JobLockRecord | None, job_id: str, run: JobLockRecord | None
) -> JobLockRecord | Lost:
    """What is there, if it is this job's and, where its `run` is known, that run's."""
    if current is None:
        return Lost("lock_already_gone", None)
    if current.job_id != job_id or (run is not None and current.started_at != run.started_at):
        return Lost("lock_owned_by_other_job", current)
    return current


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
