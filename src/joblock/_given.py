"""What callers hand in beside ids: numbers, times and texts, and what becomes of a wrong one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Protocol, TypeVar, runtime_checkable

from ._errors import JobLockWarning
from ._record import KNOWN_FIELDS, JobLockRecord, JsonValue, as_number, as_text

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
    """`value` in milliseconds, if it is a finite number or a `timedelta`, else None."""
    if not isinstance(value, (int, float)) and isinstance(value, Duration):
        value = value.total_seconds() * 1000
    return number(value)


def positive(argument: str, value: object) -> float:
    """Return `value` in milliseconds; raise ValueError unless that is more than 0."""
    ms = milliseconds(value)
    if ms is None or ms <= 0:
        raise ValueError(
            f"{argument} must be positive, finite milliseconds or timedelta: {value!r}"
        )
    return ms


def not_negative(argument: str, value: object) -> float:
    """Return `value` in milliseconds; raise ValueError unless that is 0 or more."""
    ms = milliseconds(value)
    if ms is None or ms < 0:
        raise ValueError(
            f"{argument} must be finite milliseconds or timedelta, 0 or more: {value!r}"
        )
    return ms


def lenient_ttl(ttl_ms: object, default: float) -> float:
    """Return the TTL in milliseconds; as the original, take the default if it is none."""
    ms = milliseconds(ttl_ms)
    if ms is None or ms <= 0:
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
    extra: Mapping[str, JsonValue] | None,
) -> Callable[..., JobLockRecord]:
    """Return what makes a new lock's record, which says of its job what is given.

    As the original, it says null for a wrong type.

    Raises ValueError for an `extra` that would not come back from the store as it is.
    """
    return partial(
        JobLockRecord,
        canister_uid=canister_uid,
        vault_id=vault_id,
        actor_uid=_recorded("actor_uid", actor_uid, as_text),
        chunks_to_embed=_recorded("chunks_to_embed", chunks_to_embed, number),
        estimated_seconds=_recorded("estimated_seconds", estimated_seconds, number),
        reason=_recorded("reason", reason, as_text),
        extra=None if extra is None else _checked_extra(extra),
    )


def _recorded(argument: str, given: object, read: Callable[[object], T | None]) -> T | None:
    if given is None:
        return None
    recorded = read(given)
    if recorded is None:
        _warn(f"{argument}={given!r} is of a wrong type or not finite: it is recorded as null")
    return recorded


def _checked_extra(extra: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a copy of `extra` that nobody else has."""
    try:
        given = dict(extra)
        known = KNOWN_FIELDS & given.keys()
        read = JobLockRecord.from_json(JobLockRecord(None, None, None, extra=given).to_json())
        if read is not None and read.extra == given and not known:
            return read.extra
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra must be a dict of what JSON has: {error}") from error
    if known:
        raise ValueError(f"extra must not have joblock's own fields: {', '.join(sorted(known))}")
    raise ValueError("extra must come back from JSON as it is")


def _warn(message: str) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "joblock":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, JobLockWarning, stacklevel=level)
