"""The page for the documentation, written from the results and nothing else."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from .catalogue import SYSTEMS
from .report import cell, describe, figure, systems_of
from .results import METRICS, Results
from .targets import verdicts

REASONS = Path(__file__).with_name("reasons.toml")
TEXTS = Path(__file__).with_name("texts.toml")

HEAD = """\
# Benchmarks

How fast durable_sa is beside other systems that keep tasks in PostgreSQL, and beside the same work as plain SQL. This
page is written by `python -m benchmarks` from [its results](benchmarks/results.json); nothing on it is edited by hand.

For each workload, all systems run in turns on one server in one run, each in a process and an environment of its own,
through its public API, with fsync and synchronous_commit on. A figure is the median of {rounds} runs after one to warm
up; behind it is half the range of the runs, and in brackets durable_sa's lead: how many times as good it is in that
row. Each run has a fresh database, unless it is about old data. Slow systems are given fewer tasks for the same figure.
"""
SMALL = """\
**This is the `{profile}` profile: sizes are small, runs are short, and the figures are for a look, not for quoting.**
"""


def write_page(results: Results, charts: Sequence[str], path: Path) -> None:
    """Write the page; the charts are in a directory beside it."""
    path.write_text("\n".join(_lines(results, charts)) + "\n")


def _lines(results: Results, charts: Sequence[str]) -> Iterator[str]:
    yield HEAD.format(rounds=max((len(each.samples) for each in results.measurements), default=0))
    if results.profile != "full":
        yield SMALL.format(profile=results.profile)
    yield "## Machine and versions\n\n```text\n" + describe(results) + "\n```\n"
    yield "## Targets\n"
    yield from _targets(results)
    texts = tomllib.loads(TEXTS.read_text())
    for workload in dict.fromkeys(each.workload for each in results.measurements):
        title, text = texts[workload]["title"], texts[workload]["text"]
        yield f"## {title}\n\n{text}\n"
        for chart in charts:
            if chart.split("-")[0] == workload:
                yield f"![{title}](benchmarks/{chart}.svg)\n"
        yield from _table(results, workload)
    yield "## Settings\n"
    yield from _settings(results)
    yield from _failures(results)


def _targets(results: Results) -> Iterator[str]:
    reasons = tomllib.loads(REASONS.read_text())
    yield "| ratio | at least | reached | |\n| --- | ---: | ---: | --- |"
    missed = []
    for verdict in verdicts(results):
        reached = "not measured" if verdict.ratio is None else figure(verdict.ratio)
        mark = {True: "yes", False: "**no**", None: ""}[verdict.reached]
        yield f"| {verdict.target.name} | {figure(verdict.target.least)} | {reached} | {mark} |"
        if verdict.reached is False:
            missed.append(verdict.target.name)
    yield ""
    for name in missed:
        yield f"- *{name}* was missed: {reasons.get(name, 'no reason has been found yet.')}"
    if missed:
        yield ""


def _table(results: Results, workload: str) -> Iterator[str]:
    measured = {each.system for each in results.measurements if each.workload == workload}
    names = [name for name in systems_of(results) if name in measured]
    yield "| | " + " | ".join(SYSTEMS[name].title for name in names) + " |"
    yield "| --- |" + " ---: |" * len(names)
    for row_workload, variant, metric in results.rows():
        if row_workload == workload:
            unit = METRICS[metric][0]
            label = f"{variant}, {unit}" if metric == "throughput" else f"{variant}: {metric}, {unit}"
            found = [results.find(workload, variant, name, metric) for name in names]
            yield f"| {label.rstrip(', ')} | " + " | ".join(cell(results, each) for each in found) + " |"
    yield ""


def _settings(results: Results) -> Iterator[str]:
    yield "| | version | default | best for throughput | best for latency |\n| --- | --- | --- | --- | --- |"
    for name, facts in results.systems.items():
        kinds = [
            ", ".join(f"{key}={value}" for key, value in facts[kind].items()) for kind in ("default", "best", "quick")
        ]
        yield f"| {SYSTEMS[name].title} | {facts['version']} | " + " | ".join(kinds) + " |"
    yield ""


def _failures(results: Results) -> Iterator[str]:
    if results.failures:
        yield "## Runs that failed\n"
        for failure in results.failures:
            what = f"{failure.workload}, {failure.variant}: {SYSTEMS[failure.system].title}, round {failure.round}"
            yield f"- {what}: `{failure.error.strip().splitlines()[-1]}`"
        yield ""
