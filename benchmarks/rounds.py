"""The rounds of a run: in each, every case runs with one system after the other."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Sequence

from rich.console import Console

from .bench import Bench
from .catalogue import System
from .results import Failure
from .workloads.common import Case

FAILURES_ALLOWED = 2
"""Failures of a system in a case before the remaining rounds leave it out."""


class Rounds:
    """Runs the cases and adds their figures and failures to the results."""

    def __init__(self, bench: Bench, console: Console, systems: Sequence[System]) -> None:
        self._bench = bench
        self._console = console
        self._systems = systems

    async def run(self, groups: list[list[Case]], after: Callable[[], None]) -> None:
        """Run one group after the other, and call `after` when a group is complete."""
        for group in groups:
            await self._run_group([case for case in group if not case.once], 1 + self._bench.profile.rounds)
            await self._run_group([case for case in group if case.once], 1)
            after()

    async def _run_group(self, cases: list[Case], rounds: int) -> None:
        try:
            for number in range(rounds):
                for case in cases:
                    # The order alternates, so that no system always runs just after the same other one.
                    for system in self._systems[:: -1 if number % 2 else 1]:
                        if self._takes_part(system, case):
                            await self._run(case, system, number, warm_up=rounds > 1 and number == 0)
        finally:
            await self._bench.dismiss()
            for _, stack in self._bench.kept.values():
                await stack.aclose()
            self._bench.kept.clear()

    def _takes_part(self, system: System, case: Case) -> bool:
        failures = [
            failure
            for failure in self._bench.results.failures
            if (failure.workload, failure.variant, failure.system) == (case.workload, case.variant, system.name)
        ]
        able = case.needs in system.offers and (case.systems is None or system.driver in case.systems)
        return able and len(failures) < FAILURES_ALLOWED

    async def _run(self, case: Case, system: System, number: int, *, warm_up: bool) -> None:
        what = f"{case.workload}, {case.variant}: {system.title}"
        try:
            async with asyncio.timeout(None if case.once else self._bench.profile.patience):
                outcome = await case.run(self._bench, system)
        except Exception as error:  # noqa: BLE001 - a failed run is reported, and the other runs continue
            said = "".join(traceback.format_exception_only(error)).strip() or type(error).__name__
            self._bench.results.failures.append(Failure(case.workload, case.variant, system.name, number, said))
            self._console.print(f"{number}  {what}: {said.splitlines()[-1]}", style="red", markup=False)
            await self._bench.dismiss(system)
            return
        if not warm_up:
            self._bench.results.add(case.workload, case.variant, system.name, outcome.figures, outcome.tasks)
        figures = ", ".join(f"{name} {value:,.5g}" for name, value in outcome.figures.items())
        self._console.print(f"{number}  {what}: {figures}", highlight=False)
