"""The systems that are compared: where they come from, what they can do, and the settings they are measured at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Settings = Mapping[str, Any]

REFERENCE: Final = "durable"
"""The system that the others are compared with."""


@dataclass(frozen=True)
class System:
    """A system under test.

    `default` is a worker as the system's documentation starts it; `best` the one that drains fastest on two cores of
    those that were tried; `quick` the one that answers soonest when idle. They are arguments of the driver's `work` and
    `open`, besides `loop`, which is the kind of event loop of the process.
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    offers: frozenset[str]
    unfinished: str
    """SQL: how many tasks are ready or run."""
    default: Settings = field(default_factory=dict)
    best: Settings = field(default_factory=dict)
    quick: Settings = field(default_factory=dict)
    suspended: str | None = None
    """SQL: how many tasks wait, held by nobody."""
    share: float = 1.0
    """Of the number of tasks of a workload: slow systems are given less to do, for the same figure."""
    default_poll: float = 0.0
    """Seconds between the polls of an idle worker; the pauses of latency runs span them."""

    def worker(self, variant: str | int) -> dict[str, Any]:
        """The settings of a worker: `default`, `best`, or the best with that concurrency."""
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
            frozenset({"spawn", "session", "bulk", "drain", "results", "steps", "events", "children", "memory", "nap"}),
            # Not those that sleep, of which there may be a million.
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
            frozenset({"spawn", "session", "drain", "results", "steps", "events", "children", "memory", "nap"}),
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
            # Results are written when so many have gathered, or after a tenth of a second.
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
