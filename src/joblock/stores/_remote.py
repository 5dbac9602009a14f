"""What the stores of a remote service share: what to do when the service gives no answer.

They ask again. A request whose answer was lost may have taken effect, and a conditional write that
did is refused when it is sent again: because of itself. So a refusal counts only if every request
was answered; otherwise the key is read, and tells.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from .._store import Blob

T = TypeVar("T")

# For the clients that take them with each request: their own defaults are a minute and more.
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 10.0


def is_etag(etag: str) -> bool:
    """Whether `etag` can name one version.

    As a header, a blank one is no condition and `*` is any version. One whose quotes are not a
    pair was cut.
    """
    return (
        etag.isascii()
        and etag.isprintable()
        and etag.strip() not in ("", "*")
        and etag.count('"') in (0, 2)
    )


def bounded(key: str, longest: int) -> str:
    """Return the key; raise ValueError if it has more bytes than the service keeps."""
    if len(key.encode()) > longest:
        raise ValueError(f"a key must be at most {longest} bytes, not {len(key.encode())}")
    return key


def missing(
    module: str, error: ModuleNotFoundError, extra: str, *, driver: bool = False
) -> ImportError:
    """Return what to raise where a store's SDK, or a driver, is missing: what installs it."""
    more = f" {error.name}" if driver else ""
    return ImportError(
        f"{module} needs a package, {error.name} is missing: "
        f'python -m pip install "joblock[{extra}]"{more}'
    )


class CutReplyError(Exception):
    """A reply that may be cut: the connection ended before it was known to be whole.

    Python takes the end of a connection for the end of the headers. What comes after it is then
    missing, and a body without a length is empty: a live lock would be taken for no lock.
    """


def whole(etag: object) -> str:
    """Return the etag that a reply must have; raise `CutReplyError` if it has none."""
    if isinstance(etag, str) and is_etag(etag):
        return etag
    raise CutReplyError(f"the reply has no whole etag, but {etag!r}")


def dated(date: object) -> tuple[float, float] | None:
    """Return the first and the last millisecond of what a reply's `Date` says, if it has one."""
    from email.utils import parsedate_to_datetime  # slow, and only `doctor` asks

    if not isinstance(date, str):
        return None
    second_ms = parsedate_to_datetime(date).timestamp() * 1000
    return second_ms, second_ms + 999


def etag_alone(answer: str | Blob | None) -> str | None:
    """Make `set_if_new`'s answer of that of `set_if_new_or_get`."""
    return answer if isinstance(answer, str) else None


class DoubtfulRefusal(Exception):  # noqa: N818 - it is caught here, always
    """The client repeated a request by itself, and then it was refused."""


class Retry:
    """Which errors are no answer, and how long to wait before each further request."""

    def __init__(
        self,
        unanswered: Callable[[Exception], bool],
        pauses_s: tuple[float, ...] = (0.1, 1.5),  # Google allows a key about one write a second
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.unanswered = unanswered
        self.pauses_s = pauses_s
        self._sleep = sleep

    def ask(self, send: Callable[[], T]) -> tuple[T | None, bool]:
        """Return what `send` returns, and whether an earlier request was not answered."""
        pauses = iter(self.pauses_s)
        again = False
        while True:
            try:
                return send(), again
            except DoubtfulRefusal:
                return None, True
            except Exception as error:
                pause_s = self._pause_s(error, pauses)
            self._sleep(pause_s)
            again = True

    async def ask_async(
        self, send: Callable[[], Awaitable[T]], sleep: Callable[[float], Awaitable[object]]
    ) -> T:
        """Return what `send` returns, of a request that is safe to repeat."""
        pauses = iter(self.pauses_s)
        while True:
            try:
                return await send()
            except Exception as error:
                pause_s = self._pause_s(error, pauses)
            await sleep(pause_s)

    def pages(self, send: Callable[[T | None], tuple[list[str], T | None]]) -> Iterator[str]:
        """Yield what the pages have; `send` gets a page's token and returns the next one's, too."""
        token: T | None = None
        while True:
            answer, _ = self.ask(partial(send, token))
            keys, token = answer or ([], None)
            yield from keys
            if not token:
                return

    def _pause_s(self, error: Exception, pauses: Iterator[float]) -> float:
        """How long to wait before the next request; raise the error if there is to be none."""
        pause_s = next(pauses, None)
        if pause_s is None or not self.unanswered(error):
            raise error
        return pause_s * random.uniform(0.5, 1)  # noqa: S311 - clients must not go in step

    def write(
        self, send: Callable[[], T | None], read: Callable[[], Blob | None], value: str
    ) -> T | str | None:
        """Return what `send` does, the etag of what it wrote, or None if it was refused."""
        answer, again = self.ask(send)
        if answer is None and again:
            blob = read()
            if blob is not None and blob.value == value.encode():
                return blob.etag
        return answer

    def delete(self, send: Callable[[], bool], read: Callable[[], Blob | None]) -> bool:
        """Return whether `send` removed the key: one that is gone by now, it did."""
        removed, again = self.ask(send)
        return removed is True or (again and read() is None)


class Pool:
    """A client's idle connections, which a forked child must not share with its parent.

    They would write into them both, and read each other's answers. `keeper` returns what has a
    `close()` that closes them and is usable afterwards, if anything has. Closing the child's copy
    of a socket tells the server nothing, so the parent's connections stay as they are.
    """

    def __init__(self, keeper: Callable[[], Any]) -> None:
        self._keeper = keeper
        self._pid = os.getpid()
        self._locks: dict[int, threading.Lock] = {}

    def check(self) -> None:
        """Close them if this is a child that has not yet; call it before each request."""
        pid = os.getpid()
        if self._pid == pid:
            return
        # A lock for each process: at the fork, a thread that is not in the child may have had it.
        with self._locks.setdefault(pid, threading.Lock()):
            if self._pid != pid:
                close = getattr(self._keeper(), "close", None)
                if close is not None:
                    close()
                self._pid = pid
