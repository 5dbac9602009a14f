"""Real servers for the tests: each starts on a free loopback port and is gone after its `with`.

Each yields its base URL (Netlify's a `NetlifyServer`) and skips the test if what it needs is not
installed. `lossy` goes between a client and any of them, and breaks what the test tells it to.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 60


def missing(what: str) -> NoReturn:
    """Skip the test; where everything is meant to be installed, as in CI, let it fail."""
    if os.environ.get("JOBLOCK_ALL_SERVERS"):
        pytest.fail(what)
    pytest.skip(what)


@contextmanager
def s3_server() -> Generator[str]:
    """S3, by moto. Any credentials and region will do; make a bucket first."""
    _need_module("moto.server", "moto[server,s3]")
    with _process(sys.executable, "-Wignore", str(HERE / "s3_server.py")) as url:
        yield url


@contextmanager
def azure_server() -> Generator[str]:
    """Azurite's blob service; `azure_connection(url)` is what its clients need."""
    script = _node_modules("azurite") / "azurite/dist/src/blob/main.js"
    options = ["--silent", "--blobHost=127.0.0.1", "--blobPort=0", "--inMemoryPersistence"]
    options += ["--skipApiVersionCheck", "--disableTelemetry"]
    with _process("node", str(script), *options) as url:
        yield url


# Azurite's well-known account.
AZURITE = {
    "account_name": "devstoreaccount1",
    "account_key": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHB"
    "eksoGMGw==",
}


def azure_connection(url: str) -> str:
    """The connection string for Azurite's account, at `url`."""
    name, key = AZURITE.values()
    account = f"AccountName={name};AccountKey={key}"
    return f"DefaultEndpointsProtocol=http;{account};BlobEndpoint={url}/{name};"


@dataclass
class NetlifyServer:
    """`folder` is where it keeps the blobs, as files `entries/{site}/site:{store}/{key}`."""

    url: str
    token: str
    folder: Path


@contextmanager
def netlify_server() -> Generator[NetlifyServer]:
    """Netlify's own local server of blobs; any site id will do."""
    packages = _node_modules("@netlify/blobs")
    script, token = str(HERE / "netlify_server.mjs"), "a token"
    with (
        tempfile.TemporaryDirectory() as folder,
        _process("node", script, str(packages), folder, token) as url,
    ):
        yield NetlifyServer(url, token, Path(folder))


@contextmanager
def dynamodb_server() -> Generator[str]:
    """DynamoDB, by dynalite, which unlike moto checks a condition and writes at once."""
    packages = _node_modules("dynalite").parent
    with _process("node", str(HERE / "dynamodb_server.mjs"), str(packages)) as url:
        yield url


@dataclass
class LocalServer:
    """A server, which a test may kill and start again on the same files and port."""

    url: str
    port: int
    log: Path
    _command: list[str]
    _answers: Callable[[socket.socket], bool]
    _user: str | None = None
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, user=self._user, start_new_session=True
            )
        deadline = time.monotonic() + TIMEOUT_S
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._command} did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait()

    def _is_up(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                return self._answers(connection)
        except OSError:
            return False


@contextmanager
def _running(server: LocalServer) -> Generator[LocalServer]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def redis_server(
    *options: str, port: int = 0, program: str = "redis-server"
) -> Generator[LocalServer]:
    """Redis or Valkey, with a log of its writes: it may be killed, but not its host."""
    if shutil.which(program) is None:
        missing(f"{program} is not installed")

    def answers(connection: socket.socket) -> bool:
        connection.sendall(b"PING\r\n")
        return connection.recv(100).startswith(b"+PONG")

    with tempfile.TemporaryDirectory() as folder:
        port = port or free_port()
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", folder]
        command += ["--save", "", "--appendonly", "yes", *options]
        log = Path(folder, "server.log")
        url = f"redis://127.0.0.1:{port}/0"
        with _running(LocalServer(url, port, log, command, answers)) as server:
            yield server


@contextmanager
def postgresql_server(*, fsync: str = "off") -> Generator[LocalServer]:
    """PostgreSQL, for everybody; its log has each error. It may be killed, but not its host."""
    initdb = _postgresql("initdb")
    with _folder_of_nobody() as (folder, user):
        data, port = folder / "data", free_port()
        options = ["-U", "joblock", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale", "C"]
        made = [initdb, "-D", str(data), *options]
        subprocess.run(made, check=True, capture_output=True, user=user, cwd=folder)
        command = [_postgresql("postgres"), "-D", str(data), "-p", str(port), "-k", str(folder)]
        command += [
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "max_connections=200",
            "-c",
            f"fsync={fsync}",
        ]

        url = f"postgresql+psycopg://joblock@127.0.0.1:{port}/postgres"
        server = LocalServer(url, port, folder / "server.log", command, _takes_a_login, user)
        with _running(server):
            yield server


@contextmanager
def pgbouncer(database: LocalServer) -> Generator[LocalServer]:
    """PgBouncer: a connection to the database is a client's for one transaction only."""
    if shutil.which("pgbouncer") is None:
        missing("pgbouncer is not installed")
    with _folder_of_nobody() as (folder, user):
        port, config = free_port(), folder / "pgbouncer.ini"
        (folder / "users").write_text('"joblock" ""\n')
        config.write_text(
            f"[databases]\npostgres = host=127.0.0.1 port={database.port} user=joblock\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {folder / 'users'}\npool_mode = transaction\n"
            "default_pool_size = 3\n"
        )
        url = f"postgresql+psycopg://joblock@127.0.0.1:{port}/postgres"
        command = ["pgbouncer", str(config)]
        with _running(
            LocalServer(url, port, folder / "server.log", command, _takes_a_login, user)
        ) as server:
            yield server


_LOGIN = b"\0\3\0\0user\0joblock\0database\0postgres\0\0"


def _takes_a_login(connection: socket.socket) -> bool:
    """PostgreSQL answers from the start, but with an error until it has read its log."""
    connection.sendall(struct.pack("!I", len(_LOGIN) + 4) + _LOGIN)
    return connection.recv(1) == b"R"


@contextmanager
def mariadb_server() -> Generator[LocalServer]:
    """MariaDB, with Debian's default character set. It may be killed, but not its host."""
    if shutil.which("mariadbd") is None or shutil.which("mariadb-install-db") is None:
        missing("mariadb-server is not installed")
    with _folder_of_nobody() as (folder, user):
        data, port = folder / "data", free_port()
        sql = folder / "init.sql"
        sql.write_text(
            "CREATE DATABASE joblock CHARACTER SET latin1;\n"
            "CREATE USER joblock@'127.0.0.1' IDENTIFIED BY 'secret';\n"
            "GRANT ALL ON *.* TO joblock@'127.0.0.1';\n"
        )
        options = ["--no-defaults", f"--datadir={data}", *([f"--user={user}"] if user else [])]
        made = [
            "mariadb-install-db",
            *options,
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
        ]
        subprocess.run(made, check=True, capture_output=True)
        command = ["mariadbd", *options, f"--port={port}", f"--socket={folder / 'socket'}"]
        command += ["--bind-address=127.0.0.1", f"--pid-file={folder / 'pid'}"]
        command += ["--max-connections=300", "--skip-name-resolve"]
        command += ["--innodb-flush-log-at-trx-commit=2", "--skip-innodb-doublewrite"]

        def answers(connection: socket.socket) -> bool:
            return b"MariaDB" in connection.recv(100)

        url = f"mysql+pymysql://joblock:secret@127.0.0.1:{port}/joblock"
        first = [*command, f"--init-file={sql}"]
        server = LocalServer(url, port, folder / "server.log", first, answers)
        with _running(server):
            server._command = command
            yield server


@contextmanager
def _folder_of_nobody() -> Generator[tuple[Path, str | None]]:
    """For servers that refuse to run as root: its user, if this is root."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() != 0:
            yield Path(folder), None
            return
        shutil.chown(folder, "nobody")
        yield Path(folder), "nobody"


def _postgresql(program: str) -> str:
    """Debian keeps it away from the PATH, in a folder for each version."""
    found = [str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{program}")]
    on_the_path = shutil.which(program)
    found += [on_the_path] if on_the_path else []
    if not found:
        missing("postgresql is not installed")
    return found[0]


def free_port() -> int:
    """A port that nobody listens on; another may take it before it is used, but hardly does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _process(*command: str) -> Generator[str]:
    """Run a server that prints its URL, and end it with all its children."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield _printed_url(process, output.fileno())
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _printed_url(process: subprocess.Popen[bytes], output: int) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        running = process.poll() is None
        printed = os.pread(output, 100_000, 0).decode()
        url = re.search(r"http://[\w.]+:[1-9]\d*(?=\n)", printed)
        if url is not None:
            return url[0]
        if not running or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not start:\n{printed}")
        time.sleep(0.02)


def _need_module(name: str, package: str) -> None:
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        missing(f"{package} is not installed")


def _node_modules(package: str) -> Path:
    if shutil.which("node") is None:
        missing("node is not installed")
    folder = os.environ.get("JOBLOCK_NODE_MODULES")
    if not folder:
        missing("JOBLOCK_NODE_MODULES does not name a folder of npm packages")
    if not (Path(folder) / package).is_dir():
        missing(f"npm package {package} is not in JOBLOCK_NODE_MODULES")
    return Path(folder).absolute()
