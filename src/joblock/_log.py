"""The logger "joblock".

It is imported when there is something to say: `import logging` takes as long as all of joblock.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

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
