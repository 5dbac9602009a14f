"""`joblock.aio.ThreadedBlobStore`: any blocking store, for async code."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from joblock import Blob, MemoryBlobStore, aio
from joblock.stores.sqlite import SqliteBlobStore
from tests.holding import poll, threads_named
from tests.support import KEY, UID, VAULT, PlainStore, acquired, held


def test_is_conditional_exactly_when_its_store_is() -> None:
    """The guarantee of the store is the guarantee of the wrapper."""

    async def calls(store: aio.ThreadedBlobStore) -> list[str]:
        won = acquired(await aio.acquire_job_lock(store, UID, VAULT))
        return ["etag" if won.etag else "no etag"]

    assert asyncio.run(calls(aio.ThreadedBlobStore(MemoryBlobStore()))) == ["etag"]
    assert asyncio.run(calls(aio.ThreadedBlobStore(PlainStore()))) == ["no etag"]
    assert not hasattr(aio.ThreadedBlobStore(PlainStore()), "set_if_new")


def test_serves_the_whole_life_of_a_lock(tmp_path: Path) -> None:
    """On a SQLite file, whose verbs all go through."""

    async def life(store: aio.ThreadedBlobStore) -> None:
        won = acquired(await aio.acquire_job_lock(store, UID, VAULT))
        second = held(await aio.acquire_job_lock(store, UID, VAULT))
        assert second.existing == won.record
        renewed = await aio.renew_job_lock(store, UID, VAULT, expected_job_id=won.job_id)
        assert renewed
        assert await aio.peek_job_lock(store, UID, VAULT) == renewed.record
        released = await aio.release_job_lock(
            store, UID, VAULT, expected_job_id=won.job_id, etag=renewed.etag
        )
        assert released.released
        assert await aio.peek_job_lock(store, UID, VAULT) is None
        await store.set(KEY, "x")
        await store.delete(KEY)
        assert await store.get(KEY) is None

    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        asyncio.run(life(aio.ThreadedBlobStore(store)))


def test_calls_the_store_outside_the_event_loops_thread() -> None:
    """A slow store must not stop the service."""
    threads: set[int] = set()

    class Slow(MemoryBlobStore):
        def get_with_etag(self, key: str) -> Blob | None:
            threads.add(threading.get_ident())
            return super().get_with_etag(key)

        def set_if_new(self, key: str, value: str) -> str | None:
            threads.add(threading.get_ident())
            return super().set_if_new(key, value)

    async def contend() -> list[bool]:
        store = aio.ThreadedBlobStore(Slow())
        results = await asyncio.gather(
            *(aio.acquire_job_lock(store, UID, VAULT) for _ in range(20))
        )
        return [result.acquired for result in results]

    assert asyncio.run(contend()).count(True) == 1
    assert threads
    assert threading.get_ident() not in threads


def test_repr_and_bad_stores() -> None:
    """It shows what it wraps, and wraps nothing that is no store."""
    assert (
        repr(aio.ThreadedBlobStore(MemoryBlobStore())) == "ThreadedBlobStore(MemoryBlobStore({}))"
    )
    nothing: Any = object()
    with pytest.raises(TypeError, match="lacks get, set, delete"):
        aio.ThreadedBlobStore(nothing)


class Slow(MemoryBlobStore):
    """Its calls wait until the test lets them go on; it tells in which thread each was."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.go_on.set()
        self.threads: list[str] = []

    def set_if_new(self, key: str, value: str) -> str | None:
        self.threads.append(threading.current_thread().name)
        assert self.go_on.wait(30)
        return super().set_if_new(key, value)

    def get_with_etag(self, key: str) -> Blob | None:
        self.threads.append(threading.current_thread().name)
        return super().get_with_etag(key)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        self.threads.append(threading.current_thread().name)
        return super().set_if_match(key, value, etag)

    def delete_if_match(self, key: str, etag: str) -> bool:
        self.threads.append(threading.current_thread().name)
        return super().delete_if_match(key, etag)


class OneThread(Executor):
    """Counts what it is asked to do."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="given")
        self.submitted = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        return self.threads.submit(fn, *args, **kwargs)


def test_jobs_that_fill_the_default_threads_keep_no_renewal_waiting() -> None:
    """The lock's calls have threads of their own: jobs often run by `asyncio.to_thread`."""

    async def main() -> None:
        store, end = MemoryBlobStore(), threading.Event()
        threaded = aio.ThreadedBlobStore(store)
        jobs = [asyncio.create_task(asyncio.to_thread(end.wait, 30)) for _ in range(200)]
        await asyncio.sleep(0)
        try:
            async with aio.hold_job_lock(threaded, UID, VAULT, renew_every_ms=1) as lock:
                first = lock.record
                while lock.record == first:
                    await asyncio.sleep(0.001)
            assert list(store) == []
        finally:
            end.set()
            await asyncio.wait(jobs)

    asyncio.run(main())


def test_each_function_is_one_call_in_one_thread() -> None:
    """Whatever it asks of the store: each hop between threads costs as much as the call itself."""
    executor = OneThread()
    store = aio.ThreadedBlobStore(Slow(), executor=executor)

    async def main() -> None:
        won = acquired(await aio.acquire_job_lock(store, UID, VAULT))
        held(await aio.acquire_job_lock(store, UID, VAULT))
        assert await aio.renew_job_lock(store, UID, VAULT, expected_job_id=won.job_id)
        assert await aio.peek_job_lock(store, UID, VAULT)
        assert await aio.release_job_lock(store, UID, VAULT, expected_job_id=won.job_id)

    asyncio.run(main())
    assert executor.submitted == 5
    executor.threads.shutdown()


def test_its_threads_are_named_and_end_with_it() -> None:
    """With `close()`, after which a call starts new ones, and when nobody has it any more."""
    poll(lambda: gc.collect() or not threads_named("joblock store"))  # of the tests before
    slow = Slow()

    async def acquire(store: aio.ThreadedBlobStore) -> None:
        await aio.acquire_job_lock(store, UID, VAULT)

    store = aio.ThreadedBlobStore(slow)
    for _ in range(2):
        asyncio.run(acquire(store))
        assert slow.threads[-1].startswith("joblock store")
        assert threads_named("joblock store")
        store.close()
        poll(lambda: not threads_named("joblock store"))
    asyncio.run(acquire(aio.ThreadedBlobStore(slow)))
    poll(lambda: not threads_named("joblock store"))


def test_threads_of_ones_own_are_left_to_their_owner() -> None:
    """They are used, and not ended."""
    slow = Slow()
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:
        store = aio.ThreadedBlobStore(slow, executor=executor)

        async def acquire() -> None:
            await aio.acquire_job_lock(store, UID, VAULT)

        asyncio.run(acquire())
        store.close()
        assert executor.submit(int).result() == 0
    assert slow.threads == ["mine_0"]


def refuse(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    def submit(*_args: object) -> None:
        raise RuntimeError(why)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)


@pytest.mark.parametrize("after", ["interpreter shutdown", "shutdown"])
def test_once_python_has_ended_its_executors(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is made all the same, in the caller's thread; tests/integration has a real end."""

    class Failing(MemoryBlobStore):
        def get(self, key: str) -> str:
            raise OSError(key)

    async def main() -> None:
        store = Failing()
        await aio.ThreadedBlobStore(store).set(KEY, "x")
        assert list(store) == [KEY]
        with pytest.raises(OSError, match=KEY):
            await aio.ThreadedBlobStore(store).get(KEY)
        with pytest.raises(RuntimeError, match="cannot schedule"):
            await aio.ThreadedBlobStore(store, executor=ThreadPoolExecutor()).get(KEY)

    refuse(monkeypatch, f"cannot schedule new futures after {after}")
    asyncio.run(main())


def test_a_machine_without_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that cannot start a thread may still make the call later: it is not made twice."""
    store = MemoryBlobStore()
    refuse(monkeypatch, "can't start new thread")
    with pytest.raises(RuntimeError, match="can't start"):
        asyncio.run(aio.ThreadedBlobStore(store).set(KEY, "x"))
    assert list(store) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    """The parent's are not in it: a call would wait for them for ever."""
    store = aio.ThreadedBlobStore(MemoryBlobStore())

    async def acquire() -> bool:
        return bool(await aio.acquire_job_lock(store, UID, "child"))

    async def parent() -> None:
        await aio.peek_job_lock(store, UID, VAULT)

    asyncio.run(parent())
    child = os.fork()
    if child == 0:
        os._exit(0 if asyncio.run(acquire()) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_context_variables_of_the_caller_are_seen() -> None:
    """A store may find its connection or its tenant by them."""
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")

    class ByTenant(MemoryBlobStore):
        def set_if_new(self, key: str, value: str) -> str | None:
            return super().set_if_new(f"{tenant.get()}/{key}", value)

    async def main() -> None:
        tenant.set("acme")
        await aio.acquire_job_lock(aio.ThreadedBlobStore(store), UID, VAULT)

    store = ByTenant()
    asyncio.run(main())
    assert list(store) == [f"acme/{KEY}"]


class TestACancelledAcquire:
    """A client that goes away during the acquire must not lock the user out."""

    def test_leaves_nothing_behind(self) -> None:
        """The write is awaited, then the lock is released, then the cancellation goes on."""

        async def main() -> None:
            slow = Slow()
            slow.go_on.clear()
            store = aio.ThreadedBlobStore(slow)
            task = asyncio.create_task(aio.acquire_job_lock(store, UID, VAULT))
            while not slow.threads:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
            slow.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(slow) == []

        asyncio.run(main())

    def test_again_and_again(self) -> None:
        """Then it goes on in the background, also while the event loop shuts down."""
        slow = Slow()
        slow.go_on.clear()

        async def main() -> None:
            store = aio.ThreadedBlobStore(slow)
            task = asyncio.create_task(aio.acquire_job_lock(store, UID, VAULT))
            while not slow.threads:
                await asyncio.sleep(0.001)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            assert task.cancelled()
            asyncio.get_running_loop().call_later(0.01, slow.go_on.set)

        asyncio.run(main())
        assert list(slow) == []

    def test_whose_release_fails_too(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is logged, and the cancellation goes on."""

        class Broken(Slow):
            def get_with_etag(self, key: str) -> Blob | None:
                raise ConnectionError

        async def main() -> None:
            slow = Broken()
            slow.go_on.clear()
            task = asyncio.create_task(
                aio.acquire_job_lock(aio.ThreadedBlobStore(slow), UID, VAULT)
            )
            while not slow.threads:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.sleep(0)
            slow.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(slow) == [KEY]

        asyncio.run(main())
        assert ["could not release" in message for message in caplog.messages] == [True]

    def test_whose_write_fails(self) -> None:
        """What it raises is nobody's any more; it may have been written, so it is released."""

        class LosesTheReply(Slow):
            def set_if_new(self, key: str, value: str) -> str | None:
                super().set_if_new(key, value)
                raise TimeoutError

        async def main() -> None:
            slow = LosesTheReply()
            slow.go_on.clear()
            task = asyncio.create_task(
                aio.acquire_job_lock(aio.ThreadedBlobStore(slow), UID, VAULT)
            )
            while not slow.threads:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.sleep(0)
            slow.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(slow) == []

        asyncio.run(main())


def test_lists_keys_where_its_store_does() -> None:
    """A thousand at a time, each in a thread."""
    store = MemoryBlobStore()
    expected = [f"a/{number}" for number in range(2500)]
    for key in [*expected, "b"]:
        store.set(key, "{}")

    async def listed() -> list[str]:
        threaded = aio.ThreadedBlobStore(store)
        return [key async for key in threaded.list_keys("a/")]

    assert asyncio.run(listed()) == expected
    assert not hasattr(aio.ThreadedBlobStore(PlainStore()), "list_keys")
