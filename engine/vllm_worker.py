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
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from thornback.engine.block_manager import BlockManager
    from thornback.engine.speculation import Speculation
    from thornback.engine.vllm_speculation import ChainProposer


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), for `collective_rpc` to call."""

    model_runner: Any
    reload_weights: Any  # the worker's

    def draw_by_position(self) -> None:
        self.model_runner.sampler = PositionalSampler(self.model_runner)

    def kv_layout(self) -> tuple[tuple[int, ...], torch.dtype, str]:
        """Of a block on its way between engines: its shape, type, and by whose rules it is laid out."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector: Any = get_kv_transfer_group()
        layers = self.model_runner.compilation_config.static_forward_context.values()
        ways = {getattr(layer, "isa", "") for layer in layers} | {
            group.backend.get_name() for groups in self.model_runner.attn_groups for group in groups
        }
        return connector.block_shape, connector.dtype, " ".join(("vLLM's", *sorted(filter(None, ways))))

    def stage(self, pool: torch.Tensor) -> None:
        """Hand keys and values over by this pool; see `FlowKVConnector`."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector: Any = get_kv_transfer_group()
        connector.stage(pool)

    def speculate(self, speculation: Speculation, blocks: BlockManager | None) -> None:
        """Guess and verify by this, and by draws by position; see `ChainProposer.serve`."""
        runner = self.model_runner
        runner.drafter.serve(runner, speculation, blocks)
        # Nearer to the limit vLLM would draft zeros in our place; our chains end where their requests may.
        runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens
        runner.rejection_sampler = PositionalVerifier(runner.sampler, runner.drafter)

    def guess_by(self, speculation: Speculation) -> None:
        self.model_runner.drafter.use(speculation)

    def try_pass(self, num_tokens: int) -> None:
        """A pass over so many tokens of no request, and their logits."""
        runner = self.model_runner
        with torch.inference_mode():
            hidden, _ = runner._dummy_run(num_tokens)
            runner.model.compute_logits(hidden[:num_tokens])[0, 0].item()  # which waits for it

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
        tokens, logprobs = self.draw(logits, sampling_metadata.max_num_logprobs or 0)
        return SamplerOutput(sampled_token_ids=tokens.to(torch.int32).unsqueeze(-1), logprobs_tensors=logprobs)

    def draw(
        self, logits: torch.Tensor, num_logprobs: int, owners: np.ndarray | None = None, ahead: np.ndarray | None = None
    ) -> tuple[torch.Tensor, LogprobsTensors]:
        """A token for each row of `logits` `[R, V]`, int64 `[R]`, and the scores of as many alternatives. Row r is of
        request `owners[r]` of the batch, `ahead[r]` tokens after its next one (None: each request has a row)."""
        requests = self._read(logits.device)
        position = np.array([len(request.output_token_ids) for request in requests])
        batch, seeds, begins = self._batch, self._seeds, self._begins
        if owners is not None and ahead is not None:
            batch, seeds, begins = batch.of_rows(owners), seeds[owners], begins[owners]
            requests, position = [requests[i] for i in owners], position[owners] + ahead
        uniform = positional_uniform(seeds, begins + position)
        sampled = sample(logits, batch, uniform, self._banned(requests, position, logits))
        tokens = torch.tensor(sampled.tokens, device=logits.device)
        return tokens, self.gather_logprobs(sampled.scores - sampled.log_norm[:, None], num_logprobs, tokens)

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

    def _banned(self, requests: list[Any], position: np.ndarray, logits: torch.Tensor) -> torch.Tensor | None:
        """bool `[R, V]`: what stops a request, before its `min_tokens`, and what its schema forbids; None: nothing. A
        request with a schema has one row: nothing is guessed for it."""
        if not self._restrained:
            return None
        banned = self._followed.banned(requests, logits.shape[1]).to(logits.device)
        for i, request in enumerate(requests):
            if position[i] < request.sampling_params.min_tokens:
                banned[i, request.sampling_params.stop_token_ids] = True
        return banned


class PositionalVerifier:
    """vLLM's rejection sampler where draws are by position: what is drawn after a request's last token, and after each
    of the guesses that were right, is what it would have drawn without them."""

    def __init__(self, sampler: PositionalSampler, proposer: ChainProposer) -> None:
        self._sampler, self._proposer = sampler, proposer

    def __call__(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """`logits` `[R, V]`: of each request a row for its last token, and for each of its guesses."""
        counts = np.array(metadata.num_draft_tokens)
        first = np.cumsum(counts + 1) - (counts + 1)
        owners = np.repeat(np.arange(len(counts)), counts + 1)
        num_logprobs = sampling_metadata.max_num_logprobs or 0
        drawn, found = self._sampler.draw(logits, num_logprobs, owners, np.arange(len(owners)) - first[owners])
        right = self._proposer.settle(counts, metadata.draft_token_ids.cpu().numpy(), drawn.cpu().numpy())
        # A row for each request, of all tokens that it could have had; vLLM skips those that are -1.
        ahead = np.arange(metadata.max_spec_len + 1)
        places = torch.from_numpy(np.minimum(first[:, None] + ahead, len(owners) - 1)).to(drawn.device)
        wrong = torch.from_numpy(ahead > right[:, None]).to(drawn.device)
        at = places.flatten()
        return SamplerOutput(
            sampled_token_ids=drawn[places].masked_fill_(wrong, -1).to(torch.int32),
            logprobs_tensors=LogprobsTensors(
                found.logprob_token_ids[at], found.logprobs[at], found.selected_token_ranks[at]
            ),
        )


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
