"""Does a lock cost more when there are many others?"""

from __future__ import annotations

import random
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import cycle
from pathlib import Path

from joblock import (
    ConditionalBlobStore,
    JobLockRecord,
    MemoryBlobStore,
    acquire_job_lock,
    job_lock_key,
    peek_job_lock,
    release_job_lock,
)
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID, acquired

from .leaks import resident_bytes
from .table import Row, microseconds
from .turns import Case, Turns


def growth(*, quick: bool) -> Iterator[Row]:
    """Each store with few, many and very many live locks, all measured in turns."""
    sizes = (10, 1_000) if quick else (10, 10_000, 1_000_000)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases: dict[str, Case] = {}
        notes: list[Row] = []
        for kind, fill in (("memory", _in_memory), ("SQLite", _in_sqlite)):
            used: int | None = None
            for size in sizes:
                store, used = fill(folder / f"{size}.db", size, stack)
                cases[f"{kind}, acquire + release, {size:,} locks"] = _cycle(store)
                cases[f"{kind}, peek, {size:,} locks"] = _peek(store, size)
            each = "not measured" if used is None else f"{used / sizes[-1]:.0f} bytes"
            notes.append(Row(f"{kind}, a lock's size", each, f"with {sizes[-1]:,} locks"))
        turns = Turns(cases, quick=quick)
        for name in cases:
            few = f"{name.rpartition(', ')[0]}, {sizes[0]} locks"
            against = "" if name == few else f"{turns.ratio(name, few):.2f} x {sizes[0]} locks"
            yield Row(name, microseconds(turns.median(name)), against)
        yield from notes


Filled = tuple[ConditionalBlobStore, int | None]
"""A store, and the bytes that its locks take, of memory or of the file."""


def _in_memory(_: Path, size: int, __: ExitStack) -> Filled:
    before = resident_bytes()
    store = MemoryBlobStore()
    for key, value in _locks(size):
        store.set_if_new(key, value)
    after = resident_bytes()
    return store, None if before is None or after is None else after - before


def _in_sqlite(path: Path, size: int, stack: ExitStack) -> Filled:
    store = stack.enter_context(SqliteBlobStore(path))
    with closing(sqlite3.connect(path)) as connection:
        connection.executemany(
            "INSERT INTO joblock VALUES (?, ?, hex(randomblob(16)))", _locks(size)
        )
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return store, path.stat().st_size


def _locks(size: int) -> Iterator[tuple[str, str]]:
    for vault in range(size):
        record = JobLockRecord(
            f"{vault:036}", UID, str(vault), started_at=0, expires_at=4_102_444_800_000
        )
        yield job_lock_key(UID, str(vault)), record.to_json()


def _cycle(store: ConditionalBlobStore) -> Case:
    def one() -> None:
        lock = acquired(acquire_job_lock(store, UID, "a free one"))
        release_job_lock(store, UID, "a free one", expected_job_id=lock.job_id, etag=lock.etag)

    return one


def _peek(store: ConditionalBlobStore, size: int) -> Case:
    vaults = cycle([str(random.randrange(size)) for _ in range(10_000)])

    def one() -> None:
        if peek_job_lock(store, UID, next(vaults)) is None:
            raise RuntimeError("a lock is missing")

    return one
