"""What requests of both kinds share, and the small answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_LOGPROBS = 20  # alternatives a token, as OpenAI's chat protocol allows


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]  # JSON knows one kind of number: 2.0 is an integer
Int64 = Annotated[Int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
TokenId = Annotated[Int, Field(ge=0, le=(1 << 31) - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


def only(*accepted: Any) -> Any:
    """The type of a field that OpenAI or vLLM knows and this server does not act on: any other value is refused."""

    def check(value: Any) -> Any:
        # True == 1 in Python, but not in JSON.
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in accepted):
            shown = " or ".join("null" if a is None else str(a) for a in accepted)
            raise PydanticCustomError("unsupported", "is not supported by this server: leave it out", {"only": shown})
        return value

    return Annotated[Any, BeforeValidator(check), WithJsonSchema({"enum": list(accepted)})]


class Strict(BaseModel):
    """A part of a request: unknown fields are refused, never ignored, and no type is taken for another."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: only(None, False) = None  # type: ignore[valid-type]


class GenerationRequest(Strict):
    """The fields of both kinds of requests. Names and meanings are OpenAI's, and vLLM's for what OpenAI lacks."""

    model: str
    n: Int = Field(default=1, ge=1, le=256)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    top_k: Int | None = Field(default=0, ge=-1, le=1 << 31)
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    min_tokens: Int = Field(default=0, ge=0, le=1 << 31)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    seed: Int64 | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # This server's own: the deadlines of one request, by the names of the settings that hold for all.
    request_timeout_s: float | None = Field(default=None, gt=0)
    first_token_seconds: float | None = Field(default=None, gt=0)
    # Notes of the client's that change nothing here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Known elsewhere, not here.
    presence_penalty: only(0, None) = 0  # type: ignore[valid-type]
    frequency_penalty: only(0, None) = 0  # type: ignore[valid-type]
    repetition_penalty: only(1, None) = 1  # type: ignore[valid-type]
    logit_bias: only(None, {}) = None  # type: ignore[valid-type]
    include_stop_str_in_output: only(False) = False  # type: ignore[valid-type]
    skip_special_tokens: only(True) = True  # type: ignore[valid-type]

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class UpdateWeightsRequest(Strict):
    """As SGLang names it. `model_path`: a run, a model directory or a model of the hub, as the replicas see it.
    `in_flight`: requests that have begun are computed again with the new weights where they are, or finish with those
    that they began with, before their replica takes the new ones."""

    model_path: Annotated[str, Field(min_length=1)]
    weight_version: Annotated[Int, Field(ge=1, le=(1 << 62))] | None = None
    in_flight: Literal["recompute", "finish"] = "recompute"


class UpdateWeightsResponse(BaseModel):
    weight_version: int
    num_replicas: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


class UsageDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: UsageDetails | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "thornback"
    max_model_len: Int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    weight_version: Int
