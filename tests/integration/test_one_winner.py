"""Exactly one winner under real races: threads in memory, processes on one SQLite file."""

from __future__ import annotations

import multiprocessing
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import pytest

from joblock import BlobStore, MemoryBlobStore, acquire_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID

ROUNDS = 300
ROUNDS_OF_A_SERVER = 60
CLIENTS = 6
NOW = 1_000_000

# What a client reports of a round: whether it won, and the id and the time of the lock's owner.
Report = tuple[bool, str | None, float | None]


def prepare(store: BlobStore, rounds: int = ROUNDS) -> None:
    """Every third key is free, every third has an expired lock, every third has junk."""
    for number in range(rounds):
        vault = f"vault-{number}"
        if number % 3 == 1:
            crashed = acquire_job_lock(store, UID, vault, ttl_ms=1, clock=lambda: NOW - 1)
            assert crashed.acquired
        elif number % 3 == 2:
            store.set(f"index-jobs/{UID}/{vault}.json", "junk")


def compete(store: BlobStore, barrier: threading.Barrier, rounds: int = ROUNDS) -> list[Report]:
    reports: list[Report] = []
    try:
        for number in range(rounds):
            barrier.wait()
            result = acquire_job_lock(store, UID, f"vault-{number}", clock=lambda: NOW)
            if result:
                assert (result.took_over is not None) == (number % 3 == 1)
            record = result.record if result else result.existing
            reports.append((bool(result), record.job_id, record.started_at))
    except BaseException:
        barrier.abort()  # nobody else must wait for this client
        raise
    return reports


def send(reports: Any, store: BlobStore, barrier: threading.Barrier, rounds: int = ROUNDS) -> None:
    """Report to the parent, which must not wait for ever for a client that failed."""
    try:
        reports.put(compete(store, barrier, rounds))
    except BaseException:
        reports.put(traceback.format_exc())
        raise


def assert_one_winner_each_round(clients: list[list[Report] | str]) -> None:
    reported = [client for client in clients if not isinstance(client, str)]
    assert len(reported) == CLIENTS, clients
    winners: set[int] = set()
    for number, reports in enumerate(zip(*reported, strict=True)):
        assert [won for won, _, _ in reports].count(True) == 1, f"round {number}: {reports}"
        assert len({job_id for _, job_id, _ in reports}) == 1, f"round {number}: {reports}"
        winners.add([won for won, _, _ in reports].index(True))
    assert len(winners) > 1, "always the same client won: they did not race"


def assert_one_winner_of_threads(store: BlobStore, rounds: int = ROUNDS_OF_A_SERVER) -> None:
    prepare(store, rounds)
    barrier = threading.Barrier(CLIENTS, timeout=60)
    with ThreadPoolExecutor(CLIENTS) as threads:
        clients = [threads.submit(compete, store, barrier, rounds) for _ in range(CLIENTS)]
    assert_one_winner_each_round([client.result() for client in clients])


def assert_one_winner_of_forks(store: BlobStore) -> None:
    """Of children that have inherited the store from their parent."""
    context = multiprocessing.get_context("fork")
    prepare(store, ROUNDS_OF_A_SERVER)
    barrier: threading.Barrier = context.Barrier(CLIENTS, timeout=60)
    reports = context.SimpleQueue()
    assert_one_winner_of_processes(
        [
            context.Process(target=send, args=(reports, store, barrier, ROUNDS_OF_A_SERVER))
            for _ in range(CLIENTS)
        ],
        reports,
    )


def assert_one_winner_of_processes(
    processes: Sequence[BaseProcess],
    reports: Any,
    here: Callable[[], list[list[Report]]] = list,
) -> None:
    """Start them, let `here` compete in this process, too, and look at what all report."""
    for client in processes:
        client.start()
    assert_one_winner_each_round([*here(), *(reports.get() for _ in processes)])
    for client in processes:
        client.join()
        assert client.exitcode == 0


def test_threads_in_memory() -> None:
    """Hundreds of rounds behind a barrier; every loser is shown the winner's record."""
    assert_one_winner_of_threads(MemoryBlobStore(), ROUNDS)


def process(path: Path, barrier: threading.Barrier, reports: Any) -> None:
    with SqliteBlobStore(path) as store:
        send(reports, store, barrier)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_on_sqlite(method: Literal["fork", "spawn"], tmp_path: Path) -> None:
    """Each with a connection of its own to the same file."""
    path = tmp_path / "jobs.db"
    with SqliteBlobStore(path) as store:
        prepare(store)
    context: Any = multiprocessing.get_context(method)
    barrier = context.Barrier(CLIENTS, timeout=30)
    reports = context.SimpleQueue()
    assert_one_winner_of_processes(
        [context.Process(target=process, args=(path, barrier, reports)) for _ in range(CLIENTS)],
        reports,
    )


def test_threads_and_a_forked_process_share_a_store(tmp_path: Path) -> None:
    """One store object, inherited over fork, raced by its parent and its children."""
    context = multiprocessing.get_context("fork")
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        prepare(store)
        barrier = context.Barrier(CLIENTS, timeout=30)
        reports = context.SimpleQueue()
        children = [
            context.Process(target=send, args=(reports, store, barrier)) for _ in range(CLIENTS - 1)
        ]
        assert_one_winner_of_processes(children, reports, lambda: [compete(store, barrier)])
