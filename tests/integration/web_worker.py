"""The background job of the web test: works until told to stop, then releases with its job id."""

from __future__ import annotations

import sys

from joblock import release_job_lock
from joblock.stores.sqlite import SqliteBlobStore


def main(path: str, canister_uid: str, vault_id: str, job_id: str) -> None:
    sys.stdin.readline()
    with SqliteBlobStore(path) as store:
        released = release_job_lock(store, canister_uid, vault_id, expected_job_id=job_id)
    sys.exit(0 if released else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
