"""Checks of a text that need no person."""

import re
from collections.abc import Callable

SHORTEST = 15


def spelling(text: str) -> list[str]:
    return [f"spelling: {word}" for word in re.findall(r"\b(?:teh|recieve|seperate)\b", text, re.IGNORECASE)]


def repetition(text: str) -> list[str]:
    return [f"repeated: {word}" for word in re.findall(r"\b(\w+) \1\b", text)]


def length(text: str) -> list[str]:
    return [] if len(text) >= SHORTEST else ["too short"]


CHECKS: dict[str, Callable[[str], list[str]]] = {"spelling": spelling, "repetition": repetition, "length": length}
