"""Requests for each job on S3, counted on a local server, and what they cost at list price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from joblock import BlobStore, acquire_job_lock, release_job_lock, resume_job_lock
from tests.support import KEY, UID, VAULT, acquired, held

from .table import Row

DOLLARS_PER_MILLION = {"PUT": 5.00, "GET": 0.40, "DELETE": 0.00}
"""S3 Standard, us-east-1: 0.005 and 0.0004 dollars per 1,000; a refused PUT is paid too."""

BUCKET = "jobs"


def requests(*, quick: bool) -> Iterator[Row]:
    """What one job sends; nothing is timed, so quick mode is the same."""
    try:
        boto3: Any = import_module("boto3")
        import_module("moto.server")
    except ModuleNotFoundError as error:
        yield Row("joblock and others on S3", "-", f"not installed: {error.name}")
        return
    from tests.servers import s3_server  # it needs pytest

    with s3_server() as url:
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="none",
            aws_secret_access_key="none",
        )
        client.create_bucket(Bucket=BUCKET)
        try:
            yield from _rows(client)
        finally:
            client.close()


def _rows(client: Any) -> Iterator[Row]:
    from joblock.stores.s3 import S3BlobStore

    sent: Counter[str] = Counter()

    def count(request: Any, **_: Any) -> None:
        sent[request.method] += 1

    client.meta.events.register("before-send.s3", count)
    store = S3BlobStore(client, BUCKET)
    plain = _Plain(store)
    jobs: dict[str, Callable[[], object]] = {
        "joblock, a job, with the etag": lambda: _with_etag(store),
        "joblock, a job, by job id": lambda: _by_id(store),
        "joblock, a job that a worker resumes": lambda: _resumed(store),
        "the original's algorithm, a job": lambda: _by_id(plain),
        "get, check, put, delete, a job": lambda: _get_check_put(client),
        "Terraform's lockfile, a job": lambda: _lockfile(client),
    }
    for name, job in jobs.items():
        sent.clear()
        job()
        yield _row(name, sent)
    for name, contended in (("joblock", store), ("the original's algorithm", plain)):
        acquired(acquire_job_lock(contended, UID, VAULT))
        sent.clear()
        held(acquire_job_lock(contended, UID, VAULT))
        yield _row(f"{name}, a refused click", sent)
        release_job_lock(contended, UID, VAULT)


def _row(name: str, sent: Counter[str]) -> Row:
    if not sent:
        raise RuntimeError(f"no request was seen: {name}")
    dollars = sum(DOLLARS_PER_MILLION[method] * count for method, count in sent.items())
    terms = [
        f"{count} {method} x {DOLLARS_PER_MILLION[method]:.2f}" for method, count in sent.items()
    ]
    return Row(name, f"{sent.total()}", f"${dollars:.2f} = {' + '.join(terms)}")


class _Plain:
    """The same bucket, with the original's three methods only."""

    def __init__(self, store: BlobStore) -> None:
        self.get, self.set, self.delete = store.get, store.set, store.delete


def _with_etag(store: BlobStore) -> None:
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)


def _by_id(store: BlobStore) -> None:
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id)


def _resumed(store: BlobStore) -> None:
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    with resume_job_lock(store, UID, VAULT, expected_job_id=lock.job_id):
        pass


def _get_check_put(client: Any) -> None:
    """The usual recipe; two callers that arrive together both win."""
    try:
        client.get_object(Bucket=BUCKET, Key=KEY)
    except client.exceptions.NoSuchKey:
        client.put_object(Bucket=BUCKET, Key=KEY, Body=b"mine")
        client.delete_object(Bucket=BUCKET, Key=KEY)


def _lockfile(client: Any) -> None:
    """Terraform's `use_lockfile`: create it; then read whose it is and delete it."""
    client.put_object(Bucket=BUCKET, Key=KEY, Body=b"mine", IfNoneMatch="*")
    if client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == b"mine":
        client.delete_object(Bucket=BUCKET, Key=KEY)
