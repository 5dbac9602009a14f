"""Keeps a background job from starting twice: a lease in the blob store that you already have.

Async stores: `joblock.aio`. Stores that ship: `joblock.stores`.
"""

from ._errors import (
    InvalidIdError,
    JobLockError,
    JobLockHeldError,
    JobLockLostError,
    StoreContentionError,
)
from ._hold import OwnedJobLock, hold_job_lock
from ._ids import job_lock_key
from ._locks import acquire_job_lock, peek_job_lock, release_job_lock, renew_job_lock
from ._protocol import JOB_LOCK_TTL_MS
from ._record import JobLockRecord, JsonValue
from ._results import Acquired, Held, Lost, ReleaseResult, Renewed
from ._store import AsyncBlobStore, AsyncConditionalBlobStore, Blob, BlobStore, ConditionalBlobStore
from .stores.memory import MemoryBlobStore

__version__ = "0.1.0"

__all__ = [
    "JOB_LOCK_TTL_MS",
    "Acquired",
    "AsyncBlobStore",
    "AsyncConditionalBlobStore",
    "Blob",
    "BlobStore",
    "ConditionalBlobStore",
    "Held",
    "InvalidIdError",
    "JobLockError",
    "JobLockHeldError",
    "JobLockLostError",
    "JobLockRecord",
    "JsonValue",
    "Lost",
    "MemoryBlobStore",
    "OwnedJobLock",
    "ReleaseResult",
    "Renewed",
    "StoreContentionError",
    "acquire_job_lock",
    "hold_job_lock",
    "job_lock_key",
    "peek_job_lock",
    "release_job_lock",
    "renew_job_lock",
]
