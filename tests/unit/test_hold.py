"""`hold_job_lock`: the rules under a simulated clock, then real threads and tasks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

import joblock
from joblock import (
    BlobStore,
    JobLockHeldError,
    JobLockLostError,
    MemoryBlobStore,
    OwnedJobLock,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
)
from joblock import _hold as hold_module
from joblock._lease import Keeper, Lease, monotonic_ms
from joblock._record import epoch_ms
from tests.support import (
    KEY,
    UID,
    VAULT,
    AsyncConditionalView,
    Clock,
    PlainStore,
    RecordingStore,
    acquired,
    async_view,
    await_now,
)

MINUTE = 60_000
HOUR = 60 * MINUTE
LEASE = MINUTE - 1  # as the holder counts it: the record's clock may have dropped a millisecond


def poll(condition: Callable[[], object]) -> None:
    """Wait for what a thread is about to do."""
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.001)


def renewing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("joblock")]


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records if record.name == "joblock"]


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    yield
    poll(lambda: not renewing_threads())


class Simulation:
    """A lock with a TTL of a minute, kept by the real loop while only simulated time passes.

    The wall clock and the monotonic clock run alike, with different origins.
    """

    def __init__(self, store: BlobStore, renew_every_ms: float = MINUTE / 3) -> None:
        self.store = store
        self.clock = Clock()
        won = acquired(acquire_job_lock(store, UID, VAULT, ttl_ms=MINUTE, clock=self.clock))
        self.lease = Lease(
            won, begun=self.monotonic(), ttl_ms=MINUTE, renew_every_ms=renew_every_ms
        )
        self.keeper = Keeper(
            async_view(store),
            UID,
            VAULT,
            self.lease,
            clock=self.clock,
            now=self.monotonic,
        )
        self.lock = OwnedJobLock(self.keeper)
        self.pass_time: Callable[[float], None] = self.clock.tick

    def monotonic(self) -> float:
        return self.clock.now - 999_000

    def job(self, duration_ms: float) -> None:
        """Run a job that lasts so long, and leave."""
        end = self.clock.now + duration_ms

        async def wait(seconds: float) -> bool:
            self.pass_time(max(0, min(seconds * 1000, end - self.clock.now)))
            if self.clock.now < end:
                return False
            self.keeper.end()
            return True

        await_now(self.keeper.keep(weakref.ref(self.lock), wait))
        if self.clock.now < end:  # lost: the body goes on regardless
            self.pass_time(end - self.clock.now)
            self.keeper.end()
        self.keeper.leave(None)


class FlakyStore(RecordingStore):
    """Each write of a renewal first does what `script` says next, if it says anything."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[Callable[[], object]] = []
        self.before["set_if_match"] = self.next

    def next(self) -> None:
        if self.script:
            self.script.pop(0)()


def store_that_hangs() -> tuple[FlakyStore, threading.Event, threading.Event]:
    """In the first renewal: from the first event on, until the second."""
    store = FlakyStore()
    hanging, answer = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        answer.wait(30)

    store.script = [hang]
    return store, hanging, answer


def fail() -> None:
    raise ConnectionError("https://store.example/?signature=secret")


class TestInSimulatedTime:
    """The loop is the real one; waiting moves the clock."""

    @pytest.mark.parametrize("store", [RecordingStore(), PlainStore()], ids=["etags", "plain"])
    def test_a_job_of_two_hours_with_a_ttl_of_a_minute(self, store: BlobStore) -> None:
        """It keeps the lock all the time: a rival is refused every second."""
        simulation = Simulation(store)
        refused = 0

        def pass_time(ms: float) -> None:
            nonlocal refused
            for _ in range(int(ms // 1000)):
                simulation.clock.tick(1000)
                refused += not acquire_job_lock(store, UID, VAULT, clock=simulation.clock)

        simulation.pass_time = pass_time
        first = simulation.lock.record
        assert first.expires_at is not None
        simulation.job(2 * HOUR)
        assert refused == 7200
        assert not simulation.lock.lost
        assert simulation.lock.record.started_at == first.started_at
        assert simulation.lock.record.expires_at == first.expires_at + 2 * HOUR - MINUTE / 3
        assert peek_job_lock(store, UID, VAULT) is None

    def test_a_renewal_is_one_request(self) -> None:
        """By the record and the etag of the last one."""
        store = RecordingStore()
        simulation = Simulation(store)
        store.calls.clear()
        simulation.job(MINUTE)
        assert store.calls == ["set_if_match", "set_if_match", "delete_if_match"]

    def test_an_outage_of_two_renewals_is_survived(self, caplog: pytest.LogCaptureFixture) -> None:
        """Seven attempts fail, from the first third of the lease on; the eighth is in time."""
        store = FlakyStore()
        store.script = [fail] * 7
        simulation = Simulation(store)
        simulation.job(10 * MINUTE)
        assert not simulation.lock.lost
        assert levels(caplog) == ["WARNING"] * 7
        assert "builtins.ConnectionError; 39999 ms" in caplog.messages[0]
        assert "builtins.ConnectionError; 9999 ms" in caplog.messages[6]

    def test_a_write_whose_reply_was_lost_is_not_a_lost_lock(self) -> None:
        """The etag is out of date then, but the record is still this job's."""
        store = FlakyStore()

        def write_and_fail() -> None:
            MemoryBlobStore.set(store, KEY, simulation.lock.record.to_json())
            raise TimeoutError

        store.script = [write_and_fail]
        simulation = Simulation(store)
        simulation.job(HOUR)
        assert not simulation.lock.lost
        assert list(store) == []

    @pytest.mark.parametrize(("every", "attempts"), [(MINUTE / 3, 8), (25_000, 6)])
    def test_a_store_that_fails_past_the_deadline(
        self, every: float, attempts: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Lost at the deadline, not before and not after; told once, with its cause."""
        store = FlakyStore()
        store.script = [fail] * 100
        simulation = Simulation(store, every)
        acquired_at = simulation.clock.now
        lost_at: list[float] = []

        def pass_time(ms: float) -> None:
            simulation.clock.tick(ms)
            if simulation.lock.lost:
                lost_at.append(simulation.clock.now)

        simulation.pass_time = pass_time
        with pytest.raises(JobLockLostError) as caught:
            simulation.job(HOUR)
        assert lost_at == [acquired_at + LEASE, acquired_at + HOUR]
        assert simulation.lock.record.expires_at == acquired_at + MINUTE
        assert levels(caplog) == ["WARNING"] * attempts + ["ERROR"]
        assert "secret" not in caplog.text
        assert (caught.value.reason, caught.value.current) == ("lease_expired", None)
        assert isinstance(caught.value.__cause__, ConnectionError)
        with pytest.raises(JobLockLostError, match="lease_expired"):
            simulation.lock.check()
        assert store.calls == ["set_if_new"] + ["set_if_match"] * attempts, "it is not released"

    def test_a_renewal_that_hangs_past_the_deadline(self) -> None:
        """Lost while it hangs; its late success changes nothing."""
        store = FlakyStore()
        simulation = Simulation(store)
        seen: list[bool] = []

        def hang() -> None:
            simulation.clock.tick(LEASE - MINUTE / 3 - 1)
            seen.append(simulation.lock.lost)
            simulation.clock.tick(1)
            seen.append(simulation.lock.lost)

        store.script = [hang]
        with pytest.raises(JobLockLostError, match="lease_expired"):
            simulation.job(HOUR)
        assert seen == [False, True]
        assert simulation.lock.lost

    def test_a_late_success_that_nobody_watched(self) -> None:
        """Whether anyone asked meanwhile must not matter."""
        store = FlakyStore()
        simulation = Simulation(store)
        store.script = [lambda: simulation.clock.tick(MINUTE * 2 / 3)]
        with pytest.raises(JobLockLostError, match="lease_expired"):
            simulation.job(HOUR)

    def test_a_failure_before_an_answer_is_no_cause(self) -> None:
        """The store has answered since, and says itself that the lock is gone."""
        store = FlakyStore()
        simulation = Simulation(store)
        store.script = [fail, lambda: joblock.release_job_lock(store, UID, VAULT)]
        with pytest.raises(JobLockLostError, match="lock_already_gone") as caught:
            simulation.job(HOUR)
        assert caught.value.__cause__ is None

    def test_a_failure_that_was_made_good_is_no_cause(self) -> None:
        """The loss is explained by what led to it, not by what a renewal has mended."""
        store = FlakyStore()
        simulation = Simulation(store)
        store.script = [fail, lambda: None, lambda: simulation.clock.tick(MINUTE)]
        with pytest.raises(JobLockLostError, match="lease_expired") as caught:
            simulation.job(HOUR)
        assert caught.value.__cause__ is None

    def test_a_renewed_deadline_counts_from_before_the_write(self) -> None:
        """A write that took ten seconds leaves ten seconds less."""
        store = FlakyStore()
        simulation = Simulation(store)
        store.script = [lambda: simulation.clock.tick(10_000)]
        begun = simulation.monotonic()
        simulation.job(MINUTE / 2)
        assert simulation.lease.deadline == begun + MINUTE / 3 + LEASE

    def test_a_body_that_ends_in_time_has_not_lost_the_lock(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its last renewal may fail, and its release may come after the deadline and fail too."""
        store = FlakyStore()
        store.script = [fail] * 100
        simulation = Simulation(store)

        def outage() -> None:
            simulation.clock.tick(HOUR)
            fail()

        store.before["delete_if_match"] = outage
        simulation.job(LEASE - 1)
        assert not simulation.lock.lost
        assert levels(caplog) == ["WARNING"] * 9
        assert "could not release" in caplog.messages[-1]
        assert "secret" not in caplog.text

    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
    def test_whole_milliseconds_hide_a_fraction(self, fraction: float) -> None:
        """The record's deadline is that much sooner: even then nobody can take over before."""
        real = Clock(1_000_000 + fraction)
        store = MemoryBlobStore()

        def wall() -> int:
            return int(real.now)

        won = acquired(acquire_job_lock(store, UID, VAULT, ttl_ms=20, clock=wall))
        lease = Lease(won, begun=real.now, ttl_ms=20, renew_every_ms=5)
        while not acquire_job_lock(store, UID, VAULT, ttl_ms=20, clock=wall):
            real.tick(0.001)
        assert lease.loss(real.now) is not None

    def test_a_body_that_ends_after_the_deadline_releases_nothing(self) -> None:
        """As if the process had been stopped in between: the lock is another's to take."""
        store = RecordingStore()
        simulation = Simulation(store)
        simulation.pass_time = lambda _: simulation.clock.tick(HOUR)
        with pytest.raises(JobLockLostError, match="lease_expired"):
            simulation.job(MINUTE / 4)
        assert store.calls == ["set_if_new"]

    def test_another_process_does_nothing(self) -> None:
        """A forked child that inherits the loop of a task neither renews nor releases."""
        store = RecordingStore()
        simulation = Simulation(store)
        simulation.keeper._process = 0
        with pytest.raises(JobLockLostError, match="lease_expired"):
            simulation.job(HOUR)
        assert store.calls == ["set_if_new"]

    @pytest.mark.parametrize("late", [False, True], ids=["renewal", "release"])
    def test_another_job_took_over(self, late: bool) -> None:
        """Found out by a renewal or by the release; the other job's record stays."""
        store = RecordingStore()
        simulation = Simulation(store)

        def take_over() -> None:
            store.before.clear()
            far = Clock(simulation.clock.now + 2 * MINUTE)  # a host whose clock is ahead
            assert acquire_job_lock(store, UID, VAULT, clock=far, uuid_factory=lambda: "other")

        store.before["delete_if_match" if late else "set_if_match"] = take_over
        with pytest.raises(JobLockLostError) as caught:
            simulation.job(1000 if late else HOUR)
        assert caught.value.reason == "lock_owned_by_other_job"
        there = peek_job_lock(store, UID, VAULT)
        assert there is not None
        assert there.job_id == "other"
        assert caught.value.current == (None if late else there)
        assert simulation.lock.lost

    @pytest.mark.parametrize("store", [RecordingStore(), PlainStore()], ids=["etags", "plain"])
    @pytest.mark.parametrize("ms", [1000, HOUR], ids=["release", "renewal"])
    def test_the_record_was_deleted(self, store: BlobStore, ms: float) -> None:
        """By an operator, with a release without a job id."""
        simulation = Simulation(store)
        joblock.release_job_lock(store, UID, VAULT)
        with pytest.raises(JobLockLostError, match="lock_already_gone"):
            simulation.job(ms)

    @pytest.mark.parametrize("part", [0.01, 1 / 3, 0.5, 0.9, 0.999])
    def test_every_interval_leaves_room_for_retries(self, part: float) -> None:
        """Also one that is nearly the whole lease."""
        store = FlakyStore()
        store.script = [fail] * 3
        simulation = Simulation(store, MINUTE * part)
        simulation.job(2 * MINUTE)
        assert store.script == []
        assert not simulation.lock.lost

    def test_whoever_can_take_over_finds_the_lock_lost(self) -> None:
        """Under random failures, lost replies and delays, at every moment that a rival tries."""
        taken, kept = 0, 0
        for seed in range(150):
            rng = random.Random(seed)
            if self.rival_wins(rng):
                taken += 1
            else:
                kept += 1
        assert taken > 30
        assert kept > 30

    @staticmethod
    def rival_wins(rng: random.Random) -> bool:
        """Run one schedule; whenever the rival wins, the lock must be lost already."""

        class Unreliable(MemoryBlobStore):
            def set_if_match(self, key: str, value: str, etag: str) -> str | None:
                if rival_acts:
                    return super().set_if_match(key, value, etag)
                slow()
                if rng.random() < badness:
                    fail()
                written = super().set_if_match(key, value, etag)
                slow()
                if rng.random() < badness:
                    fail()
                return written

        badness = rng.choice([0.1, 0.5, 0.8])
        delay = rng.choice([0, 100, 5000, 30_000])
        store = Unreliable()
        simulation = Simulation(store, MINUTE * rng.uniform(0.1, 0.95))
        rival_acts = rival_won = False

        def slow() -> None:
            pass_time(rng.random() * delay)

        def pass_time(ms: float) -> None:
            nonlocal rival_acts, rival_won
            until = simulation.clock.now + ms
            moments = [simulation.clock.now + ms * rng.random() for _ in range(2)]
            there = peek_job_lock(store, UID, VAULT)
            if there is not None and there.expires_at is not None:
                moments += [there.expires_at - 0.5, there.expires_at]
            for moment in sorted(moments):
                if simulation.clock.now <= moment <= until and not rival_won:
                    simulation.clock.now = moment
                    rival_acts = True
                    rival_won = bool(acquire_job_lock(store, UID, VAULT, clock=simulation.clock))
                    rival_acts = False
                    assert not rival_won or simulation.lock.lost
            simulation.clock.now = until

        simulation.pass_time = pass_time
        with contextlib.suppress(JobLockLostError):
            simulation.job(5 * MINUTE)
        return rival_won


Body = Callable[[OwnedJobLock], object]
Hold = Callable[..., None]


def hold_in_a_thread(store: Any, body: Body, **keywords: Any) -> None:
    with hold_job_lock(store, UID, VAULT, **keywords) as lock:
        body(lock)


def hold_in_a_task(store: Any, body: Body, **keywords: Any) -> None:
    async def main() -> None:
        async with aio.hold_job_lock(async_view(store), UID, VAULT, **keywords) as lock:
            await asyncio.to_thread(body, lock)

    asyncio.run(main())


@pytest.fixture(params=[hold_in_a_thread, hold_in_a_task], ids=["sync", "async"])
def hold(request: pytest.FixtureRequest) -> Hold:
    """Run a body in `hold_job_lock`, once blocking and once async."""
    chosen: Hold = request.param
    return chosen


def until_renewed(lock: OwnedJobLock) -> None:
    first = lock.record
    poll(lambda: lock.record != first)


def until_lost(lock: OwnedJobLock) -> None:
    poll(lambda: lock.lost)


OFTEN: dict[str, Any] = {"ttl_ms": 10 * MINUTE, "renew_every_ms": 2}
BRIEF: dict[str, Any] = {"ttl_ms": 300, "renew_every_ms": 10}


class TestHolding:
    """The same for threads and tasks, in real time."""

    def test_renews_in_the_background_and_releases(self, hold: Hold) -> None:
        """The body sees each renewal; afterwards the key is free and the lock was not lost."""
        store = MemoryBlobStore()
        held: list[OwnedJobLock] = []

        def body(lock: OwnedJobLock) -> None:
            held.append(lock)
            assert lock.job_id == "mine"
            assert lock.record.reason == "re-index"
            assert lock.took_over is None
            until_renewed(lock)
            until_renewed(lock)
            lock.check()
            there = peek_job_lock(store, UID, VAULT)
            assert there is not None
            assert there.job_id == "mine"

        hold(store, body, reason="re-index", uuid_factory=lambda: "mine", **OFTEN)
        assert list(store) == []
        assert not held[0].lost

    def test_is_refused_while_another_job_has_the_lock(self, hold: Hold) -> None:
        """With that job's record; nothing is written."""
        store = MemoryBlobStore()
        won = acquired(acquire_job_lock(store, UID, VAULT))
        with pytest.raises(JobLockHeldError) as caught:
            hold(store, pytest.fail)
        assert caught.value.existing == won.record
        assert peek_job_lock(store, UID, VAULT) == won.record

    def test_a_takeover_is_logged(self, hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
        """A job has crashed: somebody should know."""
        store = MemoryBlobStore()
        crashed = acquired(acquire_job_lock(store, UID, VAULT, clock=lambda: 0))
        taken: list[Any] = []

        def body(lock: OwnedJobLock) -> None:
            taken.append(lock.took_over)

        hold(store, body)
        assert taken == [crashed.record]
        assert levels(caplog) == ["WARNING"]
        assert crashed.job_id in caplog.text

    @pytest.mark.parametrize("every", [0, -1, float("nan"), float("inf"), "5", True, 999, 2000])
    def test_an_interval_that_cannot_be(self, hold: Hold, every: Any) -> None:
        """A ValueError before anything is written."""
        store = RecordingStore()
        with pytest.raises(ValueError, match="less than the TTL of 1000 ms"):
            hold(store, pytest.fail, renew_every_ms=every, ttl_ms=1000)
        assert store.calls == []

    def test_the_default_interval_is_a_third_of_the_ttl(self, hold: Hold) -> None:
        """So that an outage of two renewals is survived."""
        waits: list[float] = []

        def body(lock: OwnedJobLock) -> None:
            waits.append(lock._keeper.lease.wait_ms(monotonic_ms()))

        hold(MemoryBlobStore(), body, ttl_ms=HOUR)
        assert HOUR / 4 < waits[0] <= HOUR / 3

    @pytest.mark.parametrize("ttl", [0, -5, "minute", None, float("nan")])
    def test_a_ttl_that_cannot_be_is_the_default(self, hold: Hold, ttl: Any) -> None:
        """As in acquire, also for the interval and for the renewals."""
        leases: list[float] = []

        def body(lock: OwnedJobLock) -> None:
            until_renewed(lock)
            leases.append((lock.record.expires_at or 0) - (lock.record.started_at or 0))

        hold(MemoryBlobStore(), body, ttl_ms=ttl, renew_every_ms=2)
        assert leases[0] >= joblock.JOB_LOCK_TTL_MS

    def test_every_keyword_reaches_the_acquire(self, hold: Hold) -> None:
        """What describes the job, and the clocks' skew, for which a lock is honoured longer."""
        store = MemoryBlobStore()
        told = {"actor_uid": "me", "chunks_to_embed": 5, "estimated_seconds": 7.5, "reason": "r"}
        seen: list[dict[str, Any]] = []

        def body(lock: OwnedJobLock) -> None:
            seen.append({name: getattr(lock.record, name) for name in told})

        hold(store, body, **told)
        assert seen == [told]
        assert acquire_job_lock(store, UID, VAULT, ttl_ms=1000, clock=lambda: 0)
        with pytest.raises(JobLockHeldError):
            hold(store, pytest.fail, clock=lambda: 1500, clock_skew_ms=501)

    def test_a_ttl_beyond_what_a_thread_can_wait_for(self, hold: Hold) -> None:
        """It is a lease like any other."""
        store = MemoryBlobStore()
        hold(store, OwnedJobLock.check, ttl_ms=1e300)
        assert list(store) == []

    def test_a_lease_without_a_deadline_is_lost_at_once(self, hold: Hold) -> None:
        """A deadline that no number can hold is null in the record, which nobody honours."""
        with pytest.raises(JobLockLostError, match="lease_expired"):
            hold(MemoryBlobStore(), until_lost, ttl_ms=1.7e308, clock=lambda: 1.7e308)

    def test_an_acquire_that_takes_longer_than_its_lease(self, hold: Hold) -> None:
        """The first deadline counts from before the write too."""
        store = RecordingStore()
        store.before["set_if_new"] = lambda: time.sleep(0.1)
        lost: list[bool] = []

        def body(lock: OwnedJobLock) -> None:
            lost.append(lock.lost)

        with pytest.raises(JobLockLostError, match="lease_expired"):
            hold(store, body, ttl_ms=90)
        assert lost == [True]

    @pytest.mark.parametrize("missing", ["get", "set", "delete"])
    def test_a_store_that_lacks_a_method(self, missing: str) -> None:
        """Found out before anything is written, also what only the release needs."""
        methods = {"get", "set", "delete"} - {missing}
        lame: Any = type("Lame", (), dict.fromkeys(methods, print))()
        with pytest.raises(TypeError, match=f"lacks {missing}"):
            hold_job_lock(lame, UID, VAULT)
        with pytest.raises(TypeError, match=f"lacks {missing}"):
            aio.hold_job_lock(lame, UID, VAULT)

    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
    def test_a_body_that_raises_releases(self, error: BaseException) -> None:
        """And what it raised goes through as it is."""
        store = MemoryBlobStore()
        with pytest.raises(type(error)) as caught, hold_job_lock(store, UID, VAULT):
            raise error
        assert caught.value is error
        assert not hasattr(error, "__notes__")
        assert list(store) == []

        async def main() -> None:
            with pytest.raises(type(error)) as caught:
                async with aio.hold_job_lock(async_view(store), UID, VAULT):
                    raise error
            assert caught.value is error
            assert not hasattr(error, "__notes__")
            assert list(store) == []

        asyncio.run(main())

    def test_a_body_that_ends_normally_after_a_loss(
        self, hold: Hold, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Silence would hide that two jobs may have overlapped."""
        store = MemoryBlobStore()

        def body(lock: OwnedJobLock) -> None:
            store.delete(KEY)
            assert acquire_job_lock(store, UID, VAULT, uuid_factory=lambda: "other")
            until_lost(lock)

        with pytest.raises(JobLockLostError) as caught:
            hold(store, body, **OFTEN)
        there = peek_job_lock(store, UID, VAULT)
        assert there is not None
        assert there.job_id == "other"
        assert caught.value.current == there
        assert caught.value.__cause__ is None
        assert levels(caplog) == ["ERROR"]

    def test_a_body_that_raises_after_a_loss(self, hold: Hold) -> None:
        """Its exception goes through, with a note."""
        store = MemoryBlobStore()

        def body(lock: OwnedJobLock) -> None:
            store.delete(KEY)
            until_lost(lock)
            raise ValueError("the job's own")

        with pytest.raises(ValueError, match="the job's own") as caught:
            hold(store, body, **OFTEN)
        (note,) = caught.value.__notes__
        assert "lost its lock: lock_already_gone" in note

    def test_a_clock_that_fails_later(self, hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
        """As any failed renewal: told each time, until the lease ends with it as the cause."""
        times = iter([0])
        with pytest.raises(JobLockLostError, match="lease_expired") as caught:
            hold(MemoryBlobStore(), until_lost, clock=lambda: next(times), **BRIEF)
        assert levels(caplog).count("ERROR") == 1
        assert set(levels(caplog)) == {"WARNING", "ERROR"}
        assert caught.value.__cause__ is not None

    def test_a_bug_beside_the_renewal(self, hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
        """Here in a filter of the logger: told, and the lock is released all the same."""

        def broken(record: logging.LogRecord) -> bool:
            if record.levelno == logging.WARNING:
                raise RuntimeError("a bug")
            return True

        def until_logged(_: OwnedJobLock) -> None:
            poll(lambda: levels(caplog))

        store = FlakyStore()
        store.script = [fail]
        logger = logging.getLogger("joblock")
        logger.addFilter(broken)
        try:
            hold(store, until_logged, **OFTEN)
        finally:
            logger.removeFilter(broken)
        assert levels(caplog) == ["ERROR"]
        assert "does not renew" in caplog.text
        assert "builtins.RuntimeError" in caplog.text
        assert list(store) == []

    def test_a_lock_that_is_forgotten(self) -> None:
        """Neither left nor referred to any more: it is not renewed for ever."""
        store = MemoryBlobStore()
        stack = contextlib.ExitStack()
        lock = stack.enter_context(hold_job_lock(store, UID, VAULT, **OFTEN))
        del stack
        gc.collect()
        until_renewed(lock)
        del lock
        gc.collect()
        poll(lambda: list(store) == [])


def inherited(store: BlobStore) -> Keeper:
    """What keeps a lock, as a forked child finds it: its parent's."""
    won = acquired(acquire_job_lock(store, UID, VAULT))
    lease = Lease(won, begun=monotonic_ms(), ttl_ms=MINUTE, renew_every_ms=2)
    keeper = Keeper(async_view(store), UID, VAULT, lease, clock=epoch_ms, now=monotonic_ms)
    keeper._process = os.getppid()
    return keeper


def test_a_block_that_another_process_entered_is_left_as_it_is() -> None:
    """Nothing is released and nothing is raised; tests/integration has real forks."""
    store = MemoryBlobStore()

    async def begin() -> Keeper:
        return inherited(store)

    with hold_module._Hold(begin):
        pass
    assert list(store) == [KEY]

    async def main() -> None:
        async with aio._Hold(begin):
            pass
        assert list(store) == [KEY]

    store.delete(KEY)
    asyncio.run(main())


class TestAThread:
    """What only the blocking one meets."""

    def test_it_is_a_named_daemon(self) -> None:
        """An operator sees whose it is; it does not keep the process alive."""
        with hold_job_lock(MemoryBlobStore(), UID, VAULT):
            assert renewing_threads() == [f"joblock {KEY}"]
            (thread,) = [it for it in threading.enumerate() if it.name.startswith("joblock")]
            assert thread.daemon

    def test_a_thread_that_cannot_start(self) -> None:
        """No thread, no lock."""
        store = MemoryBlobStore()
        usual = threading.stack_size(1 << 46)
        try:
            with pytest.raises(RuntimeError, match="can't start"):
                hold_job_lock(store, UID, VAULT).__enter__()
        finally:
            threading.stack_size(usual)
        assert list(store) == []

    def test_a_store_that_exits_the_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        """Python drops a SystemExit in a thread without a word; here it is told."""
        store = FlakyStore()
        store.script = [lambda: exec("raise SystemExit")]  # noqa: S102
        with hold_job_lock(store, UID, VAULT, **OFTEN):
            poll(lambda: not renewing_threads())
        assert levels(caplog) == ["ERROR"]
        assert "builtins.SystemExit" in caplog.text
        assert list(store) == []

    def test_a_thread_that_is_gone_is_the_cause_of_the_loss(self) -> None:
        """Whoever gets the error sees why nobody renewed."""
        store = FlakyStore()
        store.script = [lambda: exec("raise SystemExit")]  # noqa: S102
        with (
            pytest.raises(JobLockLostError, match="lease_expired") as caught,
            hold_job_lock(store, UID, VAULT, **BRIEF) as lock,
        ):
            until_lost(lock)
        assert isinstance(caught.value.__cause__, SystemExit)

    def test_a_release_that_exits_the_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        """The job is done: that is no error for it, but it is told."""
        store = FlakyStore()
        store.before["delete_if_match"] = lambda: exec("raise SystemExit")  # noqa: S102
        with hold_job_lock(store, UID, VAULT):
            pass
        assert levels(caplog) == ["WARNING", "ERROR"]

    def test_a_hanging_renewal(self, caplog: pytest.LogCaptureFixture) -> None:
        """The loss is noticed while it hangs, and leaving does not wait for it."""
        store = FlakyStore()
        answer = threading.Event()
        store.script = [lambda: answer.wait(30)]
        try:
            with (
                pytest.raises(JobLockLostError, match="lease_expired"),
                hold_job_lock(store, UID, VAULT, **BRIEF) as lock,
            ):
                until_lost(lock)
            assert not answer.is_set()
            assert renewing_threads()
        finally:
            answer.set()
        assert levels(caplog) == ["ERROR"]

    def test_a_body_that_ends_while_a_renewal_hangs(self, caplog: pytest.LogCaptureFixture) -> None:
        """Leaving waits for the deadline and no longer; the job was done in time."""
        store, hanging, answer = store_that_hangs()
        try:
            with hold_job_lock(store, UID, VAULT, ttl_ms=750, renew_every_ms=1) as lock:
                assert hanging.wait(30)
                assert not lock.lost
            assert not answer.is_set()
            assert levels(caplog) == ["WARNING"]
            assert "no answer from the store" in caplog.text
        finally:
            answer.set()
        poll(lambda: list(store) == [])  # and once it answers, the lock is released late
        assert not lock.lost

    def test_what_a_signal_handler_raises_while_leaving(self) -> None:
        """It goes on when the lock has been released, as in tests/integration with Ctrl-C."""

        class TimeLimitError(Exception):
            pass

        def end(*_: object) -> None:
            raise TimeLimitError

        class Slow(MemoryBlobStore):
            def delete_if_match(self, key: str, etag: str) -> bool:
                signal.pthread_kill(main, signal.SIGUSR1)
                time.sleep(0.1)
                return super().delete_if_match(key, etag)

        store = Slow()
        main = threading.get_ident()
        before = signal.signal(signal.SIGUSR1, end)
        try:
            with pytest.raises(TimeLimitError), hold_job_lock(store, UID, VAULT):
                pass
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert list(store) == []

    def test_at_the_end_of_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other thread does not run any more, so this one releases the lock."""
        store, hanging, answer = store_that_hangs()
        try:
            with hold_job_lock(store, UID, VAULT, ttl_ms=10 * MINUTE, renew_every_ms=1) as lock:
                assert hanging.wait(30)
                monkeypatch.setattr("sys.is_finalizing", lambda: True)
            assert list(store) == []
            assert not lock.lost
        finally:
            answer.set()

    def test_in_a_generator_that_is_collected_during_a_renewal(self) -> None:
        """By the very thread that renews, which cannot wait for itself: it releases afterwards."""

        class Collecting(MemoryBlobStore):
            def set_if_match(self, key: str, value: str, etag: str) -> str | None:
                gc.collect()
                return super().set_if_match(key, value, etag)

        store = Collecting()

        def steps() -> Iterator[int]:
            with hold_job_lock(store, UID, VAULT, ttl_ms=10 * MINUTE, renew_every_ms=100):
                yield 1
                yield 2

        class Node:
            steps: Iterator[int]

        node = Node()
        node.steps = steps()
        setattr(node, "itself", node)  # noqa: B010
        gc.disable()
        try:
            assert next(node.steps) == 1
            del node
            poll(lambda: list(store) == [])
        finally:
            gc.enable()

    def test_in_generators_and_exit_stacks(self) -> None:
        """However the block is left."""
        store = MemoryBlobStore()

        def steps() -> Iterator[int]:
            with hold_job_lock(store, UID, VAULT):
                yield 1
                yield 2

        generator = steps()
        assert next(generator) == 1
        assert list(store) == [KEY]
        del generator
        assert list(store) == []
        with contextlib.ExitStack() as stack:
            for vault in ("a", "b"):
                stack.enter_context(hold_job_lock(store, UID, vault))
            assert len(store) == 2
        assert list(store) == []

    def test_is_not_a_decorator(self) -> None:
        """One call, one lock: a decorated function would share it between its calls."""
        assert not callable(hold_job_lock(MemoryBlobStore(), UID, VAULT))

    def test_is_for_one_block(self) -> None:
        """Entered again, in it or after it, it would mix up two jobs."""
        store = MemoryBlobStore()
        hold = hold_job_lock(store, UID, VAULT)
        with hold, pytest.raises(RuntimeError, match="has been entered"), hold:
            pytest.fail("entered twice")
        with pytest.raises(RuntimeError, match="has been entered"), hold:
            pytest.fail("entered again")
        assert list(store) == []


class AsyncFlaky(AsyncConditionalView):
    """An async store whose renewals or releases wait for an event of the test."""

    def __init__(self) -> None:
        super().__init__(MemoryBlobStore())
        self.called = asyncio.Event()
        self.answer = asyncio.Event()
        self.hanging = ""

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        await self._hang("renewal")
        return await super().set_if_match(key, value, etag)

    async def delete_if_match(self, key: str, etag: str) -> bool:
        await self._hang("release")
        return await super().delete_if_match(key, etag)

    async def _hang(self, what: str) -> None:
        if what == self.hanging:
            self.called.set()
            await self.answer.wait()

    async def is_free(self) -> bool:
        return await self.get(KEY) is None


def run(main: Callable[[AsyncFlaky], Awaitable[None]]) -> None:
    async def with_a_store() -> None:
        await main(AsyncFlaky())

    asyncio.run(with_a_store())


def only_this_task() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


class TestATask:
    """What only the async one meets."""

    def test_a_task_that_is_cancelled_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        """By a body that cancels all that it finds; leaving releases all the same."""

        async def main(store: AsyncFlaky) -> None:
            async with aio.hold_job_lock(store, UID, VAULT):
                await asyncio.sleep(0)
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                await asyncio.sleep(0.01)
                assert levels(caplog) == ["ERROR"]
                assert "does not renew" in caplog.text
            assert await store.is_free()

        run(main)

    def test_a_store_that_does_not_heed_cancellation(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Leaving ends shortly after the deadline, and says that the store did not answer."""

        async def main(store: AsyncFlaky) -> None:
            heedless = asyncio.Event()

            async def set_if_match(key: str, value: str, etag: str) -> str | None:
                store.called.set()
                while not heedless.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await heedless.wait()
                return None

            store.set_if_match = set_if_match  # type: ignore[method-assign]

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT, **BRIEF):
                    await asyncio.sleep(0.4)

            with pytest.raises(JobLockLostError, match="lease_expired"):
                await job()
            heedless.set()

        run(main)
        assert "ERROR" in levels(caplog)

    def test_a_cancelled_body_releases(self) -> None:
        """And the cancellation goes through."""

        async def main(store: AsyncFlaky) -> None:
            entered = asyncio.Event()

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT):
                    entered.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(job())
            await entered.wait()
            task.cancel("stop")
            with pytest.raises(asyncio.CancelledError, match="stop"):
                await task
            assert await store.is_free()
            assert only_this_task()

        run(main)

    @pytest.mark.parametrize("times", [1, 2, 3])
    @pytest.mark.parametrize("hanging", ["release", "renewal"])
    def test_a_body_that_is_cancelled_while_leaving(self, times: int, hanging: str) -> None:
        """However often: the store answers first, then the cancellation goes on."""

        async def main(store: AsyncFlaky) -> None:
            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT, **OFTEN):
                    store.hanging = hanging
                    if hanging == "renewal":
                        await store.called.wait()

            task = asyncio.create_task(job())
            await store.called.wait()
            for _ in range(times):
                await asyncio.sleep(0.001)
                task.cancel()
            await asyncio.sleep(0.001)
            assert not task.done()
            store.answer.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelling() == times
            assert await store.is_free()
            assert only_this_task()

        run(main)

    def test_a_cancelled_body_whose_lock_was_lost(self) -> None:
        """The cancellation carries the note."""

        async def main(store: AsyncFlaky) -> None:
            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT):
                    await store.delete(KEY)
                    raise asyncio.CancelledError

            with pytest.raises(asyncio.CancelledError) as caught:
                await job()
            assert "lock_already_gone" in caught.value.__notes__[0]

        run(main)

    def test_a_loss_that_is_found_while_a_cancellation_waits(self) -> None:
        """The body had ended normally, but the cancellation comes first and carries the note."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = "release"

            async def job() -> list[str]:
                try:
                    async with aio.hold_job_lock(store, UID, VAULT):
                        pass
                except asyncio.CancelledError as error:
                    return error.__notes__
                return []

            task = asyncio.create_task(job())
            await store.called.wait()
            task.cancel()
            await store.delete(KEY)
            store.answer.set()
            (note,) = await task
            assert "lock_already_gone" in note

        run(main)

    def test_a_cancellation_comes_before_what_the_body_raised(self) -> None:
        """It is what goes on, so it carries the note of the loss."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = "release"

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT):
                    raise ValueError

            task = asyncio.create_task(job())
            await store.called.wait()
            task.cancel()
            await store.delete(KEY)
            store.answer.set()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert "lock_already_gone" in caught.value.__notes__[0]

        run(main)

    def test_without_asyncio(self) -> None:
        """Found out before the lock is taken: nobody could renew it."""
        store = MemoryBlobStore()
        with pytest.raises(RuntimeError, match="no running event loop"):
            await_now(aio.hold_job_lock(async_view(store), UID, VAULT).__aenter__())
        assert list(store) == []

    def test_a_task_that_always_dies(self, caplog: pytest.LogCaptureFixture) -> None:
        """Here of a logger's filter: leaving gives up instead of trying for ever."""
        died: list[asyncio.Future[None]] = []

        def broken(record: logging.LogRecord) -> bool:
            task = asyncio.current_task()
            assert task is not None
            died.append(task)
            raise RuntimeError("a bug")

        async def main(store: AsyncFlaky) -> None:
            assert acquire_job_lock(store.conditional, UID, VAULT, ttl_ms=1, clock=lambda: 0)
            async with aio.hold_job_lock(store, UID, VAULT, ttl_ms=3000):
                logger.addFilter(broken)
                await asyncio.sleep(0)
                await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})

        logger = logging.getLogger("joblock")
        try:
            with pytest.raises(RuntimeError, match="a bug"):
                run(main)
        finally:
            logger.removeFilter(broken)
        assert 1 < len({id(task) for task in died}) < 10
        for task in died:
            if task.done():
                task.exception()

    def test_an_event_loop_that_shuts_down(self) -> None:
        """`asyncio.run` cancels every task at once, the renewing one too: still released."""
        store = MemoryBlobStore()

        async def job(entered: asyncio.Event) -> None:
            async with aio.hold_job_lock(async_view(store), UID, VAULT):
                entered.set()
                await asyncio.Event().wait()

        async def main() -> asyncio.Task[None]:
            entered = asyncio.Event()
            task = asyncio.create_task(job(entered))
            await entered.wait()
            assert list(store) == [KEY]
            return task

        assert asyncio.run(main()).cancelled()
        assert list(store) == []

    def test_a_hanging_renewal(self, caplog: pytest.LogCaptureFixture) -> None:
        """The loss is noticed while it hangs; leaving cancels it."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = "renewal"
            with pytest.raises(JobLockLostError, match="lease_expired"):
                async with aio.hold_job_lock(store, UID, VAULT, **BRIEF) as lock:
                    await asyncio.to_thread(until_lost, lock)
            assert only_this_task()

        run(main)
        assert levels(caplog) == ["ERROR"]

    @pytest.mark.parametrize("hanging", ["release", "renewal"])
    def test_a_body_that_ends_while_the_store_hangs(
        self, hanging: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Leaving waits for the deadline and no longer; the job was done in time."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = hanging
            async with aio.hold_job_lock(
                store, UID, VAULT, ttl_ms=500, renew_every_ms=1 if hanging == "renewal" else 498
            ) as lock:
                if hanging == "renewal":
                    await store.called.wait()
            assert not lock.lost
            assert only_this_task()
            assert not await store.is_free()

        run(main)
        assert levels(caplog) == ["WARNING"]
        assert "could not release" in caplog.text

    def test_a_renewal_in_a_thread_does_not_undo_the_release(self) -> None:
        """Cancelled at the deadline, it goes on in its thread, where its etag is refused."""
        store, hanging, answer = store_that_hangs()

        async def main() -> None:
            threaded = aio.ThreadedBlobStore(store)
            async with aio.hold_job_lock(threaded, UID, VAULT, ttl_ms=500, renew_every_ms=1):
                await asyncio.to_thread(hanging.wait, 30)
            joblock.release_job_lock(store, UID, VAULT)
            answer.set()

        asyncio.run(main())
        assert list(store) == []

    def test_in_a_task_group(self) -> None:
        """A sibling that fails cancels the job, whose lock is released."""

        async def main(store: AsyncFlaky) -> None:
            entered = asyncio.Event()

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT, **OFTEN) as lock:
                    await asyncio.to_thread(until_renewed, lock)
                    entered.set()
                    await asyncio.Event().wait()

            async def sibling() -> None:
                await entered.wait()
                raise ValueError

            async def both() -> None:
                async with asyncio.TaskGroup() as group:
                    group.create_task(job())
                    group.create_task(sibling())

            with pytest.raises(ExceptionGroup):
                await both()
            assert await store.is_free()

        run(main)

    def test_with_a_timeout(self) -> None:
        """`asyncio.timeout` around the block works as ever."""

        async def main(store: AsyncFlaky) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), aio.hold_job_lock(store, UID, VAULT):
                    await asyncio.Event().wait()
            assert await store.is_free()

        run(main)

    def test_in_an_async_generator_that_nobody_closes(self) -> None:
        """The event loop does, after it has cancelled the renewing task: still released."""
        store = MemoryBlobStore()

        async def steps() -> AsyncIterator[int]:
            async with aio.hold_job_lock(async_view(store), UID, VAULT):
                yield 1
                yield 2

        generator = steps()

        async def main() -> None:
            assert await anext(generator) == 1
            assert list(store) == [KEY]

        asyncio.run(main())
        assert list(store) == []

    def test_a_lock_that_is_forgotten(self) -> None:
        """Its task stops as the thread does."""

        async def main(store: AsyncFlaky) -> None:
            hold = aio.hold_job_lock(store, UID, VAULT, **OFTEN)
            await hold.__aenter__()
            del hold
            gc.collect()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait_for(asyncio.gather(*others), 30)
            assert await store.is_free()

        run(main)
