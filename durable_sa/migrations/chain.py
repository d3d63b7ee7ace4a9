"""The revisions that ship with the package, in order."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from alembic.operations import Operations

from ..errors import InvalidConfiguration
from . import versions

BASE = "base"
"""Alembic's name for the state before the first revision."""


class Script(Protocol):
    """A revision: a module in `versions`."""

    revision: str
    down_revision: str | None

    def up(self, op: Operations, schema: str) -> None: ...
    def down(self, op: Operations, schema: str) -> None: ...


def scripts() -> list[Script]:
    """Return all revisions, the oldest first."""
    modules = [import_module(f"{versions.__name__}.{module.name}") for module in iter_modules(versions.__path__)]
    following = {script.down_revision: script for script in cast(list[Script], modules)}
    chain: list[Script] = []
    while script := following.get(chain[-1].revision if chain else None):
        chain.append(script)
    return chain


def head() -> str:
    """Return the revision that this version of the package needs."""
    return scripts()[-1].revision


def is_known(revision: str) -> bool:
    """Return whether this version of the package has the revision; if not, it comes from a newer one."""
    return revision == BASE or any(script.revision == revision for script in scripts())


def position(revision: str) -> int:
    """Count the revisions up to and including this one.

    Raises:
        InvalidConfiguration: the package has no such revision.
    """
    names = [BASE, *(script.revision for script in scripts())]
    if revision not in names:
        raise InvalidConfiguration(
            "revision",
            f"this version of durable_sa has no {revision!r}",
            f"It has {', '.join(names)}. Install the version for which the call was written, or a newer one.",
        )
    return names.index(revision)
