"""Waiting for a lock at C level, where no signal handler can leave a half-done wait behind."""

from __future__ import annotations

import threading
import time


def waitable(seconds: float) -> float:
    """No longer than a thread can wait."""
    return min(seconds, threading.TIMEOUT_MAX)


def wait_in_turns(lock: threading.Lock, seconds: float) -> bool:
    """Wait so long for the lock, and return whether it was to be had.

    For the main thread, so that none of its waits lasts: a signal that comes just before a C call
    is handled only after it.
    """
    until = time.monotonic() + seconds
    while (left_s := until - time.monotonic()) > 0:
        if lock.acquire(timeout=min(left_s, 1)):
            return True
    return False
