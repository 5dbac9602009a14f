"""One SQLite file: for the threads and processes of one host.

Each verb is one autocommitted statement, so SQLite itself checks the condition atomically with
the write. WAL with `synchronous=NORMAL`: a killed process loses nothing; a power cut may lose the
last writes, but it also ends the jobs of that host. Not for network file systems, where SQLite's
locking is not reliable.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .._store import Blob
from ._etag import new_etag

__all__ = ["SqliteBlobStore"]

_CREATE = """
CREATE TABLE IF NOT EXISTS joblock (
    key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL, etag TEXT NOT NULL
) WITHOUT ROWID
"""


class SqliteBlobStore:
    """A conditional store in the SQLite file at `path`, which is created if it is not there.

    Safe from any thread, and in a child after fork. A call waits up to `timeout` seconds for the
    other threads of this process, and as long again while another process writes. What SQLite
    reports is raised as a `sqlite3.Error` whose text begins with the path; a file that cannot be
    opened or written, or is no database, is found out here, at once.

    Who may not write the file cannot read it either: SQLite would leave files beside it that the
    others cannot write. A store that was made before a fork works in each child. One that was used
    before a fork that Python is not told of, as uWSGI's, raises `sqlite3.ProgrammingError` there.

    Close it with `close()` or `with`. Do not delete or replace the file while any process has it
    open: that process would go on with the old one. To free a lock, release it. Give it a file of
    its own if your process forks: SQLite forgets its locks in a child if a connection of your own
    to the same file is open across the fork.
    """

    _connection: sqlite3.Connection | None = None
    _connected_by = 0  # the process

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 5.0) -> None:
        if os.fspath(path) in ("", ":memory:"):
            raise ValueError("path must name a file; for memory, use MemoryBlobStore")
        if not 0 <= timeout <= 1_000_000:
            raise ValueError(f"timeout must be 0 to 1,000,000 seconds, not {timeout!r}")
        self._path = Path(path).absolute()
        self._timeout = timeout
        self._closed = False
        self._locks: dict[int, threading.RLock] = {}
        with _own(_registry):
            _open_stores.add(self)
        self._execute("SELECT 1")
        with _own(self._locks):  # a process that only makes the store may be forked in any way
            self._disconnect()

    def __repr__(self) -> str:
        return f"SqliteBlobStore({str(self._path)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return partial(SqliteBlobStore, timeout=self._timeout), (self._path,)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._disconnect()

    def close(self) -> None:
        """Close the connection. Every later call raises `sqlite3.ProgrammingError`."""
        with _own(self._locks):
            self._closed = True
            self._disconnect()

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        _, rows = self._execute("SELECT value FROM joblock WHERE key = ?", key)
        return _decode(rows[0][0]) if rows else None

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._execute("REPLACE INTO joblock VALUES (?, ?, ?)", key, value, new_etag())

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        self._execute("DELETE FROM joblock WHERE key = ?", key)

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        _, rows = self._execute("SELECT value, etag FROM joblock WHERE key = ?", key)
        return Blob(*map(_decode, rows[0])) if rows else None

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        etag = new_etag()
        written, _ = self._execute(
            "INSERT OR IGNORE INTO joblock VALUES (?, ?, ?)", key, value, etag
        )
        return etag if written else None

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        new = new_etag()
        written, _ = self._execute(
            "UPDATE joblock SET value = ?, etag = ? WHERE key = ? AND etag = ?",
            value,
            new,
            key,
            etag,
        )
        return new if written else None

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        deleted, _ = self._execute("DELETE FROM joblock WHERE key = ? AND etag = ?", key, etag)
        return deleted == 1

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in the order of their bytes, from one read per thousand."""
        after = ""
        while True:
            # No pattern: LIKE takes `_` for any character, and `a` for `A`.
            _, rows = self._execute(
                "SELECT key FROM joblock WHERE key >= ? AND key < ? AND key > ? "
                "ORDER BY key LIMIT 1000",
                prefix,
                f"{prefix}\U0010ffff",
                after,
            )
            keys: list[str] = [_decode(row[0]) for row in rows]
            yield from keys
            if not keys:
                return
            after = keys[-1]

    def _execute(self, statement: str, *values: str) -> tuple[int, list[Any]]:
        lock = _own(self._locks)
        try:
            try:  # around the acquire too: a signal handler may raise as soon as it has returned
                if not lock.acquire(timeout=self._timeout):
                    raise sqlite3.OperationalError("database is locked by another thread's call")
                if self._connection is None:
                    self._connection = self._connect()
                elif self._connected_by != os.getpid():
                    raise sqlite3.ProgrammingError(_FORKED)
                # Read to its end, and closed whatever comes: whoever keeps an exception would
                # keep the statement open, and with it an old state of the file.
                cursor = self._connection.cursor()
                try:
                    cursor.execute(statement, values)
                    # A write has nothing to fetch, and a signal handler that forks may have
                    # closed the connection by now.
                    rows = cursor.fetchall() if cursor.description else []
                    return cursor.rowcount, rows
                finally:
                    cursor.close()
            finally:
                try:  # noqa: SIM105 - a signal handler may raise in a call of `suppress`, too
                    lock.release()
                except RuntimeError:  # this thread does not have it: acquiring it failed
                    pass
        except sqlite3.Error as error:
            error.args = (f"{self._path}: {error}",)
            raise

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise sqlite3.ProgrammingError("the store is closed")
        if not os.path.isdir(self._path.parent):  # noqa: PTH112 - it never raises
            raise sqlite3.OperationalError("unable to open database file: no such folder")
        # SQLite would leave files of this user's beside it, which the file's owner cannot write.
        if os.access(self._path, os.F_OK) and not os.access(
            self._path, os.W_OK, effective_ids=_EFFECTIVE
        ):
            raise sqlite3.OperationalError("readonly: this user may not write the file")
        deadline = time.monotonic() + self._timeout
        self._connected_by = os.getpid()
        while True:
            connection = sqlite3.connect(
                self._path, timeout=self._timeout, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(connection)
            except BaseException as error:
                connection.close()
                # SQLite does not wait its timeout when processes switch a new file to WAL at once.
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return connection

    def _disconnect(self) -> None:
        if self._connection is None:
            return
        if self._connected_by == os.getpid():
            self._connection.close()
        else:
            _parents.append(self._connection)
        self._connection = None


def _prepare(connection: sqlite3.Connection) -> None:
    connection.text_factory = bytes  # no code of ours runs while a statement is open
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(_CREATE)
    columns = connection.execute("SELECT name, pk FROM pragma_table_info('joblock')").fetchall()
    if columns != [(b"key", 1), (b"value", 0), (b"etag", 0)]:
        raise sqlite3.DatabaseError("its table joblock is not of joblock's making")
    connection.execute("BEGIN IMMEDIATE")  # a read-only file is found out now, not at a lock
    connection.execute("ROLLBACK")


def _is_busy(error: BaseException) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _decode(value: Any) -> Any:
    # A value that others wrote must not be an error.
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


_FORKED = (
    "this process was forked, in a way that Python was not told of, after its parent had used the "
    "store: make it, or use it first, after the fork (uWSGI: --lazy-apps)"
)
_EFFECTIVE = os.access in os.supports_effective_ids


def _own(locks: dict[int, threading.RLock]) -> threading.RLock:
    """This process's lock: a fork may have copied its parent's while another thread had it."""
    pid = os.getpid()
    return locks.get(pid) or locks.setdefault(pid, threading.RLock())


# SQLite forbids to use, and even to close, in a child a connection that was opened in its parent.
# So there is none while a process forks: each store's is closed, and opened again when needed.
# Where C code forks, as uWSGI's, nobody calls these, or only the last: then there is nothing to
# release, and a connection that was open is neither used nor closed.
_registry: dict[int, threading.RLock] = {}
_parents: list[sqlite3.Connection] = []  # kept for ever, since even to collect one would close it
_open_stores: weakref.WeakSet[SqliteBlobStore] = weakref.WeakSet()
_locked: list[threading.RLock] = []


def _before_fork() -> None:
    _lock_for_fork(_registry)
    for store in _open_stores:
        _lock_for_fork(store._locks)
        store._disconnect()


def _lock_for_fork(locks: dict[int, threading.RLock]) -> None:
    lock = _own(locks)
    lock.acquire()
    _locked.append(lock)


def _after_fork() -> None:
    while _locked:
        _locked.pop().release()


with contextlib.suppress(AttributeError):  # Windows has no fork
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )
