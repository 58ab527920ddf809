"""FlowKV for vLLM (papers.md section 4): keys and values between vLLM's cache and a pool that other processes read.

vLLM's layout on CPU is fixed: layer by layer, so that a request's blocks lie in as many places as there are layers. A
staging pool holds them block by block, as the torch engine's own pool does, and from there on they move in the same
runs, by the same transports, under the same leases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from thornback.algorithms import align_runs

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class _Copies(KVConnectorMetadata):
    """What one step reads from the staging pool, and writes to it: pairs of vLLM's blocks and of staged ones."""

    loads: list[tuple[list[int], list[int]]] = field(default_factory=list)
    saves: list[tuple[list[int], list[int]]] = field(default_factory=list)


class FlowKVConnector(KVConnectorBase_V1):
    """vLLM makes two of it: its scheduler's, which says what is to be copied, and its worker's, which does it.

    A request's `kv_transfer_params` name staged blocks: `load`, in which the keys and values of its first `num_tokens`
    tokens lie; `save`, for those of its prompt.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size: int = vllm_config.cache_config.block_size
        self._copies = _Copies()
        self._saving: dict[str, Request] = {}  # requests whose prompts are being computed
        self._caches: list[torch.Tensor] = []
        self._staged = torch.empty(0)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # what is saved is a copy

    # The scheduler's side

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens' keys and values are staged beyond those that the cache has."""
        params = request.kv_transfer_params or {}
        staged = params["num_tokens"] if params.get("load") else 0
        return max(0, staged - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        staged = params.pop("load", None)  # once: they are given back after this step
        if num_external_tokens:
            first = (params["num_tokens"] - num_external_tokens) // self._block_size
            self._copies.loads.append((blocks.get_block_ids()[0][first : len(staged)], staged[first:]))
        if params.get("save"):
            self._saving[request.request_id] = request

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        for name, request in list(self._saving.items()):
            scheduled = scheduler_output.num_scheduled_tokens.get(name, 0)
            if scheduled and request.num_computed_tokens + scheduled >= request.num_prompt_tokens:
                assert self._kv_cache_manager is not None
                assert request.kv_transfer_params is not None
                staged = request.kv_transfer_params["save"]
                blocks = self._kv_cache_manager.get_block_ids(name)[0][: len(staged)]
                self._copies.saves.append((blocks, staged))
                del self._saving[name]
        copies, self._copies = self._copies, _Copies()
        return copies

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        self._saving.pop(request.request_id, None)
        return False, None

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = list(kv_caches.values())

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of a staged block: layers, 1, and a block of one layer as it is, keys beside values."""
        return (len(self._caches), 1, *self._caches[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self._caches[0].dtype

    def stage(self, staged: torch.Tensor) -> None:
        """Copy to and from this pool, `[blocks, *block_shape]`."""
        self._staged = staged

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        copies = self._get_connector_metadata()
        assert isinstance(copies, _Copies)
        for blocks, staged in copies.loads:
            for source, target, length in align_runs(staged, blocks):
                for layer, cache in enumerate(self._caches):
                    cache[target : target + length].copy_(self._staged[source : source + length, layer, 0])

    def wait_for_save(self) -> None:
        copies = self._get_connector_metadata()
        assert isinstance(copies, _Copies)
        for blocks, staged in copies.saves:
            for source, target, length in align_runs(blocks, staged):
                for layer, cache in enumerate(self._caches):
                    self._staged[target : target + length, layer, 0].copy_(cache[source : source + length])

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are over when a pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Saved when a pass is over."""
