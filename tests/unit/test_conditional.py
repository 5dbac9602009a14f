"""The lock on a conditional store: what it decides, and with how many requests."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

import joblock
from joblock import Acquired, Blob, Held, JobLockRecord, Lost, ReleaseResult, Renewed, aio
from tests.support import (
    KEY,
    UID,
    VAULT,
    Api,
    AsyncConditionalView,
    Clock,
    RecordingStore,
    TellingStore,
    acquired,
    await_now,
    held,
)

TTL = 1000
WRONG: Any = ({}, "etag")  # a column that is parsed
NONE: Any = None


@pytest.fixture
def store() -> RecordingStore:
    return RecordingStore()


@pytest.fixture
def take(api: Api, clock: Clock) -> Callable[..., Acquired | Held]:
    """Acquire as the job of the given id."""

    def take(store: RecordingStore, job_id: str, **options: Any) -> Acquired | Held:
        return api.acquire(
            store, UID, VAULT, clock=clock, uuid_factory=lambda: job_id, ttl_ms=TTL, **options
        )

    return take


Take = Callable[..., Acquired | Held]


def test_a_free_lock_is_acquired_with_one_request(store: RecordingStore, take: Take) -> None:
    """The record that is returned is the one that is stored."""
    won = acquired(take(store, "a", actor_uid="me", chunks_to_embed=9, reason="big"))
    assert store.calls == ["set_if_new"]
    assert won.record == JobLockRecord(
        "a", UID, VAULT, "me", 9, None, "big", 1_000_000, 1_000_000 + TTL
    )
    assert won.record.to_json() == store.get(KEY)
    blob = store.get_with_etag(KEY)
    assert blob is not None
    assert (won.job_id, won.etag, won.took_over) == ("a", blob.etag, None)


def test_a_live_lock_is_held_and_shown_with_two_requests(store: RecordingStore, take: Take) -> None:
    """The double click."""
    first = acquired(take(store, "a"))
    store.calls.clear()
    assert held(take(store, "b")).existing == first.record
    assert store.calls == ["set_if_new", "get_with_etag"]


def test_an_expired_lock_is_taken_over(store: RecordingStore, take: Take, clock: Clock) -> None:
    """At its deadline to the millisecond, not before; the crashed job's record is the receipt."""
    first = acquired(take(store, "a"))
    clock.advance(TTL - 1)
    assert held(take(store, "b")).existing == first.record
    clock.advance(1)
    store.calls.clear()
    second = acquired(take(store, "b"))
    assert store.calls == ["set_if_new", "get_with_etag", "set_if_match"]
    assert second.took_over == first.record
    assert second.record.started_at == clock.now
    assert second.record.to_json() == store.get(KEY)


@pytest.mark.parametrize("skew", [1, 250.5])
def test_clock_skew_is_honoured_beyond_the_deadline(
    store: RecordingStore, take: Take, clock: Clock, skew: float
) -> None:
    """A host whose clock is ahead by no more than the skew takes nobody's lock."""
    take(store, "a")
    clock.advance(TTL + skew - 0.5)
    assert held(take(store, "b", clock_skew_ms=skew)).existing.job_id == "a"
    clock.advance(0.5)
    assert acquired(take(store, "b", clock_skew_ms=skew)).job_id == "b"


@pytest.mark.parametrize("junk", ["", "null", "not json{", "[1]", "42"])
def test_what_is_no_record_is_replaced(
    store: RecordingStore, take: Take, api: Api, junk: str
) -> None:
    """Malformed text, an empty value and a tombstone are no lock, and no receipt."""
    store.set(KEY, junk)
    assert api.peek(store, UID, VAULT) is None
    assert acquired(take(store, "b")).took_over is None
    assert store.calls[-3:] == ["set_if_new", "get_with_etag", "set_if_match"]


@pytest.mark.parametrize("text", ["{}", '{"jobId":"half"}', '{"jobId":"x","expiresAt":1e999}'])
def test_a_record_without_a_deadline_is_taken_over(
    store: RecordingStore, take: Take, text: str
) -> None:
    """Nothing may block a vault for ever."""
    store.set(KEY, text)
    assert acquired(take(store, "b")).took_over == JobLockRecord.from_json(text)


def test_a_lock_released_between_the_requests_is_acquired(
    store: RecordingStore, take: Take, api: Api
) -> None:
    """Refused, then vanished: it looks again."""
    first = acquired(take(store, "a"))
    store.calls.clear()
    store.once_before("get_with_etag", lambda: joblock.MemoryBlobStore.delete(store, KEY))
    assert acquired(take(store, "b")).took_over is None
    assert store.calls == ["set_if_new", "get_with_etag", "set_if_new"]
    assert api.release(store, UID, VAULT, expected_job_id=first.job_id).released is False


def test_a_takeover_that_another_client_wins_is_held(
    store: RecordingStore, take: Take, clock: Clock
) -> None:
    """Both saw the expired lock; the slower one is shown the faster one's record."""
    take(store, "a")
    clock.advance(TTL)
    winners: list[Acquired] = []
    store.once_before("set_if_match", lambda: winners.append(acquired(take(store, "b"))))
    loser = held(take(store, "c"))
    assert loser.existing == winners[0].record


def test_the_clock_is_read_after_the_wait_for_the_store(
    store: RecordingStore, take: Take, clock: Clock
) -> None:
    """A slow read does not cost the lease its length, and a lock that expired meanwhile is free."""
    take(store, "a")
    store.once_before("get_with_etag", lambda: clock.advance(TTL))
    record = acquired(take(store, "b")).record
    assert (record.started_at, record.expires_at) == (clock.now, clock.now + TTL)


def test_endless_contention_ends_in_an_error(store: RecordingStore, take: Take, api: Api) -> None:
    """A bounded number of rounds; nothing is claimed."""
    store.before["get_with_etag"] = lambda: joblock.MemoryBlobStore.delete(store, KEY)
    store.before["set_if_new"] = lambda: joblock.MemoryBlobStore.set(store, KEY, "{}")
    with pytest.raises(joblock.StoreContentionError) as caught:
        take(store, "a")
    assert caught.value.key == KEY
    assert caught.value.attempts == store.calls.count("set_if_new") == 16

    store.before = {"delete_if_match": lambda: joblock.MemoryBlobStore.set(store, KEY, own)}
    own = '{"jobId":"a"}'
    store.set(KEY, own)
    with pytest.raises(joblock.StoreContentionError):
        api.release(store, UID, VAULT, expected_job_id="a")
    assert store.get(KEY) == own

    store.before = {"set_if_match": lambda: joblock.MemoryBlobStore.set(store, KEY, own)}
    with pytest.raises(joblock.StoreContentionError):
        api.renew(store, UID, VAULT, expected_job_id="a")
    assert store.get(KEY) == own


@pytest.mark.parametrize("verb", ["set_if_new", "get_with_etag", "set_if_match"])
def test_a_store_error_reaches_the_caller_and_nothing_is_taken_over(
    store: RecordingStore, take: Take, clock: Clock, verb: str
) -> None:
    """Unlike on a plain store a failed read is not an empty key."""
    first = acquired(take(store, "a"))
    clock.advance(TTL)

    def fail() -> None:
        raise ConnectionResetError(verb)

    store.once_before(verb, fail)
    with pytest.raises(ConnectionResetError, match=f"^{verb}$"):
        take(store, "b")
    assert store.get(KEY) == first.record.to_json()


def test_peek_shows_live_and_expired_records_and_changes_nothing(
    store: RecordingStore, take: Take, api: Api, clock: Clock
) -> None:
    """One request; a store's error reaches the caller."""
    assert api.peek(store, UID, VAULT) is None
    record = acquired(take(store, "a")).record
    store.calls.clear()
    clock.advance(TTL)
    assert api.peek(store, UID, VAULT) == record
    assert store.calls == ["get"]

    def fail() -> None:
        raise TimeoutError("read")

    store.once_before("get", fail)
    with pytest.raises(TimeoutError):
        api.peek(store, UID, VAULT)


class TestRelease:
    def test_with_the_etag_is_one_request(
        self, store: RecordingStore, take: Take, api: Api
    ) -> None:
        won = acquired(take(store, "a"))
        store.calls.clear()
        released = api.release(store, UID, VAULT, expected_job_id="a", etag=won.etag)
        assert released == ReleaseResult(released=True, reason=None)
        assert store.calls == ["delete_if_match"]
        assert len(store) == 0

    def test_without_the_etag_is_two(self, store: RecordingStore, take: Take, api: Api) -> None:
        take(store, "a")
        store.calls.clear()
        assert api.release(store, UID, VAULT, expected_job_id="a").released
        assert store.calls == ["get_with_etag", "delete_if_match"]
        assert len(store) == 0

    def test_an_outdated_etag_still_releases_the_own_lock(
        self, store: RecordingStore, take: Take, api: Api
    ) -> None:
        """Somebody renewed it for this job in the meantime."""
        won = acquired(take(store, "a"))
        api.renew(store, UID, VAULT, expected_job_id="a")
        store.calls.clear()
        assert api.release(store, UID, VAULT, expected_job_id="a", etag=won.etag).released
        assert store.calls == ["delete_if_match", "get_with_etag", "delete_if_match"]

    @pytest.mark.parametrize("with_etag", [True, False])
    def test_never_touches_another_jobs_lock(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock, with_etag: bool
    ) -> None:
        """The lease ran out and another job took over."""
        slow = acquired(take(store, "a"))
        clock.advance(TTL)
        other = acquired(take(store, "b"))
        etag = slow.etag if with_etag else None
        released = api.release(store, UID, VAULT, expected_job_id="a", etag=etag)
        assert released == ReleaseResult(released=False, reason="lock_owned_by_other_job")
        assert store.get(KEY) == other.record.to_json()

    def test_not_even_one_that_takes_over_at_the_last_moment(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock
    ) -> None:
        """Between this release's read and its delete."""
        take(store, "a")
        clock.advance(TTL)
        store.once_before("delete_if_match", lambda: take(store, "b"))
        released = api.release(store, UID, VAULT, expected_job_id="a")
        assert released.reason == "lock_owned_by_other_job"
        assert '"b"' in (store.get(KEY) or "")

    @pytest.mark.parametrize("left", [None, "null", "", "junk"])
    def test_a_lock_that_is_gone(self, store: RecordingStore, api: Api, left: str | None) -> None:
        """Deleted, tombstoned or overwritten with junk: nothing to release, nothing deleted."""
        if left is not None:
            store.set(KEY, left)
        released = api.release(store, UID, VAULT, expected_job_id="a", etag="old")
        assert released == ReleaseResult(released=False, reason="lock_already_gone")
        assert store.get(KEY) == left

    def test_without_a_job_id_removes_whatever_is_there(
        self, store: RecordingStore, take: Take, api: Api
    ) -> None:
        """The operator's way out, one request, as the original; nothing there is fine too."""
        take(store, "a")
        store.calls.clear()
        assert api.release(store, UID, VAULT) == ReleaseResult(released=True, reason=None)
        assert store.calls == ["delete"]
        assert len(store) == 0
        assert api.release(store, UID, VAULT).released


class TestRenew:
    def test_moves_the_deadline_and_keeps_the_rest(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock
    ) -> None:
        won = acquired(take(store, "a", reason="r"))
        store.set(KEY, won.record.to_json()[:-1] + ',"fence":7}')
        store.calls.clear()
        clock.advance(400)
        renewed = api.renew(store, UID, VAULT, expected_job_id="a", ttl_ms=5000, clock=clock)
        assert isinstance(renewed, Renewed)
        assert store.calls == ["get_with_etag", "set_if_match"]
        assert renewed.record.expires_at == clock.now + 5000
        assert renewed.record.to_dict() == won.record.to_dict() | {
            "expiresAt": clock.now + 5000,
            "fence": 7,
        }
        assert store.get(KEY) == renewed.record.to_json()
        released = api.release(store, UID, VAULT, expected_job_id="a", etag=renewed.etag)
        assert released.released

    def test_with_record_and_etag_is_one_request(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock
    ) -> None:
        won = acquired(take(store, "a"))
        store.calls.clear()
        clock.advance(400)
        renewed = api.renew(
            store, UID, VAULT, expected_job_id="a", clock=clock, record=won.record, etag=won.etag
        )
        assert isinstance(renewed, Renewed)
        assert store.calls == ["set_if_match"]
        assert renewed.record.expires_at == clock.now + joblock.JOB_LOCK_TTL_MS
        assert store.get(KEY) == renewed.record.to_json()

    @pytest.mark.parametrize("given", ["etag", "record"])
    def test_with_only_one_of_them_reads_first(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock, given: str
    ) -> None:
        won = acquired(take(store, "a"))
        store.calls.clear()
        clock.advance(400)
        option = {given: getattr(won, given)}
        renewed = api.renew(store, UID, VAULT, expected_job_id="a", clock=clock, **option)
        assert isinstance(renewed, Renewed)
        assert store.calls == ["get_with_etag", "set_if_match"]
        assert store.get(KEY) == renewed.record.to_json()

    def test_with_an_outdated_etag_looks_again(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock
    ) -> None:
        """And writes back what is stored now, not the old record."""
        won = acquired(take(store, "a"))
        store.set(KEY, won.record.to_json()[:-1] + ',"fence":7}')
        store.calls.clear()
        renewed = api.renew(
            store, UID, VAULT, expected_job_id="a", clock=clock, record=won.record, etag=won.etag
        )
        assert isinstance(renewed, Renewed)
        assert store.calls == ["set_if_match", "get_with_etag", "set_if_match"]
        assert renewed.record.extra == {"fence": 7}

    def test_an_expired_lock_that_nobody_took_is_renewed(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock
    ) -> None:
        """The etag proves that nobody did."""
        take(store, "a")
        clock.advance(10 * TTL)
        renewed = api.renew(store, UID, VAULT, expected_job_id="a", ttl_ms=TTL, clock=clock)
        assert isinstance(renewed, Renewed)
        assert held(take(store, "b")).existing == renewed.record

    def test_is_lost_to_a_takeover_at_the_last_moment(
        self, store: RecordingStore, take: Take, api: Api, clock: Clock
    ) -> None:
        take(store, "a")
        clock.advance(TTL)
        store.once_before("set_if_match", lambda: take(store, "b"))
        lost = api.renew(store, UID, VAULT, expected_job_id="a", clock=clock)
        current = api.peek(store, UID, VAULT)
        assert current is not None
        assert current.job_id == "b"
        assert lost == Lost("lock_owned_by_other_job", current)

    @pytest.mark.parametrize("left", [None, "null", "", "junk"])
    def test_is_lost_when_the_record_is_gone(
        self, store: RecordingStore, api: Api, left: str | None
    ) -> None:
        """And nothing is written in its place."""
        if left is not None:
            store.set(KEY, left)
        assert api.renew(store, UID, VAULT, expected_job_id="a") == Lost("lock_already_gone", None)
        assert store.get(KEY) == left


class TestARefusalThatTellsWhatIsThere:
    """A store may say it with its refusal; what is decided is the same."""

    def test_a_free_lock_is_acquired_with_one_request(self, take: Take) -> None:
        store = TellingStore()
        won = acquired(take(store, "a"))
        assert store.calls == ["set_if_new_or_get"]
        blob = store.get_with_etag(KEY)
        assert blob is not None
        assert (blob.value, blob.etag) == (won.record.to_json(), won.etag)

    def test_a_live_lock_is_held_with_one_request(self, take: Take) -> None:
        store = TellingStore()
        first = acquired(take(store, "a"))
        store.calls.clear()
        assert held(take(store, "b")).existing == first.record
        assert store.calls == ["set_if_new_or_get"]

    def test_an_expired_lock_is_taken_over(self, take: Take, clock: Clock) -> None:
        """With the etag that it told, which must still be the current one."""
        store = TellingStore()
        first = acquired(take(store, "a"))
        clock.advance(TTL)
        store.calls.clear()
        second = acquired(take(store, "b"))
        assert store.calls == ["set_if_new_or_get", "set_if_match"]
        assert second.took_over == first.record
        clock.advance(TTL)
        store.once_before("set_if_match", lambda: take(store, "c"))
        assert held(take(store, "d")).existing.job_id == "c"

    def test_one_that_cannot_tell_is_asked(self, take: Take) -> None:
        class Silent(TellingStore):
            def set_if_new_or_get(self, key: str, value: str) -> str | Blob | None:
                told = super().set_if_new_or_get(key, value)
                return None if isinstance(told, Blob) else told

        store = Silent()
        first = acquired(take(store, "a"))
        store.calls.clear()
        assert held(take(store, "b")).existing == first.record
        assert store.calls == ["set_if_new_or_get", "get_with_etag"]

    def test_its_own_record_is_no_other_s(self, api: Api) -> None:
        """The client repeated the request by itself."""

        class Repeats(TellingStore):
            def set_if_new_or_get(self, key: str, value: str) -> str | Blob | None:
                super().set_if_new_or_get(key, value)
                return super().set_if_new_or_get(key, value)

        store = Repeats()
        won = acquired(api.acquire(store, UID, VAULT))
        assert api.release(store, UID, VAULT, expected_job_id=won.job_id, etag=won.etag)
        assert store.calls == ["set_if_new_or_get", "set_if_new_or_get", "delete_if_match"]

    @pytest.mark.parametrize(
        "answer", [True, "", 1, Blob("{}", ""), Blob("{}", NONE), Blob(*WRONG)]
    )
    def test_a_wrong_answer_is_an_error(self, take: Take, answer: Any) -> None:
        """It must not let everybody win."""

        class Wrong(TellingStore):
            def set_if_new_or_get(self, key: str, value: str) -> Any:
                return answer

        with pytest.raises(TypeError, match="must return"):
            take(Wrong(), "a")

    def test_of_an_async_store_it_is_async(self) -> None:
        class Half(AsyncConditionalView):
            def set_if_new_or_get(self, key: str, value: str) -> str | None:
                return self.conditional.set_if_new(key, value)

        store = TellingStore()
        with pytest.raises(TypeError, match="Half.set_if_new_or_get is not `async def`"):
            await_now(aio.acquire_job_lock(Half(store), UID, VAULT))
        assert store.calls == []

    def test_what_overrides_set_if_new_alone_is_not_passed_by(self, take: Take) -> None:
        """Nor is a wrapper that hands on what it does not know: both may have other keys."""

        class Elsewhere(TellingStore):
            def set_if_new(self, key: str, value: str) -> str | None:
                return super().set_if_new(f"other/{key}", value)

        class Wrapper:
            def __init__(self, store: TellingStore) -> None:
                self._store = store
                self.get, self.set, self.delete = store.get, store.set, store.delete
                self.get_with_etag, self.set_if_match = store.get_with_etag, store.set_if_match
                self.delete_if_match = store.delete_if_match

            def __getattr__(self, name: str) -> Any:
                return getattr(self._store, name)

            def set_if_new(self, key: str, value: str) -> str | None:
                return self._store.set_if_new(f"other/{key}", value)

        store = Elsewhere()
        assert take(store, "a")
        assert list(store) == [f"other/{KEY}"]
        inner = TellingStore()
        wrapped: Any = Wrapper(inner)
        assert take(wrapped, "a")
        assert list(inner) == [f"other/{KEY}"]


def test_the_defaults_are_a_random_uuid_and_the_wall_clock(store: RecordingStore, api: Api) -> None:
    """As in production."""
    won = acquired(api.acquire(store, UID, VAULT))
    assert str(uuid.UUID(won.job_id)) == won.job_id
    assert won.record.started_at is not None
    assert won.record.expires_at == won.record.started_at + joblock.JOB_LOCK_TTL_MS
    assert joblock.Held(won.record).retry_after_s() in range(950, 961)
