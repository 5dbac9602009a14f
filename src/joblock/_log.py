"""The logger "joblock".

It is imported when there is something to say: `import logging` takes as long as all of joblock.
"""

from __future__ import annotations

import sys


def debug(message: str, *args: object) -> None:
    """Log at DEBUG, if anybody can have asked for it: who has, has imported `logging`."""
    logging = sys.modules.get("logging")
    if logging is not None:
        logging.getLogger("joblock").debug(message, *args)


def warning(message: str, *args: object) -> None:
    """Log at WARNING."""
    import logging

    logging.getLogger("joblock").warning(message, *args)


def error(message: str, *args: object) -> None:
    """Log at ERROR."""
    import logging

    logging.getLogger("joblock").error(message, *args)
