"""SqliteBlobStore as an operator meets it: bad files, full disks, forks, kills, old databases."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import joblock
from joblock.stores import sqlite
from joblock.stores.sqlite import SqliteBlobStore, _own
from tests.support import KEY, UID, VAULT, acquired, held


def run_python(
    code: str, path: Path, preexec_fn: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` on `path` in another process, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(path)],
        capture_output=True,
        check=False,
        preexec_fn=preexec_fn,
        text=True,
        timeout=60,
    )


def assert_intact(path: Path) -> None:
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


class TestAFileThatCannotBeUsed:
    """A clear error that names the path, at once: from the constructor."""

    def test_missing_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "missing" / "jobs.db"
        with pytest.raises(sqlite3.OperationalError, match=f"^{path}: .*no such folder"):
            SqliteBlobStore(path)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(sqlite3.OperationalError, match=f"^{tmp_path}: unable to open"):
            SqliteBlobStore(tmp_path)

    def test_not_a_database(self, tmp_path: Path) -> None:
        path = tmp_path / "jobs.db"
        path.write_text("these are somebody's notes\n" * 100)
        with pytest.raises(sqlite3.DatabaseError, match=f"^{path}: file is not a database"):
            SqliteBlobStore(path)
        assert path.read_text() == "these are somebody's notes\n" * 100

    @pytest.mark.parametrize("name", ["x" * 5000, "nul\x00"], ids=["long", "nul"])
    def test_a_folder_that_cannot_be(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(sqlite3.OperationalError, match="no such folder"):
            SqliteBlobStore(tmp_path / name / "jobs.db")

    @pytest.mark.parametrize("columns", ["key, value, etag", "key PRIMARY KEY, value", "x"])
    def test_a_table_of_another_making(self, tmp_path: Path, columns: str) -> None:
        """Without its primary key two jobs would win."""
        path = tmp_path / "jobs.db"
        other = sqlite3.connect(path)
        other.execute(f"CREATE TABLE joblock ({columns})")
        other.close()
        with pytest.raises(sqlite3.DatabaseError, match=f"^{path}: its table joblock is not"):
            SqliteBlobStore(path)

    @pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), 1e7])
    def test_a_timeout_that_sqlite_cannot_count(self, tmp_path: Path, timeout: float) -> None:
        """It would not wait at all."""
        with pytest.raises(ValueError, match="^timeout must be 0 to"):
            SqliteBlobStore(tmp_path / "jobs.db", timeout=timeout)

    @pytest.mark.parametrize("path", ["", ":memory:"])
    def test_no_file_at_all(self, path: str) -> None:
        with pytest.raises(ValueError, match="use MemoryBlobStore"):
            SqliteBlobStore(path)

    @pytest.mark.parametrize("what", ["file", "folder"])
    def test_read_only(self, what: str) -> None:
        """The process is not root, whom no permission stops."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "jobs.db"
            if what == "file":
                SqliteBlobStore(path).close()
                path.chmod(0o444)
            folder.chmod(0o555)
            result = run_python(
                """
                import os, sqlite3, sys
                from joblock.stores.sqlite import SqliteBlobStore
                if os.getuid() == 0:
                    os.setgid(65534); os.setuid(65534)
                try:
                    SqliteBlobStore(sys.argv[1])
                except sqlite3.OperationalError as error:
                    print(error)
                """,
                path,
            )
            folder.chmod(0o755)
        assert result.stderr == ""
        assert result.stdout.startswith(f"{path}: ")
        assert "readonly" in result.stdout or "unable to open" in result.stdout

    def test_full_disk(self, tmp_path: Path) -> None:
        """A limit on the file's size stands for the disk; the error names the path, then too."""

        def no_more_than_64_kib() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

        result = run_python(
            """
            import sqlite3, sys
            from joblock.stores.sqlite import SqliteBlobStore
            with SqliteBlobStore(sys.argv[1]) as store:
                assert store.set_if_new("small", "x")
                try:
                    store.set_if_new("big", "x" * 100_000)
                except sqlite3.OperationalError as error:
                    print(error)
                assert store.get("big") is None
                assert store.get("small") == "x"
            """,
            tmp_path / "jobs.db",
            preexec_fn=no_more_than_64_kib,
        )
        assert result.stderr == ""
        assert result.stdout.startswith(
            f"{tmp_path / 'jobs.db'}: d"
        )  # disk is full, disk I/O error

    def test_locked_by_another_program_for_longer_than_the_timeout(self, tmp_path: Path) -> None:
        """No endless wait, neither when opening nor when writing."""
        path = tmp_path / "jobs.db"
        with SqliteBlobStore(path, timeout=0.05) as store:
            assert store.get(KEY) is None
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match=f"^{path}: database is locked"):
                store.set(KEY, "x")
            with pytest.raises(sqlite3.OperationalError, match=f"^{path}: database is locked"):
                SqliteBlobStore(path, timeout=0.05)
            assert store.get(KEY) is None
            other.execute("ROLLBACK")
            other.close()
            store.set(KEY, "x")


def test_open_waits_for_a_program_that_writes_for_a_moment(tmp_path: Path) -> None:
    """SQLite itself does not wait its timeout to switch a file to WAL that is being written."""
    path = tmp_path / "jobs.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.1, lambda: other.execute("COMMIT"))
    timer.start()
    with SqliteBlobStore(path) as store:
        assert store.set_if_new(KEY, "x")
    timer.join()
    other.close()


def test_a_call_does_not_wait_for_other_threads_longer_than_the_timeout(tmp_path: Path) -> None:
    """However many of them queue behind a file that another program has locked."""
    path = tmp_path / "jobs.db"
    with SqliteBlobStore(path, timeout=0.05) as store:
        entered, leave = threading.Event(), threading.Event()

        def occupy() -> None:
            with _own(store._locks):
                entered.set()
                leave.wait(30)

        thread = threading.Thread(target=occupy)
        thread.start()
        entered.wait(30)
        with pytest.raises(sqlite3.OperationalError, match=f"^{path}: .*another thread"):
            store.get(KEY)
        leave.set()
        thread.join()
        assert store.get(KEY) is None


def test_a_copy_is_a_store_of_its_own(tmp_path: Path) -> None:
    """On the same file, with a connection of its own: so it can be sent to a worker process."""
    with SqliteBlobStore(tmp_path / "jobs.db", timeout=3) as store:
        store.set(KEY, "x")
        for other in (copy.copy(store), pickle.loads(pickle.dumps(store))):  # noqa: S301
            assert other.get(KEY) == "x"
            assert other._timeout == 3
            other.close()
        assert store.get(KEY) == "x"


def test_settings(tmp_path: Path) -> None:
    """WAL, synchronous=NORMAL, and a table of its own beside others'."""
    path = tmp_path / "app.db"
    with sqlite3.connect(path) as app:
        app.execute("CREATE TABLE blobs (x)")
    app.close()
    with SqliteBlobStore(path) as store:
        store.set(KEY, "x")
        connection = store._connection
        assert connection is not None
        assert connection.execute("PRAGMA journal_mode").fetchone() == (b"wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
        assert connection.execute("SELECT key, value FROM joblock").fetchall() == [
            (KEY.encode(), b"x")
        ]


def test_close_and_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind, a closed store says so, and a relative path keeps its meaning."""
    path = tmp_path / "jobs.db"
    monkeypatch.chdir(tmp_path)
    with SqliteBlobStore("jobs.db") as store:
        monkeypatch.chdir("/")
        store.set(KEY, "x")
        assert repr(store) == f"SqliteBlobStore({str(path)!r})"
    store.close()
    with pytest.raises(sqlite3.ProgrammingError, match=f"^{path}: the store is closed"):
        store.get(KEY)
    with pytest.raises(sqlite3.ProgrammingError, match=f"^{path}: the store is closed"):
        store.set_if_new(KEY, "x")
    assert [file.name for file in tmp_path.iterdir()] == ["jobs.db"]
    with SqliteBlobStore(path) as again:
        assert again.get(KEY) == "x"


def test_a_store_that_nobody_closes_warns_nobody(tmp_path: Path) -> None:
    """One in a module's global is the usual way to have one."""
    result = run_python(
        """
        import gc, sys
        from joblock.stores.sqlite import SqliteBlobStore
        SqliteBlobStore(sys.argv[1]).set("k", "x")
        gc.collect()
        kept = SqliteBlobStore(sys.argv[1])
        """,
        tmp_path / "jobs.db",
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_text_that_others_wrote_and_that_is_not_utf8_is_no_record(tmp_path: Path) -> None:
    """An operator with the sqlite3 shell must not break the service."""
    path = tmp_path / "jobs.db"
    with SqliteBlobStore(path) as store:
        for literal in ("CAST(x'ff7b7d' AS TEXT)", "x'ff7b7d'", "x'7b7d'", "5"):
            other = sqlite3.connect(path, isolation_level=None)
            other.execute(f"REPLACE INTO joblock VALUES (?, {literal}, 'e')", [KEY])  # noqa: S608
            other.close()
            joblock.peek_job_lock(store, UID, VAULT)
            assert joblock.acquire_job_lock(store, UID, VAULT).acquired


class TestASignalHandlerThatRaises:
    """Ctrl-C, or a time limit: at any moment, and nothing stays locked."""

    def test_in_a_call(self, tmp_path: Path) -> None:
        """Whenever it comes, other threads can use the store afterwards."""
        result = run_python(
            """
            import random, signal, sys, threading
            from joblock.stores.sqlite import SqliteBlobStore

            class TimeLimit(Exception):
                pass

            def end(*_):
                raise TimeLimit

            signal.signal(signal.SIGALRM, end)
            with SqliteBlobStore(sys.argv[1], timeout=0) as store:
                store.get("k")
                for _ in range(1000):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, random.uniform(20e-6, 200e-6))
                        while True:
                            store.get("k")
                    except TimeLimit:
                        pass
                other = threading.Thread(target=lambda: print(store.get("k")))
                other.start()
                other.join()
            """,
            tmp_path / "jobs.db",
        )
        assert (result.stdout, result.stderr) == ("None\n", "")

    def test_in_the_opening(self, tmp_path: Path) -> None:
        """While another program writes: the connection is closed, whoever keeps the exception."""
        result = run_python(
            """
            import os, signal, sqlite3, sys, threading
            from joblock.stores.sqlite import SqliteBlobStore

            SqliteBlobStore(sys.argv[1]).close()
            writer = sqlite3.connect(sys.argv[1], isolation_level=None, check_same_thread=False)
            writer.execute("BEGIN IMMEDIATE")
            interrupted = threading.Event()

            def note(*_):
                interrupted.set()
                raise KeyboardInterrupt

            signal.signal(signal.SIGINT, note)

            def interrupt_then_end_writing():
                os.kill(os.getpid(), signal.SIGINT)
                writer.execute("COMMIT")

            timer = threading.Timer(0.1, interrupt_then_end_writing)
            timer.start()
            try:
                SqliteBlobStore(sys.argv[1])
            except KeyboardInterrupt as error:
                kept = error
            timer.join()
            assert interrupted.is_set()
            writer.execute("BEGIN IMMEDIATE")
            writer.close()
            print("free", type(kept).__name__)
            """,
            tmp_path / "jobs.db",
        )
        assert (result.stdout, result.stderr) == ("free KeyboardInterrupt\n", "")


class TestFork:
    """A child has the same store, but never its parent's connection."""

    def test_parent_and_child_go_on(self, tmp_path: Path) -> None:
        """Both before and after; the child sees the parent's lock and the reverse."""
        path = tmp_path / "jobs.db"
        with SqliteBlobStore(path) as store:
            mine = acquired(joblock.acquire_job_lock(store, UID, VAULT))
            fork = multiprocessing.get_context("fork")
            ours, theirs = fork.Pipe()

            def child() -> None:
                theirs.send(held(joblock.acquire_job_lock(store, UID, VAULT)).existing)
                theirs.send(acquired(joblock.acquire_job_lock(store, UID, "Child")).job_id)

            process = fork.Process(target=child)
            process.start()
            assert ours.recv() == mine.record
            childs_job = ours.recv()
            process.join()
            assert process.exitcode == 0
            assert held(joblock.acquire_job_lock(store, UID, "Child")).existing.job_id == childs_job
            released = joblock.release_job_lock(
                store, UID, VAULT, expected_job_id=mine.job_id, etag=mine.etag
            )
            assert released.released
        assert_intact(path)

    def test_no_connection_is_inherited(self, tmp_path: Path) -> None:
        """SQLite forbids even to close it in the child."""
        result = run_python(
            """
            import os, sys
            from pathlib import Path
            from joblock.stores.sqlite import SqliteBlobStore

            def opened():
                fds = Path("/proc/self/fd").iterdir()
                return [fd for fd in fds if fd.resolve() == Path(sys.argv[1])]

            store = SqliteBlobStore(sys.argv[1])
            assert len(opened()) == 0
            store.get("k")
            assert len(opened()) == 1
            pid = os.fork()
            if pid == 0:
                os._exit(len(opened()))
            assert os.waitpid(pid, 0)[1] == 0
            assert store.set_if_new("k", "x")
            """,
            tmp_path / "jobs.db",
        )
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.slow
    def test_while_other_threads_use_the_store(self, tmp_path: Path) -> None:
        """No child inherits a lock that nobody releases, nor a statement half done."""
        result = run_python(
            """
            import os, sys, threading, warnings
            import joblock
            from joblock.stores.sqlite import SqliteBlobStore
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: on purpose
            store = SqliteBlobStore(sys.argv[1])
            stop = threading.Event()
            def work(n):
                while not stop.is_set():
                    won = joblock.acquire_job_lock(store, "thread", str(n))
                    assert won.acquired
                    assert joblock.release_job_lock(
                        store, "thread", str(n), expected_job_id=won.job_id, etag=won.etag)
                    SqliteBlobStore(sys.argv[1]).close()
            threads = [threading.Thread(target=work, args=[n]) for n in range(4)]
            for thread in threads: thread.start()
            for round in range(40):
                pid = os.fork()
                if pid == 0:
                    ok = joblock.acquire_job_lock(store, "child", str(round)).acquired
                    os._exit(0 if ok else 1)
                assert os.waitpid(pid, 0)[1] == 0
                assert not joblock.acquire_job_lock(store, "child", str(round)).acquired
            stop.set()
            for thread in threads: thread.join()
            store.close()
            print("done")
            """,
            tmp_path / "jobs.db",
        )
        assert (result.stderr, result.stdout) == ("", "done\n")
        assert_intact(tmp_path / "jobs.db")

    def test_in_a_signal_handler_during_a_write(self, tmp_path: Path) -> None:
        """A handler that starts a child must not make a write that took effect look failed."""
        result = run_python(
            """
            import os, signal, sqlite3, sys, threading, time, warnings
            from joblock.stores.sqlite import SqliteBlobStore
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: on purpose
            store = SqliteBlobStore(sys.argv[1])
            other = sqlite3.connect(sys.argv[1], isolation_level=None, check_same_thread=False)
            other.execute("BEGIN IMMEDIATE")
            def fork(*_):
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                os.waitpid(pid, 0)
            signal.signal(signal.SIGALRM, fork)
            timer = threading.Timer(0.1, other.execute, ["COMMIT"])
            timer.start()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            etag = store.set_if_new("k", "x")
            timer.join()
            assert store.get_with_etag("k").etag == etag
            other.close()
            """,
            tmp_path / "jobs.db",
        )
        assert (result.returncode, result.stderr) == (0, "")

    def test_a_child_that_ends_as_python_ends(self, tmp_path: Path) -> None:
        """With finalization, which closes what it finds: the parent must not notice."""
        result = run_python(
            """
            import os, sys
            from joblock.stores.sqlite import SqliteBlobStore
            store = SqliteBlobStore(sys.argv[1])
            store.set("k", "parent")
            pid = os.fork()
            if pid == 0:
                assert store.get("k") == "parent"
                sys.exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
            assert store.get_with_etag("k").value == "parent"
            store.set("k", "again")
            """,
            tmp_path / "jobs.db",
        )
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_many_processes_create_the_same_file_at_once(tmp_path: Path) -> None:
    """The switch to WAL and the table are made by all of them, and none fails."""
    spawn = multiprocessing.get_context("fork")
    for round_ in range(15):
        path = tmp_path / f"jobs{round_}.db"
        barrier = spawn.Barrier(12)

        def open_it(path: Path = path, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with SqliteBlobStore(path) as store:
                assert store.set_if_new(str(os.getpid()), "x")

        processes = [spawn.Process(target=open_it) for _ in range(12)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 12
        with SqliteBlobStore(path) as store:
            assert all(store.get(str(process.pid)) == "x" for process in processes)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    code = """
        import sys, joblock
        from joblock.stores.sqlite import SqliteBlobStore
        store = SqliteBlobStore(sys.argv[1])
        print(joblock.acquire_job_lock(store, "user-1", "Business").job_id, flush=True)
        while True:
            store.set("busy", "x" * 1000)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "jobs.db")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_a_lock_survives_the_sigkill_of_its_owner(
    tmp_path: Path, victim: subprocess.Popen[str]
) -> None:
    """In the middle of writing; the file stays sound and the lease holds until its deadline."""
    assert victim.stdout is not None
    job_id = victim.stdout.readline().strip()
    victim.kill()
    victim.wait()
    with SqliteBlobStore(tmp_path / "jobs.db") as store:
        existing = held(joblock.acquire_job_lock(store, UID, VAULT)).existing
        assert existing.job_id == job_id
        assert existing.expires_at is not None
        deadline = existing.expires_at
        later = acquired(joblock.acquire_job_lock(store, UID, VAULT, clock=lambda: deadline))
        assert later.took_over == existing
    assert_intact(tmp_path / "jobs.db")


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="this system has no users")
class TestSeveralUsers:
    """One user's look at the file must not take it from its owner."""

    @pytest.fixture
    def shared(self) -> Iterator[Path]:
        if os.getuid() != 0:
            pytest.skip("only root can become two users")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o777)
            yield folder / "jobs.db"

    LOOK = """
    import os, sqlite3, sys, joblock
    from joblock.stores.sqlite import SqliteBlobStore
    os.setgid(65534); os.setuid(65534)
    try:
        print(joblock.peek_job_lock(SqliteBlobStore(sys.argv[1]), "u", "v"))
    except sqlite3.OperationalError as error:
        print(error)
    """

    def test_who_may_not_write_leaves_nothing_behind(self, shared: Path) -> None:
        """It is told what is wrong; the owner's jobs go on."""
        with SqliteBlobStore(shared) as store:
            assert joblock.acquire_job_lock(store, "u", "v")
        assert [path.name for path in shared.parent.iterdir()] == ["jobs.db"]
        looked = run_python(self.LOOK, shared)
        assert (looked.returncode, looked.stderr) == (0, "")
        assert looked.stdout == f"{shared}: readonly: this user may not write the file\n"
        assert [path.name for path in shared.parent.iterdir()] == ["jobs.db"]
        owner = """
        import os, sys, joblock
        from joblock.stores.sqlite import SqliteBlobStore
        os.setgid(1); os.setuid(1)
        assert joblock.release_job_lock(SqliteBlobStore(sys.argv[1]), "u", "v")
        """
        os.chown(shared, 1, 1)
        worked = run_python(owner, shared)
        assert (worked.returncode, worked.stderr) == (0, "")

    def test_a_file_beside_it_that_is_anothers(self, shared: Path) -> None:
        """As an earlier version left them: SQLite says so, and it stays as it is."""
        SqliteBlobStore(shared).close()
        shared.chmod(0o666)
        shared.with_name("jobs.db-wal").touch(mode=0o644)
        looked = run_python(self.LOOK, shared)
        assert looked.stdout.startswith(f"{shared}: ")
        assert looked.stderr == ""
        assert shared.with_name("jobs.db-wal").stat().st_uid == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
class TestAForkThatPythonIsNotToldOf:
    """As uWSGI's and other C code's; tests/integration/test_uwsgi.py has the real one."""

    def test_a_store_that_was_only_made_works_in_each(self, tmp_path: Path) -> None:
        """One winner of ten rounds each."""
        result = run_python(
            """
            import ctypes, os, sys, joblock
            from joblock.stores.sqlite import SqliteBlobStore
            store = SqliteBlobStore(sys.argv[1])
            fork = ctypes.CDLL(None).fork
            children = []
            for _ in range(4):
                child = fork()
                if child == 0:
                    won = [bool(joblock.acquire_job_lock(store, "u", str(n))) for n in range(10)]
                    os._exit(sum(won))
                children.append(child)
            print(sum(os.waitstatus_to_exitcode(os.waitpid(it, 0)[1]) for it in children))
            """,
            tmp_path / "jobs.db",
        )
        assert (result.stdout, result.stderr) == ("10\n", "")

    def test_a_store_that_was_used_before_is_refused(self, tmp_path: Path) -> None:
        """SQLite would take the parent's locks for the child's; it names the remedy."""
        result = run_python(
            """
            import ctypes, os, sqlite3, sys, joblock
            from joblock.stores.sqlite import SqliteBlobStore
            store = SqliteBlobStore(sys.argv[1])
            won = joblock.acquire_job_lock(store, "u", "v")
            child = ctypes.CDLL(None).fork()
            if child == 0:
                try:
                    store.get("k")
                except sqlite3.ProgrammingError as error:
                    print(error, flush=True)
                store.close()
                os._exit(0)
            os.waitpid(child, 0)
            print(joblock.release_job_lock(store, "u", "v", expected_job_id=won.job_id).released)
            """,
            tmp_path / "jobs.db",
        )
        assert "--lazy-apps" in result.stdout
        assert result.stdout.endswith("\nTrue\n")
        assert result.stderr == ""

    def test_a_lock_that_another_thread_had_is_not_waited_for(self, tmp_path: Path) -> None:
        """Neither the store's nor that of all stores."""
        result = run_python(
            """
            import ctypes, os, sys
            from joblock.stores import sqlite
            store = sqlite.SqliteBlobStore(sys.argv[1])
            with sqlite._own(store._locks), sqlite._own(sqlite._registry):
                pid = ctypes.CDLL(None).fork()
                if pid == 0:
                    import threading
                    def use():
                        sqlite.SqliteBlobStore(sys.argv[1] + "2").set("k", "x")
                        store.set("k", "x")
                    thread = threading.Thread(target=use, daemon=True)
                    thread.start()
                    thread.join(30)
                    os._exit(thread.is_alive())
                print(os.waitpid(pid, 0)[1])
            """,
            tmp_path / "jobs.db",
        )
        assert (result.stdout, result.stderr) == ("0\n", "")

    def test_the_hook_alone_releases_nothing(self) -> None:
        """With uWSGI's --py-call-osafterfork only the last of Python's hooks is called."""
        sqlite._after_fork()
        sqlite._after_fork()


def test_an_exception_during_a_read_leaves_no_statement_open(tmp_path: Path) -> None:
    """While it is kept, the file is not read as it was then, and nobody waits to write.

    In a process of its own: a tracer that is put in the place of coverage's can crash Python 3.12.
    """
    result = run_python(
        """
        import sqlite3, sys
        from joblock.stores.sqlite import SqliteBlobStore

        class Interrupt(Exception):
            pass

        kept = []
        with SqliteBlobStore(sys.argv[1]) as store, SqliteBlobStore(sys.argv[1]) as other:
            store.set("k", "0")
            for step in range(1, 80):
                left = step

                def trace(frame, event, arg):
                    global left
                    frame.f_trace_opcodes = sys.version_info[:2] != (3, 12)
                    left -= 1
                    if left == 0:
                        raise Interrupt
                    return trace

                sys.settrace(trace)
                try:
                    store.get_with_etag("k")
                except Interrupt as error:
                    kept.append(error)
                finally:
                    sys.settrace(None)
                other.set("k", str(step))
                assert store.get("k") == str(step)
                checking = sqlite3.connect(sys.argv[1], isolation_level=None)
                busy, *_ = checking.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                checking.close()
                assert busy == 0, "a statement is still open"
        print(len(kept) > 10)
        """,
        tmp_path / "jobs.db",
    )
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_a_connection_of_another_process_is_left_alone(tmp_path: Path) -> None:
    """Neither used nor closed, also when the store is."""
    store = SqliteBlobStore(tmp_path / "jobs.db")
    store.get(KEY)
    connection = store._connection
    assert connection is not None
    store._connected_by = os.getppid()
    with pytest.raises(sqlite3.ProgrammingError, match="--lazy-apps"):
        store.get(KEY)
    store.close()
    assert sqlite._parents.pop() is connection
    assert connection.execute("SELECT 1").fetchone() == (1,)
    connection.close()


def test_who_may_not_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is opened."""
    SqliteBlobStore(tmp_path / "jobs.db").close()

    def may_only_look(_path: object, mode: int, **_: bool) -> bool:
        return mode == os.F_OK

    monkeypatch.setattr(os, "access", may_only_look)
    with pytest.raises(sqlite3.OperationalError, match="readonly: this user may not write"):
        SqliteBlobStore(tmp_path / "jobs.db")
