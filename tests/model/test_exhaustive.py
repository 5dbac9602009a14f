"""Every interleaving of a few clients, with time, faults and crashes: no promise is broken."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from joblock import Acquired, Held, JobLockRecord, _protocol
from tests.model.broken import BROKEN, SOUND
from tests.model.search import exhaustive
from tests.model.world import INITIAL, Algorithm, Limits, State, World

Searches = list[tuple[tuple[int, Limits], dict[str, int]]]
LARGE = 4000  # states: beyond that a search is too slow to be run each time

# What each search visited when it was last looked at: clients, limits, and the number of states
# from each start. One that visits much less has gone shallow, and proves less than it says.
TWO_WITH_FAULTS = (2, Limits(operations=2, ticks=1, faults=1, crashes=0))
TWO_WITH_CRASHES = (2, Limits(operations=2, ticks=1, faults=0, crashes=1))
TWO_FOR_LONGER = (2, Limits(operations=3, ticks=1, faults=0, crashes=0))
TWO_EXPIRIES = (2, Limits(operations=2, ticks=2, faults=0, crashes=0))
THREE = (3, Limits(operations=2, ticks=0, faults=0, crashes=0, renewals=False))
THREE_EXPIRING = (
    3,
    Limits(operations=2, ticks=1, faults=0, crashes=0, renewals=False, without_etag=False),
)
SEARCHES: Searches = [
    (TWO_WITH_FAULTS, {"no record": 8593, "live": 7005}),
    (TWO_WITH_CRASHES, {"no record": 3600, "live": 3223}),
    (TWO_FOR_LONGER, {"live": 8088}),
    (THREE, {"no record": 644, "live": 355, "expired": 3531, "malformed": 3531, "tombstone": 3531}),
    (THREE_EXPIRING, {"no record": 12120}),
]
# The rest takes a minute. From junk or a tombstone it goes as from an expired record: see THREE.
DEEP: Searches = [
    (TWO_WITH_FAULTS, {"expired": 23333}),
    (TWO_WITH_CRASHES, {"expired": 9251}),
    (TWO_FOR_LONGER, {"no record": 12364, "expired": 24657}),
    (TWO_EXPIRIES, {"no record": 15845, "live": 22840, "expired": 42837}),
    (THREE_EXPIRING, {"live": 36470, "expired": 79016}),
]


def cases(always: Searches, deep: Searches) -> list[Any]:
    """One test for each search and start; the large ones with `--slow`, `deep` with `--deep`."""
    return [
        pytest.param(
            *search,
            start,
            states,
            id=f"{search[0]} clients, {search[1]}, {start}",
            marks=large if states > LARGE else small,
        )
        for searches, small, large in (
            (always, (), pytest.mark.slow),
            (deep, pytest.mark.deep, pytest.mark.deep),
        )
        for search, starts in searches
        for start, states in starts.items()
    ]


def assert_sound(world: World, start: State, states: int) -> None:
    """Nothing breaks a promise, and the search has seen about as many states as it must."""
    searched = exhaustive(world, start)
    print(f"{searched.schedules} schedules, {searched.states} states, {searched.steps} steps")
    assert searched.found is None, str(searched.found)
    assert searched.states >= 0.9 * states, "the search has gone shallow"
    assert searched.schedules > searched.states / 10


@pytest.mark.parametrize(("clients", "limits", "start", "states"), cases(SEARCHES, DEEP))
def test_no_schedule_breaks_a_promise(
    clients: int, limits: Limits, start: str, states: int
) -> None:
    """Acquire, renew and release in every order, from every kind of record."""
    world = World(Algorithm(), limits)
    assert_sound(world, world.start(INITIAL[start], clients), states)


def acquiring(*, id_is_new: bool, tells: bool = False) -> Algorithm:
    """As with ids that are drawn at random; the checker's own are new, too."""

    async def acquire(
        store: Any, uid: str, vault: str, *, ttl_ms: float, clock: Any, uuid_factory: Any
    ) -> Acquired | Held:
        return await _protocol.acquire(
            store,
            uid,
            vault,
            described=partial(JobLockRecord, canister_uid=uid, vault_id=vault),
            ttl_ms=ttl_ms,
            clock_skew_ms=0,
            clock=clock,
            uuid_factory=uuid_factory,
            id_is_new=id_is_new,
        )

    return Algorithm(acquire=acquire, tells=tells)


REPEATING = Limits(operations=2, ticks=1, faults=1, crashes=0, refused=True)
REPEATED = {"no record": 13149, "live": 9458, "expired": 35794}


@pytest.mark.slow
@pytest.mark.parametrize("start", REPEATED)
def test_a_store_whose_client_repeats_its_requests(start: str) -> None:
    """A write that took effect and is then refused: nobody owns twice, nobody refuses himself."""
    world = World(acquiring(id_is_new=True), REPEATING)
    assert_sound(world, world.start(INITIAL[start], 2), REPEATED[start])


TELLING: Searches = [(TWO_WITH_FAULTS, {"no record": 5660}), (THREE, {"no record": 165})]
TELLING_DEEP: Searches = [(TWO_WITH_FAULTS, {"expired": 14261})]
REPEATING_AND_TELLING = {"no record": 8589, "live": 3160, "expired": 22357}


@pytest.mark.parametrize(("clients", "limits", "start", "states"), cases(TELLING, TELLING_DEEP))
def test_a_store_whose_refusal_tells_what_is_there(
    clients: int, limits: Limits, start: str, states: int
) -> None:
    """The same, where a refused acquire is one call."""
    world = World(acquiring(id_is_new=True, tells=True), limits)
    assert_sound(world, world.start(INITIAL[start], clients), states)


@pytest.mark.slow
@pytest.mark.parametrize("start", REPEATING_AND_TELLING)
def test_a_client_that_repeats_and_tells(start: str) -> None:
    """Its own record, which the repeated request tells, does not refuse it."""
    world = World(acquiring(id_is_new=True, tells=True), REPEATING)
    assert_sound(world, world.start(INITIAL[start], 2), REPEATING_AND_TELLING[start])


def test_a_lock_that_is_refused_by_its_own_record_is_caught() -> None:
    """As it was before a record was compared with what the call had written."""
    world = World(acquiring(id_is_new=False), REPEATING)
    found = exhaustive(world, world.start(None, 1)).found
    assert found is not None
    assert found.broken == "refused by its own record"


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_lock_is_caught(name: str) -> None:
    """A checker that cannot fail proves nothing."""
    limits = Limits(operations=3, ticks=2, faults=0, crashes=0)
    for start in INITIAL.values():
        world = World(BROKEN[name], limits)
        found = exhaustive(world, world.start(start, 2)).found
        if found is not None:
            print(f"{name}:\n{found}")
            return
    pytest.fail(f"not caught: {name}")


def test_the_broken_locks_are_sound_but_for_what_was_broken() -> None:
    """So it is the one fault that was caught, and not the way they are written."""
    world = World(SOUND, Limits(operations=2, ticks=1, faults=0, crashes=0))
    assert exhaustive(world, world.start(INITIAL["expired"], 2)).found is None


def test_the_originals_double_click() -> None:
    """The shortest way to two owners, as the README shows it."""
    limits = Limits(operations=1, ticks=0, faults=0, crashes=0)
    world = World(BROKEN["read-then-write acquire"], limits)
    found = exhaustive(world, world.start(None, 2)).found
    assert found is not None
    print(found)
    assert found.brief() == [
        "A's get: no record",
        "B's get: no record",
        "A's set: done",
        "B's set: done",
        "acquire replaced job a1's live lock",
    ]
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(found.brief()) in readme


def test_endless_contention_is_bounded() -> None:
    """A call that is refused for ever ends, and the checker would notice one that does not."""

    async def acquire(store: object, *_: object, **__: object) -> object:
        while True:
            await store.get("k")  # type: ignore[attr-defined] # pyright: ignore

    limits = Limits(operations=1, ticks=0, faults=0, crashes=0)
    world = World(Algorithm(acquire=acquire), limits)  # type: ignore[arg-type] # pyright: ignore
    found = exhaustive(world, world.start(None, 1)).found
    assert found is not None
    assert found.broken == "A's acquire does not end"
