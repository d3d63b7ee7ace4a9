"""Shows the steps that have run for more than a second in the worker's row, for the command line."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from datetime import timedelta
from typing import Any, Final

from pydantic_core import to_json

from ..database.channel import DedicatedConnection
from ..database.clock import LocalClock
from ..database_errors import is_transient, without_values
from ..statements import claiming
from .registration import Registration
from .slots import RunKey, Slots

logger = logging.getLogger("durable_sa")

LONG_AFTER: Final = 1.0
"""Seconds after which a step is shown, and between looks at the steps."""
MAX_SHOWN: Final = 100
"""Number of steps shown, so that the row stays small; those that began first are preferred."""

_Step = tuple[RunKey, uuid.UUID, float]
"""The run, the key of the step in it, and the start on the local monotonic clock."""


class LongSteps:
    """Writes `workers.long_steps`: at most once a second, and only if the set of steps has changed."""

    def __init__(
        self, connection: DedicatedConnection, registration: Registration, clock: LocalClock, slots: Slots
    ) -> None:
        self._connection = connection
        self._registration = registration
        self._clock = clock
        self._slots = slots
        self._written: dict[_Step, dict[str, Any]] = {}
        self._written_for = registration.worker_id

    async def run(self) -> None:
        """Look at the steps once a second until cancelled."""
        while True:
            await asyncio.sleep(LONG_AFTER)
            try:
                await self.write()
            except Exception as error:
                if not is_transient(error):
                    logger.error("writing the steps that run for long failed", exc_info=without_values(error))

    async def write(self) -> None:
        """Write the present set, unless the worker's row has it."""
        if not self._registration.lease.valid:
            return
        worker_id = self._registration.worker_id
        written = self._written if self._written_for == worker_id else {}
        steps = self._steps(written)
        if steps.keys() == written.keys():
            return
        text = to_json(list(steps.values())).decode() if steps else None
        await self._connection.execute(claiming.SHOW_LONG_STEPS, {"beating_id": worker_id, "long_steps_json": text})
        self._written, self._written_for = steps, worker_id

    def _steps(self, written: dict[_Step, dict[str, Any]]) -> dict[_Step, dict[str, Any]]:
        now = time.monotonic()
        found = sorted(
            (
                (began, call, (run_key, step_key, began))
                for run_key, run in self._slots.runs.items()
                for step_key, (call, began) in run.steps.items()
                if now - began >= LONG_AFTER
            ),
            key=lambda each: each[0],
        )
        steps: dict[_Step, dict[str, Any]] = {}
        for began, call, step in found[:MAX_SHOWN]:
            steps[step] = written.get(step) or {
                "task_id": step[0][0],
                "step": call.name,
                "arguments": call.summary,
                "started_at": self._clock.now() - timedelta(seconds=now - began),
            }
        return steps
