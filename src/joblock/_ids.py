"""What names a lock, and what names a job: the rules for ids."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

from ._errors import InvalidIdError
from ._record import SURROGATES

_NOT_IN_AN_ID = re.compile("[/\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def job_lock_key(canister_uid: str, vault_id: str) -> str:
    """Return the key of the lock: `index-jobs/{canister_uid}/{vault_id}.json`.

    Raises `InvalidIdError` for an id that is not a non-empty string, is `.` or `..`, or has a `/`,
    a control character or a lone surrogate: two pairs of ids must never share a key.
    """
    _check_id("canister_uid", canister_uid)
    _check_id("vault_id", vault_id)
    # Not an f-string: it would ask an id of an enum's class for its name instead of its text.
    return "".join(("index-jobs/", canister_uid, "/", vault_id, ".json"))


def job_lock_prefix(canister_uid: str | None) -> str:
    """Return what the keys of all locks, or of all of this user's, begin with."""
    if canister_uid is None:
        return "index-jobs/"
    _check_id("canister_uid", canister_uid)
    return "".join(("index-jobs/", canister_uid, "/"))


def new_id(uuid_factory: Callable[[], uuid.UUID | str], kind: str) -> str:
    """Return a new id of a job or a run, which must come back from the store as it was written."""
    made = uuid_factory()
    new = str(made) if isinstance(made, uuid.UUID) else made
    check_text(f"uuid_factory's {kind}", new)
    if not new.isascii() and SURROGATES.search(new):
        raise InvalidIdError(f"uuid_factory's {kind}", f"must not have surrogates, as {made!r}")
    return new


def check_text(argument: str, value: object) -> None:
    """Raise InvalidIdError unless `value` is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise InvalidIdError(argument, f"must be a non-empty string, not {value!r}")


def _check_id(argument: str, value: str) -> None:
    check_text(argument, value)
    if value in (".", "..") or _NOT_IN_AN_ID.search(value):
        raise InvalidIdError(
            argument,
            "must not be '.' or '..' or have a '/', a control character or a lone surrogate, "
            f"as {value!r}",
        )
