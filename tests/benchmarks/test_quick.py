"""The benchmark itself: that it runs and leaves nothing out, never how fast anything is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_store_and_each_peer_has_a_row() -> None:
    """A figure, or that it is not installed."""
    rows = run("free", "refused")
    for part in ("Acquire and release of a free lock", "Refused acquire: a double click"):
        assert [f"**{part}**", "", ""] in rows
    subjects = [row[0] for row in rows]
    peers = ["filelock FileLock", "filelock SoftFileLock", "diskcache Lock", "sherlock FileLock"]
    for peer in [*peers, "redis-py Lock", "python-redis-lock"]:
        assert subjects.count(peer) == 2
    for subject, figure, against in rows:
        if subject.startswith("joblock"):
            assert figure.endswith((" us", " ms"))
        if figure == "-":
            assert against.startswith(("not installed: ", "fails here: ", "can only wait"))


def test_a_job_that_is_resumed() -> None:
    """On both stores, beside the same by hand."""
    rows = run("resumed")
    subjects = [row[0] for row in rows]
    for store in ("joblock SQLite", "joblock memory"):
        assert f"{store}, acquire + resume + leave" in subjects
    assert all("x acquire + release" in row[2] for row in rows if row[0].startswith("joblock"))


@pytest.mark.slow
def test_locks_are_counted_and_nothing_is_left() -> None:
    """The parts that need nobody else."""
    rows = run("contention", "growth", "leaks")
    figures = {subject: figure for subject, figure, _ in rows}
    assert figures["2 processes, one key"].endswith(" jobs/s")
    assert figures["SQLite, peek, 1,000 locks"].endswith((" us", " ms"))
    left = [against for subject, _, against in rows if "resident growth" in subject]
    assert left == ["0 threads and 0 descriptors left, 0 keys"] * len(left)


def run(*parts: str) -> list[list[str]]:
    """The cells of the table's rows."""
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", *parts]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    lines = [line for line in printed.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
