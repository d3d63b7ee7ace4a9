"""A server of its own with the pg_cron extension, whose clock may be set."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from datetime import datetime
from pathlib import Path

from sqlalchemy import URL

from durable_sa.testing.database import fast_directory

DATABASE = "scheduled"


def programs() -> Path | None:
    """The programs of a server that has the extension."""
    for library in sorted(Path("/usr/lib/postgresql").glob("*/lib/pg_cron.so"), reverse=True):
        return library.parents[1] / "bin"
    return None


def _as_somebody() -> list[str] | None:
    """How to run a program as a user who may run a server; None if there is none."""
    if os.geteuid() != 0:
        return []
    with contextlib.suppress(KeyError):
        user = pwd.getpwnam("postgres")
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return None


def why_not() -> str | None:
    """Why no such server can be started; None if one can."""
    if programs() is None:
        return "no server with pg_cron is installed: apt-get install postgresql-15 postgresql-15-cron"
    return None if _as_somebody() is not None else "root may not run a server, and there is no user 'postgres'"


@contextlib.contextmanager
def server(now: datetime | None = None) -> Generator[URL]:
    """Run one, from some time on, which takes `faketime`; gives the URL of the extension's database."""
    binaries, somebody = programs(), _as_somebody()
    assert binaries is not None
    assert somebody is not None
    directory = Path(tempfile.mkdtemp(prefix="durable-pgcron-", dir=fast_directory()))
    if somebody:
        shutil.chown(directory, "postgres", "postgres")
    data = directory / "data"

    def run(program: str, *arguments: str, **environment: str) -> None:
        # Not in the environment of setpriv itself, which is somebody else to begin with.
        variables = [f"{name}={value}" for name, value in environment.items()]
        command = [*somebody, "env", *variables, str(binaries / program), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60)

    settings = {
        "shared_preload_libraries": "pg_cron",
        "cron.database_name": DATABASE,
        "cron.use_background_workers": "on",
        "max_worker_processes": "20",
        "unix_socket_directories": str(directory),
        "listen_addresses": "",
        "fsync": "off",
    }
    try:
        run("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync")
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        environment = {}
        if now is not None:
            environment = {
                "LD_PRELOAD": str(faketime()),
                "FAKETIME": f"{now.timestamp() - time.time():+.3f}",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        run("pg_ctl", "-D", str(data), "-w", "-l", str(directory / "log"), "start", **environment)
        try:
            run("createdb", "-h", str(directory), "-U", "postgres", DATABASE)
            yield URL.create(
                "postgresql+asyncpg", "postgres", database=DATABASE, query={"host": str(directory), "port": "5432"}
            )
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def faketime() -> Path | None:
    """The library that lies about the time."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
