"""Amazon DynamoDB: a table with one string key."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from .._store import Blob
from ._etag import is_ours, new_etag
from ._remote import CutReplyError, DoubtfulRefusal, Pool, bounded, dated, etag_alone, missing

try:
    from botocore.exceptions import ClientError

    from . import _aws
except ModuleNotFoundError as _error:
    raise missing(__name__, _error, "dynamodb") from _error

__all__ = ["QUICK", "TABLE", "DynamoBlobStore", "connect"]

QUICK = _aws.QUICK
"""Time-outs and retries for a client that locks."""
_RETRY = _aws.RETRY

TABLE: dict[str, Any] = {
    "AttributeDefinitions": [{"AttributeName": "key", "AttributeType": "S"}],
    "KeySchema": [{"AttributeName": "key", "KeyType": "HASH"}],
    "BillingMode": "PAY_PER_REQUEST",
}
"""What the table is: `client.create_table(TableName="jobs", **TABLE)`."""

_LONGEST_KEY = 2048  # bytes


class DynamoBlobStore:
    """A conditional store in a table, over the boto3 DynamoDB client that it is given.

    An item has the attributes `key`, `value` and `etag`. The client needs `dynamodb:GetItem`,
    `PutItem` and `DeleteItem` on the table, and `Scan` for `list_keys`. Reads are consistent. In a
    global table use the replica of one region only: its regions check conditions each for
    itself, and the last writer wins.

    Time-outs and retries are the client's: give it `QUICK`, this module's
    `botocore.config.Config`. A request that boto3 gave up without an answer is sent once more.
    What boto3 raises then reaches the caller. A key of more than 2,048 bytes is a `ValueError`
    before any request.

    Safe from any thread, and in a child after fork, which opens connections of its own.
    """

    def __init__(self, client: Any, table: str) -> None:
        self._client = client
        self._pool = Pool(lambda: client)
        self._table = table

    def __repr__(self) -> str:
        return f"DynamoBlobStore({self._table!r})"

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        blob = self.get_with_etag(key)
        return None if blob is None else blob.value

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._put(key, value, {})

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        _RETRY.ask(partial(self._ask, "delete_item", Key=_key(key)))

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        read = partial(self._ask, "get_item", Key=_key(key), ConsistentRead=True)
        answer, _ = _RETRY.ask(read)
        item = (answer or {}).get("Item")
        return None if item is None else _blob(item)

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        return etag_alone(self.set_if_new_or_get(key, value))

    def set_if_new_or_get(self, key: str, value: str) -> str | Blob | None:
        """As `set_if_new`, but where it writes nothing it returns what the refusal tells."""
        condition = {"ConditionExpression": "attribute_not_exists(#key)"}
        names = {"ExpressionAttributeNames": {"#key": "key"}}
        return self._put(key, value, condition | names)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        return etag_alone(self._put(key, value, _is_current(etag))) if is_ours(etag) else None

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        place = _key(key)

        def send() -> bool:
            try:
                self._ask("delete_item", Key=place, **_is_current(etag))
            except ClientError as error:
                _raise_unless_refused(error)
                if _aws.reply(error)[2] > 0:
                    raise DoubtfulRefusal from error
                return False
            return True

        return is_ours(etag) and _RETRY.delete(send, partial(self.get_with_etag, key))

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in no order; it reads the whole table."""

        def send(token: Any) -> tuple[list[str], Any]:
            answer = self._ask(
                "scan",
                ConsistentRead=True,
                ProjectionExpression="#key",
                FilterExpression="begins_with(#key, :prefix)",
                ExpressionAttributeNames={"#key": "key"},
                ExpressionAttributeValues={":prefix": {"S": prefix}},
                **({} if token is None else {"ExclusiveStartKey": token}),
            )
            return [item["key"]["S"] for item in answer["Items"]], answer.get("LastEvaluatedKey")

        return _RETRY.pages(send)

    def server_time_ms(self, key: str) -> tuple[float, float] | None:
        """Return between which epoch milliseconds the service's clock is; for `check_store`.

        It asks for `key`, which need not be there. None if it does not say.
        """
        answer = self._ask("get_item", Key=_key(key))
        return dated(answer["ResponseMetadata"]["HTTPHeaders"].get("date"))

    def _put(self, key: str, value: str, condition: dict[str, Any]) -> str | Blob | None:
        etag = new_etag()
        item = {**_key(key), "value": {"S": value}, "etag": {"S": etag}}
        # A refusal tells what is there: what this very request has written, if it was repeated.
        told = {"ReturnValuesOnConditionCheckFailure": "ALL_OLD"} if condition else {}

        def send() -> str | Blob | None:
            try:
                self._ask("put_item", Item=item, **condition, **told)
            except ClientError as error:
                _raise_unless_refused(error)
                found: Any = error.response.get("Item")
                if found:
                    return etag if found["etag"] == item["etag"] else _blob(found)
                if _aws.reply(error)[2] > 0:  # not every emulator tells
                    raise DoubtfulRefusal from error
                return None
            return etag

        return _RETRY.write(send, partial(self.get_with_etag, key), value)

    def _ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        self._pool.check()
        answer: dict[str, Any] = getattr(self._client, operation)(
            TableName=self._table, **parameters
        )
        # An answer that ends within its headers has no length, and would be one without an item.
        if "content-length" not in answer["ResponseMetadata"]["HTTPHeaders"]:
            raise CutReplyError("an answer of unknown length")
        return answer


def connect(table: str) -> DynamoBlobStore:
    """Return the store of this table, with a client that takes its credentials by itself."""
    boto3: Any = importlib.import_module("boto3")  # it has no types
    return DynamoBlobStore(boto3.client("dynamodb", config=QUICK), table)


def _key(key: str) -> dict[str, Any]:
    return {"key": {"S": bounded(key, _LONGEST_KEY)}}


def _blob(item: Any) -> Blob:
    return Blob(item["value"]["S"].encode(), item["etag"]["S"])


def _is_current(etag: str) -> dict[str, Any]:
    return {
        "ConditionExpression": "#etag = :etag",
        "ExpressionAttributeNames": {"#etag": "etag"},
        "ExpressionAttributeValues": {":etag": {"S": etag}},
    }


def _raise_unless_refused(error: ClientError) -> None:
    if _aws.reply(error)[1] != "ConditionalCheckFailedException":
        raise error
