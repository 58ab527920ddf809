"""Token-level generation: tokens in, tokens and log-probabilities out. Knows no Ray and no text."""

from thornback.engine.generate import Collector, Sample, generate
from thornback.engine.kv_pool import KVPool, read_export
from thornback.engine.model import ModelShape, check_model_directory, load_model
from thornback.engine.packing import sequence_logprobs
from thornback.engine.torch_engine import TorchEngine
from thornback.engine.weights import bind_weights, copy_parameters, flatten_parameters, tensor_to_numpy

__all__ = [
    "Collector",
    "KVPool",
    "ModelShape",
    "Sample",
    "TorchEngine",
    "bind_weights",
    "check_model_directory",
    "copy_parameters",
    "flatten_parameters",
    "generate",
    "load_model",
    "read_export",
    "sequence_logprobs",
    "tensor_to_numpy",
]
