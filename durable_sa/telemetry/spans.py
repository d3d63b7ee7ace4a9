"""Spans, and the guard that keeps their errors from the code that they are about."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from opentelemetry import context as current
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from .propagation import links_to_event

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("durable_sa")

_failed: set[str] = set()


def harmless(function: Callable[P, T]) -> Callable[P, T | None]:
    """Log the exceptions of a telemetry function, once per function, and return None instead of raising them."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if function.__qualname__ not in _failed:
                _failed.add(function.__qualname__)
                # The error of a task that is being handled would be logged as the context, and may quote values.
                error.__context__ = None
                logger.warning(
                    "telemetry failed in %s; further errors there are not logged", function.__qualname__, exc_info=error
                )
            return None

    return call


class Scope:
    """A span around a block of code, which finds it current. Exceptions pass through it."""

    def __init__(self, begin: Callable[[], Span]) -> None:
        self._begin = begin
        self._span: Span = INVALID_SPAN
        self._context: Context | None = None
        self._token: Any = None

    @harmless
    def set(self, attribute: str, value: str) -> None:
        """Set an attribute."""
        self._span.set_attribute(attribute, value)

    @harmless
    def link(self, metadata: str | None) -> None:
        """Add a link to the trace context in the metadata of an event, if there is one."""
        for link in links_to_event(metadata):
            self._span.add_link(link.context)

    def __enter__(self) -> Self:
        self._enter()
        return self

    @harmless
    def _enter(self) -> None:
        self._span = self._begin()
        self._context = set_span_in_context(self._span)
        self._token = current.attach(self._context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit(error)

    @harmless
    def _exit(self, error: BaseException | None) -> None:
        # The garbage collector closes abandoned coroutines in another context, from which the token cannot be detached.
        if self._token is not None and current.get_current() is self._context:
            current.detach(self._token)
        if isinstance(error, Exception):
            mark_failed(self._span, error)
        elif error is not None:
            self._span.set_attribute("durable.interrupted", True)
        self._span.end()


class Tracing:
    """The spans of one tracer."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, name: str, kind: SpanKind, attributes: Mapping[str, Any]) -> Span:
        """Begin a span below that of the calling code, which does not become current."""
        return self._start(name, kind=kind, attributes=dict(attributes)) or INVALID_SPAN

    def scope(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, Any],
        *,
        parent: Callable[[], Context | None] = lambda: None,
        links: Callable[[], Sequence[Link]] = tuple,
    ) -> Scope:
        """Return a span to enter, below `parent` or else below that of the calling code."""
        return Scope(
            lambda: self._tracer.start_span(
                name, context=parent(), kind=kind, attributes=dict(attributes), links=links()
            )
        )

    def past(self, name: str, attributes: Mapping[str, Any], seconds: float) -> None:
        """Add a span that began `seconds` ago and ends now, the first of its trace."""
        began = time.time_ns() - int(seconds * 1_000_000_000)
        span = self._tracer.start_span(name, context=Context(), attributes=dict(attributes), start_time=began)
        span.end()

    @harmless
    def _start(self, name: str, **options: Any) -> Span:
        return self._tracer.start_span(name, **options)


def mark_failed(span: Span, error: BaseException) -> None:
    """Mark a span with the class of an error. Its message may quote values, and is in the database."""
    kind = type(error).__qualname__
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, kind))
