"""A user's own tasks and rewards, by import path."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from thornback.contracts import ConfigError


def load_object(path: str, what: str = "object") -> Any:
    """What `package.module:name` names; `what` is how errors call it.

    The working directory is searched too, as Python does for scripts. Raises `ConfigError` for a path that is
    malformed, a module that cannot be imported, or a name that it does not have.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f'The {what} "{path}" is no import path; write package.module:name.')
    if os.getcwd() not in sys.path:  # an installed console script does not search it
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: whatever it raises, the user must hear where
        raise ConfigError(
            f'The {what} "{path}" cannot be imported ({type(error).__name__}: {error}); is the module on the '
            "Python path, and does it import by itself?"
        ) from error
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise ConfigError(f'The {what} "{path}" does not exist: {module_name} has no "{attribute}".') from None
    return value
