"""The embedded server: shared by processes that come, go and die."""

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from alembic.config import Config
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import embedded
from durable_sa.embedded import EmbeddedServer, binaries, temporary_server
from durable_sa.errors import InvalidConfiguration
from durable_sa.testing.database import fast_directory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs Linux or macOS")


class User:
    """A process that uses the shared server until it is told to leave."""

    PROGRAM = textwrap.dedent("""
        import sys
        from durable_sa.embedded import server

        print(server(sys.argv[1]).url().render_as_string(hide_password=False), flush=True)
        sys.stdin.readline()
    """)

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", self.PROGRAM, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def url(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip() or pytest.fail(self.leave())

    def leave(self) -> str:
        _, errors = self.process.communicate("leave\n", timeout=60)
        return errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


def postmaster(directory: Path) -> psutil.Process | None:
    try:
        lines = (directory / "postgres-18" / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    return psutil.Process(int(lines[0]))


@pytest.fixture
def directory() -> Generator[Path]:
    # Not below pytest's own temporary directory, which is closed to the user that root's server runs as.
    with tempfile.TemporaryDirectory(prefix="durable-", dir=fast_directory()) as name:
        directory = Path(name).resolve()
        yield directory
        # What a failed test may have left running.
        EmbeddedServer(directory / "postgres-18").stop("immediate")


@pytest.fixture(scope="module")
def own_server() -> Generator[EmbeddedServer]:
    with temporary_server(settings={"fsync": "off", "max_connections": 17}, parent=fast_directory()) as server:
        yield server


def answer(url: URL | str, statement: str = "SELECT 1") -> object:
    engine = create_engine(sa.make_url(url).set(drivername="postgresql+psycopg2"))
    try:
        with engine.connect() as connection:
            return connection.scalar(sa.text(statement))
    finally:
        engine.dispose()


@pytest.mark.slow
def test_processes_that_start_at_once_share_one_server_and_the_last_one_stops_it(directory: Path) -> None:
    users = [User(directory) for _ in range(4)]
    urls = {user.url() for user in users}
    assert len(urls) == 1
    assert answer(urls.pop()) == 1
    assert [user.leave() for user in users[1:]] == ["", "", ""]
    assert postmaster(directory) is not None
    assert users[0].leave() == ""
    assert postmaster(directory) is None


@pytest.mark.slow
def test_a_killed_process_does_not_keep_the_server(directory: Path) -> None:
    killed, survivor = User(directory), User(directory)
    assert killed.url() == survivor.url()
    killed.kill()
    assert survivor.leave() == ""
    assert postmaster(directory) is None


@pytest.mark.slow
def test_a_server_left_behind_by_a_killed_process_is_joined_and_stopped_by_the_next(directory: Path) -> None:
    killed = User(directory)
    killed.url()
    killed.kill()
    left_behind = postmaster(directory)
    assert left_behind is not None
    following = User(directory)
    assert answer(following.url()) == 1
    assert postmaster(directory) == left_behind
    assert following.leave() == ""
    assert postmaster(directory) is None


@pytest.mark.slow
def test_a_process_killed_while_it_makes_the_database_is_survived(directory: Path) -> None:
    (directory / "postgres-18.new").mkdir()
    (directory / "postgres-18.new" / "PG_VERSION").write_text("18\n")
    user = User(directory)
    assert answer(user.url()) == 1
    assert user.leave() == ""


@pytest.mark.slow
def test_data_stays_over_a_crash_whose_process_id_is_in_use_again(directory: Path) -> None:
    user = User(directory)
    url = user.url()
    engine = create_engine(sa.make_url(url).set(drivername="postgresql+psycopg2"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE kept AS SELECT 42 AS answer"))
    engine.dispose()
    server = EmbeddedServer(directory / "postgres-18")
    server.kill()
    user.kill()
    # This process, which is alive and not PostgreSQL.
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        lock = directory / "postgres-18" / name
        lock.write_text("\n".join([str(os.getpid()), *lock.read_text().splitlines()[1:]]) + "\n")
    following = User(directory)
    assert answer(following.url(), "SELECT answer FROM kept") == 42
    assert following.leave() == ""


@pytest.mark.slow
def test_the_directory_comes_from_the_environment(directory: Path) -> None:
    program = "from durable_sa.embedded import server; print(server().data_dir)"
    environment = {**os.environ, "DURABLE_EMBEDDED_DIR": str(directory)}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == str(directory / "postgres-18")
    assert postmaster(directory) is None


@pytest.mark.slow
def test_a_path_too_long_for_a_socket(directory: Path) -> None:
    long = directory / ("long" * 30)
    user = User(long)
    url = sa.make_url(user.url())
    assert answer(url) == 1
    assert user.leave() == ""
    assert not Path(str(url.query["host"])).exists()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_the_url_works_with_both_drivers(own_server: EmbeddedServer, driver: str) -> None:
    for url in (own_server.url(driver=driver), own_server.url(driver=driver).render_as_string(hide_password=False)):
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            assert await connection.scalar(sa.text("SHOW server_version_num")) >= "180000"
        await engine.dispose()


def test_the_url_survives_alembic_ini(tmp_path: Path) -> None:
    url = EmbeddedServer(tmp_path).url(database="shop").set(drivername="postgresql+psycopg")
    config = Config()
    config.set_main_option("sqlalchemy.url", url.render_as_string(hide_password=False))
    read = config.get_main_option("sqlalchemy.url")
    assert read is not None
    assert make_url(read) == url
    ini = tmp_path / "alembic.ini"
    ini.write_text(f"[alembic]\nsqlalchemy.url = {read}\n")
    assert Config(ini).get_main_option("sqlalchemy.url") == read


def test_settings_and_environment(own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    own_server.restart()
    assert answer(own_server.url(), "SHOW fsync") == "off"
    assert answer(own_server.url(), "SHOW max_connections") == "17"
    assert answer(own_server.url(), "SHOW listen_addresses") == ""


@pytest.mark.slow
def test_tcp_needs_the_password_and_the_port_survives_restarts_and_crashes() -> None:
    with temporary_server(settings={"fsync": "off"}, listen="127.0.0.1", parent=fast_directory()) as server:
        url = server.url()
        assert answer(url, "SELECT host(inet_server_addr())") == "127.0.0.1"
        with pytest.raises(sa.exc.OperationalError, match="password authentication failed"):
            answer(url.set(password="guess"))
        for change in (server.restart, server.kill, lambda: server.stop("immediate"), server.stop):
            change()
            server.start()
            assert server.url() == url
            assert answer(url) == 1
        directory = server.data_dir.parent
    assert not directory.exists()


@pytest.mark.slow
def test_a_temporary_server_ends_with_a_killed_process() -> None:
    program = textwrap.dedent("""
        import time
        from durable_sa.embedded import temporary_server

        with temporary_server() as server:
            print(server.data_dir, flush=True)
            time.sleep(600)
    """)
    user = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None
    data = Path(user.stdout.readline().strip())
    server = psutil.Process(int((data / "postmaster.pid").read_text().splitlines()[0]))
    user.kill()
    user.communicate()
    deadline = time.monotonic() + 60
    while data.parent.exists() or (server.is_running() and server.status() != psutil.STATUS_ZOMBIE):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_ends_before_it_is_stopped_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    run = binaries.Binaries.run

    def run_late(self: binaries.Binaries, program: str, *arguments: str) -> None:
        server.kill()
        run(self, program, *arguments)

    with temporary_server(settings={"fsync": "off"}, parent=fast_directory()) as server:
        monkeypatch.setattr(binaries.Binaries, "run", run_late)
        server.stop()
        monkeypatch.undo()
        server.start()
        assert answer(server.url()) == 1


@pytest.mark.slow
def test_a_server_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpointer is stopped, so that a fast stop, which waits for a last checkpoint, never ends."""
    monkeypatch.setattr("durable_sa.embedded.postgres._STOP_SECONDS", 1)
    with temporary_server(settings={"fsync": "off"}, parent=fast_directory()) as server:
        postmaster = psutil.Process(int((server.data_dir / "postmaster.pid").read_text().splitlines()[0]))
        checkpointer = next(each for each in postmaster.children() if "checkpointer" in " ".join(each.cmdline()))
        checkpointer.suspend()
        server.stop()
        assert not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE
        server.start()
        assert answer(server.url()) == 1


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(InvalidConfiguration, match=r"(?s)could not be created.*unrecognized configuration parameter"),
        temporary_server(settings={"no_such_setting": 1}),
    ):
        pass


@pytest.mark.slow
def test_a_start_that_fails_shows_the_log() -> None:
    with temporary_server(settings={"fsync": "off"}, parent=fast_directory()) as server:
        server.stop()
        with (server.data_dir / "postgresql.conf").open("a") as settings:
            settings.write("shared_buffers = -5\n")
        with pytest.raises(InvalidConfiguration, match=r"(?s)does not start.*shared_buffers"):
            server.start()


def test_a_directory_in_which_nothing_can_be_written() -> None:
    with pytest.raises(InvalidConfiguration, match=r"embedded: /proc/x: .*Set DURABLE_EMBEDDED_DIR"):
        embedded.server("/proc/x")


def test_without_the_extra_the_error_says_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "find_spec", lambda name: None)
    with pytest.raises(InvalidConfiguration, match=r"durable_sa\[embedded\].*DURABLE_DATABASE_URL"):
        embedded.server(directory)
