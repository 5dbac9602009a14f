"""The service that `web` asks: the start and the end of a job in each request."""

import os

from fastapi import FastAPI

from joblock import AsyncBlobStore, aio, stores
from tests.support import acquired

url = os.environ["REDIS_URL"]
native = aio.open_store(url)
threaded = aio.ThreadedBlobStore(stores.open_store(url))
app = FastAPI()


@app.post("/none/{vault}")
async def without_a_lock(vault: str) -> str:
    return vault


@app.post("/native/{vault}")
async def natively(vault: str) -> str:
    return await start_and_end(native, vault)


@app.post("/threaded/{vault}")
async def in_a_thread(vault: str) -> str:
    return await start_and_end(threaded, vault)


async def start_and_end(store: AsyncBlobStore, vault: str) -> str:
    lock = acquired(await aio.acquire_job_lock(store, "user-1", vault))
    release = aio.release_job_lock
    await release(store, "user-1", vault, expected_job_id=lock.job_id, etag=lock.etag)
    return lock.job_id
