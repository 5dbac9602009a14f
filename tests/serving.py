"""A server of Python's own in a thread, for as long as a `with` lasts."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def serving(server: socketserver.BaseServer) -> Generator[None]:
    """Take requests meanwhile; closing the server is its owner's."""
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
