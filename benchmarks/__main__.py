"""Measure durable_sa and its peers on one server, or compare two checkouts of durable_sa."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from .bench import Bench
from .catalogue import CHARTS_REQUIREMENTS, REFERENCE, SYSTEMS, System
from .compare import COMPARED, comparison, two_checkouts, with_cpu
from .environments import ROOT, environment
from .machine import machine
from .page import Page
from .profiles import PROFILES, Profile
from .results import Failure, Results
from .rounds import Rounds
from .server import benchmark_server
from .workloads import cases
from .workloads.common import Case

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, help="sizes of the workloads; small, or compare with --compare")
    parser.add_argument("--rounds", type=int, help="measured rounds, if not those of the profile")
    parser.add_argument("--only", default="", help="comma-separated workloads or groups of them")
    parser.add_argument("--systems", default="", help="comma-separated systems; durable is always added")
    parser.add_argument("--compare", metavar="CHECKOUT", type=Path, help="measure another checkout against this one")
    parser.add_argument("--after", metavar="RESULTS", type=Path, help="add the other workloads of this results.json")
    parser.add_argument("--publish", metavar="RESULTS", type=Path, help="write docs/benchmarks.md from a results.json")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if arguments.publish is not None:
        publish(Results.load(arguments.publish), DOCS)
        return
    only, names = (frozenset(filter(None, text.split(","))) for text in (arguments.only, arguments.systems))
    if unknown := names - SYSTEMS.keys():
        parser.error(f"unknown system {min(unknown)!r}; the systems are {', '.join(SYSTEMS)}")
    profile = PROFILES[arguments.profile or ("compare" if arguments.compare else "small")]
    profile = replace(profile, rounds=arguments.rounds or profile.rounds)
    if arguments.compare is not None:
        groups = [[with_cpu(case) for case in group] for group in cases(profile, only or COMPARED)]
        results = asyncio.run(run(profile, groups, two_checkouts(arguments.compare), console))
        console.out(comparison(results), highlight=False)
        return
    systems = [system for name, system in SYSTEMS.items() if not names or name in names | {REFERENCE}]
    earlier = None if arguments.after is None else Results.load(arguments.after)
    results = asyncio.run(run(profile, cases(profile, only), systems, console))
    if earlier is not None:
        results = results.after(earlier)
    directory = directory_of(results)
    results.save(directory / "results.json")
    publish(results, directory)
    console.print(Markdown((directory / "benchmarks.md").read_text()))
    console.print(f"Results, charts and page: {directory}", highlight=False)


def directory_of(results: Results) -> Path:
    return RESULTS / f"{results.machine['started'].replace(':', '')}-{results.profile}"


async def run(profile: Profile, groups: list[list[Case]], systems: Sequence[System], console: Console) -> Results:
    """Measure the cases with all systems that can be installed."""
    began = time.monotonic()
    facts = machine()
    with benchmark_server() as server, tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        about = {
            "version": await server.execute("SELECT version()"),
            "settings": server.settings,
            "commit_ms": 1000 * await server.commit_seconds(),
        }
        results = Results(profile.name, facts, about)

        def save() -> None:
            """Save the groups so far, because a run of hours may be interrupted."""
            results.seconds = time.monotonic() - began
            results.save(directory_of(results) / "results.json")

        bench = Bench(profile, server, results, Path(directory))
        taking_part = []
        try:
            for system in systems:
                try:
                    results.systems[system.name] = {
                        **await bench.install(system),
                        "default": dict(system.default),
                        "best": dict(system.best),
                        "quick": dict(system.quick),
                    }
                    taking_part.append(system)
                except Exception as error:  # noqa: BLE001 - the other systems are measured without this one
                    said = getattr(error, "output", None) or f"{type(error).__name__}: {error}"
                    results.failures.append(Failure("install", "", system.name, 0, said))
                    console.print(f"{system.title} is left out: {said}", style="red", markup=False)
            await Rounds(bench, console, taking_part).run(groups, save)
        finally:
            await bench.dismiss()
    results.seconds = time.monotonic() - began
    return results


def publish(results: Results, directory: Path) -> None:
    """Write the page into a directory, and the results and charts into its subdirectory ``benchmarks``."""
    assets = directory / "benchmarks"
    results.save(assets / "results.json")
    python = environment("charts", CHARTS_REQUIREMENTS)
    command = [python, "-m", "benchmarks.charts", assets / "results.json", assets]
    subprocess.run(command, cwd=ROOT, check=True)
    (directory / "benchmarks.md").write_text(Page(results).render())


if __name__ == "__main__":
    main()
