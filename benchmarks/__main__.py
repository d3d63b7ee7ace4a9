"""The one command: ``python -m benchmarks --profile small``, or ``full`` for figures to be published."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from .bench import Bench
from .catalogue import CHARTS_REQUIREMENTS, REFERENCE, System
from .environments import ROOT, environment
from .machine import machine
from .page import write_page
from .profiles import PROFILES, Profile
from .report import print_report
from .results import Failure, Results
from .rounds import Rounds, systems_named
from .server import benchmark_server
from .workloads import cases

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="small")
    parser.add_argument("--only", default="", help="workloads or groups of them, with commas between")
    parser.add_argument("--systems", default="", help="systems, with commas between; durable is always one of them")
    parser.add_argument(
        "--after", metavar="RESULTS", type=Path, help="a results.json of before, for the workloads not measured now"
    )
    parser.add_argument("--publish", metavar="RESULTS", type=Path, help="write docs/benchmarks.md from a results.json")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if arguments.publish is not None:
        publish(Results.load(arguments.publish), DOCS)
        return
    only, names = (frozenset(filter(None, text.split(","))) for text in (arguments.only, arguments.systems))
    try:
        systems = systems_named(names | {REFERENCE} if names else names)
    except ValueError as error:
        parser.error(str(error))
    earlier = None if arguments.after is None else Results.load(arguments.after)
    profile = PROFILES[arguments.profile]
    results = asyncio.run(run(profile, only, systems, console))
    if earlier is not None:
        results = results.after(
            earlier, {(case.workload, case.variant) for group in cases(profile, frozenset()) for case in group}
        )
    directory = _directory(results)
    results.save(directory / "results.json")
    print_report(results, console)
    publish(results, directory)
    console.print(f"Results, charts and page: {directory}", highlight=False)


def _directory(results: Results) -> Path:
    return RESULTS / f"{results.machine['started'].replace(':', '')}-{results.profile}"


async def run(profile: Profile, only: frozenset[str], systems: list[System], console: Console) -> Results:
    """Measure, and go on where something fails."""
    began = time.monotonic()
    facts = machine()
    with benchmark_server() as server, tempfile.TemporaryDirectory(prefix="benchmarks-") as logs:
        about = {
            "version": await server.execute("SELECT version()"),
            "settings": server.settings,
            "commit_ms": 1000 * await server.commit_seconds(),
        }
        results = Results(profile.name, facts, about)

        def save() -> None:
            """What there is, for a run of hours may not come to its end."""
            results.seconds = time.monotonic() - began
            results.save(_directory(results) / "results.json")

        pythons: dict[str, Path] = {}
        bench = Bench(profile, server, results, pythons, Path(logs))
        taking_part = []
        for system in systems:
            try:
                pythons[system.name] = await asyncio.to_thread(environment, system.name, system.requirements)
                results.systems[system.name] = {
                    **await bench.install(system),
                    "default": dict(system.default),
                    "best": dict(system.best),
                    "quick": dict(system.quick),
                }
                taking_part.append(system)
            except Exception as error:  # noqa: BLE001 - the others are measured all the same
                said = getattr(error, "output", None) or f"{type(error).__name__}: {error}"
                results.failures.append(Failure("install", "", system.name, 0, said))
                console.print(f"{system.title} is left out: {said}", style="red", markup=False)
        try:
            await Rounds(bench, console, taking_part).run(cases(profile, only), save)
        finally:
            await bench.dismiss()
    results.seconds = time.monotonic() - began
    return results


def publish(results: Results, directory: Path) -> None:
    """Write the page and its charts into a directory, with the results beside the charts."""
    assets = directory / "benchmarks"
    assets.mkdir(parents=True, exist_ok=True)
    results.save(assets / "results.json")
    python = environment("charts", CHARTS_REQUIREMENTS)
    charts = subprocess.run(
        [python, "-m", "benchmarks.charts", assets / "results.json", assets],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    write_page(results, charts, directory / "benchmarks.md")


if __name__ == "__main__":
    main()
