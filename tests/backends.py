"""The object stores' backends for the tests: a real server each, and stores that talk to it."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import pytest

from joblock import AsyncConditionalBlobStore, Blob, ConditionalBlobStore
from joblock._store import tells
from tests.gcs_server import gcs_server
from tests.servers import (
    AZURITE,
    azure_connection,
    azure_server,
    dynamodb_server,
    mariadb_server,
    netlify_server,
    postgresql_server,
    redis_server,
    s3_server,
)

T = TypeVar("T")

BUCKET = "jobs"
NETLIFY_TOKEN = "a token"
NAMES = ("s3", "s3-tombstone", "azure", "gcs", "netlify-api", "netlify-edge", "dynamodb")
OBJECT_STORES = ("obstore-s3", "obstore-s3-async", "obstore-azure")
SQL = ("postgresql-psycopg", "postgresql-asyncpg", "mariadb-pymysql", "mariadb-asyncmy")
DATABASES = ("redis", "redis-async", *SQL)
BY_CONTENT = (
    "s3",
    "s3-tombstone",
    "obstore-s3",
    "obstore-s3-async",
    "redis",
    "redis-async",
    "valkey",
)  # the etag is of the content, not of the version
RETRIES = {  # of boto3's client, where they are not those of joblock.stores.s3.QUICK
    "s3-once": {"total_max_attempts": 1},
    "s3-legacy": {"mode": "legacy", "total_max_attempts": 5},
}
TOMBSTONE = ("s3-tombstone", "netlify-api", "netlify-edge", *OBJECT_STORES)


Make = Callable[[str, ExitStack, str, str], ConditionalBlobStore]
"""A store, given one of NAMES, what closes its client, the URL and a prefix of its own."""


class FromThreads:
    """An async store as a blocking one, its coroutines run by an event loop in another thread."""

    def __init__(self, store: AsyncConditionalBlobStore, loop: asyncio.AbstractEventLoop) -> None:
        self._store, self._loop = store, loop
        if tells(store):
            self.set_if_new_or_get = self._set_if_new_or_get

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def get(self, key: str) -> str | bytes | None:
        return self.run(self._store.get(key))

    def set(self, key: str, value: str) -> None:
        self.run(self._store.set(key, value))

    def delete(self, key: str) -> None:
        self.run(self._store.delete(key))

    def get_with_etag(self, key: str) -> Blob | None:
        return self.run(self._store.get_with_etag(key))

    def set_if_new(self, key: str, value: str) -> str | None:
        return self.run(self._store.set_if_new(key, value))

    def _set_if_new_or_get(self, key: str, value: str) -> str | Blob | None:
        told: str | Blob | None = self.run(cast(Any, self._store).set_if_new_or_get(key, value))
        return told

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return self.run(self._store.set_if_match(key, value, etag))

    def delete_if_match(self, key: str, etag: str) -> bool:
        return self.run(self._store.delete_if_match(key, etag))

    def list_keys(self, prefix: str) -> list[str]:
        async def listed() -> list[str]:
            return [key async for key in cast(Any, self._store).list_keys(prefix)]

        return self.run(listed())

    def server_time_ms(self, key: str) -> tuple[float, float] | None:
        told: tuple[float, float] | None = self.run(cast(Any, self._store).server_time_ms(key))
        return told


def in_a_loop(
    store: AsyncConditionalBlobStore,
    close: Callable[[], Coroutine[Any, Any, object]] | None,
    stack: ExitStack,
) -> FromThreads:
    """Run an event loop in a thread until the stack is closed; then `close` is awaited."""
    loop = stack.enter_context(asyncio.Runner()).get_loop()
    thread = threading.Thread(target=loop.run_forever)
    made = FromThreads(store, loop)

    def stop() -> None:
        if close is not None:
            made.run(close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    thread.start()
    stack.callback(stop)
    return made


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
        kind, _, _ = name.removeprefix("obstore-").partition("-")
        if kind not in self._servers:
            self._servers[kind] = self._stack.enter_context(_SERVERS[kind]())
        url, make = self._servers[kind]
        return Backend(name, url, open_obstore if name in OBJECT_STORES else make)

    def new_prefix(self) -> str:
        """So that no test sees another's keys."""
        return f"test-{next(self._prefixes)}/"

    def close(self) -> None:
        self._stack.close()


def aws_client(service: str, stack: ExitStack, url: str, **config: Any) -> Any:
    boto3: Any = pytest.importorskip("boto3")
    from botocore.config import Config

    from joblock.stores._aws import QUICK

    client = boto3.client(
        service,
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=QUICK.merge(Config(max_pool_connections=24, **config)),
    )
    stack.callback(client.close)
    return client


def s3_client(stack: ExitStack, url: str, **config: Any) -> Any:
    return aws_client("s3", stack, url, **config)


def open_s3(name: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    config = {"retries": RETRIES[name]} if name in RETRIES else {}
    client = s3_client(stack, url, **config)
    from joblock.stores.s3 import S3BlobStore

    deletes = name not in TOMBSTONE
    return S3BlobStore(client, BUCKET, prefix=prefix, conditional_delete=deletes)


def open_dynamodb(_: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    """Each prefix is a table of its own."""
    client = aws_client("dynamodb", stack, url)
    from joblock.stores.dynamodb import TABLE, DynamoBlobStore

    table = prefix.strip("/")
    if table not in client.list_tables()["TableNames"]:
        client.create_table(TableName=table, **TABLE)
        client.get_waiter("table_exists").wait(TableName=table, WaiterConfig={"Delay": 0.01})
    return DynamoBlobStore(client, table)


@contextmanager
def _dynamodb() -> Generator[tuple[str, Make]]:
    pytest.importorskip("boto3")
    with dynamodb_server() as url:
        yield url, open_dynamodb


@contextmanager
def _s3() -> Generator[tuple[str, Make]]:
    pytest.importorskip("boto3")
    with s3_server() as url, ExitStack() as stack:
        s3_client(stack, url).create_bucket(Bucket=BUCKET)
        yield url, open_s3


def open_obstore(name: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    stores: Any = pytest.importorskip("obstore.store")
    from joblock.stores.object_store import AsyncObjectStoreBlobStore, ObjectStoreBlobStore

    options: dict[str, Any] = {
        "client_options": {
            "allow_http": True,
            "allow_invalid_certificates": True,  # it knows none but its own
            "timeout": "10s",
        },
        "retry_config": {"max_retries": 1, "backoff": {"init_backoff": timedelta(milliseconds=1)}},
    }
    if name == "obstore-azure":
        at = f"{url}/devstoreaccount1"
        store = stores.AzureStore(BUCKET, use_emulator=False, endpoint=at, **AZURITE, **options)
    else:
        keys = {"access_key_id": "any", "secret_access_key": "any", "region": "us-east-1"}
        store = stores.S3Store(BUCKET, endpoint=url, **keys, **options)
    if name.endswith("-async"):
        return in_a_loop(AsyncObjectStoreBlobStore(store, prefix=prefix), None, stack)
    return ObjectStoreBlobStore(store, prefix=prefix)


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


def open_redis(name: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    redis: Any = pytest.importorskip("redis")
    from joblock.stores.redis import AsyncRedisBlobStore, RedisBlobStore

    if name in ("redis", "valkey"):
        return RedisBlobStore(stack.enter_context(redis.Redis.from_url(url)), prefix=prefix)
    client = importlib.import_module("redis.asyncio").Redis.from_url(url)
    return in_a_loop(AsyncRedisBlobStore(client, prefix=prefix), client.aclose, stack)


@contextmanager
def _redis(program: str = "redis-server") -> Generator[tuple[str, Make]]:
    pytest.importorskip("redis")
    with redis_server(program=program) as server:
        yield server.url, open_redis


def open_sql(name: str, stack: ExitStack, url: str, prefix: str) -> ConditionalBlobStore:
    """Each prefix is a table of its own."""
    sqlalchemy: Any = pytest.importorskip("sqlalchemy")
    driver = name.partition("-")[2]
    pytest.importorskip(driver)
    from joblock.stores.sql import AsyncSqlBlobStore, SqlBlobStore

    table = prefix.strip("/")
    place = sqlalchemy.make_url(url)
    place = place.set(drivername=f"{place.get_backend_name()}+{driver}")
    if driver in ("psycopg", "pymysql"):
        engine = sqlalchemy.create_engine(place, max_overflow=30)
        stack.callback(engine.dispose)
        store = SqlBlobStore(engine, table=table)
        store.create_table()
        return store
    make = importlib.import_module("sqlalchemy.ext.asyncio").create_async_engine
    engine = make(place, max_overflow=30)
    made = AsyncSqlBlobStore(engine, table=table)
    threads = in_a_loop(made, engine.dispose, stack)
    threads.run(made.create_table())
    return threads


@contextmanager
def _postgresql() -> Generator[tuple[str, Make]]:
    pytest.importorskip("psycopg")
    with postgresql_server() as server:
        yield server.url, open_sql


@contextmanager
def _mariadb() -> Generator[tuple[str, Make]]:
    pytest.importorskip("pymysql")
    with mariadb_server() as server:
        yield server.url, open_sql


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


_SERVERS: dict[str, Callable[[], AbstractContextManager[tuple[str, Make]]]] = {
    "s3": _s3,
    "azure": _azure,
    "gcs": _gcs,
    "netlify": _netlify,
    "dynamodb": _dynamodb,
    "redis": _redis,
    "valkey": lambda: _redis("valkey-server"),
    "postgresql": _postgresql,
    "mariadb": _mariadb,
}
