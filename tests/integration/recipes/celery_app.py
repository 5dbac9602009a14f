"""Celery: the task's id is the job's id, so each delivery of it finds its lock."""

import os

from celery import Celery
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
app = Celery("shop", broker=URL, backend=URL)
app.conf.task_acks_late = True  # a worker that dies loses no job
app.conf.task_reject_on_worker_lost = True


def click(user: str, vault: str) -> tuple[int, dict]:
    lock = acquire_job_lock(store, user, vault, reason="re-index")
    if not lock:
        return 409, lock.existing.to_dict()
    try:
        index.apply_async((user, vault), task_id=lock.job_id)
    except Exception:
        release_job_lock(store, user, vault, expected_job_id=lock.job_id, etag=lock.etag)
        raise
    return 202, lock.record.to_dict()


@app.task(bind=True, max_retries=5)
def index(self, user: str, vault: str) -> None:
    job_id = self.request.id
    try:
        with resume_job_lock(store, user, vault, expected_job_id=job_id, ttl_ms=TTL_MS) as lock:
            try:
                rebuild_index(user, vault)
            except TemporaryError as error:
                lock.requeue()  # the retry has the same id
                raise self.retry(exc=error, countdown=1) from error
    except JobLockHeldError as error:  # delivered twice: look again, in case that run dies
        raise self.retry(countdown=error.retry_after_s(), max_retries=None) from error
    except JobLockLostError:  # it has ended, or another job has the lock: drop this delivery
        pass
