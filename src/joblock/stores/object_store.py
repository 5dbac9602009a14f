"""S3, Azure, Google and memory by obstore: without their SDKs, and async without a thread."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from .._store import TOMBSTONE, Blob, run
from ._etag import new_etag
from ._remote import CutReplyError, Retry, is_etag, missing, whole

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, GenericError, JoinError, PreconditionError
    from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store
except ModuleNotFoundError as _error:
    raise missing(__name__, _error, "object-store") from _error

__all__ = ["AsyncObjectStoreBlobStore", "ObjectStoreBlobStore"]


class ObjectStoreBlobStore:
    """A conditional store in a bucket, over an `S3Store`, `AzureStore` or `GCSStore` of obstore.

    Or over a `MemoryStore`, for tests. A local folder is refused: it cannot update under a
    condition. `prefix` goes before every key as it is, so end it with a slash. A bucket can be
    shared with `S3BlobStore` and its neighbours: the keys and the records are the same.

    obstore has no conditional delete: a release writes `null` over the record, which every reader
    takes for no lock. Each write has a mark of its own in the object's metadata `joblock`: obstore
    repeats a request that failed, so after a refusal the object is read, and the mark tells
    whether this very call has written it.

    Time-outs and retries are the `client_options` and the `retry_config` of obstore's store, whose
    defaults try for three minutes. A request that it gave up is sent once more. What obstore raises
    then reaches the caller.

    Safe from any thread. In a child after fork make a new one: obstore's threads stay behind.
    """

    leaves_null = True  # so that a sweep is refused

    def __init__(self, store: Any, *, prefix: str = "") -> None:
        self._objects = _Objects(store, prefix, _BLOCKING)

    def __repr__(self) -> str:
        return f"ObjectStoreBlobStore({self._objects!r})"

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        return run(self._objects.get(key))

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        run(self._objects.write(key, value, "overwrite"))

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        run(self._objects.delete(key))

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        return run(self._objects.get_with_etag(key))

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        return run(self._objects.write(key, value, "create"))

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        return run(self._objects.set_if_match(key, value, etag))

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Write `null` and return True; False, and nothing written, if `etag` is not current."""
        return run(self._objects.set_if_match(key, TOMBSTONE, etag)) is not None

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, those that were released too: `null` is left there."""
        for page in self._objects.list(prefix):
            yield from self._objects.keys(page, prefix)


class AsyncObjectStoreBlobStore:
    """As `ObjectStoreBlobStore`, for `joblock.aio` under asyncio."""

    leaves_null = True  # so that a sweep is refused

    def __init__(self, store: Any, *, prefix: str = "") -> None:
        self._objects = _Objects(store, prefix, _NATIVE)

    def __repr__(self) -> str:
        return f"AsyncObjectStoreBlobStore({self._objects!r})"

    async def get(self, key: str) -> str | bytes | None:
        """As `ObjectStoreBlobStore.get`."""
        return await self._objects.get(key)

    async def set(self, key: str, value: str) -> None:
        """As `ObjectStoreBlobStore.set`."""
        await self._objects.write(key, value, "overwrite")

    async def delete(self, key: str) -> None:
        """As `ObjectStoreBlobStore.delete`."""
        await self._objects.delete(key)

    async def get_with_etag(self, key: str) -> Blob | None:
        """As `ObjectStoreBlobStore.get_with_etag`."""
        return await self._objects.get_with_etag(key)

    async def set_if_new(self, key: str, value: str) -> str | None:
        """As `ObjectStoreBlobStore.set_if_new`."""
        return await self._objects.write(key, value, "create")

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """As `ObjectStoreBlobStore.set_if_match`."""
        return await self._objects.set_if_match(key, value, etag)

    async def delete_if_match(self, key: str, etag: str) -> bool:
        """As `ObjectStoreBlobStore.delete_if_match`."""
        return await self._objects.set_if_match(key, TOMBSTONE, etag) is not None

    async def list_keys(self, prefix: str) -> AsyncIterator[str]:
        """As `ObjectStoreBlobStore.list_keys`."""
        async for page in self._objects.list(prefix):
            for key in self._objects.keys(page, prefix):
                yield key


_untyped: Any = obstore


class _Calls(NamedTuple):
    """obstore's functions, to be awaited."""

    get: Callable[..., Awaitable[Any]]
    content: Callable[[Any], Awaitable[Any]]
    put: Callable[..., Awaitable[Any]]
    delete: Callable[..., Awaitable[Any]]
    sleep: Callable[[float], Awaitable[object]]


def _at_once(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _bytes(got: Any) -> Any:
    return got.bytes()


async def _bytes_async(got: Any) -> Any:
    return await got.bytes_async()


_BLOCKING = _Calls(
    _at_once(obstore.get),
    _at_once(_bytes),
    _at_once(obstore.put),
    _at_once(obstore.delete),
    _at_once(time.sleep),
)
_NATIVE = _Calls(
    obstore.get_async,
    _bytes_async,
    obstore.put_async,
    obstore.delete_async,
    asyncio.sleep,
)


class _Read(NamedTuple):
    blob: Blob
    mark: str | None


class _Objects:
    """What both kinds of store do."""

    def __init__(self, store: Any, prefix: str, calls: _Calls) -> None:
        if not isinstance(store, (S3Store, AzureStore, GCSStore, MemoryStore)):
            raise ValueError(f"obstore's {type(store).__name__} has no conditional update")
        self._store = store
        self._prefix = prefix
        self._calls = calls
        # Google's conditions are on the generation, which obstore calls version.
        self._etag = "version" if isinstance(store, GCSStore) else "e_tag"

    def __repr__(self) -> str:
        return f"{type(self._store).__name__}, prefix={self._prefix!r}"

    async def get(self, key: str) -> str | bytes | None:
        blob = await self.get_with_etag(key)
        return None if blob is None else blob.value

    async def get_with_etag(self, key: str) -> Blob | None:
        read = await self._ask(partial(self._read, key))
        return None if read is None else read.blob

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return await self.write(key, value, {self._etag: etag}) if is_etag(etag) else None

    async def write(self, key: str, value: str, mode: Any) -> str | None:
        mark = new_etag()
        attributes = {"Content-Type": "application/json", "joblock": mark}
        put = partial(self._calls.put, self._store, self._name(key), value.encode())
        try:
            written = await self._ask(partial(put, mode=mode, attributes=attributes))
        except (AlreadyExistsError, PreconditionError):
            read = await self._ask(partial(self._read, key))
            return read.blob.etag if read is not None and read.mark == mark else None
        return whole(written[self._etag])

    async def delete(self, key: str) -> None:
        try:
            await self._ask(partial(self._calls.delete, self._store, self._name(key)))
        except FileNotFoundError as error:
            _raise_if_no_bucket(error)

    def list(self, prefix: str) -> Any:
        """A page after the other; obstore's own prefix ends with a whole part of the path."""
        folder = (self._prefix + prefix).rpartition("/")[0]
        return _untyped.list(self._store, prefix=folder or None, chunk_size=1000)

    def keys(self, page: Any, prefix: str) -> Iterator[str]:
        for item in page:
            if item["path"].startswith(self._prefix + prefix):
                yield item["path"].removeprefix(self._prefix)

    async def _read(self, key: str) -> _Read | None:
        try:
            got = await self._calls.get(self._store, self._name(key))
        except FileNotFoundError as error:
            _raise_if_no_bucket(error)
            return None
        value = bytes(await self._calls.content(got))
        if len(value) != got.meta["size"]:
            raise CutReplyError(f"{len(value)} bytes of a value of {got.meta['size']}")
        return _Read(Blob(value, whole(got.meta[self._etag])), got.attributes.get("joblock"))

    async def _ask(self, send: Callable[[], Awaitable[Any]]) -> Any:
        return await _RETRY.ask_async(send, self._calls.sleep)

    def _name(self, key: str) -> str:
        return self._prefix + key


def _raise_if_no_bucket(error: FileNotFoundError) -> None:
    if re.search("NoSuchBucket|ContainerNotFound|bucket does not exist", str(error)):
        raise error


_RETRY = Retry(  # obstore has been patient already
    lambda error: isinstance(error, (GenericError, JoinError, CutReplyError)), pauses_s=(0.1,)
)
