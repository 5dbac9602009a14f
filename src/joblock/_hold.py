"""Holding a lock while a block runs: a thread renews it, and releases it on the way out.

Any line of entering and leaving may be the last: a signal handler may raise anywhere in the main
thread. So what the two threads tell each other is told by C-level locks, which are taken or not,
and each wait has an end; entering takes back what it has written; and leaving, once interrupted,
is done again from its first line, which is safe.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import MethodType, TracebackType

from . import _protocol
from ._given import Duration, described, positive
from ._ids import check_text
from ._lease import Keeper, Once, Timer, over, way_out
from ._locks import view
from ._protocol import HOLD_TTL_MS, JOB_LOCK_TTL_MS
from ._record import JobLockRecord, JsonValue, epoch_ms
from ._store import BlobStore, run
from ._waiting import wait_in_turns, waitable


class OwnedJobLock:
    """The lock that `hold_job_lock` or `resume_job_lock` keeps for the job in its `with` block.

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
        """The expired record that was replaced (the receipt of a crashed job or run), else None."""
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

    def requeue(self, *, ttl_ms: float | Duration = JOB_LOCK_TTL_MS) -> None:
        """Have the lock kept for the job's next run, which `resume_job_lock` begins: for a retry.

        Leaving then does not remove the record. It lasts for `ttl_ms`, or a `timedelta`, from
        then on, and at least as long as it would have: the time in the queue. Nothing is written
        before the block ends, and nothing at all if the lock is lost by then. If the write fails,
        which is logged, the lease of this run must end before the next one can begin.

        Raises:
            ValueError: `ttl_ms` is not a positive finite number or a timedelta.
            RuntimeError: the block is over; its lock has been released.
        """
        self._keeper.requeue(positive("ttl_ms", ttl_ms))


def hold_job_lock(
    store: BlobStore,
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
) -> AbstractContextManager[OwnedJobLock]:
    """Hold the lock of `(canister_uid, vault_id)` for as long as the `with` block runs.

    Entering acquires, and gives an `OwnedJobLock`. A daemon thread renews the lock, so a job may
    run for hours with a TTL of a minute, and if its process is killed the lock is free within that
    minute. That thread calls the store, in a copy of the caller's context variables. Whatever the
    block raises, leaving releases the lock.

    The lock is this job's by its job id and its `started_at`. It is lost when another has it, when
    its record is gone, or when no renewal succeeded before the lease's deadline: by real time, no
    later than for any host whose clock agrees, and by the caller's `clock`, by which others on
    this host decide. No renewal moves the deadline back. `lost` and `check()` tell the block,
    which is not interrupted. Leaving it then raises `JobLockLostError`, or adds a note to what the
    block itself raised, and releases nothing.

    Entering that fails, or that a signal handler interrupts, releases what it may have written.
    Leaving waits until the store has answered, at the longest until the lease's deadline. What a
    signal handler raises meanwhile, such as KeyboardInterrupt, goes on after that; a second one
    ends the waiting. A release that fails is only logged, since the job is done and its lease will
    expire. A block that is left in a forked child releases nothing. What this returns is for one
    `with` block.

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
        Exception: what the store raised on entering, as `acquire_job_lock`.
    """
    blocking = view(store, _protocol.HOLD_NEEDS)
    return _Hold(
        Keeper(
            blocking,
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
    store: BlobStore,
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
) -> AbstractContextManager[OwnedJobLock]:
    """Keep the lock that another took for `expected_job_id` for as long as the `with` block runs.

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

    Entering that fails, or is interrupted, writes back the record that it may have replaced, so
    that the next delivery can enter. The rest is as in `hold_job_lock`. A lock that
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
        TypeError: the store lacks methods or is async, or the clock gives no finite number.
            Nothing was written. Or a write's answer is neither an etag nor None: then it may be.
        ValueError: as in `hold_job_lock`. Nothing was written.
        StoreContentionError: others changed the record each time. The lock is as it was.
        Exception: what the store raised. The lock is as it was; or, if writing it back failed too,
            which is logged, it is nobody's until `ttl_ms` is over.
    """
    check_text("expected_job_id", expected_job_id)
    blocking = view(store, _protocol.HOLD_NEEDS)
    return _Hold(
        Keeper(
            blocking,
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


class _Hold:
    bound_way_out: weakref.ref[MethodType] | None = None

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._enter = Once()
        # Both are locked until they are to tell something: of the block's end, of the thread's.
        self._ended = threading.Lock()
        self._kept = threading.Lock()
        self._started = False

    def __enter__(self) -> OwnedJobLock:
        self._enter()
        self._ended.acquire()
        self._kept.acquire()
        self._lock = OwnedJobLock(self.keeper)
        self.keeper.is_over = over(self._lock, self.bound_way_out)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(_keep, self.keeper, self._ended, self._kept),
            name=f"joblock {self.keeper.key}",
            daemon=True,
        )
        try:
            run(self.keeper.enter(partial(_pause, self.keeper.timer, self._ended)))
            self._thread.start()
            self._started = True
            if self.keeper.timer is not None:
                self.keeper.timer.starts(self._thread)
            self.keeper.begun = True
            return self._lock
        except BaseException:
            self.keeper.begun = False
            self._finish()
            raise

    def stop_waiting(self) -> None:
        if not self.keeper.entered:
            self.keeper.end()
            with contextlib.suppress(RuntimeError):  # nobody has entered yet
                self._ended.release()
        elif self.keeper.ended:
            with contextlib.suppress(RuntimeError):  # the thread has done it
                self._kept.release()

    @way_out
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        interrupt: BaseException | None = None
        try:
            self._finish()
        except BaseException as error:  # a signal handler's: it goes on after the release
            interrupt = error
            self._finish()
        if self.keeper.forked or self._thread is threading.current_thread():
            return  # the block's generator was collected during a renewal, which comes first
        self.keeper.leave(interrupt or exc)
        if interrupt is not None:
            raise interrupt

    def _finish(self) -> None:
        """Have the thread release the lock, and wait for it; release it here if it cannot."""
        keeper = self.keeper
        if keeper.forked:
            return
        keeper.end()
        with contextlib.suppress(RuntimeError):  # it is released already, if this is done again
            self._ended.release()
        if self._thread is threading.current_thread():
            return
        if self._started and not sys.is_finalizing():  # then daemon threads run no more
            # Not `join` alone: in Python 3.11 and 3.12 a thread is over once a join is interrupted.
            if not keeper.kept:
                wait_in_turns(self._kept, keeper.left_s())
            if not keeper.kept:  # the lease is over, or `stop_waiting` was called
                return
            self._thread.join(waitable(keeper.left_s()))
        run(keeper.finish())


def stop_waiting(hold: AbstractContextManager[OwnedJobLock]) -> None:
    """End a hold's waiting, for the lock or for its release; for signal handlers in its thread."""
    if isinstance(hold, _Hold):
        hold.stop_waiting()


def tell_of_loss(hold: AbstractContextManager[OwnedJobLock], tell: Callable[[], object]) -> None:
    """Have `tell` called, in whichever thread notices it first, once the lock is lost."""
    if isinstance(hold, _Hold):
        hold.keeper.on_loss = tell


def left_s(lock: OwnedJobLock) -> float:
    """For how many seconds the lease runs on; 0 once it is lost."""
    return lock._keeper.left_s()


async def _pause(timer: Timer | None, ended: threading.Lock, seconds: float) -> None:
    if timer is None:
        wait_in_turns(ended, seconds)
    else:
        timer.pause(seconds)


async def _sleep(timer: Timer | None, ended: threading.Lock, seconds: float) -> None:
    if timer is None:
        ended.acquire(timeout=waitable(seconds))
    else:
        timer.sleep(seconds, ended)


def _keep(
    keeper: Keeper,
    ended: threading.Lock,
    kept: threading.Lock,
) -> None:
    try:
        run(keeper.keep(partial(_sleep, keeper.timer, ended)))
    except BaseException as error:  # a thread would drop a SystemExit without a word
        keeper.died(error)
    finally:
        keeper.kept = True
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            kept.release()
