"""What MemoryBlobStore offers to tests beyond the contract."""

from __future__ import annotations

from joblock import MemoryBlobStore, acquire_job_lock


def test_length_iteration_and_repr() -> None:
    """A failing assertion shows what is in the store."""
    store = MemoryBlobStore()
    assert (len(store), list(store), repr(store)) == (0, [], "MemoryBlobStore({})")
    acquire_job_lock(store, "u", "v", clock=lambda: 5, uuid_factory=lambda: "j", ttl_ms=5)
    assert (len(store), list(store)) == (1, ["index-jobs/u/v.json"])
    assert repr(store).startswith('MemoryBlobStore({\'index-jobs/u/v.json\': \'{"jobId":"j",')


def test_an_empty_store_is_true() -> None:
    """`store or DEFAULT` in a service must not drop its test's empty store."""
    assert MemoryBlobStore()


def test_iteration_is_over_a_snapshot() -> None:
    """So that a test can clear the store while it goes over it."""
    store = MemoryBlobStore()
    for key in "abc":
        store.set(key, key)
    for key in store:
        store.delete(key)
    assert len(store) == 0
