"""The files of deploy/ are what Ray and Grafana take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from thornback.serve.config import serve_config

DEPLOY = Path(__file__).parents[2] / "deploy"


def check_serve_config(text: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    for application in config.applications:
        assert application.import_path == "thornback.serve:app"
        settings = serve_config(**application.args)
        assert settings.max_replicas > settings.num_replicas


def test_ray_serves_file() -> None:
    check_serve_config((DEPLOY / "serve.yaml").read_text())


def test_the_autoscalers_file(tmp_path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    full = prepare_config(config)  # as `ray up` does, with the cloud's defaults
    validate_config(full)
    assert full["available_node_types"]["cpu"]["max_workers"] == 8
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    with pytest.raises(Exception, match="colour"):
        validate_config({**full, "colour": "red"})


def test_kuberays_file() -> None:
    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    check_serve_config(service["spec"]["serveConfigV2"])
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    from thornback.contracts import EngineLoad, TransferStats
    from thornback.serve.link import ReplicaReport
    from thornback.serve.metrics import Metrics

    metrics = Metrics("m")
    metrics.error(429)
    metrics.success("stop")
    report = ReplicaReport("Decode", "a", "n", 1, EngineLoad(0, 0, 0, 0, 1, 1, 0), transfers={"ipc": TransferStats()})
    page = metrics.render([report], [metrics.own(0)])
    there = set(re.findall(r"^([a-z0-9_:]+)(?:{| )", page, re.MULTILINE))
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(r"\b(?:vllm|thornback):[a-z0-9_]+", target["expr"])
    }
    assert len(asked) > 10
    assert asked <= there
