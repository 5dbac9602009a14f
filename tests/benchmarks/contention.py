"""Many processes on one SQLite file: on one key, and on a key each."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import NamedTuple

from joblock import acquire_job_lock, release_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID

from .table import Row, microseconds

START_TIMEOUT_S = 120


def contention(*, quick: bool) -> Iterator[Row]:
    """Jobs per second that each took and freed a lock; p50 and p99 of the acquire."""
    for vaults, one_key in (("one key", True), ("a key each", False)):
        alone = 0.0
        for processes in (1, 2) if quick else (1, 2, 4, 8, 16, 32):
            seconds = 0.1 if quick else 2.0
            work = _race(processes, one_key=one_key, seconds=seconds)
            jobs_s = sum(len(it.acquires_s) - it.refused for it in work) / seconds
            alone = alone or jobs_s
            refused = sum(it.refused for it in work)
            acquires_s = [second for it in work for second in it.acquires_s]
            percentiles = quantiles(acquires_s, n=100)
            yield Row(
                f"{processes} processes, {vaults}",
                f"{jobs_s:.0f} jobs/s",
                f"{jobs_s / alone:.2f} x one; p50 {microseconds(percentiles[49])}, "
                f"p99 {microseconds(percentiles[98])}; {refused / len(acquires_s):.0%} refused",
            )


class _Work(NamedTuple):
    acquires_s: list[float]
    refused: int


def _race(processes: int, *, one_key: bool, seconds: float) -> list[_Work]:
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            processes, context, initializer=_meet_at, initargs=(context.Barrier(processes),)
        ) as pool,
    ):
        path = Path(folder, "jobs.db")
        vaults = ["v" if one_key else f"v{number}" for number in range(processes)]
        running = [pool.submit(_work, path, vault, seconds) for vault in vaults]
        return [it.result() for it in running]


_start: Barrier


def _meet_at(start: Barrier) -> None:
    global _start
    _start = start


def _work(path: Path, vault: str, seconds: float) -> _Work:
    acquires_s: list[float] = []
    refused = 0
    with SqliteBlobStore(path, timeout=60) as store:
        _start.wait(START_TIMEOUT_S)
        end = perf_counter() + seconds
        while (started := perf_counter()) < end:
            lock = acquire_job_lock(store, UID, vault)
            acquires_s.append(perf_counter() - started)
            if lock:
                release_job_lock(store, UID, vault, expected_job_id=lock.job_id, etag=lock.etag)
            else:
                refused += 1
    return _Work(acquires_s, refused)
