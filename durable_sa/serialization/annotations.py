"""The types that functions declare, even if an annotation is text that names local types.

`from __future__ import annotations` leaves all annotations as text. Each is evaluated separately, on use: one that
cannot be, such as a context's whose type is imported for type checkers only, does not affect the others.
"""

import functools
import inspect
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from types import FrameType, FunctionType, MethodType, SimpleNamespace
from typing import Any, ForwardRef, cast

from ..errors import SerializationError

_PACKAGE = __name__.partition(".")[0]


def plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function below partials, methods, callable objects and decorators that use `functools.wraps`."""
    while not isinstance(function, type):
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, MethodType):
            function = function.__func__
        elif (wrapped := getattr(function, "__wrapped__", None)) is not None:
            function = wrapped
        elif isinstance(function, FunctionType) or not isinstance(call := _call(function), FunctionType):
            break
        else:
            function = call
    return function


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Return whether the result of a call is awaited, for partials, methods and decorated functions too."""
    if type(function) is FunctionType and function.__code__.co_flags & inspect.CO_COROUTINE:
        return True
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(plain_function(function))


def local_types(function: Callable[..., Any]) -> dict[str, object]:
    """Return the locals of the decorating frame that annotations of `function` name. Called by a decorator.

    The locals that annotations of these types name are included. The frame itself is not kept. A name that exists in
    the module too is taken from the frame only if `function` is defined there.
    """
    function = plain_function(function)
    wanted = [*_named_by(_declared(function))]
    frame = _decorating_frame() if wanted else None
    if frame is None or frame.f_locals is frame.f_globals:
        return {}
    nested = getattr(function, "__qualname__", "").rpartition(".<locals>")[0] == frame.f_code.co_qualname
    shared = () if nested else getattr(function, "__globals__", ())
    local_names = frame.f_locals
    found: dict[str, object] = {}
    while wanted:
        name = wanted.pop()
        if name in local_names and name not in shared and name not in found:
            value = found[name] = local_names[name]
            for part in value.__mro__ if isinstance(value, type) else ():
                wanted += _named_by(inspect.get_annotations(part))
    return found


def names_around(function: Callable[..., Any], local_names: Mapping[str, object]) -> Mapping[str, object]:
    """Return the names for annotations of local types' fields: `local_names` and the closure of `function`."""
    return {**local_names, **_closure(plain_function(function))}


def resolve(function: Callable[..., Any], name: str, local_names: Mapping[str, object]) -> object:
    """Return the type that `function` declares for its parameter `name`, or for its result if that is "return".

    Returns `inspect.Parameter.empty` if it declares none. The result of a class is the class itself; the type of a
    result that is awaited is that of the awaited value.

    Raises:
        SerializationError: the annotation contains a name that is not defined, or not yet.
    """
    function = plain_function(function)
    if isinstance(function, type):
        return function if name == "return" else inspect.Parameter.empty
    declared = _declared(function).get(name, inspect.Parameter.empty)
    if not isinstance(declared, type) or typing.get_args(declared):
        declared = _evaluate(function, name, declared, local_names)
    if typing.get_origin(declared) in (Awaitable, Coroutine):
        return typing.get_args(declared)[-1]
    return declared


def _call(function: object) -> object:
    return getattr(type(function), "__call__", None)  # noqa: B004 - the function itself is wanted


def _declared(function: Callable[..., Any]) -> Mapping[str, object]:
    return cast(Mapping[str, object], getattr(function, "__annotations__", {}))


def _evaluate(function: Callable[..., Any], name: str, declared: object, local_names: Mapping[str, object]) -> object:
    holder = SimpleNamespace(__annotations__={name: declared})
    names = names_around(function, local_names)
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", {}), names, include_extras=True)[name]
    except Exception as error:
        label = "The return annotation" if name == "return" else f"The annotation of {name!r}"
        what = f"{label} of {getattr(function, '__qualname__', repr(function))}"
        remedy = "import it at run time, at the top of the module or in the function that defines this one"
        raise SerializationError(what, f"cannot be evaluated: {error}; {remedy}") from error


def _closure(function: Callable[..., Any]) -> dict[str, object]:
    if not isinstance(function, FunctionType) or function.__closure__ is None:
        return {}
    names: dict[str, object] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return names


def _named_by(annotations: Mapping[str, object]) -> Iterator[str]:
    """Yield the names in annotations that are text."""
    for annotation in annotations.values():
        for text in _texts(annotation):
            yield from _names(text)


def _texts(annotation: object) -> Iterator[str]:
    if isinstance(annotation, str):
        yield annotation
    elif isinstance(annotation, ForwardRef):
        yield annotation.__forward_arg__
    else:
        for argument in typing.get_args(annotation):
            yield from _texts(argument)


def _names(text: str) -> tuple[str, ...]:
    try:
        return compile(text, "<annotation>", "eval").co_names
    except SyntaxError:
        return ()


def _decorating_frame() -> FrameType | None:
    """Return the frame outside this package from which a decorator was called."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return frame
