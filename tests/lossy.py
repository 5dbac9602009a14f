"""A proxy that loses what the test tells it to: requests, replies, or its patience.

It passes on the very bytes that it was sent, the Host header among them, and records each request.
"""

from __future__ import annotations

import re
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import BinaryIO
from urllib.parse import urlsplit

from tests.serving import serving

TIMEOUT_S = 60
_LENGTH = re.compile(rb"(?i)(content-length|transfer-encoding):").match


@dataclass
class Request:
    """What a client asked; `status` is what the server, or `Proxy.answer`, said, if it did."""

    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case
    body: bytes
    port: int  # the client's, so that its connections can be told apart
    status: int | None = None


When = str | Callable[[Request], bool]
"""A rule's requests: those of a method, such as "PUT", or those of which a function says so."""


def any_request(_: Request) -> bool:
    return True


Forward = Callable[[], bytes | None]
Act = Callable[[Request, Forward], bytes | None]
"""What is sent back; None closes the connection instead. `Forward` asks the server."""


@dataclass
class Rule:
    when: When
    act: Act
    times: int

    def takes(self, request: Request) -> bool:
        if isinstance(self.when, str):
            return request.method == self.when
        return self.when(request)


class _Cut(bytes):
    """A part of a reply, after which the connection ends."""


class Proxy:
    """Each rule is for the next request that it is about, or for the next `times` of them.

    Of several rules for one request the oldest is followed. Requests without a rule go through.
    """

    def __init__(self, upstream: str, *, rewrite: bool, keep_alive: bool) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.last_cut = 0
        self._upstream, self._rewrite, self._keep_alive = upstream, rewrite, keep_alive
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._hung: list[threading.Event] = []

    def forget(self) -> None:
        """Drop the rules that are left."""
        self._rules.clear()

    def swallow(self, when: When = any_request, *, times: int = 1) -> None:
        """Let the server do it, then close the connection without a reply."""

        def act(_: Request, forward: Forward) -> None:
            forward()

        self._rules.append(Rule(when, act, times))

    def cut(self, at: int, when: When = any_request, *, times: int = 1) -> None:
        """Let the server do it, send so many bytes of its reply, and close the connection.

        `last_cut` is the length of the whole reply then.
        """

        def act(_: Request, forward: Forward) -> bytes | None:
            reply = forward()
            assert reply is not None
            self.last_cut = len(reply)
            return _Cut(reply[:at])

        self._rules.append(Rule(when, act, times))

    def drop(self, when: When = any_request, *, times: int = 1) -> None:
        """Close the connection; the server hears nothing of it."""

        def act(_request: Request, _forward: Forward) -> None:
            return None

        self._rules.append(Rule(when, act, times))

    def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        when: When = any_request,
        times: int = 1,
    ) -> None:
        """Answer in the server's place, which hears nothing of it."""
        head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in (headers or {}).items()]
        reply = "\r\n".join([*head, "\r\n"]).encode() + body

        def act(request: Request, _: Forward) -> bytes:
            request.status = status
            return reply

        self._rules.append(Rule(when, act, times))

    def hang(
        self, when: When = any_request, *, forward: bool = True, times: int = 1
    ) -> threading.Event:
        """Give no answer until the event that this returns is set, then close the connection.

        The server does what it is asked first, unless `forward` is false: then it hears nothing.
        """
        release = threading.Event()
        self._hung.append(release)

        def act(_: Request, ask: Forward) -> None:
            if forward:
                ask()
            release.wait()

        self._rules.append(Rule(when, act, times))
        return release

    def before(self, do: Callable[[], object], when: When = any_request, *, times: int = 1) -> None:
        """Do something when the request has come and the server has not seen it yet."""

        def act(_: Request, forward: Forward) -> bytes | None:
            do()
            return forward()

        self._rules.append(Rule(when, act, times))

    def after(self, do: Callable[[], object], when: When = any_request, *, times: int = 1) -> None:
        """Do something when the server has done it and the client does not know it yet."""

        def act(_: Request, forward: Forward) -> bytes | None:
            reply = forward()
            do()
            return reply

        self._rules.append(Rule(when, act, times))

    def serve(self, client: socket.socket) -> None:
        with self._lock:
            self._connections.add(client)
        try:
            with client.makefile("rb") as stream:
                while (message := _read_request(stream, client)) is not None:
                    reply = self._reply(*message)
                    if reply is None:
                        return
                    client.sendall(reply)
                    if isinstance(reply, _Cut) or _closes(reply):
                        return
        except ConnectionError:
            pass  # the client has gone
        finally:
            with self._lock:
                self._connections.discard(client)

    def stop(self) -> None:
        for release in self._hung:
            release.set()
        with self._lock:
            for client in self._connections:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def _reply(self, request: Request, raw: bytes) -> bytes | None:
        def forward() -> bytes | None:
            reply = _ask(self._upstream, request.method, raw)
            request.status = int(reply.split(None, 2)[1])
            if self._keep_alive:
                reply = _kept_alive(reply)
            return self._with_own_url(reply) if self._rewrite else reply

        act = self._act_for(request)
        return forward() if act is None else act(request, forward)

    def _act_for(self, request: Request) -> Act | None:
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.times and rule.takes(request):
                    rule.times -= 1
                    return rule.act
        return None

    def _with_own_url(self, reply: bytes) -> bytes:
        head, _, body = reply.partition(b"\r\n\r\n")
        if _headers(head).get("transfer-encoding", "").lower() == "chunked":
            body = _without_chunks(body)
        theirs, ours = self._upstream.encode(), self.url.encode()
        if theirs not in head + body:
            return reply
        lines = [line.replace(theirs, ours) for line in head.split(b"\r\n") if not _LENGTH(line)]
        body = body.replace(theirs, ours)
        return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


@contextmanager
def lossy(
    upstream: str,
    *,
    rewrite: bool = False,
    keep_alive: bool = False,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> Generator[Proxy]:
    """A proxy in front of the server at the URL `upstream`; `proxy.url` takes its place.

    With `rewrite` the URL `upstream` in replies becomes the proxy's own, for a server that tells
    its clients where to go next. With `keep_alive` connections stay open, whatever it says. With
    `tls` its clients speak TLS, and a connection ends without TLS's own notice of its end.
    """
    proxy = Proxy(upstream, rewrite=rewrite, keep_alive=keep_alive)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # a client that goes away during TLS's greeting
                client = self.request
                if tls is not None:
                    client = tls.wrap_socket(client, server_side=True)
                with client:
                    proxy.serve(client)

    class Server(socketserver.ThreadingTCPServer):
        request_queue_size = 64

    with Server(("127.0.0.1", port), Handler) as server:
        scheme = "http" if tls is None else "https"
        proxy.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        try:
            with serving(server):
                yield proxy
        finally:
            proxy.stop()


def _ask(upstream: str, method: str, raw: bytes) -> bytes:
    url = urlsplit(upstream)
    assert url.hostname is not None
    with socket.create_connection((url.hostname, url.port or 80), TIMEOUT_S) as server:
        server.sendall(raw)
        with server.makefile("rb") as stream:
            while True:
                head = _read_head(stream)
                assert head, "the server closed the connection without a reply"
                status = int(head.split(None, 2)[1])
                if status >= 200:  # 100 Continue is not the reply
                    break
            if method == "HEAD" or status in (204, 304):
                return head
            body = _read_body(stream, head)
            return head + (stream.read() if body is None else body)


def _read_request(stream: BinaryIO, client: socket.socket) -> tuple[Request, bytes] | None:
    head = _read_head(stream)
    if not head:
        return None
    method, path, _ = head.decode("latin-1").split(" ", 2)
    headers = _headers(head)
    if headers.get("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = _read_body(stream, head) or b""
    return Request(method, path, headers, body, client.getpeername()[1]), head + body


def _read_head(stream: BinaryIO) -> bytes:
    head = b""
    while (line := stream.readline()) not in (b"\r\n", b""):
        head += line
    return head + line


def _read_body(stream: BinaryIO, head: bytes) -> bytes | None:
    """The body as it is on the wire, chunks and all; None if the head does not tell its length."""
    headers = _headers(head)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while True:
            line = stream.readline()
            size = int(line.split(b";")[0], 16)
            if size == 0:
                return body + line + _read_head(stream)  # with the trailers, if any
            body += line + stream.read(size + 2)
    if "content-length" in headers:
        return stream.read(int(headers["content-length"]))
    return None


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").rstrip().split("\r\n")[1:]
    fields = (line.partition(":") for line in lines)
    return {name.lower(): value.strip() for name, _, value in fields}


def _kept_alive(reply: bytes) -> bytes:
    head, _, body = reply.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    lines = [line for line in lines if not line.lower().startswith(b"connection:")]
    if not any(map(_LENGTH, lines)):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([first.replace(b"HTTP/1.0", b"HTTP/1.1"), *lines, b"", body])


def _without_chunks(body: bytes) -> bytes:
    data = b""
    while True:
        line, _, rest = body.partition(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if size == 0:
            return data
        data, body = data + rest[:size], rest[size + 2 :]


def _closes(reply: bytes) -> bool:
    """Whether the server has said that this is the last reply on its connection."""
    headers = _headers(reply.partition(b"\r\n\r\n")[0])
    connection = headers.get("connection", "").lower()
    return connection == "close" or (reply.startswith(b"HTTP/1.0") and connection != "keep-alive")
