"""PgBouncer in transaction mode, where it is installed."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
from pathlib import Path
from typing import Self

from .server import Server

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


class Pooler:
    """Between the proxies and the server; with few connections, so that they change hands all the time."""

    def __init__(self, server: Server, directory: Path, *, pool_size: int = 6) -> None:
        self._server = server
        self._directory = directory
        self._pool_size = pool_size
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    async def __aenter__(self) -> Self:
        host, port = self._server.address
        url = self._server.url("postgres")
        users = self._directory / "users.txt"
        users.write_text(f'"postgres" "{url.password}"\n')
        self._config = self._directory / "pgbouncer.ini"
        self._config.write_text(
            f"[databases]\n* = host={host} port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\nauth_type = plain\nauth_file = {users}\npool_mode = transaction\n"
            f"default_pool_size = {self._pool_size}\nmax_client_conn = 500\nignore_startup_parameters = "
            "extra_float_digits\nunix_socket_dir =\nserver_lifetime = 5\nquery_wait_timeout = 20\nlogfile = "
            f"{self._directory / 'pgbouncer.out'}\nadmin_users = postgres\n"
        )
        self._log = (self._directory / "pgbouncer.err").open("wb")
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop(signal.SIGKILL)
        self._log.close()

    async def _start(self) -> None:
        assert PROGRAM is not None
        arguments = [PROGRAM, "-q", str(self._config)]
        if os.geteuid() == 0:
            # It refuses to run as root.
            for path in (self._directory, *self._directory.iterdir()):
                shutil.chown(path, "nobody")
            arguments[1:1] = ["-u", "nobody"]
        self._process = await asyncio.create_subprocess_exec(
            *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        async with asyncio.timeout(10):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    async def _stop(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)
        await self._process.wait()

    async def disturb(self, chance: random.Random) -> None:
        """Reload it, pause it for a moment, or end it in one way or the other and start it again."""
        match chance.choice(["reload", "pause", "terminate", "kill"]):
            case "reload":
                self._process.send_signal(signal.SIGHUP)
            case "pause":
                self._process.send_signal(signal.SIGUSR1)
                await asyncio.sleep(chance.uniform(0.1, 0.5))
                self._process.send_signal(signal.SIGUSR2)
            case "terminate":
                await self._stop(signal.SIGTERM)
                await self._start()
            case _:
                await self._stop(signal.SIGKILL)
                await self._start()
