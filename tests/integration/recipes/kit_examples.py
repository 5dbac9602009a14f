"""The test kit with test runners and other kits, as in a user's own tests."""

import unittest
from datetime import timedelta

import pytest
import time_machine
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st

from joblock import MemoryBlobStore, acquire_job_lock, aio, hold_job_lock
from joblock.aio import AsyncMemoryBlobStore
from joblock.testing import ManualClock, job_ids, take, take_async

HOUR = 3_600_000


@pytest.mark.asyncio
async def test_with_pytest_asyncio():
    clock = ManualClock()
    async with aio.hold_job_lock(AsyncMemoryBlobStore(), "u", "v", clock=clock) as lock:
        await clock.advance_async(HOUR)
        assert not lock.lost


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_with_anyio(anyio_backend):
    store, clock = AsyncMemoryBlobStore(), ManualClock()
    await take_async(store, "u", "v", clock=clock, expires_in_ms=HOUR)
    assert not await aio.acquire_job_lock(store, "u", "v", clock=clock)
    clock.advance(HOUR)
    lock = await aio.acquire_job_lock(store, "u", "v", clock=clock, uuid_factory=job_ids())
    assert lock.job_id == "job-1"


class WithUnittest(unittest.TestCase):
    def test_a_hold(self):
        clock = ManualClock()
        with hold_job_lock(MemoryBlobStore(), "u", "v", clock=clock) as lock:
            clock.advance(HOUR)
            self.assertFalse(lock.lost)


@given(st.lists(st.integers(1, 100_000), max_size=5))
def test_with_hypothesis(pauses):
    store, clock = MemoryBlobStore(), ManualClock()
    with hold_job_lock(store, "u", "v", clock=clock) as lock:
        for pause in pauses:
            clock.advance(pause)
        assert not lock.lost
        assert lock.record.expires_at > clock()


def test_with_freezegun():
    store = MemoryBlobStore()
    with freeze_time("2026-01-01") as frozen:
        assert acquire_job_lock(store, "u", "v")
        assert not acquire_job_lock(store, "u", "v")
        frozen.tick(timedelta(minutes=16))
        assert acquire_job_lock(store, "u", "v").took_over
    take(store, "u", "w")
    with freeze_time("2026-01-01"), hold_job_lock(store, "u", "x") as lock:
        assert not lock.lost


def test_with_time_machine():
    store = MemoryBlobStore()
    with time_machine.travel(0, tick=False) as traveller:
        assert acquire_job_lock(store, "u", "v")
        traveller.shift(timedelta(minutes=16))
        assert acquire_job_lock(store, "u", "v").took_over
