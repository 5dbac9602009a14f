"""Redis 6.2 and later, and Valkey: one server, Sentinel, or a cluster.

Each verb is one command, or one script on one key, which Redis runs as a whole. redis-py repeats a
request that had no answer, and tells nobody; so each write is safe to do twice. One that finds
exactly what it was to write has been done before, and a removal leaves, for a minute, a mark by
which it knows itself again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from .._store import Blob
from ._remote import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Retry, etag_alone, missing

try:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.backoff import ExponentialBackoff
    from redis.exceptions import BusyLoadingError, NoScriptError
    from redis.exceptions import ConnectionError as NoConnectionError
    from redis.exceptions import TimeoutError as NoAnswerError
    from redis.retry import Retry as SyncRetry
except ModuleNotFoundError as _error:
    raise missing(__name__, _error, "redis") from _error

__all__ = ["AsyncRedisBlobStore", "RedisBlobStore", "connect", "connect_async"]

_REMOVED = b"\0joblock removed "  # no value that anybody else writes begins so
_REMOVED_FOR_MS = 60_000  # longer than redis-py repeats a request


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text
        self.sha1 = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# An etag is the SHA-1 of the value. It may come back, with an equal value: two records of one lock
# that are equal name the same run with the same deadline, and to write over either is the same.
_CURRENT = f"""
local current = redis.call('GET', KEYS[1])
if current and string.sub(current, 1, {len(_REMOVED)}) == '\\0joblock removed ' then
  if ARGV[2] == current then return 1 end
  current = false
end
"""
_SET_IF_NEW = _Script(f"""{_CURRENT}
if current == ARGV[1] then return 1 end
if current then return current end
redis.call('SET', KEYS[1], ARGV[1])
return 1
""")
_SET_IF_MATCH = _Script(f"""{_CURRENT}
if current == ARGV[1] then return 1 end
if not current or redis.sha1hex(current) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
""")
_DELETE_IF_MATCH = _Script(f"""{_CURRENT}
if not current or redis.sha1hex(current) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', {_REMOVED_FOR_MS})
return 1
""")
_TIME = _Script("return redis.call('TIME')")
_RAW: dict[str, Any] = {"NEVER_DECODE": True}  # whatever `decode_responses` says


class RedisBlobStore:
    """A conditional store in Redis, over the redis-py client that it is given.

    The client may be a `redis.Redis`, from a pool, a URL or Sentinel, or a `redis.RedisCluster`.
    `prefix` goes before every key as it is. Keys have no expiry: under a `maxmemory-policy` of
    `volatile-...` or `noeviction` Redis removes no lock by itself, under `allkeys-...` it may.

    A request without an answer is sent once more after redis-py gave it up. Then what redis-py
    raises reaches the caller. A removed key lasts for a minute as a mark, which reads as no key.

    Safe from any thread, and in a child after fork, which opens connections of its own.
    """

    def __init__(self, client: Any, *, prefix: str = "") -> None:
        self._client = client
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"RedisBlobStore(prefix={self._prefix!r})"

    def get(self, key: str) -> bytes | None:
        """Return the value, or None if there is no such key."""
        return _value(self._ask("GET", self._name(key)))

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._ask("SET", self._name(key), value.encode())

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        self._ask("DEL", self._name(key))

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        return _blob(self._ask("GET", self._name(key)))

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists.

        If it exists with this very value, that was written by this call.
        """
        return etag_alone(self.set_if_new_or_get(key, value))

    def set_if_new_or_get(self, key: str, value: str) -> str | Blob:
        """As `set_if_new`, but where it writes nothing it returns what is there."""
        return _created(self._run(_SET_IF_NEW, key, value), value)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        return _written(self._run(_SET_IF_MATCH, key, value, etag), value)

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        return bool(self._run(_DELETE_IF_MATCH, key, etag, _mark()))

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in any order; one may come twice while others change."""
        for key in self._client.scan_iter(match=_pattern(self._prefix + prefix), count=1000):
            yield _text(key).removeprefix(self._prefix)

    def cautions(self) -> list[str]:
        """Return what of the server's settings may free a live lock; for `check_store`."""
        return _cautions(self._client.config_get("maxmemory-policy"))

    def server_time_ms(self, key: str) -> tuple[float, float]:
        """Return between which epoch milliseconds the server's clock is; for `check_store`.

        The server is that which has `key`.
        """
        return _time(self._run(_TIME, key))

    def _name(self, key: str) -> bytes:
        return (self._prefix + key).encode()

    def _run(self, script: _Script, key: str, *values: str) -> Any:
        rest = (1, self._name(key), *(value.encode() for value in values))
        try:
            return self._ask("EVALSHA", script.sha1, *rest)
        except NoScriptError:  # a server that has just been started, or that was told to forget
            return self._ask("EVAL", script.text, *rest)

    def _ask(self, *command: Any) -> Any:
        return _RETRY.ask(partial(self._client.execute_command, *command, **_RAW))[0]


class AsyncRedisBlobStore:
    """As `RedisBlobStore`, over a client of `redis.asyncio`, for `joblock.aio`."""

    def __init__(self, client: Any, *, prefix: str = "") -> None:
        self._client = client
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"AsyncRedisBlobStore(prefix={self._prefix!r})"

    async def get(self, key: str) -> bytes | None:
        """As `RedisBlobStore.get`."""
        return _value(await self._ask("GET", self._name(key)))

    async def set(self, key: str, value: str) -> None:
        """As `RedisBlobStore.set`."""
        await self._ask("SET", self._name(key), value.encode())

    async def delete(self, key: str) -> None:
        """As `RedisBlobStore.delete`."""
        await self._ask("DEL", self._name(key))

    async def get_with_etag(self, key: str) -> Blob | None:
        """As `RedisBlobStore.get_with_etag`."""
        return _blob(await self._ask("GET", self._name(key)))

    async def set_if_new(self, key: str, value: str) -> str | None:
        """As `RedisBlobStore.set_if_new`."""
        return etag_alone(await self.set_if_new_or_get(key, value))

    async def set_if_new_or_get(self, key: str, value: str) -> str | Blob:
        """As `RedisBlobStore.set_if_new_or_get`."""
        return _created(await self._run(_SET_IF_NEW, key, value), value)

    async def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """As `RedisBlobStore.set_if_match`."""
        return _written(await self._run(_SET_IF_MATCH, key, value, etag), value)

    async def delete_if_match(self, key: str, etag: str) -> bool:
        """As `RedisBlobStore.delete_if_match`."""
        return bool(await self._run(_DELETE_IF_MATCH, key, etag, _mark()))

    async def list_keys(self, prefix: str) -> AsyncIterator[str]:
        """As `RedisBlobStore.list_keys`."""
        keys = self._client.scan_iter(match=_pattern(self._prefix + prefix), count=1000)
        async for key in keys:
            yield _text(key).removeprefix(self._prefix)

    async def server_time_ms(self, key: str) -> tuple[float, float]:
        """As `RedisBlobStore.server_time_ms`."""
        return _time(await self._run(_TIME, key))

    async def cautions(self) -> list[str]:
        """As `RedisBlobStore.cautions`."""
        return _cautions(await self._client.config_get("maxmemory-policy"))

    def _name(self, key: str) -> bytes:
        return (self._prefix + key).encode()

    async def _run(self, script: _Script, key: str, *values: str) -> Any:
        rest = (1, self._name(key), *(value.encode() for value in values))
        try:
            return await self._ask("EVALSHA", script.sha1, *rest)
        except NoScriptError:
            return await self._ask("EVAL", script.text, *rest)

    async def _ask(self, *command: Any) -> Any:
        send = partial(self._client.execute_command, *command, **_RAW)
        return await _RETRY.ask_async(send, asyncio.sleep)


def connect(url: str) -> RedisBlobStore:
    """Return the store of the server at this `redis://` or `rediss://` URL."""
    return RedisBlobStore(_client(Redis, url, SyncRetry))


def connect_async(url: str) -> AsyncRedisBlobStore:
    """As `connect`, for `joblock.aio`."""
    return AsyncRedisBlobStore(_client(AsyncRedis, url, AsyncRetry))


def _client(client_type: Any, url: str, retry_type: Any) -> Any:
    return client_type.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=READ_TIMEOUT_S,
        retry=retry_type(ExponentialBackoff(cap=1, base=0.1), 1),
    )


def _mark() -> str:
    return _REMOVED.decode() + os.urandom(16).hex()


def _value(answer: bytes | None) -> bytes | None:
    return None if answer is None or answer.startswith(_REMOVED) else answer


def _blob(answer: bytes | None) -> Blob | None:
    value = _value(answer)
    return None if value is None else Blob(value, _etag(value))


def _created(answer: int | bytes, value: str) -> str | Blob:
    return Blob(answer, _etag(answer)) if isinstance(answer, bytes) else _etag(value.encode())


def _written(answer: int, value: str) -> str | None:
    return _etag(value.encode()) if answer else None


def _etag(value: bytes) -> str:
    return hashlib.sha1(value, usedforsecurity=False).hexdigest()


def _time(answer: list[bytes]) -> tuple[float, float]:
    seconds, microseconds = map(int, answer)
    time_ms = seconds * 1000 + microseconds / 1000
    return time_ms, time_ms


def _cautions(config: dict[Any, Any]) -> list[str]:
    policies = {_text(policy) for policy in config.values()}
    return [
        f"maxmemory-policy is {policy}: Redis removes a live lock when its memory is full; use "
        "noeviction or volatile-..."
        for policy in policies
        if policy.startswith("allkeys-")
    ]


def _pattern(prefix: str) -> str:
    return "".join("\\" + c if c in "*?[]\\^-" else c for c in prefix) + "*"


def _text(key: str | bytes) -> str:
    return key if isinstance(key, str) else key.decode("utf-8", "replace")


# A server that loads its data, and a replica that has just become the primary, will answer soon.
_RETRY = Retry(
    lambda error: isinstance(error, (NoConnectionError, NoAnswerError, BusyLoadingError)),
    pauses_s=(0.1,),
)
