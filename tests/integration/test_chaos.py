"""Workers and runs that are killed at random, on Redis and on databases; no two of them overlap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from joblock.stores import open_store
from tests.backends import Backends
from tests.model.test_chaos import kill_runs, kill_workers


@pytest.fixture(params=["redis", "postgresql-psycopg", "mariadb-pymysql"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, backends: Backends) -> Path:
    """What the workers share, with the store's URL."""
    url = backends[request.param].url
    store: Any = open_store(url)
    if hasattr(store, "create_table"):
        store.create_table()
    for key in list(store.list_keys("")):
        store.delete(key)
    if hasattr(store, "engine"):
        store.engine.dispose()
    (tmp_path / "url").write_text(url)
    return tmp_path


@pytest.mark.parametrize("kill", [kill_workers, kill_runs])
def test_no_two_overlap(folder: Path, kill: Callable[[Path], None]) -> None:
    """As on a SQLite file, beside a process that sweeps as often as it can."""
    (folder / "swept").touch()
    kill(folder)
