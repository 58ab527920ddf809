"""Prompts in, rollouts out: tasks with their rewards, readers, and storage.

Names load when they are first used: checking a recipe must not wait for torch or transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thornback.data.code_reward import CodeReward as CodeReward
    from thornback.data.datastore import Datastore as Datastore
    from thornback.data.datastore import DatastoreInfo as DatastoreInfo
    from thornback.data.datastore import tokenizer_fingerprint as tokenizer_fingerprint
    from thornback.data.demonstrations import Demonstration as Demonstration
    from thornback.data.demonstrations import Flaws as Flaws
    from thornback.data.demonstrations import make_demonstrations as make_demonstrations
    from thornback.data.documents import Documents as Documents
    from thornback.data.documents import read_documents as read_documents
    from thornback.data.files import open_location as open_location
    from thornback.data.importing import load_object as load_object
    from thornback.data.judge import JudgeReward as JudgeReward
    from thornback.data.preferences import Preference as Preference
    from thornback.data.preferences import read_preferences as read_preferences
    from thornback.data.prompt_lookup import PromptLookup as PromptLookup
    from thornback.data.readers import BadRowReport as BadRowReport
    from thornback.data.readers import PromptSet as PromptSet
    from thornback.data.readers import read_prompts as read_prompts
    from thornback.data.reward_model import ModelReward as ModelReward
    from thornback.data.rewards import ManyReward as ManyReward
    from thornback.data.rewards import as_reward as as_reward
    from thornback.data.rewards import pick_rewards as pick_rewards
    from thornback.data.sandbox import Ran as Ran
    from thornback.data.sandbox import SandboxLimits as SandboxLimits
    from thornback.data.sandbox import run_python as run_python
    from thornback.data.scoring import RuleScorer as RuleScorer
    from thornback.data.scoring import check_failures as check_failures
    from thornback.data.storage import read_anchors as read_anchors
    from thornback.data.storage import read_rollouts as read_rollouts
    from thornback.data.storage import read_table as read_table
    from thornback.data.storage import write_anchors as write_anchors
    from thornback.data.storage import write_rollouts as write_rollouts
    from thornback.data.storage import write_table as write_table
    from thornback.data.tasks import ArithmeticTask as ArithmeticTask
    from thornback.data.tasks import MathTask as MathTask
    from thornback.data.tasks import MultihopTask as MultihopTask
    from thornback.data.tasks import ToolsTask as ToolsTask
    from thornback.data.tasks import VerifiersTask as VerifiersTask
    from thornback.data.tasks import load_task as load_task
    from thornback.data.tokenizer import character_tokenizer as character_tokenizer
    from thornback.data.tokenizer import load_tokenizer as load_tokenizer
    from thornback.data.tokenizer import render_prompt as render_prompt
    from thornback.data.tokenizer import render_reply as render_reply
    from thornback.data.tokenizer import same_tokens as same_tokens

_HOMES = {
    name: module
    for module, names in {
        "code_reward": "CodeReward",
        "datastore": "Datastore DatastoreInfo tokenizer_fingerprint",
        "demonstrations": "Demonstration Flaws make_demonstrations",
        "documents": "Documents read_documents",
        "files": "open_location",
        "importing": "load_object",
        "judge": "JudgeReward",
        "preferences": "Preference read_preferences",
        "prompt_lookup": "PromptLookup",
        "readers": "BadRowReport PromptSet read_prompts",
        "reward_model": "ModelReward",
        "rewards": "ManyReward as_reward pick_rewards",
        "sandbox": "Ran SandboxLimits run_python",
        "scoring": "RuleScorer check_failures",
        "storage": "read_anchors read_rollouts read_table write_anchors write_rollouts write_table",
        "tasks": "ArithmeticTask MathTask MultihopTask ToolsTask VerifiersTask load_task",
        "tokenizer": "character_tokenizer load_tokenizer render_prompt render_reply same_tokens",
    }.items()
    for name in names.split()
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
