"""What every room's tests share: tiny models, built once a session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # as thornback starts Rays of its own
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # Ray Train sees that a job is done when it looks

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline measures the machine, and what is compiled at its first use.
settings.register_profile("thornback", deadline=None)
settings.load_profile("thornback")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("qwen3")`: the directory of a random model with a character tokenizer; keywords as build_model's."""
    built: dict[tuple, Path] = {}

    def build(architecture: str = "qwen3", **options) -> Path:
        from thornback.data.tokenizer import character_tokenizer
        from thornback.train.build import build_model

        key = (architecture, *sorted(options.items()))
        if key not in built:
            directory = tmp_path_factory.mktemp(architecture)
            options = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, **options}
            built[key] = build_model(directory, character_tokenizer(), architecture=architecture, **options)
        return built[key]

    return build


@pytest.fixture(scope="module")
def ray_cluster(request: pytest.FixtureRequest):
    """A local Ray cluster. The modules of a folder share it: it takes seconds to come and to go."""
    import ray

    from thornback.engine import ACTOR_ENVIRONMENT

    if not ray.is_initialized():
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=300 << 20,
            runtime_env={"env_vars": {**ACTOR_ENVIRONMENT, "PYTHONPATH": os.getcwd()}},
        )
        folder = request.node.getparent(pytest.Directory)
        folder.addfinalizer(ray.shutdown)
    return ray
