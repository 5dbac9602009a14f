"""What a store is: two levels, told apart by the methods it has.

A store with `get`, `set` and `delete` is a *plain* store: it serves one process at a time well, but
cannot keep two simultaneous acquires from both winning. A store that also has the four
conditional methods is a *conditional* store: at most one live owner, whatever the interleaving.

Every condition must be checked by the store itself, atomically with the write. A method that
cannot say whether its write took effect must raise.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any, Protocol, TypeGuard, TypeVar, overload

from ._value import Value, assign

T = TypeVar("T")


class Blob(Value):
    """A value and the etag of exactly this version of it."""

    __slots__ = __match_args__ = ("value", "etag")

    value: str | bytes
    etag: str

    def __init__(self, value: str | bytes, etag: str) -> None:
        assign(self, "value", value)
        assign(self, "etag", etag)


class BlobStore(Protocol):
    """A plain blocking store."""

    def get(self, key: str, /) -> str | bytes | None:
        """Return the value, or None if there is no such key."""
        ...

    def set(self, key: str, value: str, /) -> object:
        """Write the value, whatever was there."""
        ...

    def delete(self, key: str, /) -> object:
        """Remove the key; one that is not there is no error."""
        ...


class ConditionalBlobStore(BlobStore, Protocol):
    """A blocking store with conditional writes.

    An etag never comes back for another value, not even when its key is deleted and created again:
    else a late renewal or release would take the next job's lock.

    It may also have `set_if_new_or_get(key, value)`, which is as `set_if_new`, but returns the
    `Blob` that is there where it writes nothing, or None if it cannot tell: then a refused acquire
    is one request instead of two. A class that overrides `set_if_new` alone does without it.
    """

    def get_with_etag(self, key: str, /) -> Blob | None:
        """Return the value and its etag, or None if there is no such key."""
        ...

    def set_if_new(self, key: str, value: str, /) -> str | None:
        """Write and return the new etag; None, and nothing written, if the key exists."""
        ...

    def set_if_match(self, key: str, value: str, etag: str, /) -> str | None:
        """Write and return the new etag; None, and nothing written, if `etag` is not current."""
        ...

    def delete_if_match(self, key: str, etag: str, /) -> bool:
        """Remove the key and return True; False, and nothing removed, if `etag` is not current."""
        ...


class AsyncBlobStore(Protocol):
    """A plain store whose methods are coroutine functions (`async def`)."""

    def get(self, key: str, /) -> Coroutine[Any, Any, str | bytes | None]:
        """As `BlobStore.get`."""
        ...

    def set(self, key: str, value: str, /) -> Coroutine[Any, Any, object]:
        """As `BlobStore.set`."""
        ...

    def delete(self, key: str, /) -> Coroutine[Any, Any, object]:
        """As `BlobStore.delete`."""
        ...


class AsyncConditionalBlobStore(AsyncBlobStore, Protocol):
    """A conditional store whose methods are coroutine functions (`async def`)."""

    def get_with_etag(self, key: str, /) -> Coroutine[Any, Any, Blob | None]:
        """As `ConditionalBlobStore.get_with_etag`."""
        ...

    def set_if_new(self, key: str, value: str, /) -> Coroutine[Any, Any, str | None]:
        """As `ConditionalBlobStore.set_if_new`."""
        ...

    def set_if_match(self, key: str, value: str, etag: str, /) -> Coroutine[Any, Any, str | None]:
        """As `ConditionalBlobStore.set_if_match`."""
        ...

    def delete_if_match(self, key: str, etag: str, /) -> Coroutine[Any, Any, bool]:
        """As `ConditionalBlobStore.delete_if_match`."""
        ...


class WrongStoreError(TypeError):
    """The store lacks methods, answers with a wrong type, or is async where it must not be."""


TOMBSTONE = "null"
"""What a store writes over a record that it cannot delete under a condition: read as no lock."""

CONDITIONAL = ("get_with_etag", "set_if_new", "set_if_match", "delete_if_match")
TELLING = "set_if_new_or_get"


@overload
def is_conditional(store: BlobStore) -> TypeGuard[ConditionalBlobStore]: ...
@overload
def is_conditional(store: AsyncBlobStore) -> TypeGuard[AsyncConditionalBlobStore]: ...
def is_conditional(store: object) -> bool:
    """Whether the store, which `require` has found in order, has the conditional methods."""
    return callable(getattr(store, "set_if_new", None))


def tells(store: object) -> bool:
    """Whether it has `set_if_new_or_get`, and no class overrides `set_if_new` beyond that."""
    store_type: type = type(store)
    return TELLING in getattr(store, "__dict__", ()) or _inherits_telling(store_type)


@lru_cache(maxsize=64)
def _inherits_telling(store_type: type) -> bool:
    for base in store_type.__mro__:
        if TELLING in vars(base):
            return True
        if "set_if_new" in vars(base):
            return False
    return False


def creating(store: Any) -> Callable[[str, str], Any]:
    """Return what writes to a free key, and else says what is there, if the store can."""
    create: Callable[[str, str], Any]
    create = store.set_if_new_or_get if tells(store) else store.set_if_new
    return create


@lru_cache(maxsize=64)  # a class is asked once: this is a tenth of an acquire in memory
def _lacks(store_type: type, methods: tuple[str, ...]) -> bool:
    return not all(callable(getattr(store_type, name, None)) for name in methods)


def require(store: object, methods: tuple[str, ...]) -> None:
    """Raise TypeError unless the store has these methods, and all the conditional ones or none.

    Some of them but not all is a mistake, which must not silently cost the guarantee.
    """
    store_type: Any = type(store)
    if not _lacks(store_type, methods + CONDITIONAL):
        return
    missing = [name for name in methods + CONDITIONAL if not callable(getattr(store, name, None))]
    if not missing or missing == [*CONDITIONAL]:
        return
    lacking = [name for name in missing if name in methods]
    if lacking:
        raise WrongStoreError(
            f"a store with {' and '.join(methods)} is required: "
            f"{type(store).__name__} lacks {', '.join(lacking)}"
        )
    raise WrongStoreError(
        f"{type(store).__name__} has some conditional methods but lacks {', '.join(missing)}"
    )


def lister(store: object) -> Callable[[str], Any]:
    """Return the store's `list_keys`; raise TypeError if it has none."""
    list_keys: Callable[[str], Any] | None = getattr(store, "list_keys", None)
    if not callable(list_keys):
        raise WrongStoreError(f"{type(store).__name__} has no list_keys, so nothing can be listed")
    return list_keys


def leaves_null(store: object) -> bool:
    """Whether it writes `TOMBSTONE` where it should delete, as its service can do no better."""
    return bool(getattr(store, "leaves_null", False))


def not_sweepable(store: object) -> WrongStoreError:
    """Return why a sweep of this store could remove a live lock, or nothing at all."""
    name = type(store).__name__
    if leaves_null(store):
        return WrongStoreError(
            f"{name} has no conditional delete: it writes null instead, which a sweep cannot remove"
        )
    return WrongStoreError(
        f"{name} cannot delete under a condition: a sweep could remove a lock that was just taken"
    )


MARK_ASYNC = (
    "joblock.aio takes methods that are `async def`, or that are marked with "
    "inspect.markcoroutinefunction (Python 3.12 and later)"
)
"""How a store says that it is async: to find out by calling it would be after its write."""


def blocking(answer: T, instead: str = f"use the functions of joblock.aio; {MARK_ASYNC}") -> T:
    """Return the answer of a blocking store; raise TypeError if it is one to be awaited."""
    if hasattr(answer, "__await__"):
        if isinstance(answer, Coroutine):
            answer.close()  # or Python warns that nobody awaited it
        raise WrongStoreError(f"the store is async: {instead}")
    return answer


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing but a blocking store to its end."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("the coroutine waits for something")
