"""The gateway as a Ray Serve deployment."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve

from thornback.algorithms import PlacementConfig, Role
from thornback.serve.config import ServeConfig
from thornback.serve.gateway import Gateway
from thornback.serve.http_app import build_http_app
from thornback.serve.pool import ReplicaPool
from thornback.serve.text import Text, load_tokenizer
from thornback.serve.weights import StoredWeights, WeightKeeper

FIRST_TOKEN_SECONDS = 5.0  # by which load is measured where no objective is given


class GatewayDeployment:
    """Ray Serve makes its ASGI application after the constructor."""

    def __init__(
        self, config: ServeConfig, model: str, api_keys: tuple[str, ...], replicas: Any, prefills: Any = None
    ) -> None:
        """`replicas`, `prefills`: handles of the pools that answer, and that compute prompts for them, if there is
        one."""
        self._api_keys = api_keys
        placement = PlacementConfig(
            split_tokens=config.split_tokens,
            first_token_seconds=config.first_token_seconds or FIRST_TOKEN_SECONDS,
            token_seconds=config.token_seconds,
            refuses=config.first_token_seconds is not None,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
        )
        pools = {Role.DECODE: replicas} if prefills is None else {Role.DECODE: replicas, Role.PREFILL: prefills}
        siblings = cache(_own_handle) if config.gateway_replicas > 1 else None
        dtype = config.engine.dtype
        if dtype == "auto":  # as an engine resolves it
            dtype = "bfloat16" if config.gpus_per_replica else "float32"
        block = config.engine.block_size if config.engine.enable_prefix_caching else None
        pool = ReplicaPool(pools, placement, WeightKeeper(model, dtype), block)
        self._gateway = Gateway(config, Text(load_tokenizer(model)), pool, siblings)

    def counters(self) -> str:
        """For /metrics of another gateway."""
        return self._gateway.counters()

    def take_weights(self, stored: StoredWeights) -> None:
        """Those that another gateway has read."""
        self._gateway.pool.weights.take(stored)

    async def __del__(self) -> None:
        """Ray Serve calls this when the requests have ended."""
        self._gateway.pool.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self._gateway, self._api_keys)


def _own_handle() -> Any:
    context = ray_serve.get_replica_context()
    return ray_serve.get_deployment_handle(context.deployment, context.app_name)
