"""What is Redis's and Valkey's own: clients, restarts, a cluster; and forks, gevent and races."""

from __future__ import annotations

import asyncio
import importlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from joblock import (
    JobLockHeldError,
    acquire_job_lock,
    aio,
    hold_job_lock,
    peek_job_lock,
    release_job_lock,
    renew_job_lock,
)
from joblock.conformance import Finding, check_store
from joblock.stores import open_store
from tests.holding import assert_is_held_natively, assert_outlives_its_server
from tests.integration.test_one_winner import assert_one_winner_of_forks
from tests.servers import LocalServer, free_port, redis_server
from tests.stream_proxy import stream_proxy
from tests.support import KEY, UID, VAULT, acquired, held

redis: Any = pytest.importorskip("redis")


@pytest.fixture(scope="module", params=["redis-server", "valkey-server"])
def program(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def server(program: str) -> Iterator[LocalServer]:
    with redis_server(program=program) as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Any]:
    with redis.Redis.from_url(server.url) as made:
        made.flushall()
        yield made


def store_of(client: Any, prefix: str = "") -> Any:
    return importlib.import_module("joblock.stores.redis").RedisBlobStore(client, prefix=prefix)


CLIENTS_OF_A_USER: dict[str, Callable[[Any, str], Any]] = {
    "as it is": lambda r, url: r.Redis.from_url(url),
    "decodes": lambda r, url: r.Redis.from_url(url, decode_responses=True),
    "RESP3": lambda r, url: r.Redis.from_url(url, protocol=3),
    "one connection": lambda r, url: r.Redis(
        connection_pool=r.BlockingConnectionPool.from_url(url, max_connections=1, timeout=20)
    ),
    "single connection": lambda r, url: r.Redis.from_url(url, single_connection_client=True),
}


@pytest.mark.parametrize("kind", CLIENTS_OF_A_USER)
def test_every_client_of_a_user(server: LocalServer, kind: str) -> None:
    """However it was made, it passes every check."""
    with CLIENTS_OF_A_USER[kind](redis, server.url) as made:
        made.flushall()
        store = store_of(made, "locks/")
        assert [finding for finding in check_store(store) if not finding] == []
        lock = acquired(acquire_job_lock(store, UID, VAULT, reason="é🔒"))
        assert peek_job_lock(store, UID, VAULT) == lock.record
        assert list(store.list_keys("index-jobs/")) == [KEY]


def test_what_stands_in_redis(client: Any) -> None:
    """The record as it is, under the key as it is, without an expiry; nothing after a minute."""
    store = store_of(client, "locks/")
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    assert client.get(f"locks/{KEY}").decode() == lock.record.to_json()
    assert client.pttl(f"locks/{KEY}") == -1
    assert release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)
    assert 0 < client.pttl(f"locks/{KEY}") <= 60_000
    assert peek_job_lock(store, UID, VAULT) is None
    again = acquired(acquire_job_lock(store, UID, VAULT))
    assert client.pttl(f"locks/{KEY}") == -1
    assert peek_job_lock(store, UID, VAULT) == again.record
    store.delete(KEY)
    assert client.dbsize() == 0


def test_a_value_that_is_no_text(client: Any) -> None:
    """Junk of another program is no lock, also for a client that decodes."""
    client.set(KEY, b"\xff\xfe")
    with redis.Redis.from_url(
        f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}",
        decode_responses=True,
    ) as decoding:
        assert acquire_job_lock(store_of(decoding), UID, VAULT)


def test_a_key_of_another_type(client: Any) -> None:
    """Redis's own error, and no lock."""
    client.rpush(KEY, "x")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        acquire_job_lock(store_of(client), UID, VAULT)


def test_scripts_that_are_forgotten(client: Any) -> None:
    """By `SCRIPT FLUSH`, or a failover: they are sent again, in each verb."""
    store = store_of(client)
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    client.script_flush()
    assert held(acquire_job_lock(store, UID, VAULT)).existing == lock.record
    client.script_flush()
    assert release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag)


def test_keys_are_listed(client: Any) -> None:
    """Thousands, and only those that begin exactly so, whatever Redis takes for a pattern."""
    for prefix in ("", "locks/"):
        store = store_of(client, prefix)
        expected = {f"index-jobs/u{number}/v.json" for number in range(2500)}
        for key in expected:
            client.set(prefix + key, "{}")
        for odd in ("a*b/c", "a?b/c", "a[b]/c", "a\\b/c", "a^b/c", "a-b/c", "axb/c", "é/日"):
            store.set(odd, "{}")
        assert set(store.list_keys("index-jobs/u")) == expected
        for begins in ("a*b/", "a?b/", "a[b]/", "a\\b/", "a^b/", "a-b/", "é/"):
            assert list(store.list_keys(begins)) == [
                key for key in ("a*b/c", "a?b/c", "a[b]/c", "a\\b/c", "a^b/c", "a-b/c", "é/日")
                if key.startswith(begins)
            ]  # fmt: skip
        client.flushall()


def test_a_reply_that_is_lost_again_and_again(server: LocalServer, client: Any) -> None:
    """redis-py repeats by itself, and tells nobody: each answer is that of the first request."""
    with (
        stream_proxy("127.0.0.1", server.port) as proxy,
        redis.Redis(host="127.0.0.1", port=proxy.port) as lossy,
    ):
        store = store_of(lossy)
        store.get(KEY)  # connected

        def lose(times: int = 2) -> None:
            proxy.cut(0, lambda request: b"EVAL" in request or b"GET" in request, times=times)

        lose()
        lock = acquired(acquire_job_lock(store, UID, VAULT))
        lose()
        assert held(acquire_job_lock(store, UID, VAULT)).existing == lock.record
        lose()
        renewed = renew_job_lock(
            store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag, record=lock.record
        )
        assert renewed.renewed is True
        lose()
        assert release_job_lock(store, UID, VAULT, expected_job_id=lock.job_id, etag=renewed.etag)
        assert peek_job_lock(store, UID, VAULT) is None
        lose()
        with hold_job_lock(store, UID, VAULT) as mine:
            assert peek_job_lock(store, UID, VAULT) == mine.record
            lose()
        assert peek_job_lock(store, UID, VAULT) is None
        lose()
        assert store.set_if_new("new", "x") is not None  # itself, without a look by its caller
        proxy.forget()


def test_a_refused_click_is_one_request(server: LocalServer, client: Any) -> None:
    """Whose answer has the record of the job that runs; so is a free lock, and a release."""
    with (
        stream_proxy("127.0.0.1", server.port) as proxy,
        redis.Redis(host="127.0.0.1", port=proxy.port) as counted,
    ):
        store = store_of(counted)
        with hold_job_lock(store, UID, VAULT):
            pass  # now the server knows the scripts

        def requests(call: Callable[[], object]) -> int:
            proxy.requests.clear()
            assert call() is not None
            return len(proxy.requests)

        lock = acquired(acquire_job_lock(store, UID, VAULT))
        release = partial(
            release_job_lock, store, UID, VAULT, expected_job_id=lock.job_id, etag=lock.etag
        )
        assert requests(lambda: held(acquire_job_lock(store, UID, VAULT))) == 1
        assert requests(release) == 1
        assert requests(lambda: acquire_job_lock(store, UID, VAULT)) == 1


def test_a_server_that_is_killed_and_started_again(program: str) -> None:
    """With an append-only file no lock is lost, and who holds one goes on."""
    with redis_server(program=program) as server, redis.Redis.from_url(server.url) as client:
        store = store_of(client)
        assert_outlives_its_server(store, server, signal.SIGKILL)


def test_a_server_that_does_not_come_back(client: Any) -> None:
    """Its error, in time; nothing is said of the lock."""
    port = free_port()
    store = open_store(f"redis://user:hush@127.0.0.1:{port}/0")
    assert "hush" not in repr(store)
    with pytest.raises(redis.ConnectionError) as failed:
        acquire_job_lock(store, UID, VAULT)
    assert "hush" not in str(failed.value)


@pytest.mark.slow
def test_a_server_that_never_answers() -> None:
    """`joblock doctor` says so when its time is over, though redis-py would wait for long."""
    with socket.create_server(("127.0.0.1", 0), backlog=20) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        command = [sys.executable, "-m", "joblock", "doctor", "--timeout", "2s", "--store", url]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "FAIL  read-your-writes: no answer within 2 seconds\n" in ran.stdout


def test_open_store(server: LocalServer, client: Any) -> None:
    """By its URL; and what is no such URL."""
    store = open_store(server.url)
    lock = acquired(acquire_job_lock(store, UID, VAULT))
    assert peek_job_lock(store_of(client), UID, VAULT) == lock.record
    with pytest.raises(ValueError, match="invalid literal|Port could not"):
        open_store("redis://host:port")


def test_the_async_one(server: LocalServer, client: Any) -> None:
    """By its URL; a second click is refused, keys are listed, and a hold keeps its lock."""
    connect_async = importlib.import_module("joblock.stores.redis").connect_async

    async def main() -> None:
        store = connect_async(server.url)
        assert repr(store) == "AsyncRedisBlobStore(prefix='')"
        client.script_flush()
        await assert_is_held_natively(store)
        await store._client.aclose()

    asyncio.run(main())


def test_one_winner_of_processes(server: LocalServer, client: Any) -> None:
    """One client object, inherited over fork, raced by its parent and its children."""
    assert_one_winner_of_forks(store_of(client))


def test_a_cluster(program: str) -> None:
    """One key for each script, so any cluster will do; here one node has every slot."""
    port = free_port()
    options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    with redis_server(*options, port=port, program=program) as server:
        with redis.Redis.from_url(server.url) as node:
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while b"cluster_state:ok" not in node.execute_command("CLUSTER", "INFO"):
                pass
        with redis.RedisCluster.from_url(server.url) as cluster:
            store = store_of(cluster)
            assert [finding for finding in check_store(store) if not finding] == []
            lock = acquired(acquire_job_lock(store, UID, VAULT))
            assert peek_job_lock(store, UID, VAULT) == lock.record
            assert list(store.list_keys("index-jobs/")) == [KEY]


def test_sentinel(program: str, server: LocalServer, client: Any, tmp_path: Any) -> None:
    """A client that asks Sentinel for the primary."""
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nsentinel monitor jobs 127.0.0.1 {server.port} 1\n")
    sentinel = subprocess.Popen([program, str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        asked = importlib.import_module("redis.sentinel").Sentinel([("127.0.0.1", port)])
        primary = None
        while primary is None:
            try:
                primary = asked.discover_master("jobs")
            except redis.sentinel.MasterNotFoundError:
                assert sentinel.poll() is None
        with asked.master_for("jobs") as through:
            lock = acquired(acquire_job_lock(store_of(through), UID, VAULT))
        assert peek_job_lock(store_of(client), UID, VAULT) == lock.record
        for it in asked.sentinels:
            it.close()
    finally:
        sentinel.kill()
        sentinel.wait()


GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import sys
import gevent
from joblock import JobLockHeldError, hold_job_lock
from joblock.stores import open_store
store = open_store(sys.argv[1])
started, refused = [], []
def click(number):
    try:
        with hold_job_lock(store, "u", "v", renew_every_ms=20) as lock:
            started.append(number)
            first = lock.record
            while lock.record == first or len(refused) < 49:
                gevent.sleep(0.01)
    except JobLockHeldError:
        refused.append(number)
gevent.joinall([gevent.spawn(click, number) for number in range(50)])
print(len(started), list(store.list_keys("index-jobs/")) == [])
"""


def test_gevent(server: LocalServer, client: Any) -> None:
    """Of fifty greenlets one starts, and its lock is renewed."""
    pytest.importorskip("gevent")
    ran = subprocess.run(
        [sys.executable, "-c", GEVENT, server.url], capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["1", "False"], ran.stderr  # the mark stays for a minute


def test_a_setting_that_frees_live_locks(server: LocalServer, client: Any) -> None:
    """Is told by `check_store`, sync and async; it is no failure, and the lock works."""

    async def native() -> list[Finding]:
        made = importlib.import_module("redis.asyncio").Redis.from_url(server.url)
        store = importlib.import_module("joblock.stores.redis").AsyncRedisBlobStore(made)
        findings = await aio.check_store(store)
        await made.aclose()
        return findings

    for policy, message in {
        "allkeys-lru": "warning: maxmemory-policy is allkeys-lru",
        "volatile-lru": "none endangers",
        "noeviction": "none endangers",
    }.items():
        client.config_set("maxmemory-policy", policy)
        for findings in (check_store(store_of(client)), asyncio.run(native())):
            assert all(findings)
            assert [finding.check for finding in findings[-2:]] == ["clock", "settings"]
            assert findings[-1].message.startswith(message)
    client.execute_command("ACL", "SETUSER", "jobs", "on", "nopass", "~*", "+@all", "-config")
    with redis.Redis.from_url(server.url.replace("//", "//jobs:x@")) as other:
        findings = check_store(store_of(other))
    assert all(findings)
    assert findings[-1].message.startswith("not known: ")


def test_a_hold_that_is_refused(client: Any) -> None:
    """As everywhere."""
    store = store_of(client)
    with hold_job_lock(store, UID, VAULT) as lock, pytest.raises(JobLockHeldError) as refused:
        hold_job_lock(store, UID, VAULT).__enter__()
    assert refused.value.existing == lock.record
