"""S3 by moto, as a process, one request at a time: moto checks, then writes, without a lock."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from importlib import import_module
from typing import Any

moto: Any = import_module("moto.moto_server.werkzeug_app")
serving: Any = import_module("werkzeug.serving")

app = moto.DomainDispatcherApplication(moto.create_backend_app)
turn = threading.Lock()


def one_at_a_time(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    with turn:
        return list(app(environ, start_response))


server = serving.make_server(
    "127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=moto.MotoRequestHandler
)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(f"http://127.0.0.1:{server.server_port}", flush=True)
sys.stdin.read()  # until the test that started it ends
