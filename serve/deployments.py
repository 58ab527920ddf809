"""The gateway as a Ray Serve deployment."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from thornback.serve.config import ServeConfig
from thornback.serve.gateway import Gateway
from thornback.serve.http_app import build_http_app
from thornback.serve.pool import ReplicaPool
from thornback.serve.text import Text, load_tokenizer


class GatewayDeployment:
    """Ray Serve makes its ASGI application after the constructor."""

    def __init__(self, config: ServeConfig, model: str, api_keys: tuple[str, ...], replicas: Any) -> None:
        self._api_keys = api_keys
        self._gateway = Gateway(config, Text(load_tokenizer(model)), ReplicaPool(replicas))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self._gateway, self._api_keys)
