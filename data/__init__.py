"""Prompts in, rollouts out: tasks with their rewards, readers, and storage."""

from thornback.data.demonstrations import Demonstration, Flaws, demonstrations
from thornback.data.importing import load_object
from thornback.data.readers import BadRowReport, PromptSet, read_prompts
from thornback.data.rewards import as_reward, pick_rewards
from thornback.data.scoring import RuleScorer
from thornback.data.storage import read_anchors, read_rollouts, read_table, write_anchors, write_rollouts, write_table
from thornback.data.tasks import ArithmeticTask, MathTask, load_task
from thornback.data.tokenizer import character_tokenizer, render_prompt

__all__ = [
    "ArithmeticTask",
    "BadRowReport",
    "Demonstration",
    "Flaws",
    "MathTask",
    "PromptSet",
    "RuleScorer",
    "as_reward",
    "character_tokenizer",
    "demonstrations",
    "load_object",
    "load_task",
    "pick_rewards",
    "read_anchors",
    "read_prompts",
    "read_rollouts",
    "read_table",
    "render_prompt",
    "write_anchors",
    "write_rollouts",
    "write_table",
]
