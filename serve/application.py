"""The Ray Serve application: a gateway over a pool of replicas."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve.config import RequestRouterConfig

from thornback.contracts import SHARED
from thornback.engine import ACTOR_ENVIRONMENT
from thornback.serve.autoscaling import by_demand
from thornback.serve.config import ServeConfig, serve_config
from thornback.serve.deployments import GatewayDeployment
from thornback.serve.model_source import resolve_model
from thornback.serve.replica import Replica
from thornback.serve.routing import PlacedRouter
from thornback.serve.speculation import check_sources

KEYS_VARIABLE = "THORNBACK_API_KEYS"
# The gateway itself says when it is full, with a 429; Ray Serve's queue before it would only hide that.
NO_LIMIT = 100_000
GRACE_S = 20.0  # a replica that is to end has so long: what cannot go on elsewhere may end there
HEALTH_CHECK_S, HEALTH_ANSWER_S = 3.0, 5.0  # one that does not answer three times in a row is replaced
METRICS_S = 1.0
# What a gateway does never blocks, so that it needs no thread of its own beside Ray Serve's: every message would change
# between them twice.
ONE_THREAD = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


def build_app(config: ServeConfig) -> ray_serve.Application:
    """The application of a configuration, for `ray.serve.run`. Raises `ModelError` where the model is none."""
    model = resolve_model(config.model)
    config = config.model_copy(update={"served_model_name": config.served_model_name or model_name(config.model)})
    environment = {**ACTOR_ENVIRONMENT}
    if config.threads_per_replica:
        environment["OMP_NUM_THREADS"] = str(config.threads_per_replica)
    check_sources(config.speculation, model, config.engine.name)
    engine = replace(
        config.engine.engine_config(config.threads_per_replica),
        speculation=config.speculation.speculation_config(),
        kv_location=SHARED if config.prefill_replicas else "",
    )

    def pool(name: str, least: int, most: int | None) -> ray_serve.Application:
        deployment = ray_serve.deployment(Replica).options(
            name=name,
            max_ongoing_requests=NO_LIMIT,
            max_constructor_retry_count=2,
            ray_actor_options={
                "num_cpus": config.cpus_per_replica,
                "num_gpus": config.gpus_per_replica,
                "runtime_env": {"env_vars": environment},
            },
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=GRACE_S,
            health_check_period_s=HEALTH_CHECK_S,
            health_check_timeout_s=HEALTH_ANSWER_S,
            request_router_config=RequestRouterConfig(request_router_class=PlacedRouter),
            **_scale(config, least, most),
        )
        return deployment.bind(model, engine, config.engine, config.speculation)

    gateway = ray_serve.deployment(ray_serve.ingress()(GatewayDeployment)).options(
        name="Gateway",
        num_replicas=config.gateway_replicas,
        max_ongoing_requests=NO_LIMIT,
        max_constructor_retry_count=2,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": ONE_THREAD}},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        graceful_shutdown_wait_loop_s=0.5,
    )
    if not config.prefill_replicas:
        return gateway.bind(config, model, api_keys(config), pool("Replica", config.num_replicas, config.max_replicas))
    decode = pool("Decode", config.num_replicas, config.max_replicas)
    prefill = pool("Prefill", config.prefill_replicas, config.max_prefill_replicas)
    return gateway.bind(config, model, api_keys(config), decode, prefill)


def app(args: dict[str, Any]) -> ray_serve.Application:
    """For `serve deploy` and `serve run thornback.serve:app model=...`: `args` are `ServeConfig`'s settings."""
    return build_app(serve_config(**args))


def model_name(run_or_model: str) -> str:
    """The name of a model that was given none: its directory's, and for a run's model the run's."""
    path = Path(run_or_model).expanduser()
    if not path.is_dir():
        return run_or_model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def api_keys(config: ServeConfig) -> tuple[str, ...]:
    """The configuration's keys and the environment's."""
    more = (key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(","))
    return (*config.api_keys, *filter(None, more))


def _scale(config: ServeConfig, least: int, most: int | None) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "metrics_interval_s": METRICS_S,
            "look_back_period_s": 2 * METRICS_S,
            "policy": {"policy_function": by_demand},
        }
    }
