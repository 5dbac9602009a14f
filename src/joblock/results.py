"""What the five functions return: frozen values for `match`, or for a look at `.acquired`.

Each is also true or false as its name suggests, so that `if acquire_job_lock(...)` means what it
reads like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from .record import JobLockRecord, epoch_ms

NotOwned: TypeAlias = Literal["lock_owned_by_other_job", "lock_already_gone"]


@dataclass(frozen=True, slots=True)
class Acquired:
    """The lock is this caller's until `record.expires_at`, for the job `job_id`.

    `etag` is the version that was written; give it to release or renew to save a request. It is
    None on a plain store. `took_over` is the expired record that was replaced (a crashed job's
    receipt), else None.
    """

    acquired: ClassVar[Literal[True]] = True
    job_id: str
    record: JobLockRecord
    etag: str | None
    took_over: JobLockRecord | None

    def __bool__(self) -> Literal[True]:
        return True


@dataclass(frozen=True, slots=True)
class Held:
    """Another job has the lock; `existing` is its record as it was read."""

    acquired: ClassVar[Literal[False]] = False
    existing: JobLockRecord

    def retry_after_s(
        self, clock: Callable[[], float] = epoch_ms, *, clock_skew_ms: float = 0
    ) -> int:
        """Return the whole seconds, at least 1, until the lease expires: HTTP's `Retry-After`.

        Give it the `clock_skew_ms` of the acquire, for which the lease is honoured longer.
        """
        left_ms = (self.existing.expires_at or 0) + clock_skew_ms - clock()
        return max(1, math.ceil(left_ms / 1000))

    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True, slots=True)
class ReleaseResult:
    """Whether this call removed the lock and, where it did not, what it found instead."""

    released: bool
    reason: NotOwned | None = None

    def __bool__(self) -> bool:
        return self.released


@dataclass(frozen=True, slots=True)
class Renewed:
    """The lock is still this caller's, now until `record.expires_at`; `etag` as in `Acquired`."""

    renewed: ClassVar[Literal[True]] = True
    record: JobLockRecord
    etag: str | None

    def __bool__(self) -> Literal[True]:
        return True


@dataclass(frozen=True, slots=True)
class Lost:
    """The lock is not this caller's any more; `current` is the record found there, if any."""

    renewed: ClassVar[Literal[False]] = False
    reason: NotOwned
    current: JobLockRecord | None

    def __bool__(self) -> Literal[False]:
        return False
