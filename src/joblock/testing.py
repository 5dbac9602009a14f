"""For tests of code that uses joblock: a clock that only the test moves, ids that count, rivals.

clock = ManualClock()
with hold_job_lock(store, "user-1", "Business", clock=clock) as lock:
clock.advance(10 * 60_000)  # ten minutes of renewals, in a moment
assert not lock.lost
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from ._errors import LossReason
from ._hold import OwnedJobLock
from ._ids import job_lock_key
from ._protocol import JOB_LOCK_TTL_MS
from ._record import JobLockRecord, epoch_ms
from ._store import AsyncBlobStore, BlobStore, blocking

__all__ = ["ManualClock", "job_ids", "lose", "take", "take_async"]

_PATIENCE_S = 10.0  # of real time, for a store that hangs
_LOOK_AGAIN_S = 0.0005

_Keeper: TypeAlias = "threading.Thread | asyncio.Task[Any]"


class ManualClock:
    """Epoch milliseconds that only the test moves: hand it in as `clock=`.

    In `hold_job_lock` and `resume_job_lock` it also moves the time in which the lock is renewed and
    lost, and in which `wait_ms` passes, in threads and tasks alike: nothing there waits for real
    time. Who waits for a lock moves the clock itself.
    """

    def __init__(self, now_ms: float = 1_000_000_000_000) -> None:
        self._ahead_ms = now_ms  # of what has passed
        self._passed_ms = 0.0
        self._keepers: list[_Keeper] = []
        self._sleeping: dict[_Keeper, _Sleep] = {}

    def __call__(self) -> float:
        """Return the epoch milliseconds."""
        return self._ahead_ms + self._passed_ms

    def set(self, now_ms: float) -> None:
        """Set the wall clock, as NTP or an operator may: no time passes."""
        self._ahead_ms = now_ms - self._passed_ms

    def advance(self, ms: float) -> None:
        """Let time pass, and do each renewal that is due in it, one after the other.

        It returns when those that hold a lock wait again, or have lost it; or, where a store hangs,
        after 10 seconds of real time.

        Raises:
            RuntimeError: a task of this event loop holds a lock, and cannot run meanwhile: await
                `advance_async`.
        """
        loop = _running_loop()
        if any(isinstance(it, asyncio.Task) and it.get_loop() is loop for it in self._living()):
            raise RuntimeError("a task of this event loop holds a lock: await advance_async(ms)")
        for _ in self._passing(ms):
            time.sleep(_LOOK_AGAIN_S)

    async def advance_async(self, ms: float) -> None:
        """As `advance`, also for the locks that tasks of this event loop hold."""
        for _ in self._passing(ms):
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _passing(self, ms: float) -> Iterator[None]:
        """Move the time to each moment at which one wakes; yield while somebody is awake."""
        end = self._passed_ms + ms
        until = time.monotonic() + _PATIENCE_S
        while True:
            while self._is_busy() and time.monotonic() < until:
                yield
            sleeps = [sleep for sleep in list(self._sleeping.values()) if sleep.due_ms <= end]
            if not sleeps:
                break
            first = min(sleeps, key=lambda sleep: sleep.due_ms)
            self._pass(first.due_ms - self._passed_ms)
            self._sleeping.pop(first.keeper, None)
            first.wake()
        self._pass(end - self._passed_ms)

    def _pass(self, ms: float) -> None:
        # To the microsecond, or sums would differ in their last digit. Not back: another thread may
        # have moved it, too.
        self._passed_ms = round(self._passed_ms + max(0, ms), 3)

    def _living(self) -> list[_Keeper]:
        self._keepers = [it for it in list(self._keepers) if _lives(it)]
        return self._keepers

    def _is_busy(self) -> bool:
        return any(keeper not in self._sleeping for keeper in self._living())

    # What those that hold a lock ask of it.

    def monotonic_ms(self) -> float:
        """Return how much time has passed; to set the wall clock does not count."""
        return self._passed_ms

    def starts(self, keeper: _Keeper) -> None:
        """Take note of a thread or a task that renews, before it does."""
        self._keepers.append(keeper)

    def pause(self, seconds: float) -> None:
        """Wait for a lock that another has."""
        self.advance(seconds * 1000)

    async def pause_async(self, seconds: float) -> None:
        """As `pause`, for a task."""
        await self.advance_async(seconds * 1000)

    def sleep(self, seconds: float, ended: threading.Lock) -> None:
        """Wait until so much time has passed, or for the end of the block."""
        keeper = threading.current_thread()
        self._sleeping[keeper] = _Sleep(self._passed_ms + seconds * 1000, keeper, ended.release)
        ended.acquire()
        self._sleeping.pop(keeper, None)

    async def sleep_async(self, seconds: float, ended: asyncio.Event) -> None:
        """As `sleep`, for a task."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        keeper: Any = asyncio.current_task()
        waits = [asyncio.ensure_future(event.wait()) for event in (ended, woken)]

        def wake() -> None:
            loop.call_soon_threadsafe(woken.set)

        self._sleeping[keeper] = _Sleep(self._passed_ms + seconds * 1000, keeper, wake)
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            self._sleeping.pop(keeper, None)


class _Sleep:
    """Until when one sleeps, and how to wake it."""

    def __init__(self, due_ms: float, keeper: _Keeper, wake: Callable[[], None]) -> None:
        self.due_ms = due_ms
        self.keeper = keeper
        self._wake = wake

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # its block, or its event loop, has just ended
            self._wake()


def _lives(keeper: _Keeper) -> bool:
    return not keeper.done() if isinstance(keeper, asyncio.Task) else keeper.is_alive()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def job_ids(prefix: str = "job") -> Callable[[], str]:
    """Return a `uuid_factory` that counts: "job-1", "job-2" and so on."""
    numbers = itertools.count(1)
    return lambda: f"{prefix}-{next(numbers)}"


def take(
    store: BlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    job_id: str = "another-job",
    run_id: str | None = None,
    expires_in_ms: float = JOB_LOCK_TTL_MS,
    clock: Callable[[], float] = epoch_ms,
) -> JobLockRecord:
    """Write another job's lock, whatever is there, and return its record.

    It is live for `expires_in_ms`, and expired if that is 0 or less. With a `run_id` a worker has
    resumed it.

    Raises:
        InvalidIdError: an id cannot name a lock. Nothing was written.
        TypeError: the store is async: await `take_async`.
    """
    record = _of_another(canister_uid, vault_id, job_id, run_id, expires_in_ms, clock)
    key = job_lock_key(canister_uid, vault_id)
    blocking(store.set(key, record.to_json()), "await take_async")
    return record


async def take_async(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    job_id: str = "another-job",
    run_id: str | None = None,
    expires_in_ms: float = JOB_LOCK_TTL_MS,
    clock: Callable[[], float] = epoch_ms,
) -> JobLockRecord:
    """As `take`, on an async store."""
    record = _of_another(canister_uid, vault_id, job_id, run_id, expires_in_ms, clock)
    await store.set(job_lock_key(canister_uid, vault_id), record.to_json())
    return record


def _of_another(
    canister_uid: str,
    vault_id: str,
    job_id: str,
    run_id: str | None,
    expires_in_ms: float,
    clock: Callable[[], float],
) -> JobLockRecord:
    now_ms = clock()
    return JobLockRecord(
        job_id,
        canister_uid,
        vault_id,
        started_at=min(now_ms, now_ms + expires_in_ms),
        expires_at=now_ms + expires_in_ms,
        run_id=run_id,
    )


def lose(lock: OwnedJobLock, reason: LossReason = "lock_owned_by_other_job") -> None:
    """Have a lock that is held be lost, as if its renewal had found that out.

    `lost` is true and `check()` raises from now on, and leaving raises `JobLockLostError`. The
    store is not changed: what is there stays.
    """
    lock._keeper.lease.lose(reason, None)
