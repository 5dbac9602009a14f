"""The command: `joblock run`, `peek`, `release` and `doctor`.

What it prints may come from the store, to which others write, so every line goes through
`_printable` before a terminal sees it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeAlias

from . import (
    InvalidIdError,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    __version__,
    hold_job_lock,
    peek_job_lock,
    release_job_lock,
)
from ._hold import OwnedJobLock
from ._record import epoch_ms
from ._store import BlobStore
from .conformance import check_store
from .stores import open_store
from .stores.memory import MemoryBlobStore
from .stores.sqlite import SqliteBlobStore

# Exit statuses: peek's own, those of sysexits.h, and a shell's.
LIVE, NO_LOCK, EXPIRED = 0, 1, 2
NOT_REMOVED = CHECK_FAILED = 1
USAGE, UNAVAILABLE, UNWRITABLE, HELD, LOST = 64, 69, 74, 75, 76
CANNOT_RUN, NOT_FOUND, KILLED_BY = 126, 127, 128


# What the arguments of the functions are called on the command line.
_SHOWN = {"canister_uid": "UID", "vault_id": "VAULT", "expected_job_id": "--job-id"}


class CommandError(Exception):
    """What ends the command: a line for standard error and the exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments (by default the process's) say and return the exit status.

    What goes wrong is one line on standard error.
    """
    try:
        return _do(list(sys.argv[1:] if argv is None else argv))
    except CommandError as error:
        _say(error.message)
        return error.status
    except InvalidIdError as error:
        _say(f"{_SHOWN.get(error.argument, error.argument)} {error.problem}")
        return USAGE
    except KeyboardInterrupt:
        return KILLED_BY + signal.SIGINT
    except Exception as error:  # the store's: joblock passes on whatever its SDK raises
        _say(f"{type(error).__name__}: {error}")
        return UNAVAILABLE


def _do(words: list[str]) -> int:
    try:
        args = _parse(words)
    except SystemExit:  # --help and --version
        _print()
        return 0
    status: int = args.action(args)
    return status


# run

Signals: TypeAlias = "queue.SimpleQueue[int]"


def _known(*names: str) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


_FROM_KEYS = _known("SIGINT", "SIGQUIT")  # Ctrl-C and Ctrl-\
_PASSED_ON = [*_FROM_KEYS, *_known("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]
_CHILD_ENDED = _known("SIGCHLD")
_LOOK_AGAIN_S = 0.25
_TERMINAL = Path("/dev/tty")


def _run(args: argparse.Namespace) -> int:
    if not args.command:
        raise CommandError(USAGE, _NO_COMMAND)
    store = _open_shared(args.store)
    status, ended = UNAVAILABLE, "was not started"
    with _log_to_stderr(), _signals() as signals:
        try:
            with hold_job_lock(
                store,
                args.uid,
                args.vault,
                ttl_ms=args.ttl,
                reason=args.reason,
                actor_uid=f"{socket.gethostname()} process {os.getpid()}",
            ) as lock:
                lock.check()  # the store may have taken longer than the lease lasts
                status = _attend(args.command, lock, signals, args.grace / 1000)
                ended = f"ended with {status}"
        except JobLockHeldError as error:
            raise CommandError(HELD, _held_by(args, error.existing)) from error
        except JobLockLostError as error:
            raise CommandError(LOST, f"the lock was lost; the command {ended}") from error
    return status


def _attend(command: list[str], lock: OwnedJobLock, signals: Signals, grace_s: float) -> int:
    """Run the command to its end and return its status; pass on signals; stop it at a loss.

    At a terminal the command stays in this process's group: it can read the terminal, and Ctrl-C
    reaches it without help. Without one it leads a group of its own, which gets the signals; once
    one was sent, the run lasts until the whole group has ended. Before, it lasts as long as the
    command itself, which may leave daemons behind.
    """
    early = next(_drain(signals), None)
    if early is not None:
        return KILLED_BY + early
    own_group = os.name == "posix" and _foreground_group(_TERMINAL) is None
    try:
        child = subprocess.Popen(
            command,
            env={**os.environ, "JOBLOCK_JOB_ID": lock.job_id},
            close_fds=False,  # as flock(1): redirections of the caller's stay open
            process_group=0 if own_group else None,
        )
    except OSError as error:
        _say(f"cannot run {command[0]}: {error.strerror}")
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
            _say("the lock is lost: stopping the command")
            signalled = stopping = True
            kill_at = time.monotonic() + grace_s
            _send(child.pid, signal.SIGTERM, own_group)
        if time.monotonic() >= kill_at:
            _say("the command goes on: killing it")
            kill_at = math.inf
            _send(child.pid, signal.SIGKILL, own_group)
    return child.returncode if child.returncode >= 0 else KILLED_BY - child.returncode


@contextlib.contextmanager
def _signals() -> Generator[Signals]:
    """Collect the signals that would end this process, except those that it was told to ignore.

    Only collected: none can interrupt an acquire or a release halfway.
    """
    signals: Signals = queue.SimpleQueue()

    def collect(signum: int, _frame: FrameType | None) -> None:
        signals.put(signum)

    heeded = [signum for signum in _PASSED_ON if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, collect) for signum in (*heeded, *_CHILD_ENDED)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
        _say(f"the command did not get signal {signum}: {error.strerror}")


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


@contextlib.contextmanager
def _log_to_stderr() -> Generator[None]:
    logger = logging.getLogger("joblock")
    handler = _LogLines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _LogLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


# peek, release, doctor


def _peek(args: argparse.Namespace) -> int:
    store = _open_shared(args.store)
    record = peek_job_lock(store, args.uid, args.vault)
    now_ms = epoch_ms()
    if args.json:
        _print(_ascii_json(record))
    elif record is None:
        _print(_no_lock(args, store))
    else:
        _print(*_table(args, record, now_ms))
    if record is None:
        return NO_LOCK
    return LIVE if record.is_live(now_ms) else EXPIRED


def _release(args: argparse.Namespace) -> int:
    store = _open_shared(args.store)
    job_id: str | None = args.job_id
    removed = [f"removed the lock of {args.uid} / {args.vault}, job {job_id}"]
    if args.force:
        record = peek_job_lock(store, args.uid, args.vault)
        if record is None:
            raise CommandError(NOT_REMOVED, _no_lock(args, store))
        # By its id, so that a job that takes over in this moment keeps its lock. Without an id
        # whatever is there is removed.
        job_id = record.job_id or None
        removed = ["removed:", *_table(args, record, epoch_ms())]
    result = release_job_lock(store, args.uid, args.vault, expected_job_id=job_id)
    if result.reason == "lock_already_gone":
        raise CommandError(NOT_REMOVED, _no_lock(args, store))
    if result.reason is not None:
        raise CommandError(
            NOT_REMOVED, "nothing removed: the lock is another job's (see joblock peek)"
        )
    _print(*removed)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    findings = check_store(_open(args.store))
    for finding in findings:
        _print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.check}: {finding.message}")
    return 0 if all(finding.ok for finding in findings) else CHECK_FAILED


# What is printed


def _table(args: argparse.Namespace, record: JobLockRecord, now_ms: float) -> list[str]:
    rows = {
        "lock": f"{args.uid} / {args.vault}",
        "state": "live" if record.is_live(now_ms) else "expired: the next run takes it over",
        "job": record.job_id,
        "actor": record.actor_uid,
        "reason": record.reason,
        "chunks": record.chunks_to_embed,
        "estimate": None if record.estimated_seconds is None else f"{record.estimated_seconds} s",
        "started": _when(record.started_at, now_ms),
        "expires": _when(record.expires_at, now_ms),
    }
    return [f"{name:<10}{_short(str(value))}" for name, value in rows.items() if value is not None]


def _no_lock(args: argparse.Namespace, store: BlobStore) -> str:
    return f"no lock of {args.uid} / {args.vault} in {store!r}"


def _held_by(args: argparse.Namespace, record: JobLockRecord) -> str:
    now_ms = epoch_ms()
    uid, vault, job_id, actor = (  # each shortened, so that the times are seen
        _short(_printable(str(text)), 80)
        for text in (args.uid, args.vault, record.job_id, record.actor_uid)
    )
    by = job_id if record.actor_uid is None else f"{job_id} ({actor})"
    return (
        f"{uid} / {vault} is held by job {by} "
        f"since {_when(record.started_at, now_ms)} until {_when(record.expires_at, now_ms)}"
    )


def _when(ms: float | None, now_ms: float) -> str:
    if ms is None:
        return "unknown"
    try:
        moment = datetime.fromtimestamp(ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):  # the store may hold any number
        return f"{ms:g} ms after 1970"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC ({_distance(ms - now_ms)})"


def _distance(ms: float) -> str:
    seconds = abs(ms) / 1000
    if seconds < 0.5:
        return "now"
    units = {"days": 86_400, "hours": 3600, "minutes": 60}
    name, size = next(((n, s) for n, s in units.items() if seconds >= 2 * s), ("seconds", 1))
    count = round(seconds / size)
    words = f"{count} {name if count != 1 else name[:-1]}"
    return f"in {words}" if ms > 0 else f"{words} ago"


def _ascii_json(record: JobLockRecord | None) -> str:
    """As in the store, but in ASCII, with the rest and every control character escaped."""
    return json.dumps(None if record is None else json.loads(record.to_json()))


def _print(*lines: str) -> None:
    if sys.stdout is None:  # closed before joblock began
        return
    encoding = sys.stdout.encoding
    try:
        for line in lines:
            print(_printable(line).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        # Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # that is only that nobody reads on
            raise CommandError(UNWRITABLE, f"cannot write: {error.strerror}") from error


def _say(text: str) -> None:
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(_short(_printable(f"joblock: {_SECRETS.sub('...', text)}")), file=sys.stderr)


_SECRETS = re.compile(r"(?<=://)\S+(?=@)|(?<=\?)[^\s=]+=\S+")  # of a URL in an SDK's error


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(text: str, length: int = 500) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


# Arguments


def _parse(words: list[str]) -> argparse.Namespace:
    """Take `run`'s command off at the first `--`, or else at the second in `-- UID VAULT --`."""
    if words[:1] != ["run"] or ("--" not in words and {"-h", "--help"} & {*words}):
        return _parser().parse_args(words)
    if "--" not in words:
        raise CommandError(USAGE, _NO_COMMAND)
    end = words.index("--")
    try:
        return _parser().parse_args(words[:end], argparse.Namespace(command=words[end + 1 :]))
    except CommandError:
        if words[end + 3 : end + 4] != ["--"]:
            raise
    end += 3
    return _parser().parse_args(words[:end], argparse.Namespace(command=words[end + 1 :]))


_NO_COMMAND = "run: a command is needed after `--` (see joblock run --help)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="joblock",
        description="Keep a job from running twice, with a lock in the blob store you have.",
        epilog=_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"joblock {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _add(commands, "run", _run, "hold the lock while a command runs", _RUN_EXAMPLE)
    run.usage = "joblock run [OPTIONS] UID VAULT -- COMMAND ..."
    run.add_argument(
        "--ttl",
        type=_duration,
        default="16m",
        metavar="TIME",
        help="how long the lock outlives a joblock that was killed: a number with h, m, s or ms, "
        "or several, such as 1h30m (default: 16m); the lock is renewed while the command runs",
    )
    run.add_argument(
        "--grace",
        type=_duration,
        default="10s",
        metavar="TIME",
        help="if the lock is lost, how long after SIGTERM to send SIGKILL (default: 10s)",
    )
    run.add_argument("--reason", metavar="TEXT", help="recorded in the lock, for people")

    peek = _add(commands, "peek", _peek, "show the lock", _PEEK_EXAMPLE)
    peek.add_argument("--json", action="store_true", help="print the record as JSON, or null")

    release = _add(commands, "release", _release, "remove a lock", _RELEASE_EXAMPLE)
    which = release.add_mutually_exclusive_group(required=True)
    which.add_argument("--job-id", metavar="ID", help="remove it if it is this job's")
    which.add_argument(
        "--force",
        action="store_true",
        help="read whose it is, and remove it if it still is; the job itself is not stopped",
    )

    _add(commands, "doctor", _doctor, "check that the store can keep a lock", _DOCTOR_EXAMPLE, ())
    return parser


_STATUSES = """\
exit status:
  run      the command's; 128+n if signal n ended it; 126, 127 if it could not start;
           75 the lock is held; 76 the lock was lost
  peek     0 live, 1 no lock, 2 expired
  release  0 removed, 1 not removed
  doctor   0 all is well, 1 not so
  any      64 wrong arguments, 69 the store failed, 74 the output could not be written

example:
  joblock run user-1 Business -- echo "index rebuilt"
"""
_RUN_EXAMPLE = """\
If UID or VAULT begins with a dash: joblock run [OPTIONS] -- UID VAULT -- COMMAND ...

Signals are passed on to the command; the lock is released when the command has ended. It finds
its job's id in JOBLOCK_JOB_ID.

Without a terminal the command leads a process group of its own. Signals go to the whole group, and
after one the lock is kept until the whole group has ended.

At a terminal Ctrl-C reaches the command by itself, and so a SIGINT that was sent to a foreground
joblock alone is taken for Ctrl-C and not passed on: send SIGTERM.

example:
  joblock run user-1 Business --ttl 30m --reason nightly -- echo "index rebuilt"
"""
_PEEK_EXAMPLE = """\
example:
  joblock peek user-1 Business
"""
_RELEASE_EXAMPLE = """\
example:
  joblock release user-1 Business --job-id 3a8a3f2e-1c55-4c53-9d4a-0f6f3b8f7a10
"""
_DOCTOR_EXAMPLE = """\
It writes and removes keys of its own; locks are not touched.

example:
  joblock doctor
"""


def _add(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    action: Callable[[argparse.Namespace], int],
    description: str,
    epilog: str,
    ids: tuple[str, ...] = ("uid", "vault"),
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(action=action)
    for argument in ids:
        parser.add_argument(argument, metavar=argument.upper())
    parser.add_argument(
        "--store",
        metavar="URL",
        help="such as s3://bucket/prefix or sqlite:PATH (default: JOBLOCK_STORE, else the SQLite "
        "file joblock/jobs.db in ~/.local/state or your system's like of it, which serves this "
        "user on this host only)",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(USAGE, f"{message} (see {self.prog} --help)")


_DURATION = re.compile(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?(?:(\d{1,9})ms)?", re.ASCII)
_A_YEAR_MS = 365 * 24 * 3_600_000


def _duration(text: str) -> int:
    """Return milliseconds. A number alone is refused: it may be meant as any unit."""
    match = _DURATION.fullmatch(text)
    h, m, s, ms = map(int, match.groups("0") if match else (0, 0, 0, 0))
    ms += 1000 * (s + 60 * (m + 60 * h))
    if not 0 < ms <= _A_YEAR_MS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time of up to a year with units, such as 90s, 16m or 1h30m"
        )
    return ms


def _open_shared(url: str | None) -> BlobStore:
    store = _open(url)
    if isinstance(store, MemoryBlobStore):
        raise CommandError(USAGE, "memory: is this process's own and locks no other out")
    return store


def _open(url: str | None) -> BlobStore:
    given_by = "--store"
    if url is None:
        given_by, url = "JOBLOCK_STORE", os.environ.get("JOBLOCK_STORE")
    try:
        if url is not None:
            return open_store(url)
        folder = _state_folder(sys.platform, os.environ)
    except (ValueError, ImportError) as error:
        raise CommandError(USAGE, f"{given_by}: {error} (see joblock --help)") from error
    except RuntimeError as error:
        raise CommandError(USAGE, f"{error} Name a store with --store.") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return SqliteBlobStore(folder / "jobs.db")


def _state_folder(platform: str, environ: Mapping[str, str]) -> Path:
    """Return where programs keep such files on this platform; RuntimeError if there is no home."""
    if platform == "win32":
        local = environ.get("LOCALAPPDATA", "")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "joblock"
    state = Path(environ.get("XDG_STATE_HOME", ""))
    if platform != "darwin" and state.is_absolute():
        return state / "joblock"
    if not Path(environ.get("HOME", "/")).is_absolute():  # Path.home() takes "" for /
        raise RuntimeError("Could not determine home directory.")
    place = ("Library", "Application Support") if platform == "darwin" else (".local", "state")
    return Path.home().joinpath(*place, "joblock")
