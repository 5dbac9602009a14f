"""The servers and the proxy that the stores' tests stand on, each driven by its real client."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.gcs_server import gcs_server
from tests.lossy import Proxy, Request, lossy
from tests.servers import azure_connection, azure_server, netlify_server, s3_server
from tests.serving import serving

CLIENTS = 8


def assert_gone(url: str) -> None:
    address = urlsplit(url)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", address.port or 0), 5)


def winners(write: Callable[[int], object], refused: type[Exception]) -> int:
    """How many of some simultaneous writes the server did not refuse."""
    barrier = threading.Barrier(CLIENTS)

    def compete(number: int) -> bool:
        barrier.wait(30)
        try:
            write(number)
        except refused:
            return False
        return True

    with ThreadPoolExecutor(CLIENTS) as threads:
        return sum(threads.map(compete, range(CLIENTS)))


def test_s3() -> None:
    """A create and a stale etag are refused, and one write wins, through the proxy too."""
    boto3: Any = pytest.importorskip("boto3")
    refused = pytest.importorskip("botocore.exceptions").ClientError
    with s3_server() as url, lossy(url) as proxy:
        s3 = boto3.client(
            "s3",
            endpoint_url=proxy.url,
            region_name="us-east-1",
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )
        s3.create_bucket(Bucket="jobs")
        at: dict[str, Any] = {"Bucket": "jobs", "Key": "ü/1.json"}
        first = s3.put_object(**at, Body=b"1", IfNoneMatch="*")["ETag"]
        second = s3.put_object(**at, Body=b"2", IfMatch=first)["ETag"]
        stale: list[Callable[[], object]] = [
            lambda: s3.put_object(**at, Body=b"3", IfNoneMatch="*"),
            lambda: s3.put_object(**at, Body=b"3", IfMatch=first),
            lambda: s3.delete_object(**at, IfMatch=first),
        ]
        for write in stale:
            with pytest.raises(refused, match="PreconditionFailed"):
                write()
        assert s3.get_object(**at)["Body"].read() == b"2"
        assert winners(lambda n: s3.put_object(**at, Body=b"4%d" % n, IfMatch=second), refused) == 1
        s3.close()
    assert_gone(url)


def test_azure() -> None:
    """A create and a stale etag are refused, and one write wins, through the proxy too."""
    blob: Any = pytest.importorskip("azure.storage.blob")
    refused = pytest.importorskip("azure.core.exceptions").HttpResponseError
    same = pytest.importorskip("azure.core").MatchConditions.IfNotModified
    with azure_server() as url, lossy(url) as proxy:
        connection = azure_connection(proxy.url)
        with blob.ContainerClient.from_connection_string(connection, "jobs") as container:
            container.create_container()
            client = container.get_blob_client("ü/1.json")

            def put(data: str, etag: str) -> str:
                new = client.upload_blob(data, overwrite=True, etag=etag, match_condition=same)
                new_etag: str = new["etag"]
                return new_etag

            first = client.upload_blob("1", overwrite=False)["etag"]
            second = put("2", first)
            with pytest.raises(refused, match="BlobAlreadyExists"):
                client.upload_blob("3", overwrite=False)
            with pytest.raises(refused, match="ConditionNotMet"):
                put("3", first)
            with pytest.raises(refused, match="ConditionNotMet"):
                client.delete_blob(etag=first, match_condition=same)
            assert client.download_blob().readall() == b"2"
            assert winners(lambda n: put(f"4{n}", second), refused) == 1
    assert_gone(url)


def gcs_client(url: str) -> Any:
    credentials: Any = pytest.importorskip("google.auth.credentials")
    storage: Any = pytest.importorskip("google.cloud.storage")
    return storage.Client(
        project="any",
        credentials=credentials.AnonymousCredentials(),
        client_options={"api_endpoint": url},
    )


@pytest.fixture
def quiet_gcs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


@pytest.mark.usefixtures("quiet_gcs")
def test_gcs() -> None:
    """A create and a stale generation are refused, and one write wins, through the proxy too."""
    refused = pytest.importorskip("google.api_core.exceptions").PreconditionFailed
    with gcs_server() as url, lossy(url) as proxy:
        gcs_client(proxy.url).create_bucket("jobs")
        bucket = gcs_client(proxy.url).bucket("jobs")

        def put(data: str, generation: int) -> int:
            blob = bucket.blob("ü/1.json")
            blob.upload_from_string(data, if_generation_match=generation, retry=None)
            new: int = blob.generation
            return new

        first = put("1", 0)
        second = put("2", first)
        assert second > first
        stale: list[Callable[[], object]] = [
            lambda: put("3", 0),
            lambda: put("3", first),
            lambda: bucket.blob("ü/1.json").delete(if_generation_match=first, retry=None),
            lambda: bucket.blob("ü/1.json").reload(if_generation_match=first),
            lambda: bucket.blob("ü/1.json").download_as_bytes(if_generation_match=first),
        ]
        for write in stale:
            with pytest.raises(refused):
                write()
        found = bucket.blob("ü/1.json")
        assert (found.download_as_bytes(), found.generation) == (b"2", second)
        assert winners(lambda n: put(f"4{n}", second), refused) == 1
        bucket.blob("ü/1.json").delete(if_generation_match=bucket.get_blob("ü/1.json").generation)
        assert bucket.get_blob("ü/1.json") is None
    assert_gone(url)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/storage/v1/b/jobs/o", 501),
        ("GET", "/storage/v1/b/jobs/o/k?projection=full", 501),
        ("GET", "/download/storage/v1/b/jobs/o/k?alt=json", 501),
        ("DELETE", "/storage/v1/b/jobs/o/k?ifGenerationNotMatch=1", 501),
        ("DELETE", "/storage/v1/b/jobs/o/k?ifGenerationMatch=one", 400),
        ("POST", "/upload/storage/v1/b/jobs/o?uploadType=media", 501),
        ("POST", "/upload/storage/v1/b/jobs/o?uploadType=multipart", 400),
        ("PATCH", "/storage/v1/b/jobs/o/k", 501),
        ("GET", "/storage/v1/b/jobs/o/k?projection=noAcl", 404),
    ],
)
def test_gcs_refuses_what_it_does_not_know(method: str, path: str, status: int) -> None:
    """It never ignores a parameter: a store must not pass because a condition was not looked at."""
    with gcs_server() as url:
        assert ask(url, method, path).status == status


def test_netlify() -> None:
    """It signs a URL, and on that URL refuses a create and a stale etag; also via the proxy."""
    with netlify_server() as server, lossy(server.url, rewrite=True) as proxy:
        signing = {
            "Authorization": f"Bearer {server.token}",
            "Accept": "application/json;type=signed-url",
        }
        path = "/api/v1/blobs/site-1/site:jobs/1.json"
        assert ask(proxy.url, "GET", path).status == 403
        signed = json.loads(ask(proxy.url, "PUT", path, headers=signing).body)["url"]
        assert signed.startswith(proxy.url)
        signed = signed.removeprefix(proxy.url)

        def put(condition: str, etag: str) -> Reply:
            return ask(proxy.url, "PUT", signed, b"1", {condition: etag})

        first = put("If-None-Match", "*").headers["etag"]
        second = put("If-Match", first).headers["etag"]
        assert put("If-None-Match", "*").status == put("If-Match", first).status == 412
        assert (server.folder / "entries/site-1/site:jobs/1.json").read_bytes() == b"1"

        def write(_: int) -> None:
            if put("If-Match", second).status == 412:
                raise PermissionError

        assert winners(write, PermissionError) == 1
    assert_gone(server.url)
    assert not server.folder.exists()


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.body = response.read()
        self.headers = {name.lower(): value for name, value in response.getheaders()}


def ask(
    url: str,
    method: str,
    path: str,
    body: bytes | Generator[bytes] | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        return Reply(connection.getresponse())
    finally:
        connection.close()


@contextmanager
def echo() -> Generator[tuple[Proxy, list[str]]]:
    """A server that answers with what it was sent, behind a proxy, and the paths it has seen."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            seen.append(self.path)
            body = f"{self.requestline}\n{self.headers}".encode()
            if self.headers["Transfer-Encoding"] == "chunked":
                while (line := self.rfile.readline()) != b"\r\n":
                    body += line
            else:
                body += self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        serving(server),
        lossy(f"http://127.0.0.1:{server.server_address[1]}") as proxy,
    ):
        yield proxy, seen
    assert_gone(proxy.url)


def test_the_proxy_changes_nothing() -> None:
    """Request line, headers, Host and body arrive as they were sent, chunks and all."""
    with echo() as (proxy, _):
        body = bytes(range(256))
        headers = {"X-Odd": "a  b", "if-match": '"1"', "Expect": "100-continue"}
        reply = ask(proxy.url, "PUT", "/a%2Fb/%C3%BC?x=%20&y", body, headers)
        head, _, sent = reply.body.partition(b"\n\n")
        host = urlsplit(proxy.url).netloc
        assert sent == body
        assert head.decode().splitlines() == [
            "PUT /a%2Fb/%C3%BC?x=%20&y HTTP/1.1",
            f"Host: {host}",
            "Accept-Encoding: identity",
            "Content-Length: 256",
            "X-Odd: a  b",
            'if-match: "1"',
            "Expect: 100-continue",
        ]
        reply = ask(proxy.url, "PUT", "/", (part for part in (b"one", b"three")))
        assert reply.body.endswith(b"3\r\none\r\n5\r\nthree\r\n0\r\n")
        first, second = proxy.requests
        assert (first.method, first.path, first.status) == ("PUT", "/a%2Fb/%C3%BC?x=%20&y", 200)
        assert (first.body, first.headers["if-match"]) == (body, '"1"')
        assert second.body == b"3\r\none\r\n5\r\nthree\r\n0\r\n\r\n"


def test_the_proxy_asks_for_a_body_that_waits_to_be_asked_for() -> None:
    """A client that expects 100 Continue gets it before it has sent the body, and one reply."""
    with echo() as (proxy, _):
        address = urlsplit(proxy.url)
        with socket.create_connection(("127.0.0.1", address.port or 0), 30) as client:
            head = "PUT / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
            client.sendall(head.encode())
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"body")
            with client.makefile("rb") as reply:
                assert reply.readline() == b"HTTP/1.1 200 OK\r\n"
                client.shutdown(socket.SHUT_WR)
                assert reply.read().endswith(b"\n\nbody")


def test_the_proxy_keeps_connections_alive() -> None:
    """Two requests on one connection, and a rule for the second."""
    with echo() as (proxy, seen):
        address = urlsplit(proxy.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        connection.request("GET", "/1")
        connection.getresponse().read()
        mine = connection.sock
        proxy.drop()
        connection.request("GET", "/2")
        assert connection.sock is mine
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
        connection.close()
        assert seen == ["/1"]


def test_the_proxy_swallows_drops_and_answers() -> None:
    """A rule is for the next request that it is about, as many times as it says."""
    with echo() as (proxy, seen):
        proxy.swallow("PUT")
        proxy.drop(lambda request: request.path == "/dropped", times=2)
        proxy.answer(503, b"busy", {"Retry-After": "1"}, when="PUT")
        assert ask(proxy.url, "GET", "/through").status == 200
        for path in ("/swallowed", "/dropped", "/dropped"):
            with pytest.raises(http.client.RemoteDisconnected):
                ask(proxy.url, "PUT", path)
        reply = ask(proxy.url, "PUT", "/answered")
        assert (reply.status, reply.body, reply.headers["retry-after"]) == (503, b"busy", "1")
        assert ask(proxy.url, "PUT", "/dropped").status == 200
        assert seen == ["/through", "/swallowed", "/dropped"]
        assert [(request.path, request.status) for request in proxy.requests] == [
            ("/through", 200),
            ("/swallowed", 200),
            ("/dropped", None),
            ("/dropped", None),
            ("/answered", 503),
            ("/dropped", 200),
        ]


@pytest.mark.parametrize("forward", [True, False])
def test_the_proxy_hangs_until_it_is_released(forward: bool) -> None:
    """The server has done it, or never hears of it; the client hears nothing either way."""
    with echo() as (proxy, seen), ThreadPoolExecutor(1) as threads:
        came = threading.Event()
        release = proxy.hang(when_it_comes(came), forward=forward)
        waiting = threads.submit(ask, proxy.url, "PUT", "/hangs")
        assert came.wait(30)
        assert ask(proxy.url, "GET", "/meanwhile").status == 200
        assert not waiting.done()
        release.set()
        with pytest.raises(http.client.RemoteDisconnected):
            waiting.result(30)
        assert ("/hangs" in seen) == forward


def test_a_proxy_that_hangs_can_be_stopped() -> None:
    """Nobody has to release what hangs at the end of a test."""
    with ThreadPoolExecutor(1) as threads:
        with echo() as (proxy, _):
            came = threading.Event()
            proxy.hang(when_it_comes(came))
            waiting = threads.submit(ask, proxy.url, "PUT", "/hangs")
            assert came.wait(30)
        with pytest.raises(http.client.RemoteDisconnected):
            waiting.result(30)


def when_it_comes(came: threading.Event) -> Callable[[Request], bool]:
    def is_put(request: Request) -> bool:
        if request.method == "PUT":
            came.set()
        return request.method == "PUT"

    return is_put


def test_the_proxy_lets_others_act_before_and_after() -> None:
    """A competing write comes first, or comes before the client has its answer."""
    with echo() as (proxy, seen):
        proxy.before(lambda: ask(proxy.url, "GET", "/first"), "PUT")
        proxy.after(lambda: seen.append("after"), "PUT")
        assert ask(proxy.url, "PUT", "/1").status == 200
        assert seen == ["/first", "/1"]
        assert ask(proxy.url, "PUT", "/2").status == 200
        assert seen == ["/first", "/1", "/2", "after"]
