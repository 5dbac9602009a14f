"""obstore: the same bucket as through an SDK, what is refused, and Google's own conditions."""

from __future__ import annotations

import asyncio
import importlib
from contextlib import ExitStack
from typing import Any

import pytest

from joblock import (
    Blob,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
    release_job_lock,
)
from joblock.conformance import check_store
from tests.backends import Backends
from tests.holding import assert_is_held_natively
from tests.support import KEY, UID, VAULT, acquired, held

obstore: Any = pytest.importorskip("obstore")
stores: Any = importlib.import_module("obstore.store")
module: Any = importlib.import_module("joblock.stores.object_store")

ODD = ("a%b", "é日🔒", "a b", "a+b", "a&b=c", "a~b|c", "(a)'\"*<>", "a%2Fb", "a#b?c", "a:b;c@d")


def test_every_check_in_memory() -> None:
    """And its keys are listed, those that were released too."""
    store = module.ObjectStoreBlobStore(stores.MemoryStore(), prefix="locks/")
    assert [finding for finding in check_store(store) if not finding] == []
    with hold_job_lock(store, UID, VAULT, renew_every_ms=10, ttl_ms=60_000) as lock:
        first = lock.record
        while lock.record == first:
            lock.check()
    assert list(store.list_keys("index-jobs/u")) == [KEY]
    assert list(store.list_keys("index-jobs/x")) == []
    assert repr(store) == "ObjectStoreBlobStore(MemoryStore, prefix='locks/')"


def test_the_async_one() -> None:
    """A second click is refused, keys are listed, and a hold keeps its lock."""

    async def main() -> None:
        store = module.AsyncObjectStoreBlobStore(stores.MemoryStore())
        assert repr(store) == "AsyncObjectStoreBlobStore(MemoryStore, prefix='')"
        assert [finding for finding in await aio.check_store(store) if not finding] == []
        await assert_is_held_natively(store)

    asyncio.run(main())


@pytest.mark.parametrize(("mine", "sdks"), [("obstore-s3", "s3"), ("obstore-azure", "azure")])
def test_a_bucket_that_is_shared_with_the_sdks_store(
    backends: Backends, mine: str, sdks: str
) -> None:
    """Each sees, refuses, and releases the other's locks, whatever the ids."""
    with ExitStack() as stack:
        prefix = backends.new_prefix()
        pair: list[Any] = [backends[name].open(stack, prefix) for name in (mine, sdks)]
        for here, there in (pair, pair[::-1]):
            for odd in ODD:
                lock = acquired(acquire_job_lock(here, odd, odd))
                assert held(acquire_job_lock(there, odd, odd)).existing == lock.record
                assert release_job_lock(
                    there, odd, odd, expected_job_id=lock.job_id, etag=lock.etag
                )
                assert peek_job_lock(here, odd, odd) is None


def test_two_that_write_the_same(backends: Backends) -> None:
    """A refusal is not taken for this call's own write because the text is the same."""
    with ExitStack() as stack:
        store = backends["obstore-s3"].open(stack, backends.new_prefix())
        assert store.set_if_new(KEY, "x") is not None
        assert store.set_if_new(KEY, "x") is None
        assert store.set_if_match(KEY, "x", '"0"') is None


def test_a_bucket_that_is_not_there(backends: Backends) -> None:
    """Is an error, and not "no lock"."""
    with ExitStack() as stack:
        backends["obstore-s3"].open(stack, "")
        missing = module.ObjectStoreBlobStore(
            stores.S3Store(
                "no-such-bucket",
                endpoint=backends["obstore-s3"].url,
                access_key_id="any",
                secret_access_key="any",
                region="us-east-1",
                client_options={"allow_http": True},
            )
        )
        with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
            peek_job_lock(missing, UID, VAULT)


def test_what_cannot_update_under_a_condition(tmp_path: Any) -> None:
    """A local folder is refused at once."""
    with pytest.raises(ValueError, match="LocalStore has no conditional update"):
        module.ObjectStoreBlobStore(stores.LocalStore(str(tmp_path)))


def test_googles_generation_is_the_etag() -> None:
    """A fake of obstore's answers: no server here speaks Google's XML protocol."""
    store: Any = module.ObjectStoreBlobStore(stores.GCSStore("jobs", skip_signature=True))
    asked: list[Any] = []

    async def put(_: Any, path: str, value: bytes, **options: Any) -> dict[str, str | None]:
        asked.append((path, value, options["mode"]))
        return {"version": "8", "e_tag": None}

    async def get(_: Any, path: str) -> Any:
        class Got:
            meta = {"version": "8", "e_tag": None, "size": size}  # noqa: RUF012
            attributes: dict[str, str] = {}  # noqa: RUF012

            async def bytes_async(self) -> bytes:
                return b"text"

        return Got()

    size = 4
    calls = module._NATIVE
    store._objects._calls = module._BLOCKING._replace(get=get, put=put, content=calls.content)
    assert store.set_if_match(KEY, "x", "7") == "8"
    assert asked == [(KEY, b"x", {"version": "7"})]
    assert store.get_with_etag(KEY) == Blob(b"text", "8")
    size = 5
    with pytest.raises(Exception, match="4 bytes of a value of 5"):
        store.get(KEY)
