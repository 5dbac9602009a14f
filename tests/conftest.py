from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.backends import Backends
from tests.support import Api, AsyncApi, Clock, SyncApi


def _trace_threads_in_turn(trace: Callable[..., object]) -> None:
    """CPython 3.11 kills a thread that begins to be traced while another one does."""
    run = threading.Thread.run
    turn = threading.Lock()

    def traced_run(self: threading.Thread) -> None:
        with turn:
            trace(sys._getframe(), "call", None)
        run(self)

    threading.settrace(None)
    setattr(threading.Thread, "run", traced_run)  # noqa: B010


if sys.version_info < (3, 12) and (measuring := threading.gettrace()) is not None:
    _trace_threads_in_turn(measuring)


@pytest.fixture(params=[SyncApi, AsyncApi], ids=["sync", "async"])
def api(request: pytest.FixtureRequest) -> Api:
    """Joblock's five functions, once blocking and once async."""
    chosen: Api = request.param
    return chosen


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def backends() -> Iterator[Backends]:
    """The object stores' servers, each started when a test first asks for it."""
    started = Backends()
    yield started
    started.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="run only the drawn schedule of this seed")
    parser.addoption("--slow", action="store_true", help="run what takes seconds too: CI does")
    parser.addoption("--deep", action="store_true", help="run the longest searches too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark, reason in {"slow": "it takes seconds", "deep": "a long search"}.items():
        if not config.getoption(f"--{mark}"):
            skip = pytest.mark.skip(reason=f"{reason}: --{mark} runs it")
            for item in items:
                if mark in item.keywords:
                    item.add_marker(skip)


def pytest_collection_finish() -> None:
    """So that a collection looks at what the tests make, and not each time at all the tests."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Hypothesis looks for referrers in its summary, where there is such a plugin."""
    gc.unfreeze()
