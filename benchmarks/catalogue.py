"""The systems under test: their packages, their abilities, and the settings they are measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .environments import ROOT

Settings = Mapping[str, Any]

REFERENCE: Final = "durable"
"""The system that the others are compared with."""
PEERS: Final = ("absurd", "dbos", "procrastinate", "pgqueuer")


@dataclass(frozen=True)
class System:
    """A system under test.

    `default` is a worker as the system's documentation starts it. `best` drained fastest, and `quick` answered soonest
    when idle, of the settings that were tried on two cores. `loop` is the event loop of the process; the other settings
    are arguments of the driver's `work` and `open`.
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    offers: frozenset[str]
    """The abilities that workloads need; see `Case.needs`."""
    unfinished: str
    """SQL that returns the number of tasks that are ready or running."""
    default: Settings = field(default_factory=dict)
    best: Settings = field(default_factory=dict)
    quick: Settings = field(default_factory=dict)
    suspended: str | None = None
    """SQL that returns the number of tasks that wait in the database, without a worker."""
    share: float = 1.0
    """The fraction of a workload's tasks that a slow system is given."""
    default_poll: float = 0.0
    """Seconds between two polls of an idle worker; the pauses between the tasks of a latency run are as long."""
    checkout: Path = ROOT
    """The source tree that durable_sa is imported from."""

    @property
    def driver(self) -> str:
        """The module in `systems`; two checkouts of durable_sa share one."""
        return self.name if self.name in SYSTEMS else REFERENCE

    def worker(self, variant: str | int) -> dict[str, Any]:
        """Return the settings of a worker: `default`, `best`, or the best ones with the given concurrency."""
        if variant == "default":
            return dict(self.default)
        return {**self.best, **({} if variant == "best" else {"concurrency": variant})}


SYSTEMS: Final = {
    system.name: system
    for system in (
        System(
            REFERENCE,
            "durable_sa",
            (".", "uvloop==0.23.0"),
            frozenset(
                {
                    "spawn",
                    "session",
                    "bulk",
                    "drain",
                    "results",
                    "steps",
                    "events",
                    "children",
                    "memory",
                    "nap",
                    "messages",
                    "streams",
                }
            ),
            # Sleeping tasks are not counted: the growth workload has a million of them.
            "SELECT count(*) FROM durable.tasks WHERE finished_at IS NULL"
            " AND queue_name = 'bench' AND priority = 0 AND available_at <= now()",
            default={"loop": "asyncio"},
            best={"loop": "uvloop", "concurrency": 400},
            quick={"loop": "uvloop"},
            suspended="SELECT count(*) FROM durable.tasks WHERE finished_at IS NULL AND state = 'sleeping'",
        ),
        System(
            "absurd",
            "absurd",
            ("absurd-sdk==0.5.1", "absurdctl==0.5.1", "uvloop==0.23.0"),
            frozenset({"spawn", "session", "drain", "results", "steps", "events", "children", "memory", "nap"}),
            "SELECT count(*) FROM absurd.t_bench WHERE state NOT IN ('completed', 'failed', 'cancelled')",
            default={"loop": "asyncio", "sync": True},
            best={"loop": "uvloop", "workers": 4, "concurrency": 100, "poll_interval": 0.01},
            quick={"loop": "uvloop", "poll_interval": 0.01, "result_poll": 0.002},
            suspended="SELECT count(*) FROM absurd.t_bench WHERE state = 'sleeping'",
            share=0.1,
            default_poll=0.25,
        ),
        System(
            "dbos",
            "dbos",
            ("dbos==3.4.0", "uvloop==0.23.0"),
            frozenset(
                {
                    "spawn",
                    "session",
                    "drain",
                    "results",
                    "steps",
                    "events",
                    "children",
                    "memory",
                    "nap",
                    "messages",
                    "streams",
                }
            ),
            "SELECT count(*) FROM dbos.workflow_status WHERE status IN ('ENQUEUED', 'PENDING')",
            default={"loop": "asyncio"},
            best={"loop": "uvloop", "pool": 40, "poll_interval": 0.01},
            quick={"loop": "uvloop", "poll_interval": 0.01, "result_poll": 0.005},
            share=0.05,
            default_poll=1.0,
        ),
        System(
            "procrastinate",
            "procrastinate",
            ("procrastinate==3.10.0", "uvloop==0.23.0"),
            frozenset({"spawn", "session", "bulk", "drain", "results", "memory"}),
            "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')",
            default={"loop": "asyncio"},
            best={"loop": "uvloop", "concurrency": 50, "pool": 20},
            quick={"loop": "uvloop"},
            share=0.1,
        ),
        System(
            "pgqueuer",
            "pgqueuer",
            ("pgqueuer[asyncpg]==1.6.0", "uvloop==0.23.0"),
            frozenset({"spawn", "session", "bulk", "drain", "results", "memory"}),
            "SELECT count(*) FROM pgqueuer",
            # `pgq run` runs in uvloop.
            default={"loop": "uvloop"},
            best={"loop": "uvloop", "batch_size": 200},
            # pgqueuer writes results once `batch_size` of them have gathered, or after a tenth of a second.
            quick={"loop": "uvloop", "batch_size": 1, "debounce": 0.001},
        ),
        System(
            "raw",
            "asyncpg (ceiling)",
            ("asyncpg==0.32.0", "uvloop==0.23.0"),
            frozenset({"spawn", "session", "bulk", "drain"}),
            "SELECT count(*) FROM jobs WHERE finished_at IS NULL",
            default={"loop": "asyncio"},
            best={"loop": "uvloop", "concurrency": 200},
        ),
    )
}

CHARTS_REQUIREMENTS: Final = ("matplotlib==3.11.1",)
