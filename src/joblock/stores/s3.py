"""Amazon S3, and what speaks its protocol: MinIO, Cloudflare R2, Ceph and others."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

from .._store import TOMBSTONE, Blob
from ._remote import (
    CutReplyError,
    DoubtfulRefusal,
    Pool,
    dated,
    is_etag,
    missing,
    whole,
)

try:
    from botocore.exceptions import ClientError

    from . import _aws  # it needs boto3, too
except ModuleNotFoundError as _error:
    raise missing(__name__, _error, "s3") from _error

__all__ = ["QUICK", "S3BlobStore", "connect"]

QUICK = _aws.QUICK
"""Time-outs and retries for a client that locks."""
_RETRY = _aws.RETRY


class S3BlobStore:
    """A conditional store in a bucket, over the boto3 S3 client that it is given.

    `prefix` goes before every key as it is, so end it with a slash. Reads and conditions need the
    permission `s3:GetObject`, writes `s3:PutObject`, removal `s3:DeleteObject`; without
    `s3:ListBucket`, reading a key that is not there is an AccessDenied error.

    `conditional_delete=False` is for a service that ignores the condition of a delete, as MinIO
    does: a release then writes `null` over the record, which every reader takes for no lock.
    `joblock.conformance` tells which service does.

    Time-outs and retries are the client's, whose defaults wait a minute for each of five answers:
    give it `QUICK`, this module's `botocore.config.Config`. A request that boto3 gave up without
    an answer is sent once more. What boto3 raises then reaches the caller.

    Safe from any thread, and in a child after fork, which opens connections of its own.
    """

    def __init__(
        self, client: Any, bucket: str, *, prefix: str = "", conditional_delete: bool = True
    ) -> None:
        self._client = client
        self._pool = Pool(lambda: client)
        self._bucket = bucket
        self._prefix = prefix
        self.leaves_null: bool = (
            not conditional_delete
        )  # for a sweep, which can remove nothing then

    def __repr__(self) -> str:
        return f"S3BlobStore({self._bucket!r}, prefix={self._prefix!r})"

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        blob = self.get_with_etag(key)
        return None if blob is None else blob.value

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._write(key, value)

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        _RETRY.ask(partial(self._client.delete_object, **self._object(key)))

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""

        def send() -> Blob | None:
            try:
                response = self._client.get_object(**self._object(key))
            except ClientError as error:
                if _aws.reply(error)[1] == "NoSuchKey":
                    return None
                raise
            headers = response["ResponseMetadata"]["HTTPHeaders"]
            with closing(response["Body"]) as body:
                value = body.read()
            # Chunks tell their end themselves.
            if "chunked" not in headers.get("transfer-encoding", "") and (
                headers.get("content-length") != str(len(value))
            ):
                raise CutReplyError(f"{len(value)} bytes of a value of unknown length")
            return Blob(value, whole(response["ETag"]))

        return _RETRY.ask(send)[0]

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        return self._write(key, value, IfNoneMatch="*")

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        return self._write(key, value, IfMatch=etag) if is_etag(etag) else None

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        if self.leaves_null:
            return self.set_if_match(key, TOMBSTONE, etag) is not None
        if not is_etag(etag):
            return False

        def send() -> bool:
            try:
                self._client.delete_object(**self._object(key), IfMatch=etag)
            except ClientError as error:
                _raise_unless_refused(error)
                return False
            return True

        return _RETRY.delete(send, partial(self.get_with_etag, key))

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in order; it needs the permission `s3:ListBucket`."""

        def send(token: str | None) -> tuple[list[str], str | None]:
            place = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
            place |= {} if token is None else {"ContinuationToken": token}
            self._pool.check()
            response = self._client.list_objects_v2(**place)
            more = response["IsTruncated"]  # which a reply that was cut does not say
            names = [item["Key"] for item in response.get("Contents", [])]
            keys = [name.removeprefix(self._prefix) for name in names]
            return keys, response["NextContinuationToken"] if more else None

        return _RETRY.pages(send)

    def server_time_ms(self, key: str) -> tuple[float, float] | None:
        """Return between which epoch milliseconds the service's clock is; for `check_store`.

        It asks for `key`, which need not be there. None if it does not say.
        """
        try:
            response: Any = self._client.head_object(**self._object(key))
        except ClientError as error:
            response = error.response
        return dated(response["ResponseMetadata"]["HTTPHeaders"].get("date"))

    def _write(self, key: str, value: str, **condition: str) -> str | None:
        def send() -> str | None:
            try:
                response = self._client.put_object(
                    **self._object(key),
                    **condition,
                    Body=value.encode(),
                    ContentType="application/json",
                )
            except ClientError as error:
                _raise_unless_refused(error)
                return None
            return whole(response["ETag"])

        return _RETRY.write(send, partial(self.get_with_etag, key), value)

    def _object(self, key: str) -> dict[str, str]:
        self._pool.check()
        return {"Bucket": self._bucket, "Key": self._prefix + key}


def connect(bucket: str, prefix: str, *, conditional_delete: bool) -> S3BlobStore:
    """Return the store of this bucket, with a client that takes its credentials by itself."""
    boto3: Any = importlib.import_module("boto3")  # it has no types
    client = boto3.client("s3", config=QUICK)
    return S3BlobStore(client, bucket, prefix=prefix, conditional_delete=conditional_delete)


def _raise_unless_refused(error: ClientError) -> None:
    status, code, retries = _aws.reply(error)
    # 409 ConditionalRequestConflict: another conditional write is under way. So look again.
    if status != 412 and code not in ("ConditionalRequestConflict", "NoSuchKey"):
        raise error
    if retries > 0:
        raise DoubtfulRefusal from error
