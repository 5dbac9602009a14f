"""Lost requests, lost replies, and conflicts at the same moment, between an SDK and its server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest

from joblock import (
    Acquired,
    ConditionalBlobStore,
    ReleaseResult,
    Renewed,
    acquire_job_lock,
    peek_job_lock,
    release_job_lock,
    renew_job_lock,
)
from tests.backends import NAMES, RETRIES, TOMBSTONE, Backends
from tests.lossy import Proxy, Request, When, lossy
from tests.servers import azure_connection
from tests.support import UID, VAULT, acquired, held

XML = {"Content-Type": "application/xml"}
CONFLICT = b"<Error><Code>ConditionalRequestConflict</Code><Message>busy</Message></Error>"


def is_write(request: Request) -> bool:
    """Not Netlify's request for the signed URL, which changes nothing."""
    if is_dynamodb(request):
        return request.headers["x-amz-target"].endswith("PutItem")
    return request.method in ("PUT", "POST") and not request.path.startswith("/api/")


def is_read(request: Request) -> bool:
    if is_dynamodb(request):
        return request.headers["x-amz-target"].endswith("GetItem")
    return request.method == "GET" and not request.path.startswith("/api/")


def is_dynamodb(request: Request) -> bool:
    return "x-amz-target" in request.headers


def is_takeover(request: Request) -> bool:
    condition = request.headers.get("if-match") or "ifGenerationMatch=1" in request.path
    return is_write(request) and bool(condition)


@dataclass
class Link:
    """The same place, once through the proxy and once directly, as another host would see it."""

    name: str
    proxy: Proxy
    store: ConditionalBlobStore
    direct: ConditionalBlobStore

    def is_removal(self, request: Request) -> bool:
        if is_dynamodb(request):
            return request.headers["x-amz-target"].endswith("DeleteItem")
        return is_write(request) if self.name in TOMBSTONE else request.method == "DELETE"

    def answer(self, status: int, when: When, times: int = 1) -> None:
        """Answer those requests with an error, in the service's own form."""
        body, headers = b"<Error><Code>Status%d</Code><Message>not now</Message></Error>", XML
        if self.name == "dynamodb":
            body, headers = b'{"__type": "Status%d", "message": "not now"}', {}
        self.proxy.answer(status, body % status, headers, when=when, times=times)

    def be_impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pause for no time between the requests, as far as that can be said."""
        if self.name == "s3-legacy":
            pytest.skip("boto3's default is patient for long; QUICK and no retries are tried")
        kind = "object_store" if self.name.startswith("obstore") else self.name.partition("-")[0]
        retry = import_module(f"joblock.stores.{kind}")._RETRY
        monkeypatch.setattr(retry, "pauses_s", (0.0,) * len(retry.pauses_s))

    def taken(self, ttl_ms: float = 1e6) -> Acquired:
        """Another host's lock."""
        return acquired(acquire_job_lock(self.direct, UID, VAULT, ttl_ms=ttl_ms))

    def owner(self) -> str | None:
        record = peek_job_lock(self.direct, UID, VAULT)
        return None if record is None else record.job_id


@pytest.fixture(params=[*NAMES, *RETRIES, "obstore-s3", "obstore-azure"])
def link(request: pytest.FixtureRequest, backends: Backends) -> Iterator[Link]:
    backend = backends[request.param]
    prefix = backends.new_prefix()
    with lossy(backend.url, rewrite=True) as proxy, ExitStack() as stack:
        store = backend.open(stack, prefix, proxy.url)
        yield Link(request.param, proxy, store, backend.open(stack, prefix))


def assert_releases(link: Link, lock: Acquired) -> None:
    result = release_job_lock(link.store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)
    assert result == ReleaseResult(released=True)


def test_a_create_that_took_effect_is_won(link: Link) -> None:
    """Though its reply was lost and the request that was sent again was refused."""
    link.proxy.swallow(is_write)
    lock = acquired(acquire_job_lock(link.store, UID, VAULT))
    assert link.owner() == lock.job_id
    assert is_read(link.proxy.requests[-1])  # it was settled by reading
    assert_releases(link, lock)


def test_a_create_that_the_server_never_saw_is_sent_again(link: Link) -> None:
    """The request was lost, not the reply."""
    link.proxy.drop(is_write)
    lock = acquired(acquire_job_lock(link.store, UID, VAULT))
    assert link.owner() == lock.job_id
    assert_releases(link, lock)


def test_a_takeover_that_took_effect_keeps_its_receipt(link: Link) -> None:
    """`took_over` is the crashed job's record, not the new one's own."""
    crashed = link.taken(ttl_ms=1)
    link.proxy.swallow(is_takeover)
    lock = acquired(acquire_job_lock(link.store, UID, VAULT))
    assert (lock.took_over, link.owner()) == (crashed.record, lock.job_id)
    assert_releases(link, lock)


def test_a_renewal_that_took_effect_is_a_renewal(link: Link) -> None:
    """And gives the etag of what it wrote."""
    lock = acquired(acquire_job_lock(link.store, UID, VAULT, ttl_ms=1e6))
    link.proxy.swallow(is_write)
    renewed = renew_job_lock(
        link.store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag, record=lock.record
    )
    assert isinstance(renewed, Renewed)
    assert peek_job_lock(link.direct, UID, VAULT) == renewed.record
    assert link.direct.delete_if_match("index-jobs/user-1/Business.json", renewed.etag or "")


def test_a_delete_that_took_effect_is_a_release(link: Link) -> None:
    """A key that is gone after a lost reply was deleted."""
    lock = acquired(acquire_job_lock(link.store, UID, VAULT))
    link.proxy.swallow(link.is_removal)
    assert_releases(link, lock)
    assert link.owner() is None


def test_an_unconditional_release_whose_reply_is_lost(link: Link) -> None:
    """The operator's way out removes it too."""
    link.taken()
    link.proxy.swallow("DELETE")
    assert release_job_lock(link.store, UID, VAULT) == ReleaseResult(released=True)
    assert link.owner() is None


def test_a_read_whose_reply_is_lost_is_asked_again(link: Link) -> None:
    """A refused acquire still shows the record of the job that runs."""
    other = link.taken()
    link.proxy.swallow(is_read)
    assert held(acquire_job_lock(link.store, UID, VAULT)).existing == other.record


def test_a_lost_refusal_is_still_a_refusal(link: Link) -> None:
    """The lock was another's before, and its record is what is shown."""
    other = link.taken()
    link.proxy.swallow(is_write)
    assert held(acquire_job_lock(link.store, UID, VAULT)).existing == other.record
    assert link.owner() == other.job_id


def test_another_wins_while_the_request_is_lost(link: Link) -> None:
    """The request never arrived, and when it is sent again the lock is another's."""
    others: list[Acquired] = []
    link.proxy.before(lambda: others.append(link.taken()), is_write)
    link.proxy.drop(is_write)
    result = acquire_job_lock(link.store, UID, VAULT)
    assert held(result).existing == others[0].record


def test_another_takes_the_lock_after_a_delete_whose_reply_is_lost(link: Link) -> None:
    """Its record stays, and the release does not claim to have removed it."""
    lock = acquired(acquire_job_lock(link.store, UID, VAULT))
    others: list[Acquired] = []
    link.proxy.swallow(link.is_removal)
    link.proxy.before(lambda: others.append(link.taken()), link.is_removal)
    result = release_job_lock(link.store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)
    assert result == ReleaseResult(released=False, reason="lock_owned_by_other_job")
    assert link.owner() == others[0].job_id


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_an_error_of_the_server_is_asked_again(link: Link, status: int) -> None:
    """Throttled or failing once: no error, and not won before it is."""
    link.answer(status, when=is_write)
    lock = acquired(acquire_job_lock(link.store, UID, VAULT))
    assert link.owner() == lock.job_id
    assert_releases(link, lock)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("committed", [False, True], ids=["refused", "committed"])
def test_an_error_that_lasts_reaches_the_caller(
    link: Link, status: int, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither won nor held; and it is not asked for ever."""
    link.be_impatient(monkeypatch)
    if committed:
        link.proxy.swallow(is_write)
    link.answer(status, when=is_write, times=1000)
    with pytest.raises(Exception, match=str(status)) as raised:
        acquire_job_lock(link.store, UID, VAULT)
    assert not isinstance(raised.value, AssertionError)
    assert len(link.proxy.requests) <= 10


# boto3 asks twice, or else the store does; obstore is told to ask twice, and the store does, too.
ASKED = {"s3": 2, "dynamodb": 2, "obstore": 4}


def test_an_error_that_lasts_is_asked_for_again_so_often(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere three times."""
    link.be_impatient(monkeypatch)
    link.answer(503, when=is_write, times=1000)
    with pytest.raises(Exception, match="503"):
        acquire_job_lock(link.store, UID, VAULT)
    writes = [request for request in link.proxy.requests if is_write(request)]
    assert len(writes) == ASKED.get(link.name.partition("-")[0], 3)


@pytest.mark.parametrize("name", ["s3-once", "azure", "gcs", "netlify-api", "netlify-edge"])
def test_a_connection_that_is_refused_is_tried_again(
    name: str, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is there after the first pause."""
    backend, prefix = backends[name], backends.new_prefix()
    with socket.socket() as reserved, ExitStack() as stack:
        reserved.bind(("127.0.0.1", 0))  # and it does not listen
        port = reserved.getsockname()[1]
        store = backend.open(stack, prefix, f"http://127.0.0.1:{port}")

        def start(_: float) -> None:
            reserved.close()
            stack.enter_context(lossy(backend.url, rewrite=True, port=port))

        module = import_module(f"joblock.stores.{name.partition('-')[0]}")
        monkeypatch.setattr(module._RETRY, "_sleep", start)
        assert acquire_job_lock(store, UID, VAULT)


def test_gcs_credentials_that_are_not_renewed_at_once(backends: Backends) -> None:
    """A connection to the tokens' server that fails has an error of its own."""
    transport: Any = pytest.importorskip("google.auth.exceptions").TransportError
    backend = backends["gcs"]
    with ExitStack() as stack:
        store: Any = backend.open(stack, backends.new_prefix())
        credentials = store._bucket.client._http.credentials
        before_request = credentials.before_request

        def fail_once(*_: Any) -> None:
            credentials.before_request = before_request
            raise transport("no token")

        credentials.before_request = fail_once
        assert acquire_job_lock(store, UID, VAULT)
        assert credentials.before_request == before_request


def test_gcs_records_are_not_cached(backends: Backends) -> None:
    """Else those that anybody may read are, for an hour."""
    backend = backends["gcs"]
    with lossy(backend.url, rewrite=True) as proxy, ExitStack() as stack:
        assert acquire_job_lock(backend.open(stack, backends.new_prefix(), proxy.url), UID, VAULT)
    assert b'"cacheControl": "no-store"' in proxy.requests[0].body


def test_a_refusal_of_another_kind_reaches_the_caller(link: Link) -> None:
    """Forbidden is not held, and is not asked twice."""
    link.answer(403, when=is_write)
    with pytest.raises(Exception, match="403|Forbidden"):
        acquire_job_lock(link.store, UID, VAULT)
    assert len([request for request in link.proxy.requests if is_write(request)]) == 1
    assert link.owner() is None


def test_a_removal_that_is_forbidden_reaches_the_caller(link: Link) -> None:
    """The lock stays, and is not said to be gone."""
    lock = link.taken()
    link.answer(403, when=link.is_removal)
    with pytest.raises(Exception, match="403|Forbidden"):
        release_job_lock(link.store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)
    assert link.owner() == lock.job_id


def test_a_read_that_is_forbidden_reaches_the_caller(link: Link) -> None:
    """It is not "no lock"."""
    link.taken()
    link.answer(403, when=is_read)
    with pytest.raises(Exception, match="403|Forbidden"):
        peek_job_lock(link.store, UID, VAULT)


def test_nobody_answers(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is closed: the SDK's error, or the system's, and nothing is taken."""
    link.be_impatient(monkeypatch)
    link.proxy.drop(times=1000)
    with pytest.raises(Exception, match=r".") as raised:
        acquire_job_lock(link.store, UID, VAULT)
    assert not isinstance(raised.value, AssertionError)
    assert link.owner() is None


@pytest.mark.parametrize("name", ["s3", "s3-tombstone"])
def test_s3_conditional_request_conflict_is_contention(name: str, backends: Backends) -> None:
    """409 means that another write is under way: look again, and say what is there then."""
    backend, prefix = backends[name], backends.new_prefix()
    with lossy(backend.url) as proxy, ExitStack() as stack:
        store = backend.open(stack, prefix, proxy.url)
        proxy.answer(409, CONFLICT, XML, when="PUT")
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        assert [request.status for request in proxy.requests] == [409, 404, 200]

        proxy.answer(409, CONFLICT, XML, when="PUT")
        assert held(acquire_job_lock(store, UID, VAULT)).existing == lock.record

        proxy.answer(409, CONFLICT, XML, when=lambda request: request.method in ("PUT", "DELETE"))
        assert release_job_lock(
            store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag
        ).released


@pytest.mark.parametrize("name", ["s3", "azure", "gcs"])
def test_a_bucket_that_is_missing_is_not_a_missing_lock(name: str, backends: Backends) -> None:
    """A wrong name must be told, by a read and by a removal too."""
    backend = backends[name]
    with ExitStack() as stack:
        store: Any = backend.open(stack, backends.new_prefix())
        if name == "s3":
            store._bucket = "missing"
        elif name == "azure":
            blob: Any = import_module("azure.storage.blob")
            make = blob.ContainerClient.from_connection_string
            store._container = stack.enter_context(make(azure_connection(backend.url), "missing"))
        else:
            store._bucket = store._bucket.client.bucket("missing")
        for ask in (peek_job_lock, acquire_job_lock, release_job_lock):
            with pytest.raises(Exception, match="(?i)bucket|container"):
                ask(store, UID, VAULT)


@pytest.mark.parametrize("name", ["s3", "azure", "gcs"])
def test_a_missing_lock_is_not_a_missing_bucket(name: str, backends: Backends) -> None:
    """Whatever its name says, which the service's answer may repeat."""
    backend = backends[name]
    uid = "x: The specified bucket does not exist."
    with ExitStack() as stack:
        store = backend.open(stack, backends.new_prefix())
        assert peek_job_lock(store, uid, VAULT) is None
        assert release_job_lock(store, uid, VAULT).released


def test_azure_refuses_a_backslash(backends: Backends) -> None:
    """It takes one for a slash, and two locks would become one; nothing is asked."""
    backend = backends["azure"]
    with lossy(backend.url) as proxy, ExitStack() as stack:
        store = backend.open(stack, backends.new_prefix(), proxy.url)
        with pytest.raises(ValueError, match="backslash"):
            acquire_job_lock(store, "a\\b", "c")
        assert proxy.requests == []


def test_time_outs(backends: Backends) -> None:
    """A write that the server commits and never answers is given up, sent again, and won."""

    def take(name: str) -> str | None:
        backend, prefix = backends[name], backends.new_prefix()
        with lossy(backend.url, rewrite=True) as proxy, ExitStack() as stack:
            proxy.hang(is_write)
            store = backend.open(stack, prefix, proxy.url)
            lock = acquired(acquire_job_lock(store, UID, VAULT))
            record = peek_job_lock(backend.open(stack, prefix), UID, VAULT)
            assert record == lock.record
            return lock.etag

    names = ["s3", "azure", "gcs", "netlify-api", "netlify-edge"]
    for name in names:
        assert backends[name].url
    with ThreadPoolExecutor(len(names)) as threads:
        assert all(threads.map(take, names))


@pytest.mark.parametrize("name", NAMES)
def test_requests(name: str, backends: Backends) -> None:
    """One for a free lock, two for a refusal, one to renew and one to release by the etag.

    And two to release without it. A tombstone makes the next acquire a takeover. Netlify's API, but
    not its edge, gives out a URL first, and its local server gives no ETag with a value, which is
    read again after the listing.
    """
    backend, prefix = backends[name], backends.new_prefix()
    with lossy(backend.url, rewrite=True) as proxy, ExitStack() as stack:
        store = backend.open(stack, prefix, proxy.url)
        proxy.requests.clear()  # what made DynamoDB's table
        counts: list[int] = []

        def count() -> None:
            counts.append(len(proxy.requests) - sum(counts))

        lock = acquired(acquire_job_lock(store, UID, VAULT))
        count()
        held(acquire_job_lock(store, UID, VAULT))
        count()
        renewed = renew_job_lock(
            store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag, record=lock.record
        )
        assert isinstance(renewed, Renewed)
        count()
        assert release_job_lock(
            store, UID, VAULT, expected_job_id=lock.job_id, etag=renewed.etag
        ).released
        count()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        count()
        assert release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id).released
        count()
    write, read = {"netlify-api": (2, 2 + 1 + 2), "netlify-edge": (1, 1 + 1 + 1)}.get(name, (1, 1))
    again = write + read + write if name in TOMBSTONE else write
    assert counts == [write, write + read, write, write, again, read + write]
