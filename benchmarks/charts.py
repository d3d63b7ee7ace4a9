"""Charts from a results file, PNG and SVG. It runs in an environment of its own that has matplotlib.

Run as ``python -m benchmarks.charts RESULTS DIRECTORY``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from .catalogue import REFERENCE, SYSTEMS
from .results import METRICS, Measurement, Results

COLOURS = {
    REFERENCE: "#0b6e4f",
    "absurd": "#b56576",
    "dbos": "#6d597a",
    "procrastinate": "#e09f3e",
    "pgqueuer": "#457b9d",
    "raw": "#adb5bd",
}

BARS = (
    ("spawn", "spawn", "throughput", "Spawning, tasks per second"),
    ("drain", "drain", "throughput", "Draining no-op tasks, tasks per second"),
    ("latency", "latency", "result p50", "Spawn to result on an idle system, milliseconds, median"),
    ("latency-p99", "latency", "result p99", "Spawn to result on an idle system, milliseconds, 99th percentile"),
    ("steps", "steps", "throughput", "Steps per second"),
    ("checkpoints", "checkpoints", "megabytes", "Checkpoints, MB per second"),
    ("wal", "drain", "wal", "WAL per task, bytes"),
    ("growth", "growth", "throughput", "Draining beside other rows, tasks per second"),
)
LOGARITHMIC_FROM = 30.0
"""The ratio of the largest to the smallest bar above which a linear axis would hide the smallest."""


def bars(results: Results, workload: str, metric: str, title: str) -> Any | None:
    """Draw a bar for each system in each variant, with the range of the samples as whiskers."""
    found = [each for each in results.measurements if (each.workload, each.metric) == (workload, metric)]
    if not found:
        return None
    variants = list(dict.fromkeys(each.variant for each in found))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(found) + 0.2 * len(variants)))
    positions, labels, position = [], [], 0.0
    for variant in variants:
        members = [each for each in found if each.variant == variant]
        for member in members:
            _bar(axes, position, member)
            position += 1
        positions.append(position - (len(members) + 1) / 2)
        labels.append(variant)
        position += 0.8
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    medians = [each.median for each in found if each.median > 0]
    if medians and max(medians) / min(medians) > LOGARITHMIC_FROM:
        axes.set_xscale("log")
    axes.set_title(title, loc="left")
    axes.set_xlabel(METRICS[metric].unit.replace("/s", "per second") + ", log scale" * (axes.get_xscale() == "log"))
    names = [name for name in SYSTEMS if any(each.system == name for each in found)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    axes.legend(handles, [SYSTEMS[name].title for name in names], frameon=False, fontsize=8)
    return figure


def _bar(axes: Any, position: float, member: Measurement) -> None:
    middle = member.median
    reach = [[middle - min(member.samples)], [max(member.samples) - middle]]
    axes.barh(position, middle, 0.9, xerr=reach, color=COLOURS[member.system], error_kw={"elinewidth": 0.8})


def soak(results: Results) -> Any | None:
    """Plot latency, size, memory and connections of the long run over time."""
    series = results.series.get("soak")
    if not series:
        return None
    figure, rows = plt.subplots(4, 1, figsize=(9, 8), sharex=True)
    minutes = [point["seconds"] / 60 for point in series]
    for axes, (label, keys, scale) in zip(
        rows,
        (
            ("spawn to start, ms", ("p50", "p99"), 1.0),
            ("database, MB", ("bytes",), 1e6),
            ("worker's memory, MB", ("resident",), 1e6),
            ("connections", ("connections",), 1.0),
        ),
        strict=True,
    ):
        for key in keys:
            axes.plot(minutes, [point[key] / scale for point in series], label=key, linewidth=1)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=8)
    rows[-1].set_xlabel("minutes")
    rows[0].set_title("A long run at half of the maximum", loc="left")
    return figure


def charts(results: Results) -> Iterator[tuple[str, Any]]:
    """Yield the name and the figure of each chart whose workload was measured."""
    for name, workload, metric, title in BARS:
        if (figure := bars(results, workload, metric, title)) is not None:
            yield name, figure
    if (figure := soak(results)) is not None:
        yield "soak", figure


def main() -> None:
    source, directory = map(Path, sys.argv[1:])
    plt.switch_backend("agg")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "benchmarks"})
    for name, figure in charts(Results.load(source)):
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            figure.savefig(directory / f"{name}.{kind}", bbox_inches="tight", dpi=120, metadata=metadata)
        plt.close(figure)


if __name__ == "__main__":
    main()
