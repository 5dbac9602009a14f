"""What is answered: when to come back, what is logged, and what a store must not answer."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

import joblock
from joblock import (
    Held,
    InvalidIdError,
    JobLockError,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    MemoryBlobStore,
    StoreContentionError,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
)
from joblock._protocol import acquire
from tests.support import (
    KEY,
    UID,
    VAULT,
    Api,
    Clock,
    PlainStore,
    RecordingStore,
    acquired,
    async_view,
    await_now,
    held,
)

RECORD = JobLockRecord("j", UID, VAULT, started_at=0, expires_at=10_000)


class TestWhenToComeBack:
    """By the clock of the acquire, whatever the time is now."""

    @pytest.mark.parametrize("store_type", [MemoryBlobStore, PlainStore])
    def test_held_remembers_the_clock_and_the_skew(
        self, api: Api, clock: Clock, store_type: Callable[[], Any]
    ) -> None:
        """So a handler that is tested with a clock of its own answers as it will in production."""
        store = store_type()
        acquired(api.acquire(store, UID, VAULT, clock=clock))
        clock.advance(1000)
        refused = held(api.acquire(store, UID, VAULT, clock=clock))
        assert refused.retry_after_s() == 959
        skewed = held(api.acquire(store, UID, VAULT, clock=clock, clock_skew_ms=2000))
        assert skewed.retry_after_s() == 961
        assert pickle.loads(pickle.dumps(skewed)).retry_after_s() == 961  # noqa: S301
        assert skewed == refused, "the same lock is held"
        assert refused.retry_after_s(lambda: clock.now + 10_000) == 949
        assert refused.retry_after_s(clock_skew_ms=2000) == 961

    def test_a_hold_that_is_refused(self, clock: Clock) -> None:
        """Its error knows as much."""
        store = MemoryBlobStore()
        acquired(acquire_job_lock(store, UID, VAULT, clock=clock))
        with (
            pytest.raises(JobLockHeldError) as caught,
            hold_job_lock(store, UID, VAULT, clock=clock, clock_skew_ms=1500),
        ):
            pytest.fail("entered")
        assert caught.value.retry_after_s() == 962
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
        assert again.retry_after_s() == 962

    def test_a_record_asks_the_real_clock(self) -> None:
        """Unless it is told what time it is."""
        now = joblock.epoch_ms()
        soon = RECORD.__replace__(expires_at=now + 60_000)
        assert soon.is_live()
        assert not RECORD.is_live()
        assert 1 < soon.retry_after_s() <= 60
        assert RECORD.retry_after_s() == 1
        assert RECORD.retry_after_s(4000, clock_skew_ms=500) == 7
        assert 1 < Held(soon).retry_after_s() <= 60


ERRORS: list[JobLockError] = [
    InvalidIdError("vault_id", "must not"),
    StoreContentionError("k", 16),
    JobLockHeldError(RECORD, 5.0, 1.0),
    JobLockLostError("j", "lease_expired", RECORD),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_can_be_shown_after_a_trip_through_json(error: JobLockError) -> None:
    """Celery's result backend makes it again from its arguments, with text in a value's place."""
    args = json.loads(json.dumps(error.args, default=str))
    again = type(error)(*args)
    assert str(again)
    assert repr(again)


@pytest.mark.parametrize("what", [None, 5, "text", {"jobId": "j"}, [], object()], ids=repr)
def test_no_error_of_ours_fails_to_be_shown(what: Any) -> None:
    """Whatever it was made of."""
    record = JobLockRecord(what, what, what, started_at=what, expires_at=what)
    for error in (
        InvalidIdError(what, what),
        StoreContentionError(what, what),
        JobLockHeldError(what),
        JobLockHeldError(record),
        JobLockLostError(what, what, what),
    ):
        assert str(error)
        assert repr(error)


class ParsesJson(RecordingStore):
    """A JSON column: what was written as text is read as a dict."""

    def get(self, key: str) -> Any:
        value = super().get(key)
        return None if value is None else json.loads(value)

    def get_with_etag(self, key: str) -> Any:
        blob = super().get_with_etag(key)
        return None if blob is None else joblock.Blob(json.loads(str(blob.value)), blob.etag)


class Views(RecordingStore):
    """A bytea column: what was written as text is read as a memoryview."""

    kind: Callable[[bytes], Any] = memoryview

    def get(self, key: str) -> Any:
        value = super().get(key)
        return None if value is None else type(self).kind(value.encode())

    def get_with_etag(self, key: str) -> Any:
        blob = super().get_with_etag(key)
        if blob is None:
            return None
        return joblock.Blob(type(self).kind(str(blob.value).encode()), blob.etag)


class ByteArrays(Views):
    kind = bytearray


CALLS: list[Callable[[Api, Any], object]] = [
    lambda api, store: api.acquire(store, UID, VAULT),
    lambda api, store: api.peek(store, UID, VAULT),
    lambda api, store: api.renew(store, UID, VAULT, expected_job_id="j"),
    lambda api, store: api.release(store, UID, VAULT, expected_job_id="j"),
]


@pytest.mark.parametrize("call", CALLS, ids=["acquire", "peek", "renew", "release"])
def test_a_value_of_a_wrong_type_is_an_error(api: Api, call: Callable[..., object]) -> None:
    """On a conditional store: if it counted as no lock, every click would win."""
    store = ParsesJson()
    acquired(api.acquire(store, UID, VAULT, uuid_factory=lambda: "j"))
    with pytest.raises(TypeError, match="must return text, bytes or None for a value, not a dict"):
        call(api, store)
    assert list(store) == [KEY]


@pytest.mark.parametrize("call", CALLS, ids=["acquire", "peek", "renew", "release"])
def test_a_blob_without_an_etag_is_an_error(api: Api, call: Callable[..., object]) -> None:
    """It could be written over only without a condition."""

    class NoEtag(RecordingStore):
        def get_with_etag(self, key: str) -> Any:
            return joblock.Blob("{}", "")

    store = NoEtag()
    acquired(api.acquire(store, UID, VAULT, uuid_factory=lambda: "j"))
    if call is CALLS[1]:
        assert call(api, store)
        return
    with pytest.raises(TypeError, match="get_with_etag must return"):
        call(api, store)


@pytest.mark.parametrize("store_type", [Views, ByteArrays])
def test_bytes_of_any_type_are_read(api: Api, store_type: type[Views]) -> None:
    """As some drivers give them."""
    store = store_type()
    won = acquired(api.acquire(store, UID, VAULT))
    assert held(api.acquire(store, UID, VAULT)).existing == won.record
    assert api.peek(store, UID, VAULT) == won.record
    assert api.renew(store, UID, VAULT, expected_job_id=won.job_id)
    assert api.release(store, UID, VAULT, expected_job_id=won.job_id)


class RepeatsItself(RecordingStore):
    """A client that repeats a request whose answer was lost: then its own write refuses it."""

    def set_if_new(self, key: str, value: str) -> str | None:
        super().set_if_new(key, value)
        return super().set_if_new(key, value)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        super().set_if_match(key, value, etag)
        return super().set_if_match(key, value, etag)


class TestRefusedByItsOwnWrite:
    """A store of one's own, over a client that repeats requests and tells nobody."""

    def test_a_free_lock_is_acquired(self, api: Api) -> None:
        """It has won, and nobody would run the job if it said that it has not."""
        store = RepeatsItself()
        won = acquired(api.acquire(store, UID, VAULT))
        assert won.record == peek_job_lock(store, UID, VAULT)
        assert won.took_over is None
        held(api.acquire(store, UID, VAULT))
        assert api.release(store, UID, VAULT, expected_job_id=won.job_id, etag=won.etag)

    def test_an_expired_lock_is_taken_over(self, api: Api, clock: Clock) -> None:
        """With the receipt of the job that crashed."""
        store = RepeatsItself()
        crashed = acquired(api.acquire(store, UID, VAULT, clock=clock))
        clock.advance(joblock.JOB_LOCK_TTL_MS)
        won = acquired(api.acquire(store, UID, VAULT, clock=clock))
        assert won.took_over == crashed.record

    def test_a_lock_is_renewed(self, api: Api, clock: Clock) -> None:
        """Instead of being contended for ever."""
        store = RepeatsItself()
        won = acquired(api.acquire(store, UID, VAULT, clock=clock))
        clock.advance(5)
        renewed = api.renew(
            store,
            UID,
            VAULT,
            expected_job_id=won.job_id,
            etag=won.etag,
            record=won.record,
            clock=clock,
        )
        assert renewed
        assert renewed.record == peek_job_lock(store, UID, VAULT)

    def test_an_id_that_two_calls_may_have_proves_nothing(self, api: Api) -> None:
        """A task that is delivered twice in one millisecond writes the same record twice."""
        store = MemoryBlobStore()
        both = [
            api.acquire(store, UID, VAULT, uuid_factory=lambda: "task", clock=lambda: 0)
            for _ in range(2)
        ]
        assert [bool(one) for one in both] == [True, False]

    def test_whether_an_id_is_new_is_told(self) -> None:
        """The checker in tests/model draws its own, which are."""
        won = await_now(
            acquire(
                async_view(RepeatsItself()),
                UID,
                VAULT,
                described=partial(JobLockRecord, canister_uid=UID, vault_id=VAULT),
                ttl_ms=1000,
                clock_skew_ms=0,
                clock=lambda: 0,
                uuid_factory=lambda: "a",
                id_is_new=True,
            )
        )
        assert acquired(won).job_id == "a"


class TestLogging:
    """The logger "joblock"; a job id and a key, nothing else of what is stored."""

    def test_every_step_at_debug_and_a_takeover_as_a_warning(
        self, api: Api, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A job has crashed: somebody should know."""
        caplog.set_level(logging.DEBUG, "joblock")
        store = MemoryBlobStore()
        api.acquire(store, UID, VAULT, clock=clock, uuid_factory=lambda: "a")
        api.acquire(store, UID, VAULT, clock=clock, uuid_factory=lambda: "b")
        clock.advance(joblock.JOB_LOCK_TTL_MS)
        api.acquire(store, UID, VAULT, clock=clock, uuid_factory=lambda: "c")
        api.release(store, UID, VAULT, expected_job_id="c")
        api.release(store, UID, VAULT)
        assert caplog.record_tuples == [
            ("joblock", logging.DEBUG, f"job 'a' acquired {KEY!r}"),
            ("joblock", logging.DEBUG, f"{KEY!r} is held by job 'a'"),
            (
                "joblock",
                logging.WARNING,
                f"job 'c' took over {KEY!r} from job 'a', whose lease expired",
            ),
            ("joblock", logging.DEBUG, f"job 'c' released {KEY!r}"),
            ("joblock", logging.DEBUG, f"{KEY!r} was removed, whoever had it"),
        ]

    def test_a_takeover_is_told_also_where_nobody_imported_logging(self) -> None:
        """On standard error, as every warning that nobody configured."""
        code = (
            "import sys, joblock; store = joblock.MemoryBlobStore();"
            "joblock.acquire_job_lock(store, 'u', 'v', clock=lambda: 0);"
            "assert 'logging' not in sys.modules;"
            "joblock.acquire_job_lock(store, 'u', 'v')"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, text=True
        )
        assert "took over 'index-jobs/u/v.json'" in ran.stderr


class ReturnsAwaitables:
    """An async store whose methods are plain functions that return coroutines."""

    def get(self, key: str) -> Awaitable[str | None]:
        async def get() -> str | None:
            return None

        return get()

    def set(self, key: str, value: str) -> Awaitable[None]:
        raise NotImplementedError

    def delete(self, key: str) -> Awaitable[None]:
        raise NotImplementedError


def test_an_async_store_in_disguise_is_told_what_to_do() -> None:
    """The same in each of the three places where it may be tried, so that no circle is left."""
    store: Any = ReturnsAwaitables()
    remedy = r"`async def`, or that are marked with inspect\.markcoroutinefunction"
    with pytest.raises(TypeError, match=remedy):
        peek_job_lock(store, UID, VAULT)
    with pytest.raises(TypeError, match=remedy):
        await_now(aio.peek_job_lock(store, UID, VAULT))

    async def threaded() -> None:
        with pytest.raises(TypeError, match=remedy):
            await aio.peek_job_lock(aio.ThreadedBlobStore(store), UID, VAULT)

    asyncio.run(threaded())
