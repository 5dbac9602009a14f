"""The logger "joblock".

It is imported when there is something to say: `import logging` takes as long as all of joblock.
"""

from __future__ import annotations

import contextlib
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logging import Logger


def debug(message: str, *args: object) -> None:
    """Log at DEBUG, if anybody can have asked for it: who has, has imported `logging`."""
    if "logging" in sys.modules:
        _logger().debug(message, *args)


def warning(message: str, *args: object) -> None:
    """Log at WARNING."""
    _logger().warning(message, *args)


def error(message: str, *args: object) -> None:
    """Log at ERROR."""
    _logger().error(message, *args)


@cache  # `getLogger` takes a lock that all loggers share
def _logger() -> Logger:
    import logging

    return logging.getLogger("joblock")


def told(error: BaseException) -> str:
    """What a log may say of an error: its type, and what is known to hold no secret."""
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ == "sqlite3":
        return f"{name}: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"{name}: {error.strerror}"
    status = _status(error)
    return name if status is None else f"{name}: status {status}"


def _status(error: Any) -> int | None:
    """The HTTP status under the names that Netlify's, Azure's, Google's and boto3's errors have."""
    told = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        told.append(error.response["ResponseMetadata"]["HTTPStatusCode"])
    return next((int(status) for status in told if isinstance(status, int)), None)
