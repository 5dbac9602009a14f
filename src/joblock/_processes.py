"""Which processes there are, as Linux tells; elsewhere little is known of them, or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ._record import JobLockRecord, JsonValue

_PROC = Path("/proc")
_FIELD = "process"
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


class _Process(NamedTuple):
    pid: int
    ended: bool  # and not reaped yet
    parent: int
    group: int
    started: str  # in clock ticks since the host started


def _processes() -> Iterator[_Process]:
    for path in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended in this moment
            yield _process(path)


def _process(stat: Path) -> _Process:
    pid, _, rest = stat.read_text("utf-8", "replace").partition(" (")
    fields = rest.rpartition(")")[2].split()  # a name may have spaces and parentheses
    return _Process(int(pid), fields[0] in "ZX", int(fields[1]), int(fields[2]), fields[19])


def identity(pid: int) -> dict[str, JsonValue] | None:
    """What tells a process from every other one, or None if there is none, or none is known.

    Numbers are used again, so it has the moment of its start; and it has this start of this host,
    and the namespace in which the number is meant.
    """
    with contextlib.suppress(OSError):
        host = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        process = _process(_PROC / str(pid) / "stat")
        if not process.ended:
            space = (_PROC / "self/ns/pid").readlink()
            return {"pid": pid, "started": process.started, "host": f"{host} {space}"}
    return None


def recorded() -> dict[str, JsonValue]:
    """Return the extra fields in which a lock's record tells which process took it."""
    own = identity(os.getpid())
    return {} if own is None else {_FIELD: own}


def recorded_lives(record: JobLockRecord) -> bool | None:
    """Whether the process that took a lock lives; None if it did not say, or elsewhere.

    Nor of a lock that a run has: whoever resumed it is another one.
    """
    return lives(record.extra.get(_FIELD)) if record.run_id is None else None


def lives(identified: JsonValue) -> bool | None:
    """Whether the process with this identity lives; None if it is not known here."""
    own = identity(os.getpid())
    match identified:
        case {"pid": int(pid), "host": host} if own is not None and host == own["host"]:
            return identity(pid) == identified
        case _:
            return None


def group_goes_on(group: int) -> bool:
    """Whether a process of the group lives."""
    try:
        os.killpg(group, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    # Where process 1 reaps nobody, as in some containers, what has ended stays in its group.
    ended = {process.ended for process in _processes() if process.group == group}
    return ended != {True}


def descendants(group: int) -> set[int]:
    """Which processes in the group live, and come from this one."""
    found = {os.getpid()}
    everyone = list(_processes())
    while more := {one.pid for one in everyone if one.parent in found} - found:
        found |= more
    found.remove(os.getpid())
    return {
        one.pid for one in everyone if one.pid in found and one.group == group and not one.ended
    }


def adopt_orphans() -> bool:
    """Have what descends from this process stay its descendant; return whether it does."""
    if os.getpid() == 1:
        return True
    if sys.platform != "linux":
        return False
    try:
        import ctypes  # not in every Python

        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


class Orphans:
    """The children that this process was given; they stay in the list until it takes note of them.

    Those that it started are left to whoever did, such as an SDK that asks a program for a token,
    who does so at once. So only those go that had ended at the last look already.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def reap(self) -> None:
        """Take note of those that have ended."""
        ended = {
            process.pid
            for process in _processes()
            if process.ended and process.parent == os.getpid()
        }
        for pid in ended & self._seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._seen = ended


def ends_with_this_one() -> list[str]:
    """What to put before a command that the kernel shall kill when this thread has ended.

    util-linux's setpriv sets that, and then becomes the command: what subprocess could do between
    fork and exec is not safe beside threads. Empty where there is none that can.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    if setpriv is None:
        return []
    told = subprocess.run([setpriv, "--help"], capture_output=True, check=False)
    if b"--pdeathsig" not in told.stdout:  # before 2.33, and busybox's
        return []
    return [setpriv, "--pdeathsig", signal.SIGKILL.name.removeprefix("SIG"), "--"]
