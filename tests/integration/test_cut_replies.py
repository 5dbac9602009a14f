"""A reply that is cut after each of its bytes, as by a server that is killed just then.

Python's `http.client` takes the end of a connection for the end of the headers: what came after is
missing, and a body whose length was not told is empty. Whatever is missing, a lock that is there is
never taken for none, and what is answered is true; or it is an error.
"""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from joblock import (
    ConditionalBlobStore,
    JobLockLostError,
    acquire_job_lock,
    peek_job_lock,
    release_job_lock,
    renew_job_lock,
    resume_job_lock,
)
from tests.backends import DATABASES, OBJECT_STORES, SQL, Backends
from tests.lossy import Proxy, lossy
from tests.stream_proxy import StreamProxy, stream_proxy
from tests.support import KEY, UID, VAULT

FIRST, SECOND = "first-job", "second-job"


def take(store: ConditionalBlobStore, job_id: str = FIRST, ttl_ms: float = 1e6) -> None:
    assert acquire_job_lock(store, UID, VAULT, uuid_factory=lambda: job_id, ttl_ms=ttl_ms)


def expire(store: ConditionalBlobStore) -> None:
    assert acquire_job_lock(store, UID, VAULT, uuid_factory=lambda: FIRST, clock=lambda: 0)


def nothing(_: ConditionalBlobStore) -> None:
    pass


def acquire(store: ConditionalBlobStore) -> object:
    result = acquire_job_lock(store, UID, VAULT, uuid_factory=lambda: SECOND)
    if not result:
        return "held", result.existing.job_id
    return "acquired", result.took_over and result.took_over.job_id


def renew(store: ConditionalBlobStore) -> object:
    result = renew_job_lock(store, UID, VAULT, expected_job_id=FIRST, ttl_ms=2e6)
    return "renewed" if result.renewed is True else ("lost", result.reason)


def release(store: ConditionalBlobStore) -> object:
    return release_job_lock(store, UID, VAULT, expected_job_id=FIRST).reason or "released"


def resume(store: ConditionalBlobStore) -> object:
    try:
        with resume_job_lock(store, UID, VAULT, expected_job_id=FIRST) as lock:
            return "resumed", lock.took_over
    except JobLockLostError as error:
        return "lost", error.reason


def remove(store: ConditionalBlobStore) -> object:
    return release_job_lock(store, UID, VAULT).released


def peek(store: ConditionalBlobStore) -> object:
    record = peek_job_lock(store, UID, VAULT)
    return record and record.job_id


# What is there before, what is asked, the one true answer, and who owns the lock after it.
Case = tuple[Callable[..., None], Callable[..., object], object, object]
CASES: dict[str, Case] = {
    "acquire a free lock": (nothing, acquire, ("acquired", None), SECOND),
    "acquire a held lock": (take, acquire, ("held", FIRST), FIRST),
    "take over": (expire, acquire, ("acquired", FIRST), SECOND),
    "renew": (take, renew, "renewed", FIRST),
    "renew what is gone": (nothing, renew, ("lost", "lock_already_gone"), None),
    "release": (take, release, "released", None),
    "release what is gone": (nothing, release, "lock_already_gone", None),
    "resume and leave": (take, resume, ("resumed", None), None),
    "resume what is gone": (nothing, resume, ("lost", "lock_already_gone"), None),
    "remove": (take, remove, True, None),
    "peek at a lock": (take, peek, FIRST, FIRST),
    "peek at nothing": (nothing, peek, None, None),
}


NAMES = (
    "s3-once",
    "azure",
    "gcs",
    "netlify-api",
    "netlify-edge",
    "dynamodb",
    *OBJECT_STORES,
    *DATABASES,
)

# Where not each byte is cut, each Python cuts at others.
SECOND_CUT = sys.version_info.minor * 45

# What an SDK leaves open when its reply was cut, it leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For 127.0.0.1, signed by itself, with its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(file), "-out", str(file)]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return file


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store; it does not pause before a request is sent again: there are thousands."""
    chosen: str = request.param
    module_name = "sql" if chosen in SQL else chosen.partition("-")[0]
    module_name = "object_store" if chosen in OBJECT_STORES else module_name
    try:
        module = import_module(f"joblock.stores.{module_name}")
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(module._RETRY, "pauses_s", (0.0,) * len(module._RETRY.pauses_s))
    if chosen == "azure":  # the SDK, too, pauses for a second before it asks for a body again
        download = import_module("azure.storage.blob._download")
        monkeypatch.setattr(download, "time", SimpleNamespace(sleep=float))
    return chosen


Answer = tuple[object, object]  # what came out, and who owns the lock then


class Sweep:
    """One store through a proxy, which cuts, and the same place directly."""

    def __init__(
        self,
        proxy: Proxy | StreamProxy,
        store: ConditionalBlobStore,
        direct: ConditionalBlobStore,
    ) -> None:
        self.proxy, self.store, self.direct = proxy, store, direct

    def wrong(self, case: str, step: int, times: int = 1) -> tuple[list[str], int]:
        """Cut every so many bytes: what was answered wrongly, and how many cuts there were."""
        before, ask, answer, owner = CASES[case]
        true = (answer, owner)
        assert self.answer(before, ask) == true
        wrong: list[str] = []
        cuts = 0
        for number in range(1, len(self.proxy.requests) + 1):
            at, length = 0, 1
            while at < length:
                self.proxy.cut(at, self.from_request(number), times=times)
                came = self.answer(before, ask)
                length = self.proxy.last_cut
                cuts += 1
                if came != true and not isinstance(came[0], Exception):
                    wrong.append(f"{case}: byte {at} of {length}, request {number}: {came}")
                at = at + step if at else SECOND_CUT % step or step
        return wrong, cuts

    def from_request(self, number: int) -> Callable[[object], bool]:
        return lambda _: len(self.proxy.requests) >= number

    def answer(
        self, before: Callable[..., None], ask: Callable[[ConditionalBlobStore], object]
    ) -> Answer:
        self.direct.delete(KEY)
        before(self.direct)
        self.proxy.requests.clear()
        try:
            came = ask(self.store)
        except Exception as error:
            came = error
        self.proxy.forget()
        return came, peek(self.direct)


@contextmanager
def sweep(backends: Backends, name: str, tls: ssl.SSLContext | None = None) -> Generator[Sweep]:
    backend, prefix = backends[name], backends.new_prefix()
    if name in DATABASES:
        place = urlsplit(backend.url)
        with stream_proxy(str(place.hostname), place.port or 0) as proxy, ExitStack() as stack:
            through = place._replace(netloc=f"{place.netloc.rpartition(':')[0]}:{proxy.port}")
            store = backend.open(stack, prefix, through.geturl())
            yield Sweep(proxy, store, backend.open(stack, prefix))
        return
    with lossy(backend.url, rewrite=True, tls=tls) as proxy, ExitStack() as stack:
        store = backend.open(stack, prefix, proxy.url)
        yield Sweep(proxy, store, backend.open(stack, prefix))


def report(swept: Sweep, step: int, cases: list[str], times: int = 1) -> None:
    wrong: list[str] = []
    cuts = 0
    for case in cases:
        found, tried = swept.wrong(case, step, times)
        wrong += found
        cuts += tried
    print(f"{cuts} cuts, {len(wrong)} wrong answers")
    assert wrong == []
    assert cuts >= 2 * len(cases)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.deep), 134])
def test_a_cut_reply_is_answered_truly(name: str, step: int, backends: Backends) -> None:
    """Over plain HTTP; with `--deep` after each byte."""
    with sweep(backends, name) as swept:
        report(swept, step, list(CASES))


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.deep), 422])
def test_a_cut_reply_over_tls(
    name: str, step: int, backends: Backends, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TLS's notice that the connection ends: Python takes that for an end, too."""
    if name in DATABASES:
        pytest.skip("its replies tell their length, also without TLS")
    for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(variable, str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with sweep(backends, name, tls) as swept:
        report(swept, step, ["acquire a held lock", "renew", "peek at a lock"])


def test_every_reply_is_cut(name: str, backends: Backends) -> None:
    """Then it is an error, and the lock is as it was or as it was asked for."""
    with sweep(backends, name) as swept:
        for case in CASES:
            before, ask, answer, owner = CASES[case]
            for at in (0, 10, 60, 150):
                swept.proxy.cut(at, times=100)
                came, left = swept.answer(before, ask)
                assert isinstance(came, Exception) or (came, left) == (answer, owner)
