"""The lock on a plain store, beyond what the recordings cover: renewal, and what it cannot do."""

from __future__ import annotations

import asyncio

import pytest

import joblock
from joblock import JobLockRecord, Lost, Renewed, aio, hold_job_lock
from tests.support import KEY, UID, VAULT, Api, AsyncView, Clock, PlainStore, acquired, held


def test_acquire_has_no_etag_and_keeps_the_receipt(api: Api, clock: Clock) -> None:
    """An expired record is taken over with its receipt; clock skew counts here too."""
    store = PlainStore()
    first = acquired(api.acquire(store, UID, VAULT, ttl_ms=10, clock=clock))
    assert (first.etag, first.took_over) == (None, None)
    clock.advance(10)
    waiting = held(api.acquire(store, UID, VAULT, clock_skew_ms=1, clock=clock))
    assert waiting.existing == first.record
    second = acquired(api.acquire(store, UID, VAULT, clock=clock))
    assert second.took_over == first.record


def test_release_ignores_the_etag_that_a_plain_store_does_not_have(api: Api) -> None:
    """The owner is compared, as without it."""
    store = PlainStore({KEY: '{"jobId":"a"}'})
    assert not api.release(store, UID, VAULT, expected_job_id="b", etag="x").released
    assert api.release(store, UID, VAULT, expected_job_id="a", etag="x").released


def test_renew_reads_then_writes(api: Api, clock: Clock) -> None:
    """The own record only."""
    store = PlainStore()
    won = acquired(api.acquire(store, UID, VAULT, clock=clock, uuid_factory=lambda: "a"))
    store.calls.clear()
    clock.advance(5)
    renewed = api.renew(store, UID, VAULT, expected_job_id="a", clock=clock)
    assert isinstance(renewed, Renewed)
    assert renewed.etag is None
    assert renewed.record.expires_at == clock.now + joblock.JOB_LOCK_TTL_MS
    assert renewed.record.started_at == won.record.started_at
    assert store.calls == [["get", KEY], ["set", KEY, renewed.record.to_json()]]
    lost = api.renew(store, UID, VAULT, expected_job_id="b")
    assert lost == Lost("lock_owned_by_other_job", renewed.record)
    assert len(store.calls) == 3


@pytest.mark.parametrize("left", [None, "", "null", "junk"])
def test_renew_is_lost_when_the_record_is_gone(api: Api, left: str | None) -> None:
    """And nothing is written."""
    store = PlainStore({} if left is None else {KEY: left})
    assert api.renew(store, UID, VAULT, expected_job_id="a") == Lost("lock_already_gone", None)
    assert store.blobs == ({} if left is None else {KEY: left})


def test_renew_does_not_take_a_failed_read_for_a_lost_lock(api: Api) -> None:
    """Acquire must not be blocked by one; a running job must not be stopped by one."""
    store = PlainStore({KEY: '{"jobId":"a"}'})
    store.failing = "get"
    with pytest.raises(OSError, match="get failed"):
        api.renew(store, UID, VAULT, expected_job_id="a")


def test_two_simultaneous_acquires_both_win(api: Api) -> None:
    """The original's fault, which only a conditional store mends: the README says so."""
    store = PlainStore()
    read, inner = store.get, list[str]()

    def get_after_another_has_read(key: str) -> str | None:
        before = read(key)
        if not inner:
            inner.append("")
            inner.append(acquired(api.acquire(store, UID, VAULT)).job_id)
        return before

    store.get = get_after_another_has_read  # type: ignore[method-assign]
    outer = acquired(api.acquire(store, UID, VAULT))
    assert outer.job_id != inner[1]
    assert JobLockRecord.from_json(store.blobs[KEY]) == outer.record


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hold_takes_back_what_a_write_that_failed_may_have_left(kind: str) -> None:
    """Its job is new, so whatever has its id is its own."""

    class Unanswered(PlainStore):
        def set(self, key: str, value: str) -> None:
            super().set(key, value)
            raise OSError("no answer")

    async def hold_async() -> None:
        async with aio.hold_job_lock(AsyncView(store), UID, VAULT):
            raise AssertionError

    def hold() -> None:
        if kind == "async":
            asyncio.run(hold_async())
        hold_job_lock(store, UID, VAULT).__enter__()

    store = Unanswered()
    with pytest.raises(OSError, match="no answer"):
        hold()
    assert store.blobs == {}
