"""The logger "joblock".

It is imported when there is something to say: `import logging` takes as long as all of joblock.
"""

from __future__ import annotations

import contextlib
import re
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
    facts = ", ".join(fact for fact in (_status(error), _code(error)) if fact is not None)
    return f"{name}: {facts}" if facts else name


def _status(error: Any) -> str | None:
    """The HTTP status under the names that Netlify's, Azure's, Google's and boto3's errors have."""
    told = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        told.append(error.response["ResponseMetadata"]["HTTPStatusCode"])
    return next((f"status {status:d}" for status in told if isinstance(status, int)), None)


def _code(error: Any) -> str | None:
    """What the server calls it, where boto3, Azure's SDK, redis-py and SQLAlchemy's drivers say."""
    told = [getattr(error, name, None) for name in ("error_code", "status_code")]
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        told.append(error.response["Error"]["Code"])
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        number = error.orig.args[0]  # MariaDB's, or psycopg's whole text
        told.append(str(number) if isinstance(number, int) else error.orig.sqlstate)
    if type(error).__module__ == "redis.exceptions":
        told += re.findall("^[A-Z]{2,}(?= )", str(error))
    codes = (re.fullmatch("[A-Za-z0-9]+", code) for code in told if isinstance(code, str))
    return next((code[0] for code in codes if code is not None), None)
