"""Waiting for a lock that is held; blocking and async."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from joblock import (
    JobLockHeldError,
    JobLockRecord,
    MemoryBlobStore,
    OwnedJobLock,
    acquire_job_lock,
    aio,
    hold_job_lock,
    release_job_lock,
)
from joblock._hold import stop_waiting, tell_of_loss
from joblock._lease import Keeper, pause_ms
from tests.holding import HOUR, MINUTE, make_keeper, poll, renewing_threads
from tests.support import (
    KEY,
    UID,
    VAULT,
    BareClock,
    PlainStore,
    RecordingStore,
    acquired,
    async_view,
    await_now,
)
from tests.unit.test_hold import Hold, hold_in_a_task, hold_in_a_thread


@pytest.fixture(params=[hold_in_a_thread, hold_in_a_task], ids=["sync", "async"])
def hold(request: pytest.FixtureRequest) -> Hold:
    """Run a body in `hold_job_lock`, once blocking and once async."""
    chosen: Hold = request.param
    return chosen


class Waiting:
    """A keeper that waits for the lock while only simulated time passes."""

    def __init__(self, store: Any, **keywords: Any) -> None:
        self.clock = BareClock()
        self.pauses: list[float] = []
        self.keeper: Keeper = make_keeper(
            store, clock=self.clock, now=lambda: self.clock.now - 999_000, **keywords
        )

    def enter(self) -> None:
        async def wait(seconds: float) -> None:
            self.pauses.append(seconds * 1000)
            self.clock.advance(seconds * 1000)

        await_now(self.keeper.enter(wait))


class TestInSimulatedTime:
    """How often it looks, and when."""

    @pytest.mark.parametrize("make", [RecordingStore, PlainStore])
    def test_a_lock_that_stays_held(self, make: type[Any]) -> None:
        """After `wait_ms` it is refused as without; a minute's wait is at most 36 requests."""
        store = make()
        waiting = Waiting(store, wait_ms=MINUTE)
        other = acquired(acquire_job_lock(store, UID, VAULT, ttl_ms=HOUR, clock=waiting.clock))
        before = store.get(KEY)
        store.calls.clear()
        with pytest.raises(JobLockHeldError) as refused:
            waiting.enter()
        assert refused.value.existing == other.record
        assert refused.value.now_ms == pytest.approx(waiting.clock.now)
        assert sum(waiting.pauses) == pytest.approx(MINUTE)
        looks = len(store.calls)
        print(f"{looks} requests in a minute")
        assert 20 <= looks <= 36
        assert store.get(KEY) == before

    def test_a_lock_that_is_released(self) -> None:
        """It is had at the next look."""
        store = RecordingStore()
        waiting = Waiting(store, wait_ms=MINUTE)
        other = acquired(acquire_job_lock(store, UID, VAULT, ttl_ms=HOUR, clock=waiting.clock))
        release = release_job_lock

        def end() -> None:
            if len(waiting.pauses) == 3:
                release(store, UID, VAULT, expected_job_id=other.job_id, etag=other.etag)

        store.before["get"] = end
        waiting.enter()
        assert len(waiting.pauses) == 3
        assert waiting.keeper.lease.took_over is None
        assert store.calls[-2:] == ["delete_if_match", "set_if_new"]

    def test_a_holder_that_crashed(self) -> None:
        """It looks when the lease ends, not a pause later, and takes over."""
        store = RecordingStore()
        waiting = Waiting(store, wait_ms=HOUR)
        clock = waiting.clock
        other = acquired(acquire_job_lock(store, UID, VAULT, ttl_ms=MINUTE, clock=clock))
        waiting.enter()
        assert waiting.keeper.lease.took_over == other.record
        assert clock.now == pytest.approx((other.record.expires_at or 0), abs=20)

    def test_the_clocks_skew(self) -> None:
        """A lease is honoured so much longer, and that is when it looks, and writes."""
        store = RecordingStore()
        waiting = Waiting(store, wait_ms=HOUR, clock_skew_ms=5000)
        clock = waiting.clock
        other = acquired(acquire_job_lock(store, UID, VAULT, ttl_ms=MINUTE, clock=clock))
        waiting.enter()
        assert clock.now == pytest.approx((other.record.expires_at or 0) + 5000, abs=20)
        assert store.calls.count("set_if_new") == 3  # the other's, before the waiting, and after it

    def test_a_lock_that_another_gets_first(self) -> None:
        """Between the look and the write: it waits on."""
        store = RecordingStore()
        waiting = Waiting(store, wait_ms=MINUTE)
        clock = waiting.clock
        acquire_job_lock(store, UID, VAULT, ttl_ms=1000, clock=clock)
        third: list[JobLockRecord] = []

        def overtake() -> None:
            if clock.now >= 1_001_000 and not third:
                del store.before["set_if_new"]
                won = acquire_job_lock(store, UID, VAULT, ttl_ms=5000, clock=clock)
                third.append(acquired(won).record)

        store.before["set_if_new"] = overtake
        waiting.enter()
        assert third == [waiting.keeper.lease.took_over]

    def test_a_clock_that_stands_still(self) -> None:
        """The pauses have an end all the same, and a least length."""
        store = RecordingStore()
        waiting = Waiting(store, wait_ms=1000)
        acquire_job_lock(store, UID, VAULT, ttl_ms=1, clock=waiting.clock)
        frozen = waiting.clock.now
        waiting.keeper._clock = lambda: frozen
        with pytest.raises(JobLockHeldError):
            waiting.enter()
        assert len(waiting.pauses) == 50

    def test_the_deadline_counts_from_the_write(self) -> None:
        """Not from before the waiting."""
        store = RecordingStore()
        waiting = Waiting(store, wait_ms=HOUR, at_most_ms=2 * MINUTE)
        clock = waiting.clock
        acquire_job_lock(store, UID, VAULT, ttl_ms=5 * MINUTE, clock=clock)
        waiting.enter()
        lease = waiting.keeper.lease
        assert lease.record.expires_at == (lease.record.started_at or 0) + MINUTE
        assert lease.deadline == clock.now - 999_000 + MINUTE - 1
        assert lease._last == clock.now - 999_000 + 2 * MINUTE

    def test_pauses_grow_and_differ(self) -> None:
        """From a tenth of a second to five, each shortened by up to a half."""
        for looks, longest in ((0, 100), (1, 150), (9, 100 * 1.5**9), (10, 5000), (10_000, 5000)):
            drawn = [pause_ms(looks) for _ in range(50)]
            assert longest / 2 < min(drawn) < max(drawn) <= longest
            assert len({*drawn}) > 10


class TestWaiting:
    """In real time."""

    def test_for_a_release(self, hold: Hold) -> None:
        """The job runs once the other one has ended."""
        store = MemoryBlobStore()
        with hold_job_lock(store, UID, VAULT):
            ran = threading.Event()

            def body(_: OwnedJobLock) -> None:
                ran.set()

            keywords = {"wait_ms": timedelta(seconds=30)}
            waits = threading.Thread(target=hold, args=(store, body), kwargs=keywords)
            waits.start()
            time.sleep(0.05)
            assert not ran.is_set()
        waits.join(30)
        assert ran.is_set()
        assert list(store) == []

    @pytest.mark.parametrize("wait", [-1, float("nan"), float("inf"), "1s", None])
    def test_a_time_that_cannot_be(self, hold: Hold, wait: Any) -> None:
        """A ValueError, before the store is asked."""
        store = RecordingStore()
        with pytest.raises(ValueError, match="^wait_ms must be"):
            hold(store, pytest.fail, wait_ms=wait)
        assert store.calls == []

    def test_a_store_that_fails_meanwhile(self, hold: Hold) -> None:
        """Its error comes out; nothing is written or released."""

        class Failing(RecordingStore):
            def get(self, key: str) -> str | None:
                self.calls.append("get")
                raise ConnectionError

        store = Failing()
        acquire_job_lock(store, UID, VAULT)
        store.calls.clear()
        with pytest.raises(ConnectionError):
            hold(store, pytest.fail, wait_ms=MINUTE)
        assert store.calls == ["set_if_new", "get_with_etag", "get"]

    def test_cancelled(self) -> None:
        """At once, whatever is left of the time, and the other's lock stays."""

        async def main() -> None:
            store = RecordingStore()
            acquire_job_lock(store, UID, VAULT)
            before = store.get_with_etag(KEY)

            async def job() -> None:
                async with aio.hold_job_lock(async_view(store), UID, VAULT, wait_ms=HOUR):
                    pytest.fail("it is held")

            task = asyncio.create_task(job())
            while store.calls.count("get") < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 30)
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 30)
            assert store.get_with_etag(KEY) == before

        asyncio.run(main())

    def test_interrupted(self) -> None:
        """What a signal handler raises ends the waiting, and the other's lock stays."""
        store = RecordingStore()
        acquire_job_lock(store, UID, VAULT)
        before = store.get_with_etag(KEY)

        class Interrupt(Exception):  # noqa: N818
            pass

        def interrupt(*_: object) -> None:
            raise Interrupt

        def send() -> None:
            poll(lambda: store.calls.count("get") >= 2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        handler = signal.signal(signal.SIGUSR1, interrupt)
        try:
            sender = threading.Thread(target=send)
            sender.start()
            with pytest.raises(Interrupt):
                hold_job_lock(store, UID, VAULT, wait_ms=HOUR).__enter__()
            sender.join()
        finally:
            signal.signal(signal.SIGUSR1, handler)
        assert store.get_with_etag(KEY) == before
        assert renewing_threads() == []

    def test_told_to_stop(self) -> None:
        """As the command does in its signal handler: refused at once, with the holder's record."""
        store = RecordingStore()
        other = acquired(acquire_job_lock(store, UID, VAULT))
        waiting = hold_job_lock(store, UID, VAULT, wait_ms=HOUR)

        def tell() -> None:
            if store.calls.count("get") == 2:
                stop_waiting(waiting)
                stop_waiting(waiting)  # signals may come twice

        store.before["get"] = tell
        with pytest.raises(JobLockHeldError) as refused:
            waiting.__enter__()
        assert refused.value.existing == other.record
        assert store.calls.count("get") == 2

    def test_told_to_stop_once_it_runs(self) -> None:
        """That is not waiting: the lock is kept."""
        store = MemoryBlobStore()
        hold = hold_job_lock(store, UID, VAULT)
        with hold as lock:
            stop_waiting(hold)
            stop_waiting(contextlib.nullcontext(lock))  # a user's own, say
            tell_of_loss(contextlib.nullcontext(lock), pytest.fail)
            assert not lock._keeper.ended
        assert list(store) == []
