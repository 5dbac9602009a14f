"""What people use today, each with one call that takes and frees a lock and one that is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.servers import redis_server

from .turns import Case

TTL_S = 960


class Peer(NamedTuple):
    cycle: Case
    refused: Case | None = None
    """None: it has no way to ask without waiting."""
    holder: Any = None
    """Some free their lock when they are collected."""


class Missing(NamedTuple):
    why: str


def open_peers(folder: Path, stack: ExitStack) -> dict[str, Peer | Missing]:
    """Every peer under its name, or why it is not there; `stack` closes what it needs."""

    @cache
    def redis_url() -> str:
        return stack.enter_context(redis_server("--appendonly", "no")).url

    def redis_client() -> Any:
        redis: Any = import_module("redis")
        return stack.enter_context(redis.Redis.from_url(redis_url()))

    makers: dict[str, Callable[[], Peer]] = {
        "filelock FileLock": lambda: _filelock("FileLock", folder),
        "filelock SoftFileLock": lambda: _filelock("SoftFileLock", folder),
        "diskcache Lock": lambda: _diskcache(folder, stack),
        "sherlock FileLock": lambda: _sherlock(folder),
        "redis-py Lock": lambda: _redis(redis_client()),
        "python-redis-lock": lambda: _python_redis_lock(redis_client()),
    }
    return {name: _open(make) for name, make in makers.items()}


def _open(make: Callable[[], Peer]) -> Peer | Missing:
    try:
        return make()
    except ModuleNotFoundError as error:
        return Missing(f"not installed: {error.name}")
    except pytest.skip.Exception as error:
        return Missing(f"not installed: {error}")
    except ValueError as error:  # sherlock's, of Python 3.13's datetime
        return Missing(f"fails here: {error}")


def _filelock(kind: str, folder: Path) -> Peer:
    filelock: Any = import_module("filelock")
    make = getattr(filelock, kind)
    free, theirs, mine = (make(folder / f"{kind}.{which}") for which in ("free", "held", "held"))
    theirs.acquire()

    def refused() -> bool:
        try:
            mine.acquire(blocking=False)
        except filelock.Timeout:
            return False
        return True

    return Peer(_acquire_release(free), refused, theirs)


def _diskcache(folder: Path, stack: ExitStack) -> Peer:
    diskcache: Any = import_module("diskcache")
    cache = stack.enter_context(diskcache.Cache(str(folder / "diskcache")))
    return Peer(_acquire_release(diskcache.Lock(cache, "free", expire=TTL_S)))


def _sherlock(folder: Path) -> Peer:
    sherlock: Any = import_module("sherlock")

    def make(name: str) -> Any:
        return sherlock.FileLock(name, client=folder / "sherlock", expire=TTL_S)

    theirs, mine = make("held"), make("held")
    theirs.acquire()
    return Peer(_acquire_release(make("free")), lambda: mine.acquire(blocking=False), theirs)


def _redis(client: Any) -> Peer:
    theirs, mine = client.lock("held", timeout=TTL_S), client.lock("held", timeout=TTL_S)
    theirs.acquire()
    free = client.lock("free", timeout=TTL_S)
    return Peer(_acquire_release(free), lambda: mine.acquire(blocking=False), theirs)


def _python_redis_lock(client: Any) -> Peer:
    redis_lock: Any = import_module("redis_lock")
    logging.getLogger("redis_lock").addHandler(logging.NullHandler())  # it warns of a refusal
    theirs = redis_lock.Lock(client, "held too", expire=TTL_S)
    mine = redis_lock.Lock(client, "held too", expire=TTL_S)
    theirs.acquire()
    free = redis_lock.Lock(client, "free too", expire=TTL_S)
    return Peer(_acquire_release(free), lambda: mine.acquire(blocking=False), theirs)


def _acquire_release(lock: Any) -> Case:
    def cycle() -> None:
        lock.acquire()
        lock.release()

    return cycle
