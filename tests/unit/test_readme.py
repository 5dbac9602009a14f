"""The README's code runs as it stands."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from joblock import (
    JobLockHeldError,
    JobLockLostError,
    MemoryBlobStore,
    acquire_job_lock,
    peek_job_lock,
)
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import acquired

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
HANDLER, WORKER, CELERY, HOLD, TESTING, CHECK = PYTHON


def test_the_handler() -> None:
    """202, then 409 with the record and Retry-After; a failed start frees the lock."""
    jobs: list[tuple[str, ...]] = []

    def enqueue(*job: str) -> None:
        if job[1] == "unlucky":
            raise ConnectionError
        jobs.append(job)

    scope: dict[str, Any] = {"enqueue": enqueue}
    exec(HANDLER, scope)  # noqa: S102
    store = MemoryBlobStore()
    status, body, _ = scope["start_indexing"](store, "u", "v")
    assert (status, jobs) == (202, [("u", "v", body["jobId"])])
    status, held, headers = scope["start_indexing"](store, "u", "v")
    assert (status, held["jobId"], headers) == (409, body["jobId"], {"Retry-After": "960"})

    with pytest.raises(ConnectionError):
        scope["start_indexing"](store, "u", "unlucky")
    assert list(store) == ["index-jobs/u/v.json"]


def test_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs the job that it was given; a retry finds the lock, and a late delivery does not."""
    monkeypatch.chdir(tmp_path)
    built: list[tuple[str, str]] = []

    def build_index(user: str, vault: str) -> None:
        built.append((user, vault))
        if len(built) == 1:
            raise ConnectionError
        with pytest.raises(JobLockHeldError):
            work("u", "v", job_id)

    scope: dict[str, Any] = {"build_index": build_index}
    exec(WORKER, scope)  # noqa: S102
    work = scope["work"]
    with SqliteBlobStore("jobs.db") as store:
        job_id = acquired(acquire_job_lock(store, "u", "v")).job_id
        with pytest.raises(ConnectionError):
            work("u", "v", job_id)
        assert not acquire_job_lock(store, "u", "v")
        assert work("u", "v", job_id) is None
        assert store.get("index-jobs/u/v.json") is None
    assert built == [("u", "v")] * 2
    with pytest.raises(JobLockLostError):
        work("u", "v", job_id)


def test_the_worker_that_holds() -> None:
    """It embeds each part under the lock, and gives the other job's id if it is held."""
    store = MemoryBlobStore()
    embedded: list[tuple[str, str | None]] = []

    def embed(part: str, job_id: str) -> None:
        record = peek_job_lock(store, "u", "v")
        assert record is not None
        assert record.job_id == job_id
        embedded.append((part, scope["rebuild"](store, "u", "v")))

    def parts(user: str, vault: str) -> list[str]:
        return ["a", "b"] if (user, vault) == ("u", "v") else []

    scope: dict[str, Any] = {"parts": parts, "embed": embed}
    exec(HOLD, scope)  # noqa: S102
    assert scope["rebuild"](store, "u", "v") is None
    assert [part for part, _ in embedded] == ["a", "b"]
    assert all(job_id for _, job_id in embedded)
    assert list(store) == []


def test_the_check_of_a_store() -> None:
    """It passes for a store that keeps its word."""
    scope: dict[str, Any] = {"store": MemoryBlobStore()}
    exec(CHECK, scope)  # noqa: S102
    assert len(scope["findings"]) > 10


def test_the_users_test() -> None:
    """It passes."""
    scope: dict[str, Any] = {}
    exec(TESTING, scope)  # noqa: S102
    scope["test_an_hour_of_renewals"]()


def test_what_is_quoted_is_so() -> None:
    """The recipes that the README shows are those that the tests run."""
    recipes = Path(__file__).parents[1] / "integration" / "recipes"
    assert CELERY in (recipes / "celery_app.py").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\*/10 .*$", README, re.MULTILINE)
    assert line in (recipes / "crontab").read_text(encoding="utf-8").splitlines()
    named = re.findall(r"`(\w+_(?:app|site|function)\.py|crontab|script\.py)`", README)
    assert {*named} == {
        path.name for path in recipes.iterdir() if path.suffix == ".py" or path.name == "crontab"
    } - {"jobs.py", "kit_examples.py"}


def test_it_is_short() -> None:
    """A newcomer finds what he needs: 320 lines, and a heading every 25."""
    lines = README.splitlines()
    assert len(lines) <= 320
    headings = [number for number, line in enumerate(lines) if re.match("#+ ", line)]
    assert max(b - a for a, b in pairwise([*headings, len(lines)])) <= 25


def test_the_snippets_are_as_short_as_they_claim() -> None:
    """Ten lines for a handler, eight for a worker, and the imports that they need."""
    assert len(HANDLER[HANDLER.index("def") :].strip().splitlines()) == 10
    assert len(WORKER[WORKER.index("def") :].strip().splitlines()) == 8
