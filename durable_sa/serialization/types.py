"""The values of a type that would not be read back as they were, as far as pydantic's schema shows in advance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, Final, cast
from zoneinfo import ZoneInfo

from pydantic import TypeAdapter
from pydantic_core import SchemaSerializer, SchemaValidator, core_schema

from ..errors import SerializationError

_TAKES: Final[Mapping[str, type | tuple[type, ...]]] = {"int": int, "float": (int, float), "str": str}
"""By the schema of a plain type, the values whose JSON is read back as that type."""
_OPAQUE: Final = frozenset({"default", "metadata", "config", "expected", "members", "serialization"})
"""Entries of a schema that hold no schema of a value that is read."""


class UnfaithfulType(SerializationError):  # noqa: N818 - as `Unfaithful`
    """Raised for a type of which some values can never be read back as they were."""


def parts(schema: object) -> Iterator[dict[str, Any]]:
    """Yield a core schema and all schemas in it."""
    if isinstance(schema, dict):
        entries = cast(dict[str, Any], schema)
        yield entries
        for name, entry in entries.items():
            if name not in _OPAQUE:
                yield from parts(entry)
    elif isinstance(schema, list):
        for entry in cast(list[object], schema):
            yield from parts(entry)


def check(schema: object, what: str) -> None:
    """Refuse a type with values that cannot be read back.

    These are models with private attributes, which are in no JSON, and unions of an enum with a plain type that has the
    same JSON as a member. A model or enum with a serializer of its own is taken to know what it does.

    Raises:
        UnfaithfulType: with the model or the enum.
    """
    named = {part["ref"]: part for part in parts(schema) if isinstance(part.get("ref"), str)}
    for part in parts(schema):
        if part.get("type") == "model":
            private: dict[str, Any] = getattr(part["cls"], "__private_attributes__", {})
            if private and "serialization" not in part:
                raise UnfaithfulType(
                    what,
                    f"cannot be read back: {min(private)!r}, a private attribute of {part['cls'].__name__}, would not "
                    "be stored. Make it a field, with exclude=True if its default will do once it is read back, or a "
                    "functools.cached_property",
                )
        elif part.get("type") == "union":
            _check_union([_resolved(choice, named) for choice in part["choices"]], what)


def _resolved(choice: Any, named: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    choice = _unlabelled(choice)
    return named.get(choice.get("schema_ref"), choice) if choice.get("type") == "definition-ref" else choice


def _unlabelled(choice: Any) -> dict[str, Any]:
    return cast(dict[str, Any], choice[0] if isinstance(choice, tuple) else choice)


def _check_union(choices: list[dict[str, Any]], what: str) -> None:
    plain = {choice["type"] for choice in choices if choice["type"] in _TAKES}
    for choice in choices:
        if choice["type"] == "enum" and "serialization" not in choice:
            member: Enum
            for member in choice["members"]:
                if taken := [kind for kind in sorted(plain) if isinstance(member.value, _TAKES[kind])]:
                    raise UnfaithfulType(
                        what,
                        f"cannot be read back: in a union with {taken[0]}, a member of {choice['cls'].__name__} would "
                        "come back as its value. Use one of the two types",
                    )


class Zoned:
    """The validator and serializer of a type with datetimes, which keep the names of their zones.

    The name of a `ZoneInfo` is written behind the offset, as in `2024-07-01T12:00:00+02:00[Europe/Paris]` (RFC 9557).
    """

    __slots__ = ("serializer", "validator")

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self.validator: Any = adapter.validator
        self.serializer: Any = adapter.serializer
        if any(part.get("type") == "datetime" for part in parts(adapter.core_schema)):
            schema = _with_zones(adapter.core_schema)
            # Models would be read and written by the schemas of their classes otherwise.
            options: Any = {}
            if "_use_prebuilt" in (SchemaValidator.__text_signature__ or ""):
                options = {"_use_prebuilt": False}
            self.validator = SchemaValidator(schema, **options)
            self.serializer = SchemaSerializer(schema, **options)


def _with_zones(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_zones(entry) for entry in cast(list[Any], schema)]
    if not isinstance(schema, dict):
        return schema
    entries = cast(dict[str, Any], schema)
    kind = entries.get("type")
    if kind == "datetime" and "serialization" not in entries:
        # In strict mode a datetime would not be read from text that Python code passes on.
        return core_schema.no_info_wrap_validator_function(
            _read,
            cast(Any, {**entries, "strict": False}),
            serialization=core_schema.wrap_serializer_function_ser_schema(
                _write, schema=cast(Any, entries), when_used="json"
            ),
        )
    if kind == "union" and any(_unlabelled(choice).get("type") == "str" for choice in entries["choices"]):
        # A text would not be told from a time any more.
        return entries
    return {name: entry if name in _OPAQUE else _with_zones(entry) for name, entry in entries.items()}


def _write(value: Any, handler: Any) -> str:
    text: str = handler(value)
    zone = value.tzinfo if isinstance(value, datetime) else None
    return f"{text}[{zone.key}]" if isinstance(zone, ZoneInfo) and zone.key else text


def _read(value: Any, handler: Any) -> datetime:
    if not isinstance(value, str) or not value.endswith("]"):
        return cast(datetime, handler(value))
    text, _, name = value[:-1].partition("[")
    moment: datetime = handler(text)
    try:
        zone = ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError("its time zone is not known on this machine") from None
    # The wall clock counts if it can have this offset, because a time in an hour that is skipped would move otherwise.
    for fold in (0, 1):
        local = moment.replace(tzinfo=zone, fold=fold)
        if local.utcoffset() == moment.utcoffset():
            return local
    return moment.astimezone(zone)
