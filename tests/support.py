"""What several test files share: recording stores, async views, one face for both APIs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import joblock
from joblock import BlobStore, ConditionalBlobStore, aio
from joblock._store import is_conditional, tells
from joblock._store import run as await_now
from joblock.testing import ManualClock

__all__ = ["await_now"]  # runs a coroutine that waits for nothing: an event loop would cost time

UID, VAULT = "user-1", "Business"
KEY = "index-jobs/user-1/Business.json"


class Clock(ManualClock):
    """As users have it, from a small number on."""

    def __init__(self, now_ms: float = 1_000_000) -> None:
        super().__init__(now_ms)

    @property
    def now(self) -> float:
        return self()


class BareClock:
    """Only what a clock must be, for simulations that pass the time by themselves."""

    def __init__(self, now: float = 1_000_000) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, ms: float) -> None:
        self.now += ms


class PlainStore:
    """The original's three methods over a dict; it records each call and can be told to fail."""

    def __init__(self, blobs: dict[str, str] | None = None) -> None:
        self.blobs: dict[str, str] = dict(blobs or {})
        self.calls: list[list[str]] = []
        self.failing: str | None = None

    def _called(self, *call: str) -> None:
        self.calls.append(list(call))
        if call[0] == self.failing:
            raise OSError(f"{call[0]} failed")

    def get(self, key: str) -> str | None:
        self._called("get", key)
        return self.blobs.get(key)

    def set(self, key: str, value: str) -> None:
        self._called("set", key, value)
        self.blobs[key] = value

    def delete(self, key: str) -> None:
        self._called("delete", key)
        self.blobs.pop(key, None)


class AsyncView:
    """A blocking plain store as an async one, on the event loop's own thread."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store

    async def get(self, key: str) -> str | bytes | None:
        return self.store.get(key)

    async def set(self, key: str, value: str) -> None:
        self.store.set(key, value)

    async def delete(self, key: str) -> None:
        self.store.delete(key)


class AsyncConditionalView(AsyncView):
    """A blocking conditional store as an async one."""

    def __init__(self, store: ConditionalBlobStore) -> None:
        super().__init__(store)
        self.conditional = store

    async def get_with_etag(self, key: str) -> joblock.Blob | None:
        return self.conditional.get_with_etag(key)

    async def set_if_new(self, key: str, value: str) -> str | None:
        return self.conditional.set_if_new(key, value)

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return self.conditional.set_if_match(key, value, etag)

    async def delete_if_match(self, key: str, etag: str) -> bool:
        return self.conditional.delete_if_match(key, etag)


class AsyncTellingView(AsyncConditionalView):
    async def set_if_new_or_get(self, key: str, value: str) -> Any:
        telling: Any = self.store
        return telling.set_if_new_or_get(key, value)


def async_view(store: BlobStore) -> AsyncView:
    if not is_conditional(store):
        return AsyncView(store)
    return AsyncTellingView(store) if tells(store) else AsyncConditionalView(store)


class SyncApi:
    """joblock's functions, on a blocking store."""

    acquire = staticmethod(joblock.acquire_job_lock)
    release = staticmethod(joblock.release_job_lock)
    peek = staticmethod(joblock.peek_job_lock)
    renew = staticmethod(joblock.renew_job_lock)


class AsyncApi:
    """joblock.aio's functions, called with a blocking store that they see as an async one."""

    @staticmethod
    def acquire(store: Any, *args: Any, **kwargs: Any) -> joblock.Acquired | joblock.Held:
        return await_now(aio.acquire_job_lock(async_view(store), *args, **kwargs))

    @staticmethod
    def release(store: Any, *args: Any, **kwargs: Any) -> joblock.ReleaseResult:
        return await_now(aio.release_job_lock(async_view(store), *args, **kwargs))

    @staticmethod
    def peek(store: Any, *args: Any, **kwargs: Any) -> joblock.JobLockRecord | None:
        return await_now(aio.peek_job_lock(async_view(store), *args, **kwargs))

    @staticmethod
    def renew(store: Any, *args: Any, **kwargs: Any) -> joblock.Renewed | joblock.Lost:
        return await_now(aio.renew_job_lock(async_view(store), *args, **kwargs))


Api = type[SyncApi] | type[AsyncApi]


class RecordingStore(joblock.MemoryBlobStore):
    """A conditional store that records the names of its calls and lets others act before one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], object]] = {}

    def _called(self, name: str) -> None:
        self.calls.append(name)
        act = self.before.get(name)
        if act is not None:
            act()

    def once_before(self, name: str, act: Callable[[], object]) -> None:
        """Let `act` happen just before the next call of `name`."""

        def act_once() -> None:
            del self.before[name]
            act()

        self.before[name] = act_once

    def get(self, key: str) -> str | None:
        self._called("get")
        return super().get(key)

    def set(self, key: str, value: str) -> None:
        self._called("set")
        super().set(key, value)

    def delete(self, key: str) -> None:
        self._called("delete")
        super().delete(key)

    def get_with_etag(self, key: str) -> joblock.Blob | None:
        self._called("get_with_etag")
        return super().get_with_etag(key)

    def set_if_new(self, key: str, value: str) -> str | None:
        self._called("set_if_new")
        return super().set_if_new(key, value)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        self._called("set_if_match")
        return super().set_if_match(key, value, etag)

    def delete_if_match(self, key: str, etag: str) -> bool:
        self._called("delete_if_match")
        return super().delete_if_match(key, etag)


class TellingStore(RecordingStore):
    """One whose refusal of a new key tells what is there."""

    def set_if_new_or_get(self, key: str, value: str) -> str | joblock.Blob | None:
        self._called("set_if_new_or_get")
        etag = joblock.MemoryBlobStore.set_if_new(self, key, value)
        return etag or joblock.MemoryBlobStore.get_with_etag(self, key)


def acquired(result: joblock.Acquired | joblock.Held) -> joblock.Acquired:
    assert isinstance(result, joblock.Acquired)
    return result


def held(result: joblock.Acquired | joblock.Held) -> joblock.Held:
    assert isinstance(result, joblock.Held)
    return result
