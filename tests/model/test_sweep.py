"""Every interleaving of clients that sweep with those that acquire, renew, resume and leave."""

from __future__ import annotations

from typing import Any

import pytest

from joblock import Blob, JobLockRecord, _protocol
from tests.model.search import exhaustive
from tests.model.test_exhaustive import Searches, assert_sound, cases
from tests.model.world import INITIAL, LIFE, Algorithm, Limits, World

TWO = (2, Limits(operations=2, ticks=1, faults=1, crashes=0, sweeps=True))
THREE = (
    3,
    Limits(
        operations=2,
        ticks=1,
        faults=0,
        crashes=0,
        renewals=False,
        without_etag=False,
        sweeps=True,
    ),
)
RUNS = (2, Limits(operations=2, ticks=1, faults=0, crashes=0, runs=True, sweeps=True, at_least=150))
RUNS_WITH_FAULTS = (2, RUNS[1]._replace(faults=1))
STARTS = INITIAL | LIFE
# What each search visited when it was last looked at, as in test_exhaustive.
SEARCHES: Searches = [
    (RUNS, {"taken": 8529}),
]
DEEP: Searches = [
    (
        TWO,
        {
            "no record": 15223,
            "live": 12129,
            "expired": 38212,
            "malformed": 40147,
            "tombstone": 38212,
        },
    ),
    (RUNS, {"a live run": 5550, "a dead run": 14047, "ended": 4062}),
    (THREE, {"no record": 40302}),
    (RUNS_WITH_FAULTS, {"taken": 32909, "a dead run": 63890}),
]


@pytest.mark.parametrize(("clients", "limits", "start", "states"), cases(SEARCHES, DEEP))
def test_no_schedule_breaks_a_promise(
    clients: int, limits: Limits, start: str, states: int
) -> None:
    """No live lock is swept, nor what is no record; whoever is swept is told the truth."""
    world = World(Algorithm(), limits)
    assert_sound(world, world.start(STARTS[start], clients), states)


async def without_the_etag(store: Any, key: str, *, expired_by: float) -> Blob | None:
    blob: Blob | None = await store.get_with_etag(key)
    record = None if blob is None else JobLockRecord.from_json(blob.value)
    if record is None or not _protocol.was_expired(record, expired_by):
        return None
    await store.delete(key)
    return blob


async def whatever_is_no_lock(store: Any, key: str, *, expired_by: float) -> Blob | None:
    blob: Blob | None = await store.get_with_etag(key)
    record = None if blob is None else JobLockRecord.from_json(blob.value)
    if blob is None or (record is not None and record.is_live(expired_by)):
        return None
    return blob if await store.delete_if_match(key, blob.etag) else None


@pytest.mark.parametrize(
    ("broken", "start", "says"),
    [
        (without_the_etag, "expired", "a sweep removed something else than it says"),
        (whatever_is_no_lock, "malformed", "a sweep removed 'not a record{'"),
    ],
)
def test_each_broken_sweep_is_caught(broken: Any, start: str, says: str) -> None:
    """With the promise that it breaks."""
    limits = Limits(operations=2, ticks=1, faults=0, crashes=0, sweeps=True)
    world = World(Algorithm(sweep=broken), limits)
    found = exhaustive(world, world.start(STARTS[start], 2)).found
    assert found is not None
    print(found)
    assert found.broken == says
