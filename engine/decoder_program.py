"""A small Llama-like model's whole forward pass on CPU as one program of compiled kernels.

Between two of torch's operations stand some microseconds of Python and of waking threads; a pass over a small model is
a hundred operations of a few microseconds each. Here the kernels of all layers run one after the other in one parallel
region, over packed copies of the weights.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thornback.engine import kernels
from thornback.engine.attention import PagedBatch
from thornback.engine.compiled import Compiled, Program
from thornback.engine.decoder import angles, is_lean
from thornback.engine.draft_head import DraftHead
from thornback.engine.paged_attention import NO_WINDOW, attention_kernel
from thornback.engine.products import ADD, SILU_PRODUCT, STORE, Packed, product, rows_per_task
from thornback.engine.vectors import LANES

_MAX_PACKED = 64 << 20  # bytes of weights of which a second copy is worth its memory
_ALONE = 1 << 20  # multiplications below which one thread is done before two have met


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
        self._model, self._pool, self._capacity, self._num = model, pool, 0, 0
        self._keep_hidden = keep_hidden
        base = model.base_model
        with torch.inference_mode():
            self._cos, self._sin = angles(base.rotary_emb, base.norm.weight, torch.arange(max_model_len)[None])
        self._packed: dict[nn.Module, tuple[Packed, ...]] = {}
        for layer in base.layers:
            of, mlp = layer.self_attn, layer.mlp
            self._packed[of] = Packed(of.q_proj, of.k_proj, of.v_proj), Packed(of.o_proj)
            self._packed[mlp] = Packed(mlp.gate_proj, mlp.up_proj, interleave=True), Packed(mlp.down_proj)
        self._packed[model] = (Packed(model.lm_head),)
        if isinstance(model, DraftHead):
            self._packed[model] += Packed(model.from_token), Packed(model.from_hidden)
        self._weights = sum(p.panels.numel() for parts in self._packed.values() for p in parts)
        self.load()

    def load(self) -> None:
        """Take over the model's weights as they are now."""
        for parts in self._packed.values():
            for packed in parts:
                packed.load()
        self._capacity = 0  # addresses of weights may have changed

    @torch.inference_mode()
    def __call__(
        self, token_ids: Tensor, rows: Tensor, batch: PagedBatch, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[R, V]` of the packed tokens `rows` `[R]` of a pass over `token_ids` `[T]`, all int64; and the last
        hidden states `[T, H]` if they are kept. `hidden` `[T, H]`: what a draft head reads beside the tokens."""
        num, direct = len(token_ids), batch.direct
        if num > self._capacity:
            self._build(1 << (num - 1).bit_length())
        if num != self._num:
            self._num = num
            for kernel, call in self._calls:
                call.num = num
                if kernel is product:
                    call.group = rows_per_task(num, call.outputs)
        positions, slots = batch.positions.data_ptr(), batch.slots.data_ptr()
        for call in self._places:
            call.positions, call.slots = positions, slots
        if direct is not None:
            arrays = direct.tokens, direct.owners, direct.lengths, direct.bases, direct.bits, direct.tables
            addresses = [x.data_ptr() for x in arrays]
            for call in self._attends:
                call.num, (call.num_tables, call.max_blocks) = len(direct.tokens), direct.tables.shape
                call.tokens, call.owners, call.lengths, call.bases, call.bits, call.tables = addresses
        else:
            for call in self._attends:
                call.num = 0
        logits = self._pool.new_empty(len(rows), self._head.outputs)
        self._embed.index, self._last.index, self._head.out = (x.data_ptr() for x in (token_ids, rows, logits))
        states = None
        if self._keep_hidden:
            states = self._pool.new_empty(num, self._last.width)
            self._norm.out = self._last.table = states.data_ptr()
            self._last.rows = num
        if hidden is not None:
            self._from_hidden.x = hidden.data_ptr()
        for call in (self._last, self._head, *(() if self._keep_hidden else (self._norm,))):  # of the last rows only
            call.num = len(rows)
        self._head.group = rows_per_task(len(rows), self._head.outputs)
        self._run(batch, 1 if num * self._weights < _ALONE else None)
        return logits, states

    def _run(self, batch: PagedBatch, threads: int | None) -> None:
        start = 0
        if batch.groups:  # which torch's attention reads, between the calls
            _, _, qkv, attended, _ = (buffer[: self._num] for buffer in self._buffers)
            width = self._pool.shape[-1]
            out = attended.view(self._num, -1, width)
            q = qkv.view(self._num, -1, width)[:, : out.shape[1]]
            for layer, stop in zip(self._model.base_model.layers, self._stops, strict=True):
                self._program.run(start, stop, threads)
                of = layer.self_attn
                batch.attend_groups(of.layer_idx, q, out, of.scaling, getattr(of, "sliding_window", None))
                start = stop
        self._program.run(start, len(self._calls), threads)

    def _build(self, capacity: int) -> None:
        """Room for passes of up to so many tokens, and the calls that work in it."""
        base, pool = self._model.base_model, self._pool
        first, hidden = base.layers[0], base.norm.weight.numel()
        _, num_layers, _, kv_heads, block_size, width = pool.shape
        heads, side = first.self_attn.q_proj.out_features // width, kv_heads * block_size
        columns = (hidden, hidden, (heads + 2 * kv_heads) * width, heads * width, first.mlp.down_proj.in_features)
        self._buffers = x, h, qkv, attended, inner = [pool.new_empty(capacity, n) for n in columns]
        calls: list[tuple[Compiled, ctypes.Structure]] = []

        def add(kernel: Compiled, **fields: Any) -> Any:
            values = {n: v.data_ptr() if isinstance(v, Tensor) else v for n, v in fields.items()}
            calls.append((kernel, kernel.struct(**values)))
            return calls[-1][1]

        def norm(module: nn.Module, x: Tensor, out: Tensor) -> Any:
            weight, epsilon = module.weight, module.variance_epsilon
            return add(kernels.rms_norm, x=x, out=out, weight=weight, width=x.shape[1], epsilon=epsilon)

        def multiply(x: Tensor, packed: Packed, then: int, **out: Any) -> Any:
            depth, outputs = packed.depth, packed.outputs
            return add(
                product, x=x, x_stride=x.shape[1], weights=packed.panels, depth=depth, outputs=outputs, then=then, **out
            )

        embedding = base.embed_tokens.weight
        self._embed = add(kernels.gather, table=embedding, rows=len(embedding), out=x, width=hidden)
        if isinstance(base, DraftHead):
            self._embed.out = h.data_ptr()
            norm(base.token_norm, h, h)
            _, from_token, from_hidden = self._packed[self._model]
            multiply(h, from_token, STORE, out=x, out_stride=hidden)
            self._from_hidden = multiply(h, from_hidden, ADD, out=x, out_stride=hidden)  # it reads what a pass brings
        self._places, self._attends, self._stops = [], [], []
        for layer in base.layers:
            of = layer.self_attn
            layer_row = of.layer_idx * 2 * side
            into, out_of = self._packed[of]
            norm(layer.input_layernorm, x, h)
            multiply(h, into, STORE, out=qkv, out_stride=qkv.shape[1])
            place = add(
                kernels.place_kernel(heads, kv_heads, width), qkv=qkv,
                cos=self._cos, sin=self._sin, num_positions=len(self._cos),
                pool=pool, pool_rows=pool.numel() // width, layer_row=layer_row, value_rows=side,
            )  # fmt: skip
            if hasattr(of, "q_norm"):
                place.q_norm, place.k_norm = (n.weight.data_ptr() for n in (of.q_norm, of.k_norm))
                place.epsilon = of.q_norm.variance_epsilon
            self._places.append(place)
            attend = add(
                attention_kernel(heads, kv_heads, width, block_size), query=qkv, query_stride=qkv.shape[1],
                out=attended, num_tokens=capacity, pool=pool, pool_rows=pool.numel() // width, layer_row=layer_row,
                block_rows=num_layers * 2 * side, scaling=of.scaling,
                window=getattr(of, "sliding_window", None) or NO_WINDOW,
            )  # fmt: skip
            self._attends.append(attend)
            self._stops.append(len(calls))
            multiply(attended, out_of, ADD, out=x, out_stride=hidden)
            into, out_of = self._packed[layer.mlp]
            norm(layer.post_attention_layernorm, x, h)
            multiply(h, into, SILU_PRODUCT, out=inner, out_stride=inner.shape[1])
            multiply(inner, out_of, ADD, out=x, out_stride=hidden)
        if self._keep_hidden:
            self._norm = norm(base.norm, x, x)
            self._last = add(kernels.gather, table=x, rows=capacity, out=h, width=hidden)
        else:
            self._last = add(kernels.gather, table=x, rows=capacity, out=h, width=hidden)
            self._norm = norm(base.norm, h, h)
        head = self._packed[self._model][0]
        self._head = multiply(h, head, STORE, out_stride=head.outputs)
        self._calls, self._program, self._capacity, self._num = calls, Program(calls), capacity, 0
