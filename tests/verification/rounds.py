"""A round: processes at work, faults for some seconds, time to heal, and a judgement of everything that has happened."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from .evidence import Evidence, collect
from .faults import FAULTS, injecting
from .field import Field, opened
from .invariants import violations
from .lags import histogram
from .nursery import Nursery
from .producer import SECRET

HEAL_SECONDS = 45.0
"""In which everything has to come to its end after the last fault; the workers' leases are 2 seconds."""
DRAIN_SECONDS = 20.0
SETTLE_SECONDS = 5.0
"""After the last fault, until every worker that lives is certainly back: a lease, and the longest pause between tries."""
CONCURRENCY = 10


@dataclass(frozen=True)
class Plan:
    """What happens in a round."""

    faults: tuple[str, ...]
    seed: str
    seconds: float
    workers: int = 3
    producers: int = 2
    rate: float = 8.0
    """Operations a second of each producer."""
    operations: int = 0
    """How many of them, if the round is to last for as long as that takes."""

    @property
    def name(self) -> str:
        return " + ".join(self.faults) or "nothing"


@dataclass
class Verdict:
    """What came of it."""

    plan: Plan
    counts: Counter[str] = field(default_factory=Counter)
    violations: dict[str, list[str]] = field(default_factory=dict)
    tasks: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    heal_seconds: float = 0.0
    lags: dict[str, float] = field(default_factory=dict)
    """How long due work has waited while there was a slot for it."""
    evidence: Evidence = field(default_factory=Evidence, repr=False)

    @property
    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "faults": list(self.plan.faults),
            "seed": self.plan.seed,
            "seconds": self.plan.seconds,
            "injected": dict(self.counts),
            "tasks": self.tasks,
            "operations": dict(self.operations),
            "heal_seconds": round(self.heal_seconds, 2),
            "lags": self.lags,
            "violations": self.violations,
        }


async def fight(plan: Plan, directory: Path, nursery: Nursery, skewed: list[Nursery]) -> Verdict:
    """Run a round. Everything it leaves for a reader is in `directory`."""
    chosen = [FAULTS[name] for name in plan.faults]
    needs = {need for each in chosen for need in each.needs}
    verdict = Verdict(plan)
    settings: dict[str, str | int] = {"max_connections": 50} if "no connections left" in plan.faults else {}
    async with opened(
        directory,
        plan.seed,
        pooled="pooler" in needs,
        retention="retention" in needs,
        clock="server clock" in needs,
        **settings,
    ) as battlefield:
        for number in range(plan.workers):
            skew = needs & {"skew"} and number > 0
            await battlefield.add(
                "worker",
                skewed[number % len(skewed)] if skew and skewed else nursery,
                queue_names=["side", "main"] if number else ["main", "side"],
                concurrency=CONCURRENCY,
                skewed=bool(skew),
                fatal=number == 1,
                **({"version": 1} if "versions" in needs else {}),
            )
        for _ in range(plan.producers):
            await battlefield.add(
                "producer",
                nursery,
                rate=plan.rate,
                operations=plan.operations,
                poison="poison" in needs,
                versions="versions" in needs,
                retention="retention" in needs,
            )
        await battlefield.staff()
        steady_since = await _now(battlefield)
        await asyncio.sleep(0.5)
        chance = random.Random(f"{plan.seed}:faults")
        async with contextlib.AsyncExitStack() as faults:
            for each in chosen:
                await faults.enter_async_context(injecting(battlefield, each, chance))
            if plan.operations:
                await battlefield.finished("producer")
            await asyncio.sleep(plan.seconds)
        began = time.monotonic()
        await battlefield.heal()
        if not all(each.harmless for each in chosen):
            steady_since = await _now(battlefield) + timedelta(seconds=SETTLE_SECONDS)
        found: dict[str, list[str]] = {}
        if late := await battlefield.dismiss("producer", DRAIN_SECONDS):
            found["producers_end"] = late
        if left := await _settle(battlefield, began + HEAL_SECONDS):
            found["everything_heals_in_time"] = left
        verdict.heal_seconds = time.monotonic() - began
        if late := await battlefield.dismiss("worker", DRAIN_SECONDS):
            found["workers_end"] = late
        if leaks := await _leaks(battlefield):
            found["nothing_is_left_open"] = leaks
        settled = "everything_heals_in_time" not in found
        evidence = await _evidence(battlefield, settled=settled, steady_since=steady_since)
        verdict.lags = await asyncio.to_thread(histogram, evidence)
        excuses = {text for each in chosen for text in each.excuses}
        verdict.violations = found | await asyncio.to_thread(_judge, evidence, excuses)
        if verdict.violations:
            await asyncio.to_thread(evidence.write, directory / "history.jsonl")
        verdict.counts += battlefield.counts
        if "poison" in needs:
            verdict.counts["poisoned code"] += sum(1 for _ in evidence.noted("poison"))
        if "retention" in needs:
            verdict.counts["old rows deleted"] += len(evidence.deleted)
        verdict.evidence = evidence
        verdict.tasks = len(evidence.tasks)
        verdict.operations = Counter(
            f"{entry['kind']} {entry['what']}" for entry in evidence.noted("ok", "fail", "unknown")
        )
    return verdict


async def _settle(battlefield: Field, deadline: float) -> list[str]:
    """Wait until every task has ended and every event is delivered; otherwise, what is left."""
    async with battlefield.connection() as connection:
        await connection.execute(
            "UPDATE durable.schedules SET paused_at = clock_timestamp() WHERE next_tick_at > now()"
        )
        while True:
            await connection.execute(
                "UPDATE durable.schedules SET paused_at = clock_timestamp()"
                " WHERE paused_at IS NULL AND next_tick_at > now()"
            )
            rows = await connection.fetch(
                "SELECT task_name || ' ' || task_id || ' ' || state || coalesce(' by ' || claimed_by, '')"
                " || coalesce(' from ' || available_at, '') FROM durable.tasks WHERE outcome IS NULL"
                " UNION ALL SELECT 'event ' || name FROM durable.events WHERE delivered_at IS NULL"
                " UNION ALL SELECT 'schedule ' || name FROM durable.schedules WHERE paused_at IS NULL LIMIT 20"
            )
            if not rows:
                return []
            if time.monotonic() > deadline:
                return [row[0] for row in rows]
            await asyncio.sleep(0.1)


async def _leaks(battlefield: Field) -> list[str]:
    """Connections, locks and prepared transactions that nobody has any more."""
    query = """
        SELECT 'connection of ' || application_name || ': ' || state || ': ' || left(query, 60) FROM pg_stat_activity
        WHERE datname = $1 AND backend_type = 'client backend' AND application_name <> 'control'
        UNION ALL SELECT 'advisory lock of ' || pid FROM pg_locks WHERE locktype = 'advisory'
        UNION ALL SELECT 'prepared transaction ' || gid FROM pg_prepared_xacts
    """
    deadline = time.monotonic() + 5
    while True:
        rows = await battlefield.server.sql(query, battlefield.database)
        # A pooler keeps its own.
        if not rows or battlefield.pooler is not None:
            return []
        if time.monotonic() > deadline:
            return [row[0] for row in rows]
        await asyncio.sleep(0.05)


async def _now(battlefield: Field) -> datetime:
    """By the server's clock."""
    return (await battlefield.server.sql("SELECT clock_timestamp()"))[0][0]


async def _evidence(battlefield: Field, *, settled: bool, steady_since: datetime) -> Evidence:
    password = battlefield.server.url(battlefield.database).password
    assert password is not None
    async with battlefield.connection() as connection:
        return await collect(
            connection,
            battlefield.directory,
            secrets=(SECRET, str(password)),
            settled=settled,
            steady_since=steady_since,
            slots=CONCURRENCY,
            told=battlefield.told,
            clock_moved=battlefield.clock is not None,
            slack=3.0 if "failover to the standby" in battlefield.counts else 0.5,
        )


def _judge(evidence: Evidence, excuses: set[str]) -> dict[str, list[str]]:
    found = violations(evidence, most=200)
    for name, cases in list(found.items()):
        left = [case for case in cases if not any(excuse in case for excuse in excuses)][:20]
        if left:
            found[name] = left
        else:
            del found[name]
    return found
