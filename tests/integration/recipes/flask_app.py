"""Flask: the handler takes the lock, a thread of the same process resumes it and does the job."""

import os
from threading import Thread

from flask import Flask, jsonify
from jobs import rebuild_index

from joblock import acquire_job_lock, release_job_lock, resume_job_lock
from joblock.stores import open_store

app = Flask(__name__)
store = open_store(os.environ["REDIS_URL"])  # made before gunicorn forks, or after: both is safe


@app.post("/<user>/<vault>/index")
def start(user: str, vault: str):
    lock = acquire_job_lock(store, user, vault, reason="re-index")
    if not lock:
        retry_after = {"Retry-After": str(lock.retry_after_s())}
        return jsonify(lock.existing.to_dict()), 409, retry_after
    try:
        Thread(target=work, args=(user, vault, lock.job_id)).start()
    except Exception:
        release_job_lock(store, user, vault, expected_job_id=lock.job_id, etag=lock.etag)
        raise
    return jsonify(jobId=lock.job_id), 202


def work(user: str, vault: str, job_id: str) -> None:
    with resume_job_lock(store, user, vault, expected_job_id=job_id):
        rebuild_index(user, vault)
