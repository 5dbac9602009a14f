"""What the tests of holding a lock share: stores that fail or hang, and waiting for others."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from joblock import (
    BlobStore,
    JobLockRecord,
    OwnedJobLock,
    _protocol,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
)
from joblock._lease import Keeper
from joblock._record import epoch_ms
from tests.servers import LocalServer
from tests.support import KEY, UID, VAULT, RecordingStore, async_view, held

MINUTE = 60_000
HOUR = 60 * MINUTE
LEASE = MINUTE - 1  # as the holder counts it: the record's clock may have dropped a millisecond


def poll(condition: Callable[[], object], *, within_s: float = 30, every_s: float = 0.001) -> None:
    """Wait for what a thread, or with a longer time another process, is about to do."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(every_s)


def renewing_threads() -> list[str]:
    return threads_named("joblock index-jobs/")


def threads_named(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records if record.name == "joblock"]


def assert_logged(caplog: pytest.LogCaptureFixture, *expected: str) -> None:
    """Wait for these levels: who notices a loss first logs it, perhaps after another has raised."""
    poll(lambda: len(levels(caplog)) >= len(expected))
    assert levels(caplog) == [*expected]


class FlakyStore(RecordingStore):
    """Each write of a renewal first does what `script` says next, if it says anything."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[Callable[[], object]] = []
        self.before["set_if_match"] = self.next

    def next(self) -> None:
        if self.script:
            self.script.pop(0)()


def store_that_hangs() -> tuple[FlakyStore, threading.Event, threading.Event]:
    """In the first renewal: from the first event on, until the second."""
    store = FlakyStore()
    hanging, answer = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        answer.wait(30)

    store.script = [hang]
    return store, hanging, answer


def fail() -> None:
    raise ConnectionError("https://store.example/?signature=secret")


def until_renewed(lock: OwnedJobLock) -> None:
    first = lock.record
    poll(lambda: lock.record != first)


def until_lost(lock: OwnedJobLock) -> None:
    poll(lambda: lock.lost)


OFTEN: dict[str, Any] = {"ttl_ms": 10 * MINUTE, "renew_every_ms": 2}
BRIEF: dict[str, Any] = {"ttl_ms": 300, "renew_every_ms": 10}


def make_keeper(store: BlobStore, **keywords: Any) -> Keeper:
    """What `hold_job_lock` makes of its arguments."""
    made: dict[str, Any] = {
        "take": partial(
            _protocol.acquire, described=partial(JobLockRecord, canister_uid=UID, vault_id=VAULT)
        ),
        "renew_every_ms": None,
        "ttl_ms": MINUTE,
        "wait_ms": 0,
        "at_least_ms": 0,
        "at_most_ms": None,
        "clock_skew_ms": 0,
        "clock": epoch_ms,
        "uuid_factory": uuid.uuid4,
    }
    return Keeper(async_view(store), UID, VAULT, **(made | keywords))


async def assert_is_held_natively(store: Any) -> None:
    """A hold keeps its lock, a second click is refused, keys are listed, and leaving frees it."""
    async with aio.hold_job_lock(store, UID, VAULT, renew_every_ms=20, ttl_ms=MINUTE) as lock:
        first = lock.record
        while lock.record == first:
            await asyncio.sleep(0.01)
        assert await aio.peek_job_lock(store, UID, VAULT) == lock.record
        refused = await aio.acquire_job_lock(store, UID, VAULT)
        assert held(refused).existing.job_id == lock.job_id
        assert [key async for key in store.list_keys("index-jobs/u")] == [KEY]
    assert await aio.peek_job_lock(store, UID, VAULT) is None


def assert_outlives_its_server(store: Any, server: LocalServer, number: int) -> None:
    """Killed by that signal and started again, twice: no lock is lost, and a hold goes on."""
    with hold_job_lock(store, UID, VAULT, renew_every_ms=50) as lock:
        for _ in range(2):
            server.kill(number)
            server.start()
            assert held(acquire_job_lock(store, UID, VAULT)).existing.job_id == lock.job_id
            first = lock.record
            while lock.record == first:
                lock.check()
    assert peek_job_lock(store, UID, VAULT) is None
