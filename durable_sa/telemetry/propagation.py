"""The W3C trace context, as it is stored in the headers of tasks and the metadata of events."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final, cast

from opentelemetry.context import Context
from opentelemetry.trace import Link, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..serialization.codec import UNTYPED

OTEL_CONTEXT: Final = "durable::otel_context"
"""The key of an object with `traceparent` and, if present, `tracestate`."""
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def inject(headers: MutableMapping[str, Any], context: Context | None = None) -> MutableMapping[str, Any]:
    """Store a trace context, by default that of the calling code, among headers, as durable does for a spawn.

    Outside of any span the headers stay as they are. Returns the headers.
    """
    if carrier := carried(context):
        headers[OTEL_CONTEXT] = carrier
    return headers


def extract(headers: Mapping[str, Any]) -> Context:
    """Return the trace context among headers of a task, such as `ctx.headers`. Without one it is empty."""
    return _extracted(headers.get(OTEL_CONTEXT))


def carried(context: Context | None = None) -> dict[str, str]:
    """Return the trace context as it is stored, by default that of the calling code; empty outside of any span."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return carrier


def encoded(carrier: Mapping[str, str]) -> str | None:
    """Return the metadata of an event."""
    return UNTYPED.encode({OTEL_CONTEXT: dict(carrier)}, "the metadata of an event") if carrier else None


def context_of(headers: str | None) -> Context:
    """Return the trace context in the headers of a task. Without one it is empty, and starts a new trace."""
    return extract({} if headers is None or OTEL_CONTEXT not in headers else UNTYPED.decode(headers, "headers"))


def links_to(wakers: str | None) -> list[Link]:
    """Return links to the trace contexts in a JSON array."""
    stored: Any = [] if wakers is None else UNTYPED.decode(wakers, "wakers")
    contexts = [get_current_span(_extracted(carrier)).get_span_context() for carrier in stored]
    return [Link(context) for context in contexts if context.is_valid]


def links_to_event(metadata: str | None) -> list[Link]:
    """Return the link to the trace context in the metadata of an event, if there is one."""
    context = get_current_span(context_of(metadata)).get_span_context()
    return [Link(context)] if context.is_valid else []


def _extracted(carrier: object) -> Context:
    """Return the trace context in a JSON value, which may be of any form if an application has written it."""
    if not isinstance(carrier, dict):
        return Context()
    fields = {key: value for key, value in cast("dict[str, Any]", carrier).items() if isinstance(value, str)}
    return _PROPAGATOR.extract(fields, Context())
