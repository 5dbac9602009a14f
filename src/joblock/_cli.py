"""The command: `joblock run`, `peek`, `release` and `doctor`, and their arguments."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NoReturn

from . import (
    InvalidIdError,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    OwnedJobLock,
    __version__,
    _processes,
    hold_job_lock,
    list_job_locks,
    peek_job_lock,
    release_job_lock,
    resume_job_lock,
)
from ._child import KILLED_BY, attend, collected_signals, early_signal
from ._hold import stop_waiting, tell_of_loss
from ._locks import swept
from ._output import (
    HEADINGS,
    CommandError,
    ascii_json,
    held_by,
    log_to_stderr,
    no_lock,
    print_lines,
    print_rows,
    row,
    say,
    state_of,
    table,
)
from ._protocol import was_expired
from ._record import epoch_ms
from ._store import BlobStore
from .stores import open_store
from .stores.memory import MemoryBlobStore

# Exit statuses: peek's own, and those of sysexits.h.
LIVE, NO_LOCK, EXPIRED = 0, 1, 2
NOT_REMOVED = CHECK_FAILED = 1
USAGE, UNAVAILABLE, HELD, LOST = 64, 69, 75, 76


class _Arguments(argparse.Namespace):
    """What the command line says; each command has those that its parser adds."""

    action: Callable[[_Arguments], int]
    store: str | None
    uid: str
    vault: str
    # run
    command: list[str]
    resume: str | None
    ttl: int
    wait: int
    at_least: int
    at_most: int | None
    grace: int
    reason: str | None
    conflict_exit_code: int
    quiet: bool
    # peek and list
    json: bool
    state: tuple[str, ...] | None
    # sweep
    expired_for: int
    dry_run: bool
    # release
    job_id: str | None
    force: bool
    # doctor
    timeout: int
    clock_skew: int


# What the arguments of the functions are called on the command line.
_SHOWN = {"canister_uid": "UID", "vault_id": "VAULT", "expected_job_id": "the job's id"}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments (by default the process's) say and return the exit status.

    What goes wrong is one line on standard error.
    """
    try:
        return _do(list(sys.argv[1:] if argv is None else argv))
    except CommandError as error:
        say(error.message)
        return error.status
    except InvalidIdError as error:
        say(f"{_SHOWN.get(error.argument, error.argument)} {error.problem}")
        return USAGE
    except KeyboardInterrupt:
        return KILLED_BY + signal.SIGINT
    except Exception as error:  # the store's: joblock passes on whatever its SDK raises
        say(f"{type(error).__name__}: {error}")
        return UNAVAILABLE


def _do(words: list[str]) -> int:
    try:
        args = _parse(words)
    except SystemExit:  # --help and --version
        print_lines()
        return 0
    return args.action(args)


def _run(args: _Arguments) -> int:
    if not args.command:
        raise CommandError(USAGE, _NO_COMMAND)
    hold = _hold(args, _open_shared(args.store))
    status, ended = UNAVAILABLE, "was not started"
    slow = threading.Timer(_SLOW_S, say, [_WAITS_FOR_THE_STORE])
    slow.daemon = True
    with log_to_stderr(), collected_signals(partial(stop_waiting, hold)) as signals:
        tell_of_loss(hold, signals.wake)
        try:
            with hold as lock:
                lock.check()  # the store may have taken longer than the lease lasts
                status = attend(args.command, lock, signals, args.grace / 1000)
                ended = f"ended with {status}"
                slow.start()
        except JobLockHeldError as error:
            early = early_signal(signals)  # it waited no longer
            if early is not None:
                return KILLED_BY + early
            if args.quiet:
                return args.conflict_exit_code
            message = held_by(args.uid, args.vault, error.existing)
            raise CommandError(args.conflict_exit_code, message) from error
        except JobLockLostError as error:
            raise CommandError(LOST, f"the lock was lost; the command {ended}") from error
        finally:
            slow.cancel()
    return status


_SLOW_S = 2
_WAITS_FOR_THE_STORE = (
    "the command has ended; waiting for the store to release the lock, until its lease ends; "
    "a signal ends the waiting"
)


def _hold(args: _Arguments, store: BlobStore) -> AbstractContextManager[OwnedJobLock]:
    if args.at_most is not None and args.at_most < args.at_least:
        raise CommandError(USAGE, "run: --at-most must not be less than --at-least")
    if args.resume is None:
        return hold_job_lock(
            store,
            args.uid,
            args.vault,
            ttl_ms=args.ttl,
            wait_ms=args.wait,
            at_least_ms=args.at_least,
            at_most_ms=args.at_most,
            reason=args.reason,
            actor_uid=f"{socket.gethostname()} process {os.getpid()}",
            extra=_processes.recorded(),
        )
    if args.wait or args.reason is not None:
        raise CommandError(USAGE, "run: --wait and --reason are for a new lock, not for --resume")
    return resume_job_lock(
        store,
        args.uid,
        args.vault,
        expected_job_id=args.resume,
        ttl_ms=args.ttl,
        at_least_ms=args.at_least,
        at_most_ms=args.at_most,
    )


def _peek(args: _Arguments) -> int:
    store = _open_shared(args.store)
    record = peek_job_lock(store, args.uid, args.vault)
    now_ms = epoch_ms()
    if args.json:
        print_lines(ascii_json(record))
    elif record is None:
        print_lines(no_lock(args.uid, args.vault, store))
    else:
        print_lines(*table(args.uid, args.vault, record, now_ms))
    if record is None:
        return NO_LOCK
    return LIVE if record.is_live(now_ms) else EXPIRED


def _list(args: _Arguments) -> int:
    store, now_ms = _open_shared(args.store), epoch_ms()
    found = (
        record
        for record in list_job_locks(store, args.uid)
        if args.state is None or state_of(record, now_ms) in args.state
    )
    if args.json:
        status = NO_LOCK
        for record in found:
            print_lines(ascii_json(record))
            status = 0
        return status
    rows = sorted(row(record, now_ms) for record in found)
    if rows:
        print_rows([HEADINGS, *rows])
    return 0 if rows else NO_LOCK


def _sweep(args: _Arguments) -> int:
    store, now_ms = _open_shared(args.store), epoch_ms()
    by = now_ms - args.expired_for
    if args.dry_run:
        for record in list_job_locks(store, args.uid):
            if was_expired(record, by):
                print_lines("would remove " + "  ".join(row(record, now_ms)))
        return 0
    for key, blob in swept(store, args.uid, by):
        removed = JobLockRecord.from_json(blob.value)
        print_lines("removed " + (key if removed is None else "  ".join(row(removed, now_ms))))
    return 0


def _release(args: _Arguments) -> int:
    store = _open_shared(args.store)
    job_id = args.job_id
    removed = [f"removed the lock of {args.uid} / {args.vault}, job {job_id}"]
    if args.force:
        record = peek_job_lock(store, args.uid, args.vault)
        if record is None:
            raise CommandError(NOT_REMOVED, no_lock(args.uid, args.vault, store))
        # By its id, so that a job that takes over in this moment keeps its lock. Without an id
        # whatever is there is removed.
        job_id = record.job_id or None
        removed = ["removed:", *table(args.uid, args.vault, record, epoch_ms())]
    result = release_job_lock(store, args.uid, args.vault, expected_job_id=job_id)
    if result.reason == "lock_already_gone":
        raise CommandError(NOT_REMOVED, no_lock(args.uid, args.vault, store))
    if result.reason is not None:
        raise CommandError(
            NOT_REMOVED, "nothing removed: the lock is another job's (see joblock peek)"
        )
    print_lines(*removed)
    return 0


def _doctor(args: _Arguments) -> int:
    from .conformance import check_store  # slow, and only this command needs it

    findings = check_store(
        _open(args.store), timeout_s=args.timeout / 1000, clock_skew_ms=args.clock_skew
    )
    for finding in findings:
        print_lines(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.check}: {finding.message}")
    return 0 if all(finding.ok for finding in findings) else CHECK_FAILED


# Arguments


def _parse(words: list[str]) -> _Arguments:
    """Take `run`'s command off at the first `--`, or else at the second in `-- UID VAULT --`."""
    if words[:1] != ["run"] or ("--" not in words and {"-h", "--help"} & {*words}):
        return _parser().parse_args(words, _Arguments())
    if "--" not in words:
        raise CommandError(USAGE, _NO_COMMAND)
    end = words.index("--")
    try:
        return _parser().parse_args(words[:end], _Arguments(command=words[end + 1 :]))
    except CommandError:
        if words[end + 3 : end + 4] != ["--"]:
            raise
    end += 3
    return _parser().parse_args(words[:end], _Arguments(command=words[end + 1 :]))


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
        default="1m",
        metavar="TIME",
        help="how long the lock outlives a joblock that was killed: a number with h, m, s or ms, "
        "or several, such as 1h30m (default: 1m); the lock is renewed while the command runs",
    )
    run.add_argument(
        "--wait",
        type=_duration,
        default=0,
        metavar="TIME",
        help="for how long to wait for a lock that is held (default: not at all)",
    )
    run.add_argument(
        "--at-least",
        type=_duration,
        default=0,
        metavar="TIME",
        help="the least time for which the lock is kept, also if the command ends sooner: longer "
        "than the clocks of cron's hosts differ",
    )
    run.add_argument(
        "--at-most",
        type=_duration,
        metavar="TIME",
        help="when a command that hangs loses the lock, and is stopped",
    )
    run.add_argument(
        "--resume",
        metavar="JOB_ID",
        help="run the job that has taken the lock already, and has this id",
    )
    run.add_argument(
        "--grace",
        type=_duration,
        default="10s",
        metavar="TIME",
        help="if the lock is lost, how long after SIGTERM to send SIGKILL (default: 10s)",
    )
    run.add_argument(
        "--conflict-exit-code",
        type=_exit_status,
        default=HELD,
        metavar="N",
        help=f"the exit status if the lock is held (default: {HELD}); 0 is for cron",
    )
    run.add_argument("--quiet", action="store_true", help="say nothing if the lock is held")
    run.add_argument("--reason", metavar="TEXT", help="recorded in the lock, for people")

    peek = _add(commands, "peek", _peek, "show the lock", _PEEK_EXAMPLE)
    peek.add_argument("--json", action="store_true", help="print the record as JSON, or null")

    listing = _add(commands, "list", _list, "show all locks", _LIST_EXAMPLE, ("uid?",))
    states = listing.add_mutually_exclusive_group()
    for name, wanted in {
        "live": ("taken", "running"),
        "expired": ("expired",),
        "ended": ("ended",),
    }.items():
        about = f"only those that are {' or '.join(wanted)}"
        states.add_argument(
            f"--{name}", dest="state", action="store_const", const=wanted, help=about
        )
    listing.add_argument("--json", action="store_true", help="print a record in each line, as JSON")

    about = "remove the locks that have been expired for long"
    sweeping = _add(commands, "sweep", _sweep, about, _SWEEP_EXAMPLE, ("uid?",))
    sweeping.add_argument(
        "--expired-for",
        type=_duration,
        required=True,
        metavar="TIME",
        help="for how long: longer than a queue may take to deliver a job again",
    )
    sweeping.add_argument("--dry-run", action="store_true", help="say what would be removed")

    release = _add(commands, "release", _release, "remove a lock", _RELEASE_EXAMPLE)
    which = release.add_mutually_exclusive_group(required=True)
    which.add_argument("--job-id", metavar="ID", help="remove it if it is this job's")
    which.add_argument(
        "--force",
        action="store_true",
        help="read whose it is, and remove it if it still is; the job itself is not stopped",
    )

    about = "check that the store can keep a lock"
    doctor = _add(commands, "doctor", _doctor, about, _DOCTOR_EXAMPLE, ())
    doctor.add_argument(
        "--timeout",
        type=_duration,
        default="2m",
        metavar="TIME",
        help="after how long to give up, and clean up for 5s at most (default: 2m)",
    )
    doctor.add_argument(
        "--clock-skew",
        type=_duration,
        default="1s",
        metavar="TIME",
        help="by how much this host's clock may differ from the server's (default: 1s)",
    )
    return parser


_STATUSES = """\
exit status:
  run      the command's; 128+n if signal n ended it; 126, 127 if it could not start;
           75 the lock is held, unless --conflict-exit-code says another; 76 the lock was lost,
           or is not to be resumed
  peek     0 live, 1 no lock, 2 expired
  list     0 some, 1 none
  release  0 removed, 1 not removed
  doctor   0 all is well, 1 not so
  any      64 wrong arguments, 69 the store failed, 74 the output could not be written

example:
  joblock run user-1 Business -- echo "index rebuilt"
"""
_RUN_EXAMPLE = """\
If UID or VAULT begins with a dash: joblock run [OPTIONS] -- UID VAULT -- COMMAND ...

Signals are passed on to the command; the lock is released when the command has ended. It finds
its job's id in JOBLOCK_JOB_ID, and with --resume the id of this run in JOBLOCK_RUN_ID.

Signals go to the command and to all that it has started in its process group, and after one the
lock is kept until all of these have ended; at a terminal only Linux knows them. What leaves the
group on purpose, such as with setsid, is not followed.

At a terminal Ctrl-C reaches the command by itself, and so a SIGINT that was sent to a foreground
joblock alone is taken for Ctrl-C and not passed on: send SIGTERM.

If joblock is killed with SIGKILL, Linux kills the command too, if util-linux's setpriv is there,
but not what the command has started. Else the command goes on, and the lock expires beside it.

example:
  joblock run user-1 Business --ttl 30m --reason nightly -- echo "index rebuilt"
"""
_PEEK_EXAMPLE = """\
example:
  joblock peek user-1 Business
"""
_LIST_EXAMPLE = """\
A lock is taken by a click, or by who holds it without a run of its own; running, once a worker has
resumed it; ended, and kept for its minimum hold; or expired, so that the next click takes it over.

example:
  joblock list --live
"""
_SWEEP_EXAMPLE = """\
A lock that is renewed, resumed or taken over in this moment stays. Where the service has no
conditional delete, as on Netlify, there is nothing to sweep, and it says so.

example:
  joblock sweep --expired-for 24h --dry-run
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
    action: Callable[[_Arguments], int],
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
        name = argument.rstrip("?")
        count = "?" if argument.endswith("?") else None
        parser.add_argument(name, metavar=name.upper(), nargs=count)
    parser.add_argument(
        "--store",
        metavar="URL",
        action=_Once,
        help="such as s3://bucket/prefix or sqlite:PATH (default: JOBLOCK_STORE, else the SQLite "
        "file joblock/jobs.db in ~/.local/state or the like on other systems, which serves this "
        "user on this host only)",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(USAGE, f"{message} (see {self.prog} --help)")


class _Once(argparse.Action):
    """An option that is given twice is a mistake, since one of the two would be ignored."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


def _exit_status(text: str) -> int:
    if re.fullmatch("[0-9]{1,3}", text) is None or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not an exit status from 0 to 255")
    return int(text)


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
    try:
        return open_store(url)
    except (ValueError, ImportError) as error:
        given_by = "JOBLOCK_STORE" if url is None else "--store"
        raise CommandError(USAGE, f"{given_by}: {error} (see joblock --help)") from error
    except RuntimeError as error:
        raise CommandError(USAGE, f"{error} Name a store with --store.") from error
