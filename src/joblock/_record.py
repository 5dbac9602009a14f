"""The lock record: its fields, and its bytes in the store.

The bytes are those of the JavaScript original's `JSON.stringify`, so that both can share a store:
a fixed order of keys, no spaces, non-ASCII as it is, numbers as ECMAScript prints them. Reading
never raises: text that is not a JSON object is no record, whatever it is.
"""

from __future__ import annotations

import json
import math
import re
import time
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, NoReturn, NotRequired, TypeAlias, TypedDict

from ._value import Value, assign

if TYPE_CHECKING:
    from datetime import datetime

JsonValue: TypeAlias = "dict[str, JsonValue] | list[JsonValue] | str | int | float | bool | None"


class JobLockDict(TypedDict):
    """What `JobLockRecord.to_dict` returns: a lock as it is on the wire, for an HTTP body."""

    jobId: str | None
    canisterUid: str | None
    vaultId: str | None
    actorUid: str | None
    chunksToEmbed: float | None
    estimatedSeconds: float | None
    reason: str | None
    startedAt: float | None
    expiresAt: float | None
    runId: NotRequired[str]
    endedAt: NotRequired[float]


# Deeper documents are no record. How deep Python's own parser goes depends on its version and on
# the caller's stack; whether a lock is live must depend on neither.
MAX_NESTING = 64


def epoch_ms() -> int:
    """The default clock: milliseconds since 1970-01-01 UTC, as JavaScript's `Date.now()`."""
    return time.time_ns() // 1_000_000


class JobLockRecord(Value):
    """One lock as it is stored. A field that is missing or of the wrong type reads as None.

    `started_at`, `expires_at` and `ended_at` are epoch milliseconds. `run_id` is the execution of
    the job that has resumed the lock; without one the job waits to be run, or `hold_job_lock` runs
    it. `ended_at` is when the job ended, where its lock is kept on until `expires_at`. `extra` has
    the fields that this version does not know, by their names on the wire; they are written back
    when the lock is renewed.
    """

    __slots__ = __match_args__ = (
        "job_id",
        "canister_uid",
        "vault_id",
        "actor_uid",
        "chunks_to_embed",
        "estimated_seconds",
        "reason",
        "started_at",
        "expires_at",
        "extra",
        "run_id",
        "ended_at",
    )

    job_id: str | None
    canister_uid: str | None
    vault_id: str | None
    actor_uid: str | None
    chunks_to_embed: float | None
    estimated_seconds: float | None
    reason: str | None
    started_at: float | None
    expires_at: float | None
    extra: dict[str, JsonValue]
    run_id: str | None
    ended_at: float | None

    def __init__(
        self,
        job_id: str | None,
        canister_uid: str | None,
        vault_id: str | None,
        actor_uid: str | None = None,
        chunks_to_embed: float | None = None,
        estimated_seconds: float | None = None,
        reason: str | None = None,
        started_at: float | None = None,
        expires_at: float | None = None,
        extra: dict[str, JsonValue] | None = None,
        run_id: str | None = None,
        ended_at: float | None = None,
    ) -> None:
        assign(self, "job_id", job_id)
        assign(self, "canister_uid", canister_uid)
        assign(self, "vault_id", vault_id)
        assign(self, "actor_uid", actor_uid)
        assign(self, "chunks_to_embed", chunks_to_embed)
        assign(self, "estimated_seconds", estimated_seconds)
        assign(self, "reason", reason)
        assign(self, "started_at", started_at)
        assign(self, "expires_at", expires_at)
        assign(self, "extra", {} if extra is None else dict(extra))
        assign(self, "run_id", run_id)
        assign(self, "ended_at", ended_at)

    def __hash__(self) -> int:
        return hash((self.job_id, self.run_id, self.started_at, self.expires_at))

    def is_live(self, now_ms: float | None = None) -> bool:
        """Whether the lease runs at `now_ms`, by default now. At `expires_at` it has expired."""
        now_ms = epoch_ms() if now_ms is None else now_ms
        return self.expires_at is not None and self.expires_at > now_ms

    def retry_after_s(self, now_ms: float | None = None, *, clock_skew_ms: float = 0) -> int:
        """Return the whole seconds, at least 1, until the lease expires: HTTP's `Retry-After`.

        They count from `now_ms`, by default now. `clock_skew_ms` is that of the acquire, for
        which the lease is honoured longer.
        """
        now_ms = epoch_ms() if now_ms is None else now_ms
        left_ms = (self.expires_at or 0) + clock_skew_ms - now_ms
        return max(1, math.ceil(left_ms / 1000))

    @property
    def started_datetime(self) -> datetime | None:
        """`started_at` in UTC; None if it is None, or no calendar has it."""
        return _datetime(self.started_at)

    @property
    def expires_datetime(self) -> datetime | None:
        """`expires_at` in UTC; None if it is None, or no calendar has it."""
        return _datetime(self.expires_at)

    def to_dict(self) -> JobLockDict:
        """Return the fields under their names on the wire, in their order there.

        `runId` and `endedAt` are there only where they are set: the original writes neither. After
        them come those of `extra`, which the type does not tell.
        """
        fields: Any = self._fields()
        typed: JobLockDict = fields
        return typed

    def _fields(self) -> dict[str, JsonValue]:
        fields: dict[str, JsonValue] = {
            "jobId": self.job_id,
            "canisterUid": self.canister_uid,
            "vaultId": self.vault_id,
            "actorUid": self.actor_uid,
            "chunksToEmbed": self.chunks_to_embed,
            "estimatedSeconds": self.estimated_seconds,
            "reason": self.reason,
            "startedAt": self.started_at,
            "expiresAt": self.expires_at,
        }
        if self.run_id is not None:
            fields["runId"] = self.run_id
        if self.ended_at is not None:
            fields["endedAt"] = self.ended_at
        return fields | self.extra

    def to_json(self) -> str:
        """Return the text to store, the bytes of JavaScript's `JSON.stringify`."""
        if self.extra or self.run_id is not None or self.ended_at is not None:
            text = _stringify(self._fields())
        else:  # the same, in half of the time
            text = (
                f'{{"jobId":{_stringify(self.job_id)}'
                f',"canisterUid":{_stringify(self.canister_uid)}'
                f',"vaultId":{_stringify(self.vault_id)}'
                f',"actorUid":{_stringify(self.actor_uid)}'
                f',"chunksToEmbed":{_stringify(self.chunks_to_embed)}'
                f',"estimatedSeconds":{_stringify(self.estimated_seconds)}'
                f',"reason":{_stringify(self.reason)}'
                f',"startedAt":{_stringify(self.started_at)}'
                f',"expiresAt":{_stringify(self.expires_at)}}}'
            )
        return text if text.isascii() else SURROGATES.sub(_well_formed, text)

    @classmethod
    def from_json(cls, text: str | bytes | bytearray | None) -> JobLockRecord | None:
        """Return the record that `text` holds, or None for whatever is not a JSON object."""
        document = _parse(text)
        if not isinstance(document, dict):
            return None
        return cls(
            job_id=as_text(document.pop("jobId", None)),
            canister_uid=as_text(document.pop("canisterUid", None)),
            vault_id=as_text(document.pop("vaultId", None)),
            actor_uid=as_text(document.pop("actorUid", None)),
            chunks_to_embed=as_number(document.pop("chunksToEmbed", None)),
            estimated_seconds=as_number(document.pop("estimatedSeconds", None)),
            reason=as_text(document.pop("reason", None)),
            started_at=as_number(document.pop("startedAt", None)),
            expires_at=as_number(document.pop("expiresAt", None)),
            run_id=as_text(document.pop("runId", None)),
            ended_at=as_number(document.pop("endedAt", None)),
            extra=document,
        )


KNOWN_FIELDS = frozenset(JobLockRecord(None, None, None, run_id="", ended_at=0).to_dict())


def _datetime(ms: float | None) -> datetime | None:
    from datetime import UTC, datetime, timedelta  # a tenth of `import joblock`

    if ms is None:
        return None
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
    except OverflowError:
        return None


def utc(ms: object) -> str | None:
    """Epoch milliseconds as a time that people read, or None where there is no such time."""
    try:
        moment = time.gmtime(ms / 1000) if isinstance(ms, (int, float)) else None
    except (OverflowError, ValueError, OSError):  # the store may hold any number
        return None
    if moment is None or not 1 <= moment.tm_year <= 9999:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", moment)


def as_text(value: object) -> str | None:
    """`value` if it is a string, else None."""
    return value if isinstance(value, str) else None


def as_number(value: object) -> float | None:
    """`value` if JavaScript's `Number.isFinite` takes it, else None: a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an int that no double can hold
        return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_int(digits: str) -> float:
    return int(digits) if len(digits) <= 400 else float(digits)  # 309 digits are infinite already


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_parse_int)
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)


def _parse(text: object) -> JsonValue:
    try:
        if isinstance(text, (bytes, bytearray)):
            text = text.decode()
        elif isinstance(text, memoryview):
            text = text.tobytes().decode()
        if not isinstance(text, str) or _too_deep(text):
            return None
        document: JsonValue = _DECODER.decode(text)
    except ValueError:
        return None
    return document


def _too_deep(text: str) -> bool:
    if text.count("{") + text.count("[") <= MAX_NESTING:
        return False
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth > MAX_NESTING:
                return True
        elif token[0] in "]}":
            depth -= 1
    return False


SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]")


def _well_formed(surrogates: re.Match[str]) -> str:
    """As JSON.stringify: a pair is the character that it stands for, a lone one is escaped."""
    if len(surrogates[0]) == 2:
        return surrogates[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    return f"\\u{ord(surrogates[0]):04x}"


def _stringify(value: JsonValue) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, float):
        return _stringify_float(value)
    if isinstance(value, dict):
        members = [f"{encode_basestring(name)}:{_stringify(it)}" for name, it in value.items()]
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_stringify, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return int.__repr__(value)


def _stringify_float(value: float) -> str:
    """Print as ECMAScript's Number::toString: Python's digits, but another choice of exponents."""
    if not math.isfinite(value):
        return "null"
    if value == 0:
        return "0"
    text = float.__repr__(value).removesuffix(".0")
    if "e" not in text:
        return text
    if 1e-6 <= abs(value) < 1e21:
        from decimal import Decimal  # rare, and a quarter of `import joblock` otherwise

        return format(Decimal(text), "f")
    return text.replace("e-0", "e-")
