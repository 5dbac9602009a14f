"""AWS Lambda with DynamoDB: a second invocation for one vault gets 409."""

import os

import boto3
from jobs import rebuild_index

from joblock import JobLockHeldError, hold_job_lock
from joblock.stores.dynamodb import QUICK, DynamoBlobStore

store = DynamoBlobStore(boto3.client("dynamodb", config=QUICK), os.environ["LOCKS_TABLE"])


def handler(event, context):
    user, vault = event["user"], event["vault"]
    left_ms = context.get_remaining_time_in_millis()
    try:
        with hold_job_lock(store, user, vault, at_most_ms=left_ms) as lock:
            rebuild_index(user, vault)
            return {"statusCode": 200, "body": lock.record.to_json()}
    except JobLockHeldError as error:
        retry_after = {"Retry-After": str(error.retry_after_s())}
        return {"statusCode": 409, "headers": retry_after, "body": error.existing.to_json()}
