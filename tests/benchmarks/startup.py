"""What an import adds to the start of an interpreter, with everything compiled beforehand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from statistics import median
from time import perf_counter

from .table import Row, microseconds

PEERS = ("filelock", "redis", "sherlock", "portalocker", "diskcache")
OURS = "joblock"


def startup(*, quick: bool) -> Iterator[Row]:
    """The difference from a bare interpreter that was started in the same round."""
    found = [name for name in (OURS, *PEERS) if importlib.util.find_spec(name) is not None]
    codes = {"": "pass"} | {name: f"import {name}" for name in found}
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as folder:
        for code in codes.values():
            _start(code, folder)  # compiles
        for _ in range(2 if quick else 25):
            for name, code in codes.items():
                seconds[name].append(_start(code, folder))
    yield Row("a bare interpreter", microseconds(median(seconds[""])))
    added = {name: _difference(seconds[name], seconds[""]) for name in found}
    for name in found:
        against = "" if name == OURS else f"{added[name] / added[OURS]:.2f} x {OURS}"
        yield Row(f"import {name}", f"+{microseconds(added[name])}", against)
    for name in PEERS:
        if name not in found:
            yield Row(f"import {name}", "-", f"not installed: {name}")


def _start(code: str, folder: str) -> float:
    environment = os.environ | {"PYTHONPYCACHEPREFIX": folder}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    started = perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)
    return perf_counter() - started


def _difference(mine: list[float], bare: list[float]) -> float:
    return median(a - b for a, b in zip(mine, bare, strict=True))
