"""Google Cloud Storage."""

from __future__ import annotations

import base64
import importlib
import re
from collections.abc import Iterator
from functools import partial
from hashlib import md5
from typing import Any

from .._store import Blob
from ._remote import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    CutReplyError,
    Pool,
    Retry,
    dated,
    missing,
    whole,
)

try:
    import requests
    from google.api_core.exceptions import GoogleAPICallError, NotFound, PreconditionFailed
    from google.auth.exceptions import TransportError
except ModuleNotFoundError as _error:
    raise missing(__name__, _error, "gcs") from _error


__all__ = ["GcsBlobStore", "connect"]

# The SDK's own retry goes on for two minutes, and takes its own write for a conflict.
_REQUEST: dict[str, Any] = {"retry": None, "timeout": (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)}


class GcsBlobStore:
    """A conditional store in a bucket, over the `google.cloud.storage.Bucket` that it is given.

    The etag is the object's generation. `prefix` goes before every key as it is, so end it with a
    slash. The client needs `storage.objects.get`, `.create` and `.delete` (to overwrite, too).
    Google allows about one write a second to one key, and answers more of them with 429.

    A request waits 5 seconds to connect and 10 for an answer; without one, or after a 429, it is
    sent again, twice at most. What the SDK raises then reaches the caller.

    Safe from any thread, and in a child after fork, which opens connections of its own.
    """

    def __init__(self, bucket: Any, *, prefix: str = "") -> None:
        self._bucket = bucket
        self._pool = Pool(lambda: bucket.client._http)
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"GcsBlobStore({self._bucket.name!r}, prefix={self._prefix!r})"

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        blob = self.get_with_etag(key)
        return None if blob is None else blob.value

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._write(key, value, None)

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        self._delete(key, None)

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""

        def send() -> Blob | None:
            blob = self._blob(key)
            try:
                value = blob.download_as_bytes(**_REQUEST)
            except NotFound as error:
                _raise_if_no_bucket(error)
                return None
            _check_hash(value, blob.md5_hash)
            return Blob(value, whole(str(blob.generation)))

        return _RETRY.ask(send)[0]

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        return self._write(key, value, 0)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        generation = _generation(etag)
        return None if generation is None else self._write(key, value, generation)

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        generation = _generation(etag)
        return generation is not None and self._delete(key, generation)

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in order; it needs `storage.objects.list`, too."""

        def send(token: str | None) -> tuple[list[str], str | None]:
            self._pool.check()
            listing = self._bucket.list_blobs(
                prefix=self._prefix + prefix, page_token=token, page_size=1000, **_REQUEST
            )
            page = next(listing.pages)
            return [blob.name.removeprefix(self._prefix) for blob in page], listing.next_page_token

        return _RETRY.pages(send)

    def server_time_ms(self, key: str) -> tuple[float, float] | None:
        """Return between which epoch milliseconds the service's clock is; for `check_store`.

        It asks for `key`, which need not be there. None if it does not say.
        """
        try:
            self._blob(key).reload(**_REQUEST)
        except GoogleAPICallError as error:
            failed: Any = error
            return dated(failed.response.headers.get("date"))
        return None

    def _write(self, key: str, value: str, generation: int | None) -> str | None:
        def send() -> str | None:
            blob = self._blob(key)
            blob.cache_control = "no-store"
            try:
                blob.upload_from_string(
                    value.encode(),
                    content_type="application/json",
                    if_generation_match=generation,
                    **_REQUEST,
                )
            except PreconditionFailed:
                return None
            return whole(str(blob.generation))

        return _RETRY.write(send, partial(self.get_with_etag, key), value)

    def _delete(self, key: str, generation: int | None) -> bool:
        def send() -> bool:
            try:
                self._blob(key).delete(if_generation_match=generation, **_REQUEST)
            except PreconditionFailed:
                return False
            except NotFound as error:
                _raise_if_no_bucket(error)
                return False
            return True

        return _RETRY.delete(send, partial(self.get_with_etag, key))

    def _blob(self, key: str) -> Any:
        self._pool.check()
        return self._bucket.blob(self._prefix + key)


def connect(bucket: str, prefix: str) -> GcsBlobStore:
    """Return the store of this bucket, with a client that takes its credentials by itself."""
    storage: Any = importlib.import_module("google.cloud.storage")  # it has no types
    return GcsBlobStore(storage.Client().bucket(bucket), prefix=prefix)


def _generation(etag: str) -> int | None:
    return int(etag) if re.fullmatch("[1-9][0-9]{0,18}", etag) else None  # 0 would mean: a new key


def _check_hash(value: bytes, md5_hash: str | None) -> None:
    # Google sends it before the value; it tells more than a length, which the SDK does not show.
    if md5_hash != base64.b64encode(md5(value, usedforsecurity=False).digest()).decode():
        raise CutReplyError(f"{len(value)} bytes of a value with another hash")


def _raise_if_no_bucket(error: NotFound) -> None:
    message: str = error.message  # method, URL, and Google's words: of an object, its name too
    if re.match(r"\S+ \S+: The specified bucket does not exist", message):
        raise error


def _unanswered(error: Exception) -> bool:
    if isinstance(error, GoogleAPICallError):
        return error.code is None or error.code >= 500 or error.code in (408, 429)
    # The last three are what breaks in the SDK where a reply was cut.
    broken = (LookupError, TypeError, ValueError)
    return isinstance(error, (requests.RequestException, TransportError, CutReplyError, *broken))


_RETRY = Retry(_unanswered)
