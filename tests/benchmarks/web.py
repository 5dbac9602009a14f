"""FastAPI with a lock in Redis: requests per second, in threads and natively async."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from tests.holding import poll
from tests.servers import free_port, redis_server

from .table import Row, where_installed

ROOT = Path(__file__).parents[2]
CLIENTS = 50
NATIVE, THREADED, BARE = "native", "threaded", "none"
SUBJECTS = {
    NATIVE: "FastAPI, AsyncRedisBlobStore",
    THREADED: "FastAPI, ThreadedBlobStore",
    BARE: "FastAPI, without a lock",
}


@where_installed("FastAPI")
def web(*, quick: bool) -> Iterator[Row]:
    """Of 50 clients at once, each with a lock of its own, on one server process."""
    for package in ("aiohttp", "fastapi", "redis", "uvicorn"):
        import_module(package)
    with redis_server("--appendonly", "no") as redis, _service(redis.url) as url:
        rounds = asyncio.run(_rounds(url, quick))
    for kind, subject in SUBJECTS.items():
        against = ""
        if kind == NATIVE:
            ratio = median(it[NATIVE] / it[THREADED] for it in rounds)
            against = f"{ratio:.2f} x ThreadedBlobStore"
        yield Row(subject, f"{median(it[kind] for it in rounds):,.0f} /s", against)


@contextmanager
def _service(redis_url: str) -> Generator[str]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.benchmarks.web_app:app", "--no-access-log"]
    command += ["--port", str(port), "--log-level", "warning"]
    environment = os.environ | {"REDIS_URL": redis_url}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            poll(lambda: asyncio.run(_is_up(url)), within_s=60)
            yield url
        finally:
            process.terminate()


async def _is_up(url: str) -> bool:
    aiohttp: Any = import_module("aiohttp")
    async with aiohttp.ClientSession() as session:
        try:
            async with session.post(f"{url}/{BARE}/up") as response:
                return bool(response.status == 200)
        except aiohttp.ClientConnectionError:
            return False


async def _rounds(url: str, quick: bool) -> list[dict[str, float]]:
    aiohttp: Any = import_module("aiohttp")
    requests = CLIENTS * (2 if quick else 30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:
        return [
            {kind: await _per_second(session, f"{url}/{kind}", requests) for kind in SUBJECTS}
            for _ in range(3 if quick else 9)
        ]


async def _per_second(session: Any, url: str, requests: int) -> float:
    numbers = itertools.count()

    async def client() -> None:
        while (number := next(numbers)) < requests:
            async with session.post(f"{url}/{number}") as response:
                response.raise_for_status()
                await response.read()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return requests / (time.perf_counter() - begun)
