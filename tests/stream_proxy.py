"""A proxy for a database's protocol, which it does not know: it cuts replies, or loses them whole.

What a client sends in one piece is a request, and what the server sends next is its reply. That is
true of clients that send a request and wait for its reply.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

from tests.serving import serving

When = Callable[[bytes], bool]


def any_request(_: bytes) -> bool:
    return True


class StreamProxy:
    """Cuts the replies to the requests that a test names; the others go through."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.port = 0
        self.requests: list[bytes] = []
        self.last_cut = 0
        self._upstream = upstream
        self._rules: list[tuple[int, When]] = []  # each for one reply
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def cut(self, at: int, when: When = any_request, *, times: int = 1) -> None:
        """Let the server do it, send so many bytes of its reply, and close the connection.

        `last_cut` is the length of the whole reply then.
        """
        self._rules += [(at, when)] * times

    def forget(self) -> None:
        """Drop the rules that are left."""
        self._rules.clear()

    def stop(self) -> None:
        """Close every connection."""
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def serve(self, client: socket.socket) -> None:
        """Pass on what comes from both sides, until one ends."""
        cuts: list[int] = []
        with socket.create_connection(self._upstream) as server:
            with self._lock:
                self._open |= {client, server}
            answers = threading.Thread(target=self._answers, args=(server, client, cuts))
            answers.start()
            with suppress(OSError):
                while chunk := client.recv(1 << 16):
                    with self._lock:
                        self.requests.append(chunk)
                        rule = next((rule for rule in self._rules if rule[1](chunk)), None)
                        if rule is not None:
                            self._rules.remove(rule)
                            cuts.append(rule[0])
                    server.sendall(chunk)
            _end(server)
            answers.join()
            with self._lock:
                self._open -= {client, server}

    def _answers(self, server: socket.socket, client: socket.socket, cuts: list[int]) -> None:
        with suppress(OSError):
            while chunk := server.recv(1 << 16):
                if cuts:
                    self.last_cut = len(chunk)
                    client.sendall(chunk[: cuts.pop(0)])
                    break
                client.sendall(chunk)
        _end(client)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def stream_proxy(host: str, port: int) -> Generator[StreamProxy]:
    """Run the proxy on a free loopback port."""
    proxy = StreamProxy((host, port))

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            proxy.serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = False
        block_on_close = True

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.port = server.server_address[1]
        try:
            with serving(server):
                yield proxy
        finally:
            proxy.stop()
