"""What the types promise: run by pytest, and checked by mypy --strict and by pyright.

A wrong call carries the code of the error that both must report; an ignore that has become
unnecessary is an error too.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Literal, assert_type

import pytest

import joblock
from joblock import (
    Acquired,
    AsyncBlobStore,
    AsyncConditionalBlobStore,
    Blob,
    BlobStore,
    ConditionalBlobStore,
    Held,
    JobLockDict,
    JobLockRecord,
    Lost,
    MemoryBlobStore,
    OwnedJobLock,
    ReleaseResult,
    Renewed,
    aio,
)
from joblock._store import is_conditional
from joblock.stores.sqlite import SqliteBlobStore
from tests.support import await_now

Reason = Literal["lock_owned_by_other_job", "lock_already_gone"]


class UsersPlainStore:
    """A user's store, with names of parameters of its own."""

    def __init__(self) -> None:
        self.data: dict[str, str] = {}

    def get(self, name: str) -> str | None:
        return self.data.get(name)

    def set(self, name: str, text: str) -> int:
        self.data[name] = text
        return len(text)

    def delete(self, name: str) -> bool:
        return self.data.pop(name, None) is not None


class UsersConditionalStore(UsersPlainStore):
    def get_with_etag(self, name: str) -> Blob | None:
        return Blob(self.data[name], self.data[name]) if name in self.data else None

    def set_if_new(self, name: str, text: str) -> str | None:
        return None if name in self.data else self.set_if_match(name, text, "")

    def set_if_match(self, name: str, text: str, etag: str) -> str | None:
        if self.data.get(name, "") != etag:
            return None
        self.data[name] = text
        return text

    def delete_if_match(self, name: str, etag: str) -> bool:
        return self.data.get(name) == etag and self.delete(name)


class UsersAsyncStore:
    def __init__(self) -> None:
        self.store = UsersConditionalStore()

    async def get(self, name: str) -> str | None:
        return self.store.get(name)

    async def set(self, name: str, text: str) -> None:
        self.store.set(name, text)

    async def delete(self, name: str) -> None:
        self.store.delete(name)


class UsersAsyncConditionalStore(UsersAsyncStore):
    async def get_with_etag(self, name: str) -> Blob | None:
        return self.store.get_with_etag(name)

    async def set_if_new(self, name: str, text: str) -> str | None:
        return self.store.set_if_new(name, text)

    async def set_if_match(self, name: str, text: str, etag: str) -> str | None:
        return self.store.set_if_match(name, text, etag)

    async def delete_if_match(self, name: str, etag: str) -> bool:
        return self.store.delete_if_match(name, etag)


def test_narrowing_on_the_discriminator() -> None:
    """Both checkers follow `is` on `.acquired` and `.renewed`, and the truth of the result.

    mypy also follows the bare `if result.acquired`; pyright has no rule for it.
    """
    store = MemoryBlobStore()
    result = joblock.acquire_job_lock(store, "u", "v")
    assert_type(result, Acquired | Held)
    if result.acquired is False:
        assert_type(result, Held)
        assert_type(result.existing, JobLockRecord)
        assert_type(result.retry_after_s(), int)
        raise AssertionError
    assert_type(result, Acquired)
    assert_type(result.job_id, str)
    assert_type(result.record, JobLockRecord)
    assert_type(result.etag, str | None)
    assert_type(result.took_over, JobLockRecord | None)

    renewed = joblock.renew_job_lock(store, "u", "v", expected_job_id=result.job_id)
    assert_type(renewed, Renewed | Lost)
    if renewed.renewed is True:
        assert_type(renewed, Renewed)
        assert_type(renewed.record.expires_at, float | None)
    else:
        assert_type(renewed, Lost)
        assert_type(renewed.reason, Reason)
        assert_type(renewed.current, JobLockRecord | None)

    again = joblock.acquire_job_lock(store, "u", "v")
    if again:
        assert_type(again, Acquired)
    else:
        assert_type(again, Held)


def test_match() -> None:
    """By position and by keyword."""
    store = MemoryBlobStore()
    assert outcome(joblock.acquire_job_lock(store, "u", "w")) == 202
    match joblock.acquire_job_lock(store, "u", "v"):
        case Acquired(job_id=job_id, took_over=None):
            assert_type(job_id, str)
        case Acquired(job_id=job_id, took_over=crashed):
            assert_type(crashed, JobLockRecord | None)
        case Held(existing):
            assert_type(existing, JobLockRecord)
            job_id = "theirs"

    match joblock.release_job_lock(store, "u", "v", expected_job_id=job_id):
        case ReleaseResult(released=True):
            pass
        case ReleaseResult(reason=reason):
            assert_type(reason, Reason | None)

    match joblock.renew_job_lock(store, "u", "v", expected_job_id=job_id):
        case Renewed(record, etag):
            assert_type(record, JobLockRecord)
            assert_type(etag, str | None)
        case Lost("lock_already_gone"):
            pass
        case Lost(_, current):
            assert_type(current, JobLockRecord | None)


def outcome(result: Acquired | Held) -> int:
    """Exhaustive: a checker that saw a third case would miss its return."""
    match result:
        case Acquired():
            return 202
        case Held():
            return 409


def test_users_stores() -> None:
    """With and without the conditional methods; the protocols are told apart."""
    plain: BlobStore = UsersPlainStore()
    conditional: ConditionalBlobStore = UsersConditionalStore()
    wrong: ConditionalBlobStore = UsersPlainStore()  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]
    assert not is_conditional(wrong)
    for store in (plain, conditional):
        assert_type(joblock.acquire_job_lock(store, "u", "v"), Acquired | Held)
        assert_type(joblock.peek_job_lock(store, "u", "v"), JobLockRecord | None)
        assert_type(joblock.release_job_lock(store, "u", "v"), ReleaseResult)
    if is_conditional(plain):
        assert_type(plain, ConditionalBlobStore)

    shipped: list[ConditionalBlobStore] = [MemoryBlobStore()]
    shipped_types: list[type[ConditionalBlobStore]] = [SqliteBlobStore]
    assert shipped
    assert shipped_types


def test_users_async_stores() -> None:
    """The same for `joblock.aio`."""
    plain: AsyncBlobStore = UsersAsyncStore()
    conditional: AsyncConditionalBlobStore = UsersAsyncConditionalStore()
    threaded: list[AsyncBlobStore] = [aio.ThreadedBlobStore(UsersPlainStore())]
    both: list[AsyncConditionalBlobStore] = [aio.ThreadedBlobStore(MemoryBlobStore())]
    assert threaded
    assert both

    async def life(store: AsyncBlobStore) -> None:
        result = await aio.acquire_job_lock(store, "u", "v")
        assert_type(result, Acquired | Held)
        assert result
        renewed = await aio.renew_job_lock(store, "u", "v", expected_job_id=result.job_id)
        assert_type(renewed, Renewed | Lost)
        assert_type(await aio.peek_job_lock(store, "u", "v"), JobLockRecord | None)
        assert_type(await aio.release_job_lock(store, "u", "v"), ReleaseResult)

    for store in (plain, conditional):
        await_now(life(store))


def test_holding() -> None:
    """The value is the same for both; leaving swallows nothing, so what follows is reached."""

    def blocking(store: BlobStore) -> bool:
        with joblock.hold_job_lock(store, "u", "v", renew_every_ms=1000) as lock:
            assert_type(lock, OwnedJobLock)
            assert_type(lock.job_id, str)
            assert_type(lock.record, JobLockRecord)
            assert_type(lock.took_over, JobLockRecord | None)
            assert_type(lock.check(), None)
            return lock.lost

    async def awaiting(store: AsyncBlobStore) -> bool:
        async with aio.hold_job_lock(store, "u", "v") as lock:
            assert_type(lock, OwnedJobLock)
            return lock.lost

    assert blocking(MemoryBlobStore()) is False
    assert asyncio.run(awaiting(UsersAsyncStore())) is False
    with pytest.raises(TypeError):
        joblock.hold_job_lock(UsersAsyncStore(), "u", "v").__enter__()  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        aio.hold_job_lock(MemoryBlobStore(), "u", "v")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with joblock.hold_job_lock(MemoryBlobStore(), "u", "v") as lock, pytest.raises(AttributeError):
        lock.job_id = "x"  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


def test_clocks_and_factories() -> None:
    """A clock gives an int or a float, a factory a UUID or a str."""
    store = MemoryBlobStore()
    joblock.acquire_job_lock(store, "u", "1", clock=lambda: 5, uuid_factory=uuid.uuid4)
    joblock.acquire_job_lock(store, "u", "2", clock=lambda: 5.5, uuid_factory=lambda: "job")
    with pytest.raises(TypeError):
        joblock.acquire_job_lock(store, "u", "3", clock=lambda: "5")  # type: ignore[arg-type, return-value] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        joblock.acquire_job_lock(store, "u", "3", uuid_factory=lambda: 5)  # type: ignore[arg-type, return-value] # pyright: ignore[reportArgumentType]


def test_wrong_calls() -> None:
    """What a checker must refuse, and what happens when nobody ran one."""
    store = MemoryBlobStore()
    with pytest.raises(TypeError):
        joblock.acquire_job_lock(UsersAsyncStore(), "u", "v")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        await_now(aio.acquire_job_lock(store, "u", "v"))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        joblock.acquire_job_lock(object(), "u", "v")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        joblock.acquire_job_lock(store, 5, "v")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        joblock.acquire_job_lock(store, "u", "v", "me")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        joblock.renew_job_lock(store, "u", "v")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    with pytest.raises(AttributeError):
        joblock.acquire_job_lock(store, "u", "v").job_id_  # type: ignore[union-attr] # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    with pytest.raises(AttributeError):
        joblock.acquire_job_lock(store, "u", "v").job_id  # type: ignore[union-attr] # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    ReleaseResult(released=False, reason="other")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def test_what_a_strict_user_need_not_ask() -> None:
    """The deadline of a lock that one has is a number, and a body has the fields of the wire."""
    lock = joblock.acquire_job_lock(MemoryBlobStore(), "u", "v")
    assert lock.acquired is True
    assert_type(lock.expires_at, float)
    assert_type(lock.job_id, str)
    body = lock.record.to_dict()
    assert_type(body, JobLockDict)
    assert_type(body["expiresAt"], float | None)
    assert body["expiresAt"] == lock.expires_at
    assert Renewed(lock.record, None).expires_at == lock.expires_at
