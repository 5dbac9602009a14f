"""`hold_job_lock`: what only the blocking one meets, whose lock a thread renews."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from joblock import (
    JobLockLostError,
    JobLockRecord,
    MemoryBlobStore,
    acquire_job_lock,
    hold_job_lock,
    peek_job_lock,
    resume_job_lock,
)
from joblock._waiting import wait_in_turns
from tests.holding import (
    BRIEF,
    MINUTE,
    OFTEN,
    FlakyStore,
    assert_logged,
    poll,
    renewing_threads,
    store_that_hangs,
    until_lost,
)
from tests.support import (
    KEY,
    UID,
    VAULT,
    acquired,
)


class TestAThread:
    """What only the blocking one meets."""

    def test_it_is_a_named_daemon(self) -> None:
        """An operator sees whose it is; it does not keep the process alive."""
        with hold_job_lock(MemoryBlobStore(), UID, VAULT):
            assert renewing_threads() == [f"joblock {KEY}"]
            (thread,) = [it for it in threading.enumerate() if it.name.startswith("joblock")]
            assert thread.daemon

    def test_a_thread_that_cannot_start(self) -> None:
        """No thread, no lock."""
        store = MemoryBlobStore()
        usual = threading.stack_size(1 << 46)
        try:
            with pytest.raises(RuntimeError, match="can't start"):
                hold_job_lock(store, UID, VAULT).__enter__()
        finally:
            threading.stack_size(usual)
        assert list(store) == []

    def test_a_store_that_exits_the_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        """Python drops a SystemExit in a thread without a word; here it is told."""
        store = FlakyStore()
        store.script = [lambda: exec("raise SystemExit")]  # noqa: S102
        with hold_job_lock(store, UID, VAULT, **OFTEN):
            poll(lambda: not renewing_threads())
        assert_logged(caplog, "ERROR")
        assert "builtins.SystemExit" in caplog.text
        assert list(store) == []

    def test_a_thread_that_is_gone_is_the_cause_of_the_loss(self) -> None:
        """Whoever gets the error sees why nobody renewed."""
        store = FlakyStore()
        store.script = [lambda: exec("raise SystemExit")]  # noqa: S102
        with (
            pytest.raises(JobLockLostError, match="lease_expired") as caught,
            hold_job_lock(store, UID, VAULT, **BRIEF) as lock,
        ):
            until_lost(lock)
        assert isinstance(caught.value.__cause__, SystemExit)

    def test_a_release_that_exits_the_thread(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is tried again by whoever leaves, and then ends that one, as the store asks for."""
        store = FlakyStore()
        store.before["delete_if_match"] = lambda: exec("raise SystemExit")  # noqa: S102
        with pytest.raises(SystemExit), hold_job_lock(store, UID, VAULT):
            pass
        assert_logged(caplog, "ERROR")

    @pytest.mark.parametrize("requeues", [False, True], ids=["release", "requeue"])
    @pytest.mark.parametrize("taken_over", [False, True])
    def test_a_release_that_exits_the_thread_once_it_is_done(
        self, requeues: bool, taken_over: bool
    ) -> None:
        """What it has done is not taken for a loss; what another has done since then is one."""
        rival = JobLockRecord("rival", UID, VAULT, started_at=1, expires_at=9e15).to_json()

        class Exits(MemoryBlobStore):
            leaving = False

            def exit_once(self) -> None:
                if self.leaving:
                    self.leaving = False
                    if taken_over:
                        self.set(KEY, rival)
                    raise SystemExit

            def set_if_match(self, key: str, value: str, etag: str) -> str | None:
                written = super().set_if_match(key, value, etag)
                self.exit_once()
                return written

            def delete_if_match(self, key: str, etag: str) -> bool:
                deleted = super().delete_if_match(key, etag)
                self.exit_once()
                return deleted

        store = Exits()
        times = itertools.count()  # so that no two tries write the same deadline
        clock = partial(next, times)
        job_id = acquired(acquire_job_lock(store, UID, VAULT, clock=clock)).job_id
        with (
            pytest.raises(JobLockLostError) if taken_over else contextlib.nullcontext(),
            resume_job_lock(store, UID, VAULT, expected_job_id=job_id, clock=clock) as lock,
        ):
            if requeues:
                lock.requeue()
            store.leaving = True
        left = peek_job_lock(store, UID, VAULT)
        expected = "rival" if taken_over else job_id if requeues else None
        assert (None if left is None else left.job_id) == expected

    def test_a_hanging_renewal(self, caplog: pytest.LogCaptureFixture) -> None:
        """The loss is noticed while it hangs, and leaving does not wait for it."""
        store = FlakyStore()
        answer = threading.Event()
        store.script = [lambda: answer.wait(30)]
        try:
            with (
                pytest.raises(JobLockLostError, match="lease_expired"),
                hold_job_lock(store, UID, VAULT, **BRIEF) as lock,
            ):
                until_lost(lock)
            assert not answer.is_set()
            assert renewing_threads()
        finally:
            answer.set()
        assert_logged(caplog, "ERROR")

    @pytest.mark.slow
    def test_a_body_that_ends_while_a_renewal_hangs(self, caplog: pytest.LogCaptureFixture) -> None:
        """Leaving waits for the deadline and no longer; the job was done in time."""
        store, hanging, answer = store_that_hangs()
        try:
            with hold_job_lock(store, UID, VAULT, ttl_ms=750, renew_every_ms=1) as lock:
                assert hanging.wait(30)
                assert not lock.lost
            assert not answer.is_set()
            assert_logged(caplog, "WARNING")
            assert "no answer from the store" in caplog.text
        finally:
            answer.set()
        poll(lambda: list(store) == [])  # and once it answers, the lock is released late
        assert not lock.lost

    def test_what_a_signal_handler_raises_while_leaving(self) -> None:
        """It goes on when the lock has been released, as in tests/integration with Ctrl-C."""

        class TimeLimitError(Exception):
            pass

        def end(*_: object) -> None:
            raise TimeLimitError

        class Slow(MemoryBlobStore):
            def delete_if_match(self, key: str, etag: str) -> bool:
                signal.pthread_kill(main, signal.SIGUSR1)
                time.sleep(0.1)
                return super().delete_if_match(key, etag)

        store = Slow()
        main = threading.get_ident()
        before = signal.signal(signal.SIGUSR1, end)
        try:
            with pytest.raises(TimeLimitError), hold_job_lock(store, UID, VAULT):
                pass
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert list(store) == []

    def test_at_the_end_of_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other thread does not run any more, so this one releases the lock."""
        store, hanging, answer = store_that_hangs()
        try:
            with hold_job_lock(store, UID, VAULT, ttl_ms=10 * MINUTE, renew_every_ms=1) as lock:
                assert hanging.wait(30)
                monkeypatch.setattr("sys.is_finalizing", lambda: True)
            assert list(store) == []
            assert not lock.lost
        finally:
            answer.set()

    def test_in_a_generator_that_is_collected_during_a_renewal(self) -> None:
        """By the very thread that renews, which cannot wait for itself: it releases afterwards."""

        class Collecting(MemoryBlobStore):
            def set_if_match(self, key: str, value: str, etag: str) -> str | None:
                gc.collect()
                return super().set_if_match(key, value, etag)

        store = Collecting()

        def steps() -> Iterator[int]:
            with hold_job_lock(store, UID, VAULT, ttl_ms=10 * MINUTE, renew_every_ms=100):
                yield 1
                yield 2

        class Node:
            steps: Iterator[int]

        node = Node()
        node.steps = steps()
        setattr(node, "itself", node)  # noqa: B010
        gc.disable()
        try:
            assert next(node.steps) == 1
            del node
            poll(lambda: list(store) == [])
        finally:
            gc.enable()

    def test_in_generators_and_exit_stacks(self) -> None:
        """However the block is left."""
        store = MemoryBlobStore()

        def steps() -> Iterator[int]:
            with hold_job_lock(store, UID, VAULT):
                yield 1
                yield 2

        generator = steps()
        assert next(generator) == 1
        assert list(store) == [KEY]
        del generator
        assert list(store) == []
        with contextlib.ExitStack() as stack:
            for vault in ("a", "b"):
                stack.enter_context(hold_job_lock(store, UID, vault))
            assert len(store) == 2
        assert list(store) == []

    def test_is_not_a_decorator(self) -> None:
        """One call, one lock: a decorated function would share it between its calls."""
        assert not callable(hold_job_lock(MemoryBlobStore(), UID, VAULT))

    def test_is_for_one_block(self) -> None:
        """Entered again, in it or after it, it would mix up two jobs."""
        store = MemoryBlobStore()
        hold = hold_job_lock(store, UID, VAULT)
        with hold, pytest.raises(RuntimeError, match="has been entered"), hold:
            pytest.fail("entered twice")
        with pytest.raises(RuntimeError, match="has been entered"), hold:
            pytest.fail("entered again")
        assert list(store) == []


def test_a_wait_in_turns_ends() -> None:
    """Without the lock when the time is over, and as soon as it can be had."""
    lock = threading.Lock()
    assert wait_in_turns(lock, 60)
    assert lock.locked()
    assert not wait_in_turns(lock, 0.01)
    assert lock.locked()


def test_no_turn_is_longer_than_a_second() -> None:
    """A signal that came just before one is not seen sooner."""
    turns: list[float] = []

    class Busy:
        def acquire(self, timeout: float) -> bool:
            turns.append(timeout)
            return len(turns) == 3

    lock: Any = Busy()
    assert wait_in_turns(lock, 60)
    assert turns == [1, 1, 1]
