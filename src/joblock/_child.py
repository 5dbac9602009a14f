"""Running the command: its signals, its process group and its terminal.

The rules it keeps:

- Signals are collected, never acted on in a handler: none can interrupt an acquire or a release
  halfway.
- Without a terminal the command leads a process group of its own, which gets the signals. At a
  terminal it stays in this process's group, with whatever the shell's pipeline has beside it: so it
  can read the terminal, and the keys reach it without help. There the signals go to each process
  of the group that descends from this one.
- Once a signal was sent, or came from the keys, the run lasts until all of these have ended.
  Before, it lasts as long as the command itself, which may leave daemons behind.
- If the lock is lost the command gets SIGTERM and, after the grace, SIGKILL.
- If this process is killed, the kernel kills the command, where it can.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol

from . import _processes
from ._hold import OwnedJobLock, left_s
from ._output import say
from ._record import JobLockRecord

# A shell's exit statuses.
CANNOT_RUN, NOT_FOUND, KILLED_BY = 126, 127, 128


def _known(*names: str) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


_FROM_KEYS = _known("SIGINT", "SIGQUIT")  # Ctrl-C and Ctrl-\
_PASSED_ON = [*_FROM_KEYS, *_known("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]
_CHILD_ENDED = _known("SIGCHLD")
# Nobody tells of what the command has left behind, nor, on Windows, of its own end.
_LOOK_AGAIN_S = 0.25
# A host that was asleep is told of nothing either: the lock may have been lost long ago.
_LOOK_AT_LEAST_EVERY_S = 5.0
_TERMINAL = Path("/dev/tty")


def attend(command: list[str], lock: OwnedJobLock, signals: Signals, grace_s: float) -> int:
    """Run the command to its end and return its status; pass on signals; stop it at a loss."""
    early = early_signal(signals)
    if early is not None:
        return KILLED_BY + early
    own_group = os.name == "posix" and _foreground_group(_TERMINAL) is None
    adopting = (not own_group or os.getpid() == 1) and _processes.adopt_orphans()
    found = shutil.which(command[0]) is not None  # or Python's own error says why not
    try:
        child = subprocess.Popen(
            [*_processes.ends_with_this_one(), *command] if found else command,
            env=_environment(lock.record),
            close_fds=False,  # as flock(1): redirections of the caller's stay open
            process_group=0 if own_group else None,
        )
    except OSError as error:
        say(f"cannot run {command[0]}: {error.strerror}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
    family: _Family = _Group(child.pid) if own_group else _Descendants(child)
    orphans = _processes.Orphans()
    signalled = stopping = False
    kill_at = math.inf
    for signum in signals.taken():  # even from the keys: the command may have started after them
        signalled = True
        family.send(signum)

    while True:
        ended = child.poll() is not None
        for signum in signals.taken():  # after that look: what ended the command may be among them
            signalled = True
            if not _sent_by_terminal(signum):
                family.send(signum)
        if ended and not (signalled and family.goes_on()):
            break
        signals.wait(_pause_s(child, lock, kill_at))
        if adopting:
            orphans.reap()
        if lock.lost and not stopping:
            say("the lock is lost: stopping the command")
            signalled = stopping = True
            kill_at = time.monotonic() + grace_s
            family.send(signal.SIGTERM)
        if time.monotonic() >= kill_at:
            say("the command goes on: killing it")
            kill_at = math.inf
            family.send(signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else KILLED_BY - child.returncode


def _pause_s(child: subprocess.Popen[bytes], lock: OwnedJobLock, kill_at: float) -> float:
    """For how long there is nothing to see, unless a signal comes."""
    if child.returncode is not None or not _CHILD_ENDED:
        return _LOOK_AGAIN_S
    until_lost = left_s(lock) or math.inf
    return max(0, min(_LOOK_AT_LEAST_EVERY_S, until_lost, kill_at - time.monotonic()))


class _Family(Protocol):
    """The command, and what it has started in its process group."""

    def send(self, signum: int) -> None: ...

    def goes_on(self) -> bool: ...


class _Group:
    """All of a group."""

    def __init__(self, group: int) -> None:
        self._group = group

    def send(self, signum: int) -> None:
        _send(os.killpg, self._group, signum)

    def goes_on(self) -> bool:
        return _processes.group_goes_on(self._group)


class _Descendants:
    """Those of this process's group that descend from it; where nobody knows them, the command."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def _living(self) -> set[int]:
        own = {self._child.pid} if self._child.returncode is None else set[int]()
        return own | _processes.descendants(os.getpgrp() if os.name == "posix" else 0)

    def send(self, signum: int) -> None:
        told: set[int] = set()
        while missed := self._living() - told:  # what was started meanwhile
            for pid in missed:
                _send(os.kill, pid, signum)
            told |= missed

    def goes_on(self) -> bool:
        return bool(self._living())


def _send(how: Callable[[int, int], None], whom: int, signum: int) -> None:
    try:
        how(whom, signum)
    except ProcessLookupError:  # it has ended in this moment
        pass
    except OSError as error:  # one of another user
        say(f"the command did not get signal {signum}: {error.strerror}")


def _environment(record: JobLockRecord) -> dict[str, str]:
    """This process's, with the ids of the job and of its run, where it has them."""
    ids = {"JOBLOCK_JOB_ID": record.job_id, "JOBLOCK_RUN_ID": record.run_id}
    inherited = {name: text for name, text in os.environ.items() if name not in ids}
    return inherited | {name: text for name, text in ids.items() if text is not None}


class Signals:
    """Those that have come, in their order, and the waiting for more."""

    def __init__(self) -> None:
        self._came: deque[int] = deque()
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        # Python's C handler writes here. A wait for what Python's own handler tells could begin
        # just after a signal, before which that handler was not yet called, and not be ended by it.
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """Let what was told of signals before be told again."""
        signal.set_wakeup_fd(self._before)
        self._reader.close()
        self._writer.close()

    def add(self, signum: int) -> None:
        """Take in that a signal came."""
        self._came.append(signum)

    def taken(self) -> Iterator[int]:
        """Yield those that have come, each once."""
        while self._came:
            yield self._came.popleft()

    def wake(self) -> None:
        """End the waiting, from any thread."""
        with contextlib.suppress(OSError):  # it is full, and so ends it anyway, or it is closed
            self._writer.send(b"x")

    def wait(self, seconds: float) -> None:
        """Wait for a signal, the end of a child among them, or until woken, but no longer."""
        if select.select([self._reader], [], [], seconds)[0]:
            self._reader.recv(4096)


@contextlib.contextmanager
def collected_signals(stop_waiting: Callable[[], object]) -> Generator[Signals]:
    """Collect the signals that would end this process, except those that it was told to ignore.

    Only collected: none can interrupt an acquire or a release halfway. Who waits, for the lock or
    for the store to answer to its release, is told by `stop_waiting`.
    """
    signals = Signals()

    def collect(signum: int, _frame: FrameType | None) -> None:
        if signum not in _CHILD_ENDED:  # that ends a wait, and is all
            signals.add(signum)
            stop_waiting()

    heeded = [signum for signum in _PASSED_ON if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, collect) for signum in (*heeded, *_CHILD_ENDED)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signals.close()


def early_signal(signals: Signals) -> int | None:
    """The first signal that came before the command was started, if one did."""
    return next(signals.taken(), None)


def _sent_by_terminal(signum: int) -> bool:
    """Whether the command got it too: the keys go to the whole foreground group."""
    return signum in _FROM_KEYS and (
        os.name == "nt" or _foreground_group(_TERMINAL) == os.getpgrp()
    )


def _foreground_group(terminal: Path) -> int | None:
    """Return the process group that has the terminal, or None where there is no terminal."""
    try:
        with terminal.open("rb", buffering=0) as file:
            return os.tcgetpgrp(file.fileno())
    except OSError:
        return None
