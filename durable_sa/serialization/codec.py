"""Values as JSON text and back, by their annotations: a value that would be changed is a `SerializationError`.

Task code always gets the decoded value, in the first run as in every replay, so that it cannot branch on a difference
between the two. Only data is decoded: no code and no type name is ever read from the database.
"""

import inspect
import json
import logging
import re
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final, Generic, Literal, Never, NoReturn, TypeVar, cast, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel, ConfigDict, PydanticUserError, RootModel, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from ..errors import PayloadTooLarge, SerializationError
from .canonical import is_default, model_defaults
from .fidelity import Unfaithful, check_types, compare, culprit, is_mapped, is_mapping, is_row, place, same
from .types import UnfaithfulType, Zoned, check, parts

logger = logging.getLogger("durable_sa")

T_co = TypeVar("T_co", covariant=True)

DEFAULT_MAX_PAYLOAD_BYTES: Final = 16 * 1024 * 1024

# The last two annotate functions that always raise.
_UNANNOTATED: Final = (inspect.Parameter.empty, Any, object, NoReturn, Never)
_ATOMS: Final = (type(None), bool, int, str)
_INT64: Final = 2**63
_BEYOND_ASCII: Final = re.compile(r"[^\x00-\x7f]+")
# Base64 preserves bytes that are not UTF-8, too. Models, dataclasses and TypedDicts keep their own configuration.
_BASE64: Final = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
# Errors of pydantic whose messages repeat (a part of) the value.
_TELLTALE: Final = frozenset({"union_tag_invalid", "uuid_parsing"})
# Errors that the application's validators raise: the text is behind a prefix of pydantic.
_OWN: Final = frozenset({"value_error", "assertion_error"})
# Types of values that code goes on to calculate with, and that come back as text unless they are annotated.
_WITHOUT_JSON: Final = (date, time, timedelta, Decimal, UUID)
_MAX_WARNED: Final = 1000
_warned: Final[set[str]] = set()
"""The values whose missing annotation was logged."""


class Codec(Generic[T_co]):
    """Encodes values of one annotation as JSON text, and decodes them. Made by `codec_for`."""

    __slots__ = ("_adapter", "_annotation", "_atoms", "_drawn", "_forms", "_json", "_lenient")

    def __init__(self, annotation: object, names: Mapping[str, object] | None = None) -> None:
        self._annotation = annotation
        self._adapter: TypeAdapter[Any] | None = None
        self._lenient = True
        self._drawn = False
        """True if a field is left out of the JSON and its default is made by a function on each decoding."""
        self._forms = 0
        """The number of forms to try that leave fields out: 2, later 1 if the sparsest has failed, 0 without models."""
        self._atoms = frozenset(_ATOMS)
        if not any(annotation is unannotated for unannotated in _UNANNOTATED):
            self._adapter = _adapter(annotation, names)
            schema = self._adapter.core_schema
            check(schema, f"The type {self._name}")
            self._json = Zoned(self._adapter)
            self._forms = 2 * any(part.get("type") == "model" for part in parts(schema))
            self._lenient = _has_holes(schema)
            self._drawn = _draws(self._adapter.core_schema)
            self._atoms = frozenset(atom for atom in _ATOMS if annotation is atom)

    def __repr__(self) -> str:
        return f"Codec({self._name})"

    @property
    def _name(self) -> str:
        return "plain JSON" if self._adapter is None else _name(self._annotation)

    def validate(self, value: object) -> T_co:
        """Return `value` as a `T`, converted by pydantic if need be, such as a dict to a model.

        Raises:
            pydantic.ValidationError: `value` cannot be converted. `problems` returns the parts that may be shown.
        """
        if self._adapter is None:
            return cast(T_co, value)
        return cast(T_co, self._adapter.validator.validate_python(value, by_alias=True, by_name=True))

    def encode(self, value: object, what: str) -> str:
        """Return `value` as JSON text that decodes to it. `what` names the value in errors.

        Raises:
            SerializationError: if it has no JSON form or would come back changed.
        """
        return self.round_trip(value, what)[0]

    def round_trip(self, value: object, what: str) -> tuple[str, T_co]:
        """Return `value` as JSON text, and as decoded from that text.

        Raises:
            SerializationError: if it has no JSON form or would come back changed.
        """
        kind = type(value)
        if kind in self._atoms and (kind is not int or -_INT64 <= cast(int, value) < _INT64):
            return self._dump(value, what), cast(T_co, value)
        if self._forms and (sparse := self._sparse_round_trip(value, what)) is not None:
            return sparse
        text = self._dump(value, what)
        if isinstance(value, _WITHOUT_JSON) and self._annotation is inspect.Parameter.empty:
            _warn_of_change(what, kind)
        try:
            return text, self._checked(value, text, what)
        except SerializationError as error:
            raise _better_explained(error, value, text) from None
        except Unfaithful as unfaithful:
            raise SerializationError(what, f"cannot be stored: {unfaithful}") from None

    def _sparse_round_trip(self, value: object, what: str) -> tuple[str, T_co] | None:
        """Return text without the fields of models that are not set, for these to come back not set.

        First without all of them. If the value is not the same then, those are stored that have another value than a
        new default, or that may tell the members of a union apart. None if it is not the same then either: models in
        the place of an `Any`, for example, come back as dicts with all fields.
        """
        for sparse in ({"exclude_unset": True}, {"exclude": None})[2 - self._forms :]:
            try:
                text = self._dump(value, what, **({"exclude": _unset(value)} if "exclude" in sparse else sparse))
                decoded = self._checked(value, text, what, complete=True)
            except (SerializationError, Unfaithful, RecursionError):
                continue
            if "exclude" in sparse:
                self._forms = 1
            return text, decoded
        return None

    def _checked(self, value: object, text: str, what: str, *, complete: bool = False) -> T_co:
        """Return what is decoded of the text of a value.

        Raises:
            SerializationError, Unfaithful: it is not the same.
        """
        decoded = self.decode(text, what)
        if not same(value, decoded):
            compare(value, decoded, lenient=self._lenient, complete=complete)
            # Sorted, because the members of a set may change their order.
            if sorted(self._dump(decoded, what)) != sorted(self._dump(value, what)):
                raise Unfaithful((), "it would come back as another value")
        check_types(value, decoded, lenient=self._lenient)
        if self._drawn:
            compare(decoded, self.decode(text, what), lenient=True, whole=True)
        return decoded

    def decode(self, text: str, what: str) -> T_co:
        """Return the value of which `text` is the JSON form.

        Raises:
            SerializationError: if the text is no JSON, is nested deeper than about 200 levels, holds an integer of more
                than 4300 digits, or does not fit the annotation.
        """
        try:
            if self._adapter is None:
                return cast(T_co, from_json(text, allow_inf_nan=False))
            return cast(T_co, self._json.validator.validate_json(text, by_alias=True, by_name=True))
        except ValidationError as error:
            reason = "; ".join(problems(error))
        except ValueError as error:
            reason = str(error)
        except Exception as error:
            raise SerializationError(what, f"cannot be read back as {self._name}: {type(error).__name__}") from error
        raise SerializationError(what, f"cannot be read back as {self._name}: {reason}")

    def _dump(self, value: object, what: str, **sparse: Any) -> str:
        try:
            if self._adapter is None:
                encoded = to_json(value, by_alias=False, inf_nan_mode="null")
            else:
                encoded = self._json.serializer.to_json(
                    value, by_alias=False, round_trip=True, warnings=False, **sparse
                )
        except Exception:  # noqa: BLE001 - serializers are user code
            raise SerializationError(what, f"cannot be stored: {culprit(value)}") from None
        text = encoded.decode()
        # The search is in the text, because in bytes it takes ten times as long.
        if "NaN" in text or "Infinity" in text:
            _refuse_constants(text, what)
        return text


def codec_for(annotation: object, names: Mapping[str, object] | None = None) -> Codec[Any]:
    """Return the codec of an annotation. `Any`, `object` and `inspect.Parameter.empty` mean plain JSON.

    `names` are those that fields of local dataclasses and the like may use, where their annotations are text.

    Raises:
        SerializationError: if pydantic knows no JSON form for the annotation.
    """
    try:
        # Equal unions may differ in the order of their members, which decides between members that fit equally well.
        return _codec_for(annotation, annotation if isinstance(annotation, type) else repr(annotation))
    except TypeError:  # unhashable metadata of an Annotated
        return Codec(annotation, names)
    except UnfaithfulType:
        raise
    except SerializationError:
        if not names:
            raise
        return Codec(annotation, names)


@lru_cache(maxsize=1024)
def _codec_for(annotation: object, _spelling: object) -> Codec[Any]:
    return Codec(annotation)


UNTYPED: Final[Codec[Any]] = codec_for(Any)
"""The codec of values without an annotation: plain JSON."""


def check_size(text: str, limit: int, what: str) -> None:
    """Refuse JSON text of more than `limit` bytes of UTF-8.

    Raises:
        PayloadTooLarge: with the size and the limit.
    """
    if len(text) * 4 > limit and (size := len(text.encode())) > limit:
        raise PayloadTooLarge(what, size, limit)


def in_ascii(text: str) -> str:
    """Return JSON text that means the same, with escapes for all characters beyond ASCII."""
    return text if text.isascii() else _BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)


def problems(error: ValidationError) -> list[str]:
    """Return the places and reasons for which a value does not fit.

    The reasons are the texts of the application's validators, or those of pydantic that do not repeat the value.
    """
    return [
        place(detail["loc"]) + _reason(detail["type"], detail["msg"])
        for detail in error.errors(include_url=False, include_context=False, include_input=False)
    ]


def _reason(kind: str, message: str) -> str:
    if kind in _OWN:
        return message.partition(", ")[2] or kind
    return kind if kind in _TELLTALE else message


def _adapter(annotation: Any, names: Mapping[str, object] | None) -> TypeAdapter[Any]:
    try:
        try:
            adapter = TypeAdapter(annotation, config=_BASE64)
        except PydanticUserError as error:
            if error.code != "type-adapter-config-unused":
                raise
            adapter = TypeAdapter(annotation)
        if not adapter.pydantic_complete:
            adapter.rebuild(raise_errors=True, _types_namespace=None if names is None else dict(names))
    except Exception as error:
        what = f"The type {_name(annotation)}"
        if (mapped := _mapped_class(annotation)) is not None:
            remedy = "its objects belong to a session, pass the primary key and annotate its type"
            raise UnfaithfulType(what, f"cannot be stored: {mapped.__name__} is a mapped class; {remedy}") from None
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SerializationError(what, f"has no JSON form: {reason}") from error
    return adapter


def _mapped_class(annotation: object) -> type | None:
    """Return a mapped class that occurs in an annotation."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if is_mapped(annotation) else None
    return next(filter(None, map(_mapped_class, get_args(annotation))), None)


def _warn_of_change(what: str, kind: type) -> None:
    """Log once for each value without an annotation that it comes back as another type."""
    if what in _warned or len(_warned) >= _MAX_WARNED:
        return
    _warned.add(what)
    logger.warning("%s is a %s and comes back as text: annotate it as %s", what, kind.__name__, kind.__name__)


def _unset(value: object) -> Any:
    """Return what pydantic is to exclude: fields that are not set, and that a model gets again as they are."""
    if isinstance(value, RootModel):
        return None
    if isinstance(value, BaseModel):
        defaults = model_defaults(type(value))
        excluded: dict[Any, Any] = {}
        for name, item in value:
            default = defaults.get(name)
            if name in value.model_fields_set or default is None or not is_default(item, default):
                excluded[name] = _unset(item)
            elif get_origin(type(value).model_fields[name].annotation) is not Literal:
                excluded[name] = True
    elif is_mapping(value):
        excluded = {key: _unset(item) for key, item in value.items()}
    elif is_row(value):
        excluded = {position: _unset(item) for position, item in enumerate(value)}
    else:
        return None
    return {name: entry for name, entry in excluded.items() if entry is not None} or None


def _has_holes(schema: object) -> bool:
    """Return whether `Any` occurs in a core schema. A value in its place is plain JSON."""
    if isinstance(schema, dict):
        entries = cast(dict[str, object], schema)
        return entries.get("type") == "any" or any(map(_has_holes, entries.values()))
    return isinstance(schema, list) and any(map(_has_holes, cast(list[object], schema)))


def _draws(schema: object) -> bool:
    """Return whether a field of a core schema may be left out of the JSON and has a default that a function makes."""
    if isinstance(schema, dict):
        entries = cast(dict[str, object], schema)
        if entries.get("serialization_exclude") or entries.get("serialization_exclude_if"):
            field = entries.get("schema")
            return isinstance(field, dict) and "default_factory" in field
        return any(map(_draws, entries.values()))
    return isinstance(schema, list) and any(map(_draws, cast(list[object], schema)))


def _better_explained(error: SerializationError, value: object, text: str) -> SerializationError:
    """Return an error that names the NaN or secret, instead of the null or asterisks that pydantic wrote for it."""
    try:
        compare(value, from_json(text), lenient=True)
    except Unfaithful as unfaithful:
        return SerializationError(error.what, f"cannot be stored: {unfaithful}")
    except ValueError:
        return error
    return error


def _refuse_constants(text: str, what: str) -> None:
    try:
        from_json(text, allow_inf_nan=False)
    except ValueError:
        raise SerializationError(what, "cannot be stored: NaN and infinities have no JSON form") from None


def _name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else repr(annotation)
