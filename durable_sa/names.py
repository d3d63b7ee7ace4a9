"""The rules for names of queues, tasks, steps, events, schedules, workers and headers, and for idempotency keys."""

import re
from functools import lru_cache
from typing import Final, Literal

from .errors import InvalidConfiguration, InvalidName

NameKind = Literal[
    "queue",
    "task",
    "step",
    "event",
    "topic",
    "value",
    "stream",
    "schedule",
    "worker",
    "header",
    "idempotency key",
    "unique key",
    "limit key",
]

MAX_NAME_BYTES: Final = 200
MAX_IDEMPOTENCY_KEY_BYTES: Final = 255
MAX_SCHEMA_BYTES: Final = 63
"""The length to which Postgres silently truncates an identifier."""

_RESERVED_PREFIX: Final[dict[str, str]] = {
    "step": "$",
    "event": "$",
    "topic": "$",
    "value": "$",
    "stream": "$",
    "header": "durable::",
}
_CONTROL_CHARACTER: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SCHEDULE_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")


def validate_name(kind: NameKind, value: object, *, internal: bool = False) -> str:
    """Return `value` as a plain `str` if it may name a `kind`.

    A name has 1 to 200 bytes of UTF-8 (an idempotency or unique key up to 255), no control characters, and something
    else than blanks. Schedule names are made of ASCII letters, digits, `_` and `-`. `$` at the start of names of steps,
    events, topics, values and streams, and `durable::` at the start of header keys are reserved; `internal` lets them
    pass for the engine's own.

    Raises:
        InvalidName: with the kind, the value and the rule it breaks.
    """
    if not isinstance(value, str):
        raise InvalidName(kind, value, f"it must be a str, not {type(value).__name__}")
    return _validated(kind, value if type(value) is str else str.__str__(value), internal)


@lru_cache(maxsize=4096)
def _validated(kind: NameKind, name: str, internal: bool) -> str:
    if not name:
        raise InvalidName(kind, name, "it is empty")
    if name.isspace() and kind not in ("idempotency key", "unique key"):
        raise InvalidName(kind, name, "it consists of blanks, which no list or log shows")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidName(kind, name, "it contains a lone surrogate, which UTF-8 cannot encode") from None
    limit = MAX_IDEMPOTENCY_KEY_BYTES if kind in ("idempotency key", "unique key") else MAX_NAME_BYTES
    if size > limit:
        raise InvalidName(kind, name, f"it has {size} bytes of UTF-8 and at most {limit} are allowed")
    if found := _CONTROL_CHARACTER.search(name):
        raise InvalidName(kind, name, f"it contains the control character U+{ord(found.group()):04X}")
    if kind == "schedule" and not _SCHEDULE_NAME.fullmatch(name):
        raise InvalidName(kind, name, "only A-Z, a-z, 0-9, '_' and '-' are allowed")
    prefix = _RESERVED_PREFIX.get(kind)
    if prefix is not None and not internal and name.startswith(prefix):
        raise InvalidName(kind, name, f"names that start with {prefix!r} are reserved")
    return name


def validate_schema(value: object) -> str:
    """Return `value` if a schema of the database may have that name.

    Raises:
        InvalidConfiguration: with the value and the rule it breaks.
    """
    if not isinstance(value, str):
        raise InvalidConfiguration("schema", f"it must be a str, not {type(value).__name__}")
    size = len(value.encode(errors="surrogatepass"))
    if not value:
        problem = "it is empty"
    elif found := _CONTROL_CHARACTER.search(value):
        problem = f"{value!r} contains the control character U+{ord(found.group()):04X}"
    elif size > MAX_SCHEMA_BYTES:
        problem = f"{value!r} has {size} bytes of UTF-8 and at most {MAX_SCHEMA_BYTES} are allowed"
    elif value.startswith("pg_"):
        problem = f"{value!r} starts with 'pg_', which Postgres reserves"
    else:
        return value
    raise InvalidConfiguration("schema", problem)
