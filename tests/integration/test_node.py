"""JavaScript itself as the judge of the wire format: JSON.parse and JSON.stringify, run by Node."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess

import pytest

from joblock import JobLockRecord
from joblock._record import _too_deep
from tests.unit.test_fuzz import mutated, noise

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

# Reads a line of JSON, a list of texts; writes what JavaScript makes of each as a lock record:
# null, or the known fields as `typeof` and Number.isFinite take them, with the whole re-serialised.
READER = """
const texts = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const isText = (v) => typeof v === 'string', isNumber = (v) => Number.isFinite(v);
const known = {jobId: isText, canisterUid: isText, vaultId: isText, actorUid: isText,
  chunksToEmbed: isNumber, estimatedSeconds: isNumber, reason: isText, startedAt: isNumber,
  expiresAt: isNumber};
const read = (text) => {
  let parsed;
  try { parsed = JSON.parse(text); } catch { return null; }
  if (parsed === null || typeof parsed !== 'object' || Array.isArray(parsed)) return null;
  const record = {};
  for (const [name, good] of Object.entries(known)) {
    record[name] = Object.hasOwn(parsed, name) && good(parsed[name]) ? parsed[name] : null;
  }
  return JSON.stringify(record);
};
console.log(JSON.stringify(texts.map(read)));
"""


def node(script: str, value: object) -> list[str | None]:
    result = subprocess.run(
        ["node", "-e", script], input=json.dumps(value), capture_output=True, check=True, text=True
    )
    answer: list[str | None] = json.loads(result.stdout)
    return answer


def as_doubles(record: JobLockRecord) -> JobLockRecord:
    """JavaScript rounds a long integer that it reads; joblock keeps it as it is."""

    def double(value: float | None) -> float | None:
        return None if value is None else float(value)

    return record.__replace__(
        chunks_to_embed=double(record.chunks_to_embed),
        estimated_seconds=double(record.estimated_seconds),
        started_at=double(record.started_at),
        expires_at=double(record.expires_at),
        extra={},
        run_id=None,
        ended_at=None,
    )


@pytest.mark.slow
def test_both_languages_read_the_same_records() -> None:
    """Whether a text is a record at all, and each known field, to the byte."""
    rng = random.Random("node")
    texts = [noise(rng) if number % 4 == 0 else mutated(rng) for number in range(20_000)]
    texts = [text for text in texts if not _too_deep(text)]
    records = 0
    for text, theirs in zip(texts, node(READER, texts), strict=True):
        ours = JobLockRecord.from_json(text)
        if ours is not None:
            records += 1
            ours = as_doubles(ours)
        assert (None if ours is None else ours.to_json()) == theirs, repr(text)
    assert records > 2000


def test_both_languages_print_the_same_numbers() -> None:
    """Random doubles of every exponent, and those near the turns of ECMAScript's notation."""
    rng = random.Random("numbers")
    doubles = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(20_000)]
    doubles += [rng.uniform(0.1, 10) * 10.0 ** rng.randrange(-9, 24) for _ in range(20_000)]
    doubles += [float(rng.randrange(2**70)) for _ in range(2000)]
    doubles = [double for double in doubles if abs(double) < float("inf")]
    script = "console.log(JSON.stringify(JSON.parse(require('fs').readFileSync(0)).map(String)))"
    for double, theirs in zip(doubles, node(script, doubles), strict=True):
        record = JobLockRecord("j", "u", "v", expires_at=double)
        assert record.to_json().endswith(f'"expiresAt":{theirs}}}')


# What the original's acquire and release do, on one blob: a line of JSON in, `[text, now, job id]`,
# and out come the acquire's answer, and what the job's release leaves there: true if it is removed.
ORIGINAL = """
const [text, now, jobId] = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const parsed = JSON.parse(text);
const live = Number.isFinite(parsed.expiresAt) && parsed.expiresAt > now;
const acquired = live ? {acquired: false, existing: parsed} : {acquired: true};
console.log(JSON.stringify([JSON.stringify(acquired), String(parsed.jobId === jobId)]));
"""


@pytest.mark.parametrize("state", ["running", "ended", "running, expired", "ended, expired"])
def test_a_record_with_a_run_or_an_end_is_one_to_the_original(state: str) -> None:
    """It refuses it while it is live, takes it over after that, and its job may release it."""
    record = JobLockRecord("j", "u", "v", started_at=5, expires_at=100, run_id="r")
    if "ended" in state:
        record = record.__replace__(ended_at=50)
    now = 100 if "expired" in state else 99
    answer, released = node(ORIGINAL, [record.to_json(), now, "j"])
    assert answer is not None
    refused = json.loads(answer)
    assert refused["acquired"] is not record.is_live(now)
    assert refused.get("existing") == (record.to_dict() if record.is_live(now) else None)
    assert released == "true"
    (read,) = node(READER, [record.to_json()])
    assert read == record.__replace__(run_id=None, ended_at=None).to_json()
