"""What joblock raises, with the evidence, and what each error says about the lock.

What a store raises is not here: it reaches the caller unchanged.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from ._record import JobLockRecord, utc

LossReason: TypeAlias = Literal["lock_owned_by_other_job", "lock_already_gone", "lease_expired"]


class JobLockError(Exception):
    """The base of every error that joblock itself raises."""


class JobLockWarning(UserWarning):
    """An argument was not what it must be, and something else was taken, as the text says.

    The lock is taken all the same: the JavaScript original takes these silently.
    """


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
    """Another job, or another run of this job, has the lock, live; `existing` is its record.

    `now_ms` is the reading of the clock by which it is live, and `clock_skew_ms` what was given.

    The lock: untouched. Retry once that job has ended or its lease has expired: for HTTP,
    `retry_after_s()`. If `existing.ended_at` is set it has ended, and keeps the lock until then.
    """

    def __init__(
        self, existing: JobLockRecord, now_ms: float | None = None, clock_skew_ms: float = 0
    ) -> None:
        super().__init__(existing, now_ms, clock_skew_ms)
        self.existing = existing
        self.now_ms = now_ms
        self.clock_skew_ms = clock_skew_ms

    def retry_after_s(self) -> int:
        """Return the whole seconds, at least 1, until the lease expires, as `Held` does."""
        return self.existing.retry_after_s(self.now_ms, clock_skew_ms=self.clock_skew_ms)

    def __str__(self) -> str:
        held: Any = self.existing
        if not isinstance(held, JobLockRecord):  # some result backends keep errors as JSON
            return f"the lock is held: {held}"
        lock = f"{held.canister_uid!r} / {held.vault_id!r}"
        until = f"{utc(held.expires_at)} ({held.expires_at} epoch milliseconds)"
        return f"job {held.job_id!r} holds the lock of {lock} until {until}"


class JobLockLostError(JobLockError):
    """The lock of `job_id` was lost while the job was running, or before it was resumed.

    The `reason` is "lock_owned_by_other_job" (or by another run of the job), "lock_already_gone"
    (or it has ended), or "lease_expired": no renewal succeeded in time (then `__cause__` is what
    the last one failed with, if it did), or the job's longest time is over.

    The lock: not this job's, or not this run's. `current` is the record that was found, or None.
    On leaving, another job may have run at the same time: do not retry blindly; find out first
    what both of them have done. On entering `resume_job_lock` the job has not begun: drop it.
    """

    def __init__(self, job_id: str, reason: LossReason, current: JobLockRecord | None) -> None:
        super().__init__(job_id, reason, current)
        self.job_id = job_id
        self.reason = reason
        self.current = current

    def __str__(self) -> str:
        return f"job {self.job_id!r} lost its lock: {self.reason}"
