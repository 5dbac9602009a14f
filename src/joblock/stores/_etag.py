"""The etag of a store that makes its own: a random one for each write, never used again."""

from __future__ import annotations

import os
import re


def new_etag() -> str:
    return os.urandom(16).hex()


def is_ours(etag: str) -> bool:
    """No other text is compared: databases have their own view of spaces and of character sets."""
    return re.fullmatch("[0-9a-f]{32}", etag) is not None
