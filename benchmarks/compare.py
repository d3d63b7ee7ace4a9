"""A comparison of two checkouts of durable_sa, with the workloads and the server of this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .bench import Bench
from .catalogue import REFERENCE, SYSTEMS, System
from .page import figure
from .results import METRICS, Results
from .workloads.common import Case, Outcome

COMPARED = frozenset({"spawn", "drain", "latency", "steps"})


def two_checkouts(old: Path) -> list[System]:
    """Return durable_sa of another checkout and of this one as two systems."""
    new = SYSTEMS[REFERENCE]
    return [
        replace(new, name="old", title="old", checkout=old.resolve(strict=True)),
        replace(new, name="new", title="new"),
    ]


def with_cpu(case: Case) -> Case:
    """Return the case with the CPU time of the drivers as another figure.

    CPU time varies less than throughput, because it depends less on the disk and on other processes.
    """

    async def run(bench: Bench, system: System) -> Outcome:
        before = bench.cpu_seconds(system)
        outcome = await case.run(bench, system)
        cpu = 1000 * (bench.cpu_seconds(system) - before) / outcome.tasks
        return replace(outcome, figures={**outcome.figures, "cpu": cpu})

    return replace(case, run=run)


def comparison(results: Results) -> str:
    """Return a table of the medians, the gain from old to new, and the range of the gains of the rounds."""
    lines = [
        "A gain above 1 means that the new checkout is better, whether more or less of the unit is better.",
        f"{'':66}{'old':>9}{'new':>9}{'gain':>8}  range",
    ]
    for workload, variant, metric in results.rows():
        old, new = (results.find(workload, variant, name, metric) for name in ("old", "new"))
        if old is None or new is None:
            continue
        gain = METRICS[metric].gain
        gains = [gain(*pair) for pair in zip(old.samples, new.samples, strict=False) if all(pair)]
        if not gains or not old.median or not new.median:
            continue
        kind = "" if metric in ("throughput", "cpu") else f" {metric}"
        label = f"{workload}: {variant},{kind} {METRICS[metric].unit}"
        medians = f"{figure(old.median):>9}{figure(new.median):>9}{gain(old.median, new.median):>8.3f}"
        lines.append(f"{label:66}{medians}  {min(gains):.2f} to {max(gains):.2f}")
    return "\n".join(lines)
