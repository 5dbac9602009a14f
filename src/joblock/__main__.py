"""The life of a lock, shown on a SQLite file: `python -m joblock`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import acquire_job_lock, release_job_lock
from .store import BlobStore
from .stores.sqlite import SqliteBlobStore


def click(store: BlobStore) -> str | None:
    """Answer one request to start the job, as a web handler would; return the job that runs."""
    lock = acquire_job_lock(store, "user-1", "Business")
    if lock:
        print(f"202  job {lock.job_id} started")
        return lock.job_id
    print(f"409  job {lock.existing.job_id} is running, retry after {lock.retry_after_s()} s")
    return lock.existing.job_id


def main() -> None:
    """Two clicks, the end of the job, and another click."""
    with tempfile.TemporaryDirectory() as folder, SqliteBlobStore(Path(folder, "jobs.db")) as store:
        job_id = click(store)
        click(store)
        released = release_job_lock(store, "user-1", "Business", expected_job_id=job_id)
        print(f"     job {job_id} ended, lock released: {released.released}")
        click(store)


if __name__ == "__main__":
    main()
