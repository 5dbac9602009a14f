"""Every interleaving of deliveries of one job and of rivals: resume, keep, leave, requeue."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.broken import BROKEN_RUNS, SOUND
from tests.model.search import exhaustive
from tests.model.test_exhaustive import Searches, acquiring, assert_sound, cases
from tests.model.world import LIFE, Algorithm, Limits, World

# Clients are deliveries of job x, or rivals that hold locks of their own. With a minimum hold that
# outlasts one expiry, and a longest time that ends between two.
TWO = (2, Limits(operations=2, ticks=1, faults=0, crashes=0, runs=True, at_least=150, at_most=150))
TWO_WITH_FAULTS = (2, TWO[1]._replace(faults=1))
TWO_WITH_CRASHES = (2, TWO[1]._replace(ticks=2, crashes=1))
TWO_REPEATING = (2, TWO[1]._replace(faults=1, refused=True))
TWO_FOR_LONGER = (2, TWO[1]._replace(operations=3, ticks=2))
TWO_FOR_LONGER_WITH_FAULTS = (2, TWO[1]._replace(ticks=2, faults=1, at_most=None))
THREE = (3, Limits(operations=2, ticks=0, faults=0, crashes=0, runs=True))
THREE_EXPIRING = (3, Limits(operations=1, ticks=2, faults=1, crashes=0, runs=True))
# What each search visited when it was last looked at, as in test_exhaustive.
SEARCHES: Searches = [
    (
        TWO,
        {
            "no record": 2277,
            "taken": 7397,
            "a live run": 3509,
            "ended": 2207,
        },
    ),
]
DEEP: Searches = [
    (TWO, {"taken, expired": 9254, "a dead run": 9254}),
    (
        TWO_WITH_FAULTS,
        {
            "taken": 28675,
            "taken, expired": 42445,
            "a live run": 12853,
            "a dead run": 42445,
            "ended": 7560,
        },
    ),
    (TWO_WITH_CRASHES, {"taken": 81071, "a dead run": 110300}),
    (TWO_REPEATING, {"taken": 42261, "a dead run": 62763}),
    (TWO_FOR_LONGER, {"taken": 545716}),
    (TWO_FOR_LONGER_WITH_FAULTS, {"taken": 225716}),
    (THREE, {"taken": 13592, "a dead run": 15954}),
    (THREE_EXPIRING, {"taken": 294266}),
]


@pytest.mark.parametrize(("clients", "limits", "start", "states"), cases(SEARCHES, DEEP))
def test_no_schedule_breaks_a_promise(
    clients: int, limits: Limits, start: str, states: int
) -> None:
    """At most one live run; nobody touches another's; no end before its time; everybody ends."""
    algorithm = acquiring(id_is_new=True) if limits.refused else Algorithm()
    world = World(algorithm, limits)
    assert_sound(world, world.start(LIFE[start], clients), states)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN_RUNS)
def test_each_broken_run_is_caught(name: str) -> None:
    """With the promise that it breaks."""
    algorithm, broken = BROKEN_RUNS[name]
    limits = TWO[1]._replace(operations=3, ticks=2)
    world = World(algorithm, limits)
    found = exhaustive(world, world.start(LIFE["taken"], 2)).found
    assert found is not None, f"not caught: {name}"
    print(f"{name}:\n{found}")
    assert broken in found.broken


def test_why_a_run_has_an_id() -> None:
    """The shortest way to two runs of one job without it, as the README shows it."""
    algorithm, _ = BROKEN_RUNS["a keeper that compares the job's id only"]
    limits = Limits(operations=2, ticks=1, faults=0, crashes=0, runs=True)
    world = World(algorithm, limits)
    found = exhaustive(world, world.start(LIFE["taken"], 2)).found
    assert found is not None
    print(found)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(found.brief()) in readme


@pytest.mark.slow
def test_the_broken_runs_are_sound_but_for_what_was_broken() -> None:
    """So it is the one fault that was caught, and not the way they are written."""
    world = World(SOUND, TWO[1])
    assert exhaustive(world, world.start(LIFE["taken"], 2)).found is None
