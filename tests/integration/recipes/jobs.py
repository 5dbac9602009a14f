"""The work itself, in place of yours: here it writes down when it runs, for the tests to read."""

import os
import time
from pathlib import Path


class TemporaryError(Exception):
    """What a retry may mend."""


def rebuild_index(user: str, vault: str) -> None:
    """Do what the vault's name says: take a moment, fail or hang the first time, wait for `go`."""
    folder = Path(os.environ["JOBS_FOLDER"])
    with (folder / "runs").open("a") as runs:
        runs.write(f"{vault} {os.getpid()} begins {time.time()}\n")
    first = not (folder / f"{vault}-began").exists()
    (folder / f"{vault}-began").touch()
    try:
        if first and vault.startswith("fails"):
            raise TemporaryError(vault)
        if first and vault.startswith("hangs"):
            time.sleep(600)
        while vault.startswith("waits") and not (folder / "go").exists():
            time.sleep(0.02)
        time.sleep(0.1)
    finally:
        with (folder / "runs").open("a") as runs:
            runs.write(f"{vault} {os.getpid()} ends {time.time()}\n")
