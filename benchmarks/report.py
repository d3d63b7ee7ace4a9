"""The table at the end: every figure of every system, and durable_sa's lead over each."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .catalogue import REFERENCE, SYSTEMS
from .results import METRICS, Measurement, Results
from .targets import verdicts


def figure(value: float) -> str:
    """Three digits that count, and no more than that."""
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def lead(results: Results, measurement: Measurement) -> float | None:
    """How many times as good durable_sa is: as much more where more is better, else as much less."""
    own = results.value(measurement.workload, measurement.variant, REFERENCE, measurement.metric)
    other = measurement.median
    if own is None or not own or not other or measurement.system == REFERENCE:
        return None
    return own / other if METRICS[measurement.metric][1] else other / own


def cell(results: Results, measurement: Measurement | None) -> str:
    """A figure with its spread, and durable_sa's lead over it."""
    if measurement is None:
        return ""
    text = f"{figure(measurement.median)} ±{100 * measurement.spread:.0f}%"
    ahead = lead(results, measurement)
    return text if ahead is None else f"{text} ({figure(ahead)}x)"


def systems_of(results: Results) -> list[str]:
    """The systems that have figures, the reference first."""
    measured = {each.system for each in results.measurements}
    return [name for name in SYSTEMS if name in measured]


def print_report(results: Results, console: Console) -> None:
    """Machine, table, targets and failures."""
    console.print(describe(results), highlight=False)
    names = systems_of(results)
    table = Table(title=f"Profile {results.profile}: medians ± half the range; in brackets durable_sa's lead")
    table.add_column("workload")
    table.add_column("unit")
    for name in names:
        table.add_column(SYSTEMS[name].title, justify="right")
    previous = ""
    for workload, variant, metric in results.rows():
        if previous and workload != previous:
            table.add_section()
        previous = workload
        label = f"{workload}: {variant}" + ("" if metric == "throughput" else f", {metric}")
        cells = [cell(results, results.find(workload, variant, name, metric)) for name in names]
        table.add_row(label, METRICS[metric][0], *cells)
    console.print(table)
    console.print(targets_table(results))
    for failure in results.failures:
        what = f"{failure.workload}, {failure.variant}: {SYSTEMS[failure.system].title}, round {failure.round}"
        console.print(f"FAILED {what}\n{failure.error}", style="red", markup=False, highlight=False)


def targets_table(results: Results) -> Table:
    table = Table(title="Targets")
    for name, justify in (("ratio", "left"), ("at least", "right"), ("reached", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for verdict in verdicts(results):
        reached = "not measured" if verdict.ratio is None else figure(verdict.ratio)
        mark = {True: "[green]yes", False: "[red]no", None: ""}[verdict.reached]
        table.add_row(verdict.target.name, figure(verdict.target.least), reached, mark)
    return table


def describe(results: Results) -> str:
    """The machine, the server and the versions, a line each."""
    machine, server = results.machine, results.server
    versions = ", ".join(
        f"{SYSTEMS[name].title} {facts['version']}" for name, facts in results.systems.items() if "version" in facts
    )
    return "\n".join(
        (
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}",
            f"load before {machine['load_before']}; a commit takes {server['commit_ms']:.2f} ms",
            f"{server['version']}; " + ", ".join(f"{key}={value}" for key, value in server["settings"].items()),
            f"Python {machine['python']}; {versions}",
            *map(_describe_part, results.parts),
        )
    )


def _describe_part(part: dict[str, Any]) -> str:
    workloads = ", ".join(part["workloads"])
    return f"{part['started']}, {part['seconds'] / 60:.0f} minutes, commit {part['commit']}: {workloads}"
