"""The rows that every part of the benchmark yields, and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest

WIDTHS = (44, 12, 64)


class Row(NamedTuple):
    subject: str
    figure: str
    against: str = ""


Part = Callable[..., Iterator[Row]]


def where_installed(backend: str) -> Callable[[Part], Part]:
    """Say in a row what is missing, instead of the part's own."""

    def wrap(part: Part) -> Part:
        def rows(*, quick: bool) -> Iterator[Row]:
            try:
                yield from part(quick=quick)
            except (ModuleNotFoundError, pytest.skip.Exception) as error:
                yield Row(backend, "-", f"not installed: {error}")

        return rows

    return wrap


def show(title: str, rows: Iterable[Row]) -> None:
    """Print each row as soon as it is there. A part without rows is an error."""
    _line(f"**{title}**", "", "")
    count = 0
    for row in rows:
        _line(*row)
        count += 1
    if not count:
        raise RuntimeError(f"nothing was measured: {title}")


def show_header() -> None:
    _line("what", "median", "against")
    _line(*("-" * width for width in WIDTHS))


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _line(*cells: str) -> None:
    padded = (cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    print(f"| {' | '.join(padded)} |", flush=True)
