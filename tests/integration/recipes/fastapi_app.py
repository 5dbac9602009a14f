"""FastAPI, on an async store: a double click gets 409 and the record of the job that runs."""

import asyncio
import os

from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import JSONResponse
from jobs import rebuild_index
from pydantic import BaseModel
from redis.asyncio import Redis

from joblock.aio import acquire_job_lock, resume_job_lock
from joblock.stores.redis import AsyncRedisBlobStore

app = FastAPI()
store = AsyncRedisBlobStore(Redis.from_url(os.environ["REDIS_URL"]))


class Running(BaseModel):
    """The job that has the lock; the record has more."""

    jobId: str
    startedAt: float
    expiresAt: float


@app.post("/{user}/{vault}/index", status_code=202, responses={409: {"model": Running}})
async def start(user: str, vault: str, background: BackgroundTasks):
    lock = await acquire_job_lock(store, user, vault, reason="re-index")
    if not lock:
        retry_after = {"Retry-After": str(lock.retry_after_s())}
        return JSONResponse(lock.existing.to_dict(), 409, retry_after)
    background.add_task(work, user, vault, lock.job_id)
    return {"jobId": lock.job_id}


async def work(user: str, vault: str, job_id: str) -> None:
    async with resume_job_lock(store, user, vault, expected_job_id=job_id):
        await asyncio.to_thread(rebuild_index, user, vault)
