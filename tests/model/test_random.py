"""Long schedules of several clients, drawn by seeds: `pytest tests/model --seed N` shows one."""

from __future__ import annotations

import pytest

from tests.model.broken import BROKEN
from tests.model.search import drawn
from tests.model.world import INITIAL, Algorithm, Limits, World

SCHEDULES, DEEP_SCHEDULES = 100, 25_000
CHUNK = 100
CLIENTS = 4
LIMITS = Limits(operations=8, ticks=6, faults=4, crashes=2)
STEPS = 120


def run(algorithm: Algorithm, seed: int) -> str | None:
    """The trace of this seed's schedule if it breaks a promise."""
    world = World(algorithm, LIMITS)
    start = list(INITIAL.values())[seed % len(INITIAL)]
    found = drawn(world, world.start(start, CLIENTS), seed, STEPS)
    return None if found is None else f"seed {seed}:\n{found}"


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=pytest.mark.deep if first >= SCHEDULES else ())
        for first in range(0, DEEP_SCHEDULES, CHUNK)
    ],
)
def test_no_drawn_schedule_breaks_a_promise(first: int, request: pytest.FixtureRequest) -> None:
    """Tens of thousands of them; a failure prints its trace and the seed that repeats it."""
    chosen = request.config.getoption("--seed")
    for seed in range(first, first + CHUNK) if chosen is None else [chosen]:
        trace = run(Algorithm(), seed)
        assert trace is None, f"{trace}\nrepeat with: pytest tests/model --seed {seed}"


@pytest.mark.parametrize("name", BROKEN)
def test_drawn_schedules_catch_the_broken_locks_too(name: str) -> None:
    """And the same seed finds the same fault again."""
    for seed in range(5000):
        trace = run(BROKEN[name], seed)
        if trace is not None:
            print(trace)
            assert run(BROKEN[name], seed) == trace
            return
    pytest.fail(f"not caught: {name}")
