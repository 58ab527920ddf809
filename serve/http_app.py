"""The HTTP side: routes, errors in OpenAI's form, and an OpenAPI description that is true."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from thornback.serve.chat import chat
from thornback.serve.completions import complete
from thornback.serve.errors import RETRY_AFTER, ApiError, BadRequest, Unavailable
from thornback.serve.gateway import Gateway
from thornback.serve.guard import Guard
from thornback.serve.openapi import describe_api, generation_responses, responses
from thornback.serve.protocol import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    Health,
    ModelCard,
    ModelList,
    UpdateWeightsRequest,
    UpdateWeightsResponse,
)
from thornback.serve.replies import error_response
from thornback.serve.validation import bad_request

logger = logging.getLogger("ray.serve")


def build_http_app(gateway: Gateway, api_keys: tuple[str, ...]) -> FastAPI:
    """The ASGI application over one gateway."""
    app = FastAPI(title="thornback", description="OpenAI-compatible text generation.", redoc_url=None)
    _add_generation(app, gateway)
    _add_models(app, gateway)
    _add_operations(app, gateway)
    if gateway.config.weight_updates:
        _add_weights(app, gateway)
    _add_errors(app, gateway)
    describe_api(app, gateway.model_name, bool(api_keys))
    app.add_middleware(Guard, api_keys=api_keys, max_body_bytes=gateway.limits.max_body_bytes)
    return app


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/chat/completions", responses=generation_responses(ChatResponse), response_model=ChatResponse)
    async def chat_completions(request: ChatRequest) -> Response:
        """Continue a conversation."""
        return await chat(gateway, request)

    @app.post("/v1/completions", responses=generation_responses(CompletionResponse), response_model=CompletionResponse)
    async def completions(request: CompletionRequest) -> Response:
        """Continue prompts: text or token ids, one or several."""
        return await complete(gateway, request)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    async def card() -> ModelCard:
        engine = await gateway.description()
        return ModelCard(id=gateway.model_name, created=gateway.created, max_model_len=engine.max_model_len)

    @app.get("/v1/models", responses=responses(401, 503))
    async def models() -> ModelList:
        """The models that can be asked."""
        return ModelList(data=[await card()])

    @app.get("/v1/models/{model:path}", responses=responses(400, 401, 404, 503))
    async def model(model: str) -> ModelCard:
        """One model."""
        gateway.check_model(model)
        return await card()


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", responses=responses(503))
    async def health() -> Health:
        """200 while a replica can answer; names the oldest weights that do."""
        await gateway.description()
        reports = gateway.pool.reports()
        if not reports:
            raise Unavailable("No replica is ready.", code="not_ready", headers=RETRY_AFTER)
        return Health(model=gateway.model_name, weight_version=min(r.weight_version for r in reports))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        page = gateway.metrics.render(gateway.pool.reports(), await gateway.all_counters(), gateway.pool.lent())
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_weights(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/update_weights_from_disk", responses=responses(400, 401, 413, 503, 504))
    async def update_weights_from_disk(request: UpdateWeightsRequest) -> UpdateWeightsResponse:
        """Answer with other weights of the same model, without a restart; returns once all replicas do."""
        return await gateway.update_weights(request)


def _add_errors(app: FastAPI, gateway: Gateway) -> None:
    def answer(error: ApiError) -> Response:
        gateway.metrics.error(error.status)
        return error_response(error)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        return answer(bad_request(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        wrapped = BadRequest(str(error.detail), headers=dict(error.headers or {}))
        wrapped.status = error.status_code
        return answer(wrapped)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed: %r", request.method, request.url.path, error, exc_info=error)
        return answer(ApiError("The server failed on this request; its log says why."))

    _: Any = (on_api_error, on_invalid, on_http_error, on_bug)
