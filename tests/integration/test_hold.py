"""`hold_job_lock` across processes: forks in the middle of a job, and a holder that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from joblock import JobLockHeldError, hold_job_lock, peek_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import UID, VAULT

STORES = {
    "memory": "store = joblock.MemoryBlobStore()",
    "sqlite": "store = SqliteBlobStore(sys.argv[1])",
}
START = """
import asyncio, os, sys, threading, time, warnings
import joblock
from joblock import aio
from joblock.stores.sqlite import SqliteBlobStore
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: on purpose

def child_ended_well(pid):
    return os.waitpid(pid, 0)[1] == 0

def is_held():
    return joblock.peek_job_lock(store, "u", "v") is not None

def until_renewed(lock):
    first, until = lock.record, time.monotonic() + 30
    while lock.record == first:
        assert time.monotonic() < until
        time.sleep(0.001)
"""


def run_python(code: str, store: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", START + STORES[store] + textwrap.dedent(code), path],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("store", STORES)
class TestAForkedChild:
    """Neither renews nor releases its parent's lock."""

    @pytest.mark.slow
    def test_leaves_the_block(self, store: str, tmp_path: Path) -> None:
        """By its end or by an exception, and even after the lease that it knew."""
        result = run_python(
            """
            pids = []
            try:
                with joblock.hold_job_lock(store, "u", "v", ttl_ms=1500, renew_every_ms=20) as lock:
                    for way in ("end", "error", "late"):
                        pid = os.fork()
                        if pid == 0:
                            assert threading.active_count() == 1, threading.enumerate()
                            while way == "late" and not lock.lost:
                                time.sleep(0.01)
                            if way == "error":
                                raise KeyError("the child's own")
                            break
                        pids.append(pid)
                    else:
                        assert all([child_ended_well(pid) for pid in pids])
                        until_renewed(lock)
                        lock.check()
            except KeyError as error:
                assert not hasattr(error, "__notes__")
            if len(pids) < 3:
                os._exit(0 if is_held() else 1)
            assert not is_held()
            print("done")
            """,
            store,
            tmp_path / "jobs.db",
        )
        assert result.stdout == "done\n", result.stderr

    def test_leaves_an_async_block(self, store: str, tmp_path: Path) -> None:
        """The same for a task."""
        result = run_python(
            """
            async def main():
                async with aio.hold_job_lock(aio.ThreadedBlobStore(store), "u", "v") as lock:
                    pid = os.fork()
                    if pid:
                        assert child_ended_well(pid)
                        lock.check()
                if pid == 0:
                    os._exit(0 if is_held() else 1)
                assert not is_held()

            asyncio.run(main())
            print("done")
            """,
            store,
            tmp_path / "jobs.db",
        )
        assert result.stdout == "done\n", result.stderr


class TestAnInterrupt:
    """Ctrl-C, which Python raises in the main thread, while it leaves the block."""

    CODE = """
    import signal

    class Slow(SqliteBlobStore):
        def delete_if_match(self, key, etag):
            for number in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                while handled == number:  # two at once would be one
                    time.sleep(0.001)
            if times > 1:
                time.sleep(60)
            return super().delete_if_match(key, etag)

    def handle(*_):
        global handled
        handled += 1
        raise KeyboardInterrupt

    times, handled = {times}, 0
    signal.signal(signal.SIGINT, handle)
    with joblock.hold_job_lock(Slow(sys.argv[1]), "u", "v"):
        pass
    """

    def test_the_release_comes_first(self, tmp_path: Path) -> None:
        """Then the program ends as it should."""
        path = tmp_path / "jobs.db"
        result = run_python(self.CODE.replace("{times}", "1"), "sqlite", path)
        assert result.stderr.endswith("KeyboardInterrupt\n")
        with SqliteBlobStore(path) as store:
            assert peek_job_lock(store, "u", "v") is None

    def test_a_second_one_ends_the_waiting(self, tmp_path: Path) -> None:
        """The store may hang: the lease is left to expire."""
        path = tmp_path / "jobs.db"
        result = run_python(self.CODE.replace("{times}", "2"), "sqlite", path)
        assert result.stderr.endswith("KeyboardInterrupt\n")
        with SqliteBlobStore(path) as store:
            assert peek_job_lock(store, "u", "v") is not None


@pytest.mark.parametrize("kept_by", ["a global", "a cycle"])
def test_a_generator_that_python_ends_at_its_own_end(tmp_path: Path, kept_by: str) -> None:
    """The lock is released, at once, though the renewing thread does not run any more."""
    path = tmp_path / "jobs.db"
    code = """
    def steps():
        with joblock.hold_job_lock(store, "u", "v"):
            yield 1
            yield 2

    class Node:
        pass

    kept = steps()
    next(kept)
    """
    if kept_by == "a cycle":
        code += "node = Node(); node.itself = node; node.kept = kept; del kept, node"
    result = run_python(code, "sqlite", path)
    assert (result.returncode, result.stderr) == (0, "")
    with SqliteBlobStore(path) as store:
        assert peek_job_lock(store, "u", "v") is None


AFTER_THE_MAIN_THREAD = {
    "sync": """
    def job():
        with joblock.hold_job_lock(store, "u", "v", renew_every_ms=5) as lock:
            entered.set()
            threading.main_thread().join()
            until_renewed(lock)
    """,
    "async": """
    class Gone(SqliteBlobStore):
        def get(self, key):
            raise OSError("gone")

    async def main():
        threaded = aio.ThreadedBlobStore(store)
        async with aio.hold_job_lock(threaded, "u", "v", renew_every_ms=5) as lock:
            entered.set()
            threading.main_thread().join()
            first, until = lock.record, time.monotonic() + 30
            while lock.record == first:
                assert time.monotonic() < until
                await asyncio.sleep(0.001)
        try:
            await aio.peek_job_lock(aio.ThreadedBlobStore(Gone(sys.argv[1])), "u", "v")
        except OSError as error:
            assert str(error) == "gone"

    def job():
        asyncio.run(main())
    """,
}


@pytest.mark.parametrize("kind", AFTER_THE_MAIN_THREAD)
def test_a_job_that_outlives_the_main_thread(kind: str, tmp_path: Path) -> None:
    """Python ends its executors with the main thread, and then waits for other threads."""
    code = "\nentered = threading.Event()\n" + textwrap.dedent(AFTER_THE_MAIN_THREAD[kind])
    code += "\nthreading.Thread(target=job).start()\nentered.wait(30)\n"
    result = run_python(code, "sqlite", tmp_path / "jobs.db")
    assert (result.returncode, result.stderr) == (0, "")
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        assert list(store.list_keys("")) == []


@pytest.mark.slow
def test_a_killed_holder_is_taken_over_within_one_ttl(tmp_path: Path) -> None:
    """It renewed beyond its first lease, was killed, and the next holder sees whose lock it was."""
    path = tmp_path / "jobs.db"
    code = """
import sys, time, joblock
from joblock.stores.sqlite import SqliteBlobStore
path, uid, vault = sys.argv[1:]
with joblock.hold_job_lock(SqliteBlobStore(path), uid, vault, ttl_ms=1500) as lock:
    while True:
        print(lock.job_id, int(lock.record.expires_at > lock.record.started_at + 1500), flush=True)
        time.sleep(0.05)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code, path, UID, VAULT], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout
        job_id = next(line.split()[0] for line in holder.stdout if line.endswith("1\n"))
        with SqliteBlobStore(path) as store:
            with pytest.raises(JobLockHeldError) as refused, hold_job_lock(store, UID, VAULT):
                pass
            assert refused.value.existing.job_id == job_id
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            left = peek_job_lock(store, UID, VAULT)
            assert left is not None
            assert left.expires_at is not None
            assert left.expires_at <= time.time() * 1000 + 1500
            time.sleep(max(0, left.expires_at / 1000 - time.time()))
            with hold_job_lock(store, UID, VAULT) as lock:
                assert lock.took_over == left
    finally:
        holder.kill()
        holder.communicate()
