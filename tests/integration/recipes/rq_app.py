"""RQ: the queue's job has the lock's job id."""

import os

from jobs import TemporaryError, rebuild_index
from redis import Redis
from rq import Queue, Retry, get_current_job

from joblock import (
    JobLockHeldError,
    JobLockLostError,
    acquire_job_lock,
    release_job_lock,
    resume_job_lock,
)
from joblock.stores.redis import RedisBlobStore

redis = Redis.from_url(os.environ["REDIS_URL"])
TTL_MS = int(os.environ.get("LOCK_TTL_MS", "60000"))
store = RedisBlobStore(redis)
queue = Queue(connection=redis)


def click(user: str, vault: str) -> tuple[int, dict]:
    lock = acquire_job_lock(store, user, vault, reason="re-index")
    if not lock:
        return 409, lock.existing.to_dict()
    try:
        # Each try after a dead worker must wait until its lease is over: so they are many.
        retry = Retry(max=10, interval=1)
        queue.enqueue(index, user, vault, job_id=lock.job_id, retry=retry)
    except Exception:
        release_job_lock(store, user, vault, expected_job_id=lock.job_id, etag=lock.etag)
        raise
    return 202, lock.record.to_dict()


def index(user: str, vault: str):
    job_id = get_current_job().id
    try:
        with resume_job_lock(store, user, vault, expected_job_id=job_id, ttl_ms=TTL_MS) as lock:
            try:
                rebuild_index(user, vault)
            except TemporaryError:
                lock.requeue()  # the retry has the same id
                raise
    except JobLockHeldError as error:  # delivered twice: look again, in case that run dies
        return Retry(max=10, interval=error.retry_after_s())
    except JobLockLostError:  # it has ended, or another job has the lock: drop this delivery
        return None
