"""The arguments of a step as text that is the same in every process and replay, because it is part of the key."""

import dataclasses
import functools
import json
import json.encoder
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any, Final, NoReturn, TypeAlias, cast

from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from ..errors import SerializationError
from .fidelity import is_mapped, is_mapping, is_row, is_set

_BYTES: Final = (bytes, bytearray, memoryview)
NO_ARGUMENTS: Final = "[[],{}]"
_Encoder: TypeAlias = Callable[[object, int], Iterable[str]]


class _Refused(Exception):  # noqa: N818 - never leaves this module
    pass


def encode_arguments(args: Sequence[object], kwargs: Mapping[str, object], what: str) -> str:
    """Return the arguments as canonical JSON text. `what` names the call in errors.

    Entries are sorted by key, sets by their members' text. Models and dataclasses stand for those of their fields that
    differ from their defaults, so that a new field with a default changes no text; named tuples stand for all fields,
    enum members for their values, bytes for their base64 form.

    Raises:
        SerializationError: naming the argument that is no data: a function, session or connection, an ORM object, an
            iterator, a secret, NaN, text with a lone surrogate, or anything that contains one.
    """
    if not args and not kwargs:
        return NO_ARGUMENTS
    try:
        return _canonical([args, kwargs])
    except _Refused as refused:
        reason = str(refused)
    for label, value in _labelled(args, kwargs):
        try:
            _canonical(value)
        except _Refused as refused:
            raise SerializationError(what, f"cannot encode its {label}: {refused}") from None
    raise SerializationError(what, f"cannot encode its arguments: {reason}")


def _labelled(args: Sequence[object], kwargs: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for position, value in enumerate(args, start=1):
        yield f"argument {position} (of type {type(value).__name__})", value
    for name, value in kwargs.items():
        yield f"argument {name!r} (of type {type(value).__name__})", value


def _canonical(value: object) -> str:
    try:
        try:
            text = _encode(value)
        except TypeError:  # keys that are not text, or of several types
            text = _ENCODER.encode(_with_text_keys(value))
        text.encode()
    except _Refused:
        raise
    except UnicodeEncodeError:
        raise _Refused("text with a lone surrogate, which UTF-8 cannot encode") from None
    except ValueError as error:
        raise _Refused(str(error)) from None
    except Exception as error:  # noqa: BLE001 - attributes are user code, and too deep nesting ends here as well
        raise _Refused(f"{type(error).__name__} while it was encoded") from None
    return text


def _encode(value: object) -> str:
    try:
        return "".join(_chunks(value, 0))
    except Exception:  # noqa: BLE001 - what this one refuses, the other one explains
        return _ENCODER.encode(value)


def _with_text_keys(value: object) -> object:
    if is_mapping(value):
        return {_canonical(key): _with_text_keys(item) for key, item in value.items()}
    if is_row(value):
        return [_with_text_keys(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return _with_text_keys(_portable(value))


def _portable(value: object) -> object:
    """Return a value of a JSON type in place of one that JSON has no type for."""
    kind = type(value).__name__
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return _without_defaults(value, model_defaults(type(value)))
    if is_set(value):
        return sorted(_canonical(item) for item in value)
    if is_mapping(value):
        return dict(value)
    if is_mapped(value):
        _refuse(f"a {kind} belongs to a session, pass its primary key")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return _without_defaults(fields, _dataclass_defaults(type(value)))
    if isinstance(value, SecretStr | SecretBytes | Secret):
        _refuse(f"a {kind}, pass a reference and read the secret inside the step")
    if isinstance(value, Iterator):
        _refuse("an iterator can be read only once, pass a list")
    if not isinstance(value, _BYTES) and isinstance(value, Sequence):
        return list(cast(Sequence[object], value))
    try:
        return cast(object, to_jsonable_python(value, bytes_mode="base64"))
    except Exception:  # noqa: BLE001 - serializers are user code
        _refuse(f"a {kind} is no data that can be recognised on replay, pass what identifies it")


def _without_defaults(
    fields: Iterable[tuple[str, object]], defaults: Mapping[str, Callable[[], object] | None]
) -> dict[str, object]:
    return {name: item for name, item in fields if name not in defaults or not is_default(item, defaults[name])}


@functools.lru_cache(maxsize=1024)
def model_defaults(model: type[BaseModel]) -> dict[str, Callable[[], object] | None]:
    """Return functions for the defaults of fields, and None for fields that are excluded from all JSON."""
    defaults: dict[str, Callable[[], object] | None] = {}
    for name, field in model.model_fields.items():
        if field.exclude:
            defaults[name] = None
        elif not field.is_required() and not getattr(field, "default_factory_takes_validated_data", False):
            defaults[name] = functools.partial(field.get_default, call_default_factory=True)
    return defaults


@functools.lru_cache(maxsize=1024)
def _dataclass_defaults(kind: type[Any]) -> dict[str, Callable[[], object] | None]:
    defaults: dict[str, Callable[[], object] | None] = {}
    for field in dataclasses.fields(kind):
        default: Any = field.default
        if isinstance(default, FieldInfo):
            if not default.is_required():
                defaults[field.name] = functools.partial(default.get_default, call_default_factory=True)
        elif default is not dataclasses.MISSING:
            defaults[field.name] = functools.partial(_same_object, default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = cast(Callable[[], object], field.default_factory)
    return defaults


def _same_object(value: object) -> object:
    return value


def is_default(item: object, default: Callable[[], object] | None) -> bool:
    """Return whether a field has its default, also in the types: `==` takes 1 for True."""
    if default is None:
        return True
    try:
        other = default()
        if type(item) is not type(other) or not item == other:  # noqa: SIM201 - `!=` may be another method
            return False
        return isinstance(item, str | int | None) or _canonical(item) == _canonical(other)
    except Exception:  # noqa: BLE001 - defaults and comparisons are user code
        return False


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


_ENCODER: Final = json.JSONEncoder(
    sort_keys=True,
    allow_nan=False,
    ensure_ascii=False,
    separators=(",", ":"),
    default=cast(Callable[[Any], Any], _portable),
)

_make_encoder: Final[Callable[..., _Encoder] | None] = getattr(json.encoder, "c_make_encoder", None)
_chunks: Final[_Encoder] = (
    cast(_Encoder, _ENCODER.iterencode)
    if _make_encoder is None
    else _make_encoder(None, _portable, json.encoder.encode_basestring, None, ":", ",", True, False, False)
)
"""The encoder that `_ENCODER` would make for each value, which takes twice as long as to encode a short one."""
