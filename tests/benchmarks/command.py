"""What `joblock run` costs: its start beside flock(1)'s and Python's own, and while it waits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from .table import Row, microseconds

BARE, OURS = "python -c pass", "joblock run -- true"


def command(*, quick: bool) -> Iterator[Row]:
    """In turns, with everything compiled beforehand, on a SQLite file."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "PYTHONPYCACHEPREFIX": folder,
            "JOBLOCK_STORE": f"sqlite:{folder}/jobs.db",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        joblock = [sys.executable, "-m", "joblock", "run", "user-1", "Business", "--"]
        needed = "import argparse, logging, sqlite3, subprocess, threading, uuid"
        cases = {
            BARE: [sys.executable, "-c", "pass"],
            "python -c 'import argparse, sqlite3, subprocess, ...'": [
                sys.executable,
                "-c",
                needed,
            ],
            OURS: [*joblock, "true"],
        }
        if shutil.which("flock"):
            cases["flock FILE true"] = ["flock", f"{folder}/flock", "true"]
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(3 if quick else 22):
            for name, words in cases.items():
                started = time.perf_counter()
                subprocess.run(words, check=True, env=environment)
                seconds[name].append(time.perf_counter() - started)
        bare = median(seconds[BARE][1:])
        for name in cases:
            took = median(seconds[name][1:])  # the first round compiles
            yield Row(name, microseconds(took), f"{took / bare:.2f} x {BARE}")
        if sys.platform == "linux":
            with subprocess.Popen([*joblock, "sleep", "600"], env=environment) as waiting:
                time.sleep(1)
                yield from _waiting(Path(f"/proc/{waiting.pid}"), 1 if quick else 30)
                waiting.terminate()


def _waiting(process: Path, seconds: float) -> Iterator[Row]:
    resident = re.search(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())
    before = _wake_ups(process)
    time.sleep(seconds)
    woken = (_wake_ups(process) - before) / seconds
    memory = f"{int(resident[1]) / 1024:.1f} MiB" if resident else "-"
    yield Row("resident memory while it waits", memory)
    yield Row("wake-ups a second while it waits", f"{woken:.2f}")


def _wake_ups(process: Path) -> int:
    texts = [file.read_text() for file in process.glob("task/*/status")]
    found = [re.search(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.MULTILINE) for text in texts]
    return sum(int(match[1]) for match in found if match)
