"""vLLM behind the `Engine` contract, in this process (vLLM 0.32).

Tokens are drawn by position (vllm_worker.py), so that a seed gives what it gives under the torch engine. It verifies
chains where the torch engine verifies trees (vllm_speculation.py), and hands keys and values over by a pool beside its
own cache (vllm_connector.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from thornback.contracts import (
    EngineConfig,
    EngineLoad,
    InFlight,
    InvalidRequest,
    KVImport,
    Lease,
    ModelError,
    Output,
    Request,
    Reservation,
    Retriever,
    SamplingParams,
    WeightView,
)
from thornback.engine.kv_pool import KVPool
from thornback.engine.model_runner import fresh_seeds
from thornback.engine.pass_costs import Costs
from thornback.engine.requests import check_request
from thornback.engine.speculation import Speculation
from thornback.engine.step_trials import time_steps
from thornback.engine.structured import GrammarCompiler
from thornback.engine.vllm_arguments import device, engine_args, set_environment
from thornback.engine.vllm_speculation import make_drafter
from thornback.engine.vllm_staging import Staging
from thornback.engine.weights import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class _Sample:
    """Sample `index` of a request: a request of its own to vLLM."""

    request: Request
    index: int


class VllmEngine:
    """The contract over vLLM's `LLMEngine`. One a process: vLLM's distributed state is global."""

    def __init__(
        self,
        model: str,
        config: EngineConfig | None = None,
        retrievers: tuple[Retriever, ...] = (),
        **options: Any,
    ) -> None:
        """`options` are further arguments of vLLM's `EngineArgs`, such as `enforce_eager=False`."""
        self.config = config = config or EngineConfig()
        set_environment(config.num_threads)
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.llm_engine import LLMEngine

        from thornback.engine.vllm_worker import eos_of

        self._adapters = {name: number for number, (name, _) in enumerate(config.adapters, start=1)}
        self._adapter_paths = dict(config.adapters)
        arguments = engine_args(str(model), config, options)
        self._llm = LLMEngine.from_engine_args(arguments)
        self._llm.collective_rpc("draw_by_position")
        self.max_model_len: int = self._llm.model_config.max_model_len
        self.vocab_size: int = self._llm.model_config.get_vocab_size()
        self._eos = eos_of(self._llm.model_config)
        self._grammars: GrammarCompiler | None = None
        self._refusals = (ValueError, VLLMClientError)
        self._samples: dict[str, _Sample] = {}  # what is unfinished, by vLLM's id
        self._names: dict[str, list[str]] = {}  # vLLM's ids of a request's samples
        self._num_requests = 0
        self._seeds = fresh_seeds()
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the weights that were loaded first
        self._version = 0
        self._num_flushes = 0
        self._paused = False
        self.staging = Staging(self._llm, config, self.max_model_len) if config.kv_location else None
        self._waiting: deque[Request] = deque()  # for a place for what they are to hand over
        self._speculation = Speculation(None, (), None, self.max_model_len, self.vocab_size)
        if config.speculation is not None:
            of_model = self.vocab_size, self.max_model_len
            drafter, blocks = make_drafter(config, *of_model, device(), arguments.dtype)
            self._speculation = Speculation(
                config.speculation, retrievers, drafter, self.max_model_len, self.vocab_size, verifies_trees=False
            )
            self._llm.collective_rpc("speculate", args=(self._speculation, blocks))
            # Else vLLM pads what has one token to compute with as many as may be guessed, and has it wait for room.
            self._llm.engine_core.engine_core.scheduler.num_spec_tokens = 0
        self.measure_costs()

    @property
    def speculation(self) -> Speculation:
        """What it guesses by. Another one may be set while no requests run."""
        return self._speculation

    @speculation.setter
    def speculation(self, speculation: Speculation) -> None:
        self._speculation = speculation
        self._llm.collective_rpc("guess_by", args=(speculation,))

    def measure_costs(self) -> Costs:
        """See `TorchEngine.measure_costs`."""
        if self._samples:
            raise RuntimeError("Passes are being timed on a busy engine; run its requests to their end first.")

        def run(num_tokens: int) -> None:
            self._llm.collective_rpc("try_pass", args=(num_tokens,))

        self.speculation.measure(run, self.config.max_num_batched_tokens)
        trials = self.speculation.trials()
        if trials is not None:
            self.speculation.add_overhead(*time_steps(self, trials))
        return self.speculation.costs

    def fix_costs(self, costs: Costs) -> None:
        self.speculation.fix_costs(costs)

    def start_over(self) -> None:
        self.speculation.start_over()

    def add_request(self, request: Request, kv: KVImport | None = None) -> None:
        check_request(request, self.vocab_size, self.max_model_len, self._adapters)
        if request.request_id in self._names:
            raise InvalidRequest(f"Request id {request.request_id} is in use; ids must be unique while they run.")
        if request.export_kv and request.sampling.n > 1:
            raise InvalidRequest("Under vLLM a request that hands its keys and values over needs n = 1.")
        if (request.export_kv or kv is not None) and self.staging is None:
            raise InvalidRequest("This engine hands no keys and values over: it was made without a kv_location.")
        if request.sampling.json_schema is not None:
            self._check_schema(request.sampling.json_schema)
        params = None
        if request.export_kv and self.staging is not None:
            params = None if self._waiting else self.staging.prepare(request)
            if params is None:
                self._check(request)  # now, since later nobody can be told
                self._names[request.request_id] = []
                self._waiting.append(request)
                return
        elif self.staging is not None:
            params = self.staging.receive(request, kv, self._version)
        self._begin(request, params)

    def _begin_exports(self, staging: Staging) -> None:
        """Begin requests that hand over, as far as there is room for that."""
        while self._waiting and (params := staging.prepare(self._waiting[0])) is not None:
            self._begin(self._waiting.popleft(), params)

    def _begin(self, request: Request, kv_transfer_params: dict[str, Any] | None) -> None:
        for index, (prompt, params) in enumerate(self._for_vllm(request, kv_transfer_params)):
            name = f"{self._num_requests}/{index}"
            try:
                self._llm.add_request(name, prompt, params, lora_request=self._adapter(request.adapter))
            except self._refusals as error:
                self.abort_request(request.request_id)
                raise InvalidRequest(f"vLLM refuses request {request.request_id}: {error}") from error
            self._samples[name] = _Sample(request, index)
            self._names.setdefault(request.request_id, []).append(name)
        self._num_requests += 1

    def _check(self, request: Request) -> None:
        """Raise `InvalidRequest` for what vLLM would refuse."""
        try:
            for prompt, params in self._for_vllm(request, None):
                self._llm.input_processor.process_inputs("", prompt, params, self._llm.get_supported_tasks())
        except self._refusals as error:
            raise InvalidRequest(f"vLLM refuses request {request.request_id}: {error}") from error

    def _for_vllm(self, request: Request, kv_transfer_params: dict[str, Any] | None) -> Iterator[tuple[Any, Any]]:
        """Prompt and parameters of each sample."""
        sampling, before = request.sampling, request.output_token_ids
        seed = next(self._seeds) if sampling.seed is None else sampling.seed
        stops = self._eos.union(sampling.stop_token_ids) if not sampling.ignore_eos else {*sampling.stop_token_ids}
        stops = {token for token in stops if 0 <= token < self.vocab_size}  # vLLM refuses others
        # What was cached under other weights, or before a flush, has another salt.
        prompt = {
            "prompt_token_ids": [*request.prompt_token_ids, *before],
            "cache_salt": f"{self._version}/{self._num_flushes}",
        }
        rendered = self._llm.renderer.render_cmpl([prompt])[0]
        for index in range(sampling.n):
            params = _sampling_params(sampling, stops, (seed + index) % (1 << 64), len(before))
            params.extra_args["kv_transfer_params"] = kv_transfer_params
            if request.export_kv:
                params.max_tokens = 1
            yield rendered, params

    def _check_schema(self, schema: str) -> None:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self._llm.model_config.model, self.vocab_size, sorted(self._eos))
        self._grammars.matcher(schema)

    def _adapter(self, name: str | None) -> Any:
        if name is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, self._adapters[name], self._adapter_paths[name])

    def abort_request(self, request_id: str) -> None:
        gone = self._names.pop(request_id, [])
        for name in gone:
            del self._samples[name]
        self._llm.abort_request(gone)
        if self.staging is not None:
            self.staging.forget(request_id)
            self._waiting = deque(request for request in self._waiting if request.request_id != request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._names)

    def step(self) -> list[Output]:
        if self.staging is not None:
            self.staging.expire()
            self._begin_exports(self.staging)
        if self._paused or not self._samples:
            return []
        return [self._output(result) for result in self._llm.step()]

    def _output(self, result: Any) -> Output:
        """Of one of vLLM's `RequestOutput`s, which carries the new tokens only."""
        (new,) = result.outputs
        sample = self._samples[result.request_id]
        request, sampling = sample.request, sample.request.sampling
        reason, export = new.finish_reason, None
        if self.staging is not None:
            if request.export_kv and reason == "length" and self._goes_on(request):
                reason, export = None, self.staging.export(request, new.token_ids, self._version)
            self.staging.forget(request.request_id)
        if new.finish_reason is not None:
            self._forget(result.request_id)
        tables = list(zip(new.token_ids, new.logprobs, strict=True))
        scores = result.prompt_logprobs
        return Output(
            request_id=request.request_id,
            token_ids=list(new.token_ids),
            logprobs=[float(table[token].logprob) for token, table in tables],
            index=sample.index,
            finish_reason=reason,
            weight_version=self._version,
            num_cached_tokens=result.num_cached_tokens or 0,
            top_logprobs=None if sampling.logprobs is None else [_ranked(t, sampling.logprobs) for _, t in tables],
            prompt_logprobs=_prompt_scores(request, scores) if scores else None,
            kv=export,
        )

    def _goes_on(self, request: Request) -> bool:
        """Whether a request that has had one token now may have more."""
        said = len(request.output_token_ids) + 1
        return said < request.sampling.max_tokens and len(request.prompt_token_ids) + said < self.max_model_len

    def _forget(self, name: str) -> None:
        request_id = self._samples.pop(name).request.request_id
        self._names[request_id].remove(name)
        if not self._names[request_id]:
            del self._names[request_id]

    @property
    def pool(self) -> KVPool:
        """Where transports read and write."""
        assert self.staging is not None, "made without a kv_location"
        return self.staging.pool

    def reserve(self, num_tokens: int) -> Reservation | None:
        return None if self.staging is None else self.staging.reserve(num_tokens)

    def release(self, lease: Lease) -> None:
        if self.staging is not None:
            self.staging.release(lease)

    def load_weights(self, weights: WeightView, version: int, in_flight: InFlight = "finish") -> None:
        """vLLM copies the weights into its own layout; it cannot map the buffer."""
        if self._samples and in_flight == "finish":
            raise RuntimeError(
                f"{len(self._samples)} samples are unfinished; let them end, or load with in_flight='recompute'."
            )
        tensors = [
            # a copy: mapped buffers are read-only, and vLLM reorders weights in place
            (spec.name, torch.from_numpy(array.copy()).view(TORCH_DTYPES[spec.dtype]))
            for spec, array in weights
        ]
        self._check_weights(weights)
        self._llm.collective_rpc("load_flat_weights", args=(tensors,))
        if self._samples and in_flight == "recompute":
            self._llm.reset_prefix_cache(reset_running_requests=True)
        elif self._samples:  # what waits has its salt already
            pool = self._llm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
            pool.evict_blocks({block.block_id for block in pool.blocks if block.block_hash is not None})
        for waiting in self._llm.engine_core.engine_core.scheduler.waiting:
            (waiting.kv_transfer_params or {}).pop("load", None)  # what has come for it is of other weights
        if self.staging is not None and in_flight == "keep":
            self.staging.mix()
        self._version = version
        self.flush_prefix_cache()  # a run that goes back to a checkpoint uses its versions again

    def _check_weights(self, weights: WeightView) -> None:
        """vLLM is of no more use once it has begun to load what does not fit."""
        shapes = {spec.name: spec.shape for spec, _ in weights}
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            name = sorted({*shapes.items()} ^ {*self._shapes.items()})[0][0]
            raise ModelError(f"The new weights differ from those before in the shape or the presence of {name}.")

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def flush_prefix_cache(self) -> None:
        self._num_flushes += 1

    def load(self) -> EngineLoad:
        scheduler = self._llm.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(self._waiting),
            num_preempted=0,
            num_waiting_tokens=sum(request.num_tokens for request in scheduler.waiting)
            + sum(len(request.prompt_token_ids) for request in self._waiting),
            num_free_blocks=pool.get_num_free_blocks(),
            num_blocks=pool.num_gpu_blocks - 1,  # vLLM keeps one for itself
            weight_version=self._version,
            speculation=self.speculation.stats,
        )


def _ranked(table: dict[int, Any], count: int) -> list[tuple[int, float]]:
    """The likeliest tokens of a position. The drawn one is in vLLM's table too, wherever it ranks."""
    ordered = sorted(table.items(), key=lambda item: -item[1].logprob)
    return [(token, float(entry.logprob)) for token, entry in ordered[:count]]


def _prompt_scores(request: Request, tables: list[Any]) -> list[tuple[float, list[tuple[int, float]]] | None]:
    prompt, count = request.prompt_token_ids, request.sampling.prompt_logprobs or 0
    return [
        None if table is None else (float(table[token].logprob), _ranked(table, count))
        for token, table in zip(prompt, tables, strict=False)  # an earlier answer follows the prompt there
    ]


def _sampling_params(sampling: SamplingParams, stops: Iterable[int], seed: int, position: int) -> Any:
    """vLLM's parameters of one sample that has `position` tokens already, and ends at `stops`."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VllmSamplingParams(
        max_tokens=sampling.max_tokens - position,
        min_tokens=max(sampling.min_tokens - position, 0),
        stop_token_ids=sorted(stops),
        logprobs=sampling.logprobs or 0,
        prompt_logprobs=sampling.prompt_logprobs,
        ignore_eos=True,  # they are among the stops
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={  # for our sampler, which vLLM's own fields would reach changed
            "seed": seed,
            "position": position,
            "json_schema": sampling.json_schema,
            "draw": {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")},
        },
    )
