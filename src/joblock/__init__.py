"""Keeps a background job from starting twice: a lease in the blob store that you already have.

Take the lock before a job is started, and give its `job_id` to the worker:

    acquire_job_lock(store, canister_uid, vault_id) -> Acquired | Held

In the worker, or where one process does both, keep it while the job runs:

    with resume_job_lock(store, canister_uid, vault_id, expected_job_id=...) as lock: ...
    with hold_job_lock(store, canister_uid, vault_id) as lock: ...

By hand, and for operators:

    renew_job_lock, release_job_lock, peek_job_lock, list_job_locks, sweep_job_locks

The same for async stores: `joblock.aio`. Stores that ship, and `open_store(url)`:
`joblock.stores`. For your tests: `joblock.testing`. Whether a store keeps its word:
`joblock.conformance`.
"""

from typing import TYPE_CHECKING

from ._errors import (
    InvalidIdError,
    JobLockError,
    JobLockHeldError,
    JobLockLostError,
    JobLockWarning,
    LossReason,
    StoreContentionError,
)
from ._given import Duration
from ._hold import OwnedJobLock, hold_job_lock, resume_job_lock
from ._ids import job_lock_key
from ._locks import (
    acquire_job_lock,
    list_job_locks,
    peek_job_lock,
    release_job_lock,
    renew_job_lock,
    sweep_job_locks,
)
from ._protocol import HOLD_TTL_MS, JOB_LOCK_TTL_MS
from ._record import JobLockDict, JobLockRecord, JsonValue, epoch_ms
from ._results import Acquired, Held, Lost, NotOwned, ReleaseResult, Renewed
from ._store import (
    AsyncBlobStore,
    AsyncConditionalBlobStore,
    Blob,
    BlobStore,
    ConditionalBlobStore,
)
from .stores.memory import MemoryBlobStore

__version__ = "0.2.0"

__all__ = [
    "HOLD_TTL_MS",
    "JOB_LOCK_TTL_MS",
    "Acquired",
    "AsyncBlobStore",
    "AsyncConditionalBlobStore",
    "Blob",
    "BlobStore",
    "ConditionalBlobStore",
    "Duration",
    "Held",
    "InvalidIdError",
    "JobLockDict",
    "JobLockError",
    "JobLockHeldError",
    "JobLockLostError",
    "JobLockRecord",
    "JobLockWarning",
    "JsonValue",
    "LossReason",
    "Lost",
    "MemoryBlobStore",
    "NotOwned",
    "OwnedJobLock",
    "ReleaseResult",
    "Renewed",
    "StoreContentionError",
    "acquire_job_lock",
    "epoch_ms",
    "hold_job_lock",
    "job_lock_key",
    "list_job_locks",
    "peek_job_lock",
    "release_job_lock",
    "renew_job_lock",
    "resume_job_lock",
    "sweep_job_locks",
]

# Pickles, reprs and tracebacks then name the door, not the file behind it, which may be renamed.
for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith("joblock._"):
        globals()[_name].__module__ = __name__

if TYPE_CHECKING:
    from . import aio as aio
else:  # not for type checkers, or every misspelt name would pass

    def __getattr__(name):
        if name == "aio":  # imported when it is asked for: asyncio is half of a start
            from importlib import import_module

            return import_module(".aio", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return [*globals(), "aio"]
