from __future__ import annotations

import pytest

from tests.support import Api, AsyncApi, Clock, SyncApi


@pytest.fixture(params=[SyncApi, AsyncApi], ids=["sync", "async"])
def api(request: pytest.FixtureRequest) -> Api:
    """Joblock's five functions, once blocking and once async."""
    chosen: Api = request.param
    return chosen


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="run only the drawn schedule of this seed")
    parser.addoption("--deep", action="store_true", help="run the longest searches too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--deep"):
        skip = pytest.mark.skip(reason="a long search: --deep runs it")
        for item in items:
            if "deep" in item.keywords:
                item.add_marker(skip)
