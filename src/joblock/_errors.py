"""What joblock raises, with the evidence, and what each error says about the lock.

What a store raises is not here: it reaches the caller unchanged.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from ._record import JobLockRecord

LossReason: TypeAlias = Literal["lock_owned_by_other_job", "lock_already_gone", "lease_expired"]


class JobLockError(Exception):
    """The base of every error that joblock itself raises."""


class InvalidIdError(JobLockError, TypeError, ValueError):
    """An argument cannot name a lock or its owner, such as `""`, `5`, `"a/b"` or `".."`.

    The lock: untouched, the store was not called. Do not retry; correct the argument.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


class StoreContentionError(JobLockError):
    """The record under `key` changed between reading and writing, `attempts` times in a row.

    The lock: not changed by this call. Other clients are acquiring and releasing it at this very
    moment. Retrying is safe, best after a short random pause.
    """

    def __init__(self, key: str, attempts: int) -> None:
        super().__init__(key, attempts)
        self.key = key
        self.attempts = attempts

    def __str__(self) -> str:
        return f"{self.key!r} was changed by others in each of {self.attempts} attempts"


class JobLockHeldError(JobLockError):
    """`hold_job_lock` found a live lock; `existing` is its record.

    The lock: untouched, another job's. Retry once that job has ended or its lease has expired:
    for HTTP, `Held(error.existing).retry_after_s()`.
    """

    def __init__(self, existing: JobLockRecord) -> None:
        super().__init__(existing)
        self.existing = existing

    def __str__(self) -> str:
        lock = f"{self.existing.canister_uid!r} / {self.existing.vault_id!r}"
        until = f"{self.existing.expires_at} (epoch milliseconds)"
        return f"job {self.existing.job_id!r} holds the lock of {lock} until {until}"


class JobLockLostError(JobLockError):
    """The lock that `hold_job_lock` kept for `job_id` was lost while the job was running.

    The `reason` is "lock_owned_by_other_job", "lock_already_gone", or "lease_expired": no renewal
    succeeded in time (then `__cause__` is what the last one failed with, if it did).

    The lock: not this job's. `current` is the record that a renewal found in its place, or None.
    Another job may have run at the same time. Do not retry blindly; find out first what both of
    them have done.
    """

    def __init__(self, job_id: str, reason: LossReason, current: JobLockRecord | None) -> None:
        super().__init__(job_id, reason, current)
        self.job_id = job_id
        self.reason = reason
        self.current = current

    def __str__(self) -> str:
        return f"job {self.job_id!r} lost its lock: {self.reason}"
