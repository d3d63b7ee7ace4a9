"""Two short rounds of what `make soak` does for half an hour."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from .__main__ import PAIRS, STORM
from .nursery import Nursery
from .rounds import Plan, fight


@pytest.mark.parametrize("faults", [STORM, PAIRS[0]], ids=["storm", "pair"])
def test_nothing_is_lost(tmp_path: Path, faults: tuple[str, ...]) -> None:
    seed = os.environ.get("SOAK_SEED") or str(random.randrange(10**9))

    async def run() -> None:
        async with Nursery() as nursery:
            verdict = await fight(Plan(faults, seed, 4.0), tmp_path, nursery, [])
        assert verdict.violations == {}, verdict.report
        assert verdict.counts.keys() & set(faults)
        assert verdict.tasks > 0

    asyncio.run(run())
