"""The files of deploy/ are what Ray and Grafana take."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from thornback.serve.config import serve_config
from thornback.train.config import load_recipe

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


@pytest.mark.parametrize(("name", "workers"), [("cluster.yaml", 8), ("machines.yaml", 2)])
def test_the_autoscalers_files(tmp_path, monkeypatch, name: str, workers: int) -> None:
    from ray.autoscaler._private.local import config as local
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setattr(local, "get_lock_path", lambda cluster: str(tmp_path / f"{cluster}.lock"))
    monkeypatch.setattr(local, "get_state_path", lambda cluster: str(tmp_path / f"{cluster}.state"))
    config = yaml.safe_load((DEPLOY / name).read_text())
    full = prepare_config(config)  # as `ray up` does, with the cloud's defaults
    validate_config(full)
    assert [of["max_workers"] for of in full["available_node_types"].values() if of["max_workers"]] == [workers]
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    with pytest.raises(Exception, match="colour"):
        validate_config({**full, "colour": "red"})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Group(Strict):
    """Of KubeRay's WorkerGroupSpec and HeadGroupSpec, what we use."""

    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]
    groupName: str = ""  # noqa: N815
    replicas: int = 0
    minReplicas: int = 0  # noqa: N815
    maxReplicas: int = 0  # noqa: N815


class Cluster(Strict):
    """Of its RayClusterSpec."""

    headGroupSpec: Group  # noqa: N815
    workerGroupSpecs: list[Group]  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: dict[str, Any]  # noqa: N815
    rayVersion: str = ""  # noqa: N815


class Job(Strict):
    """Of its RayJobSpec."""

    entrypoint: str
    rayClusterSpec: Cluster  # noqa: N815
    submissionMode: str  # noqa: N815
    backoffLimit: int  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: int  # noqa: N815


class Service(Strict):
    """Of its RayServiceSpec."""

    serveConfigV2: str  # noqa: N815
    rayClusterConfig: Cluster  # noqa: N815


def kuberay(name: str, kind: str) -> dict[str, Any]:
    """The spec of a file of ours."""
    found = yaml.safe_load((DEPLOY / name).read_text())
    assert (found["apiVersion"], found["kind"], set(found)) == (
        "ray.io/v1", kind, {"apiVersion", "kind", "metadata", "spec"},
    )  # fmt: skip
    return found["spec"]


def check_cluster(cluster: Cluster) -> None:
    """Its pods are what Kubernetes takes."""
    import kubernetes_validate

    for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **group.template}
        kubernetes_validate.validate(pod, "1.34", strict=True)
        spec = group.template["spec"]
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        spec["containers"][0]["colour"] = "red"
        with pytest.raises(kubernetes_validate.ValidationError, match="colour"):
            kubernetes_validate.validate(pod, "1.34", strict=True)


def test_kuberays_service() -> None:
    service = Service(**kuberay("rayservice.yaml", "RayService"))
    check_serve_config(service.serveConfigV2)
    check_cluster(service.rayClusterConfig)


def test_kuberays_cluster() -> None:
    check_cluster(Cluster(**kuberay("raycluster.yaml", "RayCluster")))


def test_kuberays_job_trains_a_recipe_of_ours(monkeypatch) -> None:
    job = Job(**kuberay("rayjob.yaml", "RayJob"))
    check_cluster(job.rayClusterSpec)
    assert job.rayClusterSpec.rayVersion == version("ray")
    python, module, name, command, recipe, *overrides = shlex.split(job.entrypoint)
    assert (python, module, name, command) == ("python", "-m", "thornback", "train")
    config = load_recipe(DEPLOY.parent / Path(recipe).relative_to("/home/ray/thornback"), overrides)
    assert config.rollout.num_workers == 4


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_container_files(name: str) -> None:
    lines = re.sub(r"\\\n\s*", " ", (DEPLOY / name).read_text()).splitlines()
    instructions = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    known = {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "ENTRYPOINT"}
    assert {instruction for instruction, _ in instructions} <= known
    assert instructions[0][0] == "FROM"
    assert ":" in instructions[0][1], "an image without a version"
    for instruction, arguments in instructions:
        if instruction == "COPY":
            *sources, _ = [part for part in arguments.split() if not part.startswith("--")]
            assert all((DEPLOY.parent / source).exists() for source in sources)
        for target in re.findall(r"\bmake (\w+)", arguments if instruction == "RUN" else ""):
            assert target in ("gcc", "venv")  # a package's name beside make's, and ours


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
    panels = json.loads((DEPLOY / "grafana-serving.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(r"\b(?:vllm|thornback):[a-z0-9_]+", target["expr"])
    }
    assert len(asked) > 10
    assert asked <= there
