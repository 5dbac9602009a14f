"""The part of Google Cloud Storage's JSON API that a store needs, preconditions and all.

No emulator that is to be had honours `ifGenerationMatch`. This one has buckets, objects without old
versions, and nothing else: a request or a parameter that it does not know is refused, never
ignored. Each request is handled under one lock.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.serving import serving

JSON = "application/json; charset=UTF-8"
UPLOAD_FIELDS = {"name", "contentType", "cacheControl", "crc32c", "md5Hash"}


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])


class ApiError(Exception):
    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(status, reason, message)
        errors = [{"message": message, "domain": "global", "reason": reason}]
        error = {"code": status, "message": message, "errors": errors}
        self.message = message
        self.reply = Reply(status, json.dumps({"error": error}).encode(), {"Content-Type": JSON})

    def plain(self) -> Reply:
        """As Google answers a request for an object's data, unlike all others."""
        return Reply(self.reply.status, self.message.encode(), {"Content-Type": "text/html"})


@dataclass
class Object:
    data: bytes
    resource: dict[str, Any]


@dataclass
class Call:
    method: str
    path: list[str]
    parameters: dict[str, str]
    content_type: str
    body: bytes


class Storage:
    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Object]] = {}
        self.generations = itertools.count(1_700_000_000_000_000)
        self.lock = threading.Lock()

    def answer(self, call: Call) -> Reply:
        with self.lock:
            try:
                return self._answer(call)
            except ApiError as error:
                return error.plain() if call.path[0] == "download" else error.reply

    def _answer(self, call: Call) -> Reply:
        match call.method, call.path:
            case "POST", ["storage", "v1", "b"]:
                return self._make_bucket(call)
            case "GET", ["storage", "v1", "b", bucket]:
                _check_parameters(call, "fields", "projection")
                self._bucket(bucket)
                return _json({"kind": "storage#bucket", "id": bucket, "name": bucket})
            case "GET", ["storage", "v1", "b", bucket, "o"]:
                return self._list(bucket, call)
            case "POST", ["upload", "storage", "v1", "b", bucket, "o"]:
                return self._upload(bucket, call)
            case "GET", ["download", "storage", "v1", "b", bucket, "o", key]:
                return self._download(bucket, key, call)
            case "GET", ["storage", "v1", "b", bucket, "o", key]:
                return self._metadata(bucket, key, call)
            case "DELETE", ["storage", "v1", "b", bucket, "o", key]:
                return self._delete(bucket, key, call)
            case _:
                what = f"{call.method} /{'/'.join(call.path)}"
                raise ApiError(501, "notImplemented", f"{what} is not implemented here")

    def _make_bucket(self, call: Call) -> Reply:
        _check_parameters(call, "project")
        name = json.loads(call.body)["name"]
        if name in self.buckets:
            raise ApiError(409, "conflict", "Your previous request to create it succeeded.")
        self.buckets[name] = {}
        return _json({"kind": "storage#bucket", "id": name, "name": name})

    def _list(self, bucket: str, call: Call) -> Reply:
        """A page of less than was asked for, as Google's may be."""
        _check_parameters(call, "prefix", "pageToken", "maxResults", projection="noAcl")
        after, prefix = call.parameters.get("pageToken", ""), call.parameters.get("prefix", "")
        keys = [key for key in sorted(self._bucket(bucket)) if key.startswith(prefix)]
        left = [key for key in keys if key > after]
        items = [self._bucket(bucket)[key].resource for key in left[:7]]
        more = {"nextPageToken": left[6]} if len(left) > 7 else {}
        return _json({"kind": "storage#objects", "items": items} | more)

    def _upload(self, bucket: str, call: Call) -> Reply:
        _check_parameters(call, "ifGenerationMatch", uploadType="multipart")
        asked, content_type, data = _parts(call)
        if not asked.keys() <= UPLOAD_FIELDS:
            raise ApiError(501, "notImplemented", f"of {set(asked)} only {UPLOAD_FIELDS} are known")
        objects, key = self._bucket(bucket), asked["name"]
        self._check_generation(objects.get(key), call)
        sums = {"md5Hash": _md5(data), "crc32c": _crc32c(data)}
        for name, value in sums.items():
            if asked.get(name, value) != value:
                raise ApiError(400, "invalid", f"Provided {name} {asked[name]} is not {value}.")
        generation = str(next(self.generations))
        resource = {"contentType": content_type} | asked | sums
        resource |= {"kind": "storage#object", "bucket": bucket, "size": str(len(data))}
        resource |= {"generation": generation, "metageneration": "1", "etag": f"C{generation}"}
        objects[key] = Object(data, resource)
        return _json(resource)

    def _download(self, bucket: str, key: str, call: Call) -> Reply:
        _check_parameters(call, "ifGenerationMatch", "generation", alt="media")
        found = self._object(bucket, key, call)
        resource = found.resource
        headers = {
            "Content-Type": resource["contentType"],
            "ETag": resource["etag"],
            "X-Goog-Generation": resource["generation"],
            "X-Goog-Metageneration": resource["metageneration"],
            "X-Goog-Hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
        }
        if "cacheControl" in resource:
            headers["Cache-Control"] = resource["cacheControl"]
        return Reply(200, found.data, headers)

    def _metadata(self, bucket: str, key: str, call: Call) -> Reply:
        _check_parameters(call, "ifGenerationMatch", "generation", projection="noAcl")
        return _json(self._object(bucket, key, call).resource)

    def _delete(self, bucket: str, key: str, call: Call) -> Reply:
        _check_parameters(call, "ifGenerationMatch", "generation")
        self._object(bucket, key, call)
        del self.buckets[bucket][key]
        return Reply(204)

    def _bucket(self, name: str) -> dict[str, Object]:
        if name not in self.buckets:
            raise ApiError(404, "notFound", "The specified bucket does not exist.")
        return self.buckets[name]

    def _object(self, bucket: str, key: str, call: Call) -> Object:
        found = self._bucket(bucket).get(key)
        if found is None or found.resource["generation"] != call.parameters.get(
            "generation", found.resource["generation"]
        ):
            raise ApiError(404, "notFound", f"No such object: {bucket}/{key}")
        self._check_generation(found, call)
        return found

    def _check_generation(self, found: Object | None, call: Call) -> None:
        """Generation 0 is that of an object which is not there."""
        wanted = call.parameters.get("ifGenerationMatch")
        if wanted is not None and wanted != (found.resource["generation"] if found else "0"):
            raise ApiError(
                412,
                "conditionNotMet",
                "At least one of the pre-conditions you specified did not hold.",
            )


def _check_parameters(call: Call, *optional: str, **required: str) -> None:
    for name, value in required.items():
        if call.parameters.get(name) != value:
            raise ApiError(501, "notImplemented", f"only {name}={value} is implemented here")
    unknown = call.parameters.keys() - required.keys() - {*optional, "prettyPrint"}
    if unknown:
        raise ApiError(501, "notImplemented", f"{unknown} is not implemented here")
    for name in ("generation", "ifGenerationMatch"):
        if not call.parameters.get(name, "0").isdecimal():
            raise ApiError(400, "invalid", f"Invalid value for {name}.")


def _parts(call: Call) -> tuple[dict[str, Any], str, bytes]:
    """The fields, the content type and the data in a `multipart/related` body."""
    boundary = str(_header(call.content_type).get_param("boundary")).encode()
    try:
        _, first, second, end = (b"\r\n" + call.body).split(b"\r\n--" + boundary)
        fields = json.loads(first.partition(b"\r\n\r\n")[2])
        head, empty_line, data = second.partition(b"\r\n\r\n")
        name, _, content_type = head.decode().strip().partition(": ")
    except ValueError as error:
        raise ApiError(400, "badRequest", f"Malformed multipart body: {error}") from error
    if end.strip() != b"--" or not empty_line or name.lower() != "content-type":
        raise ApiError(400, "badRequest", "Malformed multipart body.")
    return fields, content_type, data


def _header(content_type: str) -> Message:
    header = Message()
    header["Content-Type"] = content_type
    return header


def _json(resource: dict[str, Any]) -> Reply:
    return Reply(200, json.dumps(resource).encode(), {"Content-Type": JSON})


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _crc32c(data: bytes) -> str:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return base64.b64encode((crc ^ 0xFFFFFFFF).to_bytes(4)).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # the head and the body in one packet
    storage: Storage

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def do_DELETE(self) -> None:
        self._do()

    def _do(self) -> None:
        url = urlsplit(self.path)
        call = Call(
            self.command,
            [unquote(part) for part in url.path.removeprefix("/").split("/")],
            dict(parse_qsl(url.query, keep_blank_values=True)),
            self.headers.get("Content-Type", ""),
            self.rfile.read(int(self.headers.get("Content-Length", "0"))),
        )
        reply = self.storage.answer(call)
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def gcs_server() -> Generator[str]:
    """Google Cloud Storage. Give its URL as `client_options={"api_endpoint": url}`; make a bucket.

    A client needs `google.auth.credentials.AnonymousCredentials()` and any project. It asks for its
    bucket in the background, unless DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA is "true".
    """

    class OwnHandler(Handler):
        storage = Storage()

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    with Server(("127.0.0.1", 0), OwnHandler) as server, serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"
