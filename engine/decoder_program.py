"""A small Llama-like model's whole forward pass on CPU as one program of compiled kernels.

Between two of torch's operations stand some microseconds of Python and of waking threads; a pass over a small model is
a hundred operations of a few microseconds each. Here the kernels of all layers run one after the other in one parallel
region, over packed copies of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thornback.engine.attention import PagedBatch
from thornback.engine.compiled import Program
from thornback.engine.decoder import angles, is_lean
from thornback.engine.decoder_calls import DecoderCalls, Draws
from thornback.engine.draft_head import DraftHead
from thornback.engine.products import Packed, rows_per_task
from thornback.engine.vectors import LANES

_MAX_PACKED = 64 << 20  # bytes of weights of which a second copy is worth its memory


class DecoderProgram:
    """Runs a model's passes over its pool; `load` it again whenever the weights have changed."""

    @classmethod
    def of(
        cls, model: PreTrainedModel | DraftHead, pool: Tensor, max_model_len: int, keep_hidden: bool = False
    ) -> DecoderProgram | None:
        """None where the model is of another kind, too large, not float32 on CPU, or changed by hooks or adapters.
        `keep_hidden`: passes give the last hidden states of all their tokens, too."""
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        size = sum(layer.weight.nbytes for layer in layers)
        base = model.base_model
        fits = (
            is_lean(base)
            and size <= _MAX_PACKED
            and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
            and base.rotary_emb.rope_type not in ("dynamic", "longrope")
            and base.layers[0].mlp.gate_proj.out_features % LANES == 0
            and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        )
        return cls(model, pool, max_model_len, keep_hidden) if fits else None

    def __init__(
        self, model: PreTrainedModel | DraftHead, pool: Tensor, max_model_len: int, keep_hidden: bool = False
    ) -> None:
        self._model, self._pool, self._keep_hidden = model, pool, keep_hidden
        base = model.base_model
        with torch.inference_mode():
            self._turns = angles(base.rotary_emb, base.norm.weight, torch.arange(max_model_len)[None])
        self._packed: dict[nn.Module, tuple[Packed, ...]] = {}
        for layer in base.layers:
            of, mlp = layer.self_attn, layer.mlp
            self._packed[of] = Packed(of.q_proj, of.k_proj, of.v_proj), Packed(of.o_proj)
            self._packed[mlp] = Packed(mlp.gate_proj, mlp.up_proj, interleave=True), Packed(mlp.down_proj)
        self._packed[model] = (Packed(model.lm_head),)
        if isinstance(model, DraftHead):
            self._packed[model] += Packed(model.from_token), Packed(model.from_hidden)
        self.version = 0  # of the weights
        self.load()

    def load(self) -> None:
        """Take over the model's weights as they are now."""
        for parts in self._packed.values():
            for packed in parts:
                packed.load()
        self._calls: DecoderCalls | None = None  # addresses of weights may have changed
        self.version += 1

    def calls(self, capacity: int, draws: Draws) -> DecoderCalls:
        """Calls of a pass over up to so many tokens, for as long as `version` stays."""
        return DecoderCalls(self._model, self._pool, self._packed, self._turns, capacity, draws)

    @torch.inference_mode()
    def __call__(
        self, token_ids: Tensor, rows: Tensor, batch: PagedBatch, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[R, V]` of the packed tokens `rows` `[R]` of a pass over `token_ids` `[T]`, all int64; and the last
        hidden states `[T, H]` if they are kept. `hidden` `[T, H]`: what a draft head reads beside the tokens."""
        num, calls = len(token_ids), self._calls
        if calls is None or num > calls.capacity:
            calls = self.calls(1 << (num - 1).bit_length(), "some of kept" if self._keep_hidden else "some")
            self._calls, self._program = calls, Program(calls.calls)
        calls.resize(num)
        calls.stand(batch.positions, batch.slots, batch.direct)
        logits = self._pool.new_empty(len(rows), calls.head.outputs)
        calls.embed.index, calls.last.index, calls.head.out = (x.data_ptr() for x in (token_ids, rows, logits))
        states = None
        if self._keep_hidden:
            states = self._pool.new_empty(num, calls.last.width)
            calls.norm.out = calls.last.table = states.data_ptr()
            calls.last.rows = num
        if hidden is not None:
            calls.from_hidden.x = hidden.data_ptr()
        for call in (calls.last, calls.head, *(() if self._keep_hidden else (calls.norm,))):  # of the last rows only
            call.num = len(rows)
        calls.head.group = rows_per_task(len(rows), calls.head.outputs)
        self._run(calls, batch)
        return logits, states

    def _run(self, calls: DecoderCalls, batch: PagedBatch) -> None:
        start = 0
        if batch.groups:  # which torch's attention reads, between the calls
            qkv, attended = calls.qkv[: calls.num], calls.attended[: calls.num]
            width = self._pool.shape[-1]
            out = attended.view(calls.num, -1, width)
            q = qkv.view(calls.num, -1, width)[:, : out.shape[1]]
            for layer, stop in zip(self._model.base_model.layers, calls.stops, strict=True):
                self._program.run(start, stop, calls.threads)
                of = layer.self_attn
                batch.attend_groups(of.layer_idx, q, out, of.scaling, getattr(of, "sliding_window", None))
                start = stop
        self._program.run(start, len(calls.calls), calls.threads)
