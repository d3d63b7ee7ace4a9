"""Filters in the query of a request, and the fields of its form."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, cast
from urllib.parse import parse_qsl, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..errors import InvalidConfiguration
from ..policies import Limit, Rate
from ..results import TaskFilter

MOST_BYTES: Final = 1024 * 1024
"""Bytes of a form: a payload, or ids of tasks."""
MOST_FIELDS: Final = 1_000

_TEXTS: Final = ("task_name", "queue_name", "key", "limit_key", "error_name")
_TIMES: Final = ("spawned_after", "spawned_before", "ended_after", "ended_before")
FIELDS: Final = (*_TEXTS, "state", *_TIMES, "running_longer_than", "parent", "version")
"""The parameters of a filter of tasks, named like the fields of `TaskFilter`."""

_SPAN = re.compile(r"(\d{1,9})\s*(s|min|m|h|d|w)")
_SECONDS: Final = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Fields:
    """The fields of a query or a form. Those without a value count as absent.

    Values are exact, because blanks may be part of a name. Those around numbers and times mean nothing.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._pairs = [(name, value) for name, value in pairs if value.strip()]
        if any("\0" in value for _, value in self._pairs):
            # The server's texts cannot contain it, so that nothing could be found.
            raise HTTPException(400, "A value contains NUL.")

    def text(self, name: str) -> str | None:
        """Return the last value of a field, or None."""
        return next((value for key, value in reversed(self._pairs) if key == name), None)

    def required(self, name: str) -> str:
        """Return the value of a field.

        Raises:
            HTTPException: 400, it has none.
        """
        if (value := self.text(name)) is None:
            raise HTTPException(400, f"The field {name!r} is missing.")
        return value

    def all(self, name: str) -> list[str]:
        """Return all values of a field, each once."""
        return list(dict.fromkeys(value for key, value in self._pairs if key == name))

    def only(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Return the fields of these names."""
        return [(key, value) for key, value in self._pairs if key in names]

    def ids(self, name: str) -> list[uuid.UUID]:
        """Return the ids of tasks in a field.

        Raises:
            HTTPException: 400, there are none, or one is not an id.
        """
        try:
            found = [uuid.UUID(value) for value in self.all(name)]
        except ValueError:
            raise HTTPException(400, f"A value of {name!r} is not the id of a task.") from None
        if not found:
            raise HTTPException(400, "No task is selected.")
        return found

    def filter(self, **more: Any) -> TaskFilter:
        """Return the filter of tasks that the fields describe.

        Raises:
            InvalidConfiguration: a value that cannot work.
        """
        values: dict[str, Any] = {name: self.text(name) for name in _TEXTS}
        values.update({name: moment(self.text(name), name) for name in _TIMES})
        if states := self.all("state"):
            values["state"] = states if len(states) > 1 else states[0]
        if (longer := self.text("running_longer_than")) is not None:
            values["running_longer_than"] = seconds(longer, "running_longer_than")
        if (parent := self.text("parent")) is not None:
            values["parent"] = task_id(parent)
        if (version := self.text("version")) is not None:
            values["version"] = _number(version, "version", digits=10)
        return TaskFilter(**values | more)


def query_of(request: Request) -> Fields:
    """Return the parameters of a request's URL."""
    return Fields(_pairs(request.scope.get("query_string", b"")))


def _pairs(text: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(text.decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:
        raise HTTPException(400, f"There are more than {MOST_FIELDS} fields.") from None


async def form_of(request: Request) -> Fields:
    """Return the fields of a form.

    Raises:
        HTTPException: it is too long, or is encoded otherwise.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Send a form: application/x-www-form-urlencoded.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"A form may have {MOST_BYTES // 1024} KiB.")
    return Fields(_pairs(bytes(body)))


def task_id(text: str) -> uuid.UUID:
    """Return the id of a task.

    Raises:
        InvalidConfiguration: it is not one.
    """
    try:
        return uuid.UUID(text.strip())
    except ValueError:
        raise InvalidConfiguration("parent", f"{text[:80]!r} is not the id of a task") from None


def seconds(text: str, name: str) -> float:
    """Return the seconds of a text such as `90`, `15min`, `12h` or `7d`.

    Raises:
        InvalidConfiguration: it is no duration.
    """
    if found := _SPAN.fullmatch(text.strip()):
        return float(int(found[1]) * _SECONDS[found[2]])
    try:
        return float(text)
    except ValueError:
        raise InvalidConfiguration(name, f"{text[:80]!r} is no duration", "Write 90, 15min, 12h or 7d.") from None


def moment(text: str | None, name: str) -> datetime | None:
    """Return the time that a text names: `12h` for twelve hours ago, or ISO 8601, in UTC unless it names a zone.

    Raises:
        InvalidConfiguration: it is neither.
    """
    if text is None:
        return None
    try:
        if found := _SPAN.fullmatch(text.strip()):
            return datetime.now(UTC) - timedelta(seconds=int(found[1]) * _SECONDS[found[2]])
        at = datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        remedy = "Write 12h for twelve hours ago, or 2026-01-31T08:00Z."
        raise InvalidConfiguration(name, f"{text[:80]!r} is no time", remedy) from None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def limit_of(form: Fields) -> Limit:
    """Return the limit that the fields `concurrency`, `rate` (such as `60/1min`), `burst` and `hold` describe.

    Raises:
        InvalidConfiguration: they describe none.
    """
    rate, burst = form.text("rate"), form.text("burst")
    starts = None
    if rate is not None:
        count, slash, per = (part.strip() for part in rate.partition("/"))
        if not slash:
            raise InvalidConfiguration("rate", f"{rate[:80]!r} is no rate", "Write 60/1min, 5/1s or 1000/1h.")
        starts = Rate(_number(count, "rate"), seconds(per, "rate"), burst=_number(burst or "1", "burst"))
    held = form.text("hold") or "run"
    return Limit(
        whole(form, "concurrency"),
        starts,
        cast("Literal['run', 'task']", held),
    )


def whole(form: Fields, name: str) -> int | None:
    """Return the whole number in a field, or None.

    Raises:
        InvalidConfiguration: it is no whole number.
    """
    text = form.text(name)
    return None if text is None else _number(text, name)


def _number(text: str, name: str, digits: int = 9) -> int:
    found = text.strip()
    if not found.isdecimal() or len(found) > digits:
        raise InvalidConfiguration(name, f"{text[:80]!r} is no whole number of at most {digits} digits")
    return int(found)


def query(pairs: Sequence[tuple[str, object]] | Mapping[str, object]) -> str:
    """Encode the parameters of a URL, without those that are None."""
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return urlencode([(name, str(value)) for name, value in items if value is not None], errors="replace")
