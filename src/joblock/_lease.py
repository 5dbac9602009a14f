"""What keeps a lock alive while a job runs: the rules, and their way to the store.

`Lease` has the rules: it is given times and results, and does no I/O. `Keeper` carries them out,
for the thread of `_hold` as for the task of `joblock.aio`: there is neither of them here.

A keeper's life:

    new -- enter --> waiting <--> renewing
                     |                   |
                     | end()             | the store says so, or the deadline has passed
                     v                   v
                   ended                lost      nothing is renewed or released any more
                     | finish
                     v
                  released            or requeued, or kept for the rest of the minimum hold; or
                                      logged: that was tried, and the lease will expire

- died: the thread or the task of the keeper ended otherwise. Leaving then releases; until then
  nothing is renewed, so the lease may be lost.
- forked: in a child process everything is left as it is. The lock is the parent's.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

from . import _log, _protocol
from ._errors import JobLockError, JobLockHeldError, JobLockLostError, LossReason
from ._given import Duration, milliseconds, not_negative, positive
from ._ids import job_lock_key
from ._record import JobLockRecord, as_number
from ._results import Acquired, Held, Lost, Renewed
from ._store import AsyncBlobStore

if TYPE_CHECKING:
    import asyncio

# Seconds. Linux's usual monotonic clock stands still while the host sleeps, but a lease does not.
_monotonic = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic
)


def monotonic_ms() -> float:
    """Milliseconds of a clock that nobody sets."""
    return _monotonic() * 1000


class Timer(Protocol):
    """A caller's clock that also moves the time in which a lock is kept, for tests."""

    def monotonic_ms(self) -> float: ...

    def starts(self, keeper: threading.Thread | asyncio.Task[Any]) -> None: ...

    def pause(self, seconds: float) -> None: ...

    async def pause_async(self, seconds: float) -> None: ...

    def sleep(self, seconds: float, ended: threading.Lock) -> None: ...

    async def sleep_async(self, seconds: float, ended: asyncio.Event) -> None: ...


def _as_timer(clock: Any) -> Timer | None:
    """Return the clock, if it is one of `joblock.testing` or like that."""
    # Its class is asked, since a mock has whatever it is asked for.
    timer: Timer | None = clock if hasattr(clock.__class__, "monotonic_ms") else None
    return timer


# A clock that gives whole milliseconds drops a fraction: the record ends that much sooner.
_LOST_EARLY_MS = 1


class Lease:
    """When to renew, how soon to retry, and whether the lock is lost.

    Times are milliseconds of one monotonic clock; `wall` is what the caller's own clock says. The
    rules:

    - A deadline counts from before the write that set it, so it passes here no later than it does
      for whoever reads the record. None is later than `last`, for a job that may hang.
    - A renewal is due `renew_every_ms` after the last one that succeeded. One that fails is
      retried several times within that interval, and before the deadline.
    - The lock is lost when a renewal or the release finds that it is, and when the deadline
      passes before the body has ended, by the monotonic clock or by the caller's own: if that
      was set forward, others on this host may take the lock over. What is lost stays lost.

    `record`, `etag`, `deadline` and `failure` are written by the thread or task that renews, and
    read by those that ask. `_loss` and `_ended` may be written by any of them: each is one value,
    written once.
    """

    def __init__(
        self,
        acquired: Acquired,
        *,
        begun: float,
        ttl_ms: float,
        renew_every_ms: float,
        last: float = math.inf,
    ) -> None:
        self.job_id: str = acquired.job_id
        self.took_over: JobLockRecord | None = acquired.took_over
        self.record: JobLockRecord = acquired.record
        self.etag: str | None = acquired.etag
        self.failure: BaseException | None = None
        self._ttl_ms = ttl_ms
        self._renew_every_ms = renew_every_ms
        self._last = last
        self._retry_every_ms = min(renew_every_ms, ttl_ms - renew_every_ms) / 4
        self._loss: tuple[LossReason, JobLockRecord | None] | None = None
        self._ended = False
        self._granted(begun)

    def _granted(self, begun: float) -> None:
        end = begun + self._ttl_ms
        self.deadline: float = min(end, self._last) - _LOST_EARLY_MS
        self._due = begun + self._renew_every_ms if end < self._last else math.inf

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

    def loss(self, now: float, wall: float | None = None) -> JobLockLostError | None:
        """Return the error that tells of the loss, or None; notice a deadline that has passed."""
        expired = now >= self.deadline or (wall is not None and not self.record.is_live(wall))
        if self._loss is None and not self._ended and expired:
            self.lose("lease_expired", None)
        if self._loss is None:
            return None
        error = JobLockLostError(self.job_id, *self._loss)
        error.__cause__ = self.failure
        return error


# Milliseconds between two looks of who waits for a lock: growing, and each of them shortened by up
# to a half, so that many who wait do not all look at once.
_FIRST_PAUSE_MS = 100.0
_LONGEST_PAUSE_MS = 5000.0
_PAUSES_GROW = 1.5
_SHORTEST_PAUSE_MS = 20.0


def pause_ms(looks: int) -> float:
    """How long to wait after so many looks."""
    longest = min(_FIRST_PAUSE_MS * _PAUSES_GROW ** min(looks, 20), _LONGEST_PAUSE_MS)
    return longest * (1 - int.from_bytes(os.urandom(2)) / 0x20000)


class Keeper:
    """Takes a lock, carries out its lease's rules on a store, and logs what happens.

    Of a remote store's error only the type and the status are logged: its text may have a signed
    URL or a token. The error itself is the cause of the `JobLockLostError` that it leads to.

    `take` is `_protocol.acquire` or `_protocol.resume`, with what only that one is given.

    Who writes what, and who reads it: `is_over` says that the block is over without a word, and
    `on_loss` is called by whoever notices a loss first; they are set before `enter`. `lease` is
    written once, by `enter`. `begun` is written by whoever enters, when the block is about to run;
    until then leaving takes back what was written. `ended` and `requeue_ms` are written by whoever
    leaves, and read by the thread or task that renews; `kept` the other way round, when that thread
    ends. `_asked`, that the store may have been asked for a release, and `_tried`, that it has
    answered or failed, are written by whoever releases, and read by whoever leaves. `_releasing` is
    locked while someone does, for the one case in which two may: a thread whose start was
    interrupted may run all the same.
    """

    lease: Lease

    def __init__(
        self,
        store: AsyncBlobStore,
        canister_uid: str,
        vault_id: str,
        *,
        take: Callable[..., Coroutine[Any, Any, Acquired | Held]],
        ttl_ms: float | Duration,
        renew_every_ms: float | Duration | None,
        wait_ms: float | Duration = 0,
        at_least_ms: float | Duration,
        at_most_ms: float | Duration | None,
        clock_skew_ms: float,
        clock: Callable[[], float],
        uuid_factory: Callable[[], uuid.UUID | str],
        now: Callable[[], float] = monotonic_ms,
    ) -> None:
        self.timer: Timer | None = _as_timer(clock)
        ttl_ms = positive("ttl_ms", ttl_ms)
        every_ms = ttl_ms / 3 if renew_every_ms is None else milliseconds(renew_every_ms)
        if every_ms is None or not 0 < every_ms < ttl_ms - _LOST_EARLY_MS:
            if renew_every_ms is None:
                raise ValueError(f"ttl_ms is too short to be renewed: {ttl_ms}")
            raise ValueError(
                f"renew_every_ms must be more than 0 and less than the TTL of {ttl_ms} ms "
                f"by more than {_LOST_EARLY_MS} ms, not {renew_every_ms!r}"
            )
        self._wait_ms = not_negative("wait_ms", wait_ms)
        self._at_least_ms = not_negative("at_least_ms", at_least_ms)
        self._at_most_ms = None if at_most_ms is None else positive("at_most_ms", at_most_ms)
        if self._at_most_ms is not None and self._at_most_ms < self._at_least_ms:
            raise ValueError(
                f"at_most_ms must not be less than at_least_ms: {at_most_ms} and {at_least_ms}"
            )
        self.key: str = job_lock_key(canister_uid, vault_id)
        self.is_over: Callable[[], bool] = lambda: False
        self.on_loss: Callable[[], object] = lambda: None
        self.entered: bool = False
        self.begun: bool = False
        self.ended: bool = False
        self.kept: bool = False
        self.requeue_ms: float | None = None
        self._store = store
        self._ids = (canister_uid, vault_id)
        self._take = take
        self._ttl_ms = ttl_ms
        self._renew_every_ms = every_ms
        self._clock_skew_ms = clock_skew_ms
        self._clock = clock
        self._uuid_factory = uuid_factory
        self._now = now if self.timer is None else self.timer.monotonic_ms
        self._loss_unlogged = threading.Lock()
        self._releasing = threading.Lock()
        self._writing: tuple[JobLockRecord, JobLockRecord | None] | None = None
        self._asked = False
        self._tried = False
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that has the lock."""
        return os.getpid() != self._process

    async def enter(self, wait: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        """Take the lock, or raise `JobLockHeldError` or `JobLockLostError`.

        `wait` waits for so many seconds, or for the end of the block that has not begun.
        """
        self._process = os.getpid()
        try:
            await self._enter(wait)
        except JobLockError:  # refused: nothing was written
            self._writing = None
            raise
        except GeneratorExit:  # nobody runs this any more
            raise
        except BaseException:  # the store's, or a signal handler's: it may have been
            await self.finish()
            raise
        if self.ended or self.is_over():  # nobody waits for the lock any more
            await self.finish()

    async def _enter(self, wait: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        until = self._now() + self._wait_ms
        held = await self._taken()
        looks = 0
        while held is not None:
            self._writing = None
            left_ms = until - self._now()
            if left_ms <= 0 or self.ended or self.is_over():
                raise JobLockHeldError(held.existing, held.now_ms, held.clock_skew_ms)
            lease_ms = (held.existing.expires_at or 0) + held.clock_skew_ms - (held.now_ms or 0)
            pause = max(_SHORTEST_PAUSE_MS, min(pause_ms(looks), lease_ms))
            await wait(min(pause, left_ms) / 1000)
            looks += 1
            held = await _protocol.look(
                self._store, *self._ids, clock_skew_ms=self._clock_skew_ms, clock=self._clock
            )
            if held is None:
                held = await self._taken()

    async def _taken(self) -> Held | None:
        """Take the lock; return who has it if it is not to be had."""
        begun = self._now()
        wall = 0 if self._at_most_ms is None else self._clock()
        taken = await self._take(
            self._store,
            *self._ids,
            ttl_ms=self._ttl_ms,
            at_most_ms=self._at_most_ms,
            clock_skew_ms=self._clock_skew_ms,
            clock=self._clock,
            uuid_factory=self._uuid_factory,
            id_is_new=self._uuid_factory is uuid.uuid4,
            writing=self._note,
        )
        if isinstance(taken, Held):
            return taken
        last = math.inf
        if self._at_most_ms is not None and taken.record.started_at is not None:
            last = begun + taken.record.started_at + self._at_most_ms - wall
        self.lease = Lease(
            taken,
            begun=begun,
            ttl_ms=self._ttl_ms,
            renew_every_ms=self._renew_every_ms,
            last=last,
        )
        self.entered = True
        return None

    def _note(self, written: JobLockRecord, replaced: JobLockRecord | None) -> None:
        self._writing = (written, replaced)

    def loss(self) -> JobLockLostError | None:
        """The lease's loss, also by the caller's clock; logged once, by whoever notices first."""
        return self._logged(self.lease.loss(self._now(), as_number(self._clock())))

    def _lost(self) -> bool:
        """Whether it is lost for certain: where only the caller's clock says so, the store knows.

        So a renewal or the release is tried first, and the clock is not asked while leaving.
        """
        return self.entered and self._logged(self.lease.loss(self._now())) is not None

    def _logged(self, loss: JobLockLostError | None) -> JobLockLostError | None:
        if loss is not None and self._loss_unlogged.acquire(blocking=False):
            _log.error("%s (%r)", loss, self.key)
            self.on_loss()
        return loss

    async def keep(self, wait: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        """Renew until the body has ended or the lock is lost; release what is not lost.

        `wait` waits for so many seconds, or for the end of the body. To run this again, after it
        was interrupted, is safe: each step asks for the state first, and a release of what is
        released does nothing.
        """
        while not self._lost():
            if not self.ended:
                await wait(self.lease.wait_ms(self._now()) / 1000)
            if self.forked or self._lost():
                return
            if self.ended or self.is_over():
                await self.finish()
                return
            await self._renew()
            # It is renewed, or it could not be: now the caller's clock counts, too. One that fails
            # tells nothing; the renewal has failed with it, and said so.
            with contextlib.suppress(Exception):
                self.loss()

    async def _renew(self) -> None:
        begun = self._now()
        try:
            result = await _protocol.renew(
                self._store,
                *self._ids,
                expected_job_id=self.lease.job_id,
                ttl_ms=self._ttl_ms,
                at_most_ms=self._at_most_ms,
                clock=self._clock,
                etag=self.lease.etag,
                record=self.lease.record,
                run=self.lease.record,
            )
        except Exception as error:
            now = self._now()
            self.lease.failed(error, now)
            _log.warning(
                "job %r could not renew %r: %s; %d ms of its lease are left",
                self.lease.job_id,
                self.key,
                _log.told(error),
                self.lease.deadline - now,
            )
        else:
            self.lease.answered(result, begun, self._now())

    async def finish(self) -> None:
        """Release the lock, unless that was tried, or it is lost, or was never asked for."""
        if self.finished or not self._releasing.acquire(blocking=False):
            return
        try:
            await self._release()
        except Exception as error:
            log_unreleased(self._job_id, self.key, error)
        finally:
            self._releasing.release()
        self._tried = True

    @property
    def _job_id(self) -> str | None:
        return None if self._writing is None else self._writing[0].job_id

    async def _release(self) -> None:
        if not self.begun:  # entering was interrupted, or failed, perhaps after its write
            if self._writing is not None:
                written, replaced = self._writing
                etag = self.lease.etag if self.entered else None
                await _protocol.undo(
                    self._store, *self._ids, written=written, replaced=replaced, etag=etag
                )
            return
        lease = self.lease
        again, self._asked = self._asked, True
        if self.requeue_ms is not None:
            answer = await _protocol.requeue(
                self._store,
                *self._ids,
                run=lease.record,
                etag=lease.etag,
                ttl_ms=self.requeue_ms,
                at_least_ms=self._at_least_ms,
                clock=self._clock,
            )
            lost = answer if isinstance(answer, Lost) else None
        else:
            released = await _protocol.release(
                self._store,
                *self._ids,
                expected_job_id=lease.job_id,
                etag=lease.etag,
                record=lease.record,
                run=lease.record,
                at_least_ms=self._at_least_ms,
                clock=self._clock,
            )
            lost = None if released.reason is None else Lost(released.reason, None)
        if lost is None:
            return
        found = None if lost.current is None else lost.current.job_id
        if again and (lost.reason == "lock_already_gone" or found == lease.job_id):
            return  # it was released, or requeued, by the try that was interrupted
        lease.lose(lost.reason, None)

    def requeue(self, ttl_ms: float) -> None:
        """Have the lock left to the job's next run, instead of being released."""
        if self.ended:
            raise RuntimeError("the block is over: its lock cannot be requeued any more")
        self.requeue_ms = ttl_ms

    def died(self, error: BaseException) -> None:
        """Take in that the thread or task ended otherwise than by its own rules."""
        self.lease.failure = error
        _log.error(
            "job %r does not renew %r any more: %s", self.lease.job_id, self.key, _log.told(error)
        )

    def end(self) -> None:
        """Take in that the body has ended, whether it was entered or not."""
        if self.entered:
            self.lease.end(self._now())
        self.ended = True

    def left_s(self) -> float:
        """For how many seconds leaving may wait for the store: as long as the lease runs."""
        return 0 if self._lost() else max(0, self.lease.deadline - self._now()) / 1000

    @property
    def finished(self) -> bool:
        """Whether there is nothing to do any more: the release was tried, or the lock is lost."""
        return self._tried or self._lost()

    def leave(self, error: BaseException | None, *, going_on: bool = False) -> None:
        """Tell of a loss, in an error or in a note to the `error` that the body raised.

        `going_on` says that nobody waits for the release any more, which still goes on.
        """
        if not (self.finished or going_on):
            log_unreleased(self._job_id, self.key, "no answer from the store")
        loss = self.lease.loss(self._now())
        if loss is not None and error is None:
            raise loss
        if loss is not None and error is not None:
            error.add_note(str(loss))


def log_unreleased(job_id: str | None, key: str, why: BaseException | str) -> None:
    """Log that a lock stays until its lease ends, since the release failed or had no answer."""
    _log.warning(
        "job %r could not release %r: %s; the lease will expire",
        job_id,
        key,
        why if isinstance(why, str) else _log.told(why),
    )


class Once:
    """What may be done only once, by whichever thread comes first."""

    def __init__(self) -> None:
        self._done = threading.Lock()

    def __call__(self) -> None:
        """Raise RuntimeError unless this is the first call."""
        if not self._done.acquire(blocking=False):
            raise RuntimeError(
                "this has been entered: call hold_job_lock or resume_job_lock for another block"
            )


def way_out(function: Callable[..., Any]) -> Any:
    """Decorate `__exit__` or `__aexit__`, so that one can see when its with statement is over.

    A with statement looks up its way out before it enters, and has it until it is over, whatever
    ends it. So when what was bound for it is gone, the block is over, also where a signal handler
    raised before the first line of `__exit__`, or at the last of `__enter__`. Whoever keeps the
    exception keeps the hold and its lock by the traceback, but not this.

    What enters by hand, as `contextlib.ExitStack`, asks the class: then nothing is known of that.
    """
    return _WayOut(function)


class _WayOut:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, hold: Any, owner: type) -> Callable[..., Any]:
        if hold is None:
            return self._function
        bound = MethodType(self._function, hold)
        hold.bound_way_out = weakref.ref(bound)
        return bound


def over(lock: object, bound: weakref.ref[MethodType] | None) -> Callable[[], bool]:
    """Return what says whether a block is over without a word: its lock forgotten, or left."""
    remembered = weakref.ref(lock)
    if bound is None or bound() is None:
        return lambda: remembered() is None
    return lambda: remembered() is None or bound() is None
