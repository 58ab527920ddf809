"""What runs inside vLLM's workers: draws by position in place of vLLM's own.

vLLM draws from a random generator that starts with a request, so that what a seed draws depends on how much has been
drawn before. Here token t of a request depends on its seed and t alone, as in the torch engine: a seed gives the same
tokens under both, and a request can go on where another engine left it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from thornback.contracts import SamplingParams
from thornback.engine.randomness import positional_uniform
from thornback.engine.sampler import SamplingBatch, sample
from thornback.engine.structured import GrammarCompiler

if TYPE_CHECKING:
    import xgrammar
    from vllm.v1.sample.metadata import SamplingMetadata


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), for `collective_rpc` to call."""

    model_runner: Any
    reload_weights: Any  # the worker's

    def draw_by_position(self) -> None:
        self.model_runner.sampler = PositionalSampler(self.model_runner)

    def load_flat_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Copy weights, by their checkpoint's names, into vLLM's own layout."""
        self.reload_weights(weights_iterator=iter(tensors))
        _pack_head(self.model_runner.get_model())


class PositionalSampler(Sampler):
    """vLLM's sampler with our draws. Each request's `extra_args` say its `seed`, and at which `position` it begins.

    Log-probabilities are after temperature and before truncation, as `contracts.Output` wants them.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner
        self._ids: list[str] = []
        self._batch = SamplingBatch.of([])
        self._seeds = np.zeros(0, np.uint64)
        self._begins = np.zeros(0, np.int64)
        self._restrained = False
        self._followed = _Followed(runner.model_config)

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        requests = self._read(logits.device)
        drawn = np.array([len(request.output_token_ids) for request in requests])
        uniform = positional_uniform(self._seeds, self._begins + drawn)
        sampled = sample(logits, self._batch, uniform, self._banned(requests, drawn, logits))
        tokens = torch.tensor(sampled.tokens, device=logits.device)
        return SamplerOutput(
            sampled_token_ids=tokens.to(torch.int32).unsqueeze(-1),
            logprobs_tensors=self.gather_logprobs(
                sampled.scores - sampled.log_norm[:, None], sampling_metadata.max_num_logprobs or 0, tokens
            ),
        )

    @staticmethod
    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
        """Of `token_ids` `[B]`, then of the likeliest in falling order. Nobody reads ranks, which vLLM would compile
        a kernel for; they are 0."""
        values, likeliest = logprobs.topk(num_logprobs, dim=-1)
        ids = torch.cat((token_ids[:, None], likeliest), 1)
        values = torch.cat((logprobs.gather(1, token_ids[:, None]), values), 1)
        return LogprobsTensors(ids.to(torch.int32), values, torch.zeros_like(token_ids))

    def _read(self, device: torch.device) -> list[Any]:
        """vLLM's state of the requests in the batch, in the order of their rows."""
        ids = self._runner.input_batch.req_ids
        requests = [self._runner.requests[request_id] for request_id in ids]
        if ids != self._ids:
            self._ids = list(ids)
            params = [request.sampling_params for request in requests]
            self._batch = SamplingBatch.of([SamplingParams(**p.extra_args["draw"]) for p in params], device)
            self._seeds = np.array([p.extra_args["seed"] for p in params], np.uint64)
            self._begins = np.array([p.extra_args["position"] for p in params], np.int64)
            self._restrained = any(p.min_tokens or p.extra_args["json_schema"] is not None for p in params)
        return requests

    def _banned(self, requests: list[Any], drawn: np.ndarray, logits: torch.Tensor) -> torch.Tensor | None:
        """bool `[B, V]`: what stops a request, before its `min_tokens`, and what its schema forbids; None: nothing."""
        if not self._restrained:
            return None
        banned = self._followed.banned(requests, logits.shape[1]).to(logits.device)
        for i, request in enumerate(requests):
            if drawn[i] < request.sampling_params.min_tokens:
                banned[i, request.sampling_params.stop_token_ids] = True
        return banned


class _Followed:
    """The schemas that requests follow, and how far each has come. vLLM may compute a request's tokens again, so a
    matcher reads what the request has, not what was drawn."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._compiler: GrammarCompiler | None = None
        self._matchers: dict[str, tuple[xgrammar.GrammarMatcher, int]] = {}  # by request, and how much it has read

    def banned(self, requests: list[Any], vocab_size: int) -> torch.Tensor:
        """bool `[B, V]`."""
        matchers = [self._matcher(request, vocab_size) for request in requests]
        if not any(matchers):
            return torch.zeros(len(requests), vocab_size, dtype=torch.bool)
        live = {request.req_id for request in requests}
        self._matchers = {name: read for name, read in self._matchers.items() if name in live}
        assert self._compiler is not None
        return self._compiler.banned(matchers)

    def _matcher(self, request: Any, vocab_size: int) -> xgrammar.GrammarMatcher | None:
        extra = request.sampling_params.extra_args
        if extra["json_schema"] is None:
            return None
        if self._compiler is None:
            eos = sorted(eos_of(self._model_config))
            self._compiler = GrammarCompiler(self._model_config.model, vocab_size, eos)
        found = self._matchers.get(request.req_id)
        matcher, num_read = found or (self._compiler.matcher(extra["json_schema"]), 0)
        begun = extra["position"]  # so much of the answer stands at the end of the prompt
        said = [*request.prompt_token_ids[len(request.prompt_token_ids) - begun :], *request.output_token_ids]
        for token in said[num_read:]:
            matcher.accept_token(token)
        self._matchers[request.req_id] = (matcher, len(said))
        return matcher


def eos_of(model_config: Any) -> frozenset[int]:
    """The ids that end an answer, from vLLM's `ModelConfig`, as `ModelShape.of` finds them."""
    eos = model_config.try_get_generation_config().get("eos_token_id")
    eos = model_config.hf_text_config.eos_token_id if eos is None else eos
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def _pack_head(model: torch.nn.Module) -> None:
    """An output head that is tied to the embedding is in no checkpoint, so that vLLM reloads the embedding and, on
    CPU, goes on with the head's packed copy of the old one: pack it again."""
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)
