"""check_store: good stores pass, and each rule, broken on purpose, is found out by its name."""

from __future__ import annotations

import asyncio
import copy
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from joblock import AsyncBlobStore, Blob, MemoryBlobStore, aio
from joblock._record import epoch_ms
from joblock.aio import ThreadedBlobStore
from joblock.conformance import _CONTENDERS, _RACES, Finding, _Checking, _Probe, check_store
from joblock.stores.sqlite import SqliteBlobStore
from tests.broken_stores import (
    AlwaysCreates,
    Bytes,
    CachesWhatItRead,
    ContentHashes,
    CreatesThoughItRefuses,
    CreatesWithTrue,
    CutsLongText,
    DeleteNeedsAKey,
    DeletesByTheVersionOfAKey,
    DeletesForEver,
    DeletesThoughItRefuses,
    DeletesWithNone,
    EtagIsANumber,
    EtagIsTheLength,
    ForgetsAccents,
    GivesBackTheOldEtag,
    IgnoresIfMatch,
    IgnoresIfMatchOnDelete,
    MatchesWhatIsMissing,
    NeverCreates,
    NeverDeletes,
    NeverMatches,
    NeverReallyDeletes,
    NoBlobWhenRead,
    NoEtagWhenRead,
    NothingWithEtag,
    NotUtf8,
    NumbersVersionsOfAKey,
    OneEtagForAll,
    OnlySaysThatItCreated,
    OnlySaysThatItDeleted,
    OnlySaysThatItMatched,
    ParsesWhatItReads,
    RacyCreate,
    RacyDelete,
    RacyUpdate,
    ReadsAnotherEtag,
    ReadsEtagThenValue,
    ReadsLate,
    ReadsValueThenEtag,
    RefusesWithAnEmptyEtag,
    RemembersThatThereWasNoKey,
    Tells,
    TellsAndOverwrites,
    TellsAnotherEtag,
    TellsWhatItWasGiven,
    Tombstones,
    WritesThoughItRefuses,
    in_a_race,
)
from tests.holding import poll, threads_named
from tests.support import (
    AsyncConditionalView,
    AsyncTellingView,
    AsyncView,
    PlainStore,
    RecordingStore,
)

PLAIN = [
    "conditional-writes",
    "read-your-writes",
    "text-unchanged",
    "delete",
    "keys-exact",
    "clean-up",
]
ALL = [
    *PLAIN[:-1],
    *("create-only", "if-match", "etag-changes", "stale-etag", "etag-reuse", "missing-key"),
    *("conditional-delete", "stale-delete", "read-is-one"),
    *("one-create", "one-update", "update-or-delete"),
    "clean-up",
]


def failing(findings: list[Finding]) -> dict[str, str]:
    """The messages of those that are not ok, by the names of their checks."""
    assert all("\n" not in finding.message and finding.message for finding in findings)
    return {finding.check: finding.message for finding in findings if not finding}


# Good stores, of each kind that ships or is described.


@pytest.mark.parametrize("good", [MemoryBlobStore, Tombstones, ContentHashes, Bytes, Tells])
def test_a_good_store_passes_every_check(good: type[MemoryBlobStore]) -> None:
    """In a fixed order, and nothing is left behind."""
    store = good()
    store.set("index-jobs/u/v.json", "x")
    findings = check_store(store)
    assert [finding.check for finding in findings] == ALL
    assert failing(findings) == {}
    assert list(store) == ["index-jobs/u/v.json"]


def test_all_the_time_in_the_world() -> None:
    """No bound is a bound, too."""
    assert failing(check_store(MemoryBlobStore(), timeout_s=float("inf"))) == {}


def test_the_sqlite_store_passes_every_check(tmp_path: Path) -> None:
    """Also under its races between threads."""
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        assert failing(check_store(store)) == {}
        assert list(store.list_keys("")) == []


def test_a_plain_store_is_told_that_it_cannot_exclude_two_winners() -> None:
    """And passes the checks that apply."""
    store = PlainStore()
    findings = check_store(store)
    assert [finding.check for finding in findings] == PLAIN
    assert list(failing(findings)) == ["conditional-writes"]
    assert "two simultaneous winners" in findings[0].message
    assert store.blobs == {}


# Broken stores.


CONDITIONAL = set(ALL[ALL.index("create-only") : ALL.index("clean-up")])
CREATING = CONDITIONAL | {"text-unchanged", "delete"}
READING = {"read-your-writes", "keys-exact"} | CREATING.difference(
    {"etag-changes", "missing-key", "read-is-one", "update-or-delete", "delete"}
)
READING_ETAGS = READING - {"keys-exact"} | {"etag-changes"}
STALE = {"etag-changes", "stale-etag", "etag-reuse", "stale-delete", "one-update"}
SOMETIMES = "update-or-delete"  # it may be in order, if the delete comes first, or the update

Broken = Callable[[], MemoryBlobStore]
BREAKAGES: list[tuple[Broken, set[str]]] = [
    (AlwaysCreates, {"create-only", "one-create"}),
    (NeverCreates, CREATING),
    (TellsAnotherEtag, {"create-only"}),
    (TellsWhatItWasGiven, {"create-only"}),
    (TellsAndOverwrites, {"create-only", "one-create"}),
    (CreatesThoughItRefuses, {"create-only", "one-create"}),
    (OnlySaysThatItCreated, {"create-only", "one-create"}),
    (RefusesWithAnEmptyEtag, {"create-only", "one-create"}),
    (CreatesWithTrue, CREATING),
    (IgnoresIfMatch, {"stale-etag", "etag-reuse", "missing-key", "one-update", "update-or-delete"}),
    (NeverMatches, {"if-match", "one-update"}),
    (WritesThoughItRefuses, {"stale-etag", "etag-reuse", "missing-key", "one-update"}),
    (
        OnlySaysThatItMatched,
        {"stale-etag", "etag-reuse", "missing-key", "one-update", "update-or-delete"},
    ),
    (MatchesWhatIsMissing, {"missing-key"}),
    (IgnoresIfMatchOnDelete, {"etag-reuse", "missing-key", "stale-delete"}),
    (NeverDeletes, {"conditional-delete"}),
    (OnlySaysThatItDeleted, {"conditional-delete"}),
    (DeletesThoughItRefuses, {"etag-reuse", "stale-delete"}),
    (DeletesForEver, {"conditional-delete"}),
    (
        DeletesWithNone,
        {"etag-reuse", "missing-key", "conditional-delete", "stale-delete", "update-or-delete"},
    ),
    (OneEtagForAll, STALE),
    (EtagIsTheLength, STALE),
    (NumbersVersionsOfAKey, {"etag-reuse"}),
    (DeletesByTheVersionOfAKey, {"etag-reuse"}),
    (ReadsAnotherEtag, {"if-match"}),
    (GivesBackTheOldEtag, {"if-match"}),
    (EtagIsANumber, READING_ETAGS | {"read-is-one"}),
    (NoEtagWhenRead, READING_ETAGS | {"read-is-one"}),
    (NoBlobWhenRead, READING_ETAGS | {"read-is-one"}),
    (NothingWithEtag, READING_ETAGS),
    (ParsesWhatItReads, READING),
    (NotUtf8, READING),
    (ForgetsAccents, {"text-unchanged"}),
    (CutsLongText, {"text-unchanged"}),
    (NeverReallyDeletes, {"delete", "etag-reuse", "missing-key", "clean-up"}),
    (DeleteNeedsAKey, {"delete", "clean-up"}),
    (RemembersThatThereWasNoKey, {"read-your-writes", "conditional-delete"}),
    (CachesWhatItRead, {"read-your-writes", "if-match"}),
    (ReadsLate, READING | {"clean-up"}),
    (RacyCreate, {"one-create"}),
    (RacyUpdate, {"one-update"}),
    (RacyDelete, {"update-or-delete"}),
    (ReadsValueThenEtag, {"read-is-one"}),
]
CERTAIN = [broken for broken, names in BREAKAGES if SOMETIMES in names]


@pytest.mark.parametrize(
    ("broken", "names"), BREAKAGES, ids=lambda it: "" if isinstance(it, set) else it.__name__
)
def test_a_broken_rule_is_found(broken: Broken, names: set[str]) -> None:
    """By exactly the checks that are about it."""
    findings = check_store(broken())
    assert [finding.check for finding in findings] == ALL
    found = set(failing(findings))
    assert (found if broken in CERTAIN else found - {SOMETIMES}) == names


def test_every_check_fails_for_some_store() -> None:
    """None of them is always content."""
    assert set[str]().union(*(names for _, names in BREAKAGES)) == set(ALL) - {"conditional-writes"}


@pytest.mark.parametrize(
    ("broken", "check", "says"),
    [
        (IgnoresIfMatchOnDelete, "stale-delete", "pass conditional_delete=False"),
        (IgnoresIfMatchOnDelete, "missing-key", "pass conditional_delete=False"),
        (DeletesThoughItRefuses, "stale-delete", "after a delete_if_match that was refused"),
        (RacyCreate, "one-create", "of 8 simultaneous calls that exclude each other succeeded"),
        (ReadsValueThenEtag, "read-is-one", "ask for the etag first"),
        (RacyDelete, "update-or-delete", "2 of 8 simultaneous calls that exclude each other"),
        (NeverMatches, "one-update", "none of 8 simultaneous calls succeeded: safe"),
        (CreatesThoughItRefuses, "one-create", "after a race that its writer won"),
        (NeverMatches, "if-match", "refused the current etag, which set_if_new gave"),
        (GivesBackTheOldEtag, "if-match", "the current etag, which set_if_match gave"),
        (NumbersVersionsOfAKey, "etag-reuse", "a late renewal or release takes the next job's"),
        (ReadsAnotherEtag, "if-match", "the current etag, which get_with_etag gave"),
        (CreatesWithTrue, "create-only", "set_if_new gave a value of type bool, not an etag"),
        (RefusesWithAnEmptyEtag, "create-only", "set_if_new gave an empty etag"),
        (TellsAnotherEtag, "create-only", "a live lock is not seen"),
        (TellsAndOverwrites, "create-only", "after a set_if_new_or_get that was refused"),
        (DeletesWithNone, "conditional-delete", "a value of type NoneType, not a bool"),
        (NeverDeletes, "conditional-delete", "refused the current etag: no lock can be released"),
        (DeletesForEver, "conditional-delete", "the key cannot be written again"),
        (NothingWithEtag, "etag-changes", "get_with_etag gave None for a key that is there"),
        (NoBlobWhenRead, "stale-etag", "a value of type tuple, not a Blob or None"),
        (ParsesWhatItReads, "read-your-writes", "a value of type dict, not text, bytes or None"),
        (NotUtf8, "read-your-writes", "after set, get gave"),
        (ForgetsAccents, "text-unchanged", "日本"),
        (CutsLongText, "text-unchanged", "(4000 characters) instead of"),
        (NeverReallyDeletes, "clean-up", "get still gives a value after delete; to be deleted by"),
    ],
)
def test_a_message_says_what_was_found(broken: Broken, check: str, says: str) -> None:
    """And what it means, or what to do."""
    assert says in failing(check_store(broken()))[check]


def test_a_write_that_nobody_was_told_of_is_found_in_a_race() -> None:
    """All were refused, yet the key has one of their records: worse than contention."""

    class Silent(MemoryBlobStore):
        def set_if_match(self, key: str, value: str, etag: str) -> str | None:
            super().set_if_match(key, value, etag)
            return None

    said = failing(check_store(Silent()))["one-update"]
    assert said.startswith("after calls that were all refused, get gave")


def test_a_delete_that_wins_a_race_must_delete() -> None:
    """Else a lock that is reported as released stays."""

    class NotInThreads(MemoryBlobStore):
        def set_if_match(self, key: str, value: str, etag: str) -> str | None:
            return None if in_a_race() else super().set_if_match(key, value, etag)

        def delete_if_match(self, key: str, etag: str) -> bool:
            return True if in_a_race() else super().delete_if_match(key, etag)

    said = failing(check_store(NotInThreads()))["update-or-delete"]
    assert said.startswith("after a race that delete_if_match won, get gave")


def test_the_calls_of_a_race_start_together() -> None:
    """Each in a thread of its own, even if a call is quicker than it takes to start a thread."""
    races: dict[str, set[threading.Thread]] = {}

    class Watched(MemoryBlobStore):
        def set_if_new(self, key: str, value: str) -> str | None:
            if in_a_race():
                races.setdefault(key, set()).add(threading.current_thread())
            return super().set_if_new(key, value)

    check_store(Watched())
    assert [len(threads) for threads in races.values()] == [_CONTENDERS] * _RACES


def test_the_etag_may_be_read_before_the_value() -> None:
    """A takeover with an old etag is refused, so this is safe."""
    assert failing(check_store(ReadsEtagThenValue())) == {}


def test_an_etag_that_nobody_was_told_proves_nothing() -> None:
    """The reply to a write is lost, and readers see what it wrote: no old value, only an error."""

    class LosesReplies(ReadsEtagThenValue):
        def set_if_match(self, key: str, value: str, etag: str) -> str | None:
            written = super().set_if_match(key, value, etag)
            if in_a_race():
                raise OSError("503")
            return written

    assert failing(check_store(LosesReplies()))["read-is-one"] == "raised OSError: 503"


def test_a_wrong_etag_matters_more_than_a_call_that_raises() -> None:
    """The finding is that the store is unsafe."""

    class Limited(ReadsValueThenEtag):
        def set_if_match(self, key: str, value: str, etag: str) -> str | None:
            if self.arrived[f"{key} updated"]:
                raise OSError("429")
            return super().set_if_match(key, value, etag)

    assert "the etag of a later one" in failing(check_store(Limited()))["read-is-one"]


class OnlyPlain:
    """Only the three methods of a store."""

    def __init__(self, store: MemoryBlobStore) -> None:
        self.get, self.set, self.delete = store.get, store.set, store.delete


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        (ParsesWhatItReads, {"read-your-writes", "text-unchanged", "keys-exact"}),
        (ForgetsAccents, {"text-unchanged"}),
        (CutsLongText, {"text-unchanged"}),
        (CachesWhatItRead, {"read-your-writes"}),
        (NeverReallyDeletes, {"delete", "clean-up"}),
        (DeleteNeedsAKey, {"delete", "clean-up"}),
    ],
)
def test_a_broken_plain_store_is_found(broken: Broken, names: set[str]) -> None:
    """By the checks that apply to three methods."""
    findings = check_store(OnlyPlain(broken()))
    assert [finding.check for finding in findings] == PLAIN
    assert set(failing(findings)) - {"conditional-writes"} == names


class ChangesKeys:
    """A store that takes a key for another one."""

    def __init__(self, changed: Callable[[str], str]) -> None:
        self.store = MemoryBlobStore()
        self.changed = changed

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)

        def call(key: str, *rest: str) -> Any:
            return method(self.changed(key), *rest)

        return call


def plus_as_space(key: str) -> str:
    return key.replace("+", " ")


@pytest.mark.parametrize("changed", [str.lower, str.upper, unquote, plus_as_space])
def test_keys_that_are_taken_for_each_other_are_found(changed: Callable[[str], str]) -> None:
    """On a plain store, too: two users would share one lock."""
    store: Any = ChangesKeys(changed)
    assert failing(check_store(store)).keys() == {"keys-exact"}
    said = failing(check_store(OnlyPlain(store)))
    assert said.keys() == {"conditional-writes", "keys-exact"}
    assert "after writing to keys that only look alike" in said["keys-exact"]
    assert len(store.store) == 0


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_normalization_of_keys_is_told(form: Any) -> None:
    """It is no failure: R2 does it, and nobody could turn that finding off."""
    store: Any = ChangesKeys(lambda key: unicodedata.normalize(form, key))
    findings = check_store(store)
    assert failing(findings) == {}
    (message,) = [finding.message for finding in findings if finding.check == "keys-exact"]
    assert message.endswith("normalize the ids")


# Stores that raise.


class Flaky(MemoryBlobStore):
    """Counts its calls, and some of them raise: told by their number and name."""

    def __init__(self, raises: Callable[[int, str], bool] = lambda _number, _name: False) -> None:
        super().__init__()
        self.raises = raises
        self.calls = 0
        self.counting = threading.Lock()

    def called(self, name: str) -> None:
        with self.counting:
            self.calls += 1
            number = self.calls
        if self.raises(number, name):
            raise OSError(f"429 Too Many\nRequests at {name}")

    def get(self, key: str) -> str | None:
        self.called("get")
        return super().get(key)

    def set(self, key: str, value: str) -> None:
        self.called("set")
        super().set(key, value)

    def delete(self, key: str) -> None:
        self.called("delete")
        super().delete(key)

    def get_with_etag(self, key: str) -> Blob | None:
        self.called("get_with_etag")
        return super().get_with_etag(key)

    def set_if_new(self, key: str, value: str) -> str | None:
        self.called("set_if_new")
        return super().set_if_new(key, value)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        self.called("set_if_match")
        return super().set_if_match(key, value, etag)

    def delete_if_match(self, key: str, etag: str) -> bool:
        self.called("delete_if_match")
        return super().delete_if_match(key, etag)


def at_call(failing_call: int) -> Callable[[int, str], bool]:
    return lambda number, _name: number == failing_call


@pytest.mark.slow
def test_whichever_call_raises_it_is_a_finding_and_all_is_cleaned_up() -> None:
    """Every call in turn, those of the clean-up included: what is left is named there."""
    good = Flaky()
    check_store(good)
    assert good.calls > 150
    for failing_call in range(1, good.calls + 1):
        store = Flaky(at_call(failing_call))
        findings = check_store(store)
        if store.calls < failing_call:  # how the races ended decides whether the last ones come
            continue
        assert [finding.check for finding in findings] == ALL
        ((check, message),) = failing(findings).items()
        assert message.startswith("raised OSError: 429 Too Many Requests at ")
        assert list(store) == [] or check == "clean-up"
        assert all(key in message for key in store)


def test_a_store_that_only_raises_is_no_crash() -> None:
    """Wrong credentials: the first check says so, the others are not tried and say that."""
    store = Flaky(lambda _number, _name: True)
    findings = check_store(store)
    assert [finding.check for finding in findings] == ALL
    found = failing(findings)
    assert found.keys() == set(ALL) - {"conditional-writes"}
    first = found.pop("read-your-writes")
    assert first.startswith("raised OSError: 429 Too Many Requests")
    assert found.pop("clean-up").count("raised") == 1
    assert set(found.values()) == {"not tried, since the store did not answer"}
    assert store.calls <= 5


def test_no_check_begins_after_the_time_is_over() -> None:
    """It says which were left out; what was written is deleted all the same."""
    store = MemoryBlobStore()
    probe = _Probe(store)

    def last_in_time() -> Finding:
        probe.set(probe.new_key(), "x")
        checking._over.set()
        return Finding(True, "second", "fine")

    def too_late() -> Finding:
        raise AssertionError

    checks = {"first": too_late, "second": last_in_time, "third": too_late, "fourth": too_late}
    checking = _Checking(probe, checks, {"clock": too_late})
    found = {it.check: (it.ok, it.message) for it in checking.findings(60)}
    assert found.pop("first")[0] is False
    assert found == {
        "second": (True, "fine"),
        "third": (False, "not tried, since 60 seconds are over"),
        "fourth": (False, "not tried, since 60 seconds are over"),
        "clean-up": (True, "all 1 throwaway keys are deleted"),
        "clock": (True, "not known: not tried, since 60 seconds are over"),
    }
    assert list(store) == []


class Timed(MemoryBlobStore):
    """Whose server tells its time, if `told` is a time."""

    def __init__(self, told: Callable[[], tuple[float, float] | None]) -> None:
        super().__init__()
        self.told = told

    def server_time_ms(self, key: str) -> tuple[float, float] | None:
        assert self.get(key) is None
        return self.told()


def assert_is_told_of_a_call_that_hangs(check: Callable[[float], list[Finding]]) -> None:
    """With more time, if a busy machine did not get so far in less."""
    seconds = 0.1
    while True:
        findings = check(seconds)
        late = [it.check for it in findings if it.message == f"no answer within {seconds} seconds"]
        if late or seconds > 20:
            break
        seconds *= 4
    (hung,) = late
    over = f"not tried, since {seconds} seconds are over"
    assert [finding.check for finding in findings] == [*ALL, "clock"]
    later = findings[ALL.index(hung) + 1 : -2]
    assert {finding.message for finding in later} == {over}
    assert not any(later)
    *_, clean_up, clock = findings
    assert clean_up.message.startswith("the store does not answer; to be deleted by hand: index-")
    assert (clock.ok, clock.message) == (True, f"not known: {over}")


def assert_its_thread_ends() -> None:
    poll(lambda: threads_named("joblock check") == [])


def test_a_call_that_hangs_is_not_waited_for() -> None:
    """Once it has an answer, the keys are deleted all the same."""
    answers = threading.Event()

    class Hangs(Timed):
        def set_if_new(self, key: str, value: str) -> str | None:
            etag = super().set_if_new(key, value)
            assert answers.wait(60)
            return etag

    store = Hangs(lambda: None)
    assert_is_told_of_a_call_that_hangs(lambda seconds: check_store(store, timeout_s=seconds))
    answers.set()
    assert_its_thread_ends()
    assert list(store) == []


def test_an_async_call_that_hangs_is_not_waited_for() -> None:
    """Nor does it keep the event loop from its end."""

    class Hangs(aio.AsyncMemoryBlobStore):
        async def set_if_new(self, key: str, value: str) -> str | None:
            await asyncio.Event().wait()
            raise AssertionError

        async def server_time_ms(self, key: str) -> None:
            raise AssertionError

    assert_is_told_of_a_call_that_hangs(
        lambda seconds: asyncio.run(aio.check_store(Hangs(), timeout_s=seconds))
    )
    assert_its_thread_ends()


def test_an_interrupt_of_the_caller_ends_it() -> None:
    """Ctrl-C while a call is under way: no further check begins, and the keys are deleted."""
    store = MemoryBlobStore()
    probe = _Probe(store)
    began = threading.Event()

    def under_way() -> Finding:
        probe.set(probe.new_key(), "x")
        began.set()
        assert checking._over.wait(60)
        return Finding(True, "first", "fine")

    def too_late() -> Finding:
        raise AssertionError

    def interrupt() -> None:
        assert began.wait(60)
        while not came:  # one that comes just before a C call that waits is seen after it
            signal.pthread_kill(main, signal.SIGUSR1)
            time.sleep(0.01)

    def interrupted(*_: object) -> None:
        if not came:
            came.append(True)
            raise KeyboardInterrupt

    came: list[bool] = []

    checking = _Checking(probe, {"first": under_way, "second": too_late}, {})
    before = signal.signal(signal.SIGUSR1, interrupted)
    main = threading.get_ident()
    try:
        sender = threading.Thread(target=interrupt)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            checking.findings(60)
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert list(store) == []


def test_a_store_that_is_gone_is_not_asked_for_each_key() -> None:
    """The first key that cannot be deleted tells why; the others are named."""
    probe = _Probe(Flaky(lambda _number, _name: True))
    keys = [probe.new_key(), probe.new_key()]
    cleaned_up = probe.clean_up("the time is over")
    assert cleaned_up.message.startswith("raised OSError")
    assert all(key in cleaned_up.message for key in keys)


def test_errors_that_name_their_key_are_told_once() -> None:
    """As an SDK's, of a service that cannot be reached."""

    class Unreachable(PlainStore):
        def _called(self, *call: str) -> None:
            raise OSError(f"no route to /{call[1]}")

    (message,) = [it.message for it in check_store(Unreachable()) if it.check == "clean-up"]
    assert message.count("no route") == 1


def test_what_cannot_be_deleted_is_named() -> None:
    """Each key, so that an operator can delete it by hand."""
    store = Flaky(lambda _number, name: name == "delete")
    found = failing(check_store(store))
    assert found.keys() == {"delete", "etag-reuse", "missing-key", "clean-up"}
    assert len(store) > 10
    assert all(key in found["clean-up"] for key in store)


def test_a_call_that_raises_in_a_race_is_shown() -> None:
    """Even if another one won: to a user it would be neither a win nor a refusal."""

    class Limited(MemoryBlobStore):
        def set_if_new(self, key: str, value: str) -> str | None:
            etag = super().set_if_new(key, value)
            if etag is None and in_a_race():
                raise OSError("429")
            return etag

    assert failing(check_store(Limited())) == {"one-create": "raised OSError: 429"}


def test_two_winners_matter_more_than_a_call_that_raises() -> None:
    """The finding is that the store is unsafe."""

    class LimitedAndRacy(RacyCreate):
        def set_if_new(self, key: str, value: str) -> str | None:
            etag = super().set_if_new(key, value)
            self.arrive(f"{key} written" if etag else f"{key} refused")
            if etag is None or self.arrived[f"{key} written"] > 2:
                raise OSError("429")
            return etag

    assert "exclude each other" in failing(check_store(LimitedAndRacy()))["one-create"]


def test_an_error_that_cannot_be_printed_is_no_crash() -> None:
    """Its type is named."""

    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise ValueError

    class Store(PlainStore):
        def get(self, key: str) -> str | None:
            raise UnprintableError

    assert "UnprintableError" in failing(check_store(Store()))["read-your-writes"]


def test_an_interrupt_reaches_the_caller_and_the_keys_are_deleted() -> None:
    """Ctrl-C in the middle of a deployment leaves nothing behind."""

    class Interrupted(RecordingStore):
        def _called(self, name: str) -> None:
            super()._called(name)
            if len(self.calls) == 40:
                raise KeyboardInterrupt

    store = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        check_store(store)
    assert len(store.calls) > 40
    assert len(store) == 0


# What is no store, and what it costs.


class SomeMethods(PlainStore):
    def set_if_new(self, key: str, value: str) -> str | None:
        return None


class HalfAsync(MemoryBlobStore):
    async def delete_if_match(self, key: str, etag: str) -> bool:  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        return False


class Awaitables(PlainStore):
    def get(self, key: str) -> Any:
        class Answer:
            def __await__(self) -> None:
                raise AssertionError

        return Answer()


@pytest.mark.parametrize(
    ("store", "says"),
    [
        (None, "NoneType lacks get, set, delete"),
        ({}, "dict lacks set, delete"),
        (SomeMethods(), "lacks get_with_etag, set_if_match, delete_if_match"),
        (AsyncView(PlainStore()), "the store is async: check the blocking store that it wraps"),
        (AsyncConditionalView(MemoryBlobStore()), "the store is async"),
        (ThreadedBlobStore(MemoryBlobStore()), "the store is async"),
        (Awaitables(), "the store is async"),
    ],
    ids=lambda it: "" if isinstance(it, str) else type(it).__name__,
)
def test_what_is_no_blocking_store_is_a_type_error(store: Any, says: str) -> None:
    """With what to do; no coroutine is left that nobody awaits."""
    with pytest.raises(TypeError, match=says):
        check_store(store)


def test_a_half_async_store_is_a_type_error_and_cleaned_up() -> None:
    """It is noticed only when the async method is called."""
    store: Any = HalfAsync()
    with pytest.raises(TypeError, match="the store is async"):
        check_store(store)
    assert len(store) == 0


def test_it_makes_no_more_requests_than_it_says() -> None:
    """The figures of the docstring, for services that are paid by the request."""

    class Counting(Flaky):
        """Releases by tombstone, which costs two requests more at the next acquire."""

        def delete_if_match(self, key: str, etag: str) -> bool:
            return self.set_if_match(key, "null", etag) is not None

    conditional, plain = Counting(), PlainStore()
    check_store(conditional)
    check_store(plain)
    text = " ".join(str(check_store.__doc__).split())
    most, most_on_plain = map(int, re.findall(r"at most (\d+)", text))
    assert most * 0.9 < conditional.calls <= most
    assert most_on_plain * 0.8 < len(plain.calls) <= most_on_plain


def fails() -> None:
    raise OSError("no answer")


@pytest.mark.parametrize(
    ("told", "ok", "says"),
    [
        (lambda: (epoch_ms() - 400, epoch_ms() - 400), True, "is within"),
        (lambda: (epoch_ms() - 2500, epoch_ms() - 1501), False, "1.5 s or more ahead of the"),
        (lambda: (epoch_ms() + 9000, epoch_ms() + 9999), False, "or more behind the server's"),
        (lambda: None, True, "does not tell its time"),
        (fails, True, "not known: raised OSError: no answer"),
    ],
    ids=["alike", "ahead", "behind", "untold", "unanswered"],
)
def test_the_clock_of_the_server(told: Any, ok: bool, says: str) -> None:
    """By as much as is certain: it read its clock between two readings of this host's."""
    finding = check_store(Timed(told))[-1]
    assert (finding.ok, finding.check) == (ok, "clock")
    assert says in finding.message
    assert check_store(Timed(told), clock_skew_ms=60_000)[-1].ok


def test_a_finding_is_a_value_as_true_as_it_is_ok() -> None:
    """Like the results of the lock's functions."""
    good, bad = Finding(True, "delete", "fine"), Finding(False, "delete", "broken")
    assert (bool(good), bool(bad)) == (True, False)
    assert pickle.loads(pickle.dumps(bad)) == copy.deepcopy(bad) == bad  # noqa: S301
    assert len({good, copy.copy(good), bad}) == 2
    with pytest.raises(AttributeError):
        good.ok = False  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


def test_import_joblock_does_not_import_it() -> None:
    """Nor the thread pool that it needs."""
    code = (
        "import sys, joblock;"
        "print([m for m in ('joblock.conformance', 'concurrent.futures') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert loaded.stdout.strip() == "[]"


def test_an_async_store() -> None:
    """By the same checks; its coroutines run where they are awaited."""

    class Careless(aio.AsyncMemoryBlobStore):
        async def delete_if_match(self, key: str, etag: str) -> bool:
            assert asyncio.get_running_loop() is loop[0]
            await self.delete(key)
            return True

    loop: list[asyncio.AbstractEventLoop] = []

    async def checked(store: AsyncBlobStore) -> dict[str, bool]:
        loop[:] = [asyncio.get_running_loop()]
        return {it.check: it.ok for it in await aio.check_store(store)}

    right = asyncio.run(checked(aio.AsyncMemoryBlobStore()))
    assert all(right.values())
    assert list(right) == [it.check for it in check_store(MemoryBlobStore())]
    wrong = asyncio.run(checked(Careless()))
    assert not wrong["stale-delete"]
    plain = asyncio.run(checked(aio.ThreadedBlobStore(PlainStore())))
    assert list(plain) == [it.check for it in check_store(PlainStore())]
    with pytest.raises(TypeError, match="is not `async def`"):
        asyncio.run(checked(MemoryBlobStore()))  # type: ignore[arg-type] # pyright: ignore


def test_what_an_async_store_tells_is_checked() -> None:
    """As the lock will believe it."""
    lies = asyncio.run(aio.check_store(AsyncTellingView(TellsAnotherEtag())))
    assert set(failing(lies)) == {"create-only"}
    assert failing(asyncio.run(aio.check_store(AsyncTellingView(Tells())))) == {}
