"""Workers on one store, killed at random: no two jobs overlap within their leases.

Here on a SQLite file; `tests.integration.test_chaos` does the same on servers.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Generator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest

from joblock import (
    Acquired,
    ConditionalBlobStore,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    acquire_job_lock,
    release_job_lock,
    renew_job_lock,
    resume_job_lock,
    sweep_job_locks,
)
from joblock._record import epoch_ms
from joblock.stores import open_store
from joblock.stores.sqlite import SqliteBlobStore

WORKERS = 6
VAULTS = 3
TTL_MS = 60
SECONDS = 1


class Overlap(Exception):  # noqa: N818
    """A job found the witness of another whose lease had not run out."""


class Witness:
    """A file that is there for as long as a job has the lock: its id, and its lease's two ends.

    It is created exclusively. One whose lease has nothing of one's own may be replaced: it is of a
    job that crashed, or the machine held somebody up for longer than the lease after it last
    looked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mine = path.with_name(f"{path.name}-{os.getpid()}")

    def enter(self, lock: Acquired) -> None:
        # Not `started_at`: that was read before the lock was written, and perhaps long before.
        now_ms, mine = epoch_ms(), lock.record
        self._write(mine)
        while True:
            with contextlib.suppress(FileNotFoundError):
                job, begun, ends = self.path.read_text().split()
                if float(ends) > now_ms and float(begun) < (mine.expires_at or 0):
                    raise Overlap(f"{mine.job_id} has the lock at {now_ms}, in {job}'s lease")
                self.path.unlink()
            with contextlib.suppress(FileExistsError):
                os.link(self.mine, self.path)  # exclusive, and with its content at once
                return

    def renew(self, record: JobLockRecord) -> None:
        self._write(record)
        self.mine.replace(self.path)

    def leave(self) -> None:
        self.path.unlink(missing_ok=True)

    def _write(self, record: JobLockRecord) -> None:
        self.mine.unlink(missing_ok=True)  # it may be a second name of a witness
        self.mine.write_text(f"{record.job_id} {record.started_at} {record.expires_at}")


@contextlib.contextmanager
def opened(folder: Path) -> Generator[ConditionalBlobStore]:
    """The store that the file `url` names, or else a SQLite file."""
    url = folder / "url"
    if url.exists():
        store: Any = open_store(url.read_text())
        yield store
        if hasattr(store, "engine"):
            store.engine.dispose()
    else:
        with SqliteBlobStore(folder / "jobs.db") as file:
            yield file


def work(folder: Path, seed: int) -> None:
    """Acquire, renew and release until killed; report an overlap in a file of its own."""
    rng = random.Random(seed)
    try:
        with opened(folder) as store:
            while True:
                one_job(store, folder, rng, f"vault-{rng.randrange(VAULTS)}")
    except BaseException as error:
        (folder / f"failed-{seed}").write_text(repr(error))
        raise


def one_job(store: ConditionalBlobStore, folder: Path, rng: random.Random, vault: str) -> None:
    lock = acquire_job_lock(store, "u", vault, ttl_ms=TTL_MS)
    if not lock:
        time.sleep(0.001)
        return
    witness = Witness(folder / f"{vault}.witness")
    witness.enter(lock)
    with (folder / "done").open("ab", buffering=0) as done:
        done.write(b"t" if lock.took_over else b"a")
    time.sleep(rng.random() * 0.01)
    # To renew is to learn that the lease is still one's own, and for a while longer.
    renewed = renew_job_lock(store, "u", vault, expected_job_id=lock.job_id, ttl_ms=TTL_MS)
    if not renewed or epoch_ms() > (renewed.record.expires_at or 0) - TTL_MS / 2:
        return  # lost, or too late to be sure: the lease is left to expire
    witness.renew(renewed.record)
    time.sleep(rng.random() * 0.01)
    if epoch_ms() > (renewed.record.expires_at or 0) - TTL_MS / 2:
        return
    witness.leave()
    release_job_lock(store, "u", vault, expected_job_id=lock.job_id, etag=renewed.etag)


def sweep(folder: Path) -> None:
    """Remove every lock as soon as it has expired, until killed; note when one was removed."""
    try:
        with opened(folder) as store, (folder / "swept").open("ab", buffering=0) as swept:
            while True:
                swept.write(b"s" * sweep_job_locks(store, expired_for_ms=0))
    except BaseException as error:
        (folder / "failed-sweep").write_text(repr(error))
        raise


def kill_at_random(
    folder: Path, work: Callable[[Path, int], None], enough: Callable[[], bool]
) -> int:
    """Let workers work, kill one after the other, and start others; return how many were killed.

    Beside a process that sweeps, where the folder has a file `swept`.
    """
    context = multiprocessing.get_context("fork")
    rng = random.Random(os.getpid())
    seeds = iter(range(1_000_000))

    def start() -> ForkProcess:
        worker = context.Process(target=work, args=(folder, next(seeds)))
        worker.start()
        return worker

    workers = [start() for _ in range(WORKERS)]
    sweeper = context.Process(target=sweep, args=(folder,))
    swept = folder / "swept"
    sweeps = swept.exists()
    if sweeps:
        sweeper.start()
        workers.append(sweeper)
    kills = 0
    begun = time.monotonic()

    def seen() -> bool:
        return enough() and not (sweeps and not swept.read_bytes())

    while time.monotonic() < begun + SECONDS or not (seen() or time.monotonic() > begun + 120):
        time.sleep(rng.random() * 0.05)
        victim = rng.randrange(WORKERS)
        workers[victim].kill()
        workers[victim].join()
        assert workers[victim].exitcode == -signal.SIGKILL
        kills += 1
        workers[victim] = start()
    for worker in workers:
        worker.kill()
        worker.join()
    assert [file.read_text() for file in folder.glob("failed-*")] == []
    assert not sweeps or swept.read_bytes(), "nothing was swept"
    return kills


def kill_workers(folder: Path) -> None:
    """No two jobs overlap, and afterwards every key can be acquired."""

    def done() -> bytes:
        file = folder / "done"
        return file.read_bytes() if file.exists() else b""

    kills = kill_at_random(folder, work, lambda: {*b"at"} <= {*done()})
    print(f"{kills} kills, {len(done())} jobs, {done().count(b't')} takeovers")
    assert done().count(b"t") > 0, "no lock was ever taken over"
    assert done().count(b"a") > 0
    later = epoch_ms() + TTL_MS
    with opened(folder) as store:
        for vault in range(VAULTS):
            assert acquire_job_lock(store, "u", f"vault-{vault}", clock=lambda: later)


@pytest.mark.slow
def test_killed_workers_never_overlap(tmp_path: Path) -> None:
    """And afterwards the file is sound."""
    kill_workers(tmp_path)
    connection = sqlite3.connect(tmp_path / "jobs.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def deliver(folder: Path, seed: int) -> None:
    """Be clicked on, and run what is queued, until killed; a job is delivered to all at once."""
    rng = random.Random(seed)
    try:
        with (
            opened(folder) as store,
            (folder / f"runs-{seed}").open("ab", buffering=0) as log,
        ):
            while True:
                vault = f"vault-{rng.randrange(VAULTS)}"
                queued = folder / f"{vault}.queue"
                click = acquire_job_lock(store, "u", vault, ttl_ms=TTL_MS)
                if click:
                    mine = folder / f"{vault}.{os.getpid()}"
                    mine.write_text(click.job_id)
                    mine.replace(queued)
                with contextlib.suppress(FileNotFoundError, JobLockHeldError, JobLockLostError):
                    one_run(store, rng, vault, queued.read_text(), log)
    except BaseException as error:
        (folder / f"failed-{seed}").write_text(repr(error))
        raise


def one_run(
    store: ConditionalBlobStore, rng: random.Random, vault: str, job_id: str, log: BinaryIO
) -> None:
    keywords: dict[str, Any] = {"ttl_ms": TTL_MS, "renew_every_ms": TTL_MS / 4}
    with resume_job_lock(store, "u", vault, expected_job_id=job_id, **keywords) as lock:
        # Of each moment it is known that the lock was this run's: it is looked at after it.
        ending = rng.choice(["released", "requeued", "raises"])
        kind = "again" if lock.took_over else "first"
        for _ in range(rng.randrange(2, 40)):
            now = time.monotonic_ns()
            lock.check()
            log.write(f"{vault} {job_id} {lock.record.run_id} {kind} {now}\n".encode())
            time.sleep(rng.random() * 0.005)
        if ending == "requeued":
            lock.requeue(ttl_ms=TTL_MS)
        if ending == "raises":
            raise JobLockHeldError(lock.record)


class Run(NamedTuple):
    """One run of a job, and when it is known to have had the lock."""

    vault: str
    begun: int
    ended: int
    job: str
    run: str
    kind: str


def runs_of(folder: Path) -> list[Run]:
    seen: dict[str, Run] = {}
    for path in folder.glob("runs-*"):
        for line in path.read_text().splitlines():
            vault, job, run, kind, at = line.split()
            begun = seen[run].begun if run in seen else int(at)
            seen[run] = Run(vault, begun, int(at), job, run, kind)
    return sorted(seen.values())


def overlaps(runs: list[Run]) -> list[tuple[Run, Run]]:
    pairs = itertools.pairwise(runs)
    return [(a, b) for a, b in pairs if a.vault == b.vault and b.begun <= a.ended]


def kill_runs(folder: Path) -> None:
    """Each job is delivered to every worker at once, again and again: one run at a time."""

    def again() -> list[Run]:
        return [run for run in runs_of(folder) if run.kind == "again"]

    def jobs() -> set[str]:
        return {run.job for run in runs_of(folder)}

    def enough() -> bool:
        """Some job was run again after its run was killed, and some without that."""
        return bool(again()) and len(runs_of(folder)) > len(jobs()) > VAULTS

    kills = kill_at_random(folder, deliver, enough)
    runs = runs_of(folder)
    assert overlaps(runs) == []
    print(f"{kills} kills, {len(jobs())} jobs, {len(runs)} runs, {len(again())} after a dead run")
    assert enough()


@pytest.mark.slow
def test_killed_runs_never_overlap(tmp_path: Path) -> None:
    """On one file."""
    kill_runs(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_workers, kill_runs])
def test_a_sweep_hurts_no_live_lock(tmp_path: Path, kill: Callable[[Path], None]) -> None:
    """Beside acquires, renewals, takeovers, resumes and requeues without end."""
    (tmp_path / "swept").touch()
    kill(tmp_path)


def test_the_runs_would_show_an_overlap(tmp_path: Path) -> None:
    """Of the same vault only, also where one lies within the other."""
    (tmp_path / "runs-1").write_text("v j r1 first 1\nv j r1 first 9\nw j r3 first 5\n")
    assert overlaps(runs_of(tmp_path)) == []
    (tmp_path / "runs-2").write_text("v j r2 first 4\nv j r2 first 5\n")
    ((first, second),) = overlaps(runs_of(tmp_path))
    assert (first.run, second.run) == ("r1", "r2")


def test_the_witness_would_notice_an_overlap(tmp_path: Path) -> None:
    """Two jobs that both believe to own the lock: free, and taken over too early."""
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        first = acquire_job_lock(store, "u", "v")
        assert first
        store.delete("index-jobs/u/v.json")
        second = acquire_job_lock(store, "u", "v")
        assert second
        witness = Witness(tmp_path / "witness")
        witness.enter(first)
        for took_over in (None, first.record):
            with pytest.raises(Overlap, match=f"in {first.job_id}'s lease"):
                witness.enter(Acquired(second.job_id, second.record, second.etag, took_over))
