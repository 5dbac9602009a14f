"""The rules of a lease: the real loop, kept under a simulated clock."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

import joblock
from joblock import (
    BlobStore,
    JobLockLostError,
    MemoryBlobStore,
    OwnedJobLock,
    _log,
    acquire_job_lock,
    peek_job_lock,
)
from joblock._lease import Lease
from tests.holding import (
    HOUR,
    LEASE,
    MINUTE,
    FlakyStore,
    fail,
    levels,
    make_keeper,
)
from tests.support import (
    KEY,
    UID,
    VAULT,
    BareClock,
    PlainStore,
    RecordingStore,
    acquired,
    await_now,
)


class Simulation:
    """A lock with a TTL of a minute, kept by the real loop while only simulated time passes.

    The wall clock and the monotonic clock run alike, with different origins.
    """

    def __init__(self, store: BlobStore, renew_every_ms: float = MINUTE / 3) -> None:
        self.store = store
        self.clock = BareClock()
        self.keeper = make_keeper(
            store,
            ttl_ms=MINUTE,
            renew_every_ms=renew_every_ms,
            clock=self.clock,
            now=self.monotonic,
        )
        await_now(self.keeper.enter(self.wait))
        self.keeper.begun = True
        self.lease = self.keeper.lease
        self.lock = OwnedJobLock(self.keeper)
        self.pass_time: Callable[[float], None] = self.clock.advance

    def monotonic(self) -> float:
        return self.clock.now - 999_000

    async def wait(self, seconds: float) -> None:
        self.pass_time(seconds * 1000)

    def job(self, duration_ms: float) -> None:
        """Run a job that lasts so long, and leave."""
        end = self.clock.now + duration_ms

        async def wait(seconds: float) -> None:
            self.pass_time(max(0, min(seconds * 1000, end - self.clock.now)))
            if self.clock.now >= end:
                self.keeper.end()

        await_now(self.keeper.keep(wait))
        if self.clock.now < end:  # lost: the body goes on regardless
            self.pass_time(end - self.clock.now)
            self.keeper.end()
        self.keeper.leave(None)


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
                simulation.clock.advance(1000)
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
            simulation.clock.advance(ms)
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
            simulation.clock.advance(LEASE - MINUTE / 3 - 1)
            seen.append(simulation.lock.lost)
            simulation.clock.advance(1)
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
        store.script = [lambda: simulation.clock.advance(MINUTE * 2 / 3)]
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
        store.script = [fail, lambda: None, lambda: simulation.clock.advance(MINUTE)]
        with pytest.raises(JobLockLostError, match="lease_expired") as caught:
            simulation.job(HOUR)
        assert caught.value.__cause__ is None

    def test_a_renewed_deadline_counts_from_before_the_write(self) -> None:
        """A write that took ten seconds leaves ten seconds less."""
        store = FlakyStore()
        simulation = Simulation(store)
        store.script = [lambda: simulation.clock.advance(10_000)]
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
            simulation.clock.advance(HOUR)
            fail()

        store.before["delete_if_match"] = outage
        simulation.job(LEASE - 1)
        assert not simulation.lock.lost
        assert levels(caplog) == ["WARNING"] * 9
        assert f"job {simulation.lock.job_id!r} could not release" in caplog.messages[-1]
        assert "secret" not in caplog.text

    @pytest.mark.slow
    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
    def test_whole_milliseconds_hide_a_fraction(self, fraction: float) -> None:
        """The record's deadline is that much sooner: even then nobody can take over before."""
        real = BareClock(1_000_000 + fraction)
        store = MemoryBlobStore()

        def wall() -> int:
            return int(real.now)

        won = acquired(acquire_job_lock(store, UID, VAULT, ttl_ms=20, clock=wall))
        lease = Lease(won, begun=real.now, ttl_ms=20, renew_every_ms=5)
        while not acquire_job_lock(store, UID, VAULT, ttl_ms=20, clock=wall):
            real.advance(0.001)
        assert lease.loss(real.now) is not None

    def test_a_body_that_ends_after_the_deadline_releases_nothing(self) -> None:
        """As if the process had been stopped in between: the lock is another's to take."""
        store = RecordingStore()
        simulation = Simulation(store)
        simulation.pass_time = lambda _: simulation.clock.advance(HOUR)
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
            far = BareClock(simulation.clock.now + 2 * MINUTE)  # a host whose clock is ahead
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

    @pytest.mark.slow
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


def test_entering_that_nobody_runs_any_more() -> None:
    """It ends where it waits for the store, without asking it for more."""
    keeper = make_keeper(PlainStore())
    steps: list[str] = []

    async def take(*_: object, **__: object) -> Any:
        steps.append("waits")
        await Forever()

    async def wait(_: float) -> None:
        pytest.fail("the lock is not held")

    keeper._take = take
    entering = keeper.enter(wait)
    entering.send(None)
    entering.close()
    assert steps == ["waits"]
    assert not keeper.finished


class Forever:
    def __await__(self) -> Generator[None]:
        yield


def test_who_asks_whether_a_lock_is_held_logs_nothing_without_logging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody can have asked to hear it."""
    monkeypatch.delitem(sys.modules, "logging")
    _log.debug("said to nobody")
    assert "logging" not in sys.modules
