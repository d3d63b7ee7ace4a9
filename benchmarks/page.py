"""The page of the documentation, rendered from page.md.jinja."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import jinja2

from .catalogue import PEERS, REFERENCE, SYSTEMS
from .results import METRICS, Measurement, Results

TEMPLATE = Path(__file__).with_name("page.md.jinja")


def figure(value: float) -> str:
    """Format a value with three significant digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def over(dividend: float | None, divisor: float | None) -> float | None:
    """Divide; return None if one of the values was not measured."""
    return None if dividend is None or not divisor else dividend / divisor


def lowest(values: Iterable[float | None]) -> float | None:
    """Return the smallest of the values that were measured."""
    return min((value for value in values if value is not None), default=None)


class Page:
    """The functions that the template calls to read the results."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._value = results.value

    def render(self) -> str:
        """Return the page as Markdown."""
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
        functions = (
            *(figure, over, self._value, self.ratio, self.ratio_to_best_peer),
            *(self.lowest_peer_latency_ratio, self.growth_ratio, self.table),
        )
        page = environment.from_string(TEMPLATE.read_text()).render(
            results=self._results,
            rounds=max((len(each.samples) for each in self._results.measurements), default=0),
            titles={name: system.title for name, system in SYSTEMS.items()},
            **{function.__name__: function for function in functions},
        )
        # A section that is left out leaves its blank lines.
        return re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n"

    def ratio(self, workload: str, variant: str, peer: str) -> float | None:
        """Return durable_sa's throughput over a peer's."""
        return over(self._value(workload, variant, REFERENCE), self._value(workload, variant, peer))

    def ratio_to_best_peer(self, workload: str, variant: str) -> float | None:
        """Return durable_sa's throughput over that of the fastest peer."""
        return lowest(self.ratio(workload, variant, peer) for peer in PEERS)

    def lowest_peer_latency_ratio(self, metric: str) -> float | None:
        """Return the lowest latency of the peers over durable_sa's, each at the better of its settings."""
        variants = ("default settings", "best settings")
        peers = lowest(self._value("latency", variant, peer, metric) for peer in PEERS for variant in variants)
        return over(peers, lowest(self._value("latency", variant, REFERENCE, metric) for variant in variants))

    def growth_ratio(self) -> float | None:
        """Return the throughput beside the most rows over the throughput on empty tables."""
        values = [
            self._value("growth", variant, REFERENCE)
            for workload, variant, metric in self._results.rows()
            if (workload, metric) == ("growth", "throughput")
        ]
        return over(values[-1], values[0]) if len(values) > 1 else None

    def table(self, workload: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Return the titles of the systems measured in a workload, and the label and the cells of each row."""
        measured = {each.system for each in self._results.measurements if each.workload == workload}
        names = [name for name in SYSTEMS if name in measured]
        rows = []
        for row_workload, variant, metric in self._results.rows():
            if row_workload == workload:
                label, unit = variant if metric == "throughput" else f"{variant}: {metric}", METRICS[metric].unit
                cells = [self._cell(self._results.find(workload, variant, name, metric)) for name in names]
                rows.append((f"{label}, {unit}" if unit else label, cells))
        return [SYSTEMS[name].title for name in names], rows

    def _cell(self, found: Measurement | None) -> str:
        """Format a median with its spread, and durable_sa's lead over it."""
        if found is None:
            return ""
        text = f"{figure(found.median)} ±{100 * found.spread:.0f}%"
        own = self._value(found.workload, found.variant, REFERENCE, found.metric)
        if found.system == REFERENCE or not own or not found.median:
            return text
        return f"{text} ({figure(METRICS[found.metric].gain(found.median, own))}x)"
