"""`open_store`: a store from a URL, and a clear word about what cannot be opened."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from joblock import MemoryBlobStore, aio
from joblock.stores import open_store
from joblock.stores.sqlite import SqliteBlobStore


def test_memory() -> None:
    """A new one each time."""
    first, second = open_store("memory:"), open_store("memory:")
    assert isinstance(first, MemoryBlobStore)
    assert first is not second


def test_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, from the working directory or absolute."""
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite:jobs.db", f"sqlite:{tmp_path}/jobs.db", f"sqlite://{tmp_path}/jobs.db"):
        store = open_store(url)
        assert isinstance(store, SqliteBlobStore)
        with store:
            assert repr(store) == f"SqliteBlobStore({str(tmp_path / 'jobs.db')!r})"
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.db"]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "a store is sqlite:PATH, .*; this is empty"),
        (
            "jobs.db",
            "a store is sqlite:PATH, .*; this looks like a file's path: put sqlite: before",
        ),
        ("/srv/jobs/locks", "put sqlite: before it"),
        ("C:\\jobs\\locks.db", "put sqlite: before it"),
        ("AccountName=a;AccountKey=secret=;", "a store is sqlite:PATH"),
        ("AccountKey=secret;BlobEndpoint=https://x", "a store is sqlite:PATH"),
        ("mongodb://user:secret@host", "there is no 'mongodb'"),
        ("postgresql://user:secret@host", "there is no 'postgresql'"),
        ("5ec2e7", "or memory:$"),
        ("memory:x", "memory: has no more to it"),
        ("sqlite:", "path must name a file"),
        ("sqlite://jobs.db", "a path as it is"),
        ("sqlite:jobs.db?mode=ro", "a path as it is"),
    ],
)
def test_a_bad_url(url: str, problem: str) -> None:
    """One line, with what there is, and without what may be a password."""
    with pytest.raises(ValueError, match=problem) as raised:
        open_store(url)
    assert "\n" not in str(raised.value)
    assert not re.search("secret|5ec2e7", str(raised.value))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3:", "s3://BUCKET/PREFIX"),
        ("s3:bucket", "s3://BUCKET/PREFIX"),
        ("s3://", "s3://BUCKET/PREFIX"),
        ("s3:///prefix", "s3://BUCKET/PREFIX"),
        ("s3://user:secret@bucket", "s3://BUCKET/PREFIX"),
        ("s3://bucket?region=x", "conditional_delete=false"),
        ("s3://my bucket", "s3://BUCKET/PREFIX"),
    ],
)
def test_a_bad_place(url: str, problem: str) -> None:
    """The same for a bucket."""
    pytest.importorskip("boto3")
    with pytest.raises(ValueError, match=problem) as raised:
        open_store(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", "S3BlobStore('bucket', prefix='')"),
        ("s3://bucket/", "S3BlobStore('bucket', prefix='')"),
        ("s3://bucket/a/b", "S3BlobStore('bucket', prefix='a/b/')"),
        ("s3://bucket/a/?conditional_delete=false", "S3BlobStore('bucket', prefix='a/')"),
    ],
)
def test_s3(url: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and region are those of boto3's own search."""
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    store: Any = open_store(url)
    assert repr(store) == expected
    assert store.leaves_null is ("conditional_delete=false" in url)
    assert store._client.meta.region_name == "eu-central-1"
    assert store._client.meta.config.read_timeout == 10
    store._client.close()


def test_dynamodb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's name, and nothing else."""
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    store: Any = open_store("dynamodb://jobs")
    assert repr(store) == "DynamoBlobStore('jobs')"
    assert store._client.meta.config.read_timeout == 10
    store._client.close()
    for url in ("dynamodb:jobs", "dynamodb://", "dynamodb://a", "dynamodb://u:secret@jobs"):
        with pytest.raises(ValueError, match="is dynamodb://TABLE$"):
            open_store(url)


def test_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection string, or an account's name and azure-identity; else it says what to set."""
    pytest.importorskip("azure.storage.blob")
    pytest.importorskip("azure.identity")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    with pytest.raises(ValueError, match="AZURE_STORAGE_ACCOUNT"):
        open_store("azure://jobs")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acme")
    store: Any = open_store("azure://jobs/locks")
    assert repr(store) == "AzureBlobStore('jobs', prefix='locks/')"
    assert store._container.url == "https://acme.blob.core.windows.net/jobs"
    store._container.close()
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        "AccountName=other;AccountKey=eA==;BlobEndpoint=http://127.0.0.1:1/other;",
    )
    store = open_store("azure://jobs")
    assert store._container.url == "http://127.0.0.1:1/other/jobs"
    store._container.close()


def test_gcs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's own environment, such as an emulator's."""
    pytest.importorskip("google.cloud.storage")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "any")
    store: Any = open_store("gs://bucket/locks")
    assert repr(store) == "GcsBlobStore('bucket', prefix='locks/')"
    store._bucket.client.close()


def test_netlify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Netlify's own variables, of its functions first, then of its command line."""
    for name in ("NETLIFY_BLOBS_CONTEXT", "NETLIFY_SITE_ID", "NETLIFY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="site_id and token"):
        open_store("netlify:jobs")
    monkeypatch.setenv("NETLIFY_SITE_ID", "s")
    monkeypatch.setenv("NETLIFY_AUTH_TOKEN", "t")
    assert repr(open_store("netlify:jobs")) == "NetlifyBlobStore('jobs')"
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        open_store("netlify:")


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("s3://bucket", "s3"),
        ("dynamodb://jobs", "dynamodb"),
        ("azure://jobs", "azure"),
        ("gs://bucket", "gcs"),
    ],
)
def test_a_missing_sdk(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command that installs it."""
    for module in ("s3", "dynamodb", "_aws", "azure", "gcs"):
        monkeypatch.delitem(sys.modules, f"joblock.stores.{module}", raising=False)
    for sdk in ("boto3", "botocore", "azure", "google", "requests"):
        for module in [name for name in sys.modules if name.partition(".")[0] == sdk]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, sdk, None)  # as if it were not installed
    with pytest.raises(
        ImportError, match=rf'is missing: python -m pip install "joblock\[{extra}\]"$'
    ):
        open_store(url)


def test_a_python_without_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package of pip's would help, so Python's own error is it."""
    monkeypatch.delitem(sys.modules, "joblock.stores.sqlite", raising=False)
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with pytest.raises(ModuleNotFoundError, match="sqlite3"):
        open_store("sqlite:jobs.db")


@pytest.mark.parametrize(
    ("module", "sdk", "extra"),
    [
        ("s3", "botocore.exceptions", "s3"),
        ("dynamodb", "botocore.exceptions", "dynamodb"),
        ("azure", "azure.core", "azure"),
        ("gcs", "requests", "gcs"),
        ("redis", "redis.asyncio", "redis"),
        ("object_store", "obstore", "object-store"),
        ("sql", "sqlalchemy", "sql"),
    ],
)
def test_a_store_module_without_its_sdk(
    module: str, sdk: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported by hand, or by `help()`: it says what to install."""
    monkeypatch.delitem(sys.modules, f"joblock.stores.{module}", raising=False)
    monkeypatch.setitem(sys.modules, sdk, None)
    with pytest.raises(ImportError, match=rf'python -m pip install "joblock\[{extra}\]"$'):
        import_module(f"joblock.stores.{module}")


def test_azure_without_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's second package is needed only without a connection string."""
    pytest.importorskip("azure.storage.blob")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acme")
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(ImportError, match=r'azure.identity is missing: .*"joblock\[azure\]"$'):
        open_store("azure://jobs")


@pytest.mark.parametrize("url", [None, "sqlite:other.db"])
def test_without_a_url(url: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's: what the environment names, else a file of this user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("JOBLOCK_STORE", raising=False)
    if url is not None:
        monkeypatch.setenv("JOBLOCK_STORE", url)
    file = tmp_path / ("joblock/jobs.db" if url is None else "other.db")
    blocking: Any = open_store()
    threaded: Any = aio.open_store()
    for store in (blocking, threaded._store):
        assert repr(store) == f"SqliteBlobStore({str(file)!r})"
        store.close()
    assert file.exists()


def test_async_stores(tmp_path: Path) -> None:
    """The native one where there is one, else threads around the blocking one."""
    assert isinstance(aio.open_store("memory:"), aio.AsyncMemoryBlobStore)
    threaded: Any = aio.open_store(f"sqlite:{tmp_path}/jobs.db")
    assert repr(threaded).startswith("ThreadedBlobStore(SqliteBlobStore(")
    threaded._store.close()
    with pytest.raises(ValueError, match="there is no 'mongodb'"):
        aio.open_store("mongodb://host")


def test_async_redis() -> None:
    """Nothing is asked of the server yet."""
    pytest.importorskip("redis")
    assert repr(aio.open_store("redis://127.0.0.1:1/0")) == "AsyncRedisBlobStore(prefix='')"


def test_databases() -> None:
    """Sync and async by the driver; no password is shown; an unknown driver says what to do."""
    pytest.importorskip("psycopg")
    pytest.importorskip("asyncpg")
    pytest.importorskip("pymysql")
    at = "joblock:hush@127.0.0.1/jobs"
    shown = "'postgresql+{}://joblock:***@127.0.0.1/jobs', table='joblock')"
    sync, native = open_store(f"postgresql+psycopg://{at}"), aio.open_store
    assert repr(sync) == f"SqlBlobStore({shown.format('psycopg')}"
    for driver in ("psycopg", "asyncpg"):
        named = repr(native(f"postgresql+{driver}://{at}"))
        assert named == f"AsyncSqlBlobStore({shown.format(driver)}"
    assert repr(native(f"mysql+pymysql://{at}")).startswith("ThreadedBlobStore(SqlBlobStore('mysql")
    for url, problem in {
        f"postgresql+asyncpg://{at}": "asyncpg is async: use AsyncSqlBlobStore",
        f"postgresql+nothing://{at}": "SQLAlchemy knows no 'postgresql.nothing'",
        "postgresql+psycopg://joblock:hush@127.0.0.1:port/jobs": "SQLAlchemy takes no such URL",
    }.items():
        with pytest.raises(ValueError, match=problem) as raised:
            open_store(url)
        assert "hush" not in str(raised.value)
    with pytest.raises(ImportError, match=r'is missing: .* "joblock\[sql\]" cymysql$'):
        open_store(f"mysql+cymysql://{at}")
