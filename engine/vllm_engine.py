"""vLLM behind the `Engine` contract, in this process (vLLM 0.32; `make bench` installs it).

What vLLM cannot do is refused: handing keys and values over (its connectors do that between vLLM engines), going on
after earlier output (its random generators start with a request), and truncated sampling, whose log-probabilities it
reports after truncation. Its seeds are its own: the same seed draws other tokens than the torch engine does.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from thornback.contracts import (
    EngineConfig,
    EngineLoad,
    InFlight,
    InvalidRequest,
    KVImport,
    Lease,
    Output,
    Request,
    Reservation,
    SamplingParams,
    WeightView,
)
from thornback.engine.weights import TORCH_DTYPES

# One process, whose cores other actors share; read when vLLM is imported.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


class VllmEngine:
    """The contract over vLLM's `LLMEngine`. One a process: vLLM's distributed state is global."""

    def __init__(self, model: str, config: EngineConfig | None = None, **options: Any) -> None:
        """`options` are further arguments of vLLM's `EngineArgs`, such as `enforce_eager=True`."""
        config = config or EngineConfig()
        os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
        if config.num_threads:
            os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "enable_prefix_caching": config.enable_prefix_caching,
            "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
            "num_gpu_blocks_override": config.num_blocks,
            "logprobs_mode": "processed_logprobs",  # after temperature, as the contract says
            "disable_log_stats": True,
        }
        self._llm = LLMEngine.from_engine_args(EngineArgs(**{**arguments, **options}))
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._live: dict[tuple[str, int], int | None] = {}  # how many alternatives each unfinished sample wants
        self._version = 0
        self._paused = False

    def add_request(self, request: Request, kv: KVImport | None = None) -> None:
        if not request.prompt_token_ids:
            raise InvalidRequest("The prompt is empty; give at least one token.")
        if len(request.prompt_token_ids) >= self.max_model_len:
            raise InvalidRequest(
                f"The prompt has {len(request.prompt_token_ids)} tokens, but this engine holds {self.max_model_len} "
                "a request, the answer included; shorten the prompt or raise max_model_len."
            )
        if request.export_kv or request.output_token_ids or request.adapter or request.sampling.truncates:
            raise InvalidRequest(
                "The vLLM engine takes no hand-overs, adapters or truncated sampling; use the torch engine for those."
            )
        try:
            prompt = self._llm.renderer.render_cmpl([{"prompt_token_ids": list(request.prompt_token_ids)}])[0]
            self._llm.add_request(request.request_id, prompt, _sampling_params(request.sampling))
        except ValueError as error:
            raise InvalidRequest(f"vLLM refuses request {request.request_id}: {error}") from error
        for index in range(request.sampling.n):
            self._live[request.request_id, index] = request.sampling.logprobs

    def abort_request(self, request_id: str) -> None:
        for sample in [sample for sample in self._live if sample[0] == request_id]:
            del self._live[sample]
        self._llm.abort_request([request_id])

    def has_unfinished_requests(self) -> bool:
        return bool(self._live)

    def step(self) -> list[Output]:
        if self._paused or not self._live:
            return []
        return [out for result in self._llm.step() for out in self._outputs(result)]

    def _outputs(self, result: Any) -> list[Output]:
        """One of vLLM's `RequestOutput`s, which carries the new tokens only."""
        outputs = []
        for sample in result.outputs:
            tables = list(zip(sample.token_ids, sample.logprobs, strict=True))
            wanted = self._live[result.request_id, sample.index]
            if sample.finish_reason is not None:
                del self._live[result.request_id, sample.index]
            outputs.append(
                Output(
                    request_id=result.request_id,
                    token_ids=list(sample.token_ids),
                    logprobs=[float(table[token].logprob) for token, table in tables],
                    index=sample.index,
                    finish_reason=sample.finish_reason,
                    weight_version=self._version,
                    num_cached_tokens=result.num_cached_tokens or 0,
                    top_logprobs=None if wanted is None else [_ranked(table)[:wanted] for _, table in tables],
                )
            )
        return outputs

    def reserve(self, num_tokens: int) -> Reservation | None:
        return None  # it takes no hand-overs

    def release(self, lease: Lease) -> None:
        raise InvalidRequest(f"The vLLM engine hands no keys and values out, so it knows no lease {lease.lease_id}.")

    def load_weights(self, weights: WeightView, version: int, in_flight: InFlight = "finish") -> None:
        """vLLM copies the weights into its own layout; it cannot map the buffer."""
        if in_flight != "finish" or self._live:
            raise RuntimeError("The vLLM engine swaps weights between requests only (in_flight='finish').")
        tensors = [
            # a copy: mapped buffers are read-only, and vLLM reorders weights in place
            (spec.name, torch.from_numpy(array.copy()).view(TORCH_DTYPES[spec.dtype]))
            for spec, array in weights
        ]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
        self._llm.apply_model(_pack_head)
        self._version = version
        self.flush_prefix_cache()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def flush_prefix_cache(self) -> None:
        self._llm.reset_prefix_cache()

    def load(self) -> EngineLoad:
        scheduler = self._llm.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_preempted=0,
            num_waiting_tokens=sum(request.num_tokens for request in scheduler.waiting),
            num_free_blocks=pool.get_num_free_blocks(),
            num_blocks=pool.num_gpu_blocks - 1,  # vLLM keeps one for itself
            weight_version=self._version,
        )


def _pack_head(model: torch.nn.Module) -> None:
    """An output head that is tied to the embedding is in no checkpoint, so that vLLM reloads the embedding and, on
    CPU, goes on with the head's packed copy of the old one: pack it again."""
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def _ranked(table: dict[int, Any]) -> list[tuple[int, float]]:
    return [(token, float(entry.logprob)) for token, entry in sorted(table.items(), key=lambda item: item[1].rank)]


def _sampling_params(sampling: SamplingParams) -> Any:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VllmSamplingParams(
        n=sampling.n,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=sampling.seed,
        logprobs=sampling.logprobs or 0,
        ignore_eos=sampling.ignore_eos,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
