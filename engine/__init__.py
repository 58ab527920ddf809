"""Token-level generation: tokens in, tokens and log-probabilities out. Knows no Ray and no text.

The names are imported when they are first used: a process that only starts others needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At once, since a module and a function share the name; it is light.
from thornback.engine.generate import Collector, Sample, generate

if TYPE_CHECKING:
    from thornback.engine.environment import ACTOR_ENVIRONMENT
    from thornback.engine.kv_pool import KVPool, pool_exists
    from thornback.engine.model import ModelShape, check_model_directory, load_model
    from thornback.engine.packing import sequence_logprobs
    from thornback.engine.torch_engine import TorchEngine
    from thornback.engine.transfer import PeerPools, read_export, read_runs, write_runs
    from thornback.engine.weights import bind_weights, copy_parameters, flatten_parameters, tensor_to_numpy

_EXPORTS = {
    "kv_pool": "KVPool pool_exists",
    "model": "ModelShape check_model_directory load_model",
    "packing": "sequence_logprobs",
    "environment": "ACTOR_ENVIRONMENT",
    "torch_engine": "TorchEngine",
    "transfer": "PeerPools read_export read_runs write_runs",
    "weights": "bind_weights copy_parameters flatten_parameters tensor_to_numpy",
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = [
    "ACTOR_ENVIRONMENT",
    "Collector",
    "KVPool",
    "ModelShape",
    "PeerPools",
    "Sample",
    "TorchEngine",
    "bind_weights",
    "check_model_directory",
    "copy_parameters",
    "flatten_parameters",
    "generate",
    "load_model",
    "pool_exists",
    "read_export",
    "read_runs",
    "sequence_logprobs",
    "tensor_to_numpy",
    "write_runs",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'thornback.engine' has no attribute {name!r}")
    value = getattr(import_module(f"thornback.engine.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
