"""The kernels of a small Llama-like model's forward pass, one after the other, and the buffers that they work in."""

from __future__ import annotations

import ctypes
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from thornback.engine import kernels
from thornback.engine.compiled import Compiled
from thornback.engine.draft_head import DraftHead
from thornback.engine.paged_attention import NO_WINDOW, PagedTokens, attention_kernel
from thornback.engine.products import ADD, SILU_PRODUCT, STORE, Packed, product, rows_per_task

Draws: TypeAlias = Literal["some", "some of kept", "all"]
_WORDS = 32  # of eight bytes, for a call's arguments
_CALLS_OF_LAYER, _CALLS = 9, 9  # at most, and beside those of layers
_ALONE = 1 << 20  # multiplications below which one thread is done before two have met


class DecoderCalls:
    """Calls for passes of up to `capacity` tokens over `pool`. `packed`: the weights of each module; `turns`: the
    cosines and sines of all positions, `[P, D / 2]`.

    `draws`: which tokens have logits, and which last hidden states are kept. "some": those that `last` gathers, and
    none; "some of kept": those, and all, where `norm` writes them; "all": all, and all, in `states`."""

    def __init__(
        self,
        model: PreTrainedModel | DraftHead,
        pool: Tensor,
        packed: dict[nn.Module, tuple[Packed, ...]],
        turns: tuple[Tensor, Tensor],
        capacity: int,
        draws: Draws,
    ) -> None:
        base, (cos, sin) = model.base_model, turns
        first, hidden = base.layers[0], base.norm.weight.numel()
        _, num_layers, _, kv_heads, block_size, width = pool.shape
        heads, side = first.self_attn.q_proj.out_features // width, kv_heads * block_size
        columns = (hidden, hidden, (heads + 2 * kv_heads) * width, heads * width, first.mlp.down_proj.in_features)
        self._buffers = x, h, qkv, attended, inner = [pool.new_empty(capacity, n) for n in columns]
        self.states, self.qkv, self.attended = h, qkv, attended
        self.capacity, self.num = capacity, 0
        self._weights = sum(part.panels.numel() for parts in packed.values() for part in parts)
        self.calls: list[tuple[Compiled, ctypes.Structure]] = []
        # All calls' arguments lie in one array, so that what changes with every pass is written at once.
        self._arguments = np.zeros((len(base.layers) * _CALLS_OF_LAYER + _CALLS, _WORDS), np.int64)
        self._kernels: list[Compiled] = []  # by their row of it
        self._of_num: tuple[np.ndarray, ...] = ()  # see `resize`
        self._groups: dict[int, np.ndarray] = {}
        embedding = base.embed_tokens.weight
        self.embed = self.add(kernels.gather, table=embedding, rows=len(embedding), out=x, width=hidden)
        self.from_hidden: Any = None
        if isinstance(base, DraftHead):
            self.embed.out = h.data_ptr()
            self._norm(base.token_norm, h, h)
            _, from_token, from_hidden = packed[model]
            self._multiply(h, from_token, STORE, out=x, out_stride=hidden)
            self.from_hidden = self._multiply(h, from_hidden, ADD, out=x, out_stride=hidden)  # of what a pass brings
        place, attend = (
            kernels.place_kernel(heads, kv_heads, width),
            attention_kernel(heads, kv_heads, width, block_size),
        )
        self.stops = []
        for layer in base.layers:
            of = layer.self_attn
            layer_row = of.layer_idx * 2 * side
            into, out_of = packed[of]
            self._norm(layer.input_layernorm, x, h)
            self._multiply(h, into, STORE, out=qkv, out_stride=qkv.shape[1])
            place_call = self.add(
                place, qkv=qkv,
                cos=cos, sin=sin, num_positions=len(cos),
                pool=pool, pool_rows=pool.numel() // width, layer_row=layer_row, value_rows=side,
            )  # fmt: skip
            if hasattr(of, "q_norm"):
                place_call.q_norm, place_call.k_norm = (n.weight.data_ptr() for n in (of.q_norm, of.k_norm))
                place_call.epsilon = of.q_norm.variance_epsilon
            self.add(
                attend, query=qkv, query_stride=qkv.shape[1],
                out=attended, num_tokens=capacity, pool=pool, pool_rows=pool.numel() // width, layer_row=layer_row,
                block_rows=num_layers * 2 * side, scaling=of.scaling,
                window=getattr(of, "sliding_window", None) or NO_WINDOW,
            )  # fmt: skip
            self.stops.append(len(self.calls))
            self._multiply(attended, out_of, ADD, out=x, out_stride=hidden)
            into, out_of = packed[layer.mlp]
            self._norm(layer.post_attention_layernorm, x, h)
            self._multiply(h, into, SILU_PRODUCT, out=inner, out_stride=inner.shape[1])
            self._multiply(inner, out_of, ADD, out=x, out_stride=hidden)
        self._of_place = self._where(place, "positions", "slots")
        table = "num_tables", "max_blocks", "tokens", "owners", "lengths", "bases", "bits", "tables"
        self._of_attend = self._where(attend, "num", *table)
        if draws == "some of kept":
            self.norm = self._norm(base.norm, x, x)
            self.last = self.add(kernels.gather, table=x, rows=capacity, out=h, width=hidden)
        elif draws == "some":
            self.last = self.add(kernels.gather, table=x, rows=capacity, out=h, width=hidden)
            self.norm = self._norm(base.norm, h, h)
        else:
            self.norm = self._norm(base.norm, x, h)
        head = packed[model][0]
        self.head = self._multiply(h, head, STORE, out_stride=head.outputs)

    def add(self, kernel: Compiled, **fields: Any) -> Any:
        """One more call; a tensor gives its address, and must live on."""
        arguments = kernel.struct.from_buffer(self._arguments[len(self._kernels)])
        for name, value in fields.items():
            setattr(arguments, name, value.data_ptr() if isinstance(value, Tensor) else value)
        self._kernels.append(kernel)
        self.calls.append((kernel, arguments))
        return arguments

    def _where(self, kernel: Compiled | None, *fields: str) -> np.ndarray:
        """Which of the arguments, end to end, are these fields of a kernel's calls (None: of all): `[calls, F]`."""
        rows = [row for row, of in enumerate(self._kernels) if kernel is None or of is kernel]
        words = [[getattr(self._kernels[row].struct, name).offset // 8 for name in fields] for row in rows]
        return np.array(rows)[:, None] * _WORDS + np.array(words)

    def _norm(self, module: nn.Module, x: Tensor, out: Tensor) -> Any:
        weight, epsilon = module.weight, module.variance_epsilon
        return self.add(kernels.rms_norm, x=x, out=out, weight=weight, width=x.shape[1], epsilon=epsilon)

    def _multiply(self, x: Tensor, packed: Packed, then: int, **out: Any) -> Any:
        fields = {"weights": packed.panels, "depth": packed.depth, "outputs": packed.outputs, "then": then, **out}
        return self.add(product, x=x, x_stride=x.shape[1], **fields)

    def resize(self, num: int) -> None:
        """The coming passes are over so many tokens."""
        if num == self.num:
            return
        self.num = num
        if not self._of_num:
            self._of_num = self._where(None, "num"), self._where(product, "group", "outputs")
        all_calls, (groups, outputs) = self._of_num[0], self._of_num[1].T
        arguments = self._arguments.ravel()
        if num not in self._groups:
            self._groups[num] = np.array([rows_per_task(num, n) for n in arguments[outputs].tolist()])
        arguments[all_calls], arguments[groups] = num, self._groups[num]

    @property
    def threads(self) -> int | None:
        """How many are worth it; None: all."""
        return 1 if self.num * self._weights < _ALONE else None

    def stand(self, positions: Tensor, slots: Tensor, direct: PagedTokens | None) -> None:
        """Where the tokens stand, and what they see, as in `PagedBatch`."""
        arguments = self._arguments.ravel()
        arguments[self._of_place] = positions.data_ptr(), slots.data_ptr()
        if direct is None:
            arguments[self._of_attend[:, 0]] = 0
            return
        arrays = direct.tokens, direct.owners, direct.lengths, direct.bases, direct.bits, direct.tables
        addresses = [x.data_ptr() for x in arrays]
        arguments[self._of_attend] = (len(direct.tokens), *direct.tables.shape, *addresses)
