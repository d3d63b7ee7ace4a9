"""Whether the application has set up OpenTelemetry. Nothing of it is imported here: who uses it has imported it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .telemetry import Telemetry

_GETTERS = {"opentelemetry.trace": "get_tracer_provider", "opentelemetry.metrics": "get_meter_provider"}


def automatic() -> Telemetry | None:
    """Telemetry on the global providers, once there are any: a tracer provider, a meter provider, or both."""
    if "opentelemetry" not in sys.modules or not any(_is_set_up(module, getter) for module, getter in _GETTERS.items()):
        return None
    from .telemetry import shared

    return shared()


def _is_set_up(module: str, getter: str) -> bool:
    api = sys.modules.get(module)
    # Until somebody sets one, the API gives out a provider of its own, which does nothing.
    return api is not None and not type(getattr(api, getter)()).__module__.startswith(module)
