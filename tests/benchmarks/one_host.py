"""One free lock, taken and freed again; and one that is refused, as a double click is."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import uuid
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from joblock import (
    ConditionalBlobStore,
    MemoryBlobStore,
    acquire_job_lock,
    aio,
    hold_job_lock,
    release_job_lock,
    resume_job_lock,
)
from joblock.stores.sqlite import SqliteBlobStore, _prepare
from tests.support import KEY, UID, VAULT, AsyncConditionalView, acquired, await_now

from .peers import Missing, Peer, open_peers
from .table import Row, microseconds
from .turns import Case, Turns

SQLITE, SQLITE_ID = "joblock SQLite, with the etag", "joblock SQLite, by job id"
MEMORY, ASYNC = "joblock memory, with the etag", "joblock.aio, async memory store"
SQL, FLOOR, FILELOCK = "the two bare SQL statements", "uuid4 + json.dumps", "filelock FileLock"
SQLITE_HELD, MEMORY_HELD = "joblock SQLite", "joblock memory"


def free(*, quick: bool) -> Iterator[Row]:
    """Acquire and release of a free lock."""
    with _opened() as (stores, bare, peers):
        cases = {
            SQLITE: _cycle(stores[SQLITE_HELD]),
            SQLITE_ID: _cycle_by_id(stores[SQLITE_HELD]),
            SQL: bare,
            MEMORY: _cycle(stores[MEMORY_HELD]),
            ASYNC: _async_cycle(),
            FLOOR: _floor,
        }
        found = {name: peer.cycle for name, peer in peers.items() if isinstance(peer, Peer)}
        turns = Turns(cases | found, quick=quick)
        references = {SQLITE: (FILELOCK, SQL), SQLITE_ID: (FILELOCK, SQL), MEMORY: (FLOOR,)}
        references |= {ASYNC: (MEMORY,)} | dict.fromkeys(found, (SQLITE,))
        yield from _rows(turns, references)
        yield from _missing(peers)


def resumed(*, quick: bool) -> Iterator[Row]:
    """A click and the job's end by hand, beside the same with a worker that resumes the lock."""
    with _opened() as (stores, _, _):
        cases: dict[str, Case] = {}
        references: dict[str, tuple[str, ...]] = {}
        for name, store in stores.items():
            cases[f"{name}, acquire + release"] = _cycle(store)
            cases[f"{name}, acquire + resume + leave"] = _handed_on(store)
            cases[f"{name}, hold"] = _held(store)
            for longer in ("acquire + resume + leave", "hold"):
                references[f"{name}, {longer}"] = (f"{name}, acquire + release",)
        turns = Turns(cases, quick=quick)
        for name, (reference, *_) in references.items():
            cycle = turns.median(reference)
            against = f"{turns.ratio(name, reference):.2f} x acquire + release"
            yield Row(name, microseconds(turns.median(name)), f"{against}, {microseconds(cycle)}")


def refused(*, quick: bool) -> Iterator[Row]:
    """Acquire of a lock that another job has."""
    with _opened() as (stores, _, peers):
        found = {name: peer.refused for name, peer in peers.items() if isinstance(peer, Peer)}
        cases: dict[str, Case] = {}
        for name, store in stores.items():
            acquired(acquire_job_lock(store, UID, VAULT))
            cases[name] = _acquire(store)
        cases |= {name: call for name, call in found.items() if call is not None}
        for name, case in cases.items():
            if case():
                raise RuntimeError(f"{name} was not refused")
        turns = Turns(cases, quick=quick)
        yield from _rows(turns, dict.fromkeys(cases.keys() - stores.keys(), (SQLITE_HELD,)))
        for name, call in found.items():
            if call is None:
                yield Row(name, "-", "can only wait")
        yield from _missing(peers)


def _rows(turns: Turns, references: dict[str, tuple[str, ...]]) -> Iterator[Row]:
    for name in turns.rounds:
        known = [it for it in references.get(name, ()) if it in turns.rounds]
        against = ", ".join(f"{turns.ratio(name, it):.2f} x {_short(it)}" for it in known)
        yield Row(name, microseconds(turns.median(name)), against)


def _short(name: str) -> str:
    return {SQL: "bare SQL", FILELOCK: "FileLock"}.get(name, name.partition(",")[0])


def _missing(peers: dict[str, Peer | Missing]) -> Iterator[Row]:
    for name, peer in peers.items():
        if isinstance(peer, Missing):
            yield Row(name, "-", peer.why)


@contextmanager
def _opened() -> Generator[tuple[dict[str, ConditionalBlobStore], Case, dict[str, Peer | Missing]]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bare = stack.enter_context(_bare_sql(folder / "bare.db"))
        sqlite = stack.enter_context(SqliteBlobStore(folder / "jobs.db"))
        stores: dict[str, ConditionalBlobStore] = {
            SQLITE_HELD: sqlite,
            MEMORY_HELD: MemoryBlobStore(),
        }
        yield stores, bare, open_peers(folder, stack)


def _cycle(store: ConditionalBlobStore) -> Case:
    def cycle() -> None:
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)

    return cycle


def _handed_on(store: ConditionalBlobStore) -> Case:
    def job() -> None:
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        with resume_job_lock(store, UID, VAULT, expected_job_id=lock.job_id):
            pass

    return job


def _held(store: ConditionalBlobStore) -> Case:
    def job() -> None:
        with hold_job_lock(store, UID, VAULT):
            pass

    return job


def _cycle_by_id(store: ConditionalBlobStore) -> Case:
    def cycle() -> None:
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id)

    return cycle


def _async_cycle() -> Case:
    store = AsyncConditionalView(MemoryBlobStore())

    async def cycle() -> None:
        lock = acquired(await aio.acquire_job_lock(store, UID, VAULT))
        await aio.release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)

    return lambda: await_now(cycle())


def _acquire(store: ConditionalBlobStore) -> Case:
    return lambda: acquire_job_lock(store, UID, VAULT)


RECORD = acquired(acquire_job_lock(MemoryBlobStore(), UID, VAULT)).record
DOCUMENT = RECORD.to_dict()


def _floor() -> tuple[str, str]:
    return str(uuid.uuid4()), json.dumps(DOCUMENT)


@contextmanager
def _bare_sql(path: Path) -> Generator[Case]:
    """The statements that the store sends for a cycle, on a file that it has prepared."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        _prepare(connection)
        value, etag = RECORD.to_json(), "0" * 32

        def cycle() -> None:
            connection.execute("INSERT OR IGNORE INTO joblock VALUES (?, ?, ?)", (KEY, value, etag))
            connection.execute("DELETE FROM joblock WHERE key = ? AND etag = ?", (KEY, etag))

        yield cycle
