"""How much is done in a run: `full` for figures to be published, `small` for a look within minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Profile:
    """The sizes of all workloads. Counts are those of fast systems; slow ones are given their share of them."""

    name: str
    rounds: int
    """Runs that count; one to warm up comes before."""
    patience: float
    """Seconds after which a run is given up."""
    spawns: dict[int, int]
    """Tasks spawned, by the number of concurrent spawners."""
    bulk: int
    drained: dict[str, int]
    """Tasks drained, by the variant of the settings."""
    pings: int
    ping_seconds: float
    workflows: tuple[tuple[int, int], ...]
    """Workflows at once, and steps of each."""
    replayed_workflows: int
    replayed_steps: tuple[int, ...]
    checkpoints: dict[int, tuple[int, int]]
    """Bytes of a checkpoint, to workflows and steps of each."""
    children: int
    waiters: int
    idle_workers: tuple[int, ...]
    idle_seconds: float
    held: int
    """Tasks that run, and that sleep, while the memory is measured."""
    levels: tuple[tuple[int, int], ...]
    """Finished tasks and sleepers beside those that are drained."""
    drained_beside: int
    drained_under_snapshot: int
    soak_seconds: float
    soak_sample: float


KIB: Final = 1024

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile(
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
            idle_workers=(1, 4),
            idle_seconds=4,
            held=300,
            levels=((0, 0), (100_000, 10_000), (1_000_000, 100_000)),
            drained_beside=5_000,
            drained_under_snapshot=20_000,
            soak_seconds=15,
            soak_sample=1,
        ),
        Profile(
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
            idle_workers=(1, 10),
            idle_seconds=10,
            held=1_000,
            levels=((0, 0), (1_000_000, 1_000_000), (10_000_000, 1_000_000)),
            drained_beside=30_000,
            drained_under_snapshot=500_000,
            soak_seconds=1_800,
            soak_sample=10,
        ),
    )
}
