"""A job's whole way: taken, queued, resumed, requeued, ended; blocking and async."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from joblock import (
    HOLD_TTL_MS,
    JOB_LOCK_TTL_MS,
    Blob,
    InvalidIdError,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    MemoryBlobStore,
    OwnedJobLock,
    StoreContentionError,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
    release_job_lock,
    renew_job_lock,
    resume_job_lock,
)
from tests.holding import (
    HOUR,
    MINUTE,
    OFTEN,
    FlakyStore,
    assert_logged,
    fail,
    until_lost,
    until_renewed,
)
from tests.support import (
    KEY,
    UID,
    VAULT,
    Api,
    AsyncApi,
    Clock,
    PlainStore,
    RecordingStore,
    SyncApi,
    acquired,
    async_view,
    held,
)

Body = Callable[[OwnedJobLock], object]
Resume = Callable[..., None]


def resume_in_a_thread(store: Any, job_id: str, body: Body, **keywords: Any) -> None:
    with resume_job_lock(store, UID, VAULT, expected_job_id=job_id, **keywords) as lock:
        body(lock)


def resume_in_a_task(store: Any, job_id: str, body: Body, **keywords: Any) -> None:
    async def main() -> None:
        resuming = aio.resume_job_lock(
            async_view(store), UID, VAULT, expected_job_id=job_id, **keywords
        )
        async with resuming as lock:
            await asyncio.to_thread(body, lock)

    asyncio.run(main())


@pytest.fixture(params=[resume_in_a_thread, resume_in_a_task], ids=["sync", "async"])
def resume(request: pytest.FixtureRequest) -> Resume:
    """Run a body in `resume_job_lock`, once blocking and once async."""
    chosen: Resume = request.param
    return chosen


@pytest.fixture(params=[SyncApi, AsyncApi], ids=["sync", "async"])
def api(request: pytest.FixtureRequest) -> Api:
    """The functions, once blocking and once async."""
    chosen: Api = request.param
    return chosen


def nothing(_: OwnedJobLock) -> None:
    pass


def never(lock: OwnedJobLock) -> None:
    pytest.fail(f"entered: {lock.record}")


def there(store: Any) -> JobLockRecord:
    record = peek_job_lock(store, UID, VAULT)
    assert record is not None
    return record


def crashed_run(store: Any, job_id: str, clock: Clock) -> JobLockRecord:
    """A run that was killed: its record, which is not live any more."""
    dead = there(store).__replace__(run_id="dead", expires_at=clock.now + MINUTE)
    assert dead.job_id == job_id
    store.set(KEY, dead.to_json())
    clock.advance(MINUTE)
    return dead


class TestResuming:
    """The worker that a job was handed to."""

    @pytest.mark.parametrize("make", [RecordingStore, PlainStore])
    def test_from_the_click_to_the_end(self, resume: Resume, make: type[Any]) -> None:
        """The record gets a run's id and a short lease; all else stays; it is gone in the end."""
        store = make()
        clock = Clock()
        taken = acquired(
            acquire_job_lock(store, UID, VAULT, reason="r", extra={"task": 7}, clock=clock)
        ).record
        clock.advance(5000)
        seen: list[tuple[str, JobLockRecord, JobLockRecord | None]] = []

        def body(lock: OwnedJobLock) -> None:
            seen.append((lock.job_id, lock.record, lock.took_over))
            assert there(store) == lock.record

        resume(store, str(taken.job_id), body, clock=clock, uuid_factory=lambda: "run-1")
        running = taken.__replace__(run_id="run-1", expires_at=clock.now + HOLD_TTL_MS)
        assert seen == [(taken.job_id, running, None)]
        assert running.to_json().endswith('"runId":"run-1","task":7}')
        assert peek_job_lock(store, UID, VAULT) is None

    def test_the_number_of_requests(self) -> None:
        """Two to enter, one for each renewal, one to release."""
        store = RecordingStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        store.calls.clear()
        with resume_job_lock(store, UID, VAULT, expected_job_id=lock.job_id):
            pass
        assert store.calls == ["get_with_etag", "set_if_match", "delete_if_match"]

    def test_it_is_renewed(self, resume: Resume) -> None:
        """As a hold, and the run's id stays."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))

        def body(running: OwnedJobLock) -> None:
            run_id = running.record.run_id
            assert run_id
            until_renewed(running)
            until_renewed(running)
            assert there(store).run_id == run_id

        resume(store, lock.job_id, body, **OFTEN)
        assert list(store) == []

    def test_a_second_delivery_while_the_first_runs(self, resume: Resume) -> None:
        """It is refused with the first one's record, and touches nothing."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))

        def body(running: OwnedJobLock) -> None:
            before = store.get(KEY)
            with pytest.raises(JobLockHeldError) as refused:
                resume_in_a_thread(store, lock.job_id, never)
            assert refused.value.existing == running.record
            assert 1 <= refused.value.retry_after_s() <= 60
            assert store.get(KEY) == before

        resume(store, lock.job_id, body)

    def test_the_next_run_after_a_crash(
        self, resume: Resume, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It gets the dead run's record, and somebody should know."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        dead = crashed_run(store, lock.job_id, clock)
        caplog.clear()
        seen: list[Any] = []

        def body(running: OwnedJobLock) -> None:
            seen.append((running.took_over, running.record.run_id != dead.run_id))

        resume(store, lock.job_id, body, clock=clock)
        assert seen == [(dead, True)]
        assert_logged(caplog, "WARNING")
        assert f"since run {dead.run_id!r} died" in caplog.text

    def test_the_clocks_skew(self, resume: Resume) -> None:
        """A run is honoured longer by whoever says so."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        crashed_run(store, lock.job_id, clock)
        with pytest.raises(JobLockHeldError) as refused:
            resume(store, lock.job_id, never, clock=clock, clock_skew_ms=500)
        assert refused.value.clock_skew_ms == 500
        resume(store, lock.job_id, nothing, clock=clock)

    def test_a_lock_whose_time_in_the_queue_is_over(self, resume: Resume) -> None:
        """Nobody has taken it over, so the job is still to be run."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        clock.advance(HOUR)
        seen: list[Any] = []

        def body(running: OwnedJobLock) -> None:
            seen.append(running.took_over)

        resume(store, lock.job_id, body, clock=clock)
        assert seen == [None]

    @pytest.mark.parametrize("make", [RecordingStore, PlainStore])
    @pytest.mark.parametrize(
        ("stored", "reason"),
        [
            (None, "lock_already_gone"),
            ("no record{", "lock_already_gone"),
            (JobLockRecord("another", UID, VAULT, expires_at=1e15), "lock_owned_by_other_job"),
            (JobLockRecord("another", UID, VAULT, expires_at=0), "lock_owned_by_other_job"),
            (JobLockRecord("j", UID, VAULT, expires_at=1e15, ended_at=5), "lock_already_gone"),
            (JobLockRecord("j", UID, VAULT, expires_at=0, ended_at=5), "lock_already_gone"),
        ],
    )
    def test_a_late_delivery(
        self, resume: Resume, make: type[Any], stored: JobLockRecord | str | None, reason: str
    ) -> None:
        """A job that is over, or superseded, does not begin, and nothing is written."""
        store = make()
        text = stored.to_json() if isinstance(stored, JobLockRecord) else stored
        if text is not None:
            store.set(KEY, text)
        with pytest.raises(JobLockLostError) as late:
            resume(store, "j", never)
        assert (late.value.job_id, late.value.reason) == ("j", reason)
        assert late.value.current == (stored if isinstance(stored, JobLockRecord) else None)
        assert store.get(KEY) == text

    def test_a_failed_read_is_not_a_lost_lock(self, resume: Resume) -> None:
        """Also on a plain store: the job is to be delivered again."""

        class Down(PlainStore):
            def get(self, key: str) -> str | None:
                raise ConnectionError

        with pytest.raises(ConnectionError):
            resume(Down(), "j", never)

    def test_one_of_many_deliveries(self) -> None:
        """Whoever writes first; the others read again and are refused."""
        store = RecordingStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        first = resume_job_lock(store, UID, VAULT, expected_job_id=lock.job_id)
        won: list[OwnedJobLock] = []
        store.once_before("set_if_match", lambda: won.append(first.__enter__()))
        with pytest.raises(JobLockHeldError) as refused:
            resume_in_a_thread(store, lock.job_id, never)
        assert refused.value.existing == won[0].record
        first.__exit__(None, None, None)
        assert list(store) == []

    def test_a_record_that_always_changes(self) -> None:
        """It gives up after a bounded number of tries."""
        store = RecordingStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        store.before["set_if_match"] = lambda: store.set(KEY, lock.record.to_json())
        with pytest.raises(StoreContentionError):
            resume_in_a_thread(store, lock.job_id, never)

    @pytest.mark.parametrize("job_id", ["", None, 5])
    def test_a_job_id_that_cannot_be(self, resume: Resume, job_id: Any) -> None:
        """Found out before the store is asked."""
        store = RecordingStore()
        with pytest.raises(InvalidIdError):
            resume(store, job_id, never)
        assert store.calls == []

    def test_a_run_id_that_cannot_be(self, resume: Resume) -> None:
        """As a job's id."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        with pytest.raises(InvalidIdError, match="uuid_factory's run id must be a non-empty"):
            resume(store, lock.job_id, never, uuid_factory=lambda: "")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"ttl_ms": 0},
            {"ttl_ms": 1000, "renew_every_ms": 1000},
            {"at_least_ms": -1},
            {"at_least_ms": float("inf")},
            {"at_most_ms": 0},
            {"at_most_ms": "1h"},
            {"at_least_ms": 2000, "at_most_ms": 1000},
            {"clock_skew_ms": -1},
        ],
    )
    def test_times_that_cannot_be(self, resume: Resume, wrong: dict[str, Any]) -> None:
        """A ValueError that names one of them, before anything is written."""
        store = RecordingStore()
        (named, *_) = wrong
        with pytest.raises(ValueError, match="_ms") as error:
            resume(store, "j", never, **wrong)
        assert named in str(error.value) or "renew_every_ms" in wrong
        assert store.calls == []


class TestOfTwoRuns:
    """What is not this run's any more is not touched by it."""

    @pytest.mark.parametrize("leaving", ["release", "requeue"])
    def test_a_run_that_was_thought_dead(self, resume: Resume, leaving: str) -> None:
        """Its clock stood still, say: the next run has the lock, and keeps it."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        others = [""]

        def body(running: OwnedJobLock) -> None:
            others[0] = running.record.__replace__(run_id="the next").to_json()
            store.set(KEY, others[0])
            if leaving == "requeue":
                running.requeue()

        with pytest.raises(JobLockLostError) as lost:
            resume(store, lock.job_id, body)
        assert lost.value.reason == "lock_owned_by_other_job"
        assert store.get(KEY) == others[0]

    def test_its_renewal_finds_it_lost(self, resume: Resume) -> None:
        """And the next run's record stays as it is."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        others = [""]

        def body(running: OwnedJobLock) -> None:
            others[0] = running.record.__replace__(run_id="the next").to_json()
            store.set(KEY, others[0])
            until_lost(running)

        with pytest.raises(JobLockLostError) as lost:
            resume(store, lock.job_id, body, **OFTEN)
        assert lost.value.current == JobLockRecord.from_json(others[0])
        assert store.get(KEY) == others[0]

    def test_a_hold_whose_job_was_resumed_by_another(self) -> None:
        """The lock is that of the run then, not of the hold."""
        store = MemoryBlobStore()
        hold = hold_job_lock(store, UID, VAULT)
        resumed = resume_job_lock(store, UID, VAULT, expected_job_id=hold.__enter__().job_id)
        run = resumed.__enter__()
        with pytest.raises(JobLockLostError):
            hold.__exit__(None, None, None)
        assert there(store) == run.record
        resumed.__exit__(None, None, None)
        assert list(store) == []


class TestRequeue:
    """For a retry: the lock stays the job's, and no run has it."""

    @pytest.mark.parametrize("make", [RecordingStore, PlainStore])
    def test_it_can_be_resumed(self, resume: Resume, make: type[Any]) -> None:
        """By the next delivery, also where the block raises; another click is refused."""
        store = make()
        clock = Clock()
        taken = acquired(acquire_job_lock(store, UID, VAULT, clock=clock)).record
        job_id = str(taken.job_id)
        clock.advance(HOUR)

        def body(running: OwnedJobLock) -> None:
            running.requeue()
            raise ConnectionError

        with pytest.raises(ConnectionError):
            resume(store, job_id, body, clock=clock)
        assert there(store) == taken.__replace__(expires_at=clock.now + JOB_LOCK_TTL_MS)
        assert not acquire_job_lock(store, UID, VAULT, clock=clock)
        seen: list[Any] = []

        def again(running: OwnedJobLock) -> None:
            seen.append(running.took_over)

        resume(store, job_id, again, clock=clock)
        assert seen == [None]
        assert store.get(KEY) is None

    def test_for_so_long(self, resume: Resume) -> None:
        """From the end of the block, in milliseconds or as a timedelta."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))

        def body(running: OwnedJobLock) -> None:
            running.requeue(ttl_ms=timedelta(hours=2))
            clock.advance(1000)

        resume(store, lock.job_id, body, clock=clock)
        assert there(store).expires_at == clock.now + 2 * HOUR

    def test_never_shorter_than_before(self, resume: Resume) -> None:
        """Others count on the deadline that they have read, and on the minimum hold."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))

        def body(running: OwnedJobLock) -> None:
            running.requeue(ttl_ms=1)

        resume(store, lock.job_id, body, clock=clock)
        assert there(store).expires_at == clock.now + HOLD_TTL_MS
        resume(store, lock.job_id, body, clock=clock, at_least_ms=HOUR)
        assert there(store).expires_at == clock.now + HOUR

    def test_of_a_hold(self) -> None:
        """A job that began without a queue can go on in one."""
        store = MemoryBlobStore()
        with hold_job_lock(store, UID, VAULT) as lock:
            lock.requeue()
        resume_in_a_thread(store, lock.job_id, nothing)
        assert list(store) == []

    def test_of_a_lock_that_is_lost(self, resume: Resume) -> None:
        """Nothing is written."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))

        def body(running: OwnedJobLock) -> None:
            store.delete(KEY)
            running.requeue()

        with pytest.raises(JobLockLostError) as lost:
            resume(store, lock.job_id, body)
        assert lost.value.reason == "lock_already_gone"
        assert list(store) == []

    def test_that_fails(self, resume: Resume, caplog: pytest.LogCaptureFixture) -> None:
        """It is logged; the run's lease must end before the next run."""
        store = FlakyStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))

        def body(running: OwnedJobLock) -> None:
            store.script = [fail]
            running.requeue()

        resume(store, lock.job_id, body)
        assert_logged(caplog, "WARNING")
        assert "the lease will expire" in caplog.text
        assert there(store).run_id is not None

    @pytest.mark.parametrize("ttl", [0, -1, "1h", None])
    def test_a_ttl_that_cannot_be(self, resume: Resume, ttl: Any) -> None:
        """A ValueError in the block; the lock is released then."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))

        def body(running: OwnedJobLock) -> None:
            running.requeue(ttl_ms=ttl)

        with pytest.raises(ValueError, match="^ttl_ms "):
            resume(store, lock.job_id, body)
        assert list(store) == []

    def test_after_the_block(self, resume: Resume) -> None:
        """Too late, and said so."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        left: list[OwnedJobLock] = []
        resume(store, lock.job_id, left.append)
        with pytest.raises(RuntimeError, match="the block is over"):
            left[0].requeue()


class TestTakingBack:
    """Entering that fails leaves the job to its next delivery."""

    @pytest.mark.parametrize("dead", [False, True], ids=["taken", "after a dead run"])
    def test_a_write_whose_answer_was_lost(self, resume: Resume, dead: bool) -> None:
        """The record that it replaced is written back, byte for byte."""

        class Lossy(MemoryBlobStore):
            lose = False

            def set_if_match(self, key: str, value: str, etag: str) -> str | None:
                new = super().set_if_match(key, value, etag)
                if self.lose:
                    self.lose = False
                    raise ConnectionError
                return new

        store = Lossy()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        if dead:
            crashed_run(store, lock.job_id, clock)
        before = store.get(KEY)
        store.lose = True
        with pytest.raises(ConnectionError):
            resume(store, lock.job_id, never, clock=clock)
        assert store.get(KEY) == before
        resume(store, lock.job_id, nothing, clock=clock)

    def test_a_write_that_failed(self, resume: Resume) -> None:
        """There is nothing to write back."""
        store = FlakyStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        before = store.get(KEY)
        store.script = [fail]
        with pytest.raises(ConnectionError):
            resume(store, lock.job_id, never)
        assert store.get(KEY) == before

    def test_a_thread_that_cannot_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The block never began, so the job is not over."""
        store = MemoryBlobStore()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        before = store.get(KEY)

        def start(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            resume_in_a_thread(store, lock.job_id, never)
        assert store.get(KEY) == before

    def test_cancelled(self) -> None:
        """Wherever the cancellation comes, the next delivery can enter: 0 of 40 jobs are lost."""
        from tests.unit.test_hold_task import AsyncFlaky

        async def main() -> None:
            for turns in range(40):
                store = AsyncFlaky()
                lock = acquired(await aio.acquire_job_lock(store, UID, VAULT))
                before = await store.get(KEY)
                began = False

                async def job(store: AsyncFlaky = store, job_id: str = lock.job_id) -> None:
                    nonlocal began
                    async with aio.resume_job_lock(store, UID, VAULT, expected_job_id=job_id):
                        began = True
                        await asyncio.sleep(10)

                store.slow = turns % 5
                task = asyncio.create_task(job())
                for _ in range(turns // 5):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                if others := asyncio.all_tasks() - {asyncio.current_task()}:
                    await asyncio.wait(others)
                assert await store.get(KEY) == (None if began else before)

        asyncio.run(main())

    def test_a_takeover_whose_answer_was_lost(self) -> None:
        """What a hold has written is removed; a crashed job's record does not come back."""

        class Lossy(MemoryBlobStore):
            def set_if_match(self, key: str, value: str, etag: str) -> str | None:
                super().set_if_match(key, value, etag)
                raise ConnectionError

        store = Lossy()
        acquire_job_lock(store, UID, VAULT, clock=lambda: 0)
        with pytest.raises(ConnectionError):
            hold_job_lock(store, UID, VAULT).__enter__()
        assert list(store) == []

    def test_another_delivery_with_the_same_id_is_not_taken_back(self) -> None:
        """Where ids are not new, as `uuid_factory=lambda: task_id`, its start tells them apart."""

        class Down(MemoryBlobStore):
            def set_if_new(self, key: str, value: str) -> str | None:
                raise ConnectionError

        clock = Clock()
        store = Down()
        first = JobLockRecord("task-1", UID, VAULT, started_at=clock.now, expires_at=1e15)
        store.set(KEY, first.to_json())
        clock.advance(5)
        hold = hold_job_lock(store, UID, VAULT, clock=clock, uuid_factory=lambda: "task-1")
        with pytest.raises(ConnectionError):
            hold.__enter__()
        assert there(store) == first


class TestAtLeast:
    """A minimum hold: two hosts' crons start a short job once."""

    @pytest.mark.parametrize("raises", [False, True])
    @pytest.mark.parametrize("make", [RecordingStore, PlainStore])
    def test_a_job_that_ends_sooner(self, make: type[Any], raises: bool) -> None:
        """Its record stays, live until then; then another takes over, with the receipt."""
        store = make()
        clock = Clock()
        started = clock.now
        taken: list[JobLockRecord] = []
        with (
            contextlib.suppress(KeyError),
            hold_job_lock(store, UID, VAULT, clock=clock, at_least_ms=HOUR) as lock,
        ):
            taken.append(lock.record)
            clock.advance(50)
            if raises:
                raise KeyError
        ended = taken[0].__replace__(expires_at=started + HOUR, ended_at=started + 50)
        assert there(store) == ended
        refused = held(acquire_job_lock(store, UID, VAULT, clock=clock))
        assert refused.existing.ended_at == started + 50
        assert refused.retry_after_s() == 3600
        clock.advance(HOUR - 50)
        assert acquired(acquire_job_lock(store, UID, VAULT, clock=clock)).took_over == ended

    def test_a_job_that_lasts_longer(self, resume: Resume) -> None:
        """It is released as ever."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))

        def body(_: OwnedJobLock) -> None:
            clock.advance(MINUTE / 2)

        resume(store, lock.job_id, body, clock=clock, at_least_ms=MINUTE / 2)
        assert list(store) == []

    def test_it_makes_no_lease_longer(self) -> None:
        """A job that crashes is free after its TTL."""
        store = MemoryBlobStore()
        with hold_job_lock(store, UID, VAULT, at_least_ms=HOUR) as lock:
            assert lock.record.started_at is not None
            assert lock.record.expires_at == lock.record.started_at + HOLD_TTL_MS

    def test_the_release_is_one_request(self) -> None:
        """The keeper has the record and its etag."""
        store = RecordingStore()
        with hold_job_lock(store, UID, VAULT, at_least_ms=timedelta(hours=1)):
            store.calls.clear()
        assert store.calls == ["set_if_match"]

    def test_the_function(self, api: Api) -> None:
        """By the job's id; doing it again is safe; without a minimum it is removed."""
        store = RecordingStore()
        clock = Clock()
        lock = acquired(api.acquire(store, UID, VAULT, clock=clock))
        clock.advance(10)
        for written in (1, 0):
            store.calls.clear()
            assert api.release(
                store,
                UID,
                VAULT,
                expected_job_id=lock.job_id,
                etag=lock.etag,
                at_least_ms=1000,
                clock=clock,
            )
            assert there(store).ended_at == clock.now
            assert there(store).expires_at == clock.now + 990
            assert store.calls.count("set_if_match") == written
        assert api.release(store, UID, VAULT, expected_job_id=lock.job_id)
        assert list(store) == []

    def test_a_minimum_that_is_over(self, api: Api) -> None:
        """The record is removed."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(api.acquire(store, UID, VAULT, clock=clock))
        clock.advance(1000)
        assert api.release(
            store, UID, VAULT, expected_job_id=lock.job_id, at_least_ms=1000, clock=clock
        )
        assert list(store) == []

    @pytest.mark.parametrize("make", [RecordingStore, PlainStore])
    def test_a_record_without_a_start(self, api: Api, make: type[Any]) -> None:
        """Another program's, say: there is nothing to count from."""
        store = make()
        store.set(KEY, '{"jobId":"j","expiresAt":1e15}')
        assert api.release(store, UID, VAULT, expected_job_id="j", at_least_ms=1000)
        assert store.get(KEY) is None

    def test_on_a_plain_store_again(self, api: Api) -> None:
        """What has ended is not written again."""
        store = PlainStore()
        clock = Clock()
        lock = acquired(api.acquire(store, UID, VAULT, clock=clock))
        ends: list[JobLockRecord] = []
        for _ in range(2):
            assert api.release(
                store, UID, VAULT, expected_job_id=lock.job_id, at_least_ms=1000, clock=clock
            )
            ends.append(there(store))
            clock.advance(5)
        assert ends[0] == ends[1]
        assert [call[0] for call in store.calls].count("set") == 2  # the lock, and its end

    def test_another_jobs_lock(self, api: Api) -> None:
        """It stays as it is."""
        store = MemoryBlobStore()
        api.acquire(store, UID, VAULT)
        before = store.get(KEY)
        assert not api.release(store, UID, VAULT, expected_job_id="j", at_least_ms=1000)
        assert store.get(KEY) == before

    def test_a_store_that_answers_a_write_wrongly(self, api: Api) -> None:
        """As in every function; what is there is not known then."""

        class Wrong(MemoryBlobStore):
            def set_if_match(self, key: str, value: str, etag: str) -> Any:
                return True

        store = Wrong()
        lock = acquired(api.acquire(store, UID, VAULT))
        with pytest.raises(TypeError, match="^set_if_match must return the new etag"):
            api.release(store, UID, VAULT, expected_job_id=lock.job_id, at_least_ms=HOUR)

    def test_whoever_has_it(self, api: Api) -> None:
        """A minimum hold is a job's."""
        store = RecordingStore()
        with pytest.raises(InvalidIdError, match="must be given with at_least_ms"):
            api.release(store, UID, VAULT, at_least_ms=1000)
        assert store.calls == []

    @pytest.mark.parametrize("wrong", [-1, "5", None, float("nan")])
    def test_a_minimum_that_cannot_be(self, api: Api, wrong: Any) -> None:
        """A ValueError, before anything is removed."""
        store = RecordingStore()
        with pytest.raises(ValueError, match="^at_least_ms must be"):
            api.release(store, UID, VAULT, expected_job_id="j", at_least_ms=wrong)
        assert store.calls == []

    def test_a_renewal_of_what_has_ended(self, api: Api) -> None:
        """It does not revive it."""
        store = MemoryBlobStore()
        lock = acquired(api.acquire(store, UID, VAULT))
        api.release(store, UID, VAULT, expected_job_id=lock.job_id, at_least_ms=HOUR)
        lost = api.renew(store, UID, VAULT, expected_job_id=lock.job_id)
        assert not lost
        assert lost.reason == "lock_already_gone"
        assert lost.current == there(store)

    def test_a_record_that_changes_meanwhile(self, api: Api) -> None:
        """It is read again, and ended as it is now."""
        store = RecordingStore()
        clock = Clock()
        lock = acquired(api.acquire(store, UID, VAULT, clock=clock))

        def renewed() -> None:
            renew_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, ttl_ms=HOUR)

        store.once_before("set_if_match", renewed)
        assert api.release(
            store, UID, VAULT, expected_job_id=lock.job_id, at_least_ms=9, clock=clock
        )
        assert there(store).ended_at == clock.now
        assert store.calls.count("get_with_etag") == 3


class TestAtMost:
    """A job that hangs loses its lock."""

    def test_no_deadline_is_later(self, resume: Resume) -> None:
        """The lease ends with the job's time, by the record and for its holder."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        clock.advance(1000)

        def body(running: OwnedJobLock) -> None:
            assert running.record.expires_at == clock.now + 1000
            assert not running.lost
            clock.advance(1000)
            with pytest.raises(JobLockLostError) as lost:
                running.check()
            assert lost.value.reason == "lease_expired"

        with pytest.raises(JobLockLostError):
            resume(store, lock.job_id, body, clock=clock, at_most_ms=2000)

    @pytest.mark.slow
    def test_renewals_end_there(self) -> None:
        """The last one moves the deadline to the end of the job's time; then there are none."""
        store = RecordingStore()
        hold = hold_job_lock(
            store, UID, VAULT, ttl_ms=200, renew_every_ms=50, at_most_ms=timedelta(seconds=0.6)
        )
        lock = hold.__enter__()
        until_lost(lock)
        with pytest.raises(JobLockLostError, match="lease_expired"):
            hold.__exit__(None, None, None)
        record = lock.record
        assert record.started_at is not None
        assert record.expires_at == record.started_at + 600
        assert "delete_if_match" not in store.calls

    def test_a_lease_that_is_shorter_from_the_start(self) -> None:
        """There is nothing to renew."""
        store = RecordingStore()
        with hold_job_lock(store, UID, VAULT, at_most_ms=1000) as lock:
            assert lock.record.started_at is not None
            assert lock.record.expires_at == lock.record.started_at + 1000
            assert lock._keeper.lease._due == float("inf")

    def test_a_job_whose_time_is_over_before_it_is_resumed(self, resume: Resume) -> None:
        """The time in the queue counts, too; the job does not begin."""
        store = MemoryBlobStore()
        clock = Clock()
        lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        clock.advance(2000)
        with pytest.raises(JobLockLostError) as late:
            resume(store, lock.job_id, never, clock=clock, at_most_ms=2000)
        assert late.value.reason == "lease_expired"
        assert late.value.current == lock.record
        assert there(store) == lock.record

    def test_a_record_without_a_start(self, resume: Resume) -> None:
        """Another program's, say: there is nothing to count from."""
        store = MemoryBlobStore()
        store.set(KEY, '{"jobId":"j","expiresAt":1e15}')
        resume(store, "j", nothing, at_most_ms=1000)
        assert list(store) == []

    def test_a_clock_that_gives_no_time(self) -> None:
        """As in an acquire: nothing was written."""
        store = RecordingStore()
        hold = hold_job_lock(store, UID, VAULT, at_most_ms=1000, clock=lambda: float("nan"))
        with pytest.raises(TypeError, match="epoch milliseconds"):
            hold.__enter__()
        assert store.calls == []


def test_a_refused_write_that_is_ones_own(api: Api) -> None:
    """A client that repeats its requests is refused by itself; a resume has won then."""

    class Repeating(MemoryBlobStore):
        def set_if_match(self, key: str, value: str, etag: str) -> str | None:
            super().set_if_match(key, value, etag)
            return None

    store = Repeating()
    lock = acquired(api.acquire(store, UID, VAULT))
    with resume_job_lock(store, UID, VAULT, expected_job_id=lock.job_id) as running:
        assert there(store) == running.record
    assert list(store) == []


def test_two_deliveries_that_draw_one_run_id() -> None:
    """Where ids are not new a record just like ours is not taken for ours."""
    store = RecordingStore()
    clock = Clock()
    lock = acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
    keywords: dict[str, Any] = {"expected_job_id": lock.job_id, "clock": clock}

    first = resume_job_lock(store, UID, VAULT, uuid_factory=lambda: "r", **keywords)
    store.once_before("set_if_match", first.__enter__)
    with pytest.raises(JobLockHeldError):
        resume_job_lock(store, UID, VAULT, uuid_factory=lambda: "r", **keywords).__enter__()
    first.__exit__(None, None, None)


FIELDS: dict[str, Any] = {"taskId": "t-1", "tries": 3, "tags": ["a", {"b": None}], "é": 1.5}


class TestExtra:
    """Fields of one's own."""

    def test_they_are_on_the_record(self, api: Api) -> None:
        """After the known ones, and a renewal keeps them."""
        store = MemoryBlobStore()
        given = copy.deepcopy(FIELDS)
        lock = acquired(api.acquire(store, UID, VAULT, extra=given))
        given["tags"].append("later")
        assert lock.record.extra == FIELDS
        assert list(lock.record.to_dict())[-4:] == list(FIELDS)
        renewed = api.renew(store, UID, VAULT, expected_job_id=lock.job_id)
        assert renewed
        assert there(store).extra == FIELDS

    def test_of_a_hold(self) -> None:
        """As of an acquire."""
        store = MemoryBlobStore()
        with hold_job_lock(store, UID, VAULT, extra=FIELDS) as lock:
            assert there(store).extra == FIELDS == lock.record.extra

    @pytest.mark.parametrize(
        "wrong",
        [
            {"jobId": "x"},
            {"runId": "x"},
            {"endedAt": 5},
            {"expiresAt": None},
            {5: "x"},
            {"x": {5: 5}},
            {"x": float("nan")},
            {"x": float("inf")},
            {"x": (1, 2)},
            {"x": b"x"},
            {"x": object()},
            {"x": 10**5000},
            {"x": "\ud83d\ude00"},
            ["x"],
            "x",
            5,
        ],
    )
    def test_what_cannot_be(self, api: Api, wrong: Any) -> None:
        """A ValueError before any request."""
        store = RecordingStore()
        with pytest.raises(ValueError, match="^extra "):
            api.acquire(store, UID, VAULT, extra=wrong)
        with pytest.raises(ValueError, match="^extra "):
            hold_job_lock(store, UID, VAULT, extra=wrong)
        assert store.calls == []

    def test_what_is_too_deep(self, api: Api) -> None:
        """Joblock itself would take it for no record."""
        deep: Any = 1
        for _ in range(63):
            deep = [deep]
        store = MemoryBlobStore()
        assert api.acquire(store, UID, VAULT, extra={"x": deep})
        assert there(store).extra == {"x": deep}
        with pytest.raises(ValueError, match="^extra "):
            api.acquire(store, UID, VAULT, extra={"x": [deep]})
        endless: list[Any] = []
        endless.append(endless)
        with pytest.raises(ValueError, match="^extra "):
            api.acquire(store, UID, VAULT, extra={"x": endless})


class TestTheRecord:
    """The two new fields on the wire."""

    def test_only_where_they_are_set(self) -> None:
        """After `expiresAt`, before what is not known."""
        record = JobLockRecord("j", "u", "v", expires_at=5, extra={"x": 1})
        assert "runId" not in record.to_json()
        ended = record.__replace__(run_id="r", ended_at=4)
        assert ended.to_json().endswith('"expiresAt":5,"runId":"r","endedAt":4,"x":1}')
        assert JobLockRecord.from_json(ended.to_json()) == ended
        assert ended.__replace__(extra=None).to_json().endswith('"runId":"r","endedAt":4}')

    @pytest.mark.parametrize("wrong", ['"runId":5,"endedAt":"x"', '"runId":null,"endedAt":null'])
    def test_of_a_wrong_type(self, wrong: str) -> None:
        """As every field: read as None."""
        record = JobLockRecord.from_json("{" + wrong + "}")
        assert record is not None
        assert (record.run_id, record.ended_at, record.extra) == (None, None, {})

    def test_one_that_was_pickled_by_joblock_0_1(self) -> None:
        """Its arguments by position mean what they meant."""
        record = JobLockRecord("j", "u", "v", None, None, None, None, 1, 2, {"x": 1})
        assert record.extra == {"x": 1}
        assert record.run_id is None


def test_who_releases_needs_what_it_may_write() -> None:
    """A store that can only read and delete cannot keep a record for a minimum hold."""

    class Store:
        def get(self, key: str) -> str | None:
            return None

        def delete(self, key: str) -> None:
            pass

    store: Any = Store()
    assert not release_job_lock(store, UID, VAULT, expected_job_id="j")
    with pytest.raises(TypeError, match="lacks set"):
        release_job_lock(store, UID, VAULT, expected_job_id="j", at_least_ms=5)


def test_a_blob_that_an_undo_does_not_find() -> None:
    """Another has taken over while the answer was lost: what he wrote stays."""

    class Store(MemoryBlobStore):
        def set_if_match(self, key: str, value: str, etag: str) -> str | None:
            super().set(key, JobLockRecord("another", UID, VAULT, expires_at=1e15).to_json())
            raise ConnectionError

    store = Store()
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    with pytest.raises(ConnectionError):
        resume_in_a_thread(store, lock.job_id, never)
    assert there(store).job_id == "another"
    assert isinstance(store.get_with_etag(KEY), Blob)
