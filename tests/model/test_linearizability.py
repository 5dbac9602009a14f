"""The stores under real concurrency: every recorded history is that of one atomic key."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from joblock import ConditionalBlobStore, MemoryBlobStore
from joblock.stores.sqlite import SqliteBlobStore
from tests.model.linearizability import Event, explanation, record

CLIENTS = 4
CALLS = 60
ROUNDS = 40


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def by_threads(store: ConditionalBlobStore, key: str, calls: int = CALLS) -> list[Event]:
    barrier = threading.Barrier(CLIENTS)

    def client(number: int) -> list[Event]:
        barrier.wait()
        return record(store, key, number, calls)

    with ThreadPoolExecutor(CLIENTS) as threads:
        return [event for events in threads.map(client, range(CLIENTS)) for event in events]


def overlapping(events: list[Event]) -> bool:
    events = sorted(events)
    return any(b.called < a.returned for a, b in itertools.pairwise(events))


@pytest.mark.parametrize("name", ["memory", "sqlite"])
def test_threads(name: str, tmp_path: Path) -> None:
    """One store object, used by all of them."""
    overlaps = 0
    with SqliteBlobStore(tmp_path / "jobs.db") as sqlite:
        store = sqlite if name == "sqlite" else MemoryBlobStore()
        for round_ in range(ROUNDS):
            events = by_threads(store, f"key-{round_}")
            assert explanation(events) is not None, events
            overlaps += overlapping(events)
    assert overlaps, "the clients took turns: nothing was tested"


def client(path: Path, number: int, barrier: threading.Barrier, histories: Any) -> None:
    with SqliteBlobStore(path) as store:
        for round_ in range(ROUNDS):
            barrier.wait()
            histories.put((round_, record(store, f"key-{round_}", number, CALLS)))


def test_processes_on_sqlite(tmp_path: Path) -> None:
    """Each with a connection of its own; they share the machine's monotonic clock."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(CLIENTS, timeout=30)
    histories = context.SimpleQueue()
    processes = [
        context.Process(target=client, args=(tmp_path / "jobs.db", n, barrier, histories))
        for n in range(CLIENTS)
    ]
    for process in processes:
        process.start()
    rounds: dict[int, list[Event]] = {}
    for _ in range(CLIENTS * ROUNDS):
        round_, events = histories.get()
        rounds.setdefault(round_, []).extend(events)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for events in rounds.values():
        assert explanation(events) is not None, events
    assert any(overlapping(events) for events in rounds.values())


class ChecksThenWrites(MemoryBlobStore):
    """Its conditional write is two steps."""

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        blob = self.get_with_etag(key)
        if blob is None or blob.etag != etag:
            return None
        time.sleep(0.0001)
        with self._lock:
            return self._write(key, value)


class RepeatsEtags(MemoryBlobStore):
    """Its etags are those of the value's length."""

    def _write(self, key: str, value: str) -> str:
        self._blobs[key] = (value, str(len(value)))
        return str(len(value))


class ReadsLate(MemoryBlobStore):
    """Its reads may be older than the last write."""

    def set_if_new(self, key: str, value: str) -> str | None:
        etag = super().set_if_new(key, value)
        if etag is not None:
            del self._blobs[key]
            threading.Timer(0.001, self._blobs.setdefault, [key, (value, etag)]).start()
        return etag


@pytest.mark.parametrize("broken", [ChecksThenWrites, RepeatsEtags, ReadsLate])
def test_a_broken_store_is_caught(broken: Callable[[], MemoryBlobStore]) -> None:
    """Or the check would prove nothing."""
    for round_ in range(100):
        if explanation(by_threads(broken(), f"key-{round_}")) is None:
            break
    else:
        pytest.fail("not caught")
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def test_histories_by_hand() -> None:
    """The search itself, on a few that are known to be sound or not."""

    def event(called: int, returned: int, verb: str, etag: str, reply: Any) -> Event:
        return Event(called, returned, verb, f"v{called}", etag, reply)

    created = event(1, 2, "create", "", "e1")
    assert explanation([created, event(3, 4, "get", "", ("v1", "e1"))])
    assert explanation([created, event(3, 4, "get", "", None)]) is None
    assert explanation([created, event(1, 4, "get", "", None)])
    assert explanation([created, event(3, 4, "create", "", "e2")]) is None
    assert explanation([created, event(3, 4, "create", "", None)])
    assert explanation([created, event(3, 4, "match", "e1", "e1")]) is None
    both = [event(3, 6, "match", "e1", "e2"), event(4, 5, "match", "e1", "e3")]
    assert explanation([created, *both]) is None
    assert explanation([created, both[0], event(4, 5, "match", "e1", None)])
    assert explanation([created, both[0], event(4, 5, "delete", "e1", True)]) is None
    assert explanation([created, event(3, 4, "delete", "e1", True), event(5, 6, "get", "", None)])
