"""End to end: an HTTP service, its worker processes, and a SQLite file between them."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from joblock import (
    JOB_LOCK_TTL_MS,
    BlobStore,
    Held,
    JobLockRecord,
    acquire_job_lock,
    aio,
    peek_job_lock,
    release_job_lock,
)
from joblock._record import epoch_ms
from joblock.stores.sqlite import SqliteBlobStore
from tests.serving import serving

WORKER = [sys.executable, str(Path(__file__).with_name("web_worker.py"))]
CLICKS = 8


@dataclass
class Response:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict[str, str])


def already_running(held: Held) -> Response:
    return Response(409, held.existing.to_dict(), {"Retry-After": str(held.retry_after_s())})


def started(job_id: str, took_over: JobLockRecord | None) -> Response:
    return Response(202, {"jobId": job_id, "tookOver": took_over and took_over.job_id})


def status_of(record: JobLockRecord | None) -> Response:
    if record is None:
        return Response(404, {})
    return Response(200, record.to_dict() | {"running": record.is_live(epoch_ms())})


class Workers:
    """Starts the worker processes and ends those that are left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.command = WORKER
        self.by_job: dict[str, subprocess.Popen[str]] = {}

    def start(self, uid: str, vault: str, job_id: str) -> None:
        self.by_job[job_id] = subprocess.Popen(
            [*self.command, str(self.path), uid, vault, job_id], stdin=subprocess.PIPE, text=True
        )

    def finish(self, job_id: str) -> int:
        self.by_job[job_id].communicate("\n", timeout=30)
        return self.by_job.pop(job_id).returncode

    def kill(self, job_id: str) -> None:
        worker = self.by_job.pop(job_id)
        worker.kill()  # SIGKILL
        worker.communicate()

    def close(self) -> None:
        for job_id in list(self.by_job):
            self.kill(job_id)


class Service:
    """The handlers, blocking, behind the standard library's threaded HTTP server."""

    def __init__(self, store: BlobStore, workers: Workers) -> None:
        self.store, self.workers = store, workers
        self.ttl_ms: float = JOB_LOCK_TTL_MS
        self.port = 0

    def start_job(self, uid: str, vault: str) -> Response:
        lock = acquire_job_lock(self.store, uid, vault, reason="http", ttl_ms=self.ttl_ms)
        if not lock:
            return already_running(lock)
        try:
            self.workers.start(uid, vault, lock.job_id)
        except OSError as error:
            release_job_lock(self.store, uid, vault, expected_job_id=lock.job_id, etag=lock.etag)
            return Response(502, {"error": str(error)})
        return started(lock.job_id, lock.took_over)

    def job_status(self, uid: str, vault: str) -> Response:
        return status_of(peek_job_lock(self.store, uid, vault))

    def serve(self) -> Iterator[Service]:
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.answer(service.start_job(*self.path.strip("/").split("/")))

            def do_GET(self) -> None:
                self.answer(service.job_status(*self.path.strip("/").split("/")))

            def answer(self, response: Response) -> None:
                body = json.dumps(response.body).encode()
                self.send_response(response.status)
                for name, value in (response.headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = False  # so that closing the server waits for its requests
            request_queue_size = 64

        with Server(("127.0.0.1", 0), Handler) as server, serving(server):
            self.port = server.server_address[1]
            yield self


class AsyncService(Service):
    """The same handlers, async, behind a server of asyncio's streams."""

    async def answer_start(self, store: aio.ThreadedBlobStore, uid: str, vault: str) -> Response:
        lock = await aio.acquire_job_lock(store, uid, vault, reason="http", ttl_ms=self.ttl_ms)
        if not lock:
            return already_running(lock)
        try:
            self.workers.start(uid, vault, lock.job_id)
        except OSError as error:
            await aio.release_job_lock(
                store, uid, vault, expected_job_id=lock.job_id, etag=lock.etag
            )
            return Response(502, {"error": str(error)})
        return started(lock.job_id, lock.took_over)

    async def answer_status(self, store: aio.ThreadedBlobStore, uid: str, vault: str) -> Response:
        return status_of(await aio.peek_job_lock(store, uid, vault))

    def serve(self) -> Iterator[Service]:
        listening, stop = threading.Event(), asyncio.Event()
        loop = asyncio.new_event_loop()

        async def run() -> None:
            store = aio.ThreadedBlobStore(self.store)

            async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(maxsplit=2)
                answer = self.answer_start if method == "POST" else self.answer_status
                response = await answer(store, *path.strip("/").split("/"))
                body = json.dumps(response.body).encode()
                headers = response.headers | {"Content-Length": str(len(body))}
                lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
                start = f"HTTP/1.0 {response.status} -\r\n{''.join(lines)}\r\n"
                writer.write(start.encode() + body)
                await writer.drain()
                writer.close()
                await writer.wait_closed()

            server = await asyncio.start_server(handle, "127.0.0.1", 0)
            async with server:
                self.port = server.sockets[0].getsockname()[1]
                listening.set()
                await stop.wait()

        def in_thread() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(run())

        thread = threading.Thread(target=in_thread)
        thread.start()
        assert listening.wait(30)
        yield self
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@pytest.fixture(params=[Service, AsyncService], ids=["threads", "asyncio"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    path = tmp_path / "jobs.db"
    workers = Workers(path)
    with SqliteBlobStore(path) as store:
        yield from request.param(store, workers).serve()
    workers.close()


def request(service: Service, method: str, path: str = "/user-1/Business") -> Response:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request(method, path)
    reply = connection.getresponse()
    response = Response(reply.status, json.loads(reply.read()), dict(reply.getheaders()))
    connection.close()
    return response


@pytest.mark.slow
def test_eight_simultaneous_clicks_start_one_job(service: Service) -> None:
    """One 202; seven 409 that name the job that runs; after it has released, 202 again."""
    for _ in range(5):
        barrier = threading.Barrier(CLICKS)

        def click(barrier: threading.Barrier = barrier) -> Response:
            barrier.wait()
            return request(service, "POST")

        with ThreadPoolExecutor(CLICKS) as clients:
            replies = [future.result() for future in [clients.submit(click) for _ in range(CLICKS)]]
        (accepted,) = [reply for reply in replies if reply.status == 202]
        refused = [reply for reply in replies if reply.status == 409]
        assert len(refused) == CLICKS - 1
        job_id = accepted.body["jobId"]
        assert list(service.workers.by_job) == [job_id]
        status = request(service, "GET")
        assert (status.status, status.body["jobId"], status.body["running"]) == (200, job_id, True)
        for reply in refused:
            assert reply.body["jobId"] == job_id
            assert reply.body["startedAt"] == status.body["startedAt"]
            assert 1 <= int(reply.headers["Retry-After"]) <= JOB_LOCK_TTL_MS / 1000
        assert service.workers.finish(job_id) == 0
        assert request(service, "GET").status == 404


def test_vaults_do_not_wait_for_each_other(service: Service) -> None:
    """A lock is one pair's."""
    first = request(service, "POST", "/user-1/Business")
    second = request(service, "POST", "/user-1/Personal")
    third = request(service, "POST", "/user-2/Business")
    assert [first.status, second.status, third.status] == [202, 202, 202]
    assert service.workers.finish(second.body["jobId"]) == 0
    assert request(service, "POST", "/user-1/Business").body["jobId"] == first.body["jobId"]


def test_a_failed_kick_off_releases_the_lock(service: Service) -> None:
    """502, and the next click may try again at once."""
    service.workers.command = ["/nonexistent/worker"]
    assert request(service, "POST").status == 502
    assert request(service, "GET").status == 404
    service.workers.command = WORKER
    assert request(service, "POST").status == 202


@pytest.mark.slow
def test_a_killed_workers_lock_expires_and_is_taken_over(service: Service) -> None:
    """409 until the lease has run out by the wall clock, then 202 that names the killed job."""
    service.ttl_ms = 1500
    killed = request(service, "POST").body["jobId"]
    service.workers.kill(killed)
    lease = request(service, "GET").body
    refusals = 0
    while (reply := request(service, "POST")).status == 409:
        refusals += 1
        assert reply.body["jobId"] == killed
        assert reply.headers["Retry-After"] in ("1", "2")
        time.sleep(0.02)
    assert refusals
    assert (reply.status, reply.body["tookOver"]) == (202, killed)
    status = request(service, "GET").body
    assert status["jobId"] == reply.body["jobId"]
    assert status["startedAt"] >= lease["expiresAt"]
    service.ttl_ms = JOB_LOCK_TTL_MS
    assert service.workers.finish(reply.body["jobId"]) == 0


def test_a_worker_that_overran_its_lease_does_not_release_its_successors(service: Service) -> None:
    """The slow worker is told that it is too late; the new job keeps its lock."""
    service.ttl_ms = 1
    slow = request(service, "POST").body["jobId"]
    service.ttl_ms = JOB_LOCK_TTL_MS
    time.sleep(0.005)
    new = request(service, "POST")
    assert (new.status, new.body["tookOver"]) == (202, slow)
    assert service.workers.finish(slow) == 1
    assert request(service, "GET").body["jobId"] == new.body["jobId"]
    assert service.workers.finish(new.body["jobId"]) == 0
