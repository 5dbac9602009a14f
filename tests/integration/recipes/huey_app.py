"""Huey: the task's id is the job's id. Huey does not deliver a dead worker's task again."""

import os

from huey import RedisHuey
from jobs import TemporaryError, rebuild_index
from redis import Redis

from joblock import JobLockHeldError, JobLockLostError, acquire_job_lock, resume_job_lock
from joblock.stores.redis import RedisBlobStore

URL = os.environ["REDIS_URL"]
store = RedisBlobStore(Redis.from_url(URL))
huey = RedisHuey("shop", url=URL)


def click(user: str, vault: str) -> tuple[int, dict]:
    lock = acquire_job_lock(store, user, vault, reason="re-index")
    if not lock:
        return 409, lock.existing.to_dict()
    huey.enqueue(index.s(user, vault, id=lock.job_id))
    return 202, lock.record.to_dict()


@huey.task(retries=3, retry_delay=1, context=True)
def index(user: str, vault: str, task=None) -> None:
    try:
        with resume_job_lock(store, user, vault, expected_job_id=task.id) as lock:
            try:
                rebuild_index(user, vault)
            except TemporaryError:
                lock.requeue()  # the retry has the same id
                raise
    except (JobLockHeldError, JobLockLostError):  # delivered twice, or too late: drop it
        pass
