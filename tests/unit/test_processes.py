"""What is told of processes, and what is sent to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from joblock import _child, _processes
from tests.holding import poll

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is known")


@linux
class TestIdentity:
    def test_a_process_that_lives(self) -> None:
        """The same each time, another than another process's, and JSON."""
        own = _processes.identity(os.getpid())
        assert own == _processes.identity(os.getpid()) == json.loads(json.dumps(own))
        assert _processes.lives(own) is True
        with subprocess.Popen(["sleep", "60"]) as child:
            other = _processes.identity(child.pid)
            assert _processes.lives(other) is True
            child.kill()
        assert _processes.lives(other) is False

    def test_one_that_nobody_has_taken_note_of(self) -> None:
        """It has ended all the same."""
        child = subprocess.Popen(["true"])
        poll(lambda: _processes.identity(child.pid) is None)
        child.wait()

    def test_another_one_with_its_number(self) -> None:
        """Numbers are used again."""
        own = _processes.identity(os.getpid()) or {}
        assert _processes.lives({**own, "started": "1"}) is False

    @pytest.mark.parametrize("identified", [None, "x", {}, {"pid": "1"}, {"host": "another"}])
    def test_what_is_not_known_here(self, identified: Any) -> None:
        """Of another host, or another start of this one, another namespace, or none at all."""
        assert _processes.lives(identified) is None
        own = _processes.identity(os.getpid())
        assert own is not None
        if isinstance(identified, dict):
            assert _processes.lives({**own, **identified}) in (None, True)
            assert _processes.lives({**own, "host": "another"}) is None

    def test_where_there_is_no_proc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Nothing is known, of no process."""
        own = _processes.identity(os.getpid())
        monkeypatch.setattr(_processes, "_PROC", tmp_path)
        assert _processes.identity(os.getpid()) is None
        assert _processes.recorded() == {}
        assert _processes.lives(own) is None
        assert _processes.descendants(os.getpgrp()) == set()


@linux
def test_descendants() -> None:
    """Those that live, in that group, at any depth."""
    script = "sleep 60 & echo $!; setsid sleep 60 & wait"
    with subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, text=True, process_group=0
    ) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        poll(lambda: _processes.descendants(child.pid) == {child.pid, grandchild})
        assert child.pid not in _processes.descendants(os.getpgrp())
        os.killpg(child.pid, signal.SIGKILL)
        poll(lambda: _processes.descendants(child.pid) == set())


@linux
def test_orphans_are_reaped_at_the_second_look() -> None:
    """So that whoever has started a process can take note of its end first."""
    child = subprocess.Popen(["true"])
    orphans = _processes.Orphans()
    poll(lambda: _processes.identity(child.pid) is None)
    orphans.reap()
    assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is not None
    orphans.reap()
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, 0)
    child.wait()  # Python takes that for an end with 0


class TestAdopting:
    @linux
    def test_on_linux(self) -> None:
        """A process whose parent has ended becomes this one's child."""
        code = (
            "import os, subprocess, sys; from joblock import _processes;"
            "assert _processes.adopt_orphans();"
            "out = subprocess.run(['sh', '-c', '(sleep 0.1; echo $PPID) &'], stdout=-1).stdout;"
            "sys.exit(os.waitpid(-1, 0)[1])"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_process_1(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It need not ask for them."""
        monkeypatch.setattr(os, "getpid", lambda: 1)
        monkeypatch.setattr(sys, "platform", "another")
        assert _processes.adopt_orphans()

    def test_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On another system, or without ctypes."""
        monkeypatch.setitem(sys.modules, "ctypes", None)
        assert not _processes.adopt_orphans()
        monkeypatch.setattr(sys, "platform", "another")
        assert not _processes.adopt_orphans()


class TestEndingWithThisOne:
    def test_without_setpriv(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert _processes.ends_with_this_one() == []

    def test_a_setpriv_that_cannot(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Busybox's, and util-linux's of before 2018, would not start the command."""
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(sys, "platform", "linux")
        setpriv = tmp_path / "setpriv"
        setpriv.write_text("#!/bin/sh\necho usage: setpriv --nnp PROG\n")
        setpriv.chmod(0o755)
        assert _processes.ends_with_this_one() == []
        setpriv.write_text("#!/bin/sh\necho usage: setpriv --nnp --pdeathsig SIG PROG\n")
        assert _processes.ends_with_this_one() == [str(setpriv), "--pdeathsig", "KILL", "--"]


def test_what_is_started_meanwhile_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that begins between the look and the signal gets it after the next look."""
    with (
        subprocess.Popen(["sleep", "60"]) as child,
        subprocess.Popen(["sleep", "60"]) as late,
    ):
        looks = iter([set[int](), {late.pid}, {late.pid}, set[int]()])

        def descendants(_group: int) -> set[int]:
            return next(looks)

        monkeypatch.setattr(_processes, "descendants", descendants)
        _child._Descendants(child).send(signal.SIGTERM)
        assert (child.wait(), late.wait()) == (-signal.SIGTERM, -signal.SIGTERM)
    assert not _child._Descendants(child).goes_on()
