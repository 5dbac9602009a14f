"""What is left behind: resident memory, threads and file descriptors."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from joblock import ConditionalBlobStore, MemoryBlobStore, acquire_job_lock, release_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID, VAULT, acquired

from .table import Row

PROC = Path("/proc/self")


def leaks(*, quick: bool) -> Iterator[Row]:
    """A process of its own for each store, measured after it has warmed up."""
    if not PROC.is_dir():
        yield Row("memory and file descriptors", "-", "not measured: there is no /proc here")
        return
    cycles = 1_000 if quick else 1_000_000
    for kind in ("memory", "SQLite"):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            left = pool.submit(_left, kind, cycles).result()
        yield Row(
            f"{kind}, {cycles:,} cycles, resident growth",
            f"{left.grown / 1024:+.0f} KiB",
            f"{left.threads} threads and {left.descriptors} descriptors left, {left.keys} keys",
        )


def resident_bytes() -> int | None:
    """Of this process now, or None where the system does not say."""
    if not PROC.is_dir():
        return None
    pages = int((PROC / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Left(NamedTuple):
    grown: int
    threads: int
    descriptors: int
    keys: int


def _left(kind: str, cycles: int) -> _Left:
    threads, descriptors = threading.active_count(), _descriptors()
    if kind == "memory":
        store = MemoryBlobStore()
        grown = _growth(store, cycles)
        keys = len(store)
    else:
        with (
            tempfile.TemporaryDirectory() as folder,
            SqliteBlobStore(Path(folder, "jobs.db")) as sqlite,
        ):
            grown = _growth(sqlite, cycles)
            keys = len(list(sqlite.list_keys("")))
    return _Left(grown, threading.active_count() - threads, _descriptors() - descriptors, keys)


def _growth(store: ConditionalBlobStore, cycles: int) -> int:
    _cycles(store, min(cycles, 10_000))
    before = resident_bytes() or 0
    _cycles(store, cycles)
    return (resident_bytes() or 0) - before


def _cycles(store: ConditionalBlobStore, count: int) -> None:
    for _ in range(count):
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)


def _descriptors() -> int:
    return len(list((PROC / "fd").iterdir()))
