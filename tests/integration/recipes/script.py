"""A plain script: SIGTERM ends the job at its next step, and frees the lock."""

import signal
import sys

from jobs import rebuild_index

from joblock import JobLockHeldError, hold_job_lock
from joblock.stores import open_store


def stop(signum, frame):
    raise SystemExit(128 + signum)  # leaving the block releases the lock


signal.signal(signal.SIGTERM, stop)
store = open_store()  # what JOBLOCK_STORE names
try:
    with hold_job_lock(store, "user-1", "all", reason="nightly") as lock:
        for vault in sys.argv[1:]:
            lock.check()  # raises once the lock is lost
            rebuild_index("user-1", vault)
except JobLockHeldError as error:
    sys.exit(f"{error}")
