"""Timing in turns, so that what disturbs the machine disturbs every case alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

Case = Callable[[], object]


class Turns:
    """Seconds per call of each case, one figure for each round through all of them."""

    def __init__(self, cases: Mapping[str, Case], *, quick: bool) -> None:
        rounds, batch_s = (3, 0.002) if quick else (25, 0.02)
        calls = {name: max(1, round(batch_s / _once(case))) for name, case in cases.items()}
        self.rounds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                self.rounds[name].append(_timed(case, calls[name]))

    def median(self, name: str) -> float:
        return median(self.rounds[name])

    def ratio(self, name: str, reference: str) -> float:
        """The median of the rounds' ratios: both were measured within the same moment."""
        pairs = zip(self.rounds[name], self.rounds[reference], strict=True)
        return median(mine / other for mine, other in pairs)


def _once(case: Case) -> float:
    _timed(case, 20)  # to warm up
    return min(_timed(case, 5) for _ in range(5))


def _timed(case: Case, calls: int) -> float:
    started = perf_counter()
    for _ in range(calls):
        case()
    return (perf_counter() - started) / calls
