"""joblock for async stores: the same names, to be awaited.

The functions use no event loop of their own, so they run under asyncio, trio or any other;
`hold_job_lock` and `ThreadedBlobStore` are for asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import uuid
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, TypeAlias, TypeVar

from . import _protocol
from ._hold import OwnedJobLock
from ._lease import Keeper, Once, begin
from ._protocol import JOB_LOCK_TTL_MS
from ._record import JobLockRecord, epoch_ms
from ._results import Acquired, Held, Lost, ReleaseResult, Renewed
from ._store import (
    CONDITIONAL,
    AsyncBlobStore,
    Blob,
    BlobStore,
    WrongStoreError,
    blocking,
    is_conditional,
    require,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Async: TypeAlias = Callable[_P, Coroutine[Any, Any, _T]]

__all__ = [
    "ThreadedBlobStore",
    "acquire_job_lock",
    "hold_job_lock",
    "peek_job_lock",
    "release_job_lock",
    "renew_job_lock",
]


async def acquire_job_lock(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    actor_uid: str | None = None,
    chunks_to_embed: float | None = None,
    estimated_seconds: float | None = None,
    reason: str | None = None,
    ttl_ms: float = JOB_LOCK_TTL_MS,
    clock_skew_ms: float = 0,
    clock: Callable[[], float] = epoch_ms,
    uuid_factory: Callable[[], uuid.UUID | str] = uuid.uuid4,
) -> Acquired | Held:
    """As `joblock.acquire_job_lock`, on an async store.

    A call that is cancelled may have taken the lock, as one whose write raised.
    """
    _require_async(store, _protocol.ACQUIRE_NEEDS)
    return await _protocol.acquire(
        store,
        canister_uid,
        vault_id,
        actor_uid=actor_uid,
        chunks_to_embed=chunks_to_embed,
        estimated_seconds=estimated_seconds,
        reason=reason,
        ttl_ms=ttl_ms,
        clock_skew_ms=clock_skew_ms,
        clock=clock,
        uuid_factory=uuid_factory,
    )


async def release_job_lock(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str | None = None,
    etag: str | None = None,
) -> ReleaseResult:
    """As `joblock.release_job_lock`, on an async store.

    A call that is cancelled may have removed the lock; releasing the same job id again is safe.
    """
    _require_async(store, _protocol.release_needs(expected_job_id))
    return await _protocol.release(
        store, canister_uid, vault_id, expected_job_id=expected_job_id, etag=etag
    )


async def peek_job_lock(
    store: AsyncBlobStore, canister_uid: str, vault_id: str
) -> JobLockRecord | None:
    """As `joblock.peek_job_lock`, on an async store."""
    _require_async(store, _protocol.PEEK_NEEDS)
    return await _protocol.peek(store, canister_uid, vault_id)


async def renew_job_lock(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    expected_job_id: str,
    ttl_ms: float = JOB_LOCK_TTL_MS,
    clock: Callable[[], float] = epoch_ms,
    etag: str | None = None,
    record: JobLockRecord | None = None,
) -> Renewed | Lost:
    """As `joblock.renew_job_lock`, on an async store.

    After a call that is cancelled the lock has its old or its new deadline; count on the old one.
    """
    _require_async(store, _protocol.RENEW_NEEDS)
    return await _protocol.renew(
        store,
        canister_uid,
        vault_id,
        expected_job_id=expected_job_id,
        ttl_ms=ttl_ms,
        clock=clock,
        etag=etag,
        record=record,
    )


def hold_job_lock(
    store: AsyncBlobStore,
    canister_uid: str,
    vault_id: str,
    *,
    renew_every_ms: float | None = None,
    actor_uid: str | None = None,
    chunks_to_embed: float | None = None,
    estimated_seconds: float | None = None,
    reason: str | None = None,
    ttl_ms: float = JOB_LOCK_TTL_MS,
    clock_skew_ms: float = 0,
    clock: Callable[[], float] = epoch_ms,
    uuid_factory: Callable[[], uuid.UUID | str] = uuid.uuid4,
) -> _Hold:
    """As `joblock.hold_job_lock`, on an async store, for `async with` under asyncio.

    A task renews the lock. A block that is cancelled releases it like any other, and so does one
    that is cancelled again while leaving; the cancellation goes on once the store has answered.
    Entering that is cancelled may have taken the lock, as `acquire_job_lock`. A block that keeps
    the event loop busy for longer than the lease loses its lock.
    """
    _require_async(store, _protocol.HOLD_NEEDS)
    return _Hold(
        partial(
            begin,
            store,
            canister_uid,
            vault_id,
            renew_every_ms=renew_every_ms,
            actor_uid=actor_uid,
            chunks_to_embed=chunks_to_embed,
            estimated_seconds=estimated_seconds,
            reason=reason,
            ttl_ms=ttl_ms,
            clock_skew_ms=clock_skew_ms,
            clock=clock,
            uuid_factory=uuid_factory,
        )
    )


_CANCELLING_S = 1.0  # for a store that does not heed it
_RESTARTS = 3  # an event loop that shuts down cancels every task once


class _Hold:
    def __init__(self, begin: Callable[[], Coroutine[Any, Any, Keeper]]) -> None:
        self._begin = begin
        self._enter = Once()

    async def __aenter__(self) -> OwnedJobLock:
        asyncio.get_running_loop()  # no asyncio, no lock
        self._enter()
        self._keeper = await self._begin()
        self._lock = OwnedJobLock(self._keeper)
        self._ended = asyncio.Event()
        self._task = self._start()
        return self._lock

    def _start(self) -> asyncio.Task[None]:
        return asyncio.create_task(
            _keep(self._keeper, weakref.ref(self._lock), self._ended),
            name=f"joblock {self._keeper.key}",
        )

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        keeper = self._keeper
        if not keeper.end():
            return
        self._ended.set()
        cancelled: asyncio.CancelledError | None = None  # it goes on below, after the release
        restarts = 0
        while (left_s := keeper.left_s()) > 0 and not (self._task.done() and keeper.finished):
            if self._task.done():
                if restarts == _RESTARTS:
                    break
                restarts += 1
                self._task = self._start()
            cancelled = await self._wait(left_s) or cancelled
        if not self._task.done():
            self._task.cancel()
            cancelled = await self._wait(_CANCELLING_S) or cancelled
        keeper.leave(cancelled or exc)
        if cancelled is not None:
            raise cancelled

    async def _wait(self, seconds: float) -> asyncio.CancelledError | None:
        """Wait so long for the task; return what cancels the waiting, if anything does."""
        try:
            await asyncio.wait({self._task}, timeout=seconds)
        except asyncio.CancelledError as error:
            return error
        return None


async def _keep(keeper: Keeper, holder: weakref.ref[object], ended: asyncio.Event) -> None:
    async def wait(seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await ended.wait()
        return ended.is_set()

    try:
        await keeper.keep(holder, wait)
    except asyncio.CancelledError as error:
        if not ended.is_set():
            keeper.died(error)
        raise
    except Exception as error:
        keeper.died(error)


class ThreadedBlobStore:
    """An async store that calls a blocking one in asyncio's worker threads.

    It has the conditional methods if `store` has them. `store` must be safe to use from any
    thread. A call that is cancelled goes on in its thread: its write may still take effect, and
    may do so after whatever its caller does next.
    """

    def __init__(self, store: BlobStore) -> None:
        methods = _methods(store, ("get", "set", "delete"))
        if any(inspect.iscoroutinefunction(getattr(store, name)) for name in methods):
            raise WrongStoreError(f"{type(store).__name__} is async already: use it as it is")
        self._store = store
        if is_conditional(store):
            self.get_with_etag: _Async[[str], Blob | None] = _in_thread(store.get_with_etag)
            self.set_if_new: _Async[[str, str], str | None] = _in_thread(store.set_if_new)
            self.set_if_match: _Async[[str, str, str], str | None] = _in_thread(store.set_if_match)
            self.delete_if_match: _Async[[str, str], bool] = _in_thread(store.delete_if_match)

    def __repr__(self) -> str:
        return f"ThreadedBlobStore({self._store!r})"

    async def get(self, key: str) -> str | bytes | None:
        """As `BlobStore.get`."""
        return await _in_thread(self._store.get)(key)

    async def set(self, key: str, value: str) -> None:
        """As `BlobStore.set`."""
        await _in_thread(self._store.set)(key, value)

    async def delete(self, key: str) -> None:
        """As `BlobStore.delete`."""
        await _in_thread(self._store.delete)(key)


def _in_thread(method: Callable[_P, _T]) -> _Async[_P, _T]:
    async def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return blocking(await asyncio.to_thread(method, *args, **kwargs))

    return call


def _methods(store: BlobStore | AsyncBlobStore, needed: tuple[str, ...]) -> tuple[str, ...]:
    require(store, needed)
    return (*needed, *CONDITIONAL) if is_conditional(store) else needed


def _require_async(store: AsyncBlobStore, needed: tuple[str, ...]) -> None:
    # Before any call: to find out by awaiting a blocking store's answer would be after its write.
    for name in _methods(store, needed):
        if not _is_async_def(getattr(store, name)):
            raise WrongStoreError(
                f"{type(store).__name__}.{name} is not `async def`: use the functions of joblock, "
                "or wrap the store in joblock.aio.ThreadedBlobStore"
            )


def _is_async_def(method: object) -> bool:
    # Nearly every method has its flag in plain sight; `inspect` takes microseconds to look further.
    code = getattr(method, "__code__", None)
    if code is not None and code.co_flags & inspect.CO_COROUTINE:
        return True
    return inspect.iscoroutinefunction(method)
