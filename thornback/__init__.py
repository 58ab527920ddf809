"""thornback: post-train language models on several rewards at once, and serve them, on one Ray cluster.

The public names are imported when they are first used, so that `import thornback` and the command line's
errors cost neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thornback.contracts import Completion, Engine, EngineConfig, Prompt, Request, SamplingParams, ThornbackError
    from thornback.engine import TorchEngine, generate, load_model
    from thornback.serve import ServeConfig
    from thornback.train import RunConfig, RunResult, Trainer, build_model, evaluate, load_recipe, presample

_EXPORTS = {
    "contracts": "Completion Engine EngineConfig Prompt Request SamplingParams ThornbackError",
    "engine": "TorchEngine generate load_model",
    "serve": "ServeConfig",
    "train": "RunConfig RunResult Trainer build_model evaluate load_recipe presample",
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'thornback' has no attribute {name!r}")
    value = getattr(import_module(f"thornback.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
