"""The sections of a run's configuration: every setting, its default, its bounds, and what it means.

The sections up to `CheckpointSection` hold what a first recipe sets; a method's own constants live in a section
of that method (`DvaoConstants`, `GspoConstants`, ...). Imports neither Ray nor torch: a recipe is checked first.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Share = Annotated[float, Field(ge=0.0, le=1.0)]
EstimatorName = Literal[
    "grpo", "dr_grpo", "rloo", "reward_combination", "advantage_combination", "gdpo", "dvao", "pvpo", "anchored_dvao"
]
Threads = Annotated[int, Field(ge=1)] | None


class Section(BaseModel):
    """Unknown keys are errors, and the docstring under a field is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """The run as a whole."""

    name: str = "run"
    """What the run is called in reports."""
    dir: str = ""
    """The run directory: a path, or a URI that pyarrow.fs understands (s3://, gs://). Empty: runs/NAME."""
    seed: NonNegativeInt = 0
    """The one seed that every random number derives from."""
    steps: PositiveInt = 100
    """Reinforcement-learning steps: one batch of rollouts, and the updates on it."""
    timeout_seconds: PositiveFloat = 600.0
    """The longest that any single piece of work may take before it counts as lost."""
    max_restarts: NonNegativeInt = 10
    """How many lost actors a run replaces before it gives up."""
    address: str | None = None
    """A Ray cluster to join ("auto": the one on this machine). None: a cluster of this run's own."""
    save_rollouts: bool = False
    """Write every step's rollouts to RUN/rollouts/ as Parquet."""


class BuildSection(Section):
    """A model made from nothing, with a character tokenizer."""

    architecture: Literal["qwen3", "qwen2", "llama"] = "qwen3"
    """The transformers architecture."""
    hidden_size: PositiveInt = 96
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt = 4
    """Number of layers."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_key_value_heads: PositiveInt = 2
    """Key and value heads."""
    head_dim: PositiveInt | None = None
    """Width of a head. None: hidden_size / num_attention_heads; vLLM on CPU wants a multiple of 32."""
    intermediate_size: PositiveInt = 256
    """Width of the feed-forward layers."""
    max_position_embeddings: PositiveInt = 512
    """The longest context, in tokens."""
    extra_tokens: list[str] = Field(default_factory=list)
    """Strings that become one token each, beside the characters."""


class LoraSection(Section):
    """Low-rank adapters (peft): only they are trained; the merged weights are published."""

    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: alpha / rank."""
    target_modules: list[str] | str = "all-linear"
    """Names of the adapted modules, or "all-linear"."""


class ModelSection(Section):
    """The policy. Give either `path` or `build`."""

    path: str | None = None
    """A Hugging Face model directory, visible to every node, or a hub name."""
    build: BuildSection | None = None
    """Make a small model instead."""
    lora: LoraSection | None = None
    """Train adapters instead of all weights."""


class TaskSection(Section):
    """What the model is trained to do."""

    name: str = "arithmetic"
    """A built-in task (arithmetic, math, multihop, tools, verifiers), or one's import path: package.module:Name."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task; for `math`: the dataset's path and its columns."""


class DataSection(Section):
    """Which prompts a step sees."""

    prompts_per_step: PositiveInt = 16
    """Prompts in a batch; each is answered `rollout.samples_per_prompt` times."""
    num_prompts: PositiveInt | None = None
    """Use only the task's first so many training prompts. None: all."""
    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are reported and left out. None: what the model's context allows."""
    shuffle: bool = True
    """A new order of the prompts each epoch, from the run's seed."""


class RewardSection(Section):
    """One named reward."""

    weight: NonNegativeFloat = 1.0
    """Its base weight; weights are divided by their sum."""
    function: str | None = None
    """Import path of a reward of your own, package.module:name. None: the task's reward of this name."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of `function`, where that is a class, such as thornback.data:JudgeReward."""
    range: tuple[float, float] | None = None
    """The lowest and the highest value. None: as the reward says, or [0, 1]."""


class RasdConstants(Section):
    """RASD: rollouts are guessed from the reference rollouts and earlier epochs' (docs/speculation.md)."""

    num_nodes: Annotated[int, Field(ge=1, le=63)] = 32
    """Tokens, at most, that a pass verifies for a rollout besides its next one."""
    max_sequences: PositiveInt = 8
    """Guess while a worker has no more unfinished rollouts than that: more of them fill its passes anyway."""
    max_tokens: PositiveInt = 1 << 22
    """Tokens of rollouts that a worker remembers; beyond that it forgets the older half."""
    draft: str = ""
    """A draft head for the starting model, from which rollouts are guessed too: a directory that thornback draft has
    written; may be a URI. Empty: none."""
    draft_refresh_every: PositiveInt | None = 10
    """The head learns what the policy says in its latest rollouts every so many steps. None: it stays as it is."""
    draft_refresh_updates: PositiveInt = 20
    """Optimizer steps of such a refresh."""
    draft_learning_rate: PositiveFloat = 5e-4
    """AdamW's learning rate in a refresh."""
    draft_num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray sets aside for the actor that refreshes the head; a fraction lets it share one."""


class AheadConstants(Section):
    """Rollouts that run ahead of the learner, where `max_staleness` is above 0 (docs/async.md)."""

    late: Literal["drop", "correct"] = "drop"
    """Rollouts that would be trained by weights further from those that they began with than `max_staleness`: begin
    them again; or train on them, with the weights of `importance_cap` that correct for all that are not fresh."""
    in_flight: Literal["keep", "recompute"] = "keep"
    """Unfinished rollouts go on under new weights: with the keys and values that they have, or with new ones."""
    seconds: PositiveFloat = 0.2
    """New weights wait at most about three times so long for a worker to listen."""


class RolloutSection(Section):
    """Generation."""

    engine: str = "torch"
    """The engine: torch, vllm (docs/vllm.md), auto (vllm on GPUs where it is installed, else torch), or the import path
    of one that implements thornback.contracts.Engine."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Sizes of the engine: fields of thornback.contracts.EngineConfig (block_size, max_num_seqs, ...); vllm takes its
    own EngineArgs too (tensor_parallel_size, gpu_memory_utilization, ...)."""
    num_workers: PositiveInt = 1
    """Rollout workers; the prompts of a step are shared out among them."""
    num_threads: Threads = None
    """Threads of one worker. None: every core of its node, since generation and update alternate."""
    num_cpus: NonNegativeFloat = 0.0
    """CPUs that Ray sets aside for one worker."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray sets aside for one worker; a fraction lets it share one with the learner."""
    samples_per_prompt: PositiveInt = 8
    """Rollouts of each prompt: the group that advantages compare."""
    max_tokens: PositiveInt = 256
    """The longest response, in tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; below 1 needs `allow_truncation`."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; above 0 needs `allow_truncation`."""
    min_p: Share = 0.0
    """Keep tokens above this share of the likeliest; above 0 needs `allow_truncation`."""
    allow_truncation: bool = False
    """Accept that truncated sampling draws from another distribution than the one that is trained."""
    max_staleness: NonNegativeInt = 0
    """How many versions the learner may be ahead of the weights that a rollout began with. 0: each step waits for its
    own rollouts, and repeats itself exactly; above 0 rollouts run beside the updates."""
    ahead: AheadConstants = AheadConstants()
    """Constants of rollouts that run ahead."""
    speculate: Literal["off", "rasd"] = "off"
    """rasd: verify guesses from earlier rollouts of the same prompts, which gives the same tokens in fewer passes."""
    rasd: RasdConstants = RasdConstants()
    """Constants of rasd."""

    @property
    def refreshes_draft(self) -> bool:
        """Whether rollouts are guessed by a draft head that follows the policy."""
        return self.speculate == "rasd" and bool(self.rasd.draft) and self.rasd.draft_refresh_every is not None


class EnvironmentConstants(Section):
    """Whom the model takes turns with, where the task has environments."""

    max_turns: PositiveInt | None = None
    """The most turns of the model in an episode. None: as the task says."""
    timeout_seconds: PositiveFloat = 60.0
    """An environment that does not answer for so long has failed; its rollout counts for nothing."""
    max_failed_share: Share = 0.1
    """The run stops where the environments of more than this share of a step's rollouts fail."""


class ScoringSection(Section):
    """Judging the rollouts."""

    num_workers: PositiveInt = 1
    """Reward actors; they share a step's rollouts."""
    max_failed_share: Share = 0.0
    """A reward that raises, or returns no number in its range, says nothing of its rollout; the run stops where more
    than this share of a step's rollouts meet one."""
    num_cpus: NonNegativeFloat = 0.0
    """CPUs that Ray sets aside for one."""


class GrpoConstants(Section):
    """GRPO, and every estimator that divides by a spread."""

    eps: PositiveFloat = 1e-6
    """A spread below this counts as none, and the advantage is 0."""


class DvaoConstants(Section):
    """DVAO and anchored DVAO (arXiv 2605.25604; floor and cap are ours)."""

    eps: PositiveFloat = 1e-6
    """A weighted spread below this counts as none, and the advantage is 0."""
    weight_floor: Share | None = None
    """The least effective weight of a reward. None: off."""
    weight_cap: Share | None = None
    """The largest effective weight of a reward. None: off."""


class ClipConstants(Section):
    """Clipped token ratios (PPO, with DAPO's separate bounds)."""

    clip_low: NonNegativeFloat = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The ratio is clipped above 1 + clip_high."""


class GspoConstants(Section):
    """GSPO: one ratio a sequence."""

    clip_low: NonNegativeFloat = 3e-4
    """The sequence's ratio is clipped below 1 - clip_low."""
    clip_high: NonNegativeFloat = 4e-4
    """The sequence's ratio is clipped above 1 + clip_high."""


class CispoConstants(Section):
    """CISPO: the ratio is a clipped, detached weight of the log-probability."""

    clip_low: NonNegativeFloat = 1.0
    """The weight is at least 1 - clip_low."""
    clip_high: NonNegativeFloat = 4.0
    """The weight is at most 1 + clip_high."""


class AlgorithmSection(Section):
    """From rewards to a loss."""

    estimator: EstimatorName = "grpo"
    """How rewards become advantages: one file each in algorithms/advantages/."""
    loss: Literal["clip", "gspo", "cispo"] = "clip"
    """How advantages become a loss."""
    aggregation: Literal["token", "sequence", "fixed"] = "token"
    """Mean over the batch's tokens, mean over sequences of their means, or sums over a fixed length (max_tokens)."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the KL to the reference policy, the model that the run starts from; 0 computes no reference."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """The KL estimator."""
    importance_cap: PositiveFloat | None = 2.0
    """Cap of the weights that correct for the engine's log-probabilities differing from the trainer's. None: off."""
    grpo: GrpoConstants = GrpoConstants()
    """Constants of grpo, reward_combination, advantage_combination and gdpo."""
    dvao: DvaoConstants = DvaoConstants()
    """Constants of dvao and anchored_dvao."""
    clip: ClipConstants = ClipConstants()
    """Constants of the clip loss."""
    gspo: GspoConstants = GspoConstants()
    """Constants of the gspo loss."""
    cispo: CispoConstants = CispoConstants()
    """Constants of the cispo loss."""


class LearnerSection(Section):
    """The update."""

    num_ranks: PositiveInt = 1
    """Learner processes, each with a share of the batch."""
    num_threads: Threads = None
    """Threads of one rank. None: every core of its node, divided by the ranks."""
    num_cpus: NonNegativeFloat = 0.0
    """CPUs that Ray sets aside for one rank."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray sets aside for one rank."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Whole copies of the model (DistributedDataParallel), or shards of it (FSDP2)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. auto: float32 on CPU, bfloat16 on CUDA."""
    learning_rate: PositiveFloat = 1e-6
    """AdamW's peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""
    final_learning_rate_share: Share = 0.0
    """Where a falling schedule ends, as a share of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's momenta."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    epochs_per_batch: PositiveInt = 1
    """Passes over a batch."""
    updates_per_epoch: PositiveInt = 1
    """Optimizer steps in a pass: the batch is cut into so many parts."""
    tokens_per_microbatch: PositiveInt = 16384
    """Prompt and response tokens in one forward pass. Never changes the result, only memory and speed."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""


class AnchorsConstants(Section):
    """Pre-sampling with the reference policy (PVPO, arXiv 2508.21104)."""

    num_rollouts: PositiveInt = 8
    """Reference rollouts of a prompt (the paper's M)."""
    path: str | None = None
    """Read the anchors from this Parquet file instead of sampling them. None: RUN/anchors.parquet, made if missing."""
    drop_solved: bool = True
    """Drop prompts that the reference always solves."""
    drop_unsolved: bool = True
    """Drop prompts that the reference never solves, unless a larger model has a right answer to them."""
    larger_model: str | None = None
    """A larger model with the same tokenizer; its right answers to unsolved prompts join the training."""
    larger_model_rollouts: PositiveInt = 8
    """Answers of the larger model to each unsolved prompt."""
    refresh_every: PositiveInt | None = None
    """Estimate the kept prompts' anchors again with the current policy every so many steps. None: never."""


class WarmStartSection(Section):
    """Supervised training on demonstrations before reinforcement learning."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Demonstrations in a step."""
    learning_rate: PositiveFloat = 3e-3
    """AdamW's peak learning rate; it decays linearly to a tenth."""
    warmup_steps: NonNegativeInt = 50
    """Steps over which the learning rate rises from 0."""
    num_demonstrations: PositiveInt = 20000
    """Demonstrations to draw from."""
    num_workers: PositiveInt = 1
    """Ray Train workers."""
    environment_weight: Share = 0.0
    """Weight of the loss on what environments say in demonstrations: a model made from nothing learns from it to
    find and to copy."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task's demonstrations: how much is spoiled on purpose."""


class EvaluationSection(Section):
    """The held-out set."""

    every: NonNegativeInt = 20
    """Steps between evaluations; the first and the last policy are evaluated too. 0: never."""
    num_prompts: PositiveInt = 512
    """Held-out prompts."""
    greedy: bool = True
    """Evaluate greedily too, beside sampling at the training temperature."""
    max_tokens: PositiveInt | None = None
    """The longest answer. None: as in training."""
    num_saved_samples: NonNegativeInt = 64
    """Answers written to samples_before.parquet and samples_after.parquet."""


class CheckpointSection(Section):
    """Checkpoints, from which the same command resumes, bit for bit."""

    every: PositiveInt = 10
    """Steps between checkpoints; a lost learner goes back to the latest."""
    keep: PositiveInt = 2
    """How many are kept."""
