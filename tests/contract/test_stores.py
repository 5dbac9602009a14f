"""What every conditional store must do: each that ships, and some behind a ThreadedBlobStore."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from joblock import (
    ConditionalBlobStore,
    JobLockRecord,
    MemoryBlobStore,
    acquire_job_lock,
    list_job_locks,
    peek_job_lock,
    sweep_job_locks,
)
from joblock._record import epoch_ms
from joblock.aio import ThreadedBlobStore
from joblock.conformance import check_store
from joblock.stores.sqlite import SqliteBlobStore
from tests.backends import (
    BY_CONTENT,
    DATABASES,
    NAMES,
    OBJECT_STORES,
    TOMBSTONE,
    Backends,
    FromThreads,
    in_a_loop,
)
from tests.model.linearizability import Event, as_text, explanation, record

T = TypeVar("T")

KEY = "index-jobs/u/v.json"
TOMBSTONE_TEXT = "null"
THREADS = 24
THREADED = ("memory", "sqlite", "s3", "netlify-edge", "redis", "postgresql-psycopg")


@pytest.fixture(params=["memory", "sqlite", *NAMES, *OBJECT_STORES, *DATABASES, "valkey"])
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(params=["", "threaded"], ids=["blocking", "threaded"])
def store(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, backends: Backends
) -> Iterator[ConditionalBlobStore]:
    if request.param and name not in THREADED:
        pytest.skip("others are tried in threads: to ThreadedBlobStore a store is a store")
    with ExitStack() as stack:
        made: ConditionalBlobStore
        if name == "memory":
            made = MemoryBlobStore()
        elif name == "sqlite":
            made = stack.enter_context(SqliteBlobStore(tmp_path / "jobs.db"))
        else:
            made = backends[name].open(stack, backends.new_prefix())
        yield in_a_loop(ThreadedBlobStore(made), None, stack) if request.param else made


def at_once(act: Callable[[str], T]) -> list[T]:
    """What `act` returned in each of many threads that started together, given their numbers."""
    barrier = threading.Barrier(THREADS, timeout=60)

    def wait_and_act(number: int) -> T:
        barrier.wait()
        return act(str(number))

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(wait_and_act, range(THREADS)))


def rounds(name: str) -> int:
    return 8 if name in ("memory", "sqlite") else 3


def text_of(store: ConditionalBlobStore, key: str = KEY) -> str | None:
    value = store.get(key)
    return None if value is None else as_text(value)


def is_free(store: ConditionalBlobStore, name: str) -> bool:
    return text_of(store) == (TOMBSTONE_TEXT if name in TOMBSTONE else None)


def etag_of(store: ConditionalBlobStore) -> str:
    blob = store.get_with_etag(KEY)
    assert blob is not None
    return blob.etag


def test_keys_are_listed(store: ConditionalBlobStore, name: str) -> None:
    """All that begin exactly so, over pages, whatever a service takes for a pattern or an end."""
    if name == "netlify-api":
        pytest.skip("the local server takes a listing's query for a part of the store's name")
    listing: Any = store
    count = 1100 if name in ("memory", "sqlite", *DATABASES) else 20
    expected = {f"index-jobs/u{number}/v.json" for number in range(count)}
    odd = ["a_b/c", "a%b/c", "a*b/c", "a?b/c", "a[b]/c", "A_B/c", "axb/c", "é日/c", "é日.c"]
    assert list(listing.list_keys("")) == []
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(partial(listing.set, value="{}"), [*expected, *odd]))
    assert set(listing.list_keys("index-jobs/u")) == expected
    for prefix in ("a_b", "a%b", "a*b", "a?b", "a[b]", "A_", "é日/", "é", "b", "a_b/c"):
        found = sorted(listing.list_keys(prefix))
        assert found == sorted(key for key in odd if key.startswith(prefix))
    assert set(listing.list_keys("")) == {*expected, *odd}


def test_locks_are_listed_and_swept(store: ConditionalBlobStore, name: str) -> None:
    """An expired one goes, a live one stays; where a delete leaves a null, a sweep is refused."""
    if name == "netlify-api":
        pytest.skip("the local server takes a listing's query for a part of the store's name")
    assert acquire_job_lock(store, "u", "old", clock=lambda: 0)
    live = acquire_job_lock(store, "u", "live")
    assert live
    assert sorted(str(it.vault_id) for it in list_job_locks(store, "u")) == ["live", "old"]
    if name in TOMBSTONE and not isinstance(store, FromThreads):
        with pytest.raises(TypeError, match="writes null instead"):
            sweep_job_locks(store, expired_for_ms=0)
    elif name not in TOMBSTONE:
        assert sweep_job_locks(store, expired_for_ms=0) == 1
        assert list(list_job_locks(store)) == [live.record]


@pytest.mark.parametrize("name", ["s3", "azure"])
def test_a_listing_of_two_pages(name: str, backends: Backends) -> None:
    """A thousand keys are one page, of which the services give no more at once."""
    expected = {f"index-jobs/u{number}/v.json" for number in range(1005)}
    with ExitStack() as stack:
        store: Any = backends[name].open(stack, backends.new_prefix())
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(partial(store.set, value="{}"), expected))
        assert sorted(store.list_keys("index-jobs/")) == sorted(expected)


def test_a_missing_key(store: ConditionalBlobStore) -> None:
    """Reads give None, a delete is no error, a condition on it fails."""
    assert store.get(KEY) is None
    assert store.get_with_etag(KEY) is None
    store.delete(KEY)
    for etag in ("1", '"1"', "0", "*", "", " ", " *", "\t", "é日"):
        assert store.set_if_match(KEY, "x", etag) is None
        assert store.delete_if_match(KEY, etag) is False
    assert store.get(KEY) is None


@pytest.mark.parametrize("value", ["x", "", "é日🔒\u2028", "a\x00b", "null", "x" * 100_000])
def test_reads_what_was_written(store: ConditionalBlobStore, name: str, value: str) -> None:
    """By each way of writing, and each way of reading."""
    if "\0" in value and name.startswith("postgresql"):
        pytest.skip("PostgreSQL takes no such text, and says so; a record has none")
    store.set(KEY, value)
    assert text_of(store) == value
    etag = etag_of(store)
    for conditional in ("set_if_match", "set_if_new"):
        if conditional == "set_if_match":
            new = store.set_if_match(KEY, value, etag)
        else:
            new = store.set_if_new(KEY, value)
        blob = store.get_with_etag(KEY)
        assert blob is not None
        assert (as_text(blob.value), blob.etag) == (value, new)
        assert text_of(store) == value
        store.delete(KEY)
        assert store.get(KEY) is None


def test_an_etag_that_never_was(store: ConditionalBlobStore) -> None:
    """Is refused, not taken for a wildcard or for "no such key"."""
    store.set(KEY, "x")
    for etag in ("99", '"1"', "0", "*", "", " ", " *", "\t", "é日"):
        assert store.set_if_match(KEY, "y", etag) is None
        assert store.delete_if_match(KEY, etag) is False
    assert text_of(store) == "x"


@pytest.mark.parametrize(
    "key",
    [
        "index-jobs/é日🔒/a b.json",
        "index-jobs/q\"'%_/?#%20&=+;:@!$^[]{}|~`<>,.json",
        "index-jobs/U/v.json",
        "index-jobs/u/v.json.json",
        "index-jobs/u./ v .json",
    ],
)
def test_keys_are_exact(store: ConditionalBlobStore, key: str) -> None:
    """Non-ASCII, quotes, wildcards, what is special in a URL, and case: another lock."""
    store.set(KEY, "other")
    assert store.set_if_new(key, "x")
    assert text_of(store, key) == "x"
    assert text_of(store) == "other"
    store.delete(key)
    assert text_of(store) == "other"


def test_a_refusal_that_tells(store: Any, name: str) -> None:
    """What is there and its etag, and nothing is written; a free key is written."""
    if not hasattr(store, "set_if_new_or_get"):
        pytest.skip("it has no such method")
    etag = store.set_if_new_or_get(KEY, "x")
    assert isinstance(etag, str)
    told = store.set_if_new_or_get(KEY, "y")
    if name == "dynamodb" or name.startswith("mariadb"):  # dynalite, and MariaDB, do not tell
        assert told is None
    else:
        assert (as_text(told.value), told.etag) == ("x", etag)
    assert text_of(store) == "x"
    assert etag_of(store) == etag
    assert store.set_if_match(KEY, "z", etag)
    answers = at_once(partial(store.set_if_new_or_get, "index-jobs/u/other.json"))
    assert [isinstance(answer, str) for answer in answers].count(True) == 1


def test_set_if_new_writes_only_a_new_key(store: ConditionalBlobStore) -> None:
    """An empty value is a value too."""
    for first in ("x", ""):
        etag = store.set_if_new(KEY, first)
        assert etag == etag_of(store)
        assert store.set_if_new(KEY, "y") is None
        assert text_of(store) == first
        assert etag_of(store) == etag
        store.delete(KEY)


def test_set_if_match_writes_only_the_current_version(store: ConditionalBlobStore) -> None:
    """And moves the etag."""
    first = store.set_if_new(KEY, "x")
    assert first
    second = store.set_if_match(KEY, "y", first)
    assert second
    assert second != first
    assert text_of(store) == "y"
    assert store.set_if_match(KEY, "z", first) is None
    assert (text_of(store), etag_of(store)) == ("y", second)


def test_delete_if_match_removes_only_the_current_version(
    store: ConditionalBlobStore, name: str
) -> None:
    """And says so. What is left is nothing, or a tombstone that the next lock replaces."""
    first = store.set_if_new(KEY, "x")
    assert first
    second = store.set_if_match(KEY, "y", first)
    assert second
    assert store.delete_if_match(KEY, first) is False
    assert text_of(store) == "y"
    assert store.delete_if_match(KEY, second) is True
    assert is_free(store, name)
    assert store.delete_if_match(KEY, second) is False
    assert is_free(store, name)
    assert (peek_job_lock(store, "u", "v"), JobLockRecord.from_json(store.get(KEY))) == (None, None)
    assert acquire_job_lock(store, "u", "v")


def test_an_unconditional_write_moves_the_etag(store: ConditionalBlobStore, name: str) -> None:
    """Even one of the same value, except in S3: whoever read before must be refused."""
    first = store.set_if_new(KEY, "x")
    assert first
    store.set(KEY, "z" if name in BY_CONTENT else "x")
    assert store.set_if_match(KEY, "y", first) is None
    assert store.delete_if_match(KEY, first) is False


def test_an_etag_does_not_come_back_with_the_key(store: ConditionalBlobStore, name: str) -> None:
    """Deleted and created again, with the same value except in S3, it is another version."""
    etags: set[str] = set()
    for round_ in range(5):
        etag = store.set_if_new(KEY, f"x{round_}" if name in BY_CONTENT else "x")
        assert etag
        for stale in etags:
            assert store.set_if_match(KEY, "y", stale) is None
            assert store.delete_if_match(KEY, stale) is False
        etags.add(etag)
        assert store.delete_if_match(KEY, etag)
        store.delete(KEY)
    assert len(etags) == 5


def test_an_etag_of_another_key_does_not_match(store: ConditionalBlobStore) -> None:
    """A condition is about one key."""
    store.set_if_new(KEY, "x")
    other = store.set_if_new("index-jobs/u/other.json", "z")
    assert other
    assert store.set_if_match(KEY, "y", other) is None
    assert store.delete_if_match(KEY, other) is False


def test_one_of_many_creates_wins(store: ConditionalBlobStore, name: str) -> None:
    """From as many threads; and what is stored is the winner's."""
    for round_ in range(rounds(name)):
        key = f"{KEY}{round_}"
        etags = at_once(partial(store.set_if_new, key))
        (winner,) = [n for n, etag in enumerate(etags) if etag is not None]
        blob = store.get_with_etag(key)
        assert blob is not None
        assert (as_text(blob.value), blob.etag) == (str(winner), etags[winner])


def test_one_of_many_conditional_writes_wins(store: ConditionalBlobStore, name: str) -> None:
    """All with the same etag."""

    def write(etag: str, round_: int) -> list[str | None]:
        return at_once(lambda number: store.set_if_match(KEY, f"{round_}-{number}", etag))

    etag = store.set_if_new(KEY, "start")
    for round_ in range(rounds(name)):
        assert etag
        etags = write(etag, round_)
        (winner,) = [n for n, new in enumerate(etags) if new is not None]
        etag = etags[winner]
        assert (text_of(store), etag_of(store)) == (f"{round_}-{winner}", etag)


def test_one_of_many_conditional_deletes_wins(store: ConditionalBlobStore, name: str) -> None:
    """The others are told that they did not remove it."""

    def delete(etag: str) -> list[bool]:
        return at_once(lambda _: store.delete_if_match(KEY, etag))

    for _ in range(rounds(name)):
        etag = store.set_if_new(KEY, "x")
        assert etag
        assert delete(etag).count(True) == 1
        assert is_free(store, name)
        store.delete(KEY)


def test_every_history_is_that_of_one_atomic_key(store: ConditionalBlobStore, name: str) -> None:
    """Linearizability, of what four clients saw; a tombstone is no key of that model."""
    if name in TOMBSTONE:
        pytest.skip("a tombstone is a value to get_with_etag, and no key to the model")
    for round_ in range(rounds(name)):

        def client(number: str, round_: int = round_) -> list[Event]:
            seed = 4 * round_ + int(number)
            return record(store, f"{KEY}{round_}", seed, 12) if int(number) < 4 else []

        events = [event for events in at_once(client) for event in events]
        assert explanation(events) is not None, events


@pytest.mark.parametrize("found", ["", "x"])
@pytest.mark.parametrize(
    "name", [name for name in (*NAMES, *DATABASES) if name != "s3-tombstone"], indirect=True
)
def test_the_clock_of_the_server(name: str, backends: Backends, found: str) -> None:
    """It is this host's here; the key may be there or not."""
    with ExitStack() as stack:
        store: Any = backends[name].open(stack, backends.new_prefix())
        if found:
            store.set(KEY, found)
        before = epoch_ms()
        told = store.server_time_ms(KEY)
        after = epoch_ms()
    if told is None:
        assert (name, found) == ("gcs", "x")  # what it answers then its client does not show
    else:
        assert told[0] <= after + 1
        assert told[1] >= before - 1  # these are whole milliseconds


def test_it_keeps_its_word(store: ConditionalBlobStore) -> None:
    """As `joblock.conformance` sees it."""
    assert [finding for finding in check_store(store) if not finding] == []
