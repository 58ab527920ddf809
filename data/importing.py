"""Names in a recipe that stand for somebody's own code."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from thornback.contracts import ConfigError


def load_object(path: str) -> Any:
    """What `package.module:Name` names; the working directory is searched too. Raises `ConfigError`."""
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f'"{path}" is not an import path; write package.module:Name.')
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # somebody else's module may fail in any way while it is imported
        raise ConfigError(f'"{path}" cannot be imported: {type(error).__name__}: {error}.') from error
    if not hasattr(module, attribute):
        raise ConfigError(f'"{path}": the module {module_name} has no {attribute}.')
    return getattr(module, attribute)
