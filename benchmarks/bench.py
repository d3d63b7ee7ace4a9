"""A run of the benchmarks: its server, the drivers that are up, and what was measured so far."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from .catalogue import System
from .driver import Driver
from .profiles import Profile
from .results import Results
from .server import Server

INSTALL_SECONDS = 120


class Bench:
    """Hands out drivers, each started when it is first asked for and kept for the rounds of a workload."""

    def __init__(
        self, profile: Profile, server: Server, results: Results, pythons: dict[str, Path], directory: Path
    ) -> None:
        self.profile = profile
        self.server = server
        self.results = results
        self._pythons = pythons
        self._directory = directory
        self._drivers: dict[tuple[str, str, int], Driver] = {}
        self.kept: dict[str, Any] = {}
        """What a workload keeps from one round to the next."""

    async def driver(self, system: System, loop: str, index: int = 0) -> Driver:
        """The driver of that number of a system, in an event loop of that kind."""
        key = (system.name, loop, index)
        if key not in self._drivers:
            log = self._directory / f"{system.name}.log"
            path = str(self.server.programs.directory)
            self._drivers[key] = await Driver.start(self._pythons[system.name], system.name, loop, log, path)
        return self._drivers[key]

    async def install(self, system: System) -> dict[str, Any]:
        """Make the template database of a system; its versions."""
        name = await self.server.make_template(system.name)
        driver = await self.driver(system, "asyncio")
        async with asyncio.timeout(INSTALL_SECONDS):
            await driver.call("install", url=self.server.url(name))
        facts = driver.facts
        await self.dismiss(system)
        return facts

    async def dismiss(self, system: System | None = None) -> None:
        """End the drivers of a system, or all."""
        for key in [key for key in self._drivers if system is None or key[0] == system.name]:
            await self._drivers.pop(key).stop()
