"""Searches over a world: every schedule, shortest first, or one that a seed draws."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from tests.model.world import TIME_PASSES, InvariantError, State, World, canonical


@dataclass(frozen=True)
class Found:
    """A broken promise, and the shortest way to it."""

    broken: str
    trace: list[str]

    def brief(self) -> list[str]:
        """Only what happened to the store, and what came of it."""
        return [*(line for line in self.trace if "'s " in line), self.broken]

    def __str__(self) -> str:
        lines = [f"{number:>3}. {line}" for number, line in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"     {self.broken}"])


@dataclass(frozen=True)
class Searched:
    """What an exhaustive search visited."""

    states: int
    steps: int
    schedules: int
    found: Found | None


def exhaustive(world: World, start: State) -> Searched:
    """Visit every state that is reachable within the world's limits, breadth first."""
    start = canonical(start)
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    arrivals: dict[State, int] = {start: 0}
    followers: dict[State, list[State]] = {}
    queue = deque([start])
    steps = 0
    while queue:
        state = queue.popleft()
        nexts: list[State] = []
        for action in world.actions(state):
            steps += 1
            try:
                after, story = world.step(state, action)
            except InvariantError as error:
                trace = [*_path(came_from, state), error.story or str(action)]
                return Searched(len(came_from), steps, 0, Found(str(error), trace))
            after = canonical(after)
            nexts.append(after)
            arrivals[after] = arrivals.get(after, 0) + 1
            if after not in came_from:
                came_from[after] = (state, story)
                queue.append(after)
        followers[state] = nexts
    return Searched(len(came_from), steps, _schedules(start, arrivals, followers), None)


def _path(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    stories: list[str] = []
    while (before := came_from[state]) is not None:
        state, story = before
        stories.append(story)
    return stories[::-1]


def _schedules(
    start: State, arrivals: dict[State, int], followers: dict[State, list[State]]
) -> int:
    """How many different ways lead from the start to an end, by counting along a sorted order."""
    ways = {start: 1}
    ready = [start]
    ended = 0
    while ready:
        state = ready.pop()
        here = ways.pop(state)
        if not followers[state]:
            ended += here
        for after in followers[state]:
            ways[after] = ways.get(after, 0) + here
            arrivals[after] -= 1
            if arrivals[after] == 0:
                ready.append(after)
    return ended


def drawn(world: World, start: State, seed: int, most_steps: int) -> Found | None:
    """Follow the one schedule that `seed` draws; return the promise that it breaks, if any."""
    rng = random.Random(seed)
    state = start
    trace: list[str] = []
    for _ in range(most_steps):
        actions = list(world.actions(state))
        if not actions:
            break
        weights = [_WEIGHTS.get(action.what, 10) for action in actions]
        (action,) = rng.choices(actions, weights)
        try:
            state, story = world.step(state, action)
        except InvariantError as error:
            return Found(str(error), [*trace, error.story or str(action)])
        trace.append(story)
    return None


# Misfortunes are drawn less often than work, or nothing would ever be finished.
_WEIGHTS = {
    "crash": 1,
    "fails": 2,
    "takes effect, reply lost": 2,
    TIME_PASSES: 3,
}
