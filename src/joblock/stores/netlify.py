"""Netlify Blobs, over HTTP: the original's store, for which there is no Python client."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote, urlencode, urlsplit

from .._store import TOMBSTONE, Blob
from ._http import Answer, Connections
from ._remote import READ_TIMEOUT_S, CutReplyError, Retry, dated, is_etag, whole

__all__ = ["NetlifyBlobStore", "NetlifyBlobsError", "connect"]

_API_URL = "https://api.netlify.com"
_SIGNED_URL = {"accept": "application/json;type=signed-url"}

# What the official client leaves as it is in a key: both must name the same blob.
_SAFE = "!$&'()*+,-./:;=@[]^_|~"


# No `user:password@`: http.client's errors show a URL that it cannot request.
_URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?([/?][!-~]*)?")


class NetlifyBlobsError(Exception):
    """Netlify answered a request with an error; `status` is HTTP's.

    After a failed read the blob is untouched; after a failed write or removal it is, too, unless
    `status` is 500 or more: then that is unknown.
    """

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(status, problem)
        self.status = status
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}: status {self.status}"


class NetlifyBlobStore:
    """A conditional store in the site-wide store `name` of Netlify Blobs.

    In a Netlify function, all else comes from the environment's `NETLIFY_BLOBS_CONTEXT`.
    Elsewhere give `site_id` and an access `token`. With `edge_url` (a context's
    `uncachedEdgeURL`) requests go there. Without, they go to `api_url`, which first gives out a
    signed URL for each read and write: two requests instead of one. Reads are strongly consistent.

    Netlify has no conditional delete, so a release writes `null` over the record, which every
    reader takes for no lock. A key of more than 600 bytes is a `ValueError` before any request.

    An answer is awaited for `timeout` seconds; without one, or after a 429 or 5xx, a request is
    sent again, twice at most. Then `NetlifyBlobsError`, `OSError` or `http.client.HTTPException`
    is raised. None of them shows the token, nor does `repr`.

    Safe from any thread, and after fork. Connections are kept open for the next request; close
    them with `close()` or `with`.
    """

    leaves_null = True  # so that a sweep is refused

    def __init__(
        self,
        name: str,
        *,
        site_id: str | None = None,
        token: str | None = None,
        api_url: str | None = None,
        edge_url: str | None = None,
        timeout: float = READ_TIMEOUT_S,
    ) -> None:
        self._http = Connections(timeout)
        if not name or "/" in name or len(name.encode()) > 64:
            raise ValueError(f"a store's name has 1 to 64 bytes and no slash, unlike {name!r}")
        if site_id is None and token is None:
            context = _context()
            site_id, token = context.get("siteID"), context.get("token")
            api_url, edge_url = context.get("apiURL"), context.get("uncachedEdgeURL")
            if context.get("edgeURL") and not edge_url:
                raise ValueError("NETLIFY_BLOBS_CONTEXT has no uncachedEdgeURL, for strong reads")
        if not site_id or not token:
            raise ValueError("give site_id and token, or run where NETLIFY_BLOBS_CONTEXT is set")
        if not (token.isascii() and token.isprintable()):
            raise ValueError("token has characters that no token has")
        url = edge_url or api_url or _API_URL
        if not _URL.fullmatch(url):
            raise ValueError("api_url and edge_url are https://HOST, or http://HOST to try things")
        self._name = name
        self._bearer = {"authorization": f"Bearer {token}"}
        self._has_edge = bool(edge_url)
        scheme, host, *_ = urlsplit(url)
        self._url = f"{scheme}://{host}{'' if edge_url else '/api/v1/blobs'}"
        self._url += f"/{quote(site_id, _SAFE)}/site:{quote(name, _SAFE)}"

    def __repr__(self) -> str:
        return f"NetlifyBlobStore({self._name!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_http"):
            self.close()

    def close(self) -> None:
        """Close the connections that are open. A later request opens a new one."""
        self._http.close()

    def get(self, key: str) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        answer = self._read(key)
        return None if answer is None else answer.body

    def set(self, key: str, value: str) -> None:
        """Write the value, whatever was there."""
        self._write(key, value, {})

    def delete(self, key: str) -> None:
        """Remove the key, if it is there."""
        _RETRY.ask(partial(self._request, "DELETE", key, (404,)))

    def get_with_etag(self, key: str) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        answer = self._read(key)
        if answer is None:
            return None
        etag = answer.headers.get("etag")
        if etag is None:
            # First the etag, then the value: then a write in between makes the condition fail.
            etag = self._listed_etag(key)
            answer = self._read(key)
            if etag is None or answer is None:
                return None
        return Blob(answer.body, whole(etag))

    def set_if_new(self, key: str, value: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        return self._write(key, value, {"if-none-match": "*"})

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        return self._write(key, value, {"if-match": etag}) if is_etag(etag) else None

    def delete_if_match(self, key: str, etag: str) -> bool:
        """Write `null` and return True; False, and nothing written, if `etag` is not current."""
        return self.set_if_match(key, TOMBSTONE, etag) is not None

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, those that were released too: `null` is left there."""

        def send(cursor: str | None) -> tuple[list[str], str | None]:
            blobs, cursor = self._listing(prefix, cursor)
            return [unquote(blob["key"]) for blob in blobs], cursor

        return _RETRY.pages(send)

    def server_time_ms(self, key: str) -> tuple[float, float] | None:
        """Return between which epoch milliseconds the service's clock is; for `check_store`.

        It asks for `key`, which need not be there. None if it does not say.
        """
        return dated(self._request("GET", key, (404,)).headers.get("date"))

    def _read(self, key: str) -> Answer | None:
        answer, _ = _RETRY.ask(partial(self._request, "GET", key, (404,)))
        if answer is None or answer.status == 404:
            return None
        if answer.status != 200 or answer.headers.get("content-encoding", "identity") != "identity":
            problem = f"no whole and plain value in the Netlify Blobs store {self._name!r}"
            raise NetlifyBlobsError(answer.status, problem)
        return answer

    def _write(self, key: str, value: str, condition: dict[str, str]) -> str | None:
        headers = {**condition, "cache-control": "max-age=0, stale-while-revalidate=60"}
        refusals = (412,) if condition else ()
        read = partial(self.get_with_etag, key)

        def send() -> str | None:
            answer = self._request("PUT", key, refusals, headers, value.encode())
            if answer.status == 412:
                return None
            etag = answer.headers.get("etag")
            if etag is not None:
                return whole(etag)
            blob = read()
            return blob.etag if blob is not None and blob.value == value.encode() else None

        return _RETRY.write(send, read, value)

    def _listed_etag(self, key: str) -> str | None:
        name = quote(key, _SAFE)  # as it is in the URL: the local server alone has no ETag

        def send() -> str | None:
            blobs, _ = self._listing(key, None)
            return next((blob["etag"] for blob in blobs if blob["key"] == name), None)

        return _RETRY.ask(send)[0]

    def _listing(self, prefix: str, cursor: str | None) -> tuple[list[dict[str, str]], str | None]:
        query = {"prefix": quote(prefix, _SAFE)} | ({} if cursor is None else {"cursor": cursor})
        answer = self._send("GET", f"{self._url}?{urlencode(query)}", (), self._bearer)
        try:
            listing = json.loads(answer.body)
            blobs = [{"key": blob["key"], "etag": blob["etag"]} for blob in listing["blobs"]]
            return blobs, listing.get("next_cursor")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NetlifyBlobsError(answer.status, "Netlify gave no usable listing") from None

    def _request(
        self,
        method: str,
        key: str,
        refusals: tuple[int, ...],
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        if len(key.encode()) > 600:
            raise ValueError(f"Netlify's keys have at most 600 bytes, unlike {key!r}")
        url = f"{self._url}/{quote(key, _SAFE)}"
        if self._has_edge or method == "DELETE":
            return self._send(method, url, refusals, self._bearer | (headers or {}), body)
        signed = self._send(method, url, (), self._bearer | _SIGNED_URL)
        return self._send(method, _signed_url(signed), refusals, headers or {}, body)

    def _send(
        self,
        method: str,
        url: str,
        refusals: tuple[int, ...],
        headers: dict[str, str],
        body: bytes | None = None,
    ) -> Answer:
        answer = self._http.request(method, url, headers, body)
        if not 200 <= answer.status < 300 and answer.status not in refusals:
            problem = f"{method} in the Netlify Blobs store {self._name!r}"
            raise NetlifyBlobsError(answer.status, problem)
        return answer


def connect(name: str) -> NetlifyBlobStore:
    """Return the store with this name, with what the environment says."""
    if os.environ.get("NETLIFY_BLOBS_CONTEXT"):
        return NetlifyBlobStore(name)
    site_id, token = os.environ.get("NETLIFY_SITE_ID"), os.environ.get("NETLIFY_AUTH_TOKEN")
    return NetlifyBlobStore(name, site_id=site_id, token=token)


def _context() -> dict[str, str]:
    try:
        context = dict(json.loads(base64.b64decode(os.environ.get("NETLIFY_BLOBS_CONTEXT", ""))))
    except (ValueError, TypeError, RecursionError):
        return {}
    return {name: value for name, value in context.items() if isinstance(value, str)}


def _signed_url(answer: Answer) -> str:
    try:
        url = json.loads(answer.body)["url"]
    except (ValueError, KeyError, TypeError):
        url = None
    # An unusable one is not shown: its signature is a credential.
    if isinstance(url, str) and _URL.fullmatch(url):
        return url
    raise NetlifyBlobsError(answer.status, "Netlify gave no usable signed URL")


def _unanswered(error: Exception) -> bool:
    if isinstance(error, NetlifyBlobsError):
        return error.status >= 500 or error.status in (408, 429)
    return isinstance(error, OSError | http.client.HTTPException | CutReplyError)


_RETRY = Retry(_unanswered)
