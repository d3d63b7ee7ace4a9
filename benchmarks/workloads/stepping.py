"""Steps in one workflow and in many at once, with results of several sizes, and replayed from their checkpoints."""

from __future__ import annotations

from functools import partial

from ..bench import Bench
from ..catalogue import System
from ..profiles import KIB, Profile
from .common import Case, Outcome, drain, wake

REPLAYING = frozenset({"durable", "absurd"})
"""dbos holds waiting workflows in memory, so it does not replay them."""


async def run_steps(bench: Bench, system: System, *, workflows: int, steps: int, size: int, variant: str) -> Outcome:
    settings = system.worker(variant)
    params = {"steps": steps, "size": size}
    async with bench.server.database(system) as database:
        drained = await drain(bench, system, database, settings, task="steps", count=workflows, params=params)
    figures = {"throughput": workflows * steps / drained.seconds}
    if size:
        figures["megabytes"] = workflows * steps * size / drained.seconds / 1e6
    return Outcome(figures, workflows)


async def replay(bench: Bench, system: System, *, steps: int) -> Outcome:
    """Measure the time from an event until all workflows that wait for it, after their steps, have ended."""
    count = bench.profile.replayed_workflows
    return Outcome({"throughput": count * steps / await wake(bench, system, count, {"steps": steps})}, count)


def cases(profile: Profile) -> list[Case]:
    found = []
    for workflows, steps in profile.workflows:
        name = f"{workflows} workflow{'s' if workflows > 1 else ''} x {steps} steps"
        for variant in ("default", "best") if workflows == 1 else ("best",):
            run = partial(run_steps, workflows=workflows, steps=steps, size=0, variant=variant)
            found.append(Case("steps", f"{name}, {variant} settings", "steps", run))
    for steps in profile.replayed_steps:
        run_replay = partial(replay, steps=steps)
        found.append(Case("replay", f"{steps} steps from checkpoints", "steps", run_replay, systems=REPLAYING))
    for size, (workflows, steps) in profile.checkpoints.items():
        run = partial(run_steps, workflows=workflows, steps=steps, size=size, variant="best")
        name = f"{size // KIB} KB" if size < KIB * KIB else f"{size // KIB // KIB} MB"
        found.append(Case("checkpoints", f"{name} each, {workflows} workflows", "steps", run))
    return found
