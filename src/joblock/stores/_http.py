"""HTTP over connections that are kept open, from the standard library."""

from __future__ import annotations

import http.client
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from email.message import Message
from urllib.parse import urlsplit

from .._value import Value, assign

# Node closes a connection that was idle for 5 seconds.
_IDLE_S = 4.0


class Answer(Value):
    """What came back, whatever the status."""

    __slots__ = __match_args__ = ("status", "headers", "body")

    status: int
    headers: Message
    body: bytes

    def __init__(self, status: int, headers: Message, body: bytes) -> None:
        assign(self, "status", status)
        assign(self, "headers", headers)
        assign(self, "body", body)


_Idle = list[tuple[http.client.HTTPConnection, float]]


def _pop(idle: _Idle) -> tuple[http.client.HTTPConnection, float] | None:
    try:
        return idle.pop()
    except IndexError:  # another thread may have been quicker than any look at its length
        return None


class Connections:
    """One connection for each request that is under way. Safe from any thread, and after fork."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._pid = os.getpid()
        self._idle: defaultdict[str, _Idle] = defaultdict(list)

    def close(self) -> None:
        """Close those that are idle."""
        for idle in list(self._idle.values()):
            while (taken := _pop(idle)) is not None:
                taken[0].close()

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Answer:
        """Return the answer. Raises `OSError` or `http.client.HTTPException` if there is none."""
        scheme, host, path, query, _ = urlsplit(url)
        origin = f"{scheme}://{host}"
        connection = self._idle_connection(origin) or self._new_connection(scheme, host)
        response: http.client.HTTPResponse | None = None
        try:
            connection.request(method, f"{path}?{query}" if query else path, body, dict(headers))
            response = connection.getresponse()
            if response.status < 200:  # the real answer is still to come
                raise http.client.HTTPException(f"status {response.status}")
            if response.length is None and not response.chunked:
                raise http.client.HTTPException("no length: whether it was cut is unknown")
            answer = Answer(response.status, response.headers, response.read())
        except BaseException:
            connection.close()
            if response is not None:
                response.close()  # it has the socket, too
            self.close()  # the server may have closed the others too
            raise
        self._idle[origin].append((connection, time.monotonic()))
        return answer

    def _idle_connection(self, origin: str) -> http.client.HTTPConnection | None:
        if self._pid != os.getpid():  # a child must not write into its parent's connections
            self.close()
            self._pid = os.getpid()
        idle = self._idle[origin]
        while (taken := _pop(idle)) is not None:
            connection, since = taken
            if time.monotonic() - since < _IDLE_S:
                return connection
            connection.close()
        return None

    def _new_connection(self, scheme: str, host: str) -> http.client.HTTPConnection:
        https = scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        return kind(host, timeout=self._timeout)
