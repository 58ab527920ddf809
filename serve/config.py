"""Settings of a server. Importing this costs neither Ray nor torch."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from thornback.contracts import ConfigError, EngineConfig, SpeculationConfig


class EngineSection(BaseModel):
    """Each replica's engine: which, and its sizes, with vLLM's names."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = "torch"
    """torch, vllm (docs/vllm.md), auto (vllm on GPUs where it is installed, else torch), or the import path of one \
that implements thornback.contracts.Engine."""
    options: dict[str, Any] = {}
    """Arguments of the engine's own: of vllm, its EngineArgs (tensor_parallel_size, gpu_memory_utilization, ...)."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Tokens of a request, prompt and answer together. None: the model's own limit."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Samples computed at the same time."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens of one forward pass; longer prompts are computed in parts."""
    kv_cache_memory_bytes: int = Field(default=2 << 30, ge=1)
    """Memory of the cache of keys and values."""
    block_size: int = Field(default=32, ge=1)
    """Tokens of one cache block."""
    enable_prefix_caching: bool = True
    """Share the cache of prompts that begin alike."""
    dtype: str = "auto"
    """auto: float32 on CPU, bfloat16 on CUDA."""
    device: str = "auto"
    """auto: CUDA where there is any."""

    def engine_config(self, threads: int | None) -> EngineConfig:
        """The engine's own form, with `threads` torch threads."""
        return EngineConfig(**self.model_dump(exclude={"name", "options"}), num_threads=threads)


class SpeculationSection(BaseModel):
    """Several tokens of an answer a pass (docs/speculation.md); what is said does not change."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    method: Literal["off", "rasd"] = "off"
    """rasd: guess by prompt lookup, from the datastore and by the draft, if there are any."""
    datastore: str = ""
    """A file that thornback datastore build has written; may be a URI."""
    draft: str = ""
    """A directory that thornback draft has written, or a small model with the same tokenizer: its directory, or a hub \
name."""
    num_nodes: int = Field(default=32, ge=1, le=63)
    """Guesses for a sequence that a pass verifies, at most."""
    adaptive: bool = True
    """Guess less, or not at all, where passes over so many tokens cost more than guesses win; off: all there are, \
always."""
    learn_from_traffic: bool = False
    """Guess from what this replica has answered, too."""

    @model_validator(mode="after")
    def _sources_are_used(self) -> SpeculationSection:
        for name in ("datastore", "draft", "learn_from_traffic"):
            if self.method == "off" and getattr(self, name):
                raise ValueError(f"{name} is given, but the method is off; set speculation.method to rasd")
        return self

    def speculation_config(self) -> SpeculationConfig | None:
        """The engine's own form."""
        if self.method == "off":
            return None
        return SpeculationConfig(num_nodes=self.num_nodes, draft=self.draft, adaptive=self.adaptive)


class LimitSection(BaseModel):
    """What the gateway takes on. More is refused with 429 and a `Retry-After`, or with 400 where it can never fit."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    max_in_flight: int = Field(default=256, ge=1)
    """Sequences (prompts times n) that replicas work on at the same time."""
    max_queued: int = Field(default=512, ge=0)
    """Requests that may wait for their turn at the gateway."""
    queue_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds a request waits for its turn before it is refused."""
    max_sequences: int = Field(default=256, ge=1)
    """Prompts times n in one request."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a prompt. None: as many as the engine holds."""
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    """Bytes of a request's body."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds from a request's admission to its last token."""


class ServeConfig(BaseModel):
    """Settings of `thornback serve`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """A run directory, a model directory in Hugging Face layout, or a hub name."""
    served_model_name: str = ""
    """The name that clients ask for. Empty: the directory's name."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 listens on every interface."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""
    proxy_location: Literal["EveryNode", "HeadOnly"] = "EveryNode"
    """The nodes of a cluster on which Ray Serve listens, where this starts it: those with replicas, or the head."""
    haproxy: bool = False
    """Listen with HAProxy instead of Ray Serve's Python proxy, where the server has a Ray of its own: requests, \
streams and refusals take a part of the time. Linux on x86-64 only."""
    app_name: str = "thornback"
    """The name of the Ray Serve application."""
    ray_address: str = ""
    """A running Ray cluster (auto: the one of this machine). Empty: RAY_ADDRESS, or else a Ray of its own."""
    api_keys: list[str] = []
    """Keys of which clients must send one as a bearer token; THORNBACK_API_KEYS adds some, separated by commas. \
None: everybody may ask."""
    weight_updates: bool = False
    """Whether POST /update_weights_from_disk is answered: whoever may send it chooses what the server says."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the model, each with its own engine."""
    prefill_replicas: int = Field(default=0, ge=0)
    """Copies of the model that compute prompts, whose keys and values those of num_replicas take over to answer \
(FlowKV). 0: every replica does both."""
    split_tokens: int = Field(default=64, ge=1)
    """Shorter prompts are computed where they are answered."""
    first_token_seconds: float | None = Field(default=None, gt=0)
    """Where all replicas are busy, requests whose first token would come later are refused at once. None: they wait."""
    token_seconds: float = Field(default=0.1, gt=0)
    """Replicas are busy where the tokens of an answer lie this many seconds apart."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Lets Ray Serve scale between num_replicas and this many by load. None: no scaling."""
    max_prefill_replicas: int | None = Field(default=None, ge=1)
    """The same for prefill_replicas."""
    upscale_delay_s: float = Field(default=5.0, ge=0)
    """Seconds of load before replicas are added."""
    downscale_delay_s: float = Field(default=60.0, ge=0)
    """Seconds without load before replicas are taken away."""
    gateway_replicas: int = Field(default=1, ge=1)
    """Gateways, each of which has limits of its own and places its own requests."""
    threads_per_replica: int | None = Field(default=None, ge=1)
    """Torch threads of an engine. None: torch's own choice."""
    cpus_per_replica: float = Field(default=1.0, ge=0)
    """CPUs that Ray sets aside for a replica."""
    gpus_per_replica: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside for a replica."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds until the first replica must answer."""
    engine: EngineSection = EngineSection()
    speculation: SpeculationSection = SpeculationSection()
    limits: LimitSection = LimitSection()

    @model_validator(mode="after")
    def _replicas_in_order(self) -> ServeConfig:
        for most, least in (("max_replicas", "num_replicas"), ("max_prefill_replicas", "prefill_replicas")):
            if getattr(self, most) is not None and getattr(self, most) < getattr(self, least):
                raise ValueError(f"{most} is {getattr(self, most)}, but {least} is {getattr(self, least)}")
        if self.engine.name == "torch" and self.engine.options:
            raise ValueError("engine.options are arguments of other engines; the torch engine has none")
        if self.max_prefill_replicas and not self.prefill_replicas:
            raise ValueError("max_prefill_replicas is set, but prefill_replicas is 0: no pool of their own")
        return self


def serve_config(**settings: Any) -> ServeConfig:
    """A `ServeConfig`; raises `ConfigError` in one sentence, with the nearest name for an unknown setting."""
    try:
        return ServeConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] != "extra_forbidden":
            where = f"{key} is {first['input']!r}: " if key else ""
            raise ConfigError(f"Serving cannot be set up: {where}{first['msg']}.") from error
        near = difflib.get_close_matches(str(first["loc"][-1]), _names_beside(first["loc"]), 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"Serving has no setting {key}{hint}") from error


def _names_beside(location: tuple[int | str, ...]) -> list[str]:
    """The names that the section of an unknown setting knows."""
    model: type[BaseModel] = ServeConfig
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        model = next(c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
