"""Values of tasks as they are shown: redacted by the application, and never longer than a page can bear."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

logger = logging.getLogger("durable_sa")

Redact = Callable[[str, tuple[str | int, ...], Any], Any]
"""A function of the name of a task, a path of keys and indexes in it, and a value; it returns what is shown instead."""

MOST_NODES: Final = 2_000
"""Values of a JSON document that are shown; the rest is counted."""
LONGEST_TEXT: Final = 20_000
"""Characters of a text that are shown."""
MOST_TEXT: Final = 1_000_000
"""Characters of all values of a task that are shown on one page."""
DEEPEST: Final = 50
UNREDACTED: Final = "(not shown: redact failed)"


class Values:
    """Prepares the values of one task."""

    def __init__(self, task_name: str, redact: Redact | None) -> None:
        self._task_name = task_name
        self._redact = redact
        self._left = MOST_NODES
        self._characters = MOST_TEXT

    def prepare(self, part: str, value: Any, *more: str) -> Any:
        """Return a value that stands at (`part`, `more`...), redacted and bounded."""
        self._left = MOST_NODES
        return self._prepare((part, *more), value)

    def _prepare(self, path: tuple[str | int, ...], value: Any) -> Any:
        self._left -= 1
        if self._redact is not None:
            try:
                value = self._redact(self._task_name, path, value)
            except Exception:
                logger.exception("redact failed for a value of task %r; it is not shown", self._task_name)
                return UNREDACTED
        match value:
            case str():
                return self._shortened(value)
            case Mapping():
                fields = cast("Mapping[Any, Any]", value)
                return self._all(path, [(str(key), item) for key, item in fields.items()], keyed=True)
            case list() | tuple():
                items = cast("Sequence[Any]", value)
                return self._all(path, list(enumerate(items)), keyed=False)
            case _:
                return value

    def _all(self, path: tuple[str | int, ...], items: list[tuple[Any, Any]], *, keyed: bool) -> Any:
        shown: list[tuple[Any, Any]] = []
        for key, item in items:
            if self._left <= 0 or self._characters <= 0 or len(path) > DEEPEST:
                left_out = f"({len(items) - len(shown)} more)"
                return {**dict(shown), "...": left_out} if keyed else [*(item for _, item in shown), left_out]
            name = self._shortened(key) if keyed else key
            shown.append((name, self._prepare((*path, key), item)))
        return dict(shown) if keyed else [item for _, item in shown]

    def _shortened(self, text: str) -> str:
        most = max(0, min(LONGEST_TEXT, self._characters))
        self._characters -= min(len(text), most)
        return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def pretty(value: Any) -> str:
    """Return JSON as indented text."""
    return json.dumps(value, ensure_ascii=False, indent=2, default=str)
