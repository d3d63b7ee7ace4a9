"""The check that a value survives its JSON form, and the explanation if it does not.

Explanations name places and types, never values.
"""

import dataclasses
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from numbers import Number
from typing import Any, Final, TypeGuard, cast
from uuid import UUID

from pydantic import BaseModel, RootModel, Secret, SecretBytes, SecretStr
from pydantic_core import to_json

Path = tuple[object, ...]
"""A place in a value: keys, positions and field names from the outside in."""

MAX_DEPTH: Final = 200
"""Levels of nesting that can always be decoded."""

_SHOWN_CHARACTERS: Final = 40
_TOO_DEEP: Final = f"it is nested more than {MAX_DEPTH} levels deep, or contains itself"
# Types whose instances are equal if they mean the same: a decoded one that is unequal has changed.
_COMPARABLE: Final = (str, bytes, bytearray, Number, date, time, timedelta, UUID)
_FLAT: Final = frozenset({str, int, float, bool, type(None)})
_JSON_TYPES: Final = (str, int, float, bool, type(None), list, dict)


class Unfaithful(Exception):  # noqa: N818 - never leaves the codec, which turns it into a SerializationError
    """Raised if a value would be changed by its JSON form."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"{place(self.path)}{self.reason}"


def is_mapping(value: object) -> TypeGuard[Mapping[object, object]]:
    return isinstance(value, Mapping)


def is_set(value: object) -> TypeGuard[AbstractSet[object]]:
    return isinstance(value, AbstractSet)


def is_row(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple | deque)


def is_mapped(value: object) -> bool:
    """Return whether a value is an object of a mapped class, or such a class."""
    return hasattr(value, "_sa_instance_state") or hasattr(value, "__mapper__")


def place(path: Path) -> str:
    """Return `path` as the beginning of a sentence: `at sources[3].url: `, or nothing for the value itself."""
    text = ""
    for part in path:
        if isinstance(part, str) and part.isidentifier():
            text += f".{part}" if text else part
        else:
            shown = repr(part) if isinstance(part, str | int) else f"a key of type {type(part).__name__}"
            text += f"[{shown[:_SHOWN_CHARACTERS]}]"
    return f"at {text}: " if text else ""


def same(one: object, other: object) -> bool:
    """Return whether the two are equal. They are not if the comparison fails or its result is no plain bool."""
    try:
        if isinstance(one, datetime) and isinstance(other, datetime) and one.tzinfo and other.tzinfo:
            # In the hour that occurs twice, datetimes of two zones are never equal.
            return one.astimezone(UTC) == other.astimezone(UTC)
        return bool(one == other)
    except Exception:  # noqa: BLE001 - __eq__ is user code
        return False


def compare(
    value: object, decoded: object, *, lenient: bool, whole: bool = False, complete: bool = False, path: Path = ()
) -> None:
    """Refuse a `value` that has lost information in `decoded`, which is decoded from its JSON form.

    A tuple that is decoded as a list has not. With `lenient`, neither has a value that JSON has no type for and that is
    decoded as its JSON form, such as a datetime as text; this applies to values without an annotation. With `whole`,
    fields that are left out of the JSON count too; both values are decoded ones then. With `complete`, a model that is
    decoded as a mapping must have all of its fields there.

    Raises:
        Unfaithful: with the place and the types.
    """
    if same(value, decoded):
        return
    if isinstance(value, RootModel):
        value = cast(RootModel[object], value).root
    _refuse_unstorable(value, decoded, path)
    came_back = f"{_a(value)} would come back as {_a(decoded)}"
    if is_mapping(value) and is_mapping(decoded):
        _compare_entries(value, decoded, lenient, whole, complete, path)
    elif is_set(value):
        if is_set(decoded):
            _compare_members(value, decoded, lenient, whole, complete, path)
        elif not lenient:
            raise Unfaithful(path, came_back)
        else:
            for item in value:
                _refuse_unstorable(item, None, path)
    elif is_row(value) and is_row(decoded):
        if len(value) != len(decoded):
            raise Unfaithful(path, came_back + " of another length")
        for position, (item, decoded_item) in enumerate(zip(value, decoded, strict=True)):
            compare(item, decoded_item, lenient=lenient, whole=whole, complete=complete, path=(*path, position))
    elif (fields := _fields(value, whole=whole)) is not None and (lenient or type(decoded) is type(value)):
        _compare_private(value, decoded, path)
        decoded_fields = decoded if is_mapping(decoded) else _fields(decoded, whole=whole) or {}
        for name, item in fields.items():
            if name in decoded_fields:
                compare(item, decoded_fields[name], lenient=lenient, whole=whole, complete=complete, path=(*path, name))
            elif complete and is_mapping(decoded):
                raise Unfaithful((*path, name), "it would be left out")
    elif type(value) is type(decoded):
        if isinstance(value, _COMPARABLE):
            each_time = ", each time: the JSON leaves it out, and its default is made anew" if whole else ""
            raise Unfaithful(path, f"{_a(value)} would come back as a different one{each_time}")
    elif not (lenient and isinstance(decoded, _JSON_TYPES)):
        raise Unfaithful(path, came_back)


def check_types(value: object, decoded: object, *, lenient: bool, path: Path = ()) -> None:
    """Refuse a bool or a member of an enum that is decoded as an equal number or text, and a number as a bool.

    With `lenient` a member of an enum may be. Models are passed over, because their fields are validated when they are
    made.

    Raises:
        Unfaithful: with the place and the types.
    """
    kind, decoded_kind = type(value), type(decoded)
    if kind is decoded_kind and (kind in _FLAT or (kind is dict and _has_same_types(value, decoded))):
        return
    if is_mapping(value) and is_mapping(decoded):
        if set(map(type, value)) != set(map(type, decoded)):
            check_types(set(value), set(decoded), lenient=lenient, path=path)
        for key, item in value.items():
            if key in decoded:
                check_types(item, decoded[key], lenient=lenient, path=(*path, key))
    elif is_row(value) and is_row(decoded):
        if kind is decoded_kind is deque and getattr(value, "maxlen", None) != getattr(decoded, "maxlen", None):
            raise Unfaithful(path, "a deque would come back without its maxlen, make one without, or a list")
        kinds = list(map(type, value))
        if not (_FLAT.issuperset(kinds) and kinds == list(map(type, decoded))):
            for position, (item, decoded_item) in enumerate(zip(value, decoded, strict=False)):
                check_types(item, decoded_item, lenient=lenient, path=(*path, position))
    elif is_set(value) and is_set(decoded):
        others = {item: item for item in decoded}
        for item in value:
            check_types(item, others.get(item, item), lenient=lenient, path=path)
    elif isinstance(value, BaseModel):
        return
    elif dataclasses.is_dataclass(value) and kind is decoded_kind:
        for field in dataclasses.fields(value):
            item, decoded_item = getattr(value, field.name, None), getattr(decoded, field.name, None)
            check_types(item, decoded_item, lenient=lenient, path=(*path, field.name))
    elif kind is not decoded_kind and (
        isinstance(value, bool if lenient else bool | Enum)
        or (isinstance(decoded, bool) and isinstance(value, int | float))
    ):
        raise Unfaithful(path, f"{_a(value)} would come back as {_a(decoded)}")


def _has_same_types(value: Any, decoded: Any) -> bool:
    """Return whether flat values of a dict, with texts as keys, have the same types: the most frequent params."""
    items: Iterable[tuple[object, object]] = value.items()
    for key, item in items:
        kind = type(item)
        if kind not in _FLAT or type(key) is not str or type(decoded.get(key)) is not kind:
            return False
    return True


def culprit(value: object, path: Path = ()) -> Unfaithful:
    """Find the innermost part of `value` that pydantic cannot encode."""
    if len(path) > MAX_DEPTH:
        return Unfaithful((), _TOO_DEEP)
    if is_mapping(value):
        for key in value:
            if not _encodes(key):
                return Unfaithful(path, f"a key of it, {_a(key)}, {_why_not(key)}")
    for part, child in _children(value):
        if not _encodes(child):
            return culprit(child, (*path, part))
    if is_mapping(value) or is_row(value):
        return Unfaithful((), _TOO_DEEP)
    return Unfaithful(path, f"{_a(value)} {_why_not(value)}")


def _compare_entries(
    value: Mapping[object, object],
    decoded: Mapping[object, object],
    lenient: bool,
    whole: bool,
    complete: bool,
    path: Path,
) -> None:
    for key, item in value.items():
        if key not in decoded:
            reason = f"a key of type {type(key).__name__} would come back as a str, annotate the dict with its key type"
            raise Unfaithful(path, reason)
        compare(item, decoded[key], lenient=lenient, whole=whole, complete=complete, path=(*path, key))


def _compare_members(
    value: AbstractSet[object],
    decoded: AbstractSet[object],
    lenient: bool,
    whole: bool,
    complete: bool,
    path: Path,
) -> None:
    changed = sorted((item for item in value if item not in decoded), key=_json_form)
    others = sorted((item for item in decoded if item not in value), key=_json_form)
    # Sets have no order, but a member that was changed has the same JSON as what it is decoded as.
    for item, other in zip(changed, others, strict=False):
        compare(item, other, lenient=lenient, whole=whole, complete=complete, path=path)
    if len(value) != len(decoded):
        raise Unfaithful(path, f"{_a(value)} would come back with another number of members")


def _compare_private(value: object, decoded: object, path: Path) -> None:
    if isinstance(value, BaseModel) and isinstance(decoded, BaseModel):
        private, decoded_private = value.__pydantic_private__ or {}, decoded.__pydantic_private__ or {}
        for name, item in private.items():
            if not same(item, decoded_private.get(name)):
                raise Unfaithful((*path, name), "a private attribute is not stored, and would come back as another one")


def _refuse_unstorable(value: object, decoded: object, path: Path) -> None:
    if (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, Decimal) and not value.is_finite()
    ):
        raise Unfaithful(path, "NaN and infinities have no JSON form")
    if isinstance(value, SecretStr | SecretBytes | Secret):
        reason = (
            f"a {type(cast(object, value)).__name__} would be stored masked, pass a reference to the secret instead"
        )
        raise Unfaithful(path, reason)
    if isinstance(value, bytes | bytearray | memoryview) and not isinstance(decoded, bytes | bytearray):
        raise Unfaithful(
            path,
            "bytes have no JSON form of their own, annotate them as bytes, or make text of them with base64 where"
            " nothing is annotated, as in messages and published values",
        )
    if isinstance(value, re.Pattern) and isinstance(decoded, re.Pattern):
        raise Unfaithful(path, "the flags of a pattern are not stored, write them into it: (?i) for re.IGNORECASE")


def _fields(value: object, *, whole: bool = False) -> dict[str, Any] | None:
    """Return the stored attributes of a model or dataclass, with `whole` all attributes; None for other values."""
    if isinstance(value, BaseModel):
        excluded = {name for name, field in type(value).model_fields.items() if field.exclude and not whole}
        return {name: item for name, item in value if name not in excluded}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def _children(value: object) -> Iterator[tuple[object, object]]:
    if is_mapping(value):
        yield from value.items()
    elif is_row(value) or is_set(value):
        yield from enumerate(value)
    elif (fields := _fields(value)) is not None:
        yield from fields.items()


def _json_form(value: object) -> bytes:
    """Return the JSON of a value that has one by itself, without an annotation."""
    try:
        return to_json(value)
    except Exception:  # noqa: BLE001 - serializers are user code
        return b""


def _encodes(value: object) -> bool:
    try:
        to_json(value)
    except Exception:  # noqa: BLE001 - serializers are user code
        return False
    return True


def _why_not(value: object) -> str:
    if isinstance(value, str):
        return "contains a lone surrogate, which UTF-8 cannot encode"
    if is_mapped(value):
        return "belongs to a session, pass its primary key"
    if isinstance(value, bytes):
        return (
            "is not UTF-8, annotate it as bytes, set ser_json_bytes and val_json_bytes to 'base64' in its model, or"
            " make text of it with base64 where nothing is annotated, as in messages and published values"
        )
    if _fields(value) is not None:
        return "has a serializer that failed"
    return "has no JSON form"


def _a(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
