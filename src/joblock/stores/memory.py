"""A dict and a lock: for tests, and for a service that is one process."""

from __future__ import annotations

import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Literal

from .._store import Blob

__all__ = ["AsyncMemoryBlobStore", "MemoryBlobStore"]


class MemoryBlobStore:
    """A conditional store in this process's memory, safe from any thread.

    `len(store)` is the number of keys and `iter(store)` goes over them. Other processes do not
    see it. Not for signal handlers, nor for a child forked while another thread used the store:
    they may wait for its lock for ever.
    """

    def __init__(self) -> None:
        self._blobs: dict[str, tuple[str, str]] = {}  # value and etag
        self._etags = itertools.count(1)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._blobs)

    def __bool__(self) -> Literal[True]:
        return True  # `store or DEFAULT` must not drop an empty test double

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._blobs))

    def __repr__(self) -> str:
        blobs = {key: value for key, (value, _) in list(self._blobs.items())}
        return f"MemoryBlobStore({blobs})"

    def get(self, key: str) -> str | None:
        """Return the value, or None if there is no such key."""
        blob = self._blobs.get(key)
        return None if blob is None else blob[0]

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        with self._lock:
            self._write(key, value)

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        with self._lock:
            self._blobs.pop(key, None)

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        blob = self._blobs.get(key)
        return None if blob is None else Blob(*blob)

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        with self._lock:
            return None if key in self._blobs else self._write(key, value)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        with self._lock:
            return self._write(key, value) if self._is_current(key, etag) else None

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        with self._lock:
            if not self._is_current(key, etag):
                return False
            del self._blobs[key]
            return True

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, of those that are there at the first of them."""
        return (key for key in self if key.startswith(prefix))

    def _is_current(self, key: str, etag: str) -> bool:
        blob = self._blobs.get(key)
        return blob is not None and blob[1] == etag

    def _write(self, key: str, value: str) -> str:
        etag = str(next(self._etags))
        self._blobs[key] = (value, etag)
        return etag


class AsyncMemoryBlobStore:
    """As `MemoryBlobStore`, for `joblock.aio`, under any event loop. No call ever waits."""

    def __init__(self) -> None:
        self._store = MemoryBlobStore()

    def __len__(self) -> int:
        return len(self._store)

    def __bool__(self) -> Literal[True]:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __repr__(self) -> str:
        return f"Async{self._store!r}"

    async def get(self, key: str) -> str | None:
        """As `MemoryBlobStore.get`."""
        return self._store.get(key)

    async def set(self, key: str, value: str) -> None:
        """As `MemoryBlobStore.set`."""
        self._store.set(key, value)

    async def delete(self, key: str) -> None:
        """As `MemoryBlobStore.delete`."""
        self._store.delete(key)

    async def get_with_etag(self, key: str) -> Blob | None:
        """As `MemoryBlobStore.get_with_etag`."""
        return self._store.get_with_etag(key)

    async def set_if_new(self, key: str, value: str) -> str | None:
        """As `MemoryBlobStore.set_if_new`."""
        return self._store.set_if_new(key, value)

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """As `MemoryBlobStore.set_if_match`."""
        return self._store.set_if_match(key, value, etag)

    async def delete_if_match(self, key: str, etag: str) -> bool:
        """As `MemoryBlobStore.delete_if_match`."""
        return self._store.delete_if_match(key, etag)

    async def list_keys(self, prefix: str) -> AsyncIterator[str]:
        """As `MemoryBlobStore.list_keys`."""
        for key in self._store.list_keys(prefix):
            yield key
