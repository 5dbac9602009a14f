"""`joblock.aio.hold_job_lock`: what only the async one meets, whose lock a task renews."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import joblock
from joblock import (
    JobLockLostError,
    MemoryBlobStore,
    aio,
)
from tests.holding import (
    BRIEF,
    OFTEN,
    levels,
    store_that_hangs,
    until_lost,
    until_renewed,
)
from tests.support import (
    KEY,
    UID,
    VAULT,
    AsyncConditionalView,
    async_view,
    await_now,
)


async def hold_for_a_moment(store: AsyncConditionalView) -> None:
    async with aio.hold_job_lock(store, UID, VAULT):
        pass


class AsyncFlaky(AsyncConditionalView):
    """An async store whose renewals or releases wait for an event of the test."""

    def __init__(self) -> None:
        super().__init__(MemoryBlobStore())
        self.called = asyncio.Event()
        self.answer = asyncio.Event()
        self.hanging = ""
        self.broken = False
        self.slow = 0

    async def set_if_new(self, key: str, value: str) -> str | None:
        for _ in range(self.slow):
            await asyncio.sleep(0)
        written = await super().set_if_new(key, value)
        for _ in range(self.slow):
            await asyncio.sleep(0)
        return written

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        await self._hang("renewal")
        return await super().set_if_match(key, value, etag)

    async def delete_if_match(self, key: str, etag: str) -> bool:
        await self._hang("release")
        return await super().delete_if_match(key, etag)

    async def _hang(self, what: str) -> None:
        if self.broken:
            raise ConnectionError
        if what == self.hanging:
            self.called.set()
            await self.answer.wait()

    async def is_free(self) -> bool:
        return await self.get(KEY) is None


def run(main: Callable[[AsyncFlaky], Awaitable[None]]) -> None:
    async def with_a_store() -> None:
        await main(AsyncFlaky())

    asyncio.run(with_a_store())


def only_this_task() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


class TestATask:
    """What only the async one meets."""

    def test_a_task_that_is_cancelled_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        """By a body that cancels all that it finds; leaving releases all the same."""

        async def main(store: AsyncFlaky) -> None:
            async with aio.hold_job_lock(store, UID, VAULT):
                await asyncio.sleep(0)
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                await asyncio.sleep(0.01)
                assert levels(caplog) == ["ERROR"]
                assert "does not renew" in caplog.text
            assert await store.is_free()

        run(main)

    @pytest.mark.slow
    def test_a_store_that_does_not_heed_cancellation(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Leaving ends shortly after the deadline, and says that the store did not answer."""

        async def main(store: AsyncFlaky) -> None:
            heedless = asyncio.Event()

            async def set_if_match(key: str, value: str, etag: str) -> str | None:
                store.called.set()
                while not heedless.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await heedless.wait()
                return None

            store.set_if_match = set_if_match  # type: ignore[method-assign]

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT, **BRIEF):
                    await asyncio.sleep(0.4)

            with pytest.raises(JobLockLostError, match="lease_expired"):
                await job()
            heedless.set()

        run(main)
        assert "ERROR" in levels(caplog)

    def test_a_cancelled_body_releases(self) -> None:
        """And the cancellation goes through."""

        async def main(store: AsyncFlaky) -> None:
            entered = asyncio.Event()

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT):
                    entered.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(job())
            await entered.wait()
            task.cancel("stop")
            with pytest.raises(asyncio.CancelledError, match="stop"):
                await task
            assert await store.is_free()
            assert only_this_task()

        run(main)

    @pytest.mark.parametrize("times", [1, 2, 3])
    @pytest.mark.parametrize("hanging", ["release", "renewal"])
    def test_a_body_that_is_cancelled_while_leaving(self, times: int, hanging: str) -> None:
        """A few times: the store answers first, then the cancellation goes on."""

        async def main(store: AsyncFlaky) -> None:
            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT, **OFTEN):
                    store.hanging = hanging
                    if hanging == "renewal":
                        await store.called.wait()

            task = asyncio.create_task(job())
            await store.called.wait()
            for _ in range(times):
                await asyncio.sleep(0.001)
                task.cancel()
            await asyncio.sleep(0.001)
            assert not task.done()
            store.answer.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelling() == times
            assert await store.is_free()
            assert only_this_task()

        run(main)

    def test_a_cancelled_body_whose_lock_was_lost(self) -> None:
        """The cancellation carries the note."""

        async def main(store: AsyncFlaky) -> None:
            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT):
                    await store.delete(KEY)
                    raise asyncio.CancelledError

            with pytest.raises(asyncio.CancelledError) as caught:
                await job()
            assert "lock_already_gone" in caught.value.__notes__[0]

        run(main)

    def test_a_loss_that_is_found_while_a_cancellation_waits(self) -> None:
        """The body had ended normally, but the cancellation comes first and carries the note."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = "release"

            async def job() -> list[str]:
                try:
                    async with aio.hold_job_lock(store, UID, VAULT):
                        pass
                except asyncio.CancelledError as error:
                    return error.__notes__
                return []

            task = asyncio.create_task(job())
            await store.called.wait()
            task.cancel()
            await store.delete(KEY)
            store.answer.set()
            (note,) = await task
            assert "lock_already_gone" in note

        run(main)

    def test_a_cancellation_comes_before_what_the_body_raised(self) -> None:
        """It is what goes on, so it carries the note of the loss."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = "release"

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT):
                    raise ValueError

            task = asyncio.create_task(job())
            await store.called.wait()
            task.cancel()
            await store.delete(KEY)
            store.answer.set()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert "lock_already_gone" in caught.value.__notes__[0]

        run(main)

    def test_without_asyncio(self) -> None:
        """Found out before the lock is taken: nobody could renew it."""
        store = MemoryBlobStore()
        with pytest.raises(RuntimeError, match="no running event loop"):
            await_now(aio.hold_job_lock(async_view(store), UID, VAULT).__aenter__())
        assert list(store) == []

    def test_a_task_that_always_dies(self, caplog: pytest.LogCaptureFixture) -> None:
        """Here of a logger's filter: leaving gives up instead of trying for ever."""
        died: list[asyncio.Future[None]] = []

        def broken(record: logging.LogRecord) -> bool:
            task = asyncio.current_task()
            assert task is not None
            died.append(task)
            raise RuntimeError("a bug")

        async def main(store: AsyncFlaky) -> None:
            async with aio.hold_job_lock(store, UID, VAULT, ttl_ms=3000, renew_every_ms=1):
                logger.addFilter(broken)
                store.broken = True
                await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})

        logger = logging.getLogger("joblock")
        try:
            with pytest.raises(RuntimeError, match="a bug"):
                run(main)
        finally:
            logger.removeFilter(broken)
        assert 1 < len({id(task) for task in died}) < 10
        for task in died:
            if task.done():
                task.exception()

    def test_an_event_loop_that_shuts_down(self) -> None:
        """`asyncio.run` cancels every task at once, the renewing one too: still released."""
        store = MemoryBlobStore()

        async def job(entered: asyncio.Event) -> None:
            async with aio.hold_job_lock(async_view(store), UID, VAULT):
                entered.set()
                await asyncio.Event().wait()

        async def main() -> asyncio.Task[None]:
            entered = asyncio.Event()
            task = asyncio.create_task(job(entered))
            await entered.wait()
            assert list(store) == [KEY]
            return task

        assert asyncio.run(main()).cancelled()
        assert list(store) == []

    def test_a_hanging_renewal(self, caplog: pytest.LogCaptureFixture) -> None:
        """The loss is noticed while it hangs; leaving cancels it."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = "renewal"
            with pytest.raises(JobLockLostError, match="lease_expired"):
                async with aio.hold_job_lock(store, UID, VAULT, **BRIEF) as lock:
                    await asyncio.to_thread(until_lost, lock)
            assert only_this_task()

        run(main)
        assert levels(caplog) == ["ERROR"]

    @pytest.mark.slow
    @pytest.mark.parametrize("hanging", ["release", "renewal"])
    def test_a_body_that_ends_while_the_store_hangs(
        self, hanging: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Leaving waits for the deadline and no longer; the job was done in time."""

        async def main(store: AsyncFlaky) -> None:
            store.hanging = hanging
            async with aio.hold_job_lock(
                store, UID, VAULT, ttl_ms=500, renew_every_ms=1 if hanging == "renewal" else 498
            ) as lock:
                if hanging == "renewal":
                    await store.called.wait()
            assert not lock.lost
            assert only_this_task()
            assert not await store.is_free()

        run(main)
        assert levels(caplog) == ["WARNING"]
        assert "could not release" in caplog.text

    @pytest.mark.slow
    def test_a_renewal_in_a_thread_does_not_undo_the_release(self) -> None:
        """Cancelled at the deadline, it goes on in its thread, where its etag is refused."""
        store, hanging, answer = store_that_hangs()

        async def main() -> None:
            threaded = aio.ThreadedBlobStore(store)
            async with aio.hold_job_lock(threaded, UID, VAULT, ttl_ms=500, renew_every_ms=1):
                await asyncio.to_thread(hanging.wait, 30)
            joblock.release_job_lock(store, UID, VAULT)
            answer.set()

        asyncio.run(main())
        assert list(store) == []

    def test_in_a_task_group(self) -> None:
        """A sibling that fails cancels the job, whose lock is released."""

        async def main(store: AsyncFlaky) -> None:
            entered = asyncio.Event()

            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT, **OFTEN) as lock:
                    await asyncio.to_thread(until_renewed, lock)
                    entered.set()
                    await asyncio.Event().wait()

            async def sibling() -> None:
                await entered.wait()
                raise ValueError

            async def both() -> None:
                async with asyncio.TaskGroup() as group:
                    group.create_task(job())
                    group.create_task(sibling())

            with pytest.raises(ExceptionGroup):
                await both()
            assert await store.is_free()

        run(main)

    def test_with_a_timeout(self) -> None:
        """`asyncio.timeout` around the block works as ever."""

        async def main(store: AsyncFlaky) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), aio.hold_job_lock(store, UID, VAULT):
                    await asyncio.Event().wait()
            assert await store.is_free()

        run(main)

    def test_in_an_async_generator_that_nobody_closes(self) -> None:
        """The event loop does, after it has cancelled the renewing task: still released."""
        store = MemoryBlobStore()

        async def steps() -> AsyncIterator[int]:
            async with aio.hold_job_lock(async_view(store), UID, VAULT):
                yield 1
                yield 2

        generator = steps()

        async def main() -> None:
            assert await anext(generator) == 1
            assert list(store) == [KEY]

        asyncio.run(main())
        assert list(store) == []

    def test_a_lock_that_is_forgotten(self) -> None:
        """Its task stops as the thread does."""

        async def main(store: AsyncFlaky) -> None:
            hold = aio.hold_job_lock(store, UID, VAULT, **OFTEN)
            await hold.__aenter__()
            del hold
            gc.collect()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait_for(asyncio.gather(*others), 30)
            assert await store.is_free()

        run(main)

    @pytest.mark.parametrize("times", [1, 100])
    def test_entering_that_is_cancelled(self, times: int) -> None:
        """A client that goes away must not lock the user out: 0 of 60 locks stay."""

        async def main() -> None:
            for number in range(60):
                store = AsyncFlaky()
                store.slow = number % 5

                async def job(store: AsyncFlaky = store) -> None:
                    async with aio.hold_job_lock(store, UID, VAULT):
                        await asyncio.sleep(10)

                task = asyncio.create_task(job())
                for _ in range(number % 7):
                    await asyncio.sleep(0)
                for _ in range(times):
                    task.cancel()
                    await asyncio.sleep(0)
                with pytest.raises(asyncio.CancelledError):
                    await task
                if others := asyncio.all_tasks() - {asyncio.current_task()}:
                    await asyncio.wait(others)
                assert await store.is_free()

        asyncio.run(main())

    @pytest.mark.parametrize("kind", ["acquire", "hold"])
    def test_a_store_call_that_alone_is_cancelled(self, kind: str) -> None:
        """By who cancels every task but his own: it may have written, so it is undone."""
        written = asyncio.Event()

        class Slow(aio.AsyncMemoryBlobStore):
            async def set_if_new(self, key: str, value: str) -> str | None:
                etag = await super().set_if_new(key, value)
                written.set()
                await asyncio.sleep(60)
                return etag

        async def main() -> None:
            store = Slow()

            async def job() -> None:
                if kind == "acquire":
                    await aio.acquire_job_lock(store, UID, VAULT)
                async with aio.hold_job_lock(store, UID, VAULT):
                    raise AssertionError

            task = asyncio.create_task(job())
            await written.wait()
            (call,) = asyncio.all_tasks() - {asyncio.current_task(), task}
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(store) == []

        asyncio.run(main())

    def test_a_scope_that_cancels_in_every_turn_of_the_loop(self) -> None:
        """As anyio's: leaving does not keep the loop busy, and the task releases the lock."""

        async def main(store: AsyncFlaky) -> None:
            async def job() -> None:
                async with aio.hold_job_lock(store, UID, VAULT):
                    store.hanging = "release"

            task = asyncio.create_task(job())
            await store.called.wait()
            turns = 0
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
                turns += 1
            assert turns < 20
            assert task.cancelled()
            assert not await store.is_free()
            store.answer.set()
            await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
            assert await store.is_free()

        run(main)

    def test_a_scope_of_anyios(self) -> None:
        """The real one."""
        anyio = pytest.importorskip("anyio")

        async def main(store: AsyncFlaky) -> None:
            store.hanging = "release"
            with anyio.move_on_after(0.01) as scope:
                async with aio.hold_job_lock(store, UID, VAULT):
                    await anyio.sleep(10)
            assert scope.cancelled_caught
            store.answer.set()
            await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
            assert await store.is_free()

        run(main)

    @pytest.mark.parametrize("cancelled", ["entering", "leaving"])
    def test_a_release_that_goes_on_while_the_event_loop_shuts_down(self, cancelled: str) -> None:
        """It cancels every task once; the release is tried again, and awaited."""
        releasing = asyncio.Event()

        class SlowToRelease(AsyncConditionalView):
            async def delete_if_match(self, key: str, etag: str) -> bool:
                releasing.set()
                await asyncio.sleep(0.01)
                return await super().delete_if_match(key, etag)

        store = SlowToRelease(MemoryBlobStore())

        async def main() -> None:
            task = asyncio.create_task(hold_for_a_moment(store))
            if cancelled == "leaving":
                await releasing.wait()
            while not task.done():
                await asyncio.sleep(0)
                task.cancel()

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(main())
        assert asyncio.run(store.get(KEY)) is None

    def test_a_release_that_is_cancelled_once_it_is_done(self) -> None:
        """By who cancels all tasks but his own: what it has done is not taken for a loss."""

        class SlowToAnswer(AsyncConditionalView):
            async def delete_if_match(self, key: str, etag: str) -> bool:
                deleted = await super().delete_if_match(key, etag)
                if deleted:
                    released.set()
                    await asyncio.Event().wait()
                return deleted

        released = asyncio.Event()
        store = SlowToAnswer(MemoryBlobStore())

        async def main() -> None:
            task = asyncio.create_task(hold_for_a_moment(store))
            await released.wait()
            for other in asyncio.all_tasks() - {task, asyncio.current_task()}:
                other.cancel()
            await task

        asyncio.run(main())

    @pytest.mark.parametrize("closed", [True, False])
    def test_left_in_another_event_loop(self, closed: bool) -> None:
        """As a fixture may be: it says so at once, and releases."""
        store = MemoryBlobStore()
        hold = aio.hold_job_lock(async_view(store), UID, VAULT)
        first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
        first.run_until_complete(hold.__aenter__())
        if closed:
            others = asyncio.all_tasks(first)
            first.run_until_complete(asyncio.sleep(0))
            for task in others:
                task.cancel()
            first.run_until_complete(asyncio.gather(*others, return_exceptions=True))
            first.close()
        with pytest.raises(RuntimeError, match="entered in one event loop and left in another"):
            second.run_until_complete(hold.__aexit__(None, None, None))
        assert list(store) == []
        second.close()
        if not closed:
            first.run_until_complete(asyncio.gather(*asyncio.all_tasks(first)))
            first.close()

    def test_left_in_another_event_loop_by_an_exception(self) -> None:
        """The block's own comes out, with a note."""
        store = MemoryBlobStore()
        hold = aio.hold_job_lock(async_view(store), UID, VAULT)
        first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
        first.run_until_complete(hold.__aenter__())
        error = ValueError()
        second.run_until_complete(hold.__aexit__(ValueError, error, None))
        assert "left in another" in error.__notes__[0]
        assert list(store) == []
        second.close()
        first.run_until_complete(asyncio.gather(*asyncio.all_tasks(first)))
        first.close()

    def test_an_exception_in_the_first_lines_of_leaving(self) -> None:
        """As a signal handler's: leaving is done again, and it goes on after the release."""

        async def main(store: AsyncFlaky) -> None:
            hold = aio.hold_job_lock(store, UID, VAULT)
            keeper: Any = getattr(hold, "_keeper")  # noqa: B009
            end = keeper.end

            def interrupted() -> None:
                keeper.end = end
                raise ZeroDivisionError

            keeper.end = interrupted
            with pytest.raises(ZeroDivisionError):
                async with hold:
                    pass
            assert await store.is_free()

        run(main)

    def test_an_exception_in_the_last_lines_of_entering(self) -> None:
        """The lock is released; there is no task yet."""

        async def main(store: AsyncFlaky) -> None:
            hold: Any = aio.hold_job_lock(store, UID, VAULT)
            start = hold._start

            def interrupted() -> None:
                hold._start = start
                raise ZeroDivisionError

            hold._start = interrupted
            with pytest.raises(ZeroDivisionError):
                async with hold:
                    pytest.fail("entered")
            assert await store.is_free()

        run(main)

    @pytest.mark.parametrize("entering", [True, False])
    def test_a_coroutine_that_nobody_runs_any_more(self, entering: bool) -> None:
        """As of a loop that was stopped: it ends where it is, without awaiting anything."""

        async def main(store: AsyncFlaky) -> None:
            hold = aio.hold_job_lock(store, UID, VAULT)
            if entering:
                store.slow = 3
                step: Any = hold.__aenter__()
            else:
                await hold.__aenter__()
                store.hanging = "release"
                step = hold.__aexit__(None, None, None)
            step.send(None)
            step.close()
            store.answer.set()
            del hold, step
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if not entering:
                await asyncio.wait(others)
                assert await store.is_free()

        run(main)
