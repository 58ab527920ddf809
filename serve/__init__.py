"""An OpenAI-compatible endpoint over token-level engines, as a Ray Serve application.

The names are imported when they are first used, so that `ServeConfig` costs neither Ray nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thornback.serve.application import app, build_app
    from thornback.serve.config import ServeConfig
    from thornback.serve.server import Server, run, start

_MODULE_OF = {
    **{"ServeConfig": "config"},
    **{"app": "application", "build_app": "application"},
    **{"Server": "server", "run": "server", "start": "server"},
}

__all__ = ["ServeConfig", "Server", "app", "build_app", "run", "start"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'thornback.serve' has no attribute {name!r}")
    value = getattr(import_module(f"thornback.serve.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
