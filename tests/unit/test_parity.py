"""Everything that was recorded of the JavaScript original, replayed on a plain store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import joblock
from tests.support import Api, PlainStore

VECTORS = json.loads(
    (Path(__file__).parents[1] / "vectors" / "seed-behaviour.json").read_text(encoding="utf-8")
)
TEXT = ("jobId", "canisterUid", "vaultId", "actorUid", "reason")
NUMBER = ("chunksToEmbed", "estimatedSeconds", "startedAt", "expiresAt")
PYTHON_NAMES = {
    "actorUid": "actor_uid",
    "chunksToEmbed": "chunks_to_embed",
    "estimatedSeconds": "estimated_seconds",
    "reason": "reason",
    "ttlMs": "ttl_ms",
    "expectedJobId": "expected_job_id",
}


def test_the_default_lease_is_the_originals() -> None:
    """Sixteen minutes, in milliseconds."""
    assert joblock.JOB_LOCK_TTL_MS == VECTORS["ttlMs"]


@pytest.mark.parametrize("scenario", VECTORS["scenarios"], ids=lambda scenario: scenario["name"])
@pytest.mark.filterwarnings("ignore::joblock.JobLockWarning")
def test_scenario(scenario: dict[str, Any], api: Api) -> None:
    """Results, errors, each store call in order, and the final blobs byte for byte."""
    store = PlainStore(scenario["initial"])
    for step in scenario["steps"]:
        if step["op"] == "blob":
            store.blobs[step["key"]] = step["value"]
            continue
        store.calls, store.failing = [], step["failing"]
        if "throws" in step:
            expected = TypeError if step["throws"] == "TypeError" else OSError
            message = None if step["throws"] == "TypeError" else f"^{step['throws']}$"
            with pytest.raises(expected, match=message):
                run(api, store, step)
        else:
            assert run(api, store, step) == expected_result(step)
        assert store.calls == step["calls"]
    assert store.blobs == scenario["final"]


def run(api: Api, store: PlainStore, step: dict[str, Any]) -> object:
    args = dict(step["args"])
    ids = args.pop("canisterUid"), args.pop("vaultId")
    options = {PYTHON_NAMES[name]: value for name, value in args.items()}
    if step["op"] == "acquire":
        result = api.acquire(
            store, *ids, **options, clock=lambda: step["now"], uuid_factory=lambda: step["uuid"]
        )
        if result:
            return {"acquired": True, "jobId": result.job_id, "record": result.record.to_dict()}
        return {"acquired": False, "existing": result.existing.to_dict()}
    if step["op"] == "release":
        released = api.release(store, *ids, **options)
        outcome: dict[str, object] = {"released": released.released}
        return outcome if released.reason is None else outcome | {"reason": released.reason}
    record = api.peek(store, *ids)
    return None if record is None else record.to_dict()


def expected_result(step: dict[str, Any]) -> object:
    result = step["result"]
    if step["op"] == "acquire":
        name = "record" if result["acquired"] else "existing"
        return result | {name: typed(result[name])}
    return typed(result) if step["op"] == "peek" and result is not None else result


def typed(record: dict[str, Any]) -> dict[str, Any]:
    """The original hands out what it parsed; joblock reads a missing or mistyped field as None."""
    fields = {name: isinstance(record.get(name), str) for name in TEXT} | {
        name: type(record.get(name)) in (int, float) for name in NUMBER
    }
    known = {name: record[name] if good else None for name, good in fields.items()}
    return known | {name: value for name, value in record.items() if name not in known}
