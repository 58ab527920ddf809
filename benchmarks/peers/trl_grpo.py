"""TRL's GRPOTrainer on CPU, in its fastest honest configuration: float32 (there is no faster type here), no gradient
checkpointing (which it has on by default), the whole batch in one pass, fused AdamW, no KL, and no reference model.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks.problems import digits, questions, variety
from benchmarks.worker import TurnTaker

Completions = list[list[dict[str, str]]]


def reward_digits(completions: Completions, **_: Any) -> list[float]:
    return [digits(messages[0]["content"]) for messages in completions]


def reward_variety(completions: Completions, **_: Any) -> list[float]:
    return [variety(messages[0]["content"]) for messages in completions]


class TakeTurns(TrainerCallback):
    """A turn is one step, from the end of the one before: loading the prompts and logging belong to it."""

    def __init__(self, turns: TurnTaker, tokens: int) -> None:
        self.turns = turns
        self.tokens = tokens
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        return self._next(control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.turns.report(seconds=time.perf_counter() - self.started, tokens=self.tokens)
        return self._next(control)

    def _next(self, control: TrainerControl) -> TrainerControl:
        control.should_training_stop = not self.turns.wait()
        self.started = time.perf_counter()
        return control


def step(
    turns: TurnTaker, model: str, directory: str, threads: int, prompts: int, samples: int, new_tokens: int
) -> None:
    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    config = GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=prompts * samples,
        num_generations=samples,
        max_completion_length=new_tokens,
        # Completions end at new_tokens only; cheaper for it than suppressing the end-of-sequence token.
        generation_kwargs={"eos_token_id": None},
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=[0.5, 0.5],
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        max_steps=1_000_000,
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=network,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=[reward_digits, reward_variety],
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in questions()]),
        callbacks=[TakeTurns(turns, prompts * samples * new_tokens)],
    )
    trainer.train()
