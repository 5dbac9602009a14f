"""The stores that ship, a module each; none is imported before it is asked for."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .._store import ConditionalBlobStore

__all__ = ["open_store"]

_URLS = (
    "sqlite:PATH, redis://HOST, postgresql+psycopg://HOST/DATABASE, mysql+pymysql://HOST/DATABASE, "
    "dynamodb://TABLE, s3://BUCKET/PREFIX, azure://CONTAINER/PREFIX, gs://BUCKET/PREFIX, "
    "netlify:STORE or memory:"
)


def open_store(url: str | None = None) -> ConditionalBlobStore:
    """Return the store that `url` names, with the credentials that its SDK finds by itself.

    - `sqlite:jobs.db` or `sqlite:/var/lib/app/jobs.db`: `SqliteBlobStore`.
    - `s3://bucket/prefix`: `S3BlobStore`; with `?conditional_delete=false` for MinIO and R2, whose
      address boto3 takes from `AWS_ENDPOINT_URL_S3`.
    - `azure://container/prefix`: `AzureBlobStore`; from `AZURE_STORAGE_CONNECTION_STRING`, or from
      `AZURE_STORAGE_ACCOUNT` and azure-identity's `DefaultAzureCredential`.
    - `gs://bucket/prefix`: `GcsBlobStore`.
    - `redis://host:6379/0` or `rediss://...`: `RedisBlobStore`.
    - `postgresql+psycopg://user@host/database`, `mysql+pymysql://...` and others that SQLAlchemy
      knows, each with its driver: `SqlBlobStore`, in the table `joblock`, which must be there.
    - `dynamodb://table`: `DynamoBlobStore`.
    - `netlify:store`: `NetlifyBlobStore`; from `NETLIFY_BLOBS_CONTEXT`, or from `NETLIFY_SITE_ID`
      and `NETLIFY_AUTH_TOKEN`.
    - `memory:`: a new, empty `MemoryBlobStore`.

    Without a URL, the environment's `JOBLOCK_STORE` is it; else it is the SQLite file `jobs.db` of
    this user, in the folder where programs keep their state, as for the command `joblock`.

    A prefix stands before each key with a slash in between. A path has no `?` and no two slashes
    in front.

    Raises:
        ValueError: the URL is none of these, or the environment lacks what it needs.
        RuntimeError: without a URL, this user has no home.
        ImportError: the SDK is not installed; the text has the command that installs it.
        Exception: what the SDK, or SQLite, raised.
    """
    if url is None:
        url = os.environ.get("JOBLOCK_STORE")
        if url is None:
            return _default_store()
    scheme, colon, rest = url.partition(":")
    match scheme:
        case "memory":
            if rest:
                raise ValueError("memory: has no more to it, since it is new each time")
            from .memory import MemoryBlobStore

            return MemoryBlobStore()
        case "sqlite":
            if re.match("//(?!/)|.*[?]", rest):
                raise ValueError("sqlite: takes a path as it is, such as sqlite:/srv/jobs.db")
            from .sqlite import SqliteBlobStore

            return SqliteBlobStore(rest)
        case "s3":
            from .s3 import connect as connect_s3

            rest, _, option = rest.partition("?")
            if option not in ("", "conditional_delete=false"):
                raise ValueError("the only option of s3: is ?conditional_delete=false")
            return connect_s3(*_place(rest), conditional_delete=not option)
        case "dynamodb":
            from .dynamodb import connect as connect_dynamodb

            table = re.fullmatch("//([A-Za-z0-9_.-]{3,255})", rest)
            if table is None:
                raise ValueError("a table's URL is dynamodb://TABLE")
            return connect_dynamodb(table[1])
        case "azure":
            from .azure import connect as connect_azure

            return connect_azure(*_place(rest))
        case "gs":
            from .gcs import connect as connect_gcs

            return connect_gcs(*_place(rest))
        case "redis" | "rediss":
            from .redis import connect as connect_redis

            return connect_redis(url)
        case "netlify":
            from .netlify import connect as connect_netlify

            return connect_netlify(rest)
        case _ if colon and re.fullmatch("(postgresql|mysql|mariadb|sqlite)[+][a-z0-9]+", scheme):
            from .sql import connect as connect_sql

            return connect_sql(url)
        case _:
            raise ValueError(f"a store is {_URLS}{_mistaken(url)}")


def _mistaken(url: str) -> str:
    """What is said of a URL that is none: not itself, for it may be a password, or have one."""
    scheme, colon, _ = url.partition(":")
    if colon and re.fullmatch("[a-z0-9+]{2,}", scheme):
        return f"; there is no {scheme!r}"
    if not url:
        return "; this is empty"
    if re.fullmatch(r"([A-Za-z]:)?[^:;=?@]*([/\\][^:;=?@]*|\.(db|sqlite3?))", url):
        return "; this looks like a file's path: put sqlite: before it"
    return ""


def _default_store() -> ConditionalBlobStore:
    from .sqlite import SqliteBlobStore

    folder = _state_folder(sys.platform, os.environ)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return SqliteBlobStore(folder / "jobs.db")


def _state_folder(platform: str, environ: Mapping[str, str]) -> Path:
    """Return where programs keep such files on this platform; RuntimeError if there is no home."""
    from pathlib import Path

    if platform == "win32":
        local = environ.get("LOCALAPPDATA", "")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "joblock"
    state = Path(environ.get("XDG_STATE_HOME", ""))
    if platform != "darwin" and state.is_absolute():
        return state / "joblock"
    if not Path(environ.get("HOME", "/")).is_absolute():  # Path.home() takes "" for /
        raise RuntimeError("Could not determine home directory.")
    place = ("Library", "Application Support") if platform == "darwin" else (".local", "state")
    return Path.home().joinpath(*place, "joblock")


def _place(rest: str) -> tuple[str, str]:
    place = re.fullmatch("//([^/@?#\\s]+)(?:/(.*))?", rest)
    if place is None:
        raise ValueError(f"a store is {_URLS}")
    name, prefix = place.groups(default="")
    return name, f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
