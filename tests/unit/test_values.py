"""Results and errors as values: evidence, truth, pickling, and the modules they live in."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import joblock
from joblock import (
    Acquired,
    Held,
    InvalidIdError,
    JobLockError,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    Lost,
    ReleaseResult,
    Renewed,
    StoreContentionError,
    aio,
)

RECORD = JobLockRecord("j", "u", "v", expires_at=10_000, extra={"x": [1]})
RESULTS = [
    Acquired("j", RECORD, "e", None),
    Held(RECORD),
    ReleaseResult(released=True),
    ReleaseResult(released=False, reason="lock_already_gone"),
    Renewed(RECORD, "e"),
    Lost("lock_owned_by_other_job", RECORD),
]
ERRORS = [
    InvalidIdError("vault_id", "must not be 'a/b'"),
    StoreContentionError("k", 16),
    JobLockHeldError(RECORD),
    JobLockLostError("j", "lease_expired", None),
]


@pytest.mark.parametrize("result", RESULTS, ids=repr)
def test_results_are_frozen_slotted_hashable_and_picklable(result: object) -> None:
    """They can be logged, cached, sent to another process, and not changed."""
    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301
    assert copy.deepcopy(result) == result
    assert hash(result) == hash(copy.copy(result))
    assert not hasattr(result, "__dict__")
    with pytest.raises((AttributeError, TypeError)):
        result.extra = 1  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", [RECORD, joblock.Blob("v", "e"), *RESULTS], ids=repr)
def test_a_value_is_frozen(value: Any) -> None:
    """No field can be set or deleted, and nothing can be added."""
    first = value.__match_args__[0]
    before = repr(value)
    with pytest.raises(AttributeError):
        setattr(value, first, None)
    with pytest.raises(AttributeError):
        delattr(value, first)
    with pytest.raises(AttributeError):
        value.other = None
    assert repr(value) == before


def test_values_are_equal_by_class_and_fields() -> None:
    """Not to a tuple, nor to another class with the same fields."""
    assert Renewed(RECORD, "e") == Renewed(RECORD, "e") != Renewed(RECORD, "f")
    assert joblock.Blob("v", "e") != ("v", "e")

    class Twin(Held):
        pass

    assert Twin(RECORD, None, 0) != Held(RECORD)
    assert len({RECORD, RECORD.__replace__(extra={}), RECORD.__replace__()}) == 2


def test_a_value_is_shown_as_the_call_that_makes_it() -> None:
    """In a log or a debugger."""
    assert repr(ReleaseResult(released=True)) == "ReleaseResult(released=True, reason=None)"
    assert eval(repr(RESULTS), dict(vars(joblock))) == RESULTS  # noqa: S307


def test_a_copy_with_other_fields() -> None:
    """What `copy.replace` calls from Python 3.13 on."""
    later = RECORD.__replace__(expires_at=11_000)
    assert (later.job_id, later.expires_at, later.extra) == ("j", 11_000, {"x": [1]})
    assert later != RECORD
    later.extra["y"] = 1
    assert RECORD.extra == {"x": [1]}
    with pytest.raises(TypeError, match="expires"):
        RECORD.__replace__(expires=1)


def test_a_result_is_as_true_as_it_sounds() -> None:
    """`if acquire_job_lock(...)` must not be taken by a refusal."""
    assert [bool(result) for result in RESULTS] == [True, False, True, False, True, False]
    assert (Acquired.acquired, Held.acquired) == (True, False)
    assert (Renewed.renewed, Lost.renewed) == (True, False)


@pytest.mark.parametrize(
    ("now", "seconds"),
    [(0, 10), (1, 10), (9000, 1), (9001, 1), (9999.5, 1), (10_000, 1), (99_999, 1)],
)
def test_retry_after_is_whole_seconds_and_at_least_one(now: float, seconds: int) -> None:
    """Rounded up, so that a client that obeys it finds the lock expired."""
    assert Held(RECORD).retry_after_s(clock=lambda: now) == seconds
    assert isinstance(Held(RECORD).retry_after_s(clock=lambda: now), int)


def test_retry_after_counts_the_clock_skew_for_which_a_lease_is_honoured() -> None:
    """The same as was given to acquire."""
    assert Held(RECORD).retry_after_s(lambda: 11_000, clock_skew_ms=3000) == 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_carry_their_evidence_through_pickling(error: JobLockError) -> None:
    """A worker pool hands them from process to process."""
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert vars(error)
    assert str(again) == str(error)
    assert isinstance(error, JobLockError)


UNTIL = "1970-01-01 00:00:10 UTC (10000 epoch milliseconds)"


def test_errors_say_what_happened() -> None:
    """In one line, with the evidence."""
    assert [str(error) for error in ERRORS] == [
        "vault_id must not be 'a/b'",
        "'k' was changed by others in each of 16 attempts",
        f"job 'j' holds the lock of 'u' / 'v' until {UNTIL}",
        "job 'j' lost its lock: lease_expired",
    ]


PACKAGE = Path(joblock.__file__).parent


def test_every_public_function_and_class_has_a_docstring_of_its_own() -> None:
    """What comes back, units, errors: `help()` must answer, in both modules."""
    public = [getattr(joblock, name) for name in joblock.__all__]
    public += [getattr(aio, name) for name in aio.__all__]
    documented = [it for it in public if isinstance(it, type) or inspect.isfunction(it)]
    assert [it for it in documented if not vars(it).get("__doc__", it.__doc__)] == []


SHARED = [name for name in aio.__all__ if name.endswith(("_job_lock", "_locks"))]


@pytest.mark.parametrize("name", SHARED)
def test_both_docstrings_stand_alone(name: str) -> None:
    """Each tells of every argument, and both tell the same of it."""

    def told(module: Any) -> str:
        function = getattr(module, name)
        text = inspect.getdoc(function) or ""
        section: str = text.partition("Args:\n")[2].partition("\nRaises:")[0]
        arguments = re.findall(r"^    (\w+): ", section, re.MULTILINE)
        assert arguments == list(inspect.signature(function).parameters)
        return section

    assert told(joblock) == told(aio)


def test_import_joblock_imports_no_backend() -> None:
    """A plain acquire in memory needs neither SQLite nor an event loop."""
    code = (
        "import sys, joblock; joblock.acquire_job_lock(joblock.MemoryBlobStore(), 'u', 'v');"
        "print(set(sys.modules) & {'sqlite3', 'asyncio', 'concurrent', 'http', 'logging', 'ssl',"
        "'inspect', 'dataclasses', 'decimal', 'datetime', 'subprocess', 'traceback', 'tempfile'})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert loaded.stdout.strip() == "set()"
