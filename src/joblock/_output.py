"""What the command prints, made printable: it may come from the store, to which others write."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Generator

from . import _processes
from ._record import JobLockRecord, epoch_ms, utc
from ._store import BlobStore

UNWRITABLE = 74  # sysexits.h


class CommandError(Exception):
    """What ends the command: a line for standard error and the exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


def table(uid: str, vault: str, record: JobLockRecord, now_ms: float) -> list[str]:
    rows = {
        "lock": f"{uid} / {vault}",
        "state": f"{state_of(record, now_ms)}{_advice(record, now_ms)}",
        "job": record.job_id,
        "run": record.run_id,
        "actor": record.actor_uid,
        "process": _PROCESS_IS.get(_processes.recorded_lives(record)),
        "reason": record.reason,
        "chunks": record.chunks_to_embed,
        "estimate": None if record.estimated_seconds is None else f"{record.estimated_seconds} s",
        "started": _when(record.started_at, now_ms),
        "ended": None if record.ended_at is None else _when(record.ended_at, now_ms),
        "expires": _when(record.expires_at, now_ms),
    }
    return [f"{name:<10}{_short(str(value))}" for name, value in rows.items() if value is not None]


_PROCESS_IS: dict[bool | None, str] = {
    True: "it exists, on this host",
    False: "it has ended, on this host: nobody renews the lock",
}


def state_of(record: JobLockRecord, now_ms: float) -> str:
    if not record.is_live(now_ms):
        return "expired"
    if record.ended_at is not None:
        return "ended"
    return "taken" if record.run_id is None else "running"


def _advice(record: JobLockRecord, now_ms: float) -> str:
    if (record.started_at or 0) > now_ms + 60_000:
        return ", but it began in the future: the clock of its host or of this one was wrong"
    state = state_of(record, now_ms)
    return {
        "expired": ": the next run takes it over",
        "ended": ", and kept for its minimum hold",
    }.get(state, "")


HEADINGS = ("UID", "VAULT", "STATE", "JOB", "ACTOR", "SINCE", "UNTIL")


def row(record: JobLockRecord, now_ms: float) -> tuple[str, ...]:
    """One lock of many; what is missing is a dash."""
    cells = (
        record.canister_uid,
        record.vault_id,
        state_of(record, now_ms),
        record.job_id,
        record.actor_uid,
        utc(record.started_at),
        utc(record.expires_at),
    )
    return tuple("-" if cell is None else _short(_printable(cell), 80) for cell in cells)


def print_rows(rows: list[tuple[str, ...]]) -> None:
    """In columns, each as wide as its widest cell; at a terminal no line is longer than that."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    longest = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else None
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print_lines("  ".join(padded).rstrip()[:longest])


def no_lock(uid: str, vault: str, store: BlobStore) -> str:
    return f"no lock of {uid} / {vault} in {store!r}"


def held_by(uid: str, vault: str, record: JobLockRecord) -> str:
    now_ms = epoch_ms()
    uid, vault, job_id, actor = (  # each shortened, so that the times are seen
        _short(_printable(str(text)), 80) for text in (uid, vault, record.job_id, record.actor_uid)
    )
    by = job_id if record.actor_uid is None else f"{job_id} ({actor})"
    return (
        f"{uid} / {vault} is held by job {by} "
        f"since {_when(record.started_at, now_ms)} until {_when(record.expires_at, now_ms)}"
    )


def _when(ms: float | None, now_ms: float) -> str:
    if ms is None:
        return "unknown"
    moment = utc(ms)
    return f"{ms:g} ms after 1970" if moment is None else f"{moment} ({_distance(ms - now_ms)})"


def _distance(ms: float) -> str:
    seconds = abs(ms) / 1000
    if seconds < 0.5:
        return "now"
    units = {"days": 86_400, "hours": 3600, "minutes": 60}
    name, size = next(((n, s) for n, s in units.items() if seconds >= 2 * s), ("seconds", 1))
    count = round(seconds / size)
    words = f"{count} {name if count != 1 else name[:-1]}"
    return f"in {words}" if ms > 0 else f"{words} ago"


def ascii_json(record: JobLockRecord | None) -> str:
    """As in the store, but in ASCII, with the rest and every control character escaped."""
    return json.dumps(None if record is None else json.loads(record.to_json()))


def print_lines(*lines: str) -> None:
    if sys.stdout is None:  # closed before joblock began
        return
    encoding = sys.stdout.encoding
    try:
        for line in lines:
            shown = _printable(line).encode(encoding, "backslashreplace").decode(encoding)
            sys.stdout.write(shown + "\n")
        sys.stdout.flush()
    except OSError as error:
        # Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # that is only that nobody reads on
            raise CommandError(UNWRITABLE, f"cannot write: {error.strerror}") from error


def say(text: str) -> None:
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):  # nobody may be there to read it
        # In one write, or the lines of two threads are mixed.
        sys.stderr.write(_short(_printable(f"joblock: {_SECRETS.sub('...', text)}")) + "\n")
        sys.stderr.flush()


_SECRETS = re.compile(r"(?<=://)\S+(?=@)|(?<=\?)[^\s=]+=\S+")  # of a URL in an SDK's error


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(text: str, length: int = 500) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


@contextlib.contextmanager
def log_to_stderr() -> Generator[None]:
    logger = logging.getLogger("joblock")
    handler = _LogLines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _LogLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
