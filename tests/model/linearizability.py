"""Is a recorded history of a store's conditional verbs one that a single, atomic key could show?

A Wing-Gong search: an operation took effect at one moment between its call and its return, so the
history is sound if the operations can be put in an order that respects those times and in which
each reply follows from the state that the ones before it left. For any store: `record` needs only
the four conditional verbs and a clock that all the clients share.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from joblock import ConditionalBlobStore


class Event(NamedTuple):
    """One call of one client, and its reply: an etag, a bool, a value with its etag, or None."""

    called: int
    returned: int
    verb: str
    value: str
    etag: str
    reply: str | bool | tuple[str, str] | None


def record(store: ConditionalBlobStore, key: str, seed: int, calls: int) -> list[Event]:
    """Call the verbs at random, often with an etag that was current a moment ago."""
    rng = random.Random(seed)
    events: list[Event] = []
    known = "0"
    for number in range(calls):
        verb = rng.choice(["get", "get", "create", "match", "match", "match", "delete"])
        value = f"{seed}-{number}"
        reply: str | bool | tuple[str, str] | None
        called = time.perf_counter_ns()
        if verb == "get":
            blob = store.get_with_etag(key)
            reply = None if blob is None else (as_text(blob.value), blob.etag)
        elif verb == "create":
            reply = store.set_if_new(key, value)
        elif verb == "match":
            reply = store.set_if_match(key, value, known)
        else:
            reply = store.delete_if_match(key, known)
        returned = time.perf_counter_ns()
        events.append(Event(called, returned, verb, value, known, reply))
        if isinstance(reply, tuple):
            known = reply[1]
        elif isinstance(reply, str):
            known = reply
    return events


def as_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


def explanation(events: Sequence[Event]) -> list[Event] | None:
    """Return an order of the events that a single atomic key could have shown, or None."""
    events = sorted(events)
    written = [event.reply for event in events if isinstance(event.reply, str)]
    if len(set(written)) < len(written):
        return None  # an etag came back
    todo = tuple(range(len(events)))
    stack: list[tuple[tuple[int, ...], tuple[str, str] | None, list[int]]] = [(todo, None, [])]
    seen: set[tuple[tuple[int, ...], tuple[str, str] | None]] = set()
    while stack:
        todo, state, order = stack.pop()
        if not todo:
            return [events[number] for number in order]
        if (todo, state) in seen:
            continue
        seen.add((todo, state))
        first_return = min(events[number].returned for number in todo)
        for position, number in enumerate(todo):
            if events[number].called > first_return:
                break  # and so are all that follow: another had returned before they were called
            legal, after = _step(state, events[number])
            if legal:
                stack.append((todo[:position] + todo[position + 1 :], after, [*order, number]))
    return None


def _step(state: tuple[str, str] | None, event: Event) -> tuple[bool, tuple[str, str] | None]:
    """Whether the reply follows from the state, and the state after it."""
    matches = state is not None and state[1] == event.etag
    if event.verb == "get":
        return event.reply == state, state
    if event.verb == "delete":
        return event.reply is matches, None if matches else state
    allowed = state is None if event.verb == "create" else matches
    if not allowed:
        return event.reply is None, state
    return isinstance(event.reply, str), (event.value, str(event.reply))
