"""The Ray Serve application: a gateway over a pool of replicas."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from thornback.engine import ACTOR_ENVIRONMENT
from thornback.serve.config import ServeConfig, serve_config
from thornback.serve.deployments import GatewayDeployment
from thornback.serve.model_source import resolve_model
from thornback.serve.replica import Replica
from thornback.serve.speculation import check_sources

KEYS_VARIABLE = "THORNBACK_API_KEYS"
# The gateway itself says when it is full, with a 429; Ray Serve's queue before it would only hide that.
NO_LIMIT = 100_000


def build_app(config: ServeConfig) -> ray_serve.Application:
    """The application of a configuration, for `ray.serve.run`. Raises `ModelError` where the model is none."""
    model = resolve_model(config.model)
    config = config.model_copy(update={"served_model_name": config.served_model_name or model_name(config.model)})
    environment = {**ACTOR_ENVIRONMENT}
    if config.threads_per_replica:
        environment["OMP_NUM_THREADS"] = str(config.threads_per_replica)
    replicas = ray_serve.deployment(Replica).options(
        name="Replica",
        max_ongoing_requests=NO_LIMIT,
        max_constructor_retry_count=2,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        graceful_shutdown_wait_loop_s=0.5,
        **_scale(config),
    )
    gateway = ray_serve.deployment(ray_serve.ingress()(GatewayDeployment)).options(
        name="Gateway",
        num_replicas=1,  # limits and counters are exact because there is one
        max_ongoing_requests=NO_LIMIT,
        max_constructor_retry_count=2,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.5,
    )
    check_sources(config.speculation, model)
    engine = replace(
        config.engine.engine_config(config.threads_per_replica), speculation=config.speculation.speculation_config()
    )
    return gateway.bind(config, model, api_keys(config), replicas.bind(model, engine, config.speculation))


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


def _scale(config: ServeConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.num_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        }
    }
