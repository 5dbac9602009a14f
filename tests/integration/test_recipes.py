"""The recipes, with real frameworks, workers and brokers: clicks, retries, kills, redeliveries."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from joblock import acquire_job_lock, list_job_locks, peek_job_lock
from joblock.stores import open_store
from tests.backends import Backends
from tests.holding import poll
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
RECIPES = Path(__file__).parent / "recipes"
BIN = Path(sys.executable).parent
DEADLINE_S = 120
eventually = partial(poll, within_s=DEADLINE_S, every_s=0.02)
TTL_S = 2
CLICKS = 50

WORKERS = {
    "celery": ["-m", "celery", "-A", "celery_app", "worker", "-c", "4", "-l", "INFO"],
    "rq": [str(BIN / "rq"), "worker", "--with-scheduler", "--url", "{url}"],
    "dramatiq": ["-m", "dramatiq", "impatient_dramatiq", "--processes", "1", "--threads", "4"],
    "huey": [str(BIN / "huey_consumer"), "huey_app.huey", "-w", "4", "-d", "0.1"],
}
# The recipe's broker takes a worker for dead after a minute, and looks for dead ones now and then.
IMPATIENT_DRAMATIQ = """
import dramatiq_app
broker = dramatiq_app.dramatiq.get_broker()
broker.heartbeat_timeout, broker.maintenance_chance = 1000, 1_000_000
"""
# As many clicks as there are threads, let loose at once.
CLICK = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
click, vault, clicks = import_module(sys.argv[1]).click, sys.argv[2], int(sys.argv[3])
barrier = threading.Barrier(clicks, timeout=60)
def one(_):
    barrier.wait()
    return click("user-1", vault)
with ThreadPoolExecutor(clicks) as threads:
    print(json.dumps(list(threads.map(one, range(clicks)))))
"""


def needs(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


class Run(NamedTuple):
    """One line of what the job writes down."""

    vault: str
    pid: int
    what: str
    at: float


class Shop:
    """A folder for what the jobs write, the environment of all programs, and those that run."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = os.environ | environment
        self.url = environment.get("REDIS_URL", "")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a program, which is ended with the test."""
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                words,
                cwd=RECIPES,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, *(word.format(url=self.url) for word in WORKERS[name]))

    def python(self, code: str, *words: str) -> str:
        """What a program prints."""
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=RECIPES,
            env=self.environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout

    def click(self, name: str, vault: str, clicks: int = 1) -> list[tuple[int, dict[str, Any]]]:
        answers: list[tuple[int, dict[str, Any]]] = json.loads(
            self.python(CLICK, f"{name}_app", vault, str(clicks))
        )
        return answers

    def log(self) -> str:
        return (self.folder / "log").read_text("utf-8", "replace")

    def runs(self, what: str = "begins") -> list[Run]:
        file = self.folder / "runs"
        lines = file.read_text().splitlines() if file.exists() else []
        runs = [line.split() for line in lines]
        return [Run(v, int(pid), w, float(at)) for v, pid, w, at in runs if w == what]

    def locks(self) -> list[Any]:
        return list(list_job_locks(open_store(self.url)))

    def idle(self) -> bool:
        """Whether no lock is left."""
        return not self.locks()

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def shop(tmp_path: Path, backends: Backends) -> Iterator[Shop]:
    needs("redis")
    url = backends["redis"].url
    store: Any = open_store(url)
    store._client.flushall()
    shop = Shop(
        tmp_path,
        {
            "REDIS_URL": url,
            "JOBLOCK_STORE": url,
            "JOBS_FOLDER": str(tmp_path),
            "LOCK_TTL_MS": str(TTL_S * 1000),
            "PYTHONPATH": os.pathsep.join(map(str, (RECIPES, ROOT / "src", tmp_path))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": os.pathsep.join((str(BIN), os.environ["PATH"])),
        },
    )
    (tmp_path / "impatient_dramatiq.py").write_text(IMPATIENT_DRAMATIQ)
    yield shop
    shop.close()
    print(shop.log() if (tmp_path / "log").exists() else "")


class TestQueues:
    @pytest.mark.parametrize("name", WORKERS)
    def test_fifty_clicks_start_one_job(self, shop: Shop, name: str) -> None:
        """The others get 409 and the record of the one that runs."""
        needs(name)
        shop.worker(name)
        answers = shop.click(name, "quick", CLICKS)
        (won,) = [body for status, body in answers if status == 202]
        refused = [body for status, body in answers if status == 409]
        assert [body["jobId"] for body in refused] == [won["jobId"]] * (CLICKS - 1)
        eventually(shop.idle)
        assert len(shop.runs()) == 1

    @pytest.mark.parametrize("name", WORKERS)
    def test_a_retry(self, shop: Shop, name: str) -> None:
        """The lock stays the job's while it waits for it, and is free after it."""
        needs(name)
        shop.worker(name)
        ((_, lock),) = shop.click(name, "fails")
        eventually(lambda: shop.runs("ends"))
        while True:
            held = shop.locks()
            if len(shop.runs()) > 1:  # read after the locks, which may be gone by now
                break
            assert [it.job_id for it in held] == [lock["jobId"]]
            time.sleep(0.1)
        eventually(shop.idle)
        assert len(shop.runs()) == 2

    @pytest.mark.parametrize("name", ["celery", "rq", "dramatiq"])
    def test_a_killed_worker(self, shop: Shop, name: str) -> None:
        """The queue delivers its job again; it runs once the dead run's lease is over."""
        needs(name)
        worker = shop.worker(name)
        shop.click(name, "hangs")
        eventually(shop.runs)
        (first,) = shop.runs()
        (begun,) = shop.locks()
        if name == "dramatiq":  # its process with all threads
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            shop.worker(name)
        else:  # the child that runs the job
            os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: len(shop.runs()) == 2)
        second = shop.runs()[1]
        assert second.pid != first.pid
        assert second.at * 1000 >= begun.expires_at
        eventually(shop.idle)
        assert len(shop.runs()) == 2
        assert len(shop.runs("ends")) == 1

    def test_two_deliveries_by_celery(self, shop: Shop) -> None:
        """The second is put off while the first one runs, and dropped after it."""
        needs("celery")
        shop.worker("celery")
        ((_, lock),) = shop.click("celery", "waits")
        eventually(shop.runs)
        again = (
            "import sys, celery_app as a; a.index.apply_async(sys.argv[2:], task_id=sys.argv[1])"
        )
        shop.python(again, lock["jobId"], "user-1", "waits")
        eventually(lambda: "Retry in" in shop.log())
        (shop.folder / "go").touch()
        eventually(lambda: shop.log().count("succeeded") == 2)
        assert len(shop.runs()) == 1
        assert shop.idle()

    def test_many_deliveries_by_dramatiq(self, shop: Shop) -> None:
        """As many messages as one likes for one job: it runs once."""
        needs("dramatiq")
        ((_, lock),) = shop.click("dramatiq", "waits")
        again = "import sys, dramatiq_app as a; [a.index.send(*sys.argv[1:]) for _ in range(3)]"
        shop.python(again, "user-1", "waits", lock["jobId"])
        shop.worker("dramatiq")
        eventually(shop.runs)
        (shop.folder / "go").touch()
        store: Any = open_store(shop.url)
        queues = ("dramatiq:default.msgs", "dramatiq:default.DQ.msgs")
        eventually(lambda: not any(map(store._client.hlen, queues)))
        assert len(shop.runs()) == 1
        assert shop.idle()

    @pytest.mark.parametrize(
        ("option", "at_once"), [("soft_time_limit", True), ("time_limit", False)]
    )
    def test_a_time_limit_of_celery(self, shop: Shop, option: str, at_once: bool) -> None:
        """A soft one raises in the job, which frees the lock; a hard one kills its process."""
        needs("celery")
        shop.worker("celery")
        code = (
            "import sys, celery_app as a;"
            "lock = a.acquire_job_lock(a.store, 'user-1', 'hangs');"
            "a.index.apply_async(('user-1', 'hangs'), task_id=lock.job_id, **{sys.argv[1]: 1})"
        )
        shop.python(code, option)
        eventually(lambda: "TimeLimitExceeded" in shop.log())
        if at_once:
            eventually(shop.idle)
        store = open_store(shop.url)
        eventually(lambda: acquire_job_lock(store, "user-1", "hangs"))
        assert len(shop.runs()) == 1

    def test_a_task_of_celery_that_is_revoked(self, shop: Shop) -> None:
        """While it runs, with its process: the lock is free once its lease is over."""
        needs("celery")
        shop.worker("celery")
        ((_, lock),) = shop.click("celery", "hangs")
        eventually(shop.runs)
        code = "import sys, celery_app as a; a.app.control.revoke(sys.argv[1], terminate=True)"
        shop.python(code, lock["jobId"])
        store = open_store(shop.url)
        eventually(lambda: acquire_job_lock(store, "user-1", "hangs"))
        assert len(shop.runs()) == 1


def post(port: int, path: str) -> tuple[int, Any, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path)
        answer = connection.getresponse()
        return answer.status, json.load(answer), answer.headers["Retry-After"]
    finally:
        connection.close()


WEB = {
    "fastapi": ["-m", "uvicorn", "fastapi_app:app", "--port", "{port}", "--workers", "2"],
    "flask": ["-m", "gunicorn", "flask_app:app", "-b", "127.0.0.1:{port}", "-w", "2"],
    "django": ["django_site.py", "runserver", "{port}", "--noreload"],
}


class TestWebHandlers:
    @pytest.fixture(params=WEB)
    def port(self, request: pytest.FixtureRequest, shop: Shop) -> int:
        """Where the service listens."""
        framework: str = request.param
        needs(framework)
        needs({"fastapi": "uvicorn", "flask": "gunicorn"}.get(framework, framework))
        port = free_port()
        shop.environment["LOCKS_URL"] = shop.url
        shop.start(sys.executable, *(word.format(port=port) for word in WEB[framework]))

        def listens() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        eventually(listens)
        return port

    def test_fifty_clicks_start_one_job(self, shop: Shop, port: int) -> None:
        """202 once; the others get 409, whose job it is, and when to ask again."""
        with ThreadPoolExecutor(CLICKS) as threads:
            answers = list(threads.map(post, [port] * CLICKS, ["/user-1/waits/index"] * CLICKS))
        (won,) = [body for status, body, _ in answers if status == 202]
        refused = [(body, retry) for status, body, retry in answers if status == 409]
        assert len(refused) == CLICKS - 1
        for body, retry_after in refused:
            assert body["jobId"] == won["jobId"]
            assert retry_after is not None and int(retry_after) >= 1
        (shop.folder / "go").touch()


def test_the_schema_of_fastapi(shop: Shop) -> None:
    """Clients are told what a 409 has."""
    needs("fastapi")
    code = "import json, fastapi_app as a; print(json.dumps(a.app.openapi()))"
    schema = json.loads(shop.python(code))
    responses = schema["paths"]["/{user}/{vault}/index"]["post"]["responses"]
    assert responses["409"]["content"]["application/json"]["schema"]["$ref"].endswith("/Running")


def test_a_client_that_goes_away(shop: Shop) -> None:
    """Before it has its answer: the job runs to its end all the same, and the lock is free."""
    needs("fastapi")
    needs("uvicorn")
    port = free_port()
    shop.start(sys.executable, *(word.format(port=port) for word in WEB["fastapi"]))

    def clicked() -> bool:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) != 0:
                return False
            client.sendall(b"POST /user-1/quick/index HTTP/1.1\r\nHost: x\r\n\r\n")
            return True

    eventually(clicked)
    eventually(lambda: shop.runs("ends"))
    eventually(shop.idle)
    assert len(shop.runs()) == 1


@pytest.mark.skipif(sys.version_info < (3, 12), reason="pydantic asks for Python 3.12")
def test_the_typed_dict_of_a_record(shop: Shop) -> None:
    """As pydantic sees it; before Python 3.12 it takes only the TypedDict of typing_extensions."""
    needs("pydantic")
    code = (
        "import json; from pydantic import TypeAdapter; from joblock import JobLockDict;"
        "print(json.dumps(TypeAdapter(JobLockDict).json_schema()))"
    )
    schema = json.loads(shop.python(code))
    assert set(schema["required"]) < set(schema["properties"])
    assert {"jobId", "expiresAt"} <= set(schema["required"])


class TestDjango:
    def test_its_test_case(self, shop: Shop) -> None:
        """As its test runner runs it."""
        needs("django")
        code = "import unittest, django_site; unittest.main(django_site, argv=['x'])"
        shop.python(code)

    def test_its_command(self, shop: Shop) -> None:
        """Two at once: one does the job, the other says who does, with a status of its own."""
        needs("django")
        shop.environment["LOCKS_URL"] = shop.url
        command = (sys.executable, "django_site.py", "index", "user-1", "waits")
        first = shop.start(*command)
        eventually(shop.runs)
        assert shop.start(*command).wait(DEADLINE_S) == 75
        (shop.folder / "go").touch()
        assert first.wait(DEADLINE_S) == 0
        assert "holds the lock of 'user-1' / 'waits'" in shop.log()
        assert len(shop.runs()) == 1
        assert shop.idle()


def test_a_lambda_function(shop: Shop, backends: Backends) -> None:
    """A second invocation is told who runs; one after it runs."""
    needs("boto3")
    url = backends["dynamodb"].url
    shop.environment |= {
        "AWS_ENDPOINT_URL_DYNAMODB": url,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LOCKS_TABLE": "locks",
    }
    table = (
        "import boto3; from joblock.stores.dynamodb import TABLE;"
        "client = boto3.client('dynamodb'); client.create_table(TableName='locks', **TABLE);"
        "client.get_waiter('table_exists').wait(TableName='locks', WaiterConfig={'Delay': 1})"
    )
    shop.python(table)
    invoke = (
        "import json, types, lambda_function as f;"
        "context = types.SimpleNamespace(get_remaining_time_in_millis=lambda: 60_000);"
        "print(json.dumps(f.handler({'user': 'u', 'vault': 'waits'}, context)))"
    )
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(shop.python, invoke)
        eventually(shop.runs)
        second = json.loads(shop.python(invoke))
        (shop.folder / "go").touch()
        ended = json.loads(first.result(DEADLINE_S))
    assert (second["statusCode"], ended["statusCode"]) == (409, 200)
    assert json.loads(second["body"])["jobId"] == json.loads(ended["body"])["jobId"]
    assert int(second["headers"]["Retry-After"]) >= 1
    assert json.loads(shop.python(invoke))["statusCode"] == 200


def test_cron(shop: Shop) -> None:
    """The same line on many hosts: one runs it, the others are done without a word."""
    (line,) = [it for it in (RECIPES / "crontab").read_text().splitlines() if it[0] != "#"]
    command = line.split(maxsplit=5)[5]
    programs = shop.folder / "bin"
    programs.mkdir()
    joblock = programs / "joblock"
    joblock.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m joblock "$@"\n')
    rebuild = programs / "rebuild-index"
    code = "import jobs; jobs.rebuild_index('user-1', 'quick')"
    rebuild.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)}\n")
    for program in (joblock, rebuild):
        program.chmod(0o755)
    shop.environment["PATH"] = f"{programs}{os.pathsep}{shop.environment['PATH']}"
    hosts = [shop.start("sh", "-c", command) for _ in range(5)]
    assert [host.wait(DEADLINE_S) for host in hosts] == [0] * 5
    assert len(shop.runs()) == 1
    assert shop.log() == ""
    (lock,) = shop.locks()  # kept for those that come late
    assert lock.ended_at is not None
    assert lock.expires_at == lock.started_at + 5 * 60_000


def test_a_script_that_gets_sigterm(shop: Shop) -> None:
    """It frees its lock, and another can begin at once."""
    script = partial(shop.start, sys.executable, "script.py", "hangs")
    first = script()
    eventually(shop.runs)
    first.send_signal(signal.SIGTERM)
    assert first.wait(DEADLINE_S) == 128 + signal.SIGTERM
    assert shop.idle()
    assert script().wait(DEADLINE_S) == 0
    assert len(shop.runs()) == 2
    assert peek_job_lock(open_store(shop.url), "user-1", "all") is None


def test_the_kit_with_others(shop: Shop) -> None:
    """pytest-asyncio, anyio under trio, unittest, hypothesis, freezegun and time-machine."""
    for package in ("pytest_asyncio", "trio", "hypothesis", "freezegun", "time_machine"):
        needs(package)
    options = [
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(shop.folder),
    ]
    tests = shop.start(sys.executable, "-m", "pytest", *options, str(RECIPES / "kit_examples.py"))
    tests.wait(DEADLINE_S)
    assert "7 passed" in shop.log()
    assert "failed" not in shop.log()
