"""`hold_job_lock`, blocking and async: what is the same for both, in real time."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from joblock import (
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
from joblock._lease import monotonic_ms
from tests.holding import (
    BRIEF,
    HOUR,
    OFTEN,
    FlakyStore,
    assert_logged,
    fail,
    levels,
    make_keeper,
    poll,
    until_lost,
    until_renewed,
)
from tests.support import (
    KEY,
    UID,
    VAULT,
    BareClock,
    RecordingStore,
    acquired,
    async_view,
)

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
        assert_logged(caplog, "WARNING")
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

    @pytest.mark.parametrize("ttl", [0, -5, "minute", None, float("nan"), 1, timedelta(0)])
    def test_a_ttl_that_cannot_be(self, hold: Hold, ttl: Any) -> None:
        """The error names the TTL, also where it is too short to be renewed."""
        store = RecordingStore()
        with pytest.raises(ValueError, match="^ttl_ms "):
            hold(store, pytest.fail, ttl_ms=ttl)
        assert store.calls == []

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
        assert_logged(caplog, "ERROR")

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
        """As any failed renewal: told each time, until the lease ends with it as the cause.

        Who asks whether the lock is lost asks the clock, too, and gets its error.
        """
        times = [0]

        def body(lock: OwnedJobLock) -> None:
            with pytest.raises(IndexError):
                lock.check()
            poll(lambda: "ERROR" in levels(caplog))

        with pytest.raises(JobLockLostError, match="lease_expired") as caught:
            hold(MemoryBlobStore(), body, clock=times.pop, **BRIEF)
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
        assert_logged(caplog, "ERROR")
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


class TestTheCallersClock:
    """By which others on this host decide whether they may take the lock over."""

    def test_set_forward(self, hold: Hold) -> None:
        """`check()` must not pass while a rival on the same host has the lock."""
        clock = BareClock()
        store = MemoryBlobStore()

        def body(lock: OwnedJobLock) -> None:
            lock.check()
            clock.advance(2 * HOUR)
            assert acquire_job_lock(store, UID, VAULT, clock=clock)
            with pytest.raises(JobLockLostError, match="lease_expired"):
                lock.check()

        with pytest.raises(JobLockLostError, match="lease_expired"):
            hold(store, body, ttl_ms=HOUR, clock=clock)

    def test_set_forward_and_renewed_before_anybody_asked(self, hold: Hold) -> None:
        """The store knows that nobody has taken it over: nothing is lost."""
        clock = BareClock()
        store = MemoryBlobStore()

        def body(lock: OwnedJobLock) -> None:
            clock.advance(2 * HOUR)
            poll(lambda: (lock.record.expires_at or 0) > clock.now)
            lock.check()

        hold(store, body, ttl_ms=HOUR, renew_every_ms=2, clock=clock)
        assert list(store) == []

    def test_set_back(self, hold: Hold) -> None:
        """No renewal moves the deadline back: others count on what they have read."""
        clock = BareClock()
        deadlines: list[Any] = []

        def body(lock: OwnedJobLock) -> None:
            first = lock.record.expires_at
            clock.advance(-HOUR)
            count = len(store.calls)
            poll(lambda: store.calls[count:].count("set_if_match") > 2)
            deadlines.extend([first, lock.record.expires_at])

        store = RecordingStore()
        hold(store, body, ttl_ms=2 * HOUR, renew_every_ms=2, clock=clock)
        assert deadlines[0] == deadlines[1]


class TestTwoRunsOfOneJob:
    """A task that is delivered twice, whose id is the job's: its two acquires are two owners."""

    def test_the_first_does_not_renew_or_release_the_second(self, hold: Hold) -> None:
        """It was paused beyond its lease; the second has taken over."""
        clock, store = BareClock(), MemoryBlobStore()
        one: dict[str, Any] = {"uuid_factory": lambda: "task-1", "clock": clock}

        def body(lock: OwnedJobLock) -> None:
            clock.advance(2 * HOUR)
            assert acquire_job_lock(store, UID, VAULT, **one)
            poll(lambda: lock.lost)

        with pytest.raises(JobLockLostError) as caught:
            hold(store, body, ttl_ms=HOUR, renew_every_ms=2, **one)
        assert caught.value.reason in ("lock_owned_by_other_job", "lease_expired")
        left = peek_job_lock(store, UID, VAULT)
        assert left is not None and left.started_at == clock.now


def test_the_store_is_called_in_the_callers_context(hold: Hold) -> None:
    """A store may find its connection or its tenant by a context variable."""
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
    seen: set[str] = set()

    class ByTenant(MemoryBlobStore):
        def set_if_match(self, key: str, value: str, etag: str) -> str | None:
            seen.add(f"renewed by {tenant.get()}")
            return super().set_if_match(key, value, etag)

        def delete_if_match(self, key: str, etag: str) -> bool:
            seen.add(f"released by {tenant.get()}")
            return super().delete_if_match(key, etag)

    def main() -> None:
        tenant.set("acme")
        hold(store, until_renewed, **OFTEN)

    store = ByTenant()
    contextvars.copy_context().run(main)
    assert seen == {"renewed by acme", "released by acme"}
    assert list(store) == []


class Status(Exception):  # noqa: N818
    """As the SDKs' errors."""

    def __init__(self, **attributes: object) -> None:
        super().__init__("https://store.example/?signature=secret")
        vars(self).update(attributes)


RedisError = type("RedisError", (Exception,), {"__module__": "redis.exceptions"})
REFUSED = {"Error": {"Code": "ThrottlingException"}, "ResponseMetadata": {"HTTPStatusCode": 400}}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (sqlite3.OperationalError("/jobs.db: disk is full"), "OperationalError: /jobs.db: disk is"),
        (OSError(28, "No space left on device", "/secret"), "OSError: No space left on device;"),
        (Status(status=503), "Status: status 503;"),
        (Status(status_code=429), "Status: status 429;"),
        (Status(code=412), "Status: status 412;"),
        (Status(response={"ResponseMetadata": {"HTTPStatusCode": 500}}), "Status: status 500;"),
        (Status(response={"Error": {}}), "Status; "),
        (Status(response=REFUSED), "Status: status 400, ThrottlingException;"),
        (Status(error_code="ServerBusy", status_code=503), "Status: status 503, ServerBusy;"),
        (Status(error_code="https://secret"), "Status; "),
        (Status(orig=SimpleNamespace(args=(1021, "secret"), sqlstate="HY000")), "Status: 1021;"),
        (Status(orig=SimpleNamespace(args=("secret",), sqlstate="53100")), "Status: 53100;"),
        (Status(orig=SimpleNamespace(args=("secret",), sqlstate=None)), "Status; "),
        (RedisError("MISCONF secret"), "RedisError: MISCONF;"),
        (RedisError("Error secret"), "RedisError; "),
        (Status(status_code="READONLY"), "Status: READONLY;"),
        (RuntimeError("SECRET of ours"), "RuntimeError; "),
        (Status(), "Status; "),
    ],
    ids=lambda it: "" if isinstance(it, str) else type(it).__name__,
)
def test_what_a_log_says_of_a_failed_renewal(
    hold: Hold, error: Exception, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, a busy file and a refused request are told apart, and no secret is shown."""
    store = FlakyStore()

    def fail() -> None:
        raise error

    store.script = [fail]

    def body(lock: OwnedJobLock) -> None:
        poll(lambda: levels(caplog))

    hold(store, body, **OFTEN)
    assert says in caplog.messages[0]
    assert "secret" not in caplog.text


def test_a_block_that_another_process_entered_is_left_as_it_is() -> None:
    """Nothing is released and nothing is raised; tests/integration has real forks."""
    store = MemoryBlobStore()
    keeper = make_keeper(store, renew_every_ms=2)
    with hold_module._Hold(keeper):
        keeper._process = os.getppid()
    assert list(store) == [KEY]

    async def main() -> None:
        keeper = make_keeper(store, renew_every_ms=2)
        async with aio._Hold(keeper):
            keeper._process = os.getppid()
        assert list(store) == [KEY]

    store.delete(KEY)
    asyncio.run(main())
