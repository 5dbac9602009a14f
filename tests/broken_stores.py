"""Stores that break one rule each, and good ones of other kinds: what check_store is tried with."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from joblock import Blob, MemoryBlobStore
from joblock.conformance import _CONTENDERS


def in_a_race() -> bool:
    """Whether this is one of several calls that check_store makes at once."""
    return threading.current_thread().name == "joblock race"


class Tombstones(MemoryBlobStore):
    """Releases as S3 with conditional_delete=False and Netlify do."""

    def delete_if_match(self, key: str, etag: str) -> bool:
        return self.set_if_match(key, "null", etag) is not None


class ContentHashes(MemoryBlobStore):
    """Etags as S3's: the same content has the same etag."""

    def _write(self, key: str, value: str) -> str:
        etag = hashlib.sha256(value.encode()).hexdigest()
        self._blobs[key] = (value, etag)
        return etag


class Bytes(MemoryBlobStore):
    """Reads bytes, as most SDKs do."""

    def get(self, key: str) -> Any:
        value = super().get(key)
        return None if value is None else value.encode()

    def get_with_etag(self, key: str) -> Blob | None:
        blob = super().get_with_etag(key)
        return None if blob is None else Blob(str(blob.value).encode(), blob.etag)


class Tells(MemoryBlobStore):
    """Its refusal of a new key says what is there."""

    def set_if_new_or_get(self, key: str, value: str) -> Any:
        return self.set_if_new(key, value) or self.get_with_etag(key)


class TellsAnotherEtag(Tells):
    def set_if_new_or_get(self, key: str, value: str) -> Any:
        told = super().set_if_new_or_get(key, value)
        return Blob(told.value, "another") if isinstance(told, Blob) else told


class TellsWhatItWasGiven(Tells):
    def set_if_new_or_get(self, key: str, value: str) -> Any:
        told = super().set_if_new_or_get(key, value)
        return Blob(value, told.etag) if isinstance(told, Blob) else told


class TellsAndOverwrites(Tells):
    def set_if_new_or_get(self, key: str, value: str) -> Any:
        told = super().set_if_new_or_get(key, value)
        if isinstance(told, Blob):
            self.set(key, value)
        return told


class AlwaysCreates(MemoryBlobStore):
    def set_if_new(self, key: str, value: str) -> str | None:
        with self._lock:
            return self._write(key, value)


class NeverCreates(MemoryBlobStore):
    def set_if_new(self, key: str, value: str) -> str | None:
        return None


class CreatesThoughItRefuses(MemoryBlobStore):
    def set_if_new(self, key: str, value: str) -> str | None:
        etag = super().set_if_new(key, value)
        if etag is None:
            self.set(key, value)
        return etag


class OnlySaysThatItCreated(MemoryBlobStore):
    def set_if_new(self, key: str, value: str) -> str | None:
        return super().set_if_new(key, value) or self._blobs[key][1]


class RefusesWithAnEmptyEtag(MemoryBlobStore):
    def set_if_new(self, key: str, value: str) -> str | None:
        return super().set_if_new(key, value) or ""


class CreatesWithTrue(MemoryBlobStore):
    def set_if_new(self, key: str, value: str) -> Any:
        return super().set_if_new(key, value) is not None


class IgnoresIfMatch(MemoryBlobStore):
    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        with self._lock:
            return self._write(key, value)


class NeverMatches(MemoryBlobStore):
    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return None


class WritesThoughItRefuses(MemoryBlobStore):
    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        written = super().set_if_match(key, value, etag)
        if written is None:
            self.set(key, value)
        return written


class OnlySaysThatItMatched(MemoryBlobStore):
    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return super().set_if_match(key, value, etag) or etag


class MatchesWhatIsMissing(MemoryBlobStore):
    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return super().set_if_match(key, value, etag) or self.set_if_new(key, value)


class IgnoresIfMatchOnDelete(MemoryBlobStore):
    """MinIO."""

    def delete_if_match(self, key: str, etag: str) -> bool:
        self.delete(key)
        return True


class NeverDeletes(MemoryBlobStore):
    def delete_if_match(self, key: str, etag: str) -> bool:
        return False


class OnlySaysThatItDeleted(MemoryBlobStore):
    def delete_if_match(self, key: str, etag: str) -> bool:
        return self._is_current(key, etag)


class DeletesThoughItRefuses(MemoryBlobStore):
    def delete_if_match(self, key: str, etag: str) -> bool:
        if super().delete_if_match(key, etag):
            return True
        self.delete(key)
        return False


class DeletesForEver(MemoryBlobStore):
    """The released key stays taken."""

    def delete_if_match(self, key: str, etag: str) -> bool:
        with self._lock:
            deleted = self._is_current(key, etag)
            if deleted:
                self._blobs[key] = ("null", "gone")
            return deleted

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return None if etag == "gone" else super().set_if_match(key, value, etag)


class DeletesWithNone(MemoryBlobStore):
    def delete_if_match(self, key: str, etag: str) -> Any:
        super().delete_if_match(key, etag)


class OneEtagForAll(MemoryBlobStore):
    def _write(self, key: str, value: str) -> str:
        self._blobs[key] = (value, "etag")
        return "etag"


class EtagIsTheLength(MemoryBlobStore):
    def _write(self, key: str, value: str) -> str:
        etag = str(len(value))
        self._blobs[key] = (value, etag)
        return etag


class NumbersVersionsOfAKey(MemoryBlobStore):
    """As a version column does: a key that is created again starts at 1 again."""

    def _write(self, key: str, value: str) -> str:
        etag = str(int(self._blobs[key][1]) + 1 if key in self._blobs else 1)
        self._blobs[key] = (value, etag)
        return etag


class DeletesByTheVersionOfAKey(MemoryBlobStore):
    """Only the condition of a delete looks at the version column, which starts at 1 again."""

    def _write(self, key: str, value: str) -> str:
        version = int(self._blobs[key][1].split(".")[0]) + 1 if key in self._blobs else 1
        etag = f"{version}.{next(self._etags)}"
        self._blobs[key] = (value, etag)
        return etag

    def delete_if_match(self, key: str, etag: str) -> bool:
        current = self._blobs.get(key, ("", "gone"))[1]
        same = current.split(".")[0] == etag.split(".")[0]
        return super().delete_if_match(key, current if same else etag)


class ReadsAnotherEtag(MemoryBlobStore):
    """As a proxy that compresses the body and marks the etag as weak."""

    def get_with_etag(self, key: str) -> Blob | None:
        blob = super().get_with_etag(key)
        return None if blob is None else Blob(blob.value, f"W/{blob.etag}")


class GivesBackTheOldEtag(MemoryBlobStore):
    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        return None if super().set_if_match(key, value, etag) is None else etag


class EtagIsANumber(MemoryBlobStore):
    def get_with_etag(self, key: str) -> Any:
        blob = super().get_with_etag(key)
        return None if blob is None else Blob(blob.value, int(blob.etag))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


class NoEtagWhenRead(MemoryBlobStore):
    def get_with_etag(self, key: str) -> Any:
        blob = super().get_with_etag(key)
        return None if blob is None else Blob(blob.value, None)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


class NoBlobWhenRead(MemoryBlobStore):
    def get_with_etag(self, key: str) -> Any:
        blob = super().get_with_etag(key)
        return None if blob is None else (blob.value, blob.etag)


class NothingWithEtag(MemoryBlobStore):
    def get_with_etag(self, key: str) -> Blob | None:
        return None


class ParsesWhatItReads(MemoryBlobStore):
    def get(self, key: str) -> Any:
        return None if super().get(key) is None else {"jobId": "x"}


class ForgetsAccents(MemoryBlobStore):
    def _write(self, key: str, value: str) -> str:
        return super()._write(key, value.encode("ascii", "replace").decode())


class CutsLongText(MemoryBlobStore):
    """As a database that is not strict."""

    def _write(self, key: str, value: str) -> str:
        return super()._write(key, value[:4000])


class NotUtf8(Bytes):
    def get(self, key: str) -> Any:
        value = super().get(key)
        return None if value is None else value.decode().encode("utf-16")


class NeverReallyDeletes(MemoryBlobStore):
    def delete(self, key: str) -> None:
        pass


class DeleteNeedsAKey(MemoryBlobStore):
    def delete(self, key: str) -> None:
        with self._lock:
            del self._blobs[key]


class RemembersThatThereWasNoKey(MemoryBlobStore):
    def __init__(self) -> None:
        super().__init__()
        self.missed: set[str] = set()

    def get(self, key: str) -> str | None:
        value = None if key in self.missed else super().get(key)
        if value is None:
            self.missed.add(key)
        return value


class CachesWhatItRead(MemoryBlobStore):
    def __init__(self) -> None:
        super().__init__()
        self.cached: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        value = super().get(key)
        return None if value is None else self.cached.setdefault(key, value)


class ReadsLate(MemoryBlobStore):
    """An eventually consistent read: the first one after a write shows what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, str | None] = {}

    def _write(self, key: str, value: str) -> str:
        self.before[key] = self._blobs.get(key, (None, None))[0]
        return super()._write(key, value)

    def get(self, key: str) -> str | None:
        return self.before.pop(key) if key in self.before else super().get(key)


class Racy(MemoryBlobStore):
    """Reads, then writes: in a race, each call waits in between until two have read.

    A single writer, among readers, does not wait for a second one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrived: Counter[str] = Counter()
        self.arrival = threading.Condition()

    def arrive(self, event: str) -> None:
        with self.arrival:
            self.arrived[event] += 1
            self.arrival.notify_all()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        if in_a_race():
            with self.arrival:
                assert self.arrival.wait_for(ready, timeout=30)

    def get_with_etag(self, key: str) -> Blob | None:
        blob = super().get_with_etag(key)
        self.arrive(f"{key} read")
        return blob


class RacyCreate(Racy):
    def set_if_new(self, key: str, value: str) -> str | None:
        free = key not in self._blobs
        self.arrive(key)
        self.wait_for(lambda: self.arrived[key] > 1)
        with self._lock:
            return self._write(key, value) if free else None


class RacyUpdate(Racy):
    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        current = self._is_current(key, etag)
        self.arrive(key)
        self.wait_for(lambda: self.arrived[key] > 1 or self.arrived[f"{key} read"] > 0)
        with self._lock:
            return self._write(key, value) if current else None


class RacyDelete(Racy):
    """Only the delete reads first; the updates are atomic, and come while it has not deleted."""

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        self.arrive(f"{key} update")
        self.wait_for(
            lambda: (
                self.arrived[f"{key} delete"] > 0
                or self.arrived[f"{key} update"] == _CONTENDERS
                or self.arrived[f"{key} read"] > 0
            )
        )
        written = super().set_if_match(key, value, etag)
        self.arrive(f"{key} updated")
        return written

    def delete_if_match(self, key: str, etag: str) -> bool:
        current = self._is_current(key, etag)
        self.arrive(f"{key} delete")
        self.wait_for(lambda: self.arrived[f"{key} updated"] > 0)
        if current:
            self.delete(key)
        return current


class ReadsInTwoSteps(Racy):
    """And something is written in between: no update comes before a reader's first step."""

    def set_if_match(self, key: str, value: str, etag: str) -> str | None:
        self.arrive(f"{key} update")
        self.wait_for(lambda: self.arrived[f"{key} update"] > 1 or self.arrived[f"{key} read"] > 0)
        written = super().set_if_match(key, value, etag)
        self.arrive(f"{key} updated")
        return written

    def get_with_etag(self, key: str) -> Blob | None:
        first = super().get_with_etag(key)
        self.wait_for(lambda: self.arrived[f"{key} updated"] > 0)
        second = super().get_with_etag(key)
        return None if first is None or second is None else self.mixed(first, second)

    def mixed(self, first: Blob, second: Blob) -> Blob:
        raise NotImplementedError


class ReadsValueThenEtag(ReadsInTwoSteps):
    def mixed(self, first: Blob, second: Blob) -> Blob:
        return Blob(first.value, second.etag)


class ReadsEtagThenValue(ReadsInTwoSteps):
    def mixed(self, first: Blob, second: Blob) -> Blob:
        return Blob(second.value, first.etag)
