"""A real uWSGI, which forks in C: one winner of simultaneous clicks, and no error in any worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

UWSGI = Path(sys.executable).with_name("uwsgi")
APP = """
import os, joblock
from joblock.stores.sqlite import SqliteBlobStore

store = SqliteBlobStore(os.environ["JOBS"])
if os.environ.get("USED"):
    store.get("k")

def application(environ, start_response):
    try:
        won = joblock.acquire_job_lock(store, "u", environ["PATH_INFO"].strip("/"))
    except Exception as error:
        print("Error:", error, flush=True)
        start_response("500 Internal Server Error", [])
        return []
    start_response("202 Accepted" if won else "409 Conflict", [])
    return [str(os.getpid()).encode()]
"""


@pytest.fixture(
    params=[
        "--master",
        "",
        "--master --lazy-apps",
        "--lazy-apps",
        "--master --enable-threads --py-call-osafterfork",
    ]
)
def options(request: pytest.FixtureRequest) -> list[str]:
    if not UWSGI.exists():
        pytest.skip("uwsgi is not installed")
    chosen: str = request.param
    if "osafterfork" in chosen and sys.version_info >= (3, 13):
        pytest.skip("on Python 3.13 its workers die in the fork, also without joblock")
    return chosen.split()


class Served:
    """A server with four workers, at `url`."""

    def __init__(self, folder: Path, options: list[str], **environment: str) -> None:
        app, self.log = folder / "app.py", folder / "log"
        app.write_text(APP)
        command = [str(UWSGI), "--http-socket", "127.0.0.1:0", "--wsgi-file", str(app)]
        command += ["--processes", "4", "--need-app", "--die-on-term", "--disable-logging"]
        paths = [path for path in sys.path if path]
        environment |= {"JOBS": str(folder / "jobs.db"), "PYTHONPATH": os.pathsep.join(paths)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                env=os.environ | environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{self._port()}"

    def _port(self) -> int:
        """The one that the server got for 0, from the kernel's table of what it listens to."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(OSError, StopIteration):
                files = Path(f"/proc/{self.process.pid}/fd").iterdir()
                sockets = {str(file.readlink()) for file in files}
                lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
                listening = (line.split() for line in lines)
                return next(
                    int(it[1].partition(":")[2], 16)
                    for it in listening
                    if it[3] == "0A" and f"socket:[{it[9]}]" in sockets
                )
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def click(self, job: str) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/{job}", timeout=60) as answer:  # noqa: S310
                status: int = answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        return status

    def stop(self) -> str:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return self.log.read_text()


@pytest.fixture
def served(tmp_path: Path, options: list[str]) -> Iterator[Served]:
    server = Served(tmp_path, options)
    yield server
    server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for its port in /proc")
def test_one_winner_of_simultaneous_clicks(served: Served) -> None:
    """The store was made before the fork, and each worker has a connection of its own."""
    with ThreadPoolExecutor(8) as clients:
        for number in range(20):
            statuses = list(clients.map(served.click, [f"job-{number}"] * 8))
            assert sorted(statuses) == [202] + [409] * 7
    log = served.stop()
    assert "Traceback" not in log
    assert "Error" not in log


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for its port in /proc")
def test_a_store_that_was_used_before_the_fork(tmp_path: Path) -> None:
    """It is refused in each worker, with the remedy, instead of sharing a connection."""
    if not UWSGI.exists():
        pytest.skip("uwsgi is not installed")
    server = Served(tmp_path, ["--master"], USED="1")
    try:
        assert {server.click("job") for _ in range(4)} == {500}
    finally:
        log = server.stop()
    assert "make it, or use it first, after the fork (uWSGI: --lazy-apps)" in log
