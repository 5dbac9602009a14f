"""Bad input: what is refused, with which error, and that the store is not touched by it."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Callable, Generator
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

import joblock
from joblock import (
    InvalidIdError,
    JobLockError,
    JobLockWarning,
    MemoryBlobStore,
    aio,
    peek_job_lock,
)
from joblock._record import epoch_ms
from joblock._store import CONDITIONAL, run
from tests.support import (
    KEY,
    UID,
    VAULT,
    Api,
    AsyncApi,
    AsyncConditionalView,
    AsyncView,
    Clock,
    PlainStore,
    RecordingStore,
    SyncApi,
    acquired,
    async_view,
    await_now,
    held,
)

BAD_IDS: list[Any] = [None, 5, b"u", "", ".", "..", "a/b", "a\x00", "a\x9f", "\udfff"]
BAD_JOB_IDS: list[Any] = ["", 5, True, b"job", ["job"]]
CALLS: dict[str, dict[str, Any]] = {
    "acquire": {},
    "release": {},
    "peek": {},
    "renew": {"expected_job_id": "a"},
}


@pytest.mark.parametrize("bad", BAD_IDS, ids=repr)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("function", CALLS)
def test_an_id_that_cannot_name_a_lock(api: Api, function: str, position: int, bad: Any) -> None:
    """Every function refuses it before it calls the store."""
    store = RecordingStore()
    ids = [UID, VAULT]
    ids[position] = bad
    with pytest.raises(InvalidIdError) as caught:
        getattr(api, function)(store, *ids, **CALLS[function])
    assert isinstance(caught.value, JobLockError)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert store.calls == []


@pytest.mark.parametrize("store_type", [RecordingStore, PlainStore])
@pytest.mark.parametrize("bad", BAD_JOB_IDS, ids=repr)
@pytest.mark.parametrize("function", ["release", "renew"])
def test_an_expected_job_id_that_is_none(
    api: Api, function: str, bad: Any, store_type: type[RecordingStore | PlainStore]
) -> None:
    """An empty variable must not force a release."""
    store = store_type()
    with pytest.raises(InvalidIdError, match="^expected_job_id must be a non-empty string"):
        getattr(api, function)(store, UID, VAULT, expected_job_id=bad)
    assert store.calls == []


def test_renew_needs_an_expected_job_id(api: Api) -> None:
    """None is a release by force; there is no renewal by force."""
    nobody: Any = None
    with pytest.raises(InvalidIdError, match="expected_job_id"):
        api.renew(MemoryBlobStore(), UID, VAULT, expected_job_id=nobody)


@pytest.mark.parametrize("bad", ["", 5, b"etag"], ids=repr)
@pytest.mark.parametrize("function", ["release", "renew"])
def test_an_etag_that_is_none(api: Api, function: str, bad: Any) -> None:
    """Some SDKs drop an empty condition and write unconditionally."""
    store = RecordingStore()
    with pytest.raises(InvalidIdError, match="^etag must be a non-empty string"):
        getattr(api, function)(store, UID, VAULT, expected_job_id="a", etag=bad)
    assert store.calls == []


def test_an_etag_without_a_job_id_is_not_a_release_by_force(api: Api) -> None:
    """It looks like "release mine", so it must not delete another job's lock."""
    store = RecordingStore()
    with pytest.raises(InvalidIdError, match="^expected_job_id must be given with an etag"):
        api.release(store, UID, VAULT, etag="1")
    assert store.calls == []


def test_renew_refuses_another_jobs_record(api: Api, clock: Clock) -> None:
    """Writing it would hand the lock over."""
    store = RecordingStore()
    won = acquired(api.acquire(store, UID, VAULT, clock=clock, uuid_factory=lambda: "a"))
    store.calls.clear()
    with pytest.raises(InvalidIdError, match="^record is job 'a''s, not 'b''s"):
        api.renew(store, UID, VAULT, expected_job_id="b", record=won.record, etag=won.etag)
    assert store.calls == []


@pytest.mark.parametrize("bad", [5, True, b"x", ["x"], {}], ids=repr)
@pytest.mark.parametrize("field", ["actor_uid", "reason"])
@pytest.mark.parametrize("store_type", [MemoryBlobStore, PlainStore])
def test_descriptive_text_of_another_type_is_recorded_as_null(
    api: Api, field: str, bad: Any, store_type: Callable[[], Any]
) -> None:
    """Lenient, as the original: a description must not keep a job from running. But it warns."""
    with pytest.warns(JobLockWarning, match=f"^{field}={re.escape(repr(bad))}") as caught:
        won = acquired(api.acquire(store_type(), UID, VAULT, **{field: bad}))
    assert getattr(won.record, field) is None
    assert [Path(warning.filename).name for warning in caught] == [CALLER[api]]


NOT_NUMBERS: list[Any] = [
    *("5", True, False, b"5", float("nan"), float("inf"), 10**400, Decimal(5), []),
    Fraction(10**400),
]
# pytest.warns shows whose line is warned of: that of the caller of joblock, not one of joblock's.
CALLER = {SyncApi: "test_bad_input.py", AsyncApi: "support.py"}


@pytest.mark.parametrize("bad", NOT_NUMBERS, ids=lambda bad: repr(bad)[:20])
@pytest.mark.parametrize("field", ["chunks_to_embed", "estimated_seconds"])
def test_descriptive_number_that_is_not_finite_is_recorded_as_null(
    api: Api, field: str, bad: Any
) -> None:
    """A bool is not a number."""
    with pytest.warns(JobLockWarning, match=f"^{field}="):
        won = acquired(api.acquire(MemoryBlobStore(), UID, VAULT, **{field: bad}))
    assert getattr(won.record, field) is None


@pytest.mark.parametrize(
    ("real", "recorded"), [(Fraction(7, 2), "3.5"), (Fraction(7), "7"), (7, "7"), (3.5, "3.5")]
)
@pytest.mark.parametrize("field", ["chunks_to_embed", "estimated_seconds", "ttl_ms"])
def test_any_real_number_counts(api: Api, field: str, real: Any, recorded: str) -> None:
    """Such as numpy's, which are no ints and floats; they are written as JSON's numbers."""
    store = MemoryBlobStore()
    won = acquired(api.acquire(store, UID, VAULT, clock=lambda: 0, **{field: real}))
    name = "expires_at" if field == "ttl_ms" else field
    assert str(getattr(won.record, name)).removesuffix(".0") == recorded
    assert peek_job_lock(store, UID, VAULT) == won.record


def test_an_integer_of_another_type_is_recorded_as_an_int(api: Api) -> None:
    """Such as numpy's; so that it is written without a fraction, as the original writes it."""

    class Whole:
        def __int__(self) -> int:
            return 7

    Integral.register(Whole)
    many: Any = Whole()
    won = acquired(api.acquire(MemoryBlobStore(), UID, VAULT, chunks_to_embed=many))
    assert won.record.chunks_to_embed == 7
    assert type(won.record.chunks_to_embed) is int


def test_a_ttl_is_a_timedelta(api: Api, clock: Clock) -> None:
    """In acquire and in renew."""
    store = MemoryBlobStore()
    minute = timedelta(minutes=1)
    won = acquired(api.acquire(store, UID, VAULT, ttl_ms=minute, clock=clock))
    assert won.record.expires_at == clock.now + 60_000
    clock.advance(7)
    renewed = api.renew(store, UID, VAULT, expected_job_id=won.job_id, ttl_ms=minute, clock=clock)
    assert renewed and renewed.record.expires_at == clock.now + 60_000


NO_TTLS = [*NOT_NUMBERS, None, 0, -1, -0.5, timedelta(0), timedelta(seconds=-1)]


@pytest.mark.parametrize("bad", NO_TTLS, ids=lambda bad: repr(bad)[:20])
@pytest.mark.parametrize("store_type", [MemoryBlobStore, PlainStore])
def test_a_ttl_that_is_not_positive_and_finite_is_the_default(
    api: Api, clock: Clock, bad: Any, store_type: Callable[[], Any]
) -> None:
    """In acquire, as in the original; it warns, since 16 minutes are not what was meant."""
    with pytest.warns(JobLockWarning, match=f"^ttl_ms={re.escape(repr(bad))}") as caught:
        won = acquired(api.acquire(store_type(), UID, VAULT, ttl_ms=bad, clock=clock))
    assert won.record.expires_at == clock.now + joblock.JOB_LOCK_TTL_MS
    assert [Path(warning.filename).name for warning in caught] == [CALLER[api]]


@pytest.mark.parametrize("bad", NO_TTLS, ids=lambda bad: repr(bad)[:20])
@pytest.mark.parametrize("store_type", [RecordingStore, PlainStore])
def test_a_ttl_to_renew_with_that_is_none(api: Api, bad: Any, store_type: Any) -> None:
    """The original has no renewal to be true to: so it is an error, before any request."""
    store = store_type()
    with pytest.raises(ValueError, match=f"^ttl_ms .*{re.escape(repr(bad))}"):
        api.renew(store, UID, VAULT, expected_job_id="a", ttl_ms=bad)
    assert store.calls == []


@pytest.mark.parametrize("bad", ["5", True, None, float("nan"), float("inf"), -1], ids=repr)
@pytest.mark.parametrize("store_type", [RecordingStore, PlainStore])
def test_a_clock_skew_that_is_not_finite_and_positive(
    api: Api, bad: Any, store_type: type[RecordingStore | PlainStore]
) -> None:
    """It guards a live lock, so it is not lenient: NaN would make every lock look expired."""
    store = store_type()
    with pytest.raises(ValueError, match="^clock_skew_ms"):
        api.acquire(store, UID, VAULT, clock_skew_ms=bad)
    assert store.calls == []


@pytest.mark.parametrize("bad", [None, "5", True, float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("store_type", [RecordingStore, PlainStore])
def test_a_clock_that_gives_no_number(
    api: Api, bad: Any, store_type: type[RecordingStore | PlainStore]
) -> None:
    """It raises before anything is written."""
    store = store_type()
    with pytest.raises(TypeError, match="^clock must return epoch milliseconds"):
        api.acquire(store, UID, VAULT, clock=lambda: bad)
    assert store.calls == []


def test_a_job_id_outside_ascii(api: Api) -> None:
    """Any text that can be written and read back will do."""
    store = MemoryBlobStore()
    lock = acquired(api.acquire(store, UID, VAULT, uuid_factory=lambda: "jöb-日本-🔒"))
    assert held(api.acquire(store, UID, VAULT)).existing == lock.record
    assert api.release(store, UID, VAULT, expected_job_id="jöb-日本-🔒").released


@pytest.mark.parametrize("bad", ["", None, 5, b"job", "\ud83d\udd12"], ids=repr)
@pytest.mark.parametrize("store_type", [MemoryBlobStore, PlainStore])
def test_a_uuid_factory_that_gives_no_id(api: Api, bad: Any, store_type: Callable[[], Any]) -> None:
    """Such a lock could never be released by its job."""
    store = store_type()
    with pytest.raises(InvalidIdError, match="^uuid_factory's job id must"):
        api.acquire(store, UID, VAULT, uuid_factory=lambda: bad)
    assert store.get(KEY) is None


class GetOnly:
    def get(self, key: str) -> str | None:
        return None


class DeleteOnly:
    def delete(self, key: str) -> None:
        pass


BAD_STORES: list[Any] = [None, 5, [], object(), DeleteOnly()]
WITHOUT: list[tuple[str, Any, dict[str, Any]]] = [
    *[(name, store, CALLS[name]) for name in ("acquire", "peek", "renew") for store in BAD_STORES],
    *[("release", store, {}) for store in [*BAD_STORES[:-1], GetOnly()]],
    ("acquire", GetOnly(), {}),
    ("renew", GetOnly(), CALLS["renew"]),
    ("release", DeleteOnly(), {"expected_job_id": "a"}),
]


@pytest.mark.parametrize(("function", "store", "options"), WITHOUT)
def test_a_store_without_the_methods_that_the_function_needs(
    function: str, store: Any, options: dict[str, Any]
) -> None:
    """TypeError, before the ids are even looked at; in both modules."""
    with pytest.raises(TypeError, match="lacks"):
        getattr(SyncApi, function)(store, UID, VAULT, **options)
    with pytest.raises(TypeError, match="lacks"):
        await_now(getattr(aio, f"{function}_job_lock")(store, UID, VAULT, **options))


def test_a_store_with_no_more_than_the_function_needs() -> None:
    """As the original: peek takes one that can only read, a forced release one that deletes."""
    getter: Any = GetOnly()
    deleter: Any = DeleteOnly()
    assert joblock.peek_job_lock(getter, UID, VAULT) is None
    assert joblock.release_job_lock(deleter, UID, VAULT).released


def test_a_store_with_only_some_conditional_methods() -> None:
    """A misspelt method must not silently cost the guarantee."""

    class Misspelt(PlainStore):
        def set_if_new(self, key: str, value: str) -> str | None:
            return None

    store = Misspelt()
    with pytest.raises(TypeError, match="lacks get_with_etag, set_if_match, delete_if_match"):
        joblock.acquire_job_lock(store, UID, VAULT)
    assert store.calls == []


@pytest.mark.parametrize("answer", [False, True, 1, "", b"1"])
def test_a_write_that_answers_with_no_etag(api: Api, answer: Any) -> None:
    """A refusal that is False instead of None must not be a win."""

    class Wrong(MemoryBlobStore):
        def set_if_new(self, key: str, value: str) -> Any:
            return super().set_if_new(key, value) if well else answer

        def set_if_match(self, key: str, value: str, etag: str) -> Any:
            return answer

    store, well = Wrong(), False
    with pytest.raises(TypeError, match="set_if_new must return the new etag"):
        api.acquire(store, UID, VAULT)
    well = True
    lock = acquired(api.acquire(store, UID, VAULT, ttl_ms=1))
    with pytest.raises(TypeError, match="set_if_match must return the new etag"):
        api.acquire(store, UID, VAULT, clock=lambda: epoch_ms() + 10_000)
    with pytest.raises(TypeError, match="set_if_match must return the new etag"):
        api.renew(store, UID, VAULT, expected_job_id=lock.job_id)


@pytest.mark.parametrize("answer", [None, 1, 0])
def test_a_removal_that_does_not_say_whether_it_was_one(api: Api, answer: Any) -> None:
    """It must not be told that the lock was gone already."""

    class Wrong(MemoryBlobStore):
        def delete_if_match(self, key: str, etag: str) -> Any:
            return answer

    store = Wrong()
    lock = acquired(api.acquire(store, UID, VAULT))
    with pytest.raises(TypeError, match="delete_if_match must return True or False"):
        api.release(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("function", CALLS)
def test_an_async_store_in_a_sync_function(function: str, conditional: bool) -> None:
    """TypeError that names the right module; no coroutine is left that nobody awaits."""
    inner: Any = MemoryBlobStore() if conditional else PlainStore()
    store: Any = async_view(inner)
    with pytest.raises(TypeError, match="use the functions of joblock.aio"):
        getattr(SyncApi, function)(store, UID, VAULT, **CALLS[function])
    gc.collect()  # a coroutine that was never awaited would warn now, and a warning is an error
    assert inner.get(KEY) is None


def test_only_a_view_of_a_blocking_store_is_run_to_its_end() -> None:
    """A coroutine that suspends is closed and reported, not left hanging."""

    class Suspend:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def suspend() -> None:
        await Suspend()

    with pytest.raises(RuntimeError, match="waits for something"):
        run(suspend())


def test_an_awaitable_that_is_no_coroutine_in_a_sync_function() -> None:
    """Such as a future."""

    class Future:
        def __await__(self) -> Any:
            raise AssertionError("awaited")

    class Store(PlainStore):
        def get(self, key: str) -> Any:
            return Future()

    with pytest.raises(TypeError, match=r"joblock\.aio"):
        joblock.peek_job_lock(Store(), UID, VAULT)


@pytest.mark.parametrize(
    "call",
    [
        "get k",
        "set k v",
        "delete k",
        "get_with_etag k",
        "set_if_new k v",
        "set_if_match k v 1",
        "delete_if_match k 1",
    ],
)
def test_a_store_in_threads_whose_methods_return_coroutines(call: str) -> None:
    """Which does not show before they are called: a coroutine is no etag, and no win."""

    def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: method(*args, **kwargs)

    store: Any = AsyncConditionalView(MemoryBlobStore())
    for method in ("get", "set", "delete", *CONDITIONAL):
        setattr(store, method, decorated(getattr(store, method)))
    name, *arguments = call.split()
    with pytest.raises(TypeError, match="the store is async"):
        asyncio.run(getattr(aio.ThreadedBlobStore(store), name)(*arguments))
    gc.collect()  # or it would warn of a coroutine that nobody awaited


@pytest.mark.parametrize("method", ["get", "set", "delete", *CONDITIONAL])
def test_a_store_in_threads_with_one_async_method(method: str) -> None:
    """Any of them is found out at once."""
    store: Any = MemoryBlobStore()
    setattr(store, method, getattr(AsyncConditionalView(store), method))
    with pytest.raises(TypeError, match="is async already"):
        aio.ThreadedBlobStore(store)


@pytest.mark.parametrize("store_type", [RecordingStore, PlainStore])
@pytest.mark.parametrize("function", CALLS)
def test_a_blocking_store_in_an_async_function(
    function: str, store_type: type[RecordingStore | PlainStore]
) -> None:
    """TypeError that names the way out, before the store is called: no lock is left behind."""
    store: Any = store_type()
    with pytest.raises(TypeError, match=r"joblock, or wrap it in joblock\.aio\.ThreadedBlobStore"):
        asyncio.run(getattr(aio, f"{function}_job_lock")(store, UID, VAULT, **CALLS[function]))
    assert store.calls == []


@pytest.mark.parametrize("wrap", [partial, AsyncMock])
def test_an_async_method_that_is_no_plain_function(wrap: Callable[..., Any]) -> None:
    """A partial or a mock of an `async def` is as good as one."""
    view = AsyncView(PlainStore())
    wrapped = {"get": wrap(view.get), "set": wrap(view.set)}
    for name, method in wrapped.items():
        setattr(view, name, method)
    assert await_now(aio.acquire_job_lock(view, UID, VAULT, uuid_factory=lambda: "a"))


@pytest.mark.parametrize("method", ["set", "set_if_new"])
def test_one_blocking_method_in_an_async_store(method: str) -> None:
    """A forgotten `async` is found before anything is written."""
    inner = MemoryBlobStore()
    view = AsyncConditionalView(inner)
    setattr(view, method, getattr(inner, method))
    with pytest.raises(TypeError, match=rf"View\.{method} is not `async def`"):
        await_now(aio.acquire_job_lock(view, UID, VAULT))
    assert len(inner) == 0


@pytest.mark.parametrize("inner", [MemoryBlobStore(), PlainStore()], ids=["conditional", "plain"])
def test_an_async_store_in_a_threaded_one(inner: Any) -> None:
    """Its coroutines would be taken for answers."""
    store: Any = async_view(inner)
    with pytest.raises(TypeError, match="is async already"):
        aio.ThreadedBlobStore(store)


def test_an_async_mock_is_an_async_store() -> None:
    """What users' own tests hand in."""
    store = AsyncMock(spec=AsyncView)
    store.get.return_value = None
    assert await_now(aio.acquire_job_lock(store, UID, VAULT)).acquired
    store = AsyncMock(spec=AsyncConditionalView)
    store.set_if_new.return_value = None
    store.get_with_etag.return_value = joblock.Blob('{"jobId":"a","expiresAt":9e15}', "1")
    assert held(await_now(aio.acquire_job_lock(store, UID, VAULT))).existing.job_id == "a"


ASYNC_ONLY = {"AsyncMemoryBlobStore", "ThreadedBlobStore", "check_store", "open_store"}


def test_sync_and_async_refuse_alike() -> None:
    """The two faces that these tests go through are the real functions."""
    assert SyncApi.acquire is joblock.acquire_job_lock
    assert AsyncApi.acquire is not SyncApi.acquire
    assert set(aio.__all__) - ASYNC_ONLY <= set(joblock.__all__)
