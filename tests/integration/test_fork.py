"""A store whose client is shared by a parent and the children that it forks."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from joblock import acquire_job_lock
from tests.backends import Backends
from tests.lossy import lossy
from tests.support import acquired

ROUNDS = 5
CODE = """
import os, sys, time, warnings
from contextlib import ExitStack
import joblock
from tests import backends
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: on purpose
name, url, prefix, rounds = sys.argv[1:]
with ExitStack() as stack:
    store = getattr(backends, f"open_{name}")(name, stack, url, prefix)
    joblock.peek_job_lock(store, "u", "parents")  # opens a connection
    for number in range(int(rounds)):
        free, go, pids = f"free-{number}", time.monotonic() + 0.05, []
        for vault in ("held", free):
            pid = os.fork()
            if pid == 0:
                try:
                    time.sleep(max(0, go - time.monotonic()))
                    result = joblock.acquire_job_lock(store, "u", vault)
                    record = result.record if result.acquired else result.existing
                    if (record.vault_id, result.acquired) != (vault, vault == free):
                        print(vault, "got", result, flush=True)
                except BaseException as error:
                    print(vault, "got", repr(error), flush=True)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        joblock.peek_job_lock(store, "u", "parents")
print("done")
"""


@pytest.mark.parametrize("name", ["s3", "azure", "gcs"])
def test_children_have_connections_of_their_own(name: str, backends: Backends) -> None:
    """Each gets its own answer, and the parent goes on with the connection that it had."""
    backend, prefix = backends[name], backends.new_prefix()
    with lossy(backend.url, rewrite=True, keep_alive=True) as proxy, ExitStack() as stack:
        acquired(acquire_job_lock(backend.open(stack, prefix), "u", "held"))
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", CODE, name, proxy.url, prefix, str(ROUNDS)],
            capture_output=True,
            check=False,
            cwd=Path(__file__).parents[2],
            text=True,
            timeout=60,
        )
    assert result.stdout == "done\n", result.stderr
    mine = [request.port for request in proxy.requests if "parents" in request.path]
    theirs = [request.port for request in proxy.requests if "parents" not in request.path]
    assert len(mine) == ROUNDS + 1
    assert len(set(mine)) == 1
    assert len(theirs) == 3 * ROUNDS
    assert len(set(theirs)) == 2 * ROUNDS  # one for each child
    assert not {*mine} & {*theirs}
