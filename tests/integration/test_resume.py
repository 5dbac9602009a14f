"""Jobs that are handed on, across processes: a worker that is killed, and crons that are late."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from joblock import (
    JobLockHeldError,
    JobLockLostError,
    acquire_job_lock,
    hold_job_lock,
    resume_job_lock,
)
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID, VAULT, acquired

WORKER = """
import sys, time
import joblock
from joblock.stores.sqlite import SqliteBlobStore
path, uid, vault, job_id = sys.argv[1:]
store = SqliteBlobStore(path)
with joblock.resume_job_lock(store, uid, vault, expected_job_id=job_id, ttl_ms=1500) as lock:
    first = lock.record
    while lock.record == first:
        time.sleep(0.01)
    print(lock.record.run_id, flush=True)
    time.sleep(90)
"""


@pytest.mark.slow
def test_a_killed_worker_and_its_redeliveries(tmp_path: Path) -> None:
    """Each delivery is refused while the run may be alive; the next one has its record."""
    path = tmp_path / "jobs.db"
    with SqliteBlobStore(path) as store:
        job_id = acquired(acquire_job_lock(store, UID, VAULT, reason="click")).job_id
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), UID, VAULT, job_id],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert worker.stdout
            run_id = worker.stdout.readline().strip()
            assert run_id
            refused = 0
            runs: set[str | None] = set()
            until = time.monotonic() + 30
            while True:
                assert time.monotonic() < until, "the dead run's lease did not end"
                try:
                    with resume_job_lock(store, UID, VAULT, expected_job_id=job_id) as lock:
                        assert lock.took_over is not None
                        assert lock.took_over.run_id == run_id
                        assert lock.record.reason == "click"
                    break
                except JobLockHeldError as error:
                    refused += 1
                    runs.add(error.existing.run_id)
                    if refused == 3:
                        worker.send_signal(signal.SIGKILL)
                        worker.wait()
                    time.sleep(0.05)
            assert refused > 3
            assert runs == {run_id}
        finally:
            worker.kill()
            worker.communicate()
        with pytest.raises(JobLockLostError) as late:
            resume_job_lock(store, UID, VAULT, expected_job_id=job_id).__enter__()
        assert late.value.reason == "lock_already_gone"


@pytest.mark.slow
def test_two_crons_that_differ_by_up_to_two_seconds(tmp_path: Path) -> None:
    """A job of a moment starts once, in 100 of 100 pairs."""
    rng = random.Random("crons")
    started: list[int] = []

    def cron(pair: int, late_s: float) -> None:
        time.sleep(late_s)
        with (
            contextlib.suppress(JobLockHeldError),
            hold_job_lock(store, UID, f"pair-{pair}", at_least_ms=60_000),
        ):
            started.append(pair)

    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        threads = [
            threading.Thread(target=cron, args=(pair, late_s))
            for pair in range(100)
            for late_s in (0, rng.uniform(0.05, 2))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(started) == list(range(100))
