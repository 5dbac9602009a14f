"""Cancelled at each turn of the event loop, again and again, and the loop shuts down at once."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import pytest

from joblock import (
    Blob,
    JobLockHeldError,
    JobLockRecord,
    MemoryBlobStore,
    acquire_job_lock,
    aio,
)
from tests.support import KEY, UID, VAULT, AsyncConditionalView, acquired

Job: TypeAlias = Callable[[AsyncConditionalView, str], Coroutine[Any, Any, object]]

# More than a release waits for, where somebody cancels in each turn: then it goes on by itself.
TURNS = 6


async def turns(count: int = TURNS) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Slow(AsyncConditionalView):
    """Each verb takes its time before and after it has its effect."""

    async def get(self, key: str) -> str | bytes | None:
        await turns()
        return await super().get(key)

    async def get_with_etag(self, key: str) -> Blob | None:
        await turns()
        return await super().get_with_etag(key)

    async def set_if_new(self, key: str, value: str) -> str | None:
        await turns()
        etag = await super().set_if_new(key, value)
        await turns()
        return etag

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        await turns()
        new = await super().set_if_match(key, value, etag)
        await turns()
        return new

    async def delete_if_match(self, key: str, etag: str) -> bool:
        await turns()
        deleted = await super().delete_if_match(key, etag)
        await turns()
        return deleted


async def acquires(store: AsyncConditionalView, _job_id: str) -> None:
    await aio.acquire_job_lock(store, UID, VAULT)


async def holds(store: AsyncConditionalView, _job_id: str) -> None:
    async with aio.hold_job_lock(store, UID, VAULT):
        await turns(3)


async def waits(store: AsyncConditionalView, _job_id: str) -> None:
    async with aio.hold_job_lock(store, UID, VAULT, wait_ms=1):
        pytest.fail("it is another's")


async def resumes(store: AsyncConditionalView, job_id: str) -> None:
    async with aio.resume_job_lock(store, UID, VAULT, expected_job_id=job_id):
        await turns(3)


async def requeues(store: AsyncConditionalView, job_id: str) -> None:
    async with aio.resume_job_lock(store, UID, VAULT, expected_job_id=job_id) as lock:
        await turns(3)
        lock.requeue()


IS_FREE: list[Job] = [acquires, holds]
IS_TAKEN: list[Job] = [waits, resumes, requeues]
EAGER = pytest.param(
    True,
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(sys.version_info < (3, 12), reason="new in Python 3.12"),
    ],
)


def cancelled(job: Job, turn: int, times: int, eager: bool) -> tuple[bool, str | None, str | None]:
    """Whether the job had ended before that turn; and what was in the store, and is now."""
    store = MemoryBlobStore()
    job_id = acquired(acquire_job_lock(store, UID, VAULT)).job_id if job in IS_TAKEN else ""
    before = store.get(KEY)

    async def main() -> bool:
        if eager and sys.version_info >= (3, 12):
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        task = asyncio.create_task(job(Slow(store), job_id))
        await turns(turn)
        if task.done():
            assert isinstance(task.exception(), JobLockHeldError if job is waits else type(None))
            return True
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        return False

    return asyncio.run(main()), before, store.get(KEY)


@pytest.mark.parametrize("eager", [False, EAGER], ids=["usual", "eager"])
@pytest.mark.parametrize(
    "times", [1, 4, *(pytest.param(it, marks=pytest.mark.slow) for it in (2, 3, 5, 1000))]
)
@pytest.mark.parametrize("job", [*IS_FREE, *IS_TAKEN])
def test_nothing_is_left_behind(
    job: Job, times: int, eager: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that was taken is released or given back; another's stays as it is."""
    caplog.set_level(logging.WARNING)
    turn = 0
    while True:
        had_ended, before, after = cancelled(job, turn, times, eager)
        if had_ended:
            break
        left = None if after is None else JobLockRecord.from_json(after)
        if job in IS_FREE:
            assert left is None, f"cancelled in turn {turn}"
        elif job is waits:
            assert after == before, f"cancelled in turn {turn}"
        else:
            assert left is None or left.run_id is None, f"cancelled in turn {turn}"
        turn += 1
    assert turn > TURNS * 2, "it was not cancelled"
    assert [(record.name, record.getMessage()) for record in caplog.records] == []


@pytest.mark.parametrize("job", IS_FREE)
def test_a_store_that_does_not_answer_keeps_no_loop_from_its_end(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the release, but only so long."""
    waited = False

    class Hangs(AsyncConditionalView):
        async def set_if_new(self, key: str, value: str) -> str | None:
            etag = await super().set_if_new(key, value)
            await turns()
            return etag

        async def delete_if_match(self, key: str, etag: str) -> bool:
            nonlocal waited
            await asyncio.sleep(20)
            waited = True
            return await super().delete_if_match(key, etag)

    async def main() -> None:
        task = asyncio.create_task(job(Hangs(MemoryBlobStore()), ""))
        await turns(3 if job is acquires else 2 * TURNS)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)

    monkeypatch.setattr(aio, "_UNDO_S", 0.01)
    asyncio.run(main())
    assert not waited
