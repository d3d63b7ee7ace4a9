"""mypy says which argument is wrong when params do not fit their task."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.verification.typing.test_typing import ROOT

MODULE = """
from dataclasses import dataclass
from durable_sa import Durable, Spawn, SyncTaskContext, TaskContext, task
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

@dataclass
class Order:
    id: int

@task
async def ship(ctx: TaskContext, order: Order) -> str:
    return ""

@task
async def plain(ctx: TaskContext) -> str:
    return ""

durable = Durable()

async def spawn(session: AsyncSession, plainly: Session, ctx: TaskContext, sync: SyncTaskContext) -> None:
    await durable.spawn(ship, 5)
    await durable.spawn_with(session, ship, 5)
    durable.spawn_with(plainly, ship, 5)
    await ctx.spawn("a", ship, 5)
    sync.spawn("a", ship, 5)
    Spawn(ship, 5)
    await durable.spawn(plain, 5)
    await durable.spawn(ship)
    await durable.spawn(ship, Order(1), delay=5)
    await durable.spawn(plain, None)
"""


@pytest.mark.timeout(300)
def test_the_message_names_the_argument(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    arguments = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports=silent", str(path)]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    errors = [line.partition(" error: ")[2] for line in checked.stdout.splitlines() if " error: " in line]
    misfit = 'has incompatible type "int"; expected "Order | OfTask[Order]"'
    assert len(errors) == 8, checked.stdout
    places = [("spawn", 2), ("spawn_with", 3), ("spawn_with", 3), ("spawn", 3), ("spawn", 3), ("Spawn", 2)]
    for error, (name, position) in zip(errors[:6], places, strict=True):
        assert error.startswith(f'Argument {position} to "{name}"'), checked.stdout
        assert misfit in error
    assert 'Argument 2 to "spawn"' in errors[6]
    assert 'expected "OfTask[None] | None"' in errors[6]
    assert 'Argument 1 to "spawn"' in errors[7]
