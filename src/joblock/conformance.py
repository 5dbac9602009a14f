"""Does this store really honour its conditions? For your own tests, or at deploy time.

A store may have the four conditional methods and still ignore what they are asked: an emulator,
a proxy, or a service that only looks like S3. The lock is only as good as the store.

    findings = check_store(store)
    assert all(findings), [finding.message for finding in findings if not finding]

A good answer is evidence, not proof: a race may go well by chance.
"""

from __future__ import annotations

import contextvars
import itertools
import json
import threading
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeAlias, TypeVar

from ._ids import job_lock_key
from ._record import epoch_ms
from ._store import (
    TELLING,
    Blob,
    BlobStore,
    ConditionalBlobStore,
    WrongStoreError,
    blocking,
    creating,
    is_conditional,
    require,
    tells,
)
from ._value import Value, assign
from ._waiting import wait_in_turns

__all__ = ["Finding", "check_store"]

_CONTENDERS = 8  # fewer than the ten connections that boto3's client and others keep
_RACES = 3
_CLEANING_UP_S = 5.0


class Finding(Value):
    """What one check found, as true as `ok`.

    `check` is its name, which stays the same between versions. `message` is one line: what was
    found and, where that is not ok, what it means for the lock or what to do.
    """

    __slots__ = __match_args__ = ("ok", "check", "message")

    ok: bool
    check: str
    message: str

    def __init__(self, ok: bool, check: str, message: str) -> None:
        assign(self, "ok", ok)
        assign(self, "check", check)
        assign(self, "message", message)

    def __bool__(self) -> bool:
        return self.ok


_Checks: TypeAlias = dict[str, Callable[[], Finding]]


def check_store(
    store: BlobStore, *, timeout_s: float = 120, clock_skew_ms: float = 1000
) -> list[Finding]:
    """Try what the lock needs on a live, blocking store, under throwaway keys.

    Returns one finding for each check, always in the same order: "conditional-writes", what every
    store must do, what a conditional store must do, and "clean-up". A plain store gets those that
    apply. A store that has a method `cautions`, as Redis's, gets "settings": that is always ok, and
    its message begins with "warning" if a setting of the server's may free a lock. One that has
    `server_time_ms`, as most remote ones, gets "clock", which fails if this host's clock differs
    from the server's by more than `clock_skew_ms`. What the store
    raises is a finding too; a 429 among them means that the service limits how often a key may be
    written, and that this check tells nothing.

    It makes at most 240 requests, a third of them in bursts from up to 8 threads; on a plain
    store at most 40. The keys are `index-jobs/joblock-conformance-.../...`, so it needs the
    permissions that the lock needs and no others; locks are not touched. Every key is deleted at
    the end, whatever happened; one that may be left is named in "clean-up".

    If the store does not answer the first of them, or `timeout_s` seconds are over, the others are
    not tried, which their findings say. It returns at the latest after as long again, 5 seconds at
    most, in which the keys are deleted. A call that hangs then goes on in the background.

    The store is called from other threads, in a copy of the caller's context variables.

    Raises:
        TypeError: this is no store, or has only some of the conditional methods, or is async:
            then check the blocking store that it wraps.
    """
    require(store, ("get", "set", "delete"))
    if is_conditional(store):
        probe = _ConditionalProbe(store)
        checks = {
            "conditional-writes": lambda: _CONDITIONAL,
            **_bound(_PLAIN_CHECKS, probe),
            **_bound(_CONDITIONAL_CHECKS, probe),
        }
        server = _clock(probe, store, clock_skew_ms) | _settings(store)
        return _Checking(probe, checks, server).findings(timeout_s)
    plain = _Probe(store)
    checks = {"conditional-writes": lambda: _NOT_CONDITIONAL, **_bound(_PLAIN_CHECKS, plain)}
    return _Checking(plain, checks, {}).findings(timeout_s)


_CONDITIONAL = Finding(True, "conditional-writes", "the store has the four conditional methods")
_NOT_CONDITIONAL = Finding(
    False,
    "conditional-writes",
    "the store has only get, set and delete: it cannot exclude two simultaneous winners; "
    "use a store with conditional writes",
)


def _settings(store: ConditionalBlobStore) -> _Checks:
    cautions: Callable[[], list[str]] | None = getattr(store, "cautions", None)
    if cautions is None:
        return {}

    def check() -> Finding:
        texts = [f"warning: {text}" for text in cautions()] or ["none endangers a lock"]
        return Finding(True, "settings", "; ".join(texts))

    return {"settings": check}


def _clock(probe: _ConditionalProbe, store: ConditionalBlobStore, clock_skew_ms: float) -> _Checks:
    server_time_ms: Callable[[str], tuple[float, float] | None] | None
    server_time_ms = getattr(store, "server_time_ms", None)
    if server_time_ms is None:
        return {}

    def check() -> Finding:
        before = epoch_ms()
        told = server_time_ms(probe.new_key())
        return _compared(told, before, epoch_ms(), clock_skew_ms)

    return {"clock": check}


def _compared(
    told: tuple[float, float] | None, before: float, after: float, clock_skew_ms: float
) -> Finding:
    if told is None:
        return Finding(True, "clock", "the server does not tell its time")
    # The server read its clock at some moment between the two readings of this host's.
    behind, ahead = after - told[0], told[1] - before
    least = max(-behind, -ahead, 0)
    if least <= clock_skew_ms:
        most = max(behind, ahead) / 1000
        return Finding(True, "clock", f"this host's clock is within {most:.1f} s of the server's")
    which = "behind" if ahead > behind else "ahead of"
    return Finding(
        False,
        "clock",
        f"this host's clock is {least / 1000:.1f} s or more {which} the server's: two hosts may "
        "not agree whether a lock has expired; set the clock, or pass clock_skew_ms to acquire",
    )


class _BrokenRuleError(Exception):
    """The store did something else than it must."""


_T = TypeVar("_T")


class _Probe:
    """The store, with every answer's type checked, and the throwaway keys."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._keys: list[str] = []
        self._uid = f"joblock-conformance-{uuid.uuid4().hex}"
        self._numbers = itertools.count(1)

    def new_key(self, vault_id: str = "") -> str:
        """Return a key of this check's own: some services limit the writes per second and key."""
        self._keys.append(job_lock_key(self._uid, vault_id or f"check-{len(self._keys) + 1}"))
        return self._keys[-1]

    def new_text(self) -> str:
        """Return another text each time, of the same length: no etag may be just that."""
        return f'{{"jobId":"joblock-conformance-{next(self._numbers):06}"}}'

    def get(self, key: str) -> str | None:
        return _text("get", _blocking(self._store.get(key)))

    def set(self, key: str, value: str) -> None:
        _blocking(self._store.set(key, value))

    def delete(self, key: str) -> None:
        _blocking(self._store.delete(key))

    def create(self, key: str, value: str) -> None:
        """Write as the lock writes a new record."""
        self.set(key, value)

    def expect(self, key: str, value: str | None, after: str) -> None:
        """Raise unless every way of reading gives `value`."""
        _same("get", self.get(key), value, after)

    def answers(self) -> bool:
        """Whether the store answers at all, be it wrongly."""
        try:
            self._store.get(self._keys[0])
        except Exception:
            return False
        return True

    def not_cleaned_up(self) -> Finding:
        """Say which keys may be left, where nobody could look."""
        return _left("the store does not answer", self._keys)

    def clean_up(self, untried: str) -> Finding:
        left: dict[str, str] = {}
        for key in self._keys:
            if untried and left:  # it still does not answer: each further key would take as long
                left[key] = untried
                continue
            try:
                self.delete(key)
                if self.get(key) is not None:
                    left[key] = "get still gives a value after delete"
            except Exception as error:
                left[key] = _said(error)
        if left:
            why = next(iter(left.values()))  # one: each may name its key, and all say the same
            return _left(why, left)
        return Finding(True, "clean-up", f"all {len(self._keys)} throwaway keys are deleted")


def _left(why: str, keys: Iterable[str]) -> Finding:
    return Finding(False, "clean-up", f"{why}; to be deleted by hand: {', '.join(keys)}")


class _ConditionalProbe(_Probe):
    def __init__(self, store: ConditionalBlobStore) -> None:
        super().__init__(store)
        self._conditional = store
        self.tells = tells(store)

    def get_with_etag(self, key: str) -> tuple[str, str] | None:
        return _text_and_etag(_blocking(self._conditional.get_with_etag(key)))

    def set_if_new(self, key: str, value: str) -> str | None:
        return _etag("set_if_new", _blocking(self._conditional.set_if_new(key, value)))

    def creates(self, key: str, value: str) -> str | tuple[str, str] | None:
        """As the lock: the new etag or, if it is refused and told, what is there and its etag."""
        answer = _blocking(creating(self._conditional)(key, value))
        if isinstance(answer, Blob):
            return _text_and_etag(answer)
        return _etag("set_if_new", answer)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return _etag("set_if_match", _blocking(self._conditional.set_if_match(key, value, etag)))

    def delete_if_match(self, key: str, etag: str) -> bool:
        return _bool("delete_if_match", _blocking(self._conditional.delete_if_match(key, etag)))

    def create(self, key: str, value: str) -> None:
        self.created(key, value)

    def created(self, key: str, value: str) -> str:
        """Write to a free key and return the etag."""
        etag = self.creates(key, value)
        if not isinstance(etag, str):
            raise _BrokenRuleError("set_if_new refused a free key: no lock can be taken")
        return etag

    def current_etag(self, key: str) -> str:
        """Read the etag of a key that is there."""
        read = self.get_with_etag(key)
        if read is None:
            raise _BrokenRuleError("get_with_etag gave None for a key that is there")
        return read[1]

    def expect(self, key: str, value: str | None, after: str) -> None:
        super().expect(key, value, after)
        read = self.get_with_etag(key)
        _same("get_with_etag", None if read is None else read[0], value, after)

    def expect_no_lock(self, key: str, after: str) -> None:
        """Raise unless the key is gone, or has the tombstone that some stores leave."""
        self.expect(key, "null" if self.get(key) == "null" else None, after)

    def at_once(self, calls: Sequence[Callable[[], object]]) -> list[Future[object]]:
        """Make the calls, each in a thread of its own, and wait for their answers."""
        barrier = threading.Barrier(len(calls), timeout=60)
        answers: list[Future[object]] = [Future() for _ in calls]

        def wait_and_call(call: Callable[[], object], answer: Future[object]) -> None:
            try:
                barrier.wait()
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

        for call, answer in zip(calls, answers, strict=True):
            _start("joblock race", partial(wait_and_call, call, answer))
        wait(answers)
        return answers


class _Checking:
    """The checks under way, in a thread of their own, which is left behind if a call hangs."""

    def __init__(self, probe: _Probe, checks: _Checks, server: _Checks) -> None:
        self._probe = probe
        self._checks = checks
        self._server = server  # what is asked of it at the end, and is no promise of the store's
        self._found: dict[str, Finding] = {}  # written by that thread, and read by the caller
        self._over = threading.Event()
        self._going_on = threading.Lock()  # `Thread.join` forgets the thread if it is interrupted
        self._untried = ""  # why no further check is tried, if none is
        self._raised: BaseException | None = None

    def findings(self, timeout_s: float) -> list[Finding]:
        over = f"not tried, since {timeout_s:g} seconds are over"
        ended = False
        self._going_on.acquire()
        try:  # around the start, too: an interrupt there may come when the thread is at work
            _start("joblock check", partial(self._work, over))
            ended = wait_in_turns(self._going_on, timeout_s)
        finally:
            self._over.set()
            if not ended:
                wait_in_turns(self._going_on, min(timeout_s, _CLEANING_UP_S))
        if self._raised is not None:
            raise self._raised
        found, late = dict(self._found), f"no answer within {timeout_s:g} seconds"
        for name in self._checks:
            if name not in found:
                found[name], late = Finding(False, name, late), over
        found.setdefault("clean-up", self._probe.not_cleaned_up())
        for name in self._server:
            found.setdefault(name, Finding(True, name, f"not known: {over}"))
        return [found[name] for name in (*self._checks, "clean-up", *self._server)]

    def _work(self, over: str) -> None:
        try:
            try:
                self._check(over)
            finally:
                self._found["clean-up"] = self._probe.clean_up(self._untried)
            for name, check in self._server.items():
                untold = Finding(True, name, f"not known: {self._untried}")
                self._found[name] = untold if self._untried else _finding(name, True, check)
        except BaseException as error:
            self._raised = error
        finally:
            self._going_on.release()

    def _check(self, over: str) -> None:
        for name, check in self._checks.items():
            if self._over.is_set() and not self._untried:
                self._untried = over
            untried = Finding(False, name, self._untried)
            self._found[name] = untried if self._untried else _finding(name, False, check)
            if name == _FIRST and not self._found[name] and not self._probe.answers():
                self._untried = "not tried, since the store did not answer"


def _start(name: str, work: Callable[[], object]) -> None:
    """Start a thread that keeps no process from its end."""
    run = partial(contextvars.copy_context().run, work)
    threading.Thread(target=run, name=name, daemon=True).start()


def _finding(name: str, ok: bool, check: Callable[[], Finding]) -> Finding:
    """What was found; `ok` if it is no fault of the store's that nothing was."""
    try:
        return check()
    except WrongStoreError:
        raise
    except Exception as error:
        return Finding(ok, name, f"not known: {_said(error)}" if ok else _said(error))


_P = TypeVar("_P", bound=_Probe)


def _bound(checks: Mapping[str, Callable[[_P], str]], probe: _P) -> _Checks:
    def finding(name: str, check: Callable[[_P], str]) -> Finding:
        return Finding(True, name, check(probe))

    return {name: partial(finding, name, check) for name, check in checks.items()}


def _said(error: Exception) -> str:
    if isinstance(error, _BrokenRuleError):
        return str(error)
    lines = traceback.format_exception_only(error)  # str(error) may raise
    return f"raised {' '.join(''.join(lines).split())}"


def _blocking(answer: _T) -> _T:
    return blocking(
        answer,
        "check the blocking store that it wraps, or give check_store an object whose methods run "
        "it to the end (asyncio.run_coroutine_threadsafe)",
    )


def _text(method: str, value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is not None and not isinstance(value, str):
        raise _wrong_type(method, value, "text, bytes or None")
    return value


def _etag(method: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _wrong_type(method, value, "an etag, which is a str, or None")
    if value == "":
        raise _BrokenRuleError(f"{method} gave an empty etag; None is for a refusal")
    return value


def _text_and_etag(value: object) -> tuple[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Blob):
        raise _wrong_type("get_with_etag", value, "a Blob or None")
    text, etag = _text("get_with_etag", value.value), _etag("get_with_etag", value.etag)
    if text is None or etag is None:
        raise _BrokenRuleError("get_with_etag gave a Blob without a value or without an etag")
    return text, etag


def _bool(method: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(method, value, "a bool")
    return value


def _wrong_type(method: str, value: object, right: str) -> _BrokenRuleError:
    return _BrokenRuleError(f"{method} gave a value of type {type(value).__name__}, not {right}")


def _same(method: str, read: str | None, expected: str | None, after: str) -> None:
    if read != expected:
        raise _BrokenRuleError(
            f"after {after}, {method} gave {_short(read)} instead of {_short(expected)}: "
            "the lock cannot trust this store's answers"
        )


def _short(text: str | None) -> str:
    if text is None or len(text) <= 200:
        return repr(text)
    return f"{text[:40]!r}... ({len(text)} characters)"


# What every store must do.


def _read_your_writes(probe: _Probe) -> str:
    key = probe.new_key()
    probe.expect(key, None, "nothing")  # some caches remember that there was no such key
    for _ in range(2):
        text = probe.new_text()
        probe.set(key, text)
        probe.expect(key, text, "set")
    return "a read gives what was last written"


def _text_unchanged(probe: _Probe) -> str:
    key = probe.new_key()
    # A column that is too short for a record may cut it silently: then no lock is ever held.
    text = '{"reason":"\\"é\\\\日本\u2028🔒\\"%s"}' % ("x" * 5000)
    probe.create(key, text)
    probe.expect(key, text, "writing it")
    return "text outside ASCII, and of 5000 characters, comes back as it was written"


def _delete(probe: _Probe) -> str:
    key = probe.new_key()
    probe.create(key, probe.new_text())
    probe.delete(key)
    probe.expect(key, None, "delete")
    probe.delete(key)
    return "delete removes a key, and one that is not there is no error"


def _keys_exact(probe: _Probe) -> str:
    # One id, and those for which it is taken by a store that folds case, decodes `%`, or `+`.
    keys = [probe.new_key(vault_id) for vault_id in ("a á", "A á", "%61 á", "a+á")]
    for key in keys:
        probe.set(key, json.dumps(key))
    for key in keys:
        after = "writing to keys that only look alike, each its own name"
        _same("get", probe.get(key), json.dumps(key), after)
    # R2 does this to every key, so it is no fault; who writes one name in both ways is told.
    if probe.get(probe.new_key("a a\u0301")) is not None:
        return "keys are kept apart, unless Unicode normalization makes them one: normalize the ids"
    return "keys that look alike are kept apart"


_PLAIN_CHECKS: Mapping[str, Callable[[_Probe], str]] = {
    "read-your-writes": _read_your_writes,
    "text-unchanged": _text_unchanged,
    "delete": _delete,
    "keys-exact": _keys_exact,
}
_FIRST = next(iter(_PLAIN_CHECKS))


# What a conditional store must do.


def _create_only(probe: _ConditionalProbe) -> str:
    key, text = probe.new_key(), probe.new_text()
    probe.created(key, text)
    if probe.set_if_new(key, probe.new_text()) is not None:
        raise _BrokenRuleError(
            "set_if_new wrote over an existing key: a second job takes a live lock"
        )
    probe.expect(key, text, "a set_if_new that was refused")
    if probe.tells:
        told = probe.creates(key, probe.new_text())
        probe.expect(key, text, f"a {TELLING} that was refused")
        if told is not None and told != (text, probe.current_etag(key)):
            raise _BrokenRuleError(
                f"{TELLING} told {told!r} of a key that has {text!r}: a live lock is not seen"
            )
    return "set_if_new refuses an existing key"


def _if_match(probe: _ConditionalProbe) -> str:
    key = probe.new_key()
    etag = probe.created(key, probe.new_text())
    for source in ("set_if_new", "set_if_match", "get_with_etag"):
        if source == "get_with_etag":
            etag = probe.current_etag(key)
        text = probe.new_text()
        written = probe.set_if_match(key, text, etag)
        if written is None:
            raise _BrokenRuleError(
                f"set_if_match refused the current etag, which {source} gave: no lock can be "
                "renewed or taken over with it"
            )
        probe.expect(key, text, "set_if_match")
        etag = written
    return "set_if_match writes under the current etag"


def _etag_changes(probe: _ConditionalProbe) -> str:
    key = probe.new_key()
    probe.create(key, probe.new_text())
    etag = probe.current_etag(key)
    probe.set(key, probe.new_text())
    if probe.current_etag(key) == etag:
        raise _BrokenRuleError(
            f"the etag {etag!r} stayed when the content changed: an old etag passes for current, "
            "so a new job's lock can be overwritten or removed"
        )
    return "the etag changes with the content"


def _stale_etag(probe: _ConditionalProbe) -> str:
    key, text = probe.new_key(), probe.new_text()
    stale = probe.created(key, probe.new_text())
    probe.set(key, text)
    if probe.set_if_match(key, probe.new_text(), stale) is not None:
        raise _BrokenRuleError(
            "set_if_match took a stale etag: two jobs can take over one expired lock"
        )
    probe.expect(key, text, "a set_if_match that was refused")
    return "set_if_match refuses a stale etag"


def _etag_reuse(probe: _ConditionalProbe) -> str:
    key, text = probe.new_key(), probe.new_text()
    stale = probe.created(key, probe.new_text())
    probe.delete(key)
    probe.created(key, text)
    if probe.set_if_match(key, probe.new_text(), stale) is not None or probe.delete_if_match(
        key, stale
    ):
        raise _BrokenRuleError(
            "an etag from before the key was deleted and created again was taken: a late renewal "
            "or release takes the next job's live lock; no etag may come back for another value"
        )
    probe.expect(key, text, "a set_if_match and a delete_if_match that were refused")
    return "an etag does not come back when a key is deleted and created again"


def _missing_key(probe: _ConditionalProbe) -> str:
    key = probe.new_key()
    etag = probe.created(key, probe.new_text())
    probe.delete(key)
    if probe.set_if_match(key, probe.new_text(), etag) is not None:
        raise _BrokenRuleError("set_if_match took a missing key: a renewal revives a released lock")
    probe.expect(key, None, "a set_if_match that was refused")
    if probe.delete_if_match(key, etag):
        raise _BrokenRuleError(
            "delete_if_match said that it removed a missing key: a release that came too late "
            f"is told that it succeeded; {_TOMBSTONES}"
        )
    return "a condition on a missing key is refused"


def _conditional_delete(probe: _ConditionalProbe) -> str:
    key = probe.new_key()
    if not probe.delete_if_match(key, probe.created(key, probe.new_text())):
        raise _BrokenRuleError(
            "delete_if_match refused the current etag: no lock can be released with it"
        )
    probe.expect_no_lock(key, "delete_if_match")
    text = probe.new_text()
    etag = probe.set_if_new(key, text)
    if etag is None:  # a tombstone is there, which the next lock replaces
        etag = probe.set_if_match(key, text, probe.current_etag(key))
    if etag is None:
        raise _BrokenRuleError(
            "after delete_if_match the key cannot be written again: the lock stays taken"
        )
    probe.expect(key, text, "writing to the key that delete_if_match had freed")
    return "delete_if_match frees a key under the current etag"


def _stale_delete(probe: _ConditionalProbe) -> str:
    key, text = probe.new_key(), probe.new_text()
    stale = probe.created(key, probe.new_text())
    probe.set(key, text)
    if probe.delete_if_match(key, stale):
        raise _BrokenRuleError(
            "delete_if_match took a stale etag: a late release removes the next job's lock; "
            f"{_TOMBSTONES}"
        )
    probe.expect(key, text, "a delete_if_match that was refused")
    return "delete_if_match refuses a stale etag"


_TOMBSTONES = (
    "if the service ignores conditions on a delete, release by writing a tombstone: "
    "for an S3BlobStore, pass conditional_delete=False"
)


def _read_is_one(probe: _ConditionalProbe) -> str:
    key, texts = probe.new_key(), [probe.new_text() for _ in range(3)]
    first = probe.created(key, texts[0])
    versions = {first: 0}  # by their etags, as far as they were told
    seen: list[tuple[str, str] | None] = []

    def write() -> None:
        etag = first
        for version, text in enumerate(texts[1:], 1):
            written = probe.set_if_match(key, text, etag)
            if written is None:  # another check's finding
                return
            etag = written
            versions.setdefault(etag, version)

    def read() -> None:
        seen.append(probe.get_with_etag(key))
        seen.append(probe.get_with_etag(key))

    answers = probe.at_once([write, *[read] * 4])
    for text, etag in filter(None, seen):
        # A newer value than the etag's is safe: a condition on that etag fails.
        if text in texts and texts.index(text) < versions.get(etag, 0):
            raise _BrokenRuleError(
                "get_with_etag gave a value with the etag of a later one: two jobs can take over "
                "one expired lock; if it takes two requests, ask for the etag first"
            )
    for answer in answers:
        answer.result()
    return "a value comes with its own etag, also while it is written"


# A contender: what the key has if it is the one that wins, and its call, true if it won.
_Contender = tuple[str | None, Callable[[], object]]


def _creation(probe: _ConditionalProbe, key: str) -> _Contender:
    text = probe.new_text()
    return text, lambda: isinstance(probe.creates(key, text), str)


def _update(probe: _ConditionalProbe, key: str, etag: str) -> _Contender:
    text = probe.new_text()
    return text, lambda: probe.set_if_match(key, text, etag)


def _removal(probe: _ConditionalProbe, key: str, etag: str) -> _Contender:
    return None, lambda: probe.delete_if_match(key, etag)


def _one_create(probe: _ConditionalProbe) -> str:
    for _ in range(_RACES):
        key = probe.new_key()
        _race(probe, key, None, [_creation(probe, key) for _ in range(_CONTENDERS)])
    return f"of {_CONTENDERS} simultaneous set_if_new, one succeeds"


def _one_update(probe: _ConditionalProbe) -> str:
    for _ in range(_RACES):
        key, text = probe.new_key(), probe.new_text()
        etag = probe.created(key, text)
        _race(probe, key, text, [_update(probe, key, etag) for _ in range(_CONTENDERS)])
    return f"of {_CONTENDERS} simultaneous set_if_match, one succeeds"


def _update_or_delete(probe: _ConditionalProbe) -> str:
    kinds = [_update, _removal] * (_CONTENDERS // 2)
    for _ in range(_RACES):
        key, text = probe.new_key(), probe.new_text()
        etag = probe.created(key, text)
        _race(probe, key, text, [kind(probe, key, etag) for kind in kinds])
    return "of simultaneous set_if_match and delete_if_match, only one takes effect"


def _race(
    probe: _ConditionalProbe, key: str, before: str | None, contenders: Sequence[_Contender]
) -> None:
    """Raise unless exactly one of the outcomes was confirmed, and it is what the key has."""
    answers = probe.at_once([call for _, call in contenders])
    won = {
        outcome
        for (outcome, _), answer in zip(contenders, answers, strict=True)
        if answer.exception() is None and answer.result()
    }
    if len(won) > 1:
        raise _BrokenRuleError(
            f"{len(won)} of {len(contenders)} simultaneous calls that exclude each other "
            "succeeded: two jobs can have the lock; the store does not check the condition "
            "atomically with the write"
        )
    for answer in answers:
        answer.result()
    if not won:
        probe.expect(key, before, "calls that were all refused")
        raise _BrokenRuleError(
            f"none of {len(contenders)} simultaneous calls succeeded: safe, no two jobs get the "
            "lock, but under contention nobody may; callers must retry"
        )
    (outcome,) = won
    if outcome is None:
        probe.expect_no_lock(key, "a race that delete_if_match won")
    else:
        probe.expect(key, outcome, "a race that its writer won")


_CONDITIONAL_CHECKS: Mapping[str, Callable[[_ConditionalProbe], str]] = {
    "create-only": _create_only,
    "if-match": _if_match,
    "etag-changes": _etag_changes,
    "stale-etag": _stale_etag,
    "etag-reuse": _etag_reuse,
    "missing-key": _missing_key,
    "conditional-delete": _conditional_delete,
    "stale-delete": _stale_delete,
    "read-is-one": _read_is_one,
    "one-create": _one_create,
    "one-update": _one_update,
    "update-or-delete": _update_or_delete,
}
