"""Running the command: its signals, its process group and its terminal.

The rules it keeps:

- Signals are collected, never acted on in a handler: none can interrupt an acquire or a release
  halfway.
- Without a terminal the command leads a process group of its own, which gets the signals. Once one
  was sent, the run lasts until the whole group has ended. Before, it lasts as long as the command
  itself, which may leave daemons behind.
- At a terminal the command stays in this process's group: it can read the terminal, and the keys
  reach it without help.
- If the lock is lost the command gets SIGTERM and, after the grace, SIGKILL.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from ._hold import OwnedJobLock
from ._output import say
from ._record import JobLockRecord

# A shell's exit statuses.
CANNOT_RUN, NOT_FOUND, KILLED_BY = 126, 127, 128

Signals: TypeAlias = "queue.SimpleQueue[int]"


def _known(*names: str) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


_FROM_KEYS = _known("SIGINT", "SIGQUIT")  # Ctrl-C and Ctrl-\
_PASSED_ON = [*_FROM_KEYS, *_known("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]
_CHILD_ENDED = _known("SIGCHLD")
_LOOK_AGAIN_S = 0.25
_TERMINAL = Path("/dev/tty")


def attend(command: list[str], lock: OwnedJobLock, signals: Signals, grace_s: float) -> int:
    """Run the command to its end and return its status; pass on signals; stop it at a loss."""
    early = early_signal(signals)
    if early is not None:
        return KILLED_BY + early
    own_group = os.name == "posix" and _foreground_group(_TERMINAL) is None
    try:
        child = subprocess.Popen(
            command,
            env=_environment(lock.record),
            close_fds=False,  # as flock(1): redirections of the caller's stay open
            process_group=0 if own_group else None,
        )
    except OSError as error:
        say(f"cannot run {command[0]}: {error.strerror}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
    signalled = stopping = False
    kill_at = math.inf
    for signum in _drain(signals):  # even from the keys: the command may have started after them
        signalled = True
        _send(child.pid, signum, own_group)

    while child.poll() is None or (signalled and own_group and _group_goes_on(child.pid)):
        with contextlib.suppress(queue.Empty):
            signum = signals.get(timeout=_LOOK_AGAIN_S)
            if signum not in _CHILD_ENDED and not _sent_by_terminal(signum):
                signalled = True
                _send(child.pid, signum, own_group)
        if lock.lost and not stopping:
            say("the lock is lost: stopping the command")
            signalled = stopping = True
            kill_at = time.monotonic() + grace_s
            _send(child.pid, signal.SIGTERM, own_group)
        if time.monotonic() >= kill_at:
            say("the command goes on: killing it")
            kill_at = math.inf
            _send(child.pid, signal.SIGKILL, own_group)
    return child.returncode if child.returncode >= 0 else KILLED_BY - child.returncode


def _environment(record: JobLockRecord) -> dict[str, str]:
    """This process's, with the ids of the job and of its run, where it has them."""
    ids = {"JOBLOCK_JOB_ID": record.job_id, "JOBLOCK_RUN_ID": record.run_id}
    inherited = {name: text for name, text in os.environ.items() if name not in ids}
    return inherited | {name: text for name, text in ids.items() if text is not None}


@contextlib.contextmanager
def collected_signals(stop_waiting: Callable[[], object]) -> Generator[Signals]:
    """Collect the signals that would end this process, except those that it was told to ignore.

    Only collected: none can interrupt an acquire or a release halfway. Who waits for the lock is
    told by `stop_waiting`.
    """
    signals: Signals = queue.SimpleQueue()

    def collect(signum: int, _frame: FrameType | None) -> None:
        signals.put(signum)
        if signum not in _CHILD_ENDED:
            stop_waiting()

    heeded = [signum for signum in _PASSED_ON if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, collect) for signum in (*heeded, *_CHILD_ENDED)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def early_signal(signals: Signals) -> int | None:
    """The first signal that came before the command was started, if one did."""
    return next(_drain(signals), None)


def _drain(signals: Signals) -> Iterator[int]:
    while not signals.empty():
        signum = signals.get()
        if signum not in _CHILD_ENDED:  # perhaps of a child that an exec left to this process
            yield signum


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


def _send(pid: int, signum: int, own_group: bool) -> None:
    try:
        (os.killpg if own_group else os.kill)(pid, signum)
    except OSError as error:
        say(f"the command did not get signal {signum}: {error.strerror}")


def _group_goes_on(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    # Where process 1 reaps nobody, as in some containers, what has ended stays in its group.
    states: set[bytes] = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended in this moment
            state, _parent, its_group = path.read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group:
                states.add(state)
    return states != {b"Z"}
