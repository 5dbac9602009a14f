"""The record: its key, its fields and its bytes."""

from __future__ import annotations

import json
import pickle
import sys
import time
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import pytest

from joblock import InvalidIdError, JobLockRecord, job_lock_key
from joblock._record import MAX_NESTING, JsonValue, epoch_ms

FULL = (
    '{"jobId":"j","canisterUid":"u","vaultId":"v","actorUid":"a","chunksToEmbed":3,'
    '"estimatedSeconds":1.5,"reason":"r","startedAt":10,"expiresAt":20}'
)


def test_key() -> None:
    """The key is the original's."""
    assert job_lock_key("user-1", "Bus iness é") == "index-jobs/user-1/Bus iness é.json"


def test_key_of_an_id_that_is_an_enum_is_the_key_of_its_text() -> None:
    """They are equal, so they must not be two locks."""

    class Vault(str, Enum):  # noqa: UP042 - this is how ids get enums in older code
        BUSINESS = "Business"

    assert job_lock_key("u", Vault.BUSINESS) == job_lock_key("u", "Business")
    record = JobLockRecord("j", "u", Vault.BUSINESS)
    assert record.to_json() == JobLockRecord("j", "u", "Business").to_json()


BAD_IDS: list[Any] = [
    None, 5, b"u", True, [], "", ".", "..", "a/b", "/", "a\nb", "\x00", "\x7f", "\x85", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_IDS, ids=repr)
@pytest.mark.parametrize("argument", ["canister_uid", "vault_id"])
def test_key_refuses_an_id_that_is_none(argument: str, bad: Any) -> None:
    """Either id; the error is of the original's class and of Python's, and names the argument."""
    ids = {"canister_uid": "u", "vault_id": "v"} | {argument: bad}
    with pytest.raises(InvalidIdError, match=f"^{argument} must") as caught:
        job_lock_key(**ids)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    "good", ["...", ".a", "a b", 'q"', "back\\slash", "日本", "🔒", "%2F", "\xa0"]
)
def test_key_takes_every_other_id(good: str) -> None:
    """Ids of the original that were not ambiguous stay valid."""
    assert job_lock_key(good, good) == f"index-jobs/{good}/{good}.json"


def test_round_trip() -> None:
    """What was read is written back byte for byte."""
    record = JobLockRecord.from_json(FULL)
    assert record == JobLockRecord("j", "u", "v", "a", 3, 1.5, "r", 10, 20)
    assert record is not None
    assert record.to_json() == FULL
    assert JobLockRecord.from_json(FULL.encode()) == record
    assert JobLockRecord.from_json(bytearray(FULL.encode())) == record


def test_what_is_not_given_is_none() -> None:
    """And is written as null."""
    record = JobLockRecord("j", "u", "v")
    assert list(record.to_dict().values()) == ["j", "u", "v", *[None] * 6]
    assert record.extra == {}


def test_extra_fields_of_newer_writers_are_kept_in_order() -> None:
    """They follow the known fields, whatever they are, and nested ones keep their shape."""
    tags = '["x",1.5,null,true,false]'
    extra = f'"fence":7,"host":{{"name":"hé","tags":{tags}}},"big":12345678901234567890'
    record = JobLockRecord.from_json(FULL[:-1] + "," + extra + "}")
    assert record is not None
    assert list(record.extra) == ["fence", "host", "big"]
    assert record.to_json() == FULL[:-1] + "," + extra + "}"
    assert dict(record.to_dict())["fence"] == 7


@pytest.mark.parametrize("extra", [{}, {"fence": 7}, {"jobId": "x"}])
def test_the_text_is_that_of_the_dict(extra: dict[str, JsonValue]) -> None:
    """The same names in the same order, each once, whatever `extra` has."""
    record = JobLockRecord("j", "u", "v", "me", 5, 1.5, "why", 1, 2, extra)
    assert json.loads(record.to_json(), object_pairs_hook=list) == list(record.to_dict().items())


@pytest.mark.parametrize(
    ("field", "wire"),
    [
        ("job_id", "jobId"),
        ("canister_uid", "canisterUid"),
        ("vault_id", "vaultId"),
        ("actor_uid", "actorUid"),
        ("reason", "reason"),
    ],
)
@pytest.mark.parametrize("value", ["5", "true", "null", "[]", "{}"])
def test_text_field_of_another_type_reads_as_none(field: str, wire: str, value: str) -> None:
    """And it is not kept as an extra field either."""
    record = JobLockRecord.from_json(f'{{"{wire}":{value},"x":1}}')
    assert record is not None
    assert getattr(record, field) is None
    assert record.extra == {"x": 1}


@pytest.mark.parametrize(
    ("field", "wire"),
    [
        ("chunks_to_embed", "chunksToEmbed"),
        ("estimated_seconds", "estimatedSeconds"),
        ("started_at", "startedAt"),
        ("expires_at", "expiresAt"),
    ],
)
@pytest.mark.parametrize(
    "value", ['"5"', "true", "null", "[]", "1e999", "-1e999", "9" * 309, "9" * 5000]
)
def test_number_field_that_is_not_finite_reads_as_none(field: str, wire: str, value: str) -> None:
    """As JavaScript's Number.isFinite has it: a bool and a numeral are no numbers."""
    record = JobLockRecord.from_json(f'{{"{wire}":{value},"x":1}}')
    assert record is not None
    assert getattr(record, field) is None
    assert record.extra == {"x": 1}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        b"",
        "null",
        "true",
        "42",
        '"text"',
        "[]",
        '[{"jobId":"j"}]',
        "{",
        '{"jobId":"j"',
        '{"jobId":"j"}x',
        "{'jobId':'j'}",
        '{"jobId":"j",}',
        '{"expiresAt":NaN}',
        '{"expiresAt":Infinity}',
        '{"expiresAt":-Infinity}',
        '\ufeff{"jobId":"j"}',
        b'\xef\xbb\xbf{"jobId":"j"}',
        b'{"jobId":"\xff"}',
        '{"jobId":"j"}'.encode("utf-16"),
        '{"jobId":"line\nbreak"}',
        '{"x":' + "[" * 10**6 + "]" * 10**6 + "}",
        '{"x":' + '{"x":' * 10**5,
        "[" * 10**7,
        '"' * 10**6,
        '{"a":"' + "\\" * 10**6,
    ],
    ids=lambda text: repr(text)[:40],
)
def test_what_is_not_a_json_object_is_no_record(text: str | bytes | None) -> None:
    """Never an exception, and the same answer on every Python."""
    assert JobLockRecord.from_json(text) is None


def test_other_types_are_no_record() -> None:
    """As the original, which takes nothing but a string."""
    stored: Any = 5
    assert JobLockRecord.from_json(stored) is None


@pytest.mark.parametrize(("open_", "close"), ["[]", ('{"x":', "}")])
def test_nesting_is_bounded_by_a_rule_and_not_by_the_stack(open_: str, close: str) -> None:
    """The same document is a record, or not, on every Python and at every depth of the caller."""
    assert MAX_NESTING == 64
    inner = MAX_NESTING - 1  # the record itself is one level
    shallow = f'{{"jobId":"j","x":{open_ * inner}1{close * inner}}}'
    deep = f'{{"jobId":"j","x":{open_ * (inner + 1)}1{close * (inner + 1)}}}'
    record = JobLockRecord.from_json(shallow)
    assert record is not None
    assert '"x":' + open_ * inner + "1" + close * inner + "}" in record.to_json()
    assert JobLockRecord.from_json(deep) is None


@pytest.mark.parametrize("beside", ["[],", "{},", '"[",', "[[[],[]],[]],"])
def test_nesting_is_counted_exactly_among_other_brackets(beside: str) -> None:
    """However many of them there are, the deepest place decides, to the level."""
    inner = MAX_NESTING - 2
    shallow = f'{{"jobId":"j","x":[{beside * 100}{"[" * inner}{"]" * inner}]}}'
    deep = f'{{"jobId":"j","x":[{beside * 100}{"[" * (inner + 1)}{"]" * (inner + 1)}]}}'
    assert JobLockRecord.from_json(shallow) is not None
    assert JobLockRecord.from_json(deep) is None


def test_brackets_in_text_and_side_by_side_are_not_nesting() -> None:
    """Only real depth counts, however many brackets there are."""
    text = '{"reason":"' + '[{\\"' * 500 + '","x":[' + "[],{}," * 500 + "0]}"
    record = JobLockRecord.from_json(text)
    assert record is not None
    assert record.reason == '[{"' * 500


def test_an_exhausted_stack_of_the_caller_is_not_an_empty_key() -> None:
    """A live lock read at the end of the stack raises; it must not look like no lock."""

    def at_depth(depth: int) -> JobLockRecord | None:
        return at_depth(depth - 1) if depth else JobLockRecord.from_json(FULL)

    answers: set[str] = set()
    limit = sys.getrecursionlimit()
    for depth in range(limit - 200, limit):
        try:
            answers.add("none" if at_depth(depth) is None else "record")
        except RecursionError:
            answers.add("raised")
    assert answers == {"record", "raised"}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (5.0, "5"),
        (-0.0, "0"),
        (1.5, "1.5"),
        (0.1, "0.1"),
        (1e15 + 0.5, "1000000000000000.5"),
        (1e16, "10000000000000000"),
        (1.2345678901234568e20, "123456789012345680000"),
        (float(2**69), "590295810358705700000"),
        (1e21, "1e+21"),
        (float(2**70), "1.1805916207174113e+21"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (1e-5, "0.00001"),
        (1e-6, "0.000001"),
        (-1.5e-6, "-0.0000015"),
        (1e-7, "1e-7"),
        (1.5e-10, "1.5e-10"),
        (5e-324, "5e-324"),
        (2**53 + 1, "9007199254740993"),
        (float("inf"), "null"),
        (float("nan"), "null"),
    ],
)
def test_numbers_are_written_as_ecmascript_prints_them(number: float, text: str) -> None:
    """Recorded from JSON.stringify; an int that no double can hold keeps its digits."""
    record = JobLockRecord("j", "u", "v", estimated_seconds=number)
    assert f'"estimatedSeconds":{text},' in record.to_json()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('q" b\\ /', r'"q\" b\\ /"'),
        ("\n\r\t\b\f\x00\x1f\x7f", r'"\n\r\t\b\f\u0000\u001f' + '\x7f"'),
        ("é日🔒\u2028", '"é日🔒\u2028"'),
        ("\ud800x\udfff", r'"\ud800x\udfff"'),
        ("\udd12\ud83d", r'"\udd12\ud83d"'),
    ],
)
def test_text_is_escaped_as_json_stringify_does(value: str, text: str) -> None:
    """As little as possible, in lower case; and what UTF-8 cannot carry is escaped."""
    record = JobLockRecord("j", "u", "v", reason=value)
    assert f'"reason":{text},' in record.to_json()
    assert record.to_json().encode()
    assert JobLockRecord.from_json(record.to_json()) == record


def test_a_pair_of_surrogates_is_the_character_it_stands_for() -> None:
    """As in JavaScript, whose strings are UTF-16."""
    record = JobLockRecord("j", "u", "v", reason="\ud83d\udd12")
    assert '"reason":"🔒"' in record.to_json()


def test_is_live_until_but_not_at_its_deadline() -> None:
    """Equality is expired; a record without a deadline never lives."""
    record = JobLockRecord("j", "u", "v", expires_at=20)
    assert record.is_live(19.999)
    assert not record.is_live(20)
    assert not JobLockRecord("j", "u", "v").is_live(0)


def test_is_a_value() -> None:
    """Frozen, slotted, hashable, and it survives pickling."""
    extra: dict[str, JsonValue] = {"x": [1]}
    record = JobLockRecord("j", "u", "v", extra=extra)
    assert record == pickle.loads(pickle.dumps(record))  # noqa: S301
    assert len({record, JobLockRecord("j", "u", "v", extra=extra)}) == 1
    assert not hasattr(record, "__dict__")
    with pytest.raises(AttributeError):
        record.job_id = "other"  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


def test_numbers_that_print_themselves_otherwise() -> None:
    """As NumPy's: they are written as the numbers that they are."""

    class Whole(int):
        def __repr__(self) -> str:
            return "Whole(3)"

    class Real(float):
        def __repr__(self) -> str:
            return "Real(1.5)"

    text = JobLockRecord("j", "u", "v", chunks_to_embed=Whole(3), estimated_seconds=Real(1.5))
    assert '"chunksToEmbed":3,"estimatedSeconds":1.5,' in text.to_json()


def test_the_default_clock_is_javascripts_date_now() -> None:
    """Whole milliseconds since the epoch."""
    assert isinstance(epoch_ms(), int)
    assert abs(epoch_ms() - time.time() * 1000) < 60_000


def test_the_moments_as_datetimes() -> None:
    """In UTC, to the millisecond; None for what no calendar has."""
    record = JobLockRecord("j", "u", "v", started_at=0, expires_at=1_764_440_000_123)
    assert record.started_datetime == datetime(1970, 1, 1, tzinfo=UTC)
    assert record.expires_datetime == datetime(2025, 11, 29, 18, 13, 20, 123_000, tzinfo=UTC)
    beyond = JobLockRecord("j", "u", "v", expires_at=1e300)
    assert (beyond.started_datetime, beyond.expires_datetime) == (None, None)
