"""The arguments of a step as text that is the same in every process and replay, because it is part of the key."""

import dataclasses
import json
import json.encoder
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any, Final, NoReturn, TypeAlias, cast

from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic_core import to_jsonable_python

from ..errors import SerializationError
from .fidelity import is_mapping, is_row, is_set

_BYTES: Final = (bytes, bytearray, memoryview)
_NONE: Final = "[[],{}]"
_Encoder: TypeAlias = Callable[[object, int], Iterable[str]]


class _Refused(Exception):  # noqa: N818 - never leaves this module
    pass


def encode_arguments(args: Sequence[object], kwargs: Mapping[str, object], what: str) -> str:
    """Return the arguments as canonical JSON text. `what` names the call in errors.

    Entries are sorted by key, sets by their members' text. Models, dataclasses and named tuples stand for their
    fields, enum members for their values, bytes for their base64 form.

    Raises:
        SerializationError: naming the argument that is no data: a function, session or connection, an ORM object, an
            iterator, a secret, NaN, text with a lone surrogate, or anything that contains one.
    """
    if not args and not kwargs:
        return _NONE
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
        return {name: item for name, item in value if not _excluded(value, name)}
    if is_set(value):
        return sorted(_canonical(item) for item in value)
    if is_mapping(value):
        return dict(value)
    if hasattr(value, "_sa_instance_state"):
        _refuse(f"a {kind} belongs to a session, pass its primary key")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
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


def _excluded(model: BaseModel, name: str) -> bool:
    field = type(model).model_fields.get(name)
    return field is not None and bool(field.exclude)


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
