"""The reader of stored text, on thousands of damaged and random texts."""

from __future__ import annotations

import random

from joblock import JobLockRecord, MemoryBlobStore, peek_job_lock
from tests.support import KEY, UID, VAULT

RECORD = (
    '{"jobId":"j","canisterUid":"u","vaultId":"v","actorUid":null,"chunksToEmbed":90,'
    '"estimatedSeconds":1.5,"reason":"r \\ud83d\\udd12","startedAt":1,"expiresAt":2,"x":[{"y":1}]}'
)
SEEDS = [RECORD, RECORD, RECORD, '{"jobId":"j","expiresAt":2}', "null", "[[[[]]]]"]
PIECES = [
    "{", "}", "[", "]", '"', ":", ",", "\\", "\\u", "\\ud800", "\\udc00", "\ud800", "\udfff",
    "\ufeff", "\x00", "\n", "NaN", "Infinity", "-Infinity", "-", "1e999", "1e-999", "-0", "9" * 400,
    "9" * 5000, "0x1", "1_0", "٣", "true", "null", '"jobId"', '"jobId":1', '"expiresAt":1e99',
    '"jobId":"a","jobId":"b"', "[" * 100, '{"a":' * 100, "]" * 100, "}" * 100, "🔒", "\u2028", " ",
]  # fmt: skip
TEXTS = 10_000


def mutated(rng: random.Random) -> str:
    text = rng.choice(SEEDS)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        to = at + rng.randrange(6)
        match rng.randrange(4):
            case 0:
                text = text[:at] + rng.choice(PIECES) + text[at:]
            case 1:
                text = text[:at] + rng.choice(PIECES) + text[to:]
            case 2:
                text = text[:at] + text[to:]
            case _:
                text = text[:to] + text[at:]
    return text


def noise(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(rng.choices(PIECES, k=rng.randrange(1, 20)))
    return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 40)))


def test_any_text_is_a_record_or_none() -> None:
    """Never an exception; and what is a record can be written and read again to the same bytes."""
    rng = random.Random("joblock")
    records = 0
    for number in range(TEXTS):
        text = noise(rng) if number % 3 == 0 else mutated(rng)
        record = JobLockRecord.from_json(text)
        if record is not None:
            records += 1
            rewritten = record.to_json()
            assert rewritten.encode()
            again = JobLockRecord.from_json(rewritten)
            assert again is not None, text
            assert again.to_json() == rewritten, text
            assert again.is_live(1.5) == record.is_live(1.5)
    assert TEXTS / 10 < records < TEXTS, "the texts have become too harmless, or too broken"


def test_any_bytes_are_a_record_or_none() -> None:
    """A store may return bytes; those that are not UTF-8 are no record."""
    rng = random.Random("bytes")
    refused = 0
    for number in range(TEXTS):
        raw = bytearray(mutated(rng).encode("utf-8", "surrogatepass"))
        if number % 2 and raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        record = JobLockRecord.from_json(bytes(raw))
        refused += record is None
    assert 0 < refused < TEXTS


def test_peek_and_takeover_see_no_lock_in_broken_text() -> None:
    """The same through the public functions."""
    rng = random.Random("peek")
    store = MemoryBlobStore()
    for _ in range(500):
        text = noise(rng)
        store.set(KEY, text)
        assert peek_job_lock(store, UID, VAULT) == JobLockRecord.from_json(text)
