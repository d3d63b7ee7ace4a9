"""`make soak`: rounds of faults, singly, in pairs and all together, for as long as asked; a report at the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable

from . import faults, pooler
from .churn import PROBE, churn
from .nursery import Nursery
from .rounds import Plan, Verdict, fight
from .server import faketime_library, private_server

PAIRS = (
    ("worker killed", "server stopped at once"),
    ("worker stopped and continued", "failover to the standby"),
    ("reply or request lost", "worker killed"),
    ("route lost", "clocks of workers wrong"),
    ("server stopped at once", "old rows deleted"),
    ("worker told to stop", "conflicts between transactions"),
    ("connection terminated by the server", "old rows deleted"),
    ("worker killed", "pooler restarted"),
    ("worker replaced by another version", "worker killed"),
    ("route lost one way", "worker stopped and continued"),
)
STORM = (
    "connection terminated by the server",
    "connection cut",
    "reply or request lost",
    "worker killed",
    "producer killed",
    "rows locked",
)
SECONDS = 8.0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _possible(names: tuple[str, ...]) -> str | None:
    """Why these faults cannot be injected here, if they cannot."""
    needs = {need for name in names for need in faults.FAULTS[name].needs}
    if "pooler" in needs and pooler.PROGRAM is None:
        return "pgbouncer is not installed"
    if needs & {"skew", "server clock"} and (shutil.which("faketime") is None or faketime_library() is None):
        return "faketime is not installed"
    return None


def rounds(seed: int) -> Iterator[Plan]:
    """All single faults, all pairs and a storm after every third of them, in an order of their own each time."""
    for cycle in itertools.count():
        chance = random.Random(f"{seed}:{cycle}")
        combinations = [(name,) for name in faults.FAULTS] + list(PAIRS)
        chance.shuffle(combinations)
        for number, names in enumerate(combinations):
            yield Plan(names, f"{seed}:{cycle}:{number}", SECONDS)
            if number % 3 == 2:
                yield Plan(STORM, f"{seed}:{cycle}:{number}:storm", SECONDS)


def _skewing(offset: str) -> Nursery:
    environment = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "0"}
    return Nursery("faketime", "-f", offset, environment=environment)


def _keep(directory: Path, kept: Path, verdict: Verdict) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(directory, kept)
    (kept / "verdict.json").write_text(json.dumps(verdict.report, indent=1))


async def soak(seed: int, seconds: float, only: str | None, keep: Path) -> dict[str, Any]:
    """Run rounds until the time is over, and say what was done and found."""
    began = time.monotonic()
    totals: Counter[str] = Counter()
    reports: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    broken = 0
    async with contextlib.AsyncExitStack() as exits:
        nursery = await exits.enter_async_context(Nursery())
        skewed: list[Nursery] = []
        if shutil.which("faketime"):
            skewed = [await exits.enter_async_context(_skewing(offset)) for offset in ("+1h", "-1h")]
        for plan in rounds(seed):
            if only is not None and only != plan.seed and only != plan.name:
                continue
            if time.monotonic() - began > seconds:
                break
            if reason := _possible(plan.faults):
                skipped[plan.name] = reason
                continue
            with tempfile.TemporaryDirectory(prefix="durable-faults-") as scratch:
                directory = Path(scratch)
                # The pooler runs as another user.
                os.chmod(scratch, 0o755)  # noqa: PTH101 - a path of its own would be a blocking call here
                try:
                    verdict = await fight(plan, directory, nursery, skewed)
                except Exception:  # noqa: BLE001 - the other rounds are worth running
                    verdict = Verdict(plan, violations={"the_round_itself": [traceback.format_exc()]})
                if verdict.violations:
                    _keep(directory, keep / plan.seed.replace(":", "-"), verdict)
            totals += verdict.counts
            reports.append(verdict.report)
            say = "ok" if not verdict.violations else "VIOLATIONS"
            _say(
                f"{time.monotonic() - began:6.0f} s  {say:<10} {plan.name}: {sum(verdict.counts.values())} faults,"
                f" {verdict.tasks} tasks, healed in {verdict.heal_seconds:.1f} s  [{plan.seed}]",
            )
            broken += bool(verdict.violations)
            for name, cases in verdict.violations.items():
                for case in cases[:5]:
                    _say(f"    {name}: {case}")
            if only == plan.seed:
                break
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "python": sys.version.split()[0],
        "rounds": len(reports),
        "broken_rounds": broken,
        "injected": dict(sorted(totals.items())),
        "injected_total": sum(totals.values()),
        "tasks": sum(report["tasks"] for report in reports),
        "heal_seconds_most": max((report["heal_seconds"] for report in reports), default=0.0),
        "skipped": skipped,
        "details": reports,
    }


async def _churn(tasks: int) -> list[str]:
    """On a server of its own, whose autovacuum is off; what has become worse than it may."""
    async with private_server(autovacuum="off", shared_buffers="512MB", synchronous_commit="off") as server:
        engine = create_async_engine(server.url("postgres"))
        connection = await server.connect()
        async with Durable(engine) as durable:
            await durable.migrate()
            found = await churn(durable, connection, tasks, measurements=10)
        await engine.dispose()
        connection.terminate()
    for reads in found.reads:
        _say(
            f"after {reads.tasks:9} tasks: a claim of {PROBE} reads {reads.claim} blocks, one without floor"
            f" {reads.search}, a look for what is past its retention {reads.retention}"
        )
    for complaint in found.complaints:
        _say(f"VIOLATION: {complaint}")
    _say(f"{found.left} tasks are left")
    return found.complaints


def main() -> None:
    """Parse the arguments, and end with 1 if anything was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.verification", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_SECONDS") or 1800))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SOAK_SEED") or random.randrange(10**9)))
    parser.add_argument("--only", help="a round's seed, or the name of a fault")
    parser.add_argument("--report", type=Path, default=Path("soak.json"))
    parser.add_argument("--keep", type=Path, default=Path("soak"), help="where what violated rounds leave is kept")
    parser.add_argument("--churn", type=int, metavar="TASKS", help="no rounds: so many tasks without vacuum instead")
    chosen = parser.parse_args()
    if chosen.churn:
        sys.exit(1 if asyncio.run(_churn(chosen.churn)) else 0)
    _say(f"seed {chosen.seed}")
    report = asyncio.run(soak(chosen.seed, chosen.seconds, chosen.only, chosen.keep))
    chosen.report.write_text(json.dumps(report, indent=1) + "\n")
    for name, count in report["injected"].items():
        _say(f"{count:7} {name}")
    for name, reason in report["skipped"].items():
        _say(f"skipped {name}: {reason}")
    # The violations stand at the end once more, because a log is often seen by its last lines alone.
    for round_ in report["details"]:
        for name, cases in round_["violations"].items():
            _say(f"VIOLATIONS of {' + '.join(round_['faults'])} [{round_['seed']}] {name}: {'; '.join(cases[:3])}")
    _say(
        f"seed {report['seed']}: {report['injected_total']} faults in {report['rounds']} rounds of {report['tasks']} tasks,"
        f" {report['broken_rounds']} rounds with violations; {chosen.report}"
    )
    sys.exit(1 if report["broken_rounds"] else 0)


if __name__ == "__main__":
    main()
