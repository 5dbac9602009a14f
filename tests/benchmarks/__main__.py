"""joblock side by side with what people use today: `python -m tests.benchmarks [--quick] [PART]`.

It prints one table. Times are medians of rounds in which every case has its turn; a ratio is the
median of the rounds' ratios. Nothing is asserted about them: machines differ.
"""

from __future__ import annotations

import argparse
import os
import platform
import sqlite3
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .command import command
from .contention import contention
from .databases import natively, on_postgresql, on_redis
from .growth import growth
from .leaks import leaks
from .one_host import free, refused, resumed
from .requests import requests
from .startup import startup
from .table import show, show_header
from .threaded import threaded
from .web import web

PARTS = {
    "free": ("Acquire and release of a free lock", free),
    "refused": ("Refused acquire: a double click", refused),
    "resumed": ("A job that is handed to a worker", resumed),
    "threaded": ("Async, in a thread", threaded),
    "redis": ("Redis on loopback", on_redis),
    "postgresql": ("PostgreSQL on loopback", on_postgresql),
    "native": ("Async on Redis, 50 tasks at once", natively),
    "web": ("FastAPI on Redis, 50 clients at once", web),
    "requests": ("Requests on S3, and dollars per million", requests),
    "contention": ("Processes on one SQLite file", contention),
    "growth": ("Many locks", growth),
    "startup": ("Start-up", startup),
    "command": ("The command", command),
    "leaks": ("Left behind", leaks),
}
PACKAGES = (
    "filelock",
    "diskcache",
    "sherlock",
    "redis",
    "python-redis-lock",
    "pottery",
    "portalocker",
    "fastapi",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds: only to see that it runs")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    options = parser.parse_args()
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    print(f"{datetime.now(UTC):%Y-%m-%d}, {_machine()}", end="\n\n")
    show_header()
    for name in options.parts or PARTS:
        title, measure = PARTS[name]
        show(title, measure(quick=options.quick))


def _machine() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    model = next((it.partition(": ")[2] for it in lines if it.startswith("model name")), "")
    packages = ", ".join(filter(None, map(_version, PACKAGES)))
    return (
        f"{os.cpu_count()} x {model or platform.processor()}, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}; {packages or 'no peers'}"
    )


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
