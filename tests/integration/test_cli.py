"""`python -m joblock` as a process: real signals, with and without a terminal, kills and races."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TypeAlias

import pytest

from joblock import JobLockRecord, acquire_job_lock, peek_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.holding import poll
from tests.support import KEY, UID, VAULT, held

JOBLOCK = [sys.executable, "-m", "joblock"]
DEADLINE_S = 30
eventually = partial(poll, within_s=DEADLINE_S, every_s=0.01)
FREQUENT_SIGNALS = [signal.SIGINT, signal.SIGTERM]
RARE_SIGNALS = [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]

Process: TypeAlias = "subprocess.Popen[str]"
Start: TypeAlias = Callable[..., Process]
Terminal: TypeAlias = Callable[..., tuple[Process, int, int]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteBlobStore]:
    """The store that every process of the test uses."""
    monkeypatch.setenv("JOBLOCK_STORE", f"sqlite:{tmp_path / 'jobs.db'}")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        yield store


@pytest.fixture
def start(store: SqliteBlobStore) -> Iterator[Start]:
    """Starts `joblock run OPTIONS... -- sh -c SCRIPT` in a session of its own, as cron does."""
    processes: list[Process] = []

    def start(script: str, *options: str, ignoring: list[int] | None = None) -> Process:
        process = subprocess.Popen(
            [*JOBLOCK, "run", UID, VAULT, *options, "--", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: heed_all_signals(ignoring or []),
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def heed_all_signals(but: list[int]) -> None:
    """Whoever started the tests may have them ignored: nohup, or a shell in the background."""
    for signum in [*FREQUENT_SIGNALS, *RARE_SIGNALS]:
        signal.signal(signum, signal.SIG_IGN if signum in but else signal.SIG_DFL)


def kill(command: int) -> None:
    """What outlives a joblock that was killed, where the kernel does not kill it too."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(command, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


class TestWithoutATerminal:
    def test_streams_pass_through(self, store: SqliteBlobStore, tmp_path: Path) -> None:
        """Standard input and output, errors and other descriptors, and not a byte of joblock's."""
        reader, writer = os.pipe()
        script = f"cat; echo error >&2; echo other > /dev/fd/{writer}"
        result = subprocess.run(
            [*JOBLOCK, "run", UID, VAULT, "--", "sh", "-c", script],
            input=b"\x00\xff\r\n",
            capture_output=True,
            pass_fds=[writer],
            start_new_session=True,
            check=False,
        )
        os.close(writer)
        with os.fdopen(reader) as other:
            assert other.read() == "other\n"
        assert (result.returncode, result.stdout, result.stderr) == (0, b"\x00\xff\r\n", b"error\n")
        assert store.get(KEY) is None

    @pytest.mark.parametrize(
        "signum",
        [*FREQUENT_SIGNALS, *(pytest.param(it, marks=pytest.mark.slow) for it in RARE_SIGNALS)],
    )
    def test_signals_reach_the_command_and_its_children(
        self, start: Start, store: SqliteBlobStore, signum: int
    ) -> None:
        """Sent to joblock alone; nothing goes on, and the lock is free."""
        # `exec` and Python because sh makes its background jobs ignore SIGINT.
        code = (
            "import os, signal, subprocess, sys, time;"
            "signal.signal(signal.SIGINT, signal.SIG_DFL);"
            "child = subprocess.Popen(['sleep', '90']);"
            "print('ready', flush=True);"
            "time.sleep(90)"
        )
        process = start(f'exec {sys.executable} -c "{code}"')
        assert line(process.stdout) == "ready\n"
        process.send_signal(signum)
        assert process.communicate(timeout=DEADLINE_S) == ("", "")  # once no process can write
        assert process.returncode == 128 + signum
        assert store.get(KEY) is None

    def test_the_lock_stays_until_the_command_has_ended(
        self, start: Start, store: SqliteBlobStore
    ) -> None:
        """A command that cleans up after SIGTERM has the lock until then, and its status counts."""
        process = start(
            "trap 'echo stopping; read go; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
        )
        assert line(process.stdout) == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert line(process.stdout) == "stopping\n"
        held(acquire_job_lock(store, UID, VAULT))
        process.communicate("\n", DEADLINE_S)
        assert process.returncode == 7
        assert store.get(KEY) is None

    def test_a_signal_that_was_ignored_stays_so(self, start: Start, store: SqliteBlobStore) -> None:
        """As under nohup: neither joblock nor the command ends."""
        process = start(
            "echo ready; read go; echo done",
            ignoring=[signal.SIGHUP],
        )
        assert line(process.stdout) == "ready\n"
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate("\n", DEADLINE_S)
        assert (process.returncode, out, err) == (0, "done\n", "")

    @pytest.mark.slow
    def test_a_killed_run_is_taken_over(self, start: Start, store: SqliteBlobStore) -> None:
        """SIGKILL frees nothing; when the lease is over, and not before, the next run goes on."""
        process = start("echo $$; exec sleep 90", "--ttl", "1s")
        command = int(line(process.stdout))
        process.kill()
        process.wait(DEADLINE_S)
        killed = peek_job_lock(store, UID, VAULT)
        assert killed is not None and killed.expires_at is not None
        try:
            while True:
                successor = start(f"exec {sys.executable} -m joblock peek {UID} {VAULT} --json")
                out, err = successor.communicate(timeout=DEADLINE_S)
                if successor.returncode != 75:
                    break
        finally:
            kill(command)
        assert successor.returncode == 0
        assert json.loads(out)["startedAt"] >= killed.expires_at
        assert str(killed.job_id) in err

    def test_a_killed_run_is_held(self, start: Start) -> None:
        """Until then the next run is refused."""
        process = start("echo $$; exec sleep 90")
        command = int(line(process.stdout))
        process.kill()
        process.wait(DEADLINE_S)
        kill(command)
        successor = start("echo ran")
        out, err = successor.communicate(timeout=DEADLINE_S)
        assert (successor.returncode, out) == (75, "")
        assert "is held by job" in err

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("script", "grace", "ended_with"),
        [
            (
                "trap 'echo cleaned; exit 0' TERM; echo ready; while :; do sleep 0.05; done",
                "60s",
                0,
            ),
            ("trap '' TERM; echo ready; exec sleep 90", "50ms", 137),
        ],
        ids=["ends", "ignores"],
    )
    def test_a_lost_lock(
        self, start: Start, store: SqliteBlobStore, script: str, grace: str, ended_with: int
    ) -> None:
        """Another's record in its place: SIGTERM, then SIGKILL, 76, and that record stays."""
        process = start(script, "--ttl", "2s", "--grace", grace)
        assert line(process.stdout) == "ready\n"
        other = JobLockRecord("other", UID, VAULT, expires_at=9e15).to_json()
        store.set(KEY, other)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out) == (76, "" if ended_with else "cleaned\n")
        assert "lost its lock: lock_owned_by_other_job" in err
        assert err.endswith(f"joblock: the lock was lost; the command ended with {ended_with}\n")
        assert "Traceback" not in err
        assert store.get(KEY) == other

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("script", "grace", "said"),
        [
            ("trap 'echo cleaned; exit' TERM; echo ready; while :; do sleep 0.05; done", "60s", 0),
            ("trap '' TERM; echo ready; exec sleep 90", "50ms", 1),
        ],
        ids=["ends", "ignores"],
    )
    def test_a_lost_lock_stops_the_whole_group(
        self, start: Start, store: SqliteBlobStore, script: str, grace: str, said: int
    ) -> None:
        """Also when its leader ends at SIGTERM: what is left of it is waited for, or killed."""
        process = start(f"({script}); true", "--ttl", "2s", "--grace", grace)
        assert line(process.stdout) == "ready\n"
        store.set(KEY, JobLockRecord("other", UID, VAULT, expires_at=9e15).to_json())
        err = process.stderr
        assert err is not None
        assert "lost its lock" in line(err)
        assert "stopping the command" in line(err)
        assert process.wait(DEADLINE_S) == 76
        # Nothing of the group is left, or this would wait for it to close the pipe.
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 0)[0]
        assert process.stdout.read() == ("" if said else "cleaned\n")
        assert err.read().count("the command goes on: killing it\n") == said

    def test_the_lock_stays_until_the_group_has_ended(
        self, start: Start, store: SqliteBlobStore
    ) -> None:
        """SIGTERM ends the leader at once; its child cleans up, and gets a further signal."""
        child = "trap 'echo stopping' TERM; trap exit USR1; echo $$; while :; do sleep 0.05; done"
        process = start(f"({child}); true")
        leader = int(line(process.stdout))
        process.send_signal(signal.SIGTERM)
        assert line(process.stdout) == "stopping\n"
        eventually(lambda: not is_running(leader))
        assert process.poll() is None
        held(acquire_job_lock(store, UID, VAULT))
        process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=DEADLINE_S)  # sh tells of a sleep that was ended too
        assert (process.returncode, out) == (143, "")
        assert store.get(KEY) is None

    def test_a_daemon_is_not_waited_for(self, start: Start, store: SqliteBlobStore) -> None:
        """Without a signal the lock lasts as long as the command itself."""
        process = start("sleep 90 > /dev/null 2>&1 & echo $!")
        daemon = int(line(process.stdout))
        try:
            assert process.wait(DEADLINE_S) == 0
            assert is_running(daemon)
            assert store.get(KEY) is None
        finally:
            os.kill(daemon, signal.SIGKILL)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="a child subreaper is Linux's")
    def test_nobody_reaps(self, store: SqliteBlobStore) -> None:
        """What has ended is not waited for where process 1 leaves it unreaped."""
        code = (
            "import ctypes, subprocess, sys\n"
            "assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER\n"
            "joblock = subprocess.Popen(sys.argv[1:], start_new_session=True)\n"
            "sys.stdin.readline()\n"
            "joblock.terminate()\n"
            f"sys.exit(joblock.wait({DEADLINE_S}))\n"
        )
        script = "(trap 'sleep 0.5; exit' TERM; echo ready; while :; do sleep 0.05; done); true"
        command = [*JOBLOCK, "run", UID, VAULT, "--", "sh", "-c", script]
        with subprocess.Popen(
            [sys.executable, "-c", code, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert line(process.stdout) == "ready\n"
            process.communicate("\n", 2 * DEADLINE_S)
        assert process.returncode == 143
        assert store.get(KEY) is None

    @pytest.mark.slow
    def test_a_long_command_keeps_its_lock(self, start: Start, store: SqliteBlobStore) -> None:
        """It is renewed for as long as the command runs."""
        process = start("echo ready; read go", "--ttl", "2s")
        assert line(process.stdout) == "ready\n"
        first = held(acquire_job_lock(store, UID, VAULT)).existing.expires_at
        assert first is not None

        def is_renewed() -> bool:
            record = peek_job_lock(store, UID, VAULT)
            return (
                record is not None and record.expires_at is not None and record.expires_at > first
            )

        eventually(is_renewed)
        assert process.communicate("\n", DEADLINE_S) == ("", "")
        assert process.returncode == 0

    @pytest.mark.parametrize("words", ["peek user-1 Business", "--help", "--version"])
    def test_nobody_reads(self, store: SqliteBlobStore, words: str) -> None:
        """As in `joblock peek ... | true`: not a word of it."""
        reader, writer = os.pipe()
        os.close(reader)
        result = subprocess.run(
            [*JOBLOCK, *words.split()], stdout=writer, stderr=subprocess.PIPE, check=False
        )
        os.close(writer)
        assert result.returncode == (1 if words.startswith("peek") else 0)
        assert result.stderr == b""


class TestAtATerminal:
    """In a pseudo-terminal, as its foreground job."""

    @pytest.fixture
    def terminal(self, store: SqliteBlobStore) -> Iterator[Terminal]:
        master, slave = os.openpty()
        processes: list[Process] = []

        def start(script: str, joblock: list[str] = JOBLOCK) -> tuple[Process, int, int]:
            process = subprocess.Popen(
                [*joblock, "run", UID, VAULT, "--", "sh", "-c", script],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                preexec_fn=take_terminal,
                text=True,
            )
            processes.append(process)
            return process, master, slave

        yield start
        for process in processes:
            process.kill()
            process.wait()
        os.close(slave)
        os.close(master)

    def test_keys_and_input(self, terminal: Terminal, store: SqliteBlobStore) -> None:
        """The command reads the terminal, and gets each Ctrl-C once, not also from joblock."""
        code = (
            "import os, signal, sys, time;"
            "signal.signal(signal.SIGINT, lambda *_: os.write(1, b'one interrupt\\n'));"
            "ended = [];"
            "signal.signal(signal.SIGTERM, lambda *_: ended.append(5));"
            "print('hello', input(), flush=True);"
            "[time.sleep(0.01) for _ in iter(lambda: ended, [5])];"
            "sys.exit(5)"
        )
        process, master, slave = terminal(f'exec {sys.executable} -c "{code}"')
        os.write(master, b"operator\n")
        shown = read_until(master, "hello operator\r\n")
        process.send_signal(signal.SIGSTOP)  # the command shall be done with the first by then
        os.write(master, b"\x03")
        shown += read_until(master, "one interrupt\r\n")
        process.send_signal(signal.SIGCONT)
        # What joblock passes on it passes on in order: a second interrupt would come first.
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 5
        os.write(slave, b"the end")
        shown += read_until(master, "the end")
        assert shown.count("one interrupt") == 1
        assert store.get(KEY) is None

    @pytest.mark.parametrize(("key", "signum"), [(b"\x03", 2), (b"\x1c", 3)])
    def test_a_key_that_ends_the_command(
        self,
        terminal: Terminal,
        store: SqliteBlobStore,
        key: bytes,
        signum: int,
    ) -> None:
        """Ctrl-C, or SIGQUIT's key: joblock releases the lock and has the command's status."""
        process, master, _ = terminal("ulimit -c 0; echo ready; exec sleep 90")
        shown = read_until(master, "ready\r\n")
        os.write(master, key)
        assert process.wait(DEADLINE_S) == 128 + signum
        assert "joblock" not in shown
        assert store.get(KEY) is None

    def test_a_key_that_the_command_was_too_young_for(
        self, terminal: Terminal, store: SqliteBlobStore
    ) -> None:
        """Ctrl-C while the command is being started reaches it all the same."""
        interrupted = (
            "import os, signal, sys; from joblock import _cli as cli;"
            "sys.addaudithook(lambda event, _: event == 'subprocess.Popen'"
            " and os.kill(os.getpid(), signal.SIGINT));"
            "sys.exit(cli.main())"
        )
        process, *_ = terminal("exec sleep 90", [sys.executable, "-c", interrupted])
        assert process.wait(DEADLINE_S) == 130
        assert store.get(KEY) is None


def take_terminal() -> None:
    heed_all_signals([])
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(master: int, text: str) -> str:
    shown = ""
    while text not in shown:
        assert select.select([master], [], [], DEADLINE_S)[0], shown
        shown += os.read(master, 1000).decode()
    return shown


# A whole run each, forked together so that only one pays for Python's start.
FIFTY_FORKS = """
import os, sys
from joblock import _cli as cli

together, go = os.pipe()
for _ in range(50):
    if os.fork() == 0:
        os.close(go)
        os.read(together, 1)
        os._exit(cli.main(sys.argv[1:]))
os.close(go)
for _ in range(50):
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
# The winner goes on until the losers have answered; a second winner would end with 124.
UNTIL_ALL_HAVE_ANSWERED = ["timeout", "60", "sh", "-c", "read go"]
RUN = ["run", UID, VAULT, "--", *UNTIL_ALL_HAVE_ANSWERED]


class TestFiftyAtOnce:
    """As fifty hosts' cron at the same minute: one runs, forty-nine are told who does."""

    @pytest.mark.slow
    def test_forked(self, store: SqliteBlobStore) -> None:
        """Processes on one SQLite file, let loose at the same moment."""
        with subprocess.Popen(
            [sys.executable, "-c", FIFTY_FORKS, *RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            losers = [int(line(process.stdout)) for _ in range(49)]
            winner, errors = process.communicate("\n", DEADLINE_S)
        assert losers == [75] * 49
        assert winner == "0\n"
        assert errors.count("is held by job") == 49 == errors.count("\n")
        assert store.get(KEY) is None

    @pytest.mark.deep
    def test_started(self, store: SqliteBlobStore) -> None:
        """The same with fifty starts of Python, as they come."""
        reader, writer = os.pipe()
        processes = [
            subprocess.Popen([*JOBLOCK, *RUN], stdin=reader, stderr=subprocess.PIPE, text=True)
            for _ in range(50)
        ]
        eventually(lambda: [process.poll() for process in processes].count(None) <= 1)
        losers = [process.returncode for process in processes if process.returncode is not None]
        os.write(writer, b"\n")
        errors = "".join(process.communicate(timeout=DEADLINE_S)[1] for process in processes)
        os.close(reader)
        os.close(writer)
        assert losers == [75] * 49
        assert sorted(process.returncode for process in processes) == [0] + [75] * 49
        assert errors.count("is held by job") == 49
        assert store.get(KEY) is None
