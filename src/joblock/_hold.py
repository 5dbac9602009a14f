"""Holding a lock while a block runs: a thread renews it, and releases it on the way out."""

from __future__ import annotations

import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any

from . import _protocol
from ._lease import Keeper, Once, begin
from ._locks import run, view
from ._protocol import JOB_LOCK_TTL_MS
from ._record import JobLockRecord, epoch_ms
from ._store import BlobStore


class OwnedJobLock:
    """The lock that `hold_job_lock` keeps for the job that runs in its `with` block.

    A forked child does not renew it: there `lost` becomes true when the lease that the child was
    born with ends.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self._keeper.lease.job_id

    @property
    def record(self) -> JobLockRecord:
        """The record as it was last written by this job: each renewal moves `expires_at`."""
        return self._keeper.lease.record

    @property
    def took_over(self) -> JobLockRecord | None:
        """The expired record that was replaced (a crashed job's receipt), else None."""
        return self._keeper.lease.took_over

    @property
    def lost(self) -> bool:
        """Whether the lock was lost while the job was running; it never becomes false again.

        True from the lease's deadline on at the latest, also while a renewal hangs in the store.
        Asks a clock, not the store: cheap enough for every step of a job.
        """
        return self._keeper.loss() is not None

    def check(self) -> None:
        """Raise `JobLockLostError` if the lock is lost."""
        loss = self._keeper.loss()
        if loss is not None:
            raise loss


def hold_job_lock(
    store: BlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    renew_every_ms: float | None = None,
    actor_uid: str | None = None,
    chunks_to_embed: float | None = None,
    estimated_seconds: float | None = None,
    reason: str | None = None,
    ttl_ms: float = JOB_LOCK_TTL_MS,
    clock_skew_ms: float = 0,
    clock: Callable[[], float] = epoch_ms,
    uuid_factory: Callable[[], uuid.UUID | str] = uuid.uuid4,
) -> _Hold:
    """Hold the lock of `(canister_uid, vault_id)` for as long as the `with` block runs.

    Entering acquires, with `acquire_job_lock`'s keywords, and gives a `OwnedJobLock`. A daemon
    thread renews the lock every `renew_every_ms`, so a job may run for hours with a TTL of a
    minute, and if its process is killed the lock is free within that minute. The default is a
    third of the TTL: an outage of the store that swallows two renewals is survived, because one
    that failed is retried after a quarter of the interval. Whatever the block raises, leaving
    releases the lock.

    The lock is lost when another job has it, when its record is gone, or when no renewal
    succeeded before the lease's deadline, which passes here no later than for any host whose
    clock agrees. `lost` and `check()` tell the block, which is not interrupted. Leaving it then
    raises `JobLockLostError`, or adds a note to what the block itself raised, and releases nothing.

    `clock` only dates the record; renewals, `lost` and the deadline go by real time. So a test of a
    loss puts another record in the store, or none, and gives a small `renew_every_ms`.

    Leaving waits until the store has answered, at the longest until the lease's deadline. What a
    signal handler raises meanwhile, such as KeyboardInterrupt, goes on after that; a second one
    ends the waiting. A release that fails is only logged, since the job is done and its lease will
    expire. A block that is left in a forked child releases nothing. What this returns is for one
    `with` block.

    The logger "joblock" tells of a takeover, a failed renewal or a failed release (WARNING) and
    of a loss (ERROR).

    Raises:
        JobLockHeldError: on entering; another job has the lock. Nothing was written.
        JobLockLostError: on leaving; another job may have run at the same time.
        InvalidIdError, TypeError, StoreContentionError: on entering, as `acquire_job_lock`.
        ValueError: also if `renew_every_ms` is not more than 0, and less than the TTL by more
            than a millisecond. Nothing was written.
        Exception: what the store raised on entering, as `acquire_job_lock`.
    """
    return _Hold(
        partial(
            begin,
            view(store, _protocol.HOLD_NEEDS),
            canister_uid,
            vault_id,
            renew_every_ms=renew_every_ms,
            actor_uid=actor_uid,
            chunks_to_embed=chunks_to_embed,
            estimated_seconds=estimated_seconds,
            reason=reason,
            ttl_ms=ttl_ms,
            clock_skew_ms=clock_skew_ms,
            clock=clock,
            uuid_factory=uuid_factory,
        )
    )


class _Hold:
    def __init__(self, begin: Callable[[], Coroutine[Any, Any, Keeper]]) -> None:
        self._begin = begin
        self._enter = Once()

    def __enter__(self) -> OwnedJobLock:
        self._enter()
        self._keeper = run(self._begin())
        self._lock = lock = OwnedJobLock(self._keeper)
        self._ended, self._kept = threading.Event(), threading.Event()
        self._keep = partial(_keep, self._keeper, weakref.ref(lock), self._ended, self._kept)
        self._thread = threading.Thread(
            target=self._keep, name=f"joblock {self._keeper.key}", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:  # no thread, no lock
            self._ended.set()
            self._keep()
            raise
        return lock

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        keeper = self._keeper
        if not keeper.end():
            return
        self._ended.set()
        if self._thread is threading.current_thread():
            return  # the block's generator was collected during a renewal, which comes first
        interrupt: BaseException | None = None
        try:
            self._finish()
        except BaseException as error:  # a signal handler's: it goes on after the release
            interrupt = error
            self._finish()
        keeper.leave(interrupt or exc)
        if interrupt is not None:
            raise interrupt

    def _finish(self) -> None:
        """Wait until the thread has released the lock; release it here if it cannot."""
        keeper = self._keeper
        if not sys.is_finalizing():  # then daemon threads run no more, and never end
            # Not `join`: in Python 3.11 and 3.12 a thread is over once a join is interrupted.
            if not self._kept.wait(_waitable(keeper.left_s())):
                return
            self._thread.join()
        if not keeper.finished:
            self._keep()


def _keep(
    keeper: Keeper,
    holder: weakref.ref[object],
    ended: threading.Event,
    kept: threading.Event,
) -> None:
    async def wait(seconds: float) -> bool:
        return ended.wait(_waitable(seconds))

    try:
        run(keeper.keep(holder, wait))
    except BaseException as error:  # a thread would drop a SystemExit without a word
        keeper.died(error)
    finally:
        kept.set()


def _waitable(seconds: float) -> float:
    return min(seconds, threading.TIMEOUT_MAX)
