"""What `joblock run` starts, and what it leaves: at a terminal, as process 1, and when killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest

from joblock import JobLockRecord, _processes, acquire_job_lock
from joblock.stores.sqlite import SqliteBlobStore
from tests.holding import poll
from tests.support import KEY, UID, VAULT, held

DEADLINE_S = 60
eventually = partial(poll, within_s=DEADLINE_S, every_s=0.01)
JOBLOCK = f"{shlex.quote(sys.executable)} -m joblock run {UID} {VAULT}"
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is known")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteBlobStore]:
    monkeypatch.setenv("JOBLOCK_STORE", f"sqlite:{tmp_path / 'jobs.db'}")
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        yield store


def lives(pid: int) -> bool:
    """Not one that has ended and that nobody has taken note of."""
    return _processes.identity(pid) is not None


class Terminal:
    """A pseudo-terminal with an interactive shell, as an operator has."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        self.shown = ""
        environment = os.environ | {"PS1": "prompt> ", "TERM": "dumb"}
        self.shell = subprocess.Popen(
            ["bash", "--norc", "--noediting", "-i"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.until("prompt> ")

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, text: str) -> str:
        """Read on until this is shown, and return what came before it."""
        while text not in self.shown:
            assert select.select([self.master], [], [], DEADLINE_S)[0], self.shown
            self.shown += os.read(self.master, 1000).decode()
        before, _, self.shown = self.shown.partition(text)
        return before

    def run(self, command: str) -> None:
        """Start a command; the echo of what was typed is not waited for as if it were its own."""
        self.type(f"{command}\n")
        self.until("\n")

    def joblock(self) -> int:
        """The process id of the joblock that runs here."""
        self.until("pid ")
        return int(self.until(" of joblock"))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.shell.pid, signal.SIGKILL)
        self.shell.kill()
        self.shell.wait()
        os.close(self.master)


def _take_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell in the background has it ignored
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(store: SqliteBlobStore) -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


# Prints who is joblock: the command's parent.
WHO = "echo pid $PPID of joblock"
# A child in the same group that tells of its end only when it was let go.
CLEANS_UP = "trap 'echo clean''ing; read go < {fifo}; echo clean''ed; exit' TERM"
LOOPS = "echo child $$ here; while :; do sleep 0.05; done"


def take_from(store: SqliteBlobStore) -> None:
    store.set(KEY, JobLockRecord("other", UID, VAULT, expires_at=9e15).to_json())


@linux
class TestAtATerminal:
    """In an interactive shell."""

    def started(self, terminal: Terminal, script: str, options: str = "") -> tuple[int, int]:
        """Run it; return the process ids of joblock and of the script's child."""
        terminal.run(f"{JOBLOCK} {options} -- sh -c {shlex.quote(f'{WHO}; {script}')}")
        joblock = terminal.joblock()
        terminal.until("child ")
        return joblock, int(terminal.until(" here"))

    def test_sigterm_reaches_the_commands_children(
        self, terminal: Terminal, store: SqliteBlobStore
    ) -> None:
        """`sh` ends and leaves its child: that gets the signal too."""
        joblock, child = self.started(terminal, f"sh -c '{LOOPS}'; true")
        os.kill(joblock, signal.SIGTERM)
        terminal.until("prompt> ")
        assert not lives(child)
        assert store.get(KEY) is None

    def test_and_those_that_were_left_alone(
        self, terminal: Terminal, store: SqliteBlobStore
    ) -> None:
        """A child of a process that has ended is followed, too."""
        joblock, child = self.started(terminal, f"(sh -c '{LOOPS}' &); sleep 90")
        os.kill(joblock, signal.SIGTERM)
        terminal.until("prompt> ")
        assert not lives(child)

    def test_the_lock_stays_until_all_have_ended(
        self, terminal: Terminal, store: SqliteBlobStore, tmp_path: Path
    ) -> None:
        """Also when the command itself has ended long before."""
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        script = f"{CLEANS_UP.format(fifo=fifo)}; {LOOPS}"
        joblock, child = self.started(terminal, f"sh -c {shlex.quote(script)}; true")
        os.kill(joblock, signal.SIGTERM)
        terminal.until("cleaning")
        eventually(lambda: children(joblock) == [child])  # the command's, which has ended
        held(acquire_job_lock(store, UID, VAULT))
        fifo.write_text("\n")
        assert "prompt> " not in terminal.until("cleaned")
        terminal.until("prompt> ")
        assert store.get(KEY) is None

    def test_what_ctrl_c_leaves_is_waited_for(
        self, terminal: Terminal, store: SqliteBlobStore
    ) -> None:
        """A child that the shell had ignore it keeps the lock."""
        joblock, child = self.started(terminal, f"sh -c '{LOOPS}' & wait")
        terminal.type("\x03")
        terminal.until("^C")
        held(acquire_job_lock(store, UID, VAULT))
        assert lives(child)
        os.kill(joblock, signal.SIGTERM)
        terminal.until("prompt> ")
        assert not lives(child)
        assert store.get(KEY) is None

    @pytest.mark.slow
    def test_a_lost_lock_stops_all(self, terminal: Terminal, store: SqliteBlobStore) -> None:
        """With SIGTERM and, after the grace, with SIGKILL."""
        script = f"trap '' TERM; {LOOPS}"
        _, child = self.started(
            terminal, f"sh -c {shlex.quote(script)}; true", "--ttl 2s --grace 50ms"
        )
        take_from(store)
        terminal.until("the command goes on: killing it")
        terminal.until("the lock was lost")
        terminal.until("prompt> ")
        assert not lives(child)

    def test_a_daemon_is_not_followed(self, terminal: Terminal, store: SqliteBlobStore) -> None:
        """What has left the group on purpose goes on."""
        joblock, child = self.started(terminal, f"setsid sh -c '{LOOPS}' & wait")
        os.kill(joblock, signal.SIGTERM)
        terminal.until("prompt> ")
        try:
            assert lives(child)
        finally:
            os.killpg(child, signal.SIGKILL)

    def test_others_of_the_pipeline_are_left_alone(
        self, terminal: Terminal, store: SqliteBlobStore
    ) -> None:
        """They are in the same group, but are not the command's."""
        neighbour = "sh -c 'echo child $$ here > /dev/tty; cat; echo neigh''bour ended'"
        script = shlex.quote(f"sleep 90; {WHO}")
        terminal.run(f"{JOBLOCK} -- sh -c {script} | {neighbour}")
        terminal.until("child ")
        child = int(terminal.until(" here"))
        eventually(lambda: store.get(KEY) is not None)
        (joblock,) = siblings(child)
        os.kill(joblock, signal.SIGTERM)
        terminal.until("neighbour ended")
        terminal.until("prompt> ")

    def test_ctrl_z_and_fg(self, terminal: Terminal, store: SqliteBlobStore) -> None:
        """The shell stops the job and goes on with it; then the command reads what is typed."""
        _, command = self.started(terminal, "echo child $$ here; read words; echo 'it read' $words")
        terminal.type("\x1a")
        terminal.until("Stopped")
        terminal.until("prompt> ")
        # Joblock is. What is typed before the command is stopped, too, may still be read by it.
        eventually(lambda: ") T " in Path(f"/proc/{command}/stat").read_text())
        terminal.run("fg")
        terminal.type("some words\n")
        terminal.until("it read some words")
        terminal.until("prompt> ")
        assert store.get(KEY) is None

    def test_a_password(self, terminal: Terminal, store: SqliteBlobStore) -> None:
        """What is typed is not shown, and the terminal is as before."""
        code = "import getpass; print('it was', getpass.getpass('Your password: ')[::-1])"
        terminal.run(f"{JOBLOCK} -- {shlex.quote(sys.executable)} -c {shlex.quote(code)}")
        terminal.until("Your password: ")
        terminal.type("drowssap\n")
        assert "drowssap" not in terminal.until("it was password")
        terminal.until("prompt> ")
        terminal.type("echo shown\n")
        terminal.until("echo shown")

    @pytest.mark.parametrize("where", ["command", "pipeline"])
    def test_a_full_screen(self, terminal: Terminal, store: SqliteBlobStore, where: str) -> None:
        """A program that takes the terminal's keys: as the command, or behind it in a pipeline."""
        pager = (
            "import os, sys, termios, tty\n"
            "sys.stdin.isatty() or print(sys.stdin.read())\n"
            "keys = os.open('/dev/tty', os.O_RDWR)\n"
            "before = termios.tcgetattr(keys)\n"
            "tty.setraw(keys)\n"
            "os.write(keys, b'a full ' b'screen')\n"
            "key = os.read(keys, 1)\n"
            "termios.tcsetattr(keys, termios.TCSADRAIN, before)\n"
            "print('it was left by', key.decode())\n"
        )
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(pager)}"
        seen = "--" if where == "command" else "-- echo page 1 |"
        terminal.type(f"{JOBLOCK} {seen} {command}\n")
        if where == "pipeline":
            terminal.until("page 1\r\n")
        terminal.until("a full screen")
        terminal.type("q")
        terminal.until("it was left by q")
        terminal.until("prompt> ")
        assert store.get(KEY) is None


def siblings(pid: int) -> list[int]:
    """The other processes of its group that have the same parent."""
    everyone = list(_processes._processes())
    (own,) = [one for one in everyone if one.pid == pid]
    return [
        one.pid for one in everyone if one[2:4] == own[2:4] and one.pid != pid and not one.ended
    ]


Process: TypeAlias = "subprocess.Popen[str]"


def start(script: str, *before: str) -> Process:
    """Without a terminal."""
    return subprocess.Popen(
        [*before, *shlex.split(JOBLOCK), "--", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def line(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@linux
@pytest.mark.skipif(not _processes.ends_with_this_one(), reason="no setpriv with --pdeathsig")
def test_the_command_ends_with_a_joblock_that_is_killed(store: SqliteBlobStore) -> None:
    """Even if it ignores what can be ignored; its lock stays until the lease is over."""
    with start("trap '' TERM HUP INT; echo $$; while :; do sleep 0.05; done") as process:
        command = int(line(process))
        process.kill()
        process.wait(DEADLINE_S)
        eventually(lambda: not lives(command))
        held(acquire_job_lock(store, UID, VAULT))


AS_PROCESS_1 = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def container() -> list[str]:
    """What starts a program as the first of a process namespace, as a container does."""
    try:
        subprocess.run([*AS_PROCESS_1, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no process namespace can be made here: {error}")
    return AS_PROCESS_1


@linux
class TestAsProcess1:
    """Of a container."""

    def test_its_status_is_the_commands(self, store: SqliteBlobStore, container: list[str]) -> None:
        with start("echo $PPID; exit 7", *container) as process:
            assert line(process) == "1"
            assert process.wait(DEADLINE_S) == 7
        assert store.get(KEY) is None

    def test_signals_are_passed_on(self, store: SqliteBlobStore, container: list[str]) -> None:
        """The kernel gives process 1 only those that it handles."""
        script = "trap 'echo stopping; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
        with start(script, *container) as process:
            assert line(process) == "ready"
            (joblock,) = children(process.pid)
            os.kill(joblock, signal.SIGTERM)
            assert line(process) == "stopping"
            assert process.wait(DEADLINE_S) == 5
        assert store.get(KEY) is None

    @pytest.mark.slow
    def test_orphans_are_reaped(self, store: SqliteBlobStore, container: list[str]) -> None:
        """The children of those that end become its own; none of them stays as a zombie."""
        script = "for i in 1 2 3; do (sleep 0.01 &); done; echo ready; read go"
        with start(script, *container) as process:
            assert line(process) == "ready"
            (joblock,) = children(process.pid)
            eventually(lambda: len(children(joblock)) == 1)  # the command
            process.communicate("\n", DEADLINE_S)
        assert process.returncode == 0


def children(pid: int) -> list[int]:
    """Also those that have ended and that nobody has taken note of."""
    return [one.pid for one in _processes._processes() if one.parent == pid]
