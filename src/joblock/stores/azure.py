"""Azure Blob Storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from .._store import Blob
from ._remote import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    CutReplyError,
    Pool,
    Retry,
    dated,
    is_etag,
    missing,
    whole,
)

try:
    from azure.core import MatchConditions
    from azure.core.exceptions import HttpResponseError, ServiceRequestError, ServiceResponseError
    from azure.storage.blob import ContainerClient, ContentSettings
except ModuleNotFoundError as _error:
    raise missing(__name__, _error, "azure") from _error


__all__ = ["AzureBlobStore", "connect"]

# The SDK's own retry waits 15 seconds, and then takes its own write for a conflict.
_REQUEST: dict[str, Any] = {
    "retry_total": 0,
    "connection_timeout": CONNECT_TIMEOUT_S,
    "read_timeout": READ_TIMEOUT_S,
}
_JSON = ContentSettings(content_type="application/json")


class AzureBlobStore:
    """A conditional store in a container, over the `ContainerClient` that it is given.

    `prefix` goes before every key as it is, so end it with a slash. The client needs to read,
    create, write and delete blobs. A key with a backslash is refused with a `ValueError` before
    any request: Azure takes it for a slash, and two locks could become one.

    A request waits 5 seconds to connect and 10 for an answer; without one it is sent again, twice
    at most. What the SDK raises then reaches the caller.

    Safe from any thread, and in a child after fork, which opens connections of its own. A transport
    that is not the SDK's own, over requests, must see to that itself.
    """

    def __init__(self, container_client: ContainerClient, *, prefix: str = "") -> None:
        self._container = container_client
        self._pool = Pool(partial(_session, container_client))
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"AzureBlobStore({self._container.container_name!r}, prefix={self._prefix!r})"

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        blob = self.get_with_etag(key)
        return None if blob is None else blob.value

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._write(key, value, overwrite=True)

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        self._delete(key)

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        blob = self._blob(key)

        def send() -> Blob | None:
            try:
                download = blob.download_blob(**_REQUEST)
                value: bytes = download.readall()
            except HttpResponseError as error:
                if _code(error) == "BlobNotFound":
                    return None
                raise
            if len(value) != download.size:
                raise CutReplyError(f"{len(value)} bytes of a value of {download.size}")
            return Blob(value, whole(download.properties.etag))

        return _RETRY.ask(send)[0]

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        return self._write(key, value, overwrite=False)

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        return (
            None
            if not is_etag(etag)
            else self._write(key, value, overwrite=True, **_if_match(etag))
        )

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        return is_etag(etag) and self._delete(key, **_if_match(etag))

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in order; the client needs to list blobs, too."""

        def send(token: str | None) -> tuple[list[str], str | None]:
            self._pool.check()
            names = self._container.list_blob_names(
                name_starts_with=self._prefix + prefix, results_per_page=1000, **_REQUEST
            )
            pages: Any = names.by_page(token)
            keys = [name.removeprefix(self._prefix) for name in next(pages)]
            return keys, pages.continuation_token

        return _RETRY.pages(send)

    def server_time_ms(self, key: str) -> tuple[float, float] | None:
        """Return between which epoch milliseconds the service's clock is; for `check_store`.

        It asks for `key`, which need not be there. None if it does not say.
        """
        dates: list[object] = []

        def note(response: Any) -> None:
            dates.append(response.http_response.headers.get("Date"))

        self._blob(key).exists(raw_response_hook=note, **_REQUEST)
        return dated(dates[-1])

    def _write(self, key: str, value: str, **condition: Any) -> str | None:
        blob = self._blob(key)

        def send() -> str | None:
            try:
                written = blob.upload_blob(
                    value.encode(), content_settings=_JSON, **condition, **_REQUEST
                )
            except HttpResponseError as error:
                if _code(error) in ("BlobAlreadyExists", "ConditionNotMet"):
                    return None
                raise
            return whole(written["etag"])

        return _RETRY.write(send, partial(self.get_with_etag, key), value)

    def _delete(self, key: str, **condition: Any) -> bool:
        blob = self._blob(key)

        def send() -> bool:
            try:
                blob.delete_blob(**condition, **_REQUEST)
            except HttpResponseError as error:
                if _code(error) in ("BlobNotFound", "ConditionNotMet"):
                    return False
                raise
            return True

        return _RETRY.delete(send, partial(self.get_with_etag, key))

    def _blob(self, key: str) -> Any:
        if "\\" in key:
            raise ValueError(f"Azure takes a backslash for a slash: {key!r} could be another lock")
        self._pool.check()
        return self._container.get_blob_client(self._prefix + key)


def connect(container: str, prefix: str) -> AzureBlobStore:
    """Return the store of this container, with a client that takes its credentials by itself."""
    connection_string = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    account = os.environ.get("AZURE_STORAGE_ACCOUNT")
    if connection_string:
        client = ContainerClient.from_connection_string(connection_string, container)
    elif account:
        try:
            from azure.identity import DefaultAzureCredential
        except ModuleNotFoundError as error:
            raise missing(__name__, error, "azure") from error

        url = f"https://{account}.blob.core.windows.net"
        client = ContainerClient(url, container, credential=DefaultAzureCredential())
    else:
        raise ValueError("set AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT")
    return AzureBlobStore(client, prefix=prefix)


def _session(container: Any) -> Any:
    transport: Any = getattr(container, "_pipeline", container)
    while hasattr(transport, "_transport"):  # a client that another one made has it wrapped
        transport = transport._transport
    return getattr(transport, "session", None)  # the transport's own close() is for good


def _if_match(etag: str) -> dict[str, Any]:
    return {"etag": etag, "match_condition": MatchConditions.IfNotModified}


def _code(error: HttpResponseError) -> str | None:
    return getattr(error, "error_code", None)


def _unanswered(error: Exception) -> bool:
    if isinstance(error, HttpResponseError):
        status = error.status_code
        return status is None or status >= 500 or status in (408, 429) or _code(error) is None
    # The last three are what breaks in the SDK where a reply was cut.
    broken = (LookupError, TypeError, ValueError)
    return isinstance(error, (ServiceRequestError, ServiceResponseError, CutReplyError, *broken))


_RETRY = Retry(_unanswered)
