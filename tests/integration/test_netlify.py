"""The Netlify store beside its server: where it is, what it sends, and what it must not show."""

from __future__ import annotations

import base64
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from joblock import Blob, acquire_job_lock, peek_job_lock, release_job_lock
from joblock.stores import open_store
from joblock.stores.netlify import NetlifyBlobsError, NetlifyBlobStore
from tests.backends import NETLIFY_TOKEN, Backends
from tests.serving import serving
from tests.support import KEY, UID, VAULT, acquired, held

TOKEN = "nf-secret-0123456789"
Answer = tuple[int, dict[str, str], bytes]


class Edge:
    """An edge that answers as told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.ports: list[int] = []
        self.answers: list[Answer] = []

    def says(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.answers.append((status, headers, body))


@pytest.fixture
def edge() -> Iterator[Edge]:
    it = Edge()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            it.asked.append((self.command, self.path, headers, body))
            it.ports.append(self.client_address[1])
            status, fields, reply = it.answers.pop(0)
            self.send_response(status)
            for name, value in fields.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def do_GET(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def do_DELETE(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, serving(server):
        it.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield it
    assert it.answers == []


@contextmanager
def at_edge(edge: Edge) -> Generator[NetlifyBlobStore]:
    with NetlifyBlobStore("jobs", site_id="site-1", token=TOKEN, edge_url=edge.url) as store:
        yield store


def context(**fields: str) -> str:
    return base64.b64encode(json.dumps(fields).encode()).decode()


def test_what_is_sent(edge: Edge) -> None:
    """The bearer token, the condition, and a path that the official client would make."""
    key = "index-jobs/ü \"#?%\\/it's+a:&=,;@$!*()~^|[].json"
    edge.says(200, etag='"1"')
    edge.says(200, etag='"2"')
    edge.says(200, b"value", etag='"2"')
    edge.says(204)
    with at_edge(edge) as store:
        assert store.set_if_new(key, "é") == '"1"'
        assert store.set_if_match(key, "x", '"1"') == '"2"'
        assert store.get_with_etag(key) == Blob(b"value", '"2"')
        store.delete(key)
    path = "/site-1/site:jobs/index-jobs/%C3%BC%20%22%23%3F%25%5C/it's+a:&=,;@$!*()~^|[].json"
    assert [(method, path_) for method, path_, _, _ in edge.asked] == [
        ("PUT", path),
        ("PUT", path),
        ("GET", path),
        ("DELETE", path),
    ]
    assert {headers["authorization"] for _, _, headers, _ in edge.asked} == {f"Bearer {TOKEN}"}
    first, second, *_ = [(headers, body) for _, _, headers, body in edge.asked]
    assert (first[0]["if-none-match"], first[0].get("if-match"), first[1]) == (
        "*",
        None,
        "é".encode(),
    )
    assert first[0]["cache-control"] == "max-age=0, stale-while-revalidate=60"
    assert (second[0].get("if-none-match"), second[0]["if-match"]) == (None, '"1"')
    assert len(set(edge.ports)) == 1  # one connection for all of them


def test_a_refusal_takes_two_requests(edge: Edge) -> None:
    """Where a GET has an ETag, as the service's has, unlike its local server's."""
    edge.says(200, etag='"1"')
    with at_edge(edge) as store:
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        edge.says(412)
        edge.says(200, lock.record.to_json().encode(), etag='"1"')
        assert held(acquire_job_lock(store, UID, VAULT)).existing == lock.record
    assert len(edge.asked) == 3


def test_a_write_without_an_etag_is_read_back(edge: Edge) -> None:
    """Its etag is that of the value that was written, and of no other."""
    with at_edge(edge) as store:
        edge.says(200)
        edge.says(200, b"mine", etag='"1"')
        assert store.set_if_new(KEY, "mine") == '"1"'
        edge.says(200)
        edge.says(200, b"another's", etag='"2"')
        assert store.set_if_new(KEY, "mine") is None


@pytest.mark.parametrize("gone", [b'{"blobs":[]}', b'{"blobs":[{"key":"other","etag":"1"}]}'])
def test_a_key_that_vanishes_between_the_listing_and_the_value(edge: Edge, gone: bytes) -> None:
    """Is no key."""
    with at_edge(edge) as store:
        for listing, status in ((gone, 200), (listed(), 404)):
            edge.says(200, b"value")
            edge.says(200, listing)
            edge.says(status, b"value")
            assert store.get_with_etag(KEY) is None


def listed() -> bytes:
    return json.dumps({"blobs": [{"key": KEY, "etag": '"1"'}]}).encode()


@pytest.mark.parametrize("status", [302, 304, 400, 401, 403, 404, 409, 412])
def test_no_other_answer_is_a_win(edge: Edge, status: int) -> None:
    """The official client takes all but 412 for one. Nor is it held, and it is asked once."""
    edge.says(status, etag='"1"')
    with at_edge(edge) as store, pytest.raises(NetlifyBlobsError) as raised:
        store.set(KEY, "x") if status == 412 else store.set_if_new(KEY, "x")
    assert raised.value.status == status
    assert str(raised.value) == f"PUT in the Netlify Blobs store 'jobs': status {status}"
    assert len(edge.asked) == 1


def test_a_key_that_is_too_long(edge: Edge) -> None:
    """It is counted in bytes."""
    edge.says(404)
    with at_edge(edge) as store:
        assert store.get("日" * 200) is None
        with pytest.raises(ValueError, match="600 bytes"):
            store.get("日" * 201)


@pytest.mark.parametrize("encoding", [None, "identity", "gzip"])
@pytest.mark.parametrize("status", [200, 202, 204, 206])
def test_no_other_answer_is_a_value(edge: Edge, status: int, encoding: str | None) -> None:
    """A part of a record, or a packed one, would be taken for none, and the lock be taken over."""
    edge.says(status, b"" if status == 204 else b"value", etag='"1"', **encoded(encoding))
    with at_edge(edge) as store:
        if status == 200 and encoding != "gzip":
            assert store.get_with_etag(KEY) == Blob(b"value", '"1"')
        else:
            with pytest.raises(NetlifyBlobsError, match="no whole and plain value") as raised:
                store.get_with_etag(KEY)
            assert raised.value.status == status
    assert len(edge.asked) == 1


def encoded(encoding: str | None) -> dict[str, str]:
    return {} if encoding is None else {"content-encoding": encoding}


@pytest.mark.parametrize(
    "reply",
    [b"", b"[]", b"{}", b'{"url":5}', b'{"url":"ftp://x"}', b'{"url":"http://x/ y\\n?sig=secret"}'],
)
def test_a_signed_url_that_is_none(edge: Edge, reply: bytes) -> None:
    """It is an error that does not show it."""
    edge.says(200, reply)
    with (
        NetlifyBlobStore("jobs", site_id="s", token=TOKEN, api_url=edge.url) as store,
        pytest.raises(NetlifyBlobsError, match="no usable signed URL") as raised,
    ):
        store.get(KEY)
    assert "secret" not in str(raised.value)
    assert edge.asked[0][1] == f"/api/v1/blobs/s/site:jobs/{KEY}"
    assert edge.asked[0][2]["accept"] == "application/json;type=signed-url"


def test_the_token_stays_at_netlify(edge: Edge) -> None:
    """A signed URL may be another service's: it gets no token."""
    edge.says(200, json.dumps({"url": f"{edge.url}/signed?sig=1"}).encode())
    edge.says(200, b"value", etag='"1"')
    with NetlifyBlobStore("jobs", site_id="s", token=TOKEN, api_url=edge.url) as store:
        assert store.get(KEY) == b"value"
    (_, _, first, _), (_, path, second, _) = edge.asked
    assert (path, first["authorization"]) == ("/signed?sig=1", f"Bearer {TOKEN}")
    assert "authorization" not in second


@pytest.mark.slow
def test_nothing_shows_the_token(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    """No error's text, log line or repr."""
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []

    def fails(call: Callable[[], object]) -> None:
        with pytest.raises((NetlifyBlobsError, OSError, HTTPException, ValueError)) as raised:
            call()
        shown.extend([str(raised.value), repr(raised.value), str(raised.value.__context__)])

    fails(lambda: NetlifyBlobStore("jobs", site_id="s", token=f"{TOKEN}\n"))
    with at_edge(edge) as store:
        shown.append(repr(store))
        edge.says(401)
        fails(lambda: store.get(KEY))
        fails(lambda: store.get("k" * 601))
    with NetlifyBlobStore("jobs", site_id="s", token=TOKEN, edge_url="http://127.0.0.1:1") as none:
        fails(lambda: none.get(KEY))
    assert len(shown) == 13
    assert TOKEN not in "".join([*shown, caplog.text])


def test_connections(edge: Edge) -> None:
    """Kept for the next request, opened anew after close, in a child, and after a pause."""
    for _ in range(4):
        edge.says(404)
    with at_edge(edge) as store:
        store.get(KEY)
        store.get(KEY)
        store.close()
        store.get(KEY)
        child = multiprocessing.get_context("fork").Process(target=store.get, args=[KEY])
        child.start()
        child.join()
        assert child.exitcode == 0
        edge.says(404)
        store.get(KEY)
    first, second, third, in_child, last = edge.ports
    assert first == second
    assert third == last
    assert len({second, third, in_child}) == 3


def test_a_child_leaves_its_parents_connections_alone(edge: Edge) -> None:
    """In the same process, which is told that it is another one."""
    edge.says(404)
    edge.says(404)
    with at_edge(edge) as store:
        store.get(KEY)
        store._http._pid = 0
        store.get(KEY)
    assert len(set(edge.ports)) == 2


def test_a_connection_that_was_idle_for_long_is_not_used(edge: Edge) -> None:
    """The server may have closed it by now."""
    edge.says(404)
    edge.says(404)
    with at_edge(edge) as store:
        store.get(KEY)
        (idle,) = store._http._idle.values()
        idle[:] = [(connection, since - 5) for connection, since in idle]
        store.get(KEY)
    assert len(set(edge.ports)) == 2


@contextmanager
def raw_server(*answers: tuple[bytes, ...]) -> Generator[str]:
    """Sends, on each connection, the next answer in so many packets, and then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for packets in answers:
                client, _ = server.accept()
                with client, suppress(ConnectionError):  # the client may have had enough
                    client.recv(10_000)
                    for packet in packets:
                        client.sendall(packet)
                        time.sleep(0.02)

        thread = threading.Thread(target=serve, daemon=True)  # a failed test leaves it waiting
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


UNKNOWN_LENGTH = b'HTTP/1.1 200 OK\r\nETag: "8"\r\nConnection: close\r\n\r\nliv'
WHOLE = b'HTTP/1.1 200 OK\r\nETag: "9"\r\nContent-Length: 4\r\n\r\nlive'


@pytest.mark.parametrize(
    "first",
    [
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", WHOLE),
        (WHOLE[:-1],),
        (UNKNOWN_LENGTH,),
        (b"what?\r\n\r\n",),
        (),
    ],
    ids=["early hints", "truncated", "unknown length", "no http", "nothing"],
)
def test_an_answer_that_is_none_is_asked_for_again(first: tuple[bytes, ...]) -> None:
    """On another connection: what is still to come on this one must not answer another question."""
    with (
        raw_server(first, (WHOLE,)) as url,
        NetlifyBlobStore("jobs", site_id="s", token=TOKEN, edge_url=url) as store,
    ):
        assert store.get_with_etag(KEY) == Blob(b"live", '"9"')


@pytest.mark.slow
def test_connections_that_the_server_has_closed_do_not_use_up_the_attempts() -> None:
    """One that is found closed says the same of the others."""
    with (
        raw_server(*[(WHOLE,)] * 5) as url,
        NetlifyBlobStore("jobs", site_id="s", token=TOKEN, edge_url=url) as store,
    ):
        idle = store._http._idle[url]
        opened: list[Any] = []
        for _ in range(4):  # one after the other, but each on a connection of its own
            store._http.request("GET", url, {})
            opened.append(idle.pop())
        idle.extend(opened)
        time.sleep(0.2)
        assert store.get(KEY) == b"live"


@pytest.mark.parametrize(
    "url",
    [
        "api.netlify.com",
        "//api.netlify.com",
        "htps://api.netlify.com",
        "https://user:secret@api.netlify.com",
        "https://",
        "http://[::1/",
        "https://h:port/",
    ],
)
def test_a_url_that_is_none(edge: Edge, url: str) -> None:
    """Neither one's own nor a signed one; and it is not shown."""
    for option in ("api_url", "edge_url"):
        options: dict[str, Any] = {option: url}
        with pytest.raises(ValueError, match="https://HOST") as raised:
            NetlifyBlobStore("jobs", site_id="s", token=TOKEN, **options)
        assert "secret" not in str(raised.value)
    edge.says(200, json.dumps({"url": url}).encode())
    with (
        NetlifyBlobStore("jobs", site_id="s", token=TOKEN, api_url=edge.url) as store,
        pytest.raises(NetlifyBlobsError, match="no usable signed URL"),
    ):
        store.get(KEY)


@pytest.mark.slow
def test_https_is_spoken_to_https() -> None:
    """The first byte of a TLS handshake, and not of a request with the token."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[bytes] = []

        def serve() -> None:
            for _ in range(3):
                client, _ = server.accept()
                with client:
                    seen.append(client.recv(1))

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        with (
            NetlifyBlobStore("jobs", site_id="s", token=TOKEN, edge_url=url) as store,
            pytest.raises(OSError, match=r"."),
        ):
            store.get(KEY)
        thread.join()
    assert seen == [b"\x16"] * 3


@pytest.mark.parametrize("listing", [b"", b"[]", b"{}", b"null", b'{"blobs":[{}]}'])
def test_a_listing_that_is_none(edge: Edge, listing: bytes) -> None:
    """An error, and not that there is no lock."""
    edge.says(200, b"value")
    edge.says(200, listing)
    with at_edge(edge) as store, pytest.raises(NetlifyBlobsError, match="no usable listing"):
        store.get_with_etag(KEY)


def test_keys_over_pages(edge: Edge) -> None:
    """Netlify names them as they stand in a URL, and says where the next page begins."""
    keys = ["a%25b/1", "a%25b/%C3%A9"]
    pages = [{"blobs": [{"key": key, "etag": '"1"'}]} for key in keys]
    edge.says(200, json.dumps({**pages[0], "next_cursor": "c/2"}).encode())
    edge.says(503)
    edge.says(200, json.dumps(pages[1]).encode())
    with at_edge(edge) as store:
        assert list(store.list_keys("a%b/")) == ["a%b/1", "a%b/é"]
    first, *others = (path.partition("?")[2] for _, path, _, _ in edge.asked)
    assert first == "prefix=a%2525b%2F"
    assert others == ["prefix=a%2525b%2F&cursor=c%2F2"] * 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_listing_is_asked_for_again(edge: Edge, status: int) -> None:
    """As all else that Netlify does not answer."""
    edge.says(200, b"value")
    edge.says(status)
    edge.says(200, listed())
    edge.says(200, b"value")
    with at_edge(edge) as store:
        assert store.get_with_etag(KEY) == Blob(b"value", '"1"')


def test_arguments_that_are_missing_are_all_that_is_told() -> None:
    """Not also that the store that was never made cannot be closed."""
    with pytest.raises(TypeError, match="name"):
        NetlifyBlobStore()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("", {}, "1 to 64 bytes"),
        ("a/b", {}, "no slash"),
        ("é" * 33, {}, "1 to 64 bytes"),
        ("jobs", {}, "site_id and token"),
        ("jobs", {"site_id": "s"}, "site_id and token"),
        ("jobs", {"token": "t"}, "site_id and token"),
        ("jobs", {"site_id": "s", "token": "é"}, "no token has"),
    ],
)
def test_bad_arguments(name: str, options: dict[str, Any], problem: str) -> None:
    """Found out at once."""
    with pytest.raises(ValueError, match=problem):
        NetlifyBlobStore(name, **options)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "%",
        "e30",
        context(),
        "W10=",
        "NQ==",
        "eyJ",
        "bnVsbA==",
        "eyJ0b2tlbiI6NSwic2l0ZUlEIjo1fQ==",
    ],
)
def test_a_context_that_is_none(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    """It is said that it is missing."""
    monkeypatch.setenv("NETLIFY_BLOBS_CONTEXT", bad)
    with pytest.raises(ValueError, match="NETLIFY_BLOBS_CONTEXT is set"):
        NetlifyBlobStore("jobs")


def test_the_context_of_a_function(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its uncached edge, for strong reads; without one it is refused; without an edge, the API."""
    fields = {"siteID": "s", "token": TOKEN, "edgeURL": "http://127.0.0.1:1", "apiURL": edge.url}
    monkeypatch.setenv("NETLIFY_BLOBS_CONTEXT", context(**fields))
    with pytest.raises(ValueError, match="no uncachedEdgeURL"):
        open_store("netlify:jobs")
    uncached = context(**fields, uncachedEdgeURL=edge.url)
    monkeypatch.setenv("NETLIFY_BLOBS_CONTEXT", uncached)
    edge.says(404)
    with NetlifyBlobStore("jobs") as store:
        assert store.get(KEY) is None
    del fields["edgeURL"]
    monkeypatch.setenv("NETLIFY_BLOBS_CONTEXT", context(**fields))
    edge.says(204)
    with NetlifyBlobStore("jobs") as store:
        store.delete(KEY)
    assert [path for _, path, _, _ in edge.asked] == [
        f"/s/site:jobs/{KEY}",
        f"/api/v1/blobs/s/site:jobs/{KEY}",
    ]


def test_explicit_arguments_win_over_the_context(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them: nothing of another site is mixed in."""
    other = context(siteID="other", token="other", uncachedEdgeURL="http://127.0.0.1:1")
    monkeypatch.setenv("NETLIFY_BLOBS_CONTEXT", other)
    edge.says(404)
    with at_edge(edge) as store:
        assert store.get(KEY) is None
    assert edge.asked[0][1].startswith("/site-1/")


# Written against the official client alone: what a JavaScript deployment does.
NODE = """
import { createRequire } from 'node:module'
import { join } from 'node:path'
const [packages, url, token, edge, step, now] = process.argv.slice(1)
const { getStore } = createRequire(join(packages, 'index.js'))('@netlify/blobs')
const at = edge === 'edge' ? { edgeURL: url, uncachedEdgeURL: url } : { apiURL: url }
const store = getStore({ name: 'jobs', siteID: 'site', token, consistency: 'strong', ...at })
const key = 'index-jobs/user-1/Büro 1.json'
const readLock = async () => {
  const text = await store.get(key, { type: 'text' })
  if (!text) return null
  try {
    const it = JSON.parse(text)
    return it && typeof it === 'object' ? it : null
  } catch { return null }
}
if (step === 'acquire') {
  const record = { jobId: 'from-js', canisterUid: 'user-1', vaultId: 'Büro 1', actorUid: null,
    chunksToEmbed: 3, estimatedSeconds: 1.5, reason: 'né', startedAt: +now, expiresAt: +now + 1000 }
  await store.set(key, JSON.stringify(record))
} else if (step === 'release') {
  await store.delete(key)
}
console.log(JSON.stringify(await readLock()))
"""


@pytest.mark.parametrize("mode", ["api", "edge"])
def test_across_languages(backends: Backends, mode: str) -> None:
    """A JavaScript deployment's lock is seen, taken over and released; and ours by JavaScript."""
    backend = backends[f"netlify-{mode}"]

    def node(step: str, now: int = 0) -> Any:
        packages = os.environ["JOBLOCK_NODE_MODULES"]
        command = ["node", "--input-type=module", "-e", NODE, packages, backend.url, NETLIFY_TOKEN]
        ran = subprocess.run(
            [*command, mode, step, str(now)], capture_output=True, check=True, text=True
        )
        return json.loads(ran.stdout)

    vault = "Büro 1"
    at: dict[str, Any] = {"edge_url" if mode == "edge" else "api_url": backend.url}
    with NetlifyBlobStore("jobs", site_id="site", token=NETLIFY_TOKEN, **at) as store:
        written = node("acquire", now=5000)
        refused = held(acquire_job_lock(store, UID, vault, clock=lambda: 5999))
        assert refused.existing.to_dict() == written
        assert refused.existing.reason == "né"

        lock = acquired(acquire_job_lock(store, UID, vault, clock=lambda: 6000, reason="日"))
        assert lock.took_over == refused.existing
        assert node("read") == lock.record.to_dict()

        assert release_job_lock(
            store, UID, vault, expected_job_id=lock.job_id, etag=lock.etag
        ).released
        assert store.get(f"index-jobs/{UID}/{vault}.json") == b"null"
        assert node("read") is None

        assert acquire_job_lock(store, UID, vault)
        assert node("release") is None
        assert peek_job_lock(store, UID, vault) is None
        assert acquire_job_lock(store, UID, vault)
        assert release_job_lock(store, UID, vault).released
