"""Durations as people read them, on the command line and in the dashboard."""

from __future__ import annotations


def span(seconds: float | None) -> str:
    """Format a duration in its two largest units, such as `2 h 5 min`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{max(seconds, 0):.1f} s"
    rest, parts = round(seconds), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
        if len(parts) == 2 or (parts and not count):
            break
    return " ".join(parts)
