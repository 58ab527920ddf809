"""Token-level generation: what goes into an engine, what comes out, and what an engine is."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, runtime_checkable

from thornback.contracts.kv import KVExport, KVImport, Lease, Reservation
from thornback.contracts.sampling import SamplingParams
from thornback.contracts.speculation import SpeculationConfig, SpeculationStats
from thornback.contracts.weights import WeightView

FinishReason = Literal["stop", "length", "abort"]
InFlight = Literal["finish", "recompute", "keep"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be continued. `adapter` names a LoRA adapter that the engine has loaded.

    `export_kv`: stop after the prompt's keys and values and the first token, and hand them out.
    `output_token_ids`: what the request has produced elsewhere already (before a hand-over or a fail-over);
    it goes on after them, with the same draws and limits as if it had never moved. Needs n = 1.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    export_kv: bool = False
    output_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)  # not frozen: one is made for each token, and freezing takes three times as long
class Output:
    """What one step added to sample `index` of a request.

    `token_ids` and `logprobs` hold the new tokens only, and are as long as each other. A log-probability is
    after temperature and before truncation (greedy: at temperature 1). `top_logprobs`, one list a token,
    are `(token_id, logprob)` in falling order. `prompt_logprobs` comes once, with the first output: per prompt
    position (None for the first) that token's own log-probability and the alternatives.
    `weight_version` is the version under which these tokens were drawn.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    index: int = 0
    finish_reason: FinishReason | None = None
    weight_version: int = 0
    num_cached_tokens: int = 0
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]] | None] | None = None
    kv: KVExport | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What placement reads. Counts of requests' samples, tokens, and KV use as a share in [0, 1]."""

    num_running: int
    num_waiting: int
    num_preempted: int
    num_waiting_tokens: int
    num_free_blocks: int
    num_blocks: int
    weight_version: int
    speculation: SpeculationStats | None = None  # of engines that speculate

    @property
    def kv_use(self) -> float:
        return 1.0 - self.num_free_blocks / max(self.num_blocks, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine, with vLLM's names. `num_blocks` None: enough for `max_num_seqs` full sequences,
    bounded by `kv_cache_memory_bytes`. `max_model_len` None: the model's own. `dtype` "auto": float32 on CPU,
    bfloat16 on CUDA. `num_threads` None: leave torch's setting alone. `kv_location`: "shared", or a file in shared
    memory, for a KV pool that other processes can map; "" keeps the pool private. `adapters`: LoRA adapter
    directories (peft's layout) by name. `speculation`: verify drafts from the engine's retrievers.
    """

    block_size: int = 32
    num_blocks: int | None = None
    kv_cache_memory_bytes: int = 2 << 30
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    dtype: str = "auto"
    device: str = "auto"
    num_threads: int | None = None
    kv_location: str = ""
    lease_seconds: float = 30.0
    adapters: tuple[tuple[str, str], ...] = ()
    speculation: SpeculationConfig | None = None


ENGINE_SIZES = tuple(f.name for f in fields(EngineConfig) if f.name != "speculation")


class Engine(Protocol):
    """Continuous batching over one model. Not thread-safe: one owner calls it.

    Randomness is positional: token t of a sample is drawn by inverse CDF, in order of token id, from the one
    uniform number of (seed, t). So a seed gives the same tokens alone, in any batch, and after preemption.
    `max_model_len`: the most tokens of a request, its answer included. `vocab_size`: what token ids are below.
    """

    max_model_len: int
    vocab_size: int

    def add_request(self, request: Request, kv: KVImport | None = None) -> None:
        """Queue a request. Raises `InvalidRequest` for one that could never run."""

    def abort_request(self, request_id: str) -> None:
        """Drop a request and free what it holds; unknown ids are ignored (it may just have finished)."""

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> list[Output]:
        """One forward pass over the running batch; an empty list when there is nothing to run."""

    def reserve(self, num_tokens: int) -> Reservation | None:
        """Blocks for the keys and values of so many tokens, which a transport fills before the request comes with
        them; None where there is no room. Whoever gives up releases the lease."""

    def release(self, lease: Lease) -> None:
        """The receiver has copied an export, or a reservation is not used: free its blocks."""

    def load_weights(self, weights: WeightView, version: int, in_flight: InFlight = "finish") -> None:
        """Swap the weights and flush the prefix cache. On CPU the parameters become views of the buffer.

        In-flight requests: "finish" refuses to swap while any is unfinished, "recompute" computes their
        keys and values again under the new weights, "keep" goes on with the old keys and values.
        """

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def flush_prefix_cache(self) -> None: ...

    def load(self) -> EngineLoad: ...


@runtime_checkable
class SpeculatingEngine(Protocol):
    """An `Engine` that can guess, and whose guesses can be made a function of what it generates alone."""

    def measure_costs(self) -> tuple[tuple[int, float], ...]:
        """What steps cost (`SpeculationConfig.costs`), measured now unless they are given; empty without speculation.

        It needs an idle engine, and, to be right, an idle machine."""
        ...

    def fix_costs(self, costs: tuple[tuple[int, float], ...]) -> None:
        """From now on steps cost this, whatever they take."""

    def start_over(self) -> None:
        """Forget whether guessing has won, as if nothing had been generated yet."""
