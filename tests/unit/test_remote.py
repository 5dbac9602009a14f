"""What the remote stores share: the pause before a request is sent again, and `Pool`.

A `Pool`'s forked child is this process, which is told that it is another one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from joblock.stores._remote import CutReplyError, Pool, Retry, dated
from tests.backends import azure_client, gcs_client, s3_client

NOWHERE = "http://127.0.0.1:1"


def test_a_pause_before_it_is_sent_again() -> None:
    """Between half of it and the whole, so that clients do not go in step."""
    sent: list[float] = []

    def send() -> str:
        sent.append(time.monotonic())
        if len(sent) == 1:
            raise OSError
        return "answer"

    assert Retry(lambda _: True, pauses_s=(0.1,)).ask(send) == ("answer", True)
    assert sent[1] - sent[0] >= 0.05


class Session:
    def __init__(self) -> None:
        self.closed: list[int] = []
        self.until: list[threading.Event] = []

    def close(self) -> None:
        self.closed.append(os.getpid())
        if self.until:
            assert self.until.pop(0).wait(30)


def become(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: pid)


def test_once_in_each_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never in the process that made it."""
    session = Session()
    pool = Pool(lambda: session)
    pool.check()
    for pid in (-1, -1, -2, -2):
        become(pid, monkeypatch)
        pool.check()
    assert session.closed == [-1, -2]


def test_a_childs_threads_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """None asks before they are closed, and none is asking while they are."""
    session, closed = Session(), threading.Event()
    session.until.append(closed)
    pool = Pool(lambda: session)
    become(-1, monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        checks = [threads.submit(pool.check) for _ in range(4)]
        time.sleep(0.1)
        assert not any(check.done() for check in checks)
        closed.set()
        for check in checks:
            check.result(30)
    assert session.closed == [-1]


def test_a_fork_while_a_thread_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new child does not wait for a thread that it does not have."""
    session, closed = Session(), threading.Event()
    session.until.append(closed)
    pool = Pool(lambda: session)
    become(-1, monkeypatch)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pool.check)
        while session.closed != [-1]:
            time.sleep(0.001)
        become(-2, monkeypatch)
        second = threads.submit(pool.check)
        try:
            second.result(30)
        finally:
            closed.set()
        first.result(30)
    assert session.closed == [-1, -2]


def test_a_client_that_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with another transport, or with none yet."""
    pools = [Pool(lambda: None), Pool(object)]
    become(-1, monkeypatch)
    for pool in pools:
        pool.check()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_s3(stack: ExitStack) -> None:
    """The client closes its own."""
    client = s3_client(stack, NOWHERE)
    from joblock.stores.s3 import S3BlobStore

    assert S3BlobStore(client, "b")._pool._keeper() is client


def test_gcs(stack: ExitStack) -> None:
    """The session, and with it that of the credentials."""
    client = gcs_client(stack, NOWHERE)
    from joblock.stores.gcs import GcsBlobStore

    assert GcsBlobStore(client.bucket("b"))._pool._keeper() is client._http


def test_azure(stack: ExitStack) -> None:
    """The session of the transport, which is wrapped where another client made this one."""
    container = azure_client(stack, NOWHERE)
    blob: Any = pytest.importorskip("azure.storage.blob")
    from joblock.stores.azure import AzureBlobStore

    service = blob.BlobServiceClient(f"{NOWHERE}/a", transport=container._pipeline._transport)
    for client in (container, service.get_container_client("c")):
        assert AzureBlobStore(client)._pool._keeper() is container._pipeline._transport.session
        assert hasattr(AzureBlobStore(client)._pool._keeper(), "close")


def test_azure_with_another_transport(stack: ExitStack) -> None:
    """It has no session, so none is closed."""
    blob: Any = pytest.importorskip("azure.storage.blob")
    from joblock.stores.azure import AzureBlobStore

    client = blob.ContainerClient(f"{NOWHERE}/a", "c", transport=object())
    assert AzureBlobStore(client)._pool._keeper() is None


def test_a_value_of_azures_that_is_too_short() -> None:
    """The length was told, and not kept: it is asked for again, and then it is an error."""
    pytest.importorskip("azure.storage.blob")
    from joblock.stores.azure import AzureBlobStore

    asked: list[str] = []

    class Cut:
        size = 5

        def readall(self) -> bytes:
            asked.append("again")
            return b""

    class Blob:
        def download_blob(self, **_: object) -> Cut:
            return Cut()

    class Container:
        container_name = "jobs"

        def get_blob_client(self, _name: str) -> Blob:
            return Blob()

    container: Any = Container()
    with pytest.raises(CutReplyError, match="0 bytes of a value of 5"):
        AzureBlobStore(container).get("k")
    assert len(asked) == 3


def test_what_a_reply_is_dated() -> None:
    """Some time of that second; nothing is known of a reply that has no date."""
    assert dated("Thu, 01 Jan 1970 00:00:10 GMT") == (10_000, 10_999)
    assert dated(None) is None
