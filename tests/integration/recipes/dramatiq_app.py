"""Dramatiq: the message carries the job's id."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.errors import Retry
from jobs import TemporaryError, rebuild_index
from redis import Redis

from joblock import (
    JobLockHeldError,
    JobLockLostError,
    acquire_job_lock,
    release_job_lock,
    resume_job_lock,
)
from joblock.stores.redis import RedisBlobStore

URL = os.environ["REDIS_URL"]
TTL_MS = int(os.environ.get("LOCK_TTL_MS", "60000"))
store = RedisBlobStore(Redis.from_url(URL))
# Without one for so long a worker is dead, and its jobs are delivered again.
dramatiq.set_broker(RedisBroker(url=URL))


def click(user: str, vault: str) -> tuple[int, dict]:
    lock = acquire_job_lock(store, user, vault, reason="re-index")
    if not lock:
        return 409, lock.existing.to_dict()
    try:
        index.send(user, vault, lock.job_id)
    except Exception:
        release_job_lock(store, user, vault, expected_job_id=lock.job_id, etag=lock.etag)
        raise
    return 202, lock.record.to_dict()


@dramatiq.actor(max_retries=20, min_backoff=1000)
def index(user: str, vault: str, job_id: str) -> None:
    try:
        with resume_job_lock(store, user, vault, expected_job_id=job_id, ttl_ms=TTL_MS) as lock:
            try:
                rebuild_index(user, vault)
            except TemporaryError:
                lock.requeue()  # the retry has the same id
                raise
    except JobLockHeldError as error:  # delivered twice: look again, in case that run dies
        raise Retry(delay=error.retry_after_s() * 1000) from error
    except JobLockLostError:  # it has ended, or another job has the lock: drop this delivery
        pass
