"""What callers hand in beside ids: numbers, times and texts, and what becomes of a wrong one."""

from __future__ import annotations

import sys
import warnings
from numbers import Integral, Real
from typing import Protocol, TypeVar, runtime_checkable

from ._errors import JobLockWarning
from ._record import JobLockRecord, as_number, as_text

T = TypeVar("T")


@runtime_checkable
class Duration(Protocol):
    """A `datetime.timedelta`, or what is like one."""

    def total_seconds(self) -> float:
        """How many seconds it is."""
        ...


def number(value: object) -> float | None:
    """`value` as an int or a float, if it is a finite real number of any type, else None."""
    if isinstance(value, (int, float)):
        return as_number(value)
    if not isinstance(value, Real):
        return None
    try:
        return int(value) if isinstance(value, Integral) else as_number(float(value))
    except OverflowError:
        return None


def milliseconds(value: object) -> float | None:
    """`value` in milliseconds, if it is a positive finite number or a `timedelta`, else None."""
    if not isinstance(value, (int, float)) and isinstance(value, Duration):
        value = value.total_seconds() * 1000
    ms = number(value)
    return ms if ms is not None and ms > 0 else None


def strict_ttl(ttl_ms: object) -> float:
    """Return the TTL in milliseconds; raise ValueError if it is none."""
    ms = milliseconds(ttl_ms)
    if ms is None:
        raise ValueError(f"ttl_ms must be positive, finite milliseconds or timedelta: {ttl_ms!r}")
    return ms


def lenient_ttl(ttl_ms: object, default: float) -> float:
    """Return the TTL in milliseconds; as the original, take the default if it is none."""
    ms = milliseconds(ttl_ms)
    if ms is None:
        _warn(f"ttl_ms={ttl_ms!r} is no positive finite number: the lease is {default} ms")
        return default
    return ms


def described(
    canister_uid: str,
    vault_id: str,
    *,
    actor_uid: str | None,
    chunks_to_embed: float | None,
    estimated_seconds: float | None,
    reason: str | None,
) -> JobLockRecord:
    """Return what a new lock's record says of its job; as the original, null for a wrong type."""
    return JobLockRecord(
        None,
        canister_uid,
        vault_id,
        actor_uid=_recorded("actor_uid", actor_uid, as_text(actor_uid)),
        chunks_to_embed=_recorded("chunks_to_embed", chunks_to_embed, number(chunks_to_embed)),
        estimated_seconds=_recorded(
            "estimated_seconds", estimated_seconds, number(estimated_seconds)
        ),
        reason=_recorded("reason", reason, as_text(reason)),
    )


def _recorded(argument: str, given: object, recorded: T) -> T:
    if recorded is None and given is not None:
        _warn(f"{argument}={given!r} is of a wrong type or not finite: it is recorded as null")
    return recorded


def _warn(message: str) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "joblock":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, JobLockWarning, stacklevel=level)
