"""Import the `Durable` of an application by its name, such as `app.tasks:durable`."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from .. import Durable
from ..errors import InvalidConfiguration


def load(target: str) -> Durable[Any]:
    """Import a `Durable`, with the current directory on the path.

    Raises:
        InvalidConfiguration: the module does not exist, or has no Durable of that name.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        raise InvalidConfiguration(
            "MODULE:DURABLE", f"{target!r} has another form", "Write, for example, app.tasks:durable."
        )
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - the path holds strings
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # If the application's own import fails, its traceback says where.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InvalidConfiguration(
            "MODULE:DURABLE",
            f"the module {error.name!r} was not found",
            f"The search path is {here} and Python's packages.",
        ) from error
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, Durable):
        raise InvalidConfiguration("MODULE:DURABLE", f"{name!r} in {module_name} is not a Durable", _suggestion(module))
    return found  # pyright: ignore[reportUnknownVariableType] - of any state


def _suggestion(module: ModuleType) -> str:
    names = sorted(name for name, value in vars(module).items() if isinstance(value, Durable))
    if not names:
        return "The module contains none."
    return f"Write {' or '.join(f'{module.__name__}:{name}' for name in names)}."
