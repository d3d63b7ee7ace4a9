"""The sizes of the workloads: `full` for published figures, `small` for a look within minutes, `compare`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True)
class Profile:
    """The sizes of all workloads. Slow systems get a share of the counts; see `System.share`."""

    name: str
    rounds: int
    """Measured rounds, which follow one warm-up round."""
    patience: float
    """Seconds after which a run fails."""
    spawns: dict[int, int]
    """Number of concurrent spawners to number of tasks."""
    bulk: int
    drained: dict[str, int]
    """Variant of the settings to number of tasks; see `draining.VARIANTS`."""
    pings: int
    ping_seconds: float
    workflows: tuple[tuple[int, int], ...]
    """Pairs of the number of workflows and the number of steps of each."""
    replayed_workflows: int
    replayed_steps: tuple[int, ...]
    checkpoints: dict[int, tuple[int, int]]
    """Bytes of a checkpoint to number of workflows and number of steps of each."""
    children: int
    waiters: int
    receivers: tuple[int, int]
    """Tasks that receive, and messages to each of them."""
    exchanges: int
    """Pairs of tasks that exchange a message."""
    streamed: int
    """Items of a stream that is written at full speed."""
    spoken: int
    """Items of a stream that is written at a steady pace."""
    idle_workers: tuple[int, ...]
    idle_seconds: float
    held: int
    """Tasks that run, or sleep, while the memory is measured."""
    levels: tuple[tuple[int, int], ...]
    """Pairs of the number of finished tasks and the number of sleeping tasks beside those that are drained."""
    drained_beside: int
    drained_under_snapshot: int
    limited: int
    """Tasks of a drain with limits."""
    limited_tasks: tuple[int, ...]
    """The numbers of tasks, on up to 100,000 keys, from which claims are timed."""
    limited_claims: int
    limited_under_snapshot: int
    soak_seconds: float
    soak_sample: float


KIB: Final = 1024

SMALL: Final = Profile(
    "small",
    rounds=2,
    patience=60,
    spawns={1: 300, 8: 1_000, 32: 2_000},
    bulk=5_000,
    drained={"default": 500, "8": 1_500, "100": 5_000, "best": 10_000, "two": 10_000},
    pings=40,
    ping_seconds=3,
    workflows=((1, 100), (100, 10), (100, 100)),
    replayed_workflows=20,
    replayed_steps=(10, 50),
    checkpoints={KIB: (20, 10), 100 * KIB: (10, 5), 1024 * KIB: (4, 3)},
    children=200,
    waiters=500,
    receivers=(20, 50),
    exchanges=20,
    streamed=20_000,
    spoken=200,
    idle_workers=(1, 4),
    idle_seconds=4,
    held=300,
    levels=((0, 0), (100_000, 10_000), (1_000_000, 100_000)),
    drained_beside=5_000,
    drained_under_snapshot=20_000,
    limited=5_000,
    limited_tasks=(10_000, 200_000),
    limited_claims=100,
    limited_under_snapshot=20_000,
    soak_seconds=15,
    soak_sample=1,
)

FULL: Final = Profile(
    "full",
    rounds=5,
    patience=1_200,
    spawns={1: 5_000, 8: 5_000, 32: 10_000},
    bulk=50_000,
    drained={"default": 1_000, "1": 1_000, "8": 6_000, "100": 30_000, "best": 40_000, "two": 40_000},
    pings=150,
    ping_seconds=6,
    workflows=((1, 100), (100, 10), (100, 100)),
    replayed_workflows=50,
    replayed_steps=(10, 50, 100),
    checkpoints={KIB: (100, 20), 100 * KIB: (50, 10), 1024 * KIB: (10, 5)},
    children=1_000,
    waiters=10_000,
    receivers=(100, 100),
    exchanges=100,
    streamed=50_000,
    spoken=1_000,
    idle_workers=(1, 10),
    idle_seconds=10,
    held=1_000,
    levels=((0, 0), (1_000_000, 1_000_000), (10_000_000, 1_000_000)),
    drained_beside=30_000,
    drained_under_snapshot=500_000,
    limited=30_000,
    limited_tasks=(10_000, 1_000_000),
    limited_claims=1_000,
    limited_under_snapshot=100_000,
    soak_seconds=1_800,
    soak_sample=10,
)

COMPARE: Final = replace(
    SMALL,
    name="compare",
    rounds=5,
    spawns={1: 2_000, 8: 4_000, 32: 8_000},
    bulk=50_000,
    drained={**FULL.drained, "100": 20_000},
    pings=150,
    ping_seconds=6,
    workflows=((1, 500), (100, 20), (100, 200)),
)
"""Sizes at which a run of durable_sa takes one to ten seconds."""

PROFILES: Final = {profile.name: profile for profile in (SMALL, FULL, COMPARE)}
