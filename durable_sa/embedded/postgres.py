"""The embedded server: one shared by the processes of a user, and temporary ones for tests."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from sqlalchemy import URL

from ..errors import InvalidConfiguration

if sys.platform == "win32":
    raise InvalidConfiguration("embedded", "runs on Linux and macOS only", "Set DURABLE_DATABASE_URL.")

import fcntl

from .binaries import Binaries

if TYPE_CHECKING:
    import psutil

__all__ = ["EmbeddedServer", "server", "temporary_server"]

StopMode = Literal["smart", "fast", "immediate"]

_START_SECONDS = 60
_STOP_SECONDS = 60
_SOCKET_PATH_BYTES = 100  # of 104 on macOS and 108 on Linux

_REMOVE = """
read -r _
if pid=$(head -n 1 "$0/data/postmaster.pid" 2>/dev/null); then
    kill -QUIT "$pid"
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -e "$0/data/postmaster.pid" ] && sleep 0.2; done
fi
rm -rf "$0"
"""

_mutex = threading.Lock()
_joined: dict[Path, EmbeddedServer] = {}


def server(data_dir: str | os.PathLike[str] | None = None) -> EmbeddedServer:
    """Start the user's embedded server, or join it if it is running.

    The data is kept in `data_dir`, else in `DURABLE_EMBEDDED_DIR`, else in the user's data directory (for root below
    `/var/lib`). The server listens on a unix socket that only this user can reach. The last process to exit stops it.
    If that process is killed, the server keeps running, and the next process joins and later stops it.

    Raises:
        InvalidConfiguration: the `embedded` extra is missing, or PostgreSQL does not start.
    """
    directory = _directory(data_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        remedy = "Set DURABLE_EMBEDDED_DIR to a directory in which you can write."
        raise InvalidConfiguration("embedded", f"{directory}: {error.strerror}", remedy) from None
    with _mutex, _exclusively(directory):
        shared = _joined.get(directory) or EmbeddedServer(directory / "postgres-18")
        shared.start()
        if directory not in _joined:
            # Users are counted by file locks, because the system releases the lock of a killed process.
            users = (directory / "users").open("a")
            fcntl.flock(users, fcntl.LOCK_SH)
            atexit.register(_leave, directory, users, shared)
            _joined[directory] = shared
    return shared


def keep_running(data_dir: str | os.PathLike[str] | None = None) -> EmbeddedServer:
    """Start or join the user's embedded server as `server` does, and let it run until `stop_server`.

    It then survives the last process that uses it.
    """
    shared = server(data_dir)
    _kept(_directory(data_dir)).touch()
    return shared


def stop_server(data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Stop the user's embedded server, even if other processes use it; return whether it was running."""
    directory = _directory(data_dir)
    if not directory.exists():
        return False
    with _mutex, _exclusively(directory):
        _kept(directory).unlink(missing_ok=True)
        shared = _joined.get(directory) or EmbeddedServer(directory / "postgres-18")
        return shared.stop_if_running()


@contextlib.contextmanager
def temporary_server(
    *, settings: Mapping[str, str | int] | None = None, listen: str | None = None, parent: Path | None = None
) -> Generator[EmbeddedServer]:
    """Run a private server, with its data in a temporary directory below `parent`.

    `settings` go to `postgresql.conf`. With `listen`, an address such as `127.0.0.1`, the server accepts TCP
    connections on a free port, which restarts keep, and requires the password that `url()` contains; without it, only
    connections on a unix socket. At the end the server is stopped and the data deleted, even if this process is killed.

    Raises:
        InvalidConfiguration: the `embedded` extra is missing, or PostgreSQL does not start.
    """
    directory = Path(tempfile.mkdtemp(prefix="durable-", dir=parent)).resolve()
    # The shell waits for the end of its input, which comes at the latest when this process ends.
    remover = subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE, str(directory)], stdin=subprocess.PIPE, cwd="/", start_new_session=True
    )
    with remover:
        temporary = EmbeddedServer(
            directory / "data", settings={"log_checkpoints": "off", **(settings or {})}, listen=listen
        )
        try:
            temporary.start()
            yield temporary
        finally:
            temporary.stop("immediate")


class _SocketURL(URL):
    """A URL with the directory of a socket, which needs no escapes: alembic.ini would take their % for its own."""

    def render_as_string(self, hide_password: bool = True) -> str:
        """Render the URL, with slashes as they are."""
        return super().render_as_string(hide_password).replace("%2F", "/")


class EmbeddedServer:
    """A PostgreSQL server with its data directory, created by `server()` and `temporary_server()`."""

    def __init__(
        self, data_dir: Path, *, settings: Mapping[str, str | int] | None = None, listen: str | None = None
    ) -> None:
        self.data_dir = data_dir
        self._settings = dict(settings or {})
        self._listen = listen
        self._port = _free_port(listen) if listen else 5432
        self._password = secrets.token_urlsafe() if listen else None
        self._binaries = Binaries()
        self._socket_dir = str(data_dir)

    def url(self, *, database: str = "postgres", driver: str | None = "asyncpg") -> URL:
        """Return the SQLAlchemy URL of a database on the running server, for the superuser `postgres`.

        Without a driver it is a URL for the programs of PostgreSQL, too.
        """
        name = f"postgresql+{driver}" if driver else "postgresql"
        if self._listen:
            return URL.create(name, "postgres", self._password, self._listen, self._port, database)
        query = {"host": self._socket_dir, "port": str(self._port)}
        return _SocketURL.create(name, "postgres", database=database, query=query)

    def start(self) -> None:
        """Start the server and wait until it accepts connections; does nothing if it is running.

        Raises:
            InvalidConfiguration: it does not within a minute. The message has the end of its log.
        """
        if not self.data_dir.exists():
            self._initialise()
        deadline = time.monotonic() + _START_SECONDS
        while self._postmaster() is None or self._postmaster_file()[7:] != ["ready"]:
            if time.monotonic() > deadline:
                raise self._failure("is not ready after a minute")
            if self._postmaster() is None:
                self._launch()
            else:
                time.sleep(0.02)
        self._socket_dir = self._postmaster_file()[4]

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait for its end; does nothing if it is not running.

        `smart` waits for clients to leave, `fast` disconnects them, `immediate` leaves recovery to the next start.
        After a minute the server is killed, which leaves recovery to the next start as well.

        Raises:
            InvalidConfiguration: clients stay for a minute in a `smart` stop. The message has the end of the log.
        """
        if self._postmaster() is not None:
            try:
                self._binaries.run(
                    *("pg_ctl", "stop", "-w", "-t", str(_STOP_SECONDS), "-D", str(self.data_dir), "-m", mode)
                )
            except subprocess.CalledProcessError:
                # The server may have ended by itself before pg_ctl looked for it.
                if mode == "smart" and self._postmaster() is not None:
                    raise self._failure("does not stop, as it has clients") from None
                self.kill()
            if self._socket_dir != str(self.data_dir):
                shutil.rmtree(self._socket_dir, ignore_errors=True)
        self._forget()

    def stop_if_running(self) -> bool:
        """Stop a server that any process has started; return whether it was running."""
        if self._postmaster() is None:
            return False
        self.start()  # learns the directory of its socket
        self.stop()
        return True

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server, then start it."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """Kill every process of the server at once, as a crash of the machine would."""
        import psutil

        if (postmaster := self._postmaster()) is not None:
            processes = [postmaster, *postmaster.children()]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes)

    def _launch(self) -> None:
        self._forget()
        options = {
            "unix_socket_directories": self._usable_socket_dir(),
            "listen_addresses": self._listen or "",
            "port": self._port,
        }
        arguments = shlex.join(part for key, value in options.items() for part in ("-c", f"{key}={value}"))
        log = self.data_dir / "log"
        if log.exists():
            log.replace(log.with_name("log.old"))
        try:
            self._binaries.run(
                *("pg_ctl", "start", "-w", "-t", str(_START_SECONDS), "-D", str(self.data_dir)),
                *("-l", str(log), "-o", arguments),
            )
        except subprocess.CalledProcessError:
            # An earlier start, whose process was killed, may still be in progress.
            if self._postmaster() is None:
                raise self._failure("does not start") from None

    def _forget(self) -> None:
        # Remove the files of a killed server. PostgreSQL takes them for those of a running one if the process id is
        # reused, which is likely in containers, or not yet reaped.
        for stale in ("postmaster.pid", f".s.PGSQL.{self._port}", f".s.PGSQL.{self._port}.lock"):
            (self.data_dir / stale).unlink(missing_ok=True)

    def _initialise(self) -> None:
        # The directory is renamed at the end, so that a process killed before leaves nothing that looks like a
        # database.
        fresh = self.data_dir.with_name(f"{self.data_dir.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        self._binaries.give(fresh)
        options = [f"--set={name}={value}" for name, value in self._settings.items()]
        if self._password is not None:
            password_file = self.data_dir.with_name("password")
            password_file.touch(mode=0o600)
            password_file.write_text(self._password)
            self._binaries.give(password_file)
            options.append(f"--pwfile={password_file}")
        try:
            self._binaries.run(
                *("initdb", "-D", str(fresh), "-U", "postgres", "--auth-local=trust", "--auth-host=scram-sha-256"),
                *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
                *options,
            )
        except subprocess.CalledProcessError as error:
            raise self._failure("could not be created", error.output) from None
        fresh.rename(self.data_dir)

    def _usable_socket_dir(self) -> str:
        directory = str(self.data_dir)
        short = len(os.fsencode(f"{directory}/.s.PGSQL.{self._port}")) <= _SOCKET_PATH_BYTES
        # In a URL commas and colons separate hosts and ports.
        if short and not set(directory) & set(",:"):
            return directory
        other = Path(tempfile.mkdtemp(prefix="durable-", dir="/tmp"))
        self._binaries.give(other)
        return str(other)

    def _postmaster_file(self) -> list[str]:
        """Return process id, data directory, start time, port, socket directory, address, shared memory, status."""
        with contextlib.suppress(FileNotFoundError):
            return [line.strip() for line in (self.data_dir / "postmaster.pid").read_text().splitlines()]
        return []

    def _postmaster(self) -> psutil.Process | None:
        import psutil

        try:
            process = psutil.Process(int(self._postmaster_file()[0]))
            # The id may have been reused by another program.
            return process if str(self.data_dir) in process.cmdline() else None
        except (IndexError, ValueError, psutil.Error):
            return None

    def _failure(self, problem: str, output: str | None = None) -> InvalidConfiguration:
        if output is None:
            log = self.data_dir / "log"
            output = log.read_text(errors="replace") if log.exists() else ""
        return InvalidConfiguration(
            f"embedded PostgreSQL in {self.data_dir}", problem, f"Its output:\n{output[-2000:]}"
        )


def _directory(data_dir: str | os.PathLike[str] | None) -> Path:
    """Return the directory of the user's server."""
    Binaries()  # raises if the extra is missing, before the import of platformdirs, which the extra installs
    return Path(data_dir or os.environ.get("DURABLE_EMBEDDED_DIR") or _default_directory()).expanduser().resolve()


def _kept(directory: Path) -> Path:
    """Return the file that exists while the server is to outlive the processes that use it."""
    return directory / "kept"


def _default_directory() -> Path:
    import platformdirs

    # The user that runs the server for root cannot enter root's own directories.
    return Path("/var/lib/durable_sa") if os.geteuid() == 0 else platformdirs.user_data_path("durable_sa")


@contextlib.contextmanager
def _exclusively(directory: Path) -> Generator[None]:
    """Allow one start or stop at a time, across processes."""
    with (directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _leave(directory: Path, users: IO[str], shared: EmbeddedServer) -> None:
    with _exclusively(directory):
        users.close()
        with (directory / "users").open("a") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _kept(directory).exists():
                shared.stop()


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
