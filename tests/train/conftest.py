"""A run with most that can be lost, which several modules compare theirs with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny_run import drafted, trainer


@pytest.fixture(scope="session")
def head(tiny_model, tmp_path_factory) -> str:
    """The directory of an untrained draft head for the runs' starting model."""
    from thornback.engine import load_model
    from thornback.engine.draft_head import DraftHead

    directory = tmp_path_factory.mktemp("head")
    DraftHead.new(load_model(tiny_model("qwen3"))).save(directory)
    return str(directory)


@pytest.fixture(scope="session")
def _undisturbed() -> list[Path]:
    return []


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tiny_model, head, tmp_path_factory, _undisturbed) -> Path:
    """The directory of a run that speculates with a draft head, which follows its policy; nothing disturbed it."""
    if not _undisturbed:
        directory = tmp_path_factory.mktemp("undisturbed")
        trainer(drafted(tiny_model("qwen3"), directory, head)).train()
        _undisturbed.append(directory)
    return _undisturbed[0]
