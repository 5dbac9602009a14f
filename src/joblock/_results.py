"""What the five functions return: frozen values for `match`, or for a look at `.acquired`.

Each is also true or false as its name suggests, so that `if acquire_job_lock(...)` means what it
reads like.

Its annotations are no strings, so that `typing.get_type_hints` finds their names.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

from ._record import JobLockRecord
from ._value import Value, assign

NotOwned: TypeAlias = Literal["lock_owned_by_other_job", "lock_already_gone"]


class Acquired(Value):
    """The lock is this caller's until `record.expires_at`, for the job `job_id`.

    `etag` is the version that was written; give it to release or renew to save a request. It is
    None on a plain store. `took_over` is the expired record that was replaced (a crashed job's
    receipt), else None.
    """

    __slots__ = __match_args__ = ("job_id", "record", "etag", "took_over")

    acquired: ClassVar[Literal[True]] = True
    job_id: str
    record: JobLockRecord
    etag: str | None
    took_over: JobLockRecord | None

    def __init__(
        self,
        job_id: str,
        record: JobLockRecord,
        etag: str | None,
        took_over: JobLockRecord | None,
    ) -> None:
        assign(self, "job_id", job_id)
        assign(self, "record", record)
        assign(self, "etag", etag)
        assign(self, "took_over", took_over)

    @property
    def expires_at(self) -> float:
        """Until when the lock is this caller's, in epoch milliseconds."""
        return self.record.expires_at or 0

    def __bool__(self) -> Literal[True]:
        return True


class Held(Value):
    """Another job has the lock; `existing` is its record as it was read.

    `now_ms` is the reading of the clock by which it is live, and `clock_skew_ms` that of the
    acquire. Two are equal if their records are.
    """

    __slots__ = ("clock_skew_ms", "existing", "now_ms")
    __match_args__ = ("existing",)

    acquired: ClassVar[Literal[False]] = False
    existing: JobLockRecord
    now_ms: float | None
    clock_skew_ms: float

    def __init__(
        self, existing: JobLockRecord, now_ms: float | None = None, clock_skew_ms: float = 0
    ) -> None:
        assign(self, "existing", existing)
        assign(self, "now_ms", now_ms)
        assign(self, "clock_skew_ms", clock_skew_ms)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.existing, self.now_ms, self.clock_skew_ms)

    def retry_after_s(
        self, clock: Callable[[], float] | None = None, *, clock_skew_ms: float | None = None
    ) -> int:
        """Return the whole seconds, at least 1, until the lease expires: HTTP's `Retry-After`.

        They count from the acquire's own reading of its clock, and with its `clock_skew_ms`,
        unless you give others.
        """
        return self.existing.retry_after_s(
            self.now_ms if clock is None else clock(),
            clock_skew_ms=self.clock_skew_ms if clock_skew_ms is None else clock_skew_ms,
        )

    def __bool__(self) -> Literal[False]:
        return False


class ReleaseResult(Value):
    """Whether the job's lock has ended by this call and, where not, what was found instead."""

    __slots__ = __match_args__ = ("released", "reason")

    released: bool
    reason: NotOwned | None

    def __init__(self, released: bool, reason: NotOwned | None = None) -> None:
        assign(self, "released", released)
        assign(self, "reason", reason)

    def __bool__(self) -> bool:
        return self.released


class Renewed(Value):
    """The lock is still this caller's, now until `record.expires_at`; `etag` as in `Acquired`."""

    __slots__ = __match_args__ = ("record", "etag")

    renewed: ClassVar[Literal[True]] = True
    record: JobLockRecord
    etag: str | None

    def __init__(self, record: JobLockRecord, etag: str | None) -> None:
        assign(self, "record", record)
        assign(self, "etag", etag)

    @property
    def expires_at(self) -> float:
        """Until when the lock is this caller's, in epoch milliseconds."""
        return self.record.expires_at or 0

    def __bool__(self) -> Literal[True]:
        return True


class Lost(Value):
    """The lock is not this caller's any more; `current` is the record found there, if any."""

    __slots__ = __match_args__ = ("reason", "current")

    renewed: ClassVar[Literal[False]] = False
    reason: NotOwned
    current: JobLockRecord | None

    def __init__(self, reason: NotOwned, current: JobLockRecord | None) -> None:
        assign(self, "reason", reason)
        assign(self, "current", current)

    def __bool__(self) -> Literal[False]:
        return False
