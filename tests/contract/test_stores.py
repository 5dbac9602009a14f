"""What every conditional store must do, run for each store that ships."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from joblock import ConditionalBlobStore, MemoryBlobStore
from joblock.stores.sqlite import SqliteBlobStore

T = TypeVar("T")

KEY = "index-jobs/u/v.json"
THREADS = 24


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConditionalBlobStore]:
    if request.param == "memory":
        yield MemoryBlobStore()
    else:
        with SqliteBlobStore(tmp_path / "jobs.db") as sqlite:
            yield sqlite


def at_once(act: Callable[[str], T]) -> list[T]:
    """What `act` returned in each of many threads that started together, given their numbers."""
    barrier = threading.Barrier(THREADS)

    def wait_and_act(number: int) -> T:
        barrier.wait()
        return act(str(number))

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(wait_and_act, range(THREADS)))


def etag_of(store: ConditionalBlobStore) -> str:
    blob = store.get_with_etag(KEY)
    assert blob is not None
    return blob.etag


def test_a_missing_key(store: ConditionalBlobStore) -> None:
    """Reads give None, a delete is no error, a condition on it fails."""
    assert store.get(KEY) is None
    assert store.get_with_etag(KEY) is None
    store.delete(KEY)
    assert store.set_if_match(KEY, "x", "1") is None
    assert store.delete_if_match(KEY, "1") is False
    assert store.get(KEY) is None


@pytest.mark.parametrize("value", ["x", "", "é日🔒\u2028", "a\x00b", "null", "x" * 100_000])
def test_reads_what_was_written(store: ConditionalBlobStore, value: str) -> None:
    """By each way of writing, and each way of reading."""
    store.set(KEY, value)
    assert store.get(KEY) == value
    etag = etag_of(store)
    for conditional in ("set_if_match", "set_if_new"):
        if conditional == "set_if_match":
            new = store.set_if_match(KEY, value, etag)
        else:
            new = store.set_if_new(KEY, value)
        blob = store.get_with_etag(KEY)
        assert blob is not None
        assert (blob.value, blob.etag) == (value, new)
        assert store.get(KEY) == value
        store.delete(KEY)
        assert store.get(KEY) is None


@pytest.mark.parametrize(
    "key",
    ["index-jobs/é日🔒/a b.json", "index-jobs/back\\slash/q\"'%_.json", "index-jobs/U/v.json"],
)
def test_keys_are_exact(store: ConditionalBlobStore, key: str) -> None:
    """Non-ASCII, quotes, wildcards and case: another key is another lock."""
    store.set(KEY, "other")
    assert store.set_if_new(key, "x")
    assert store.get(key) == "x"
    assert store.get(KEY) == "other"
    store.delete(key)
    assert store.get(KEY) == "other"


def test_set_if_new_writes_only_a_new_key(store: ConditionalBlobStore) -> None:
    """An empty value is a value too."""
    for first in ("x", ""):
        etag = store.set_if_new(KEY, first)
        assert etag == etag_of(store)
        assert store.set_if_new(KEY, "y") is None
        assert store.get(KEY) == first
        assert etag_of(store) == etag
        store.delete(KEY)


def test_set_if_match_writes_only_the_current_version(store: ConditionalBlobStore) -> None:
    """And moves the etag."""
    first = store.set_if_new(KEY, "x")
    assert first
    second = store.set_if_match(KEY, "y", first)
    assert second
    assert second != first
    assert store.get(KEY) == "y"
    assert store.set_if_match(KEY, "z", first) is None
    assert (store.get(KEY), etag_of(store)) == ("y", second)


def test_delete_if_match_removes_only_the_current_version(store: ConditionalBlobStore) -> None:
    """And says so."""
    first = store.set_if_new(KEY, "x")
    assert first
    second = store.set_if_match(KEY, "y", first)
    assert second
    assert store.delete_if_match(KEY, first) is False
    assert store.get(KEY) == "y"
    assert store.delete_if_match(KEY, second) is True
    assert store.get(KEY) is None
    assert store.delete_if_match(KEY, second) is False


def test_an_unconditional_write_moves_the_etag(store: ConditionalBlobStore) -> None:
    """Even one of the same value: whoever read before must be refused."""
    first = store.set_if_new(KEY, "x")
    assert first
    store.set(KEY, "x")
    assert store.set_if_match(KEY, "y", first) is None
    assert store.delete_if_match(KEY, first) is False


def test_an_etag_does_not_come_back_with_the_key(store: ConditionalBlobStore) -> None:
    """Deleted and created again with the same value, it is another version."""
    etags: set[str] = set()
    for _ in range(10):
        etag = store.set_if_new(KEY, "x")
        assert etag
        for stale in etags:
            assert store.set_if_match(KEY, "y", stale) is None
            assert store.delete_if_match(KEY, stale) is False
        etags.add(etag)
        assert store.delete_if_match(KEY, etag)
    assert len(etags) == 10


def test_an_etag_of_another_key_does_not_match(store: ConditionalBlobStore) -> None:
    """A condition is about one key."""
    store.set_if_new(KEY, "x")
    other = store.set_if_new("index-jobs/u/other.json", "x")
    assert other
    assert store.set_if_match(KEY, "y", other) is None
    assert store.delete_if_match(KEY, other) is False


def test_one_of_many_creates_wins(store: ConditionalBlobStore) -> None:
    """From as many threads; and what is stored is the winner's."""
    for round_ in range(20):
        key = f"{KEY}{round_}"
        etags = at_once(partial(store.set_if_new, key))
        (winner,) = [n for n, etag in enumerate(etags) if etag is not None]
        blob = store.get_with_etag(key)
        assert blob is not None
        assert (blob.value, blob.etag) == (str(winner), etags[winner])


def test_one_of_many_conditional_writes_wins(store: ConditionalBlobStore) -> None:
    """All with the same etag."""

    def write(etag: str) -> list[str | None]:
        return at_once(lambda value: store.set_if_match(KEY, value, etag))

    etag = store.set_if_new(KEY, "start")
    for _ in range(20):
        assert etag
        etags = write(etag)
        (winner,) = [n for n, new in enumerate(etags) if new is not None]
        etag = etags[winner]
        assert (store.get(KEY), etag_of(store)) == (str(winner), etag)


def test_one_of_many_conditional_deletes_wins(store: ConditionalBlobStore) -> None:
    """The others are told that they did not remove it."""

    def delete(etag: str) -> list[bool]:
        return at_once(lambda _: store.delete_if_match(KEY, etag))

    for _ in range(20):
        etag = store.set_if_new(KEY, "x")
        assert etag
        assert delete(etag).count(True) == 1
