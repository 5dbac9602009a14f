"""What keeps a lock alive while a job runs: the rules, and their way to the store.

`Lease` has the rules: it is given times and results, and does no I/O. `Keeper` carries them out,
for the thread of `_hold` as for the task of `joblock.aio`: there is neither of them here.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from . import _protocol
from ._errors import JobLockHeldError, JobLockLostError, LossReason
from ._ids import job_lock_key
from ._record import JobLockRecord, as_number
from ._results import Acquired, Held, Lost, Renewed
from ._store import AsyncBlobStore

# Seconds. Linux's usual monotonic clock stands still while the host sleeps, but a lease does not.
_monotonic = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic
)


def monotonic_ms() -> float:
    """Milliseconds of a clock that nobody sets."""
    return _monotonic() * 1000


# A clock that gives whole milliseconds drops a fraction: the record ends that much sooner.
_LOST_EARLY_MS = 1


class Lease:
    """When to renew, how soon to retry, and whether the lock is lost.

    Times are milliseconds of one monotonic clock. The rules:

    - A deadline counts from before the write that set it, so it passes here no later than it does
      for whoever reads the record.
    - A renewal is due `renew_every_ms` after the last one that succeeded. One that fails is
      retried several times within that interval, and before the deadline.
    - The lock is lost when a renewal or the release finds that it is, and when the deadline
      passes before the body has ended. What is lost stays lost.
    """

    def __init__(
        self, acquired: Acquired, *, begun: float, ttl_ms: float, renew_every_ms: float
    ) -> None:
        self.job_id: str = acquired.job_id
        self.took_over: JobLockRecord | None = acquired.took_over
        self.record: JobLockRecord = acquired.record
        self.etag: str | None = acquired.etag
        self.ttl_ms: float = ttl_ms
        self.failure: BaseException | None = None
        self._renew_every_ms = renew_every_ms
        self._retry_every_ms = min(renew_every_ms, self.ttl_ms - renew_every_ms) / 4
        self._loss: tuple[LossReason, JobLockRecord | None] | None = None
        self._ended = False
        self._granted(begun)

    def _granted(self, begun: float) -> None:
        # A deadline that no number can hold is null in the record, which nobody honours.
        ttl_ms = 0 if self.record.expires_at is None else self.ttl_ms
        self.deadline: float = begun + ttl_ms - _LOST_EARLY_MS
        self._due = begun + self._renew_every_ms

    def wait_ms(self, now: float) -> float:
        """How long there is nothing to do: until the next renewal, or the deadline."""
        return max(0, min(self._due, self.deadline) - now)

    def answered(self, result: Renewed | Lost, begun: float, now: float) -> None:
        """Take in the answer to a renewal. One that comes after the deadline saves nothing."""
        if isinstance(result, Lost):
            self.failure = None  # the store has answered: no failure explains this loss
            self.lose(result.reason, result.current)
        elif self.loss(now) is None:
            self.record, self.etag, self.failure = result.record, result.etag, None
            self._granted(begun)

    def failed(self, error: BaseException, now: float) -> None:
        """Take in a renewal that failed: nothing is known, so the old deadline stands."""
        self.failure = error
        self._due = now + self._retry_every_ms

    def lose(self, reason: LossReason, current: JobLockRecord | None) -> None:
        """Take in that the lock is not this job's any more."""
        self._loss = (reason, current)

    def end(self, now: float) -> None:
        """Take in that the body has ended: a deadline that passes later does not matter."""
        self._ended = self.loss(now) is None

    def loss(self, now: float) -> JobLockLostError | None:
        """Return the error that tells of the loss, or None; notice a deadline that has passed."""
        if self._loss is None and not self._ended and now >= self.deadline:
            self.lose("lease_expired", None)
        if self._loss is None:
            return None
        error = JobLockLostError(self.job_id, *self._loss)
        error.__cause__ = self.failure
        return error


class Keeper:
    """Carries out a lease's rules on a store and logs what happens, for a thread or for a task.

    Of a store's error only the type is logged: its text may have a signed URL or a token. The
    error itself is the cause of the `JobLockLostError` that it leads to.
    """

    def __init__(
        self,
        store: AsyncBlobStore,
        canister_uid: str,
        vault_id: str,
        lease: Lease,
        *,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        import logging  # here, not above: `import joblock` shall stay quick

        self.key: str = job_lock_key(canister_uid, vault_id)
        self.lease: Lease = lease
        self._store = store
        self._ids = (canister_uid, vault_id)
        self._clock = clock
        self._now = now
        self._log = logging.getLogger("joblock")
        self._loss_unlogged = threading.Lock()
        self._release_tried = False
        self._process = os.getpid()

    def loss(self) -> JobLockLostError | None:
        """The lease's loss; logged once, by whoever notices it first."""
        loss = self.lease.loss(self._now())
        if loss is not None and self._loss_unlogged.acquire(blocking=False):
            self._log.error("%s (%r)", loss, self.key)
        return loss

    async def keep(
        self,
        holder: weakref.ref[object],
        wait: Callable[[float], Coroutine[Any, Any, bool]],
    ) -> None:
        """Renew until the body has ended, or nobody has its lock any more; then release.

        `wait` waits for so many seconds or for the end of the body, and says whether that came.
        """
        if self.lease.took_over is not None:
            self._log.warning(
                "job %r took over %r from job %r, whose lease expired",
                self.lease.job_id,
                self.key,
                self.lease.took_over.job_id,
            )
        while self.loss() is None:
            ended = await wait(self.lease.wait_ms(self._now()) / 1000)
            if os.getpid() != self._process or self.loss() is not None:
                return
            if ended or holder() is None:
                await self._release()
                return
            await self._renew()

    async def _renew(self) -> None:
        begun = self._now()
        try:
            result = await _protocol.renew(
                self._store,
                *self._ids,
                expected_job_id=self.lease.job_id,
                ttl_ms=self.lease.ttl_ms,
                clock=self._clock,
                etag=self.lease.etag,
                record=self.lease.record,
            )
        except Exception as error:
            now = self._now()
            self.lease.failed(error, now)
            self._log.warning(
                "job %r could not renew %r: %s; %d ms of its lease are left",
                self.lease.job_id,
                self.key,
                _type_of(error),
                self.lease.deadline - now,
            )
        else:
            self.lease.answered(result, begun, self._now())

    async def _release(self) -> None:
        try:
            released = await _protocol.release(
                self._store, *self._ids, expected_job_id=self.lease.job_id, etag=self.lease.etag
            )
        except BaseException as error:
            self._release_tried = True
            self._log_unreleased(_type_of(error))
            if not isinstance(error, Exception):
                raise
        else:
            if released.reason is not None:
                self.lease.lose(released.reason, None)
            self._release_tried = True

    def died(self, error: BaseException) -> None:
        """Take in that the thread or task ended otherwise than by its own rules."""
        self.lease.failure = error
        self._log.error(
            "job %r does not renew %r any more: %s", self.lease.job_id, self.key, _type_of(error)
        )

    def end(self) -> bool:
        """The body has ended. False in a forked child: the lock is its parent's."""
        if os.getpid() != self._process:
            return False
        self.lease.end(self._now())
        return True

    def left_s(self) -> float:
        """For how many seconds leaving may wait for the store: as long as the lease runs."""
        return max(0, self.lease.deadline - self._now()) / 1000

    @property
    def finished(self) -> bool:
        """Whether there is nothing to do any more: the release was tried, or the lock is lost."""
        return self._release_tried or self.loss() is not None

    def leave(self, error: BaseException | None) -> None:
        """Tell of a loss, in an error or in a note to the `error` that the body raised."""
        if not self.finished:
            self._log_unreleased("no answer from the store")
        loss = self.loss()
        if loss is not None and error is None:
            raise loss
        if loss is not None and error is not None:
            error.add_note(str(loss))

    def _log_unreleased(self, why: str) -> None:
        self._log.warning(
            "job %r ended, but could not release %r: %s; the lease will expire",
            self.lease.job_id,
            self.key,
            why,
        )


def _type_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


async def begin(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    renew_every_ms: float | None,
    actor_uid: str | None,
    chunks_to_embed: float | None,
    estimated_seconds: float | None,
    reason: str | None,
    ttl_ms: float,
    clock_skew_ms: float,
    clock: Callable[[], float],
    uuid_factory: Callable[[], uuid.UUID | str],
) -> Keeper:
    """Acquire the lock that is to be kept, or raise `JobLockHeldError`."""
    lease_ms = _protocol.lease_ms(ttl_ms)
    every_ms = lease_ms / 3 if renew_every_ms is None else as_number(renew_every_ms)
    if every_ms is None or not 0 < every_ms < lease_ms - _LOST_EARLY_MS:
        raise ValueError(
            f"renew_every_ms must be more than 0 and less than the TTL of {lease_ms} ms "
            f"by more than {_LOST_EARLY_MS} ms, not {renew_every_ms!r}"
        )
    begun = monotonic_ms()
    acquired = await _protocol.acquire(
        store,
        canister_uid,
        vault_id,
        actor_uid=actor_uid,
        chunks_to_embed=chunks_to_embed,
        estimated_seconds=estimated_seconds,
        reason=reason,
        ttl_ms=ttl_ms,
        clock_skew_ms=clock_skew_ms,
        clock=clock,
        uuid_factory=uuid_factory,
    )
    if isinstance(acquired, Held):
        raise JobLockHeldError(acquired.existing)
    lease = Lease(acquired, begun=begun, ttl_ms=lease_ms, renew_every_ms=every_ms)
    return Keeper(store, canister_uid, vault_id, lease, clock=clock, now=monotonic_ms)


class Once:
    """What may be done only once, by whichever thread comes first."""

    def __init__(self) -> None:
        self._done = threading.Lock()

    def __call__(self) -> None:
        """Raise RuntimeError unless this is the first call."""
        if not self._done.acquire(blocking=False):
            raise RuntimeError("this hold has been entered: call hold_job_lock for another block")
