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
