"""What is DynamoDB's own: its items, its limits, and what it tells with a refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from joblock import acquire_job_lock, release_job_lock
from joblock.conformance import check_store
from tests.backends import Backends
from tests.integration.test_one_winner import assert_one_winner_of_forks
from tests.lossy import lossy
from tests.support import KEY, UID, VAULT, acquired, held

pytest.importorskip("boto3")

REFUSED = "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException"


@pytest.fixture
def store(backends: Backends) -> Iterator[Any]:
    with ExitStack() as stack:
        yield backends["dynamodb"].open(stack, backends.new_prefix())


def test_every_check(store: Any) -> None:
    """It passes them all, also in races."""
    assert [finding for finding in check_store(store) if not finding] == []


def test_what_stands_in_the_table(store: Any) -> None:
    """The record as it is, under its key, and nothing once it is released."""
    lock = acquired(acquire_job_lock(store, UID, VAULT, reason="é日🔒"))
    (item,) = store._client.scan(TableName=store._table)["Items"]
    assert item == {
        "key": {"S": KEY},
        "value": {"S": lock.record.to_json()},
        "etag": {"S": lock.etag},
    }
    assert release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)
    assert store._client.scan(TableName=store._table)["Items"] == []


def test_what_is_refused_before_any_request(store: Any) -> None:
    """A longer key, and an etag that is none of ours."""
    key = "é" * 1024
    store.set(key, "x")
    for verb, *values in (("get",), ("set", "x"), ("delete",), ("delete_if_match", "0" * 32)):
        with pytest.raises(ValueError, match="at most 2048 bytes, not 2049"):
            getattr(store, verb)(f"{key}a", *values)
    assert store.set_if_match(key, "y", "0" * 31 + " ") is None
    assert store.delete_if_match(key, "0" * 32 + "\n") is False


@pytest.mark.parametrize("own", [True, False], ids=["its own", "another's"])
def test_a_refusal_that_tells_what_is_there(backends: Backends, own: bool) -> None:
    """What this very request wrote before has won, without a read; another's has not."""
    backend, prefix = backends["dynamodb"], backends.new_prefix()
    with lossy(backend.url, rewrite=True) as proxy, ExitStack() as stack:
        store: Any = backend.open(stack, prefix, proxy.url)

        def is_put(request: Any) -> bool:
            if not request.headers["x-amz-target"].endswith("PutItem"):
                return False
            item = json.loads(request.body)["Item"]
            if not own:
                item["etag"]["S"] = "another"
            body = json.dumps({"__type": REFUSED, "message": "no", "Item": item})
            proxy.answer(400, body.encode(), {}, when=is_second)
            return True

        def is_second(request: Any) -> bool:
            return bool(request.headers["x-amz-target"].endswith("PutItem"))

        proxy.swallow(is_put)
        proxy.requests.clear()
        etag = store.set_if_new(KEY, "x")
        assert len(proxy.requests) == 2
        assert (etag is not None) == own
        assert own == (etag == store.get_with_etag(KEY).etag)


def test_a_refused_click_is_one_request(backends: Backends) -> None:
    """The refusal tells who has the lock; dynalite's does not, so it is written here."""
    backend, prefix = backends["dynamodb"], backends.new_prefix()
    with lossy(backend.url, rewrite=True) as proxy, ExitStack() as stack:
        store = backend.open(stack, prefix, proxy.url)
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        item = {"value": {"S": lock.record.to_json()}, "etag": {"S": lock.etag}}
        body = json.dumps({"__type": REFUSED, "message": "no", "Item": item})
        proxy.answer(400, body.encode(), {})
        proxy.requests.clear()
        assert held(acquire_job_lock(store, UID, VAULT)).existing == lock.record
        assert len(proxy.requests) == 1


def test_one_winner_of_processes(store: Any) -> None:
    """One store, inherited over fork, raced by its parent's children."""
    assert_one_winner_of_forks(store)
