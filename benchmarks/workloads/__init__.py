"""The workloads, in the order they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..profiles import Profile
from . import draining, growth, latency, limits, messaging, resources, soak, spawning, stepping, waiting
from .common import Case

GROUPS: Final[dict[str, Callable[[Profile], list[Case]]]] = {
    "spawning": spawning.cases,
    "draining": draining.cases,
    "latency": latency.cases,
    "stepping": stepping.cases,
    "waiting": waiting.cases,
    "messaging": messaging.cases,
    "resources": resources.cases,
    "growth": growth.cases,
    "limits": limits.cases,
    "soak": soak.cases,
}


def cases(profile: Profile, only: frozenset[str]) -> list[list[Case]]:
    """Return the cases of each group; with `only`, those of the named workloads and groups.

    A name that is both a workload and a group selects the workload.
    """
    found = []
    for group, make in GROUPS.items():
        all_cases = make(profile)
        whole = not only or (group in only and group not in {case.workload for case in all_cases})
        chosen = [case for case in all_cases if whole or case.workload in only]
        if chosen:
            found.append(chosen)
    return found
