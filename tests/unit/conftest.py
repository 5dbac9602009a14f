"""What holds for every unit test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.holding import poll, renewing_threads


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    yield
    poll(lambda: not renewing_threads())
