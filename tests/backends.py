"""The object stores' backends for the tests: a real server each, and stores that talk to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from joblock import ConditionalBlobStore
from tests.gcs_server import gcs_server
from tests.servers import azure_connection, azure_server, netlify_server, s3_server

BUCKET = "jobs"
NETLIFY_TOKEN = "a token"
NAMES = ("s3", "s3-tombstone", "azure", "gcs", "netlify-api", "netlify-edge")
BY_CONTENT = ("s3", "s3-tombstone")  # an S3 etag is that of the content, not of the version
RETRIES = {  # of boto3's client, where they are not those of joblock.stores.s3.QUICK
    "s3-once": {"total_max_attempts": 1},
    "s3-legacy": {"mode": "legacy", "total_max_attempts": 5},
}
TOMBSTONE = ("s3-tombstone", "netlify-api", "netlify-edge")


Make = Callable[[str, ExitStack, str, str], ConditionalBlobStore]
"""A store, given one of NAMES, what closes its client, the URL and a prefix of its own."""


@dataclass
class Backend:
    """A server that runs at `url`."""

    name: str
    url: str
    _make: Make

    def open(self, stack: ExitStack, prefix: str, url: str | None = None) -> ConditionalBlobStore:
        """A store that talks to the server, or to a proxy before it, at `url`."""
        return self._make(self.name, stack, url or self.url, prefix)


class Backends:
    """Each server is started when it is first needed, and runs until the end of the session."""

    def __init__(self) -> None:
        self._servers: dict[str, tuple[str, Make]] = {}
        self._stack = ExitStack()
        self._prefixes = itertools.count()

    def __getitem__(self, name: str) -> Backend:
        kind, _, _ = name.partition("-")
        if kind not in self._servers:
            start = {"s3": _s3, "azure": _azure, "gcs": _gcs, "netlify": _netlify}[kind]
            self._servers[kind] = self._stack.enter_context(start())
        return Backend(name, *self._servers[kind])

    def new_prefix(self) -> str:
        """So that no test sees another's keys."""
        return f"test-{next(self._prefixes)}/"

    def close(self) -> None:
        self._stack.close()


def s3_client(stack: ExitStack, url: str, **config: Any) -> Any:
    boto3: Any = pytest.importorskip("boto3")
    from botocore.config import Config

    from joblock.stores.s3 import QUICK

    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=QUICK.merge(Config(max_pool_connections=24, **config)),
    )
    stack.callback(client.close)
    return client


def open_s3(name: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    config = {"retries": RETRIES[name]} if name in RETRIES else {}
    client = s3_client(stack, url, **config)
    from joblock.stores.s3 import S3BlobStore

    deletes = name not in TOMBSTONE
    return S3BlobStore(client, BUCKET, prefix=prefix, conditional_delete=deletes)


@contextmanager
def _s3() -> Generator[tuple[str, Make]]:
    pytest.importorskip("boto3")
    with s3_server() as url, ExitStack() as stack:
        s3_client(stack, url).create_bucket(Bucket=BUCKET)
        yield url, open_s3


def azure_client(stack: ExitStack, url: str) -> Any:
    blob: Any = pytest.importorskip("azure.storage.blob")
    make = blob.ContainerClient.from_connection_string
    return stack.enter_context(make(azure_connection(url), BUCKET))


def open_azure(_: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    client = azure_client(stack, url)
    from joblock.stores.azure import AzureBlobStore

    return AzureBlobStore(client, prefix=prefix)


@contextmanager
def _azure() -> Generator[tuple[str, Make]]:
    pytest.importorskip("azure.storage.blob")
    with azure_server() as url, ExitStack() as stack:
        azure_client(stack, url).create_container()
        yield url, open_azure


def gcs_client(stack: ExitStack, url: str) -> Any:
    storage: Any = pytest.importorskip("google.cloud.storage")
    credentials: Any = pytest.importorskip("google.auth.credentials")
    anonymous = credentials.AnonymousCredentials()
    options = {"api_endpoint": url}
    made = storage.Client(project="any", credentials=anonymous, client_options=options)
    stack.callback(made.close)
    return made


def open_gcs(_: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    bucket = gcs_client(stack, url).bucket(BUCKET)
    from joblock.stores.gcs import GcsBlobStore

    return GcsBlobStore(bucket, prefix=prefix)


@contextmanager
def _gcs() -> Generator[tuple[str, Make]]:
    pytest.importorskip("google.cloud.storage")
    with gcs_server() as url, ExitStack() as stack, pytest.MonkeyPatch.context() as environment:
        # Else the SDK asks for its bucket in the background, and takes the proxy's next rule.
        environment.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        gcs_client(stack, url).create_bucket(BUCKET)
        yield url, open_gcs


@contextmanager
def _netlify() -> Generator[tuple[str, Make]]:
    from joblock.stores.netlify import NetlifyBlobStore

    with netlify_server() as server:
        assert server.token == NETLIFY_TOKEN

        def open_(name: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
            mode = {"edge_url": url} if name == "netlify-edge" else {"api_url": url}
            store = NetlifyBlobStore(
                prefix.strip("/"), site_id="site", token=server.token, timeout=1.0, **mode
            )
            return stack.enter_context(store)

        yield server.url, open_
