"""Keeps a background job from starting twice: a lease in the blob store that you already have.

Async stores: `joblock.aio`. Stores that ship: `joblock.stores`.
"""

from ._protocol import JOB_LOCK_TTL_MS
from .errors import (
    InvalidIdError,
    JobLockError,
    JobLockHeldError,
    JobLockLostError,
    StoreContentionError,
)
from .hold import HeldJobLock, hold_job_lock
from .locks import acquire_job_lock, peek_job_lock, release_job_lock, renew_job_lock
from .record import JobLockRecord, JsonValue, job_lock_key
from .results import Acquired, Held, Lost, ReleaseResult, Renewed
from .store import AsyncBlobStore, AsyncConditionalBlobStore, Blob, BlobStore, ConditionalBlobStore
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
    "HeldJobLock",
    "InvalidIdError",
    "JobLockError",
    "JobLockHeldError",
    "JobLockLostError",
    "JobLockRecord",
    "JsonValue",
    "Lost",
    "MemoryBlobStore",
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
