"""What the stores over a boto3 client share: its patience, and which errors are no answer."""

from __future__ import annotations

from typing import Any

from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError

from ._remote import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, CutReplyError, Retry

QUICK = Config(
    connect_timeout=CONNECT_TIMEOUT_S,
    read_timeout=READ_TIMEOUT_S,
    retries={"mode": "standard", "total_max_attempts": 2},
)

# DynamoDB's words for "not now"; the last is for another client's transaction on the same item.
_LATER = (
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "ThrottlingException",
    "TransactionConflictException",
)


def reply(error: ClientError) -> tuple[int, str, int]:
    """Return the status, the service's code for the error, and how often boto3 asked again."""
    response: Any = error.response
    metadata = response["ResponseMetadata"]
    return metadata["HTTPStatusCode"], response["Error"]["Code"], metadata.get("RetryAttempts", 0)


def _unanswered(error: Exception) -> bool:
    if isinstance(error, ClientError):
        status, code, retries = reply(error)
        cut = not code or code.isdigit()  # an error without its text has the status for a code
        later = status >= 500 or status in (408, 429) or code in _LATER
        return retries == 0 and (cut or later)
    # The last three are what breaks in botocore, and here, where a reply was cut.
    broken = (IncompleteReadError, ResponseParserError, LookupError, ValueError)
    return isinstance(error, (HTTPClientError, NoConnectionError, CutReplyError, *broken))


RETRY = Retry(_unanswered, pauses_s=(0.1,))  # boto3 has been patient already
