"""`joblock` in this process: what each command prints and returns."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import joblock
from joblock import (
    JobLockRecord,
    _child,
    _output,
    _processes,
    acquire_job_lock,
    job_lock_key,
    list_job_locks,
    peek_job_lock,
    stores,
)
from joblock import _cli as cli
from joblock._record import epoch_ms
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import KEY, UID, VAULT, acquired

Run: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_thread_speaks_in_the_next_test() -> Iterator[None]:
    """A lock that is lost at once may be left before its thread has said so."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("joblock"):
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store that the commands use by default."""
    path = tmp_path / "jobs.db"
    monkeypatch.setenv("JOBLOCK_STORE", f"sqlite:{path}")
    return path


@pytest.fixture
def store(path: Path) -> Iterator[SqliteBlobStore]:
    with SqliteBlobStore(path) as store:
        yield store


@pytest.fixture
def run(path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Returns the status, and what went to standard output and standard error."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(argv)
        out, err = capfd.readouterr()
        return status, out, err

    return run


def put(store: SqliteBlobStore, **fields: Any) -> None:
    values: dict[str, Any] = {"job_id": "job-1", "canister_uid": UID, "vault_id": VAULT}
    store.set(KEY, JobLockRecord(**(values | fields)).to_json())


# To act at one moment of a run. A hook cannot be removed, so there is one for all tests.
_on_event: dict[str, Callable[[], object]] = {}


def _hook(event: str, _args: object) -> None:
    if event in _on_event:
        _on_event.pop(event)()


sys.addaudithook(_hook)


def started(run: Run, option: str, time: str, *rest: str) -> tuple[int, str, str]:
    """Run with a short time or, where the machine cannot start the command in it, a longer one."""
    words = rest if "--" in rest else ("--", *rest)
    for longer in (time, "3s", "30s"):
        status, out, err = run("run", UID, VAULT, option, longer, *words)
        if "was not started" not in err:
            break
    return status, out, err


class TestRun:
    def test_the_command_runs_under_the_lock(self, run: Run) -> None:
        """It has its job's id, its record is there, and the lock is gone afterwards."""
        script = (
            f'echo "$JOBLOCK_JOB_ID"; exec {sys.executable} -m joblock peek {UID} {VAULT} --json'
        )
        status, out, err = run("run", UID, VAULT, "--reason", "nightly", "--", "sh", "-c", script)
        job_id, record = out.splitlines()
        found = json.loads(record)
        assert (status, err) == (0, "")
        assert (found["jobId"], found["reason"]) == (job_id, "nightly")
        assert found["actorUid"].endswith(f" process {os.getpid()}")
        assert run("peek", UID, VAULT)[0] == 1

    def test_resume(self, run: Run, store: SqliteBlobStore) -> None:
        """The job's lock is this run's; what is not to be run any more is not started."""
        lock = acquired(acquire_job_lock(store, UID, VAULT, reason="click"))
        words = ("run", UID, VAULT, "--resume", lock.job_id)
        peek = f"exec {sys.executable} -m joblock peek {UID} {VAULT} --json"
        status, out, err = run(*words, "--", "sh", "-c", f'echo "$JOBLOCK_RUN_ID"; {peek}')
        run_id, record = out.splitlines()
        found = json.loads(record)
        assert (status, err) == (0, "")
        assert (found["jobId"], found["runId"], found["reason"]) == (lock.job_id, run_id, "click")
        assert run(*words, "--", "echo", "ran") == (
            76,
            "",
            "joblock: the lock was lost; the command was not started\n",
        )

    def test_resume_while_another_run_is_live(self, run: Run, store: SqliteBlobStore) -> None:
        """A second delivery: 75, as for another job."""
        put(store, run_id="run-1", expires_at=9e15)
        status, out, err = run("run", UID, VAULT, "--resume", "job-1", "--", "echo", "ran")
        assert (status, out) == (75, "")
        assert "is held by job job-1" in err

    def test_a_run_id_is_not_inherited(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hold's command has none, whoever started joblock."""
        monkeypatch.setenv("JOBLOCK_RUN_ID", "another's")
        assert run("run", UID, VAULT, "--", "sh", "-c", 'echo "<$JOBLOCK_RUN_ID>"')[1] == "<>\n"

    def test_at_least(self, run: Run, store: SqliteBlobStore) -> None:
        """The lock stays for the rest of the time, and peek says that the job has ended."""
        assert run("run", UID, VAULT, "--at-least", "1h", "--", "sh", "-c", "exit 3")[0] == 3
        record = peek_job_lock(store, UID, VAULT)
        assert record is not None and record.ended_at is not None
        assert record.started_at is not None
        assert record.expires_at == record.started_at + 3_600_000
        assert run("run", UID, VAULT, "--", "echo", "ran")[0] == 75
        status, out, _ = run("peek", UID, VAULT)
        assert status == 0
        assert "state     ended, and kept for its minimum hold\n" in out
        assert re.search(r"^ended     \d{4}-.* \(now\)|^ended .* ago\)", out, re.MULTILINE)

    def test_at_most(self, run: Run) -> None:
        """A command that hangs is stopped once its time is over."""
        begun = time.monotonic()
        status, _, err = started(run, "--at-most", "300ms", "sleep", "60")
        assert status == 76
        assert "lease_expired" in err
        assert err.endswith("the lock was lost; the command ended with 143\n")
        assert time.monotonic() - begun < 50, "it was not stopped"

    def test_wait(self, run: Run, store: SqliteBlobStore) -> None:
        """For a lock that is held: until it is free, or the time is over."""
        put(store, expires_at=epoch_ms() + 100)
        status, out, err = run("run", UID, VAULT, "--wait", "1m", "--", "echo", "ran")
        assert (status, out) == (0, "ran\n")
        assert "took over" in err
        put(store, expires_at=9e15)
        status, out, err = run("run", UID, VAULT, "--wait", "100ms", "--", "echo", "ran")
        assert (status, out) == (75, "")
        assert "is held by job job-1" in err

    def test_a_signal_while_it_waits(self, run: Run, store: SqliteBlobStore) -> None:
        """It ends at once, as if the signal had ended it, and the other's lock stays."""
        put(store, expires_at=9e15)
        before = store.get(KEY)
        main_thread = threading.main_thread().ident or 0
        reads = 0

        class Watched(SqliteBlobStore):
            def get(self, key: str) -> str | bytes | None:
                nonlocal reads
                reads += 1
                if reads == 2:
                    signal.pthread_kill(main_thread, signal.SIGTERM)
                return super().get(key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "_open_shared", lambda _url: Watched(store._path))  # pyright: ignore
            words = ("run", UID, VAULT, "--wait", "1h", "--", "echo", "ran")
            assert run(*words) == (143, "", "")
        assert store.get(KEY) == before

    @pytest.mark.parametrize(
        ("command", "expected"),
        [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -15 $$", 143)],
    )
    def test_exit_status(self, run: Run, command: str, expected: int) -> None:
        """The command's own, or that of a shell for a signal."""
        assert run("run", UID, VAULT, "--", "sh", "-c", command) == (expected, "", "")
        assert run("peek", UID, VAULT)[0] == 1

    def test_cannot_start(self, run: Run, tmp_path: Path) -> None:
        """127 and 126, as a shell, and the lock is released."""
        assert run("run", UID, VAULT, "--", "no-such-command") == (
            127,
            "",
            "joblock: cannot run no-such-command: No such file or directory\n",
        )
        assert run("run", UID, VAULT, "--", str(tmp_path)) == (
            126,
            "",
            f"joblock: cannot run {tmp_path}: Permission denied\n",
        )
        assert run("peek", UID, VAULT)[0] == 1

    def test_words_after_the_dashes_are_the_commands(self, run: Run) -> None:
        """Also those that look like options, and more dashes."""
        words = ("printf", "%s ", "--ttl", "--", "-h")
        assert run("run", UID, VAULT, "--", *words) == (0, "--ttl -- -h ", "")

    def test_ids_that_begin_with_a_dash(self, run: Run, store: SqliteBlobStore) -> None:
        """They stand after a `--` of their own, and the command keeps its."""
        words = ("printf", "%s ", "--", "-h")
        for options in ([], ["--ttl", "5m"]):
            status = run("run", *options, "--", "-u", "--ttl", "--", *words)
            assert status == (0, "-- -h ", "")
        store.set("index-jobs/-u/--ttl.json", JobLockRecord("job-1", "-u", "--ttl").to_json())
        out = run("peek", "--", "-u", "--ttl")[1]
        assert out.startswith("lock      -u / --ttl\n")

    @pytest.mark.parametrize("line", ["run a b true", "run a b ls -l", "run a b", "run a b --"])
    def test_no_dashes(self, run: Run, line: str) -> None:
        """The line says what is missing."""
        assert run(*line.split()) == (
            64,
            "",
            "joblock: run: a command is needed after `--` (see joblock run --help)\n",
        )

    def test_held(self, run: Run, store: SqliteBlobStore) -> None:
        """75, who has it since when and until when, and the command does not run."""
        now = epoch_ms()
        put(store, actor_uid="host-a", started_at=now - 180_000, expires_at=now + 720_000)
        status, out, err = run("run", UID, VAULT, "--", "echo", "ran")
        assert (status, out) == (75, "")
        assert "is held by job job-1 (host-a) since 20" in err
        assert "UTC (3 minutes ago) until 20" in err
        assert err.endswith("UTC (in 12 minutes)\n")
        put(store, expires_at=now + 720_000)
        assert "held by job job-1 since unknown until" in run("run", UID, VAULT, "--", "true")[2]

    def test_held_by_one_of_many_words(self, run: Run, store: SqliteBlobStore) -> None:
        """Whatever the record holds, the line has the times."""
        now = epoch_ms()
        text = "\x1b" * 600
        put(store, job_id=text, actor_uid=text, started_at=now, expires_at=now + 720_000)
        err = run("run", UID, VAULT, "--", "true")[2]
        assert "is held by job \\x1b\\x1b" in err and "(now) until 20" in err
        assert err.endswith("UTC (in 12 minutes)\n")
        assert len(err) < 500

    def test_takes_over(self, run: Run, store: SqliteBlobStore) -> None:
        """A crashed job's lock is taken over, and said so in one line."""
        put(store, expires_at=1, reason="two\nlines")
        status, out, err = run("run", UID, VAULT, "--", "true")
        assert (status, out, err.count("\n")) == (0, "", 1)
        assert err.startswith("joblock: ")
        assert "job-1" in err

    @pytest.mark.parametrize(("trap", "ended_with"), [("", 143), ("trap '' TERM;", 137)])
    def test_lost(self, run: Run, trap: str, ended_with: int) -> None:
        """SIGTERM, then SIGKILL after the grace period, and 76."""
        release = f"{sys.executable} -m joblock release {UID} {VAULT} --force > /dev/null"
        command = ("--grace", "50ms" if trap else "60s", "--", "sh", "-c")
        script = f"{trap} {release}; exec sleep 60"
        status, out, err = started(run, "--ttl", "600ms", *command, script)
        assert (status, out) == (76, "")
        assert "joblock: the lock is lost: stopping the command\n" in err
        assert ("joblock: the command goes on: killing it\n" in err) == bool(trap)
        assert err.endswith(f"joblock: the lock was lost; the command ended with {ended_with}\n")

    def test_lost_before_the_command(self, run: Run, store: SqliteBlobStore, path: Path) -> None:
        """The store took longer than the lease lasts: another run may have begun, so 76."""
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute(
                "CREATE TRIGGER slow BEFORE INSERT ON joblock BEGIN SELECT count(*) FROM ("
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000)"
                "SELECT i FROM n); END"
            )
        status, out, err = run("run", UID, VAULT, "--ttl", "10ms", "--", "echo", "ran")
        assert (status, out) == (76, "")
        assert "joblock: the lock was lost; the command was not started\n" in err

    def test_store_fails_before(self, run: Run, tmp_path: Path) -> None:
        """69, one line, and the command does not run."""
        url = f"sqlite:{tmp_path}/missing/jobs.db"
        status, out, err = run("run", UID, VAULT, "--store", url, "--", "echo", "ran")
        assert (status, out, err.count("\n")) == (69, "", 1)
        assert err.startswith("joblock: OperationalError: ")

    def test_store_fails_in_acquire(self, run: Run, store: SqliteBlobStore, path: Path) -> None:
        """69 again, when the store could be opened."""
        store.set(KEY, "{}")
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute(
                "CREATE TRIGGER no BEFORE UPDATE ON joblock BEGIN SELECT RAISE(FAIL, 'no'); END"
            )
        status, out, err = run("run", UID, VAULT, "--", "echo", "ran")
        assert (status, out) == (69, "")
        assert err == f"joblock: IntegrityError: {path}: no\n"

    @pytest.mark.parametrize("expected", [0, 5])
    def test_store_fails_in_release(self, run: Run, path: Path, expected: int) -> None:
        """The command has run: its status counts, and one line says that the lock stays."""
        code = f"import sqlite3; sqlite3.connect({str(path)!r}).execute('DROP TABLE joblock')"
        script = f"{sys.executable} -c {shlex.quote(code)}; exit {expected}"
        status, out, err = run("run", UID, VAULT, "--", "sh", "-c", script)
        assert (status, out) == (expected, "")
        assert err.startswith("joblock: job ") and err.count("\n") == 1
        assert "could not release 'index-jobs/user-1/Business.json'" in err

    def test_signals_are_passed_on(self, run: Run) -> None:
        """Each of them, and this process has its own handlers back."""
        before = signal.getsignal(signal.SIGTERM)
        script = (
            "ask() { got=; kill -TERM $PPID; while [ -z $got ]; do sleep 0.05; done; }; "
            "trap 'got=1' TERM; ask; ask; ask; exit 9"
        )
        assert run("run", UID, VAULT, "--", "sh", "-c", script)[:2] == (9, "")
        assert signal.getsignal(signal.SIGTERM) == before
        assert run("peek", UID, VAULT)[0] == 1

    def test_the_end_of_a_child_is_not_passed_on(self, run: Run) -> None:
        """The command's own SIGCHLD handler hears only of its own children."""
        code = (
            "import os, signal, time\n"
            "signal.signal(signal.SIGCHLD, lambda *_: os._exit(9))\n"
            "os.kill(os.getppid(), signal.SIGCHLD)\n"
            "time.sleep(0.2)\n"
            "os.kill(os.getppid(), signal.SIGTERM)\n"
            "time.sleep(60)\n"
        )
        assert run("run", UID, VAULT, "--", sys.executable, "-c", code) == (143, "", "")

    def test_signal_while_acquiring(self, run: Run, store: SqliteBlobStore, path: Path) -> None:
        """The command is not started, and the lock is released."""
        before = signal.getsignal(signal.SIGTERM)

        def interrupt(other: sqlite3.Connection) -> None:
            while signal.getsignal(signal.SIGTERM) == before:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            other.execute("ROLLBACK")  # from now on the acquire can go on

        def block() -> None:
            other.execute("BEGIN IMMEDIATE")
            thread.start()

        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        thread = threading.Thread(target=interrupt, args=(other,))
        _on_event["socket.gethostname"] = block  # the last event before the acquire
        with contextlib.closing(other):
            assert run("run", UID, VAULT, "--", "echo", "ran") == (143, "", "")
            thread.join()
        assert store.get(KEY) is None

    def test_a_child_of_before(self, run: Run) -> None:
        """A process that was not started here, and ends, does not stop the command's start."""
        _on_event["socket.gethostname"] = lambda: os.kill(os.getpid(), signal.SIGCHLD)
        assert run("run", UID, VAULT, "--", "echo", "ran") == (0, "ran\n", "")

    def test_signal_while_starting(self, run: Run, store: SqliteBlobStore) -> None:
        """It reaches the command once that has started."""
        _on_event["subprocess.Popen"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        assert run("run", UID, VAULT, "--", "sleep", "60") == (143, "", "")
        assert store.get(KEY) is None

    def test_a_signal_that_cannot_be_sent(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To one that has ended, not a word; of one that is another user's, a line."""
        with subprocess.Popen(["true"]) as ended:
            ended.wait()
        _child._Group(ended.pid).send(signal.SIGTERM)
        assert capsys.readouterr().err == ""

        def refused(_pid: int, _signum: int) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "killpg", refused)
        _child._Group(ended.pid).send(signal.SIGTERM)
        line = "joblock: the command did not get signal 15: Operation not permitted\n"
        assert capsys.readouterr().err == line

    def test_what_is_left_of_the_group(self, run: Run, store: SqliteBlobStore) -> None:
        """After a signal the lock stays until the leader's children have ended too."""
        peek = f"{sys.executable} -m joblock peek {UID} {VAULT} > /dev/null && echo held"
        child = f"trap 'sleep 0.1; {peek}; exit' TERM; kill -TERM $J; while :; do sleep 0.05; done"
        script = f"J=$PPID; ({child}); true"
        assert run("run", UID, VAULT, "--", "sh", "-c", script)[:2] == (143, "held\n")
        assert store.get(KEY) is None

    def test_at_a_terminal(self, run: Run, store: SqliteBlobStore, monkeypatch: Any) -> None:
        """The command is in this process's group, gets what is sent, and the keys by itself."""

        def own_group(_terminal: Path) -> int:
            return os.getpgrp()

        def no_others(_group: int) -> set[int]:  # which are the tests' servers
            return set()

        monkeypatch.setattr(_child, "_foreground_group", own_group)
        monkeypatch.setattr(_processes, "descendants", no_others)
        group = f"{sys.executable} -c 'import os; print(os.getpgrp())'"
        script = f"{group}; kill -INT $PPID; kill -TERM $PPID; sleep 60"
        # A shell that started the tests in the background has it ignored, and then it stays so.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            status, out, err = run("run", UID, VAULT, "--", "sh", "-c", script)
        finally:
            signal.signal(signal.SIGINT, before)
        assert (status, err) == (143, "")
        assert int(out) == os.getpgrp()
        assert store.get(KEY) is None

    def test_a_store_that_does_not_answer_to_the_release(
        self, run: Run, store: SqliteBlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It says what it waits for, one signal ends that, and the status is the command's."""
        main_thread = threading.main_thread().ident or 0
        said, go = threading.Event(), threading.Event()

        class Hanging(SqliteBlobStore):
            def delete_if_match(self, key: str, etag: str) -> bool:
                assert said.wait(30)
                signal.pthread_kill(main_thread, signal.SIGTERM)
                assert go.wait(30)
                return super().delete_if_match(key, etag)

        def say(text: str) -> None:
            _output.say(text)
            said.set()

        monkeypatch.setattr(cli, "_open_shared", lambda _url: Hanging(store._path))  # pyright: ignore
        monkeypatch.setattr(cli, "_SLOW_S", 0.01)
        monkeypatch.setattr(cli, "say", say)
        status, out, err = run("run", UID, VAULT, "--ttl", "1h", "--", "sh", "-c", "exit 5")
        go.set()
        assert (status, out) == (5, "")
        first, second = err.splitlines()
        assert "waiting for the store to release the lock" in first
        assert "could not release" in second
        assert "no answer from the store" in second

    def test_which_group_has_the_terminal(self, tmp_path: Path) -> None:
        """None where there is no terminal, or one that is not this process's."""
        assert _child._foreground_group(tmp_path / "missing") is None
        master, slave = os.openpty()
        try:
            assert _child._foreground_group(Path(os.ttyname(slave))) is None
        finally:
            os.close(master)
            os.close(slave)


class TestPeek:
    def test_live(self, run: Run, store: SqliteBlobStore) -> None:
        """Status 0 and a table; what is not known is left out."""
        now = epoch_ms()
        put(
            store,
            reason="re-index",
            chunks_to_embed=120,
            estimated_seconds=90,
            started_at=now - 180_000,
            expires_at=now + 720_000,
        )
        status, out, err = run("peek", UID, VAULT)
        assert (status, err) == (0, "")
        assert re.sub(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", "DATE", out) == (
            "lock      user-1 / Business\n"
            "state     taken\n"
            "job       job-1\n"
            "reason    re-index\n"
            "chunks    120\n"
            "estimate  90 s\n"
            "started   DATE (3 minutes ago)\n"
            "expires   DATE (in 12 minutes)\n"
        )

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is known")
    def test_whether_the_process_exists(self, run: Run, store: SqliteBlobStore) -> None:
        """On the host that took the lock, and only if it was `joblock run` that did."""
        peek = f"{sys.executable} -m joblock peek {UID} {VAULT}"
        status, out, _ = run("run", UID, VAULT, "--at-least", "1h", "--", "sh", "-c", peek)
        assert status == 0
        assert "process   it exists, on this host\n" in out
        record = peek_job_lock(store, UID, VAULT)
        assert record is not None
        process: Any = record.extra["process"]
        assert process["pid"] == os.getpid()
        for changed, said in {
            "started": "process   it has ended, on this host",
            "host": "",
        }.items():
            other = record.__replace__(extra={"process": {**process, changed: "1"}})
            store.set(KEY, other.to_json())
            shown = run("peek", UID, VAULT)[1]
            assert said in shown if said else "process   " not in shown
        store.set(KEY, record.__replace__(run_id="run-1").to_json())
        assert "process   " not in run("peek", UID, VAULT)[1]

    def test_none(self, run: Run, store: SqliteBlobStore) -> None:
        """Status 1, and where it looked; as JSON, null."""
        none = f"no lock of user-1 / Business in {store!r}\n"
        assert run("peek", UID, VAULT) == (1, none, "")
        assert run("peek", UID, VAULT, "--json") == (1, "null\n", "")

    def test_expired(self, run: Run, store: SqliteBlobStore) -> None:
        """Status 2, and the table says what happens next."""
        put(store, actor_uid="host-a", started_at=1, expires_at=1000)
        status, out, _ = run("peek", UID, VAULT)
        assert status == 2
        assert "state     expired: the next run takes it over\n" in out
        assert "actor     host-a\n" in out
        assert "expires   1970-01-01 00:00:01 UTC (" in out
        assert run("peek", UID, VAULT, "--json")[0] == 2

    def test_hostile_text(self, run: Run, store: SqliteBlobStore) -> None:
        """Escapes, newlines, overrides and floods cannot act on a terminal or forge a row."""
        reason = "\x1b[2J\nstate     live\r\x7f\x9b\u202e\u2028" + "x" * 10_000
        put(store, job_id="\ud800\x1b", reason=reason, expires_at=1)
        _, out, _ = run("peek", UID, VAULT)
        assert sum(line.startswith("state") for line in out.splitlines()) == 1
        assert "reason    \\x1b[2J\\nstate     live\\r\\x7f\\x9b\\u202e\\u2028xxx" in out
        assert out.isascii() and out.replace("\n", "").isprintable() and len(out) < 1000

    def test_hostile_json(self, run: Run, store: SqliteBlobStore) -> None:
        """As JSON everything is there, and nothing that a terminal acts on."""
        reason = "\x1b[2J\n\x7f\x9b\u202e" + "x" * 10_000
        put(store, reason=reason, expires_at=1)
        _, out, _ = run("peek", UID, VAULT, "--json")
        assert json.loads(out)["reason"] == reason
        assert out.isascii() and out[:-1].isprintable() and out.endswith("}\n")

    @pytest.mark.parametrize("ms", [1e300, -1e300, 10**300, 1e17])
    def test_times_beyond_the_calendar(self, run: Run, store: SqliteBlobStore, ms: float) -> None:
        """The store may hold any number; it is printed as it is."""
        put(store, started_at=1, expires_at=ms)
        status, out, _ = run("peek", UID, VAULT)
        assert status == (0 if ms > 0 else 2)
        assert f"expires   {ms:g} ms after 1970\n" in out

    def test_a_terminal_of_few_letters(
        self, run: Run, store: SqliteBlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What standard output cannot encode is escaped."""
        put(store, reason="caf\u00e9", expires_at=1)
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert run("peek", UID, VAULT)[0] == 2
        assert b"reason    caf\\xe9\n" in written.getvalue()

    def test_nobody_reads(
        self, run: Run, store: SqliteBlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pipe whose reader has gone is no error, and the answer is still the status."""
        put(store, expires_at=1)
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert run("peek", UID, VAULT) == (2, "", "")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
    def test_a_full_disk(
        self, run: Run, store: SqliteBlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An answer that could not be written is none: an error, and told once."""
        put(store, expires_at=epoch_ms() + 60_000)
        for words in (["peek", UID, VAULT, "--json"], ["--help"]):
            with Path("/dev/full").open("w", encoding="utf-8") as full:
                monkeypatch.setattr(sys, "stdout", full)
                assert run(*words) == (
                    74,
                    "",
                    "joblock: cannot write: No space left on device\n",
                )


@pytest.mark.parametrize("words", ["peek user-1 Business", "--help", "--version"])
def test_closed_standard_output(
    run: Run, store: SqliteBlobStore, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """As in `joblock peek ... >&-`: the status is the answer all the same."""
    put(store, expires_at=1)
    monkeypatch.setattr(sys, "stdout", None)
    assert run(*words.split())[0] == (2 if words.startswith("peek") else 0)


def test_closed_standard_error(
    run: Run, store: SqliteBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `joblock run ... 2>&-`: a refusal does not go to standard output instead."""
    put(store, expires_at=epoch_ms() + 60_000)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("run", UID, VAULT, "--", "echo", "ran") == (75, "", "")


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (0, "now"),
        (-499, "now"),
        (1000, "in 1 second"),
        (-1000, "1 second ago"),
        (-119_000, "119 seconds ago"),
        (120_000, "in 2 minutes"),
        (959_900, "in 16 minutes"),
        (7_200_000, "in 2 hours"),
        (-172_800_000, "2 days ago"),
    ],
)
def test_ages_in_words(ms: float, words: str) -> None:
    """In the largest unit of which there are at least two."""
    assert _output._distance(ms) == words


class TestRelease:
    def test_by_its_id(self, run: Run, store: SqliteBlobStore) -> None:
        """Only that job's lock."""
        put(store, expires_at=epoch_ms() + 60_000)
        assert run("release", UID, VAULT, "--job-id", "job-2") == (
            1,
            "",
            "joblock: nothing removed: the lock is another job's (see joblock peek)\n",
        )
        assert run("release", UID, VAULT, "--job-id", "job-1") == (
            0,
            "removed the lock of user-1 / Business, job job-1\n",
            "",
        )
        assert store.get(KEY) is None
        gone = (1, "", f"joblock: no lock of user-1 / Business in {store!r}\n")
        assert run("release", UID, VAULT, "--job-id", "job-1") == gone
        assert run("release", UID, VAULT, "--force") == gone

    @pytest.mark.parametrize("job_id", ["job-1", "", None])
    def test_by_force(self, run: Run, store: SqliteBlobStore, job_id: str | None) -> None:
        """It shows what it removed, also a lock without a job id."""
        put(store, job_id=job_id, reason="stuck", expires_at=1)
        status, out, err = run("release", UID, VAULT, "--force")
        assert (status, err) == (0, "")
        assert out.startswith("removed:\nlock      user-1 / Business\nstate     expired")
        assert "reason    stuck\n" in out
        assert store.get(KEY) is None

    def test_force_in_a_race(self, run: Run, store: SqliteBlobStore, path: Path) -> None:
        """A job that starts between the look and the removal keeps its lock."""
        put(store, expires_at=1)
        with contextlib.closing(sqlite3.connect(path)) as other:
            # The delete of what was read finds another job's record in its place.
            other.execute(
                """CREATE TRIGGER race BEFORE DELETE ON joblock WHEN OLD.etag != 'new' BEGIN
                UPDATE joblock SET etag = 'new', value = '{"jobId":"job-2"}';
                SELECT RAISE(IGNORE); END"""
            )
        status, out, err = run("release", UID, VAULT, "--force")
        assert (status, out) == (1, "")
        assert "the lock is another job's" in err
        record = peek_job_lock(store, UID, VAULT)
        assert record is not None and record.job_id == "job-2"


class TestDoctor:
    def test_all_is_well(self, run: Run, store: SqliteBlobStore) -> None:
        """A line for each finding, and status 0."""
        status, out, err = run("doctor")
        assert (status, err) == (0, "")
        assert len(out.splitlines()) > 5
        assert all(line.startswith("ok    ") for line in out.splitlines())

    @pytest.mark.parametrize(("ahead_ms", "status"), [(-3000, 1), (-500, 0), (500, 0), (3000, 1)])
    def test_the_clock(
        self, run: Run, store: SqliteBlobStore, monkeypatch: Any, ahead_ms: int, status: int
    ) -> None:
        """It may differ from the server's by a second, or by what --clock-skew says."""

        def server_time_ms(_: object, _key: str) -> tuple[float, float]:
            return epoch_ms() + ahead_ms, epoch_ms() + ahead_ms

        monkeypatch.setattr(SqliteBlobStore, "server_time_ms", server_time_ms, raising=False)
        assert run("doctor")[0] == status
        found, out, _ = run("doctor", "--clock-skew", "1h")
        assert found == 0
        assert "ok    clock: this host's clock is within " in out

    def test_a_store_that_forgets_its_conditions(self, run: Run, store: object, path: Path) -> None:
        """FAIL, the line that says what, and status 1."""
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute(
                "CREATE TRIGGER no BEFORE UPDATE ON joblock BEGIN SELECT RAISE(FAIL, 'no'); END"
            )
        status, out, _ = run("doctor")
        assert status == 1
        assert re.search("^FAIL  ", out, re.MULTILINE)
        assert re.search("^ok    ", out, re.MULTILINE)


class TestArguments:
    @pytest.mark.parametrize(
        "line",
        [
            "",
            "frobnicate",
            "run user-1 Business",
            "run user-1 Business --",
            "run user-1 -- true",
            "run user-1 -- true -- true",
            "run user-1 -- a b -- true",
            "run -- user-1 -- true",
            "run -- user-1 Business echo ran",
            "run user-1 a/b -- true",
            "run user-1 Business --ttl 16 -- true",
            "run user-1 Business --ttl 0s -- true",
            "run user-1 Business --ttl 9000h -- true",
            "run user-1 Business --grace 1m1h -- true",
            "run user-1 Business --ttl '' -- true",
            "run user-1 Business --tt 1s -- true",
            "run user-1 Business --store floppy:a -- true",
            "peek user-1",
            "peek user-1 ..",
            "peek '' Business",
            "peek user-1 Business --store ''",
            "release user-1 Business",
            "release user-1 Business --force --job-id job-1",
            "release user-1 Business --job-id ''",
            "doctor more",
            "peek \x1b[2J \n extra",
        ],
    )
    def test_mistakes(self, run: Run, line: str) -> None:
        """64 and one clean line, no traceback."""
        status, out, err = run(*shlex.split(line))
        assert (status, out) == (64, "")
        assert err.startswith("joblock: ")
        assert err[:-1].isprintable() and err.endswith("\n")

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("peek .. Business", "UID must not be '.' or '..'"),
            ("peek user-1 a/b", "VAULT must not be '.' or '..'"),
            ("release user-1 Business --job-id ''", "the job's id must be a non-empty string"),
            ("run u v --resume '' -- true", "the job's id must be a non-empty string"),
            ("run u v --at-least 2h --at-most 1h -- true", "run: --at-most must not be less than"),
            ("run u v --resume j --wait 1s -- true", "run: --wait and --reason are for a new"),
            (
                "run u v --resume j --reason r -- true",
                "run: --wait and --reason are for a new",
            ),
            ("run u v --wait 5 -- true", "argument --wait: '5' is not a time"),
            ("peek user-1 Business --store jobs.db", "--store: a store is sqlite:PATH"),
            ("peek u v --store memory: --store sqlite:a", "--store is given twice"),
        ],
    )
    def test_what_is_wrong_is_named(self, run: Run, line: str, problem: str) -> None:
        """As the user typed it, not as the library's arguments are called."""
        status, _, err = run(*shlex.split(line))
        assert status == 64
        assert err.startswith(f"joblock: {problem}")

    @pytest.mark.parametrize("url", ["jobs.db", ""])
    def test_a_bad_url_in_the_environment(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        """The variable is named; an empty one is no store, not the default one."""
        monkeypatch.setenv("JOBLOCK_STORE", url)
        status, _, err = run("doctor")
        assert status == 64
        assert err.startswith("joblock: JOBLOCK_STORE: a store is sqlite:PATH")

    @pytest.mark.parametrize(
        ("text", "ms"),
        [
            ("90s", 90_000),
            ("16m", 960_000),
            ("2h", 7_200_000),
            ("1h30m", 5_400_000),
            ("500ms", 500),
            ("1h2m3s4ms", 3_723_004),
            ("8760h", 31_536_000_000),
        ],
    )
    def test_durations(self, text: str, ms: int) -> None:
        """Hours, minutes, seconds and milliseconds, up to a year."""
        assert cli._duration(text) == ms

    def test_the_default_ttl(self, run: Run) -> None:
        """A minute, as the library's for a lock that is renewed."""
        peek = f"exec {sys.executable} -m joblock peek {UID} {VAULT} --json"
        record = json.loads(run("run", UID, VAULT, "--", "sh", "-c", peek)[1])
        assert record["expiresAt"] - record["startedAt"] == 60_000

    def test_secrets_of_urls_are_not_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        """An SDK's error may quote a signed URL."""
        _output.say("GET https://me:pass@host/a?sig=abc&x=1 failed: why? because")
        assert capsys.readouterr().err == (
            "joblock: GET https://...@host/a?... failed: why? because\n"
        )

    @pytest.mark.parametrize("password", ["p/w", "p@ss", "p?w#x", "p://w"])
    def test_passwords_are_not_shown(
        self, capsys: pytest.CaptureFixture[str], password: str
    ) -> None:
        """Also those that a URL should have escaped."""
        _output.say(f"GET https://me:{password}@host/a failed: ask me@home")
        assert capsys.readouterr().err == ("joblock: GET https://...@host/a failed: ask me@home\n")

    @pytest.mark.parametrize(
        "line",
        ["run user-1 Business -- echo ran", "peek user-1 Business", "release u v --force"],
    )
    def test_a_store_of_this_process_alone(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, line: str
    ) -> None:
        """It would lock nothing: refused, but the doctor may look at it."""
        monkeypatch.setenv("JOBLOCK_STORE", "memory:")
        assert run(*line.split()) == (
            64,
            "",
            "joblock: memory: is this process's own and locks no other out\n",
        )
        assert run("doctor")[0] == 0

    def test_nobody_reads_the_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What cannot be said must not end a run."""
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb", buffering=0) as pipe:
            errors = io.TextIOWrapper(pipe, encoding="utf-8", write_through=True)
            monkeypatch.setattr(sys, "stderr", errors)
            assert cli.main(["frobnicate"]) == 64

    def test_interrupted(self, run: Run) -> None:
        """Ctrl-C while the store is asked: no traceback, and a shell's status."""

        def interrupt() -> None:
            raise KeyboardInterrupt

        _on_event["sqlite3.connect"] = interrupt
        assert run("peek", UID, VAULT) == (130, "", "")


class TestSignals:
    """As they are collected while a command runs."""

    def test_early(self) -> None:
        """The first that came, and none twice; a child's end is none."""
        with _child.collected_signals(list) as signals:
            assert _child.early_signal(signals) is None
            for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), signum)
            assert _child.early_signal(signals) == signal.SIGTERM
            assert list(signals.taken()) == [signal.SIGUSR1]

    def test_one_that_comes_just_before_the_waiting(self) -> None:
        """It ends it, though it cannot interrupt it; so does what another thread tells."""
        with _child.collected_signals(list) as signals:
            for tell in (partial(os.kill, os.getpid(), signal.SIGCHLD), signals.wake):
                tell()
                begun = time.monotonic()
                signals.wait(300)
                assert time.monotonic() - begun < 100
            signals.wait(0)  # nothing is left of them
        signals.wake()  # nobody waits any more

    def test_what_was_before_is_again(self) -> None:
        """Also the descriptor that an event loop may have set."""
        reader, writer = socket.socketpair()
        with reader, writer:
            writer.setblocking(False)
            before = signal.set_wakeup_fd(writer.fileno())
            try:
                with _child.collected_signals(list):
                    pass
            finally:
                assert signal.set_wakeup_fd(before) == writer.fileno()


def take(store: SqliteBlobStore, vault: str, **fields: Any) -> JobLockRecord:
    """A lock of that vault, as another wrote it."""
    values: dict[str, Any] = {"job_id": f"job-{vault}", "canister_uid": UID, "vault_id": vault}
    record = JobLockRecord(**(values | fields))
    store.set(job_lock_key(UID, vault), record.to_json())
    return record


@pytest.fixture
def one_of_each(store: SqliteBlobStore) -> dict[str, JobLockRecord]:
    now = epoch_ms()
    live = {"started_at": now, "expires_at": now + 3_600_000}
    return {
        "taken": take(store, "a", actor_uid="host\n7", **live),
        "running": take(store, "b", run_id="run-1", **live),
        "ended": take(store, "c", ended_at=now, **live),
        "expired": take(store, "d", started_at=0, expires_at=1000),
    }


class TestList:
    def test_a_line_for_each(self, run: Run, one_of_each: dict[str, JobLockRecord]) -> None:
        """In columns, with what it is, and with nothing that a terminal would act on."""
        status, out, err = run("list")
        heading, *lines = out.splitlines()
        assert (status, err) == (0, "")
        assert heading.split() == ["UID", "VAULT", "STATE", "JOB", "ACTOR", "SINCE", "UNTIL"]
        assert [line.split()[2] for line in lines] == list(one_of_each)
        assert {line.index(state) for line, state in zip(lines, one_of_each, strict=True)} == {
            heading.index("STATE")
        }
        assert "host\\n7" in lines[0]
        assert lines[3].endswith("1970-01-01 00:00:00 UTC  1970-01-01 00:00:01 UTC")

    @pytest.mark.parametrize(
        ("option", "states"),
        [
            ("--live", ["taken", "running"]),
            ("--ended", ["ended"]),
            ("--expired", ["expired"]),
        ],
    )
    def test_only_some(
        self, run: Run, one_of_each: dict[str, JobLockRecord], option: str, states: list[str]
    ) -> None:
        """By state; as JSON, a line each, for programs."""
        lines = run("list", UID, option)[1].splitlines()
        assert [line.split()[2] for line in lines[1:]] == states
        records = [json.loads(line) for line in run("list", option, "--json")[1].splitlines()]
        assert records == [one_of_each[state].to_dict() for state in states]

    def test_none(self, run: Run, store: SqliteBlobStore) -> None:
        """As grep: status 1, and nothing printed."""
        assert run("list") == (1, "", "")
        take(store, "a", expires_at=1)
        assert run("list", "--live") == (1, "", "")
        assert run("list", "other", "--json") == (1, "", "")
        assert run("list", "a/b")[0] == 64

    def test_at_a_terminal(
        self, run: Run, one_of_each: dict[str, JobLockRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No line is longer than it is wide."""
        assert one_of_each
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "40")
        assert max(map(len, run("list")[1].splitlines())) == 40

    def test_a_lock_from_the_future(self, run: Run, store: SqliteBlobStore) -> None:
        """A clock was wrong, and nobody else will say so."""
        put(store, started_at=epoch_ms() + 1e10, expires_at=epoch_ms() + 2e10)
        assert "began in the future: the clock" in run("peek", UID, VAULT)[1]


class TestSweep:
    def test_what_is_expired_for_so_long(
        self, run: Run, store: SqliteBlobStore, one_of_each: dict[str, JobLockRecord]
    ) -> None:
        """It says what it removed, or would remove."""
        take(store, "young", expires_at=epoch_ms() - 60_000)
        store.set(job_lock_key(UID, "released"), "null")
        shown = f"{UID}  d  expired  job-d  -  1970-01-01 00:00:00 UTC  1970-01-01 00:00:01 UTC\n"
        status, out, _ = run("sweep", "--expired-for", "1h", "--dry-run")
        assert (status, out) == (0, f"would remove {shown}")
        assert run("sweep", "other", "--expired-for", "1h") == (0, "", "")
        status, out, _ = run("sweep", "--expired-for", "1h")
        assert status == 0
        assert out == f"removed {shown}removed {job_lock_key(UID, 'released')}\n"
        assert {it.vault_id for it in list_job_locks(store)} == {"a", "b", "c", "young"}
        assert one_of_each["expired"].vault_id == "d"

    def test_it_must_say_for_how_long(self, run: Run) -> None:
        """There is no good default: a queue may deliver a job again after a day."""
        status, _, err = run("sweep")
        assert (status, "--expired-for" in err) == (64, True)


class TestARefusal:
    def test_with_a_status_of_ones_own(self, run: Run, store: SqliteBlobStore) -> None:
        """For cron, which mails whatever is said and counts what is not 0."""
        acquired(acquire_job_lock(store, UID, VAULT))
        words = ("run", UID, VAULT, "--conflict-exit-code", "0")
        status, out, err = run(*words, "--", "false")
        assert (status, out, err.startswith(f"joblock: {UID} / {VAULT} is held")) == (0, "", True)
        assert run(*words, "--quiet", "--", "false") == (0, "", "")
        assert run("run", UID, VAULT, "--quiet", "--", "false") == (75, "", "")

    @pytest.mark.parametrize("bad", ["256", "-1", "x", "", "1.5"])
    def test_a_status_that_is_none(self, run: Run, bad: str) -> None:
        """Nothing is run."""
        status, _, err = run("run", UID, VAULT, f"--conflict-exit-code={bad}", "--", "false")
        assert (status, "not an exit status from 0 to 255" in err) == (64, True)


class TestTheDefaultStore:
    def test_a_file_in_the_state_folder(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Made for its user alone, and found again by the next command."""
        monkeypatch.delenv("JOBLOCK_STORE")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        assert run("run", UID, VAULT, "--", "true") == (0, "", "")
        folder = stores._state_folder(sys.platform, os.environ)
        assert tmp_path in folder.parents
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with SqliteBlobStore(folder / "jobs.db") as store:
            acquired(acquire_job_lock(store, UID, VAULT))
        assert run("peek", UID, VAULT)[0] == 0

    @pytest.mark.parametrize(
        ("platform", "environ", "expected"),
        [
            ("linux", {}, "HOME/.local/state/joblock"),
            ("linux", {"XDG_STATE_HOME": ""}, "HOME/.local/state/joblock"),
            ("linux", {"XDG_STATE_HOME": "relative"}, "HOME/.local/state/joblock"),
            ("linux", {"XDG_STATE_HOME": "/state"}, "/state/joblock"),
            ("darwin", {}, "HOME/Library/Application Support/joblock"),
            ("win32", {"LOCALAPPDATA": "/local"}, "/local/joblock"),
            ("win32", {}, "HOME/AppData/Local/joblock"),
        ],
    )
    def test_where(self, platform: str, environ: dict[str, str], expected: str) -> None:
        """Each platform's own place; a relative XDG_STATE_HOME counts as none."""
        expected = expected.replace("HOME", str(Path.home()), 1)
        assert stores._state_folder(platform, environ) == Path(expected)

    @pytest.mark.parametrize("home", ["", "~", "relative"])
    def test_no_home(self, run: Run, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
        """One line that says what to do; an empty HOME is not the root."""
        monkeypatch.delenv("JOBLOCK_STORE")
        monkeypatch.delenv("XDG_STATE_HOME", raising=False)
        monkeypatch.setenv("HOME", home)
        assert run("peek", UID, VAULT) == (
            64,
            "",
            "joblock: Could not determine home directory. Name a store with --store.\n",
        )
        with pytest.raises(RuntimeError):
            stores._state_folder("darwin", {"HOME": home})


class TestHelp:
    @pytest.mark.parametrize("command", ["", "run", "peek", "release", "doctor"])
    def test_examples_run_as_they_stand(self, run: Run, command: str) -> None:
        """In a shell that has the command; the lock is free, so two of them find nothing."""
        status, out, err = run(*command.split(), "--help")
        assert (status, err) == (0, "")
        example = out.split("example:\n  ")[1].strip()
        shell = f'joblock() {{ {sys.executable} -m joblock "$@"; }}; {example}'
        ran = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
        assert ran.returncode == (1 if command in ("peek", "release") else 0)
        assert "joblock" not in ran.stderr or command == "release"
        assert ran.stdout == "index rebuilt\n" or command not in ("", "run")

    def test_version(self, run: Run) -> None:
        """As the package's."""
        assert run("--version") == (0, f"joblock {joblock.__version__}\n", "")

    def test_python_dash_m(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`python -m joblock` is the same command; an import of it does nothing."""
        monkeypatch.setattr(sys, "argv", ["joblock", "--version"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("joblock", run_name="__main__")
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"joblock {joblock.__version__}\n"
        importlib.import_module("joblock.__main__")
        assert capsys.readouterr().out == ""

    def test_import_joblock_does_not_pay_for_it(self) -> None:
        """The library's users import no command line."""
        code = "import sys, joblock; print(*sys.modules)"
        modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        assert "joblock" in modules
        assert not {"joblock._cli", "argparse", "subprocess"} & set(modules)
