"""A run of the benchmarks: the server, the drivers, the profile and the results."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from .catalogue import REFERENCE, System
from .driver import Driver
from .environments import ROOT, environment
from .profiles import Profile
from .results import Results
from .server import Server

INSTALL_SECONDS = 120


class Bench:
    """Starts drivers on demand and keeps them for all rounds of a group of workloads.

    `directory` receives the drivers' logs.
    """

    def __init__(self, profile: Profile, server: Server, results: Results, directory: Path) -> None:
        self.profile = profile
        self.server = server
        self.results = results
        self._directory = directory
        self._pythons: dict[str, Path] = {}
        self._drivers: dict[tuple[str, str, int], Driver] = {}
        self.kept: dict[str, Any] = {}
        """The objects that a workload keeps from one round to the next."""
        (directory / "benchmarks").symlink_to(ROOT / "benchmarks")

    async def driver(self, system: System, loop: str, index: int = 0) -> Driver:
        """Return a driver of a system; `index` distinguishes drivers with the same event loop."""
        key = (system.name, loop, index)
        if key not in self._drivers:
            self._drivers[key] = await Driver.start(
                self._pythons[system.name], system, loop, self._directory, self.server.programs.directory
            )
        return self._drivers[key]

    async def install(self, system: System) -> dict[str, Any]:
        """Make the environment and the template database of a system; return its versions."""
        python = await asyncio.to_thread(environment, system.driver, system.requirements)
        self._pythons[system.name] = python
        name = await self.server.make_template(system.name)
        driver = await self.driver(system, "asyncio")
        async with asyncio.timeout(INSTALL_SECONDS):
            await driver.call("install", url=self.server.url(name))
        if system.driver == REFERENCE:
            source = Path(await driver.call("source"))
            if not source.is_relative_to(system.checkout):
                raise RuntimeError(f"the driver has imported {source} instead of {system.checkout}")
        await self.dismiss(system)
        return driver.facts

    def cpu_seconds(self, system: System) -> float:
        """Return the CPU time of a system's running drivers."""
        return sum(driver.cpu_seconds for key, driver in self._drivers.items() if key[0] == system.name)

    async def dismiss(self, system: System | None = None) -> None:
        """Stop the drivers of a system, or of all systems."""
        for key in [key for key in self._drivers if system is None or key[0] == system.name]:
            await self._drivers.pop(key).stop()
