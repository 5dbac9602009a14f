"""`joblock.testing`: hours of renewals, outages and losses without a second of real time."""

from __future__ import annotations

import asyncio
import threading
import time
import unittest
from collections.abc import Coroutine
from typing import Any
from unittest.mock import Mock

import pytest

from joblock import (
    JobLockHeldError,
    JobLockLostError,
    MemoryBlobStore,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
    resume_job_lock,
)
from joblock.aio import AsyncMemoryBlobStore, ThreadedBlobStore
from joblock.testing import ManualClock, job_ids, lose, take, take_async
from tests.support import KEY, UID, VAULT, acquired, held

MINUTE = 60_000
HOUR = 60 * MINUTE


class loses:  # noqa: N801 - it is read as a verb
    """The block loses its lock, which is raised when it is left."""

    error: JobLockLostError

    def __enter__(self) -> loses:
        return self

    def __exit__(self, _: object, error: object, __: object) -> bool:
        assert isinstance(error, JobLockLostError)
        self.error = error
        return True


class Failing(MemoryBlobStore):
    """Whose writes under a condition fail while it is told so; it counts those that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.renewals = 0

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        if self.down:
            raise OSError("no answer")
        self.renewals += 1
        return super().set_if_match(key, value, etag)


class TestAThread:
    def test_hours_of_renewals(self) -> None:
        """Each third of the lease, and the deadline moves with the clock."""
        store, clock = Failing(), ManualClock()
        with hold_job_lock(store, UID, VAULT, clock=clock) as lock:
            clock.advance(HOUR)
            assert store.renewals == 180
            assert not lock.lost
            assert lock.record.expires_at == clock() + MINUTE
            held(acquire_job_lock(store, UID, VAULT, clock=clock))
        assert list(store) == []

    def test_an_outage_that_is_survived(self) -> None:
        """And one that is not: the lock is lost at its deadline, and another may have it."""
        store, clock = Failing(), ManualClock()
        with loses() as lost, hold_job_lock(store, UID, VAULT, clock=clock) as lock:
            store.down = True
            clock.advance(50_000)
            store.down = False
            clock.advance(10 * MINUTE)
            lock.check()
            store.down = True
            clock.advance(MINUTE)
            assert lock.lost
            store.down = False
            acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        assert lost.error.reason == "lease_expired"
        assert isinstance(lost.error.__cause__, OSError)

    def test_another_has_taken_it(self) -> None:
        """The next renewal finds that."""
        store, clock = MemoryBlobStore(), ManualClock()
        with loses() as lost, hold_job_lock(store, UID, VAULT, clock=clock) as lock:
            take(store, UID, VAULT, clock=clock)
            lock.check()
            clock.advance(20_000)
            with pytest.raises(JobLockLostError):
                lock.check()
        assert lost.error.reason == "lock_owned_by_other_job"

    def test_the_longest_time(self) -> None:
        """No renewal goes beyond it."""
        store, clock = MemoryBlobStore(), ManualClock()
        with (
            loses() as lost,
            hold_job_lock(store, UID, VAULT, clock=clock, at_most_ms=HOUR) as lock,
        ):
            clock.advance(HOUR - 1000)
            lock.check()
            clock.advance(1000)
            assert lock.lost
        assert lost.error.reason == "lease_expired"

    def test_a_wall_clock_that_is_set(self) -> None:
        """No time passes, but others may take the lock over: it is lost here, too."""
        store, clock = MemoryBlobStore(), ManualClock()
        with loses(), hold_job_lock(store, UID, VAULT, clock=clock) as lock:
            clock.set(clock() + HOUR)
            assert lock.lost

    def test_a_run(self) -> None:
        """Resumed, and renewed."""
        store, clock = MemoryBlobStore(), ManualClock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock, uuid_factory=job_ids()))
        with resume_job_lock(store, UID, VAULT, expected_job_id="job-1", clock=clock) as run:
            clock.advance(HOUR)
            assert run.job_id == lock.job_id == "job-1"
            assert not run.lost

    def test_waiting_for_a_lock(self) -> None:
        """Who waits moves the clock: until the other's lease is over, or the time is."""
        store, clock = MemoryBlobStore(), ManualClock()
        take(store, UID, VAULT, clock=clock, expires_in_ms=HOUR)
        begun = clock()
        with pytest.raises(JobLockHeldError):
            hold_job_lock(store, UID, VAULT, clock=clock, wait_ms=MINUTE).__enter__()
        assert clock() == begun + MINUTE
        with hold_job_lock(store, UID, VAULT, clock=clock, wait_ms=2 * HOUR) as lock:
            assert lock.took_over is not None
            assert begun + HOUR <= clock() < begun + HOUR + 10_000

    def test_several_locks_on_one_clock(self) -> None:
        """Each is renewed when its time comes."""
        stores, clock = [Failing(), Failing()], ManualClock()
        with (
            hold_job_lock(stores[0], UID, VAULT, clock=clock),
            hold_job_lock(stores[1], UID, VAULT, clock=clock, ttl_ms=2 * MINUTE),
        ):
            clock.advance(HOUR)
        assert [store.renewals for store in stores] == [180, 90]

    def test_a_store_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The clock goes on after a while of real time, and the lock is lost."""
        monkeypatch.setattr("joblock.testing._PATIENCE_S", 0.05)
        clock, go = ManualClock(), threading.Event()

        class Hanging(MemoryBlobStore):
            def set_if_match(self, key: str, value: str, etag: str) -> str | None:
                go.wait(30)
                return super().set_if_match(key, value, etag)

        with loses(), hold_job_lock(Hanging(), UID, VAULT, clock=clock) as lock:
            clock.advance(MINUTE)
            assert lock.lost
            go.set()


def run_at_once(main: Coroutine[Any, Any, None]) -> None:
    """No hour of it is waited for."""
    begun = time.monotonic()
    asyncio.run(main)
    assert time.monotonic() - begun < MINUTE / 1000


class TestATask:
    def test_hours_of_renewals(self) -> None:
        """As in a thread."""

        async def main() -> None:
            store, clock = AsyncMemoryBlobStore(), ManualClock()
            async with aio.hold_job_lock(store, UID, VAULT, clock=clock) as lock:
                await clock.advance_async(HOUR)
                assert not lock.lost
                assert lock.record.expires_at == clock() + MINUTE
            assert await store.get(KEY) is None

        run_at_once(main())

    def test_in_worker_threads(self) -> None:
        """What a ThreadedBlobStore does is waited for, and an outage loses the lock."""

        async def main() -> None:
            store, clock = Failing(), ManualClock()
            threaded = ThreadedBlobStore(store)
            with loses():
                async with aio.hold_job_lock(threaded, UID, VAULT, clock=clock) as lock:
                    await clock.advance_async(HOUR)
                    assert store.renewals == 180
                    store.down = True
                    await clock.advance_async(MINUTE)
                    assert lock.lost
            threaded.close()

        run_at_once(main())

    def test_a_clock_that_would_keep_the_loop(self) -> None:
        """A task cannot renew while its event loop is in `advance`."""

        async def main() -> None:
            store, clock = AsyncMemoryBlobStore(), ManualClock()
            async with aio.hold_job_lock(store, UID, VAULT, clock=clock):
                with pytest.raises(RuntimeError, match="await advance_async"):
                    clock.advance(1)
            clock.advance(1)  # nobody holds any more

        asyncio.run(main())

    def test_waiting_and_a_rival(self) -> None:
        """As in a thread."""

        async def main() -> None:
            store, clock = AsyncMemoryBlobStore(), ManualClock()
            rival = await take_async(store, UID, VAULT, clock=clock, run_id="run-1")
            assert await aio.peek_job_lock(store, UID, VAULT) == rival
            begun = clock()
            async with aio.hold_job_lock(store, UID, VAULT, clock=clock, wait_ms=HOUR) as lock:
                assert lock.took_over == rival
                assert clock() >= begun + 16 * MINUTE

        asyncio.run(main())

    def test_a_blocking_take_of_an_async_store(self) -> None:
        """It says what to call."""
        with pytest.raises(TypeError, match="await take_async"):
            take(AsyncMemoryBlobStore(), UID, VAULT)  # type: ignore[arg-type] # pyright: ignore


def test_a_mock_is_no_such_clock() -> None:
    """It would say yes to whatever a clock may have."""
    clock = Mock(return_value=5000)
    with hold_job_lock(MemoryBlobStore(), UID, VAULT, clock=clock) as lock:
        assert lock.record.started_at == 5000
        assert not lock.lost
    assert {name for name, *_ in clock.method_calls} == set()


def test_the_clock_alone() -> None:
    """It moves what is asked of it, and acquires go by it."""
    store, clock = MemoryBlobStore(), ManualClock(5000)
    lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock, ttl_ms=100))
    assert (lock.record.started_at, lock.record.expires_at) == (5000, 5100)
    clock.advance(99)
    held(acquire_job_lock(store, UID, VAULT, clock=clock))
    clock.advance(1)
    assert acquired(acquire_job_lock(store, UID, VAULT, clock=clock)).took_over == lock.record


def test_a_clock_that_is_set_after_some_time() -> None:
    """It shows what it was set to, and goes on from there."""
    clock = ManualClock()
    clock.advance(10)
    clock.set(5000)
    assert (clock(), clock.monotonic_ms()) == (5000, 10)
    clock.advance(1)
    assert (clock(), clock.monotonic_ms()) == (5001, 11)


def test_job_ids() -> None:
    """They count, each factory for itself."""
    first, second = job_ids(), job_ids("task")
    assert [first(), first(), second()] == ["job-1", "job-2", "task-1"]


@pytest.mark.parametrize(("expires_in_ms", "live"), [(1000, True), (0, False), (-1, False)])
def test_take(expires_in_ms: float, live: bool) -> None:
    """Another job's lock, live or expired, in place of what was there."""
    store, clock = MemoryBlobStore(), ManualClock()
    record = take(store, UID, VAULT, job_id="x", expires_in_ms=expires_in_ms, clock=clock)
    assert record == peek_job_lock(store, UID, VAULT)
    assert record.is_live(clock()) is live
    assert (record.started_at or 0) <= min(clock(), record.expires_at or 0)


def test_lose() -> None:
    """As if a renewal had found it; what is in the store stays."""
    store = MemoryBlobStore()
    with loses() as lost, hold_job_lock(store, UID, VAULT) as lock:
        lose(lock)
        assert lock.lost
        with pytest.raises(JobLockLostError):
            lock.check()
    assert lost.error.reason == "lock_owned_by_other_job"
    assert list(store) == [KEY]


class InUnittest(unittest.IsolatedAsyncioTestCase):
    """The kit asks for no test runner."""

    async def test_a_hold(self) -> None:
        clock = ManualClock()
        async with aio.hold_job_lock(AsyncMemoryBlobStore(), UID, VAULT, clock=clock) as lock:
            await clock.advance_async(HOUR)
            self.assertFalse(lock.lost)  # noqa: PT009
