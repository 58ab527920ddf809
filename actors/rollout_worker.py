"""The rollout worker: answers prompts with the current policy."""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import ray

from thornback.actors.engines import make_engine
from thornback.actors.episodes import EpisodePlayer
from thornback.actors.groups import Group, GroupPlayer, Start
from thornback.actors.locations import local_model
from thornback.actors.rollout_memory import RolloutMemory
from thornback.actors.specs import RolloutSpec
from thornback.actors.supervision import Home, use_threads
from thornback.contracts import (
    CACHED_VERSION,
    FINISH_REASONS,
    InFlight,
    Prompt,
    RolloutBatch,
    SamplingParams,
    SpeculatingEngine,
    SpeculationStats,
    TensorSpec,
    ThornbackError,
    Trajectory,
    WeightView,
    offsets_of,
)
from thornback.data import PromptLookup, load_tokenizer
from thornback.engine import TorchEngine
from thornback.engine.pass_costs import Costs


@dataclass(frozen=True, slots=True)
class PromptShard:
    """Prompts for one worker: key, token ids and seed of each. Sample i of a prompt draws from its seed + i.

    `trajectories[i]`, where there is one, is a cached right answer, with its log-probabilities under the model that
    wrote it, that takes the place of the prompt's last sample (PVPO, section 2.3).
    """

    keys: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    trajectories: tuple[Trajectory | None, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def piece(self, start: int, end: int) -> PromptShard:
        """Prompts `start` to `end` of it."""
        here = slice(start, end)
        return PromptShard(self.keys[here], self.token_ids[here], self.seeds[here], self.trajectories[here])


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What the driver needs to know of a shard's rollouts: tokens drawn, seconds that it took, what was speculated
    (None: nothing ever is), and how many environments failed, by cause."""

    num_tokens: int
    seconds: float
    speculation: SpeculationStats | None = None
    failures: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GroupReport:
    """Which group is done (None: none is), the version that drew each of its rollouts' first token
    (`CACHED_VERSION`: none did), tokens drawn, and how many environments failed, by cause."""

    number: int | None = None
    versions: tuple[int, ...] = ()
    num_tokens: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)


class RolloutWorkerCore:
    """One engine. The actor is `RolloutWorker`; this is its class, for use in this process."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec

    def setup(self) -> Home:
        """Load the engine; here and not in the constructor, so that what it raises reaches the driver as it is."""
        threads = use_threads(self.spec.num_threads)
        config = replace(self.spec.engine_config, num_threads=threads)
        if config.speculation and config.speculation.draft:
            draft = local_model(config.speculation.draft)
            config = replace(config, speculation=replace(config.speculation, draft=draft))
        self.memory = RolloutMemory(self.spec.memory_tokens)
        retrievers = (PromptLookup(), self.memory) if config.speculation else ()
        model = local_model(self.spec.model)
        self.engine = make_engine(self.spec.engine, model, config, retrievers, self.spec.engine_options)
        self.player = GroupPlayer(self.engine)
        if self.spec.episodes is not None:
            self.player = EpisodePlayer(self.engine, self.spec.episodes, load_tokenizer(model))
        self._ahead: dict[str, tuple[int, PromptShard]] = {}  # groups that `advance` goes on with, by name
        self._ended: deque[Group] = deque()  # of those, not handed out yet
        self.version = 0
        gc.freeze()  # what is loaded by now stays: going through it at every collection costs 5% of a rollout
        return Home.here()

    @ray.method(num_returns=2)
    def generate(
        self, shard: PromptShard, sampling: SamplingParams, version: int, prompts: tuple[Prompt, ...] = ()
    ) -> tuple[RolloutBatch, GenerationReport]:
        """Answer each prompt `sampling.n` times with the weights of `version`; raises if others are loaded. `prompts`:
        those of the shard, where the model takes turns with environments."""
        if version != self.version:
            raise ThornbackError(
                f"A rollout worker holds weights of version {self.version}, but was asked for version {version}."
            )
        started = time.perf_counter()
        # What is cached depends on what ran before, and cached or not differs in the last bits: a shard's rollouts
        # shall be a function of the weights and the shard alone.
        self.engine.flush_prefix_cache()
        if isinstance(self.engine, SpeculatingEngine):
            self.engine.start_over()
        self.memory.wait()
        before = self.engine.load().speculation
        names = self._begin([f"now/{i}" for i in range(len(shard))], shard, sampling, prompts)
        groups = self.player.take(names)
        batch = make_batch(shard, groups)
        num_tokens = _num_tokens(batch)
        after = self.engine.load().speculation
        drafted = after.since(before) if after is not None and before is not None else None
        failures = sum((group.failures for group in groups), Counter())
        return batch, GenerationReport(num_tokens, time.perf_counter() - started, drafted, failures)

    # Rollouts that run ahead of the learner

    @ray.method(num_returns=2)
    def advance(
        self,
        begin: tuple[int, ...],
        shard: PromptShard,
        sampling: SamplingParams,
        prompts: tuple[Prompt, ...],
        seconds: float,
    ) -> tuple[RolloutBatch | None, GroupReport]:
        """Begin the groups of a shard, numbered `begin`, and go on with all that were begun, until one is done or
        `seconds` are over. Returns the rollouts of one that is done, if there is one."""
        until = time.monotonic() + seconds
        for number, i in zip(begin, range(len(shard)), strict=True):
            self._ahead[f"ahead/{number}"] = (number, shard.piece(i, i + 1))
        self._begin([f"ahead/{number}" for number in begin], shard, sampling, prompts)
        while not self._ended and self._ahead:
            self.player.step(patience=max(0.0, until - time.monotonic()))
            self._ended.extend(self.player.finished())
            if time.monotonic() >= until:
                break
        if not self._ended:
            return None, GroupReport()
        group = self._ended.popleft()
        number, of = self._ahead.pop(group.name)
        batch = make_batch(of, [group])
        return batch, GroupReport(number, _first_versions(batch), _num_tokens(batch), dict(group.failures))

    def drop(self, numbers: tuple[int, ...] | None = None) -> None:
        """Give groups that were begun up; None: all of them."""
        names = list(self._ahead) if numbers is None else [f"ahead/{number}" for number in numbers]
        self.player.drop(names)
        self._ended = deque(group for group in self._ended if group.name not in names)
        for name in names:
            self._ahead.pop(name, None)

    def _begin(
        self, names: list[str], shard: PromptShard, sampling: SamplingParams, prompts: tuple[Prompt, ...]
    ) -> list[str]:
        """Begin a group for each prompt, under these names. All or none."""
        cached = shard.trajectories or (None,) * len(shard)
        try:
            for i, name in enumerate(names):
                count = sampling.n - (cached[i] is not None)
                prompt = prompts[i] if prompts else None
                self.player.begin(name, Start(prompt, shard.token_ids[i], shard.seeds[i], count), sampling)
        except BaseException:
            self.player.drop(names)
            raise
        return names

    def load_weights(
        self, buffer: np.ndarray, index: tuple[TensorSpec, ...], version: int, in_flight: InFlight = "finish"
    ) -> None:
        """Map published weights: on CPU the parameters become views of `buffer`, which is mapped, not copied."""
        self.engine.load_weights(WeightView(buffer, index), version, in_flight)
        self.version = version

    # What guesses come from

    def load_draft(self, buffer: np.ndarray, index: tuple[TensorSpec, ...]) -> None:
        """Map the parameters of a refreshed draft head, as `load_weights` does the policy's."""
        assert isinstance(self.engine, TorchEngine), "the configuration lets no other engine learn to draft"
        self.engine.load_draft(WeightView(buffer, index))

    def costs(self) -> Costs:
        """What passes of this worker's engine cost, as (tokens, seconds), measured now that actors are not starting."""
        assert isinstance(self.engine, SpeculatingEngine), "the configuration lets no other engine speculate"
        return self.engine.measure_costs()

    def recall(self, costs: Costs, location: str | None, *batches: RolloutBatch) -> None:
        """Guess, from now on, as the other workers do: by these costs, and from the rollouts that `location` holds
        and those of `batches`, instead of what was remembered before."""
        assert isinstance(self.engine, SpeculatingEngine), "the configuration lets no other engine speculate"
        self.engine.fix_costs(costs)
        self.memory.clear()
        if location is not None:
            self.memory.load(location)
        self.remember(*batches)

    def remember(self, *batches: RolloutBatch) -> None:
        """Guess from these rollouts too; they are sorted while other work goes on."""
        for batch in batches:
            self.memory.remember(batch)

    def save_memory(self, location: str) -> None:
        """Write what `recall` reads."""
        self.memory.save(location)


def _num_tokens(batch: RolloutBatch) -> int:
    """Those that the policy drew."""
    return int(((batch.versions != CACHED_VERSION) & (batch.loss_mask > 0)).sum())


def _first_versions(batch: RolloutBatch) -> tuple[int, ...]:
    return tuple(int(batch.versions[start]) for start in batch.response_offsets[:-1])


def make_batch(shard: PromptShard, groups: Sequence[Group]) -> RolloutBatch:
    """The rollouts of each prompt as flat arrays, cached ones last, not judged by rewards yet."""
    cached = shard.trajectories or (None,) * len(shard)
    whole = [[*g.trajectories, *([] if c is None else [c])] for g, c in zip(groups, cached, strict=True)]
    rollouts = [rollout for group in whole for rollout in group]
    counts = [len(group) for group in whole]
    prompts = [np.asarray(ids, np.int32) for ids, n in zip(shard.token_ids, counts, strict=True) for _ in range(n)]
    turns = [rollout.turn_starts for rollout in rollouts]
    return RolloutBatch(
        prompt_ids=np.concatenate(prompts),
        prompt_offsets=offsets_of([len(p) for p in prompts]),
        response_ids=np.concatenate([r.token_ids for r in rollouts]),
        response_offsets=offsets_of([len(r.token_ids) for r in rollouts]),
        logprobs=np.concatenate([r.logprobs for r in rollouts]),
        versions=np.concatenate([r.versions for r in rollouts]),
        loss_mask=np.concatenate([r.loss_mask for r in rollouts]),
        turn_starts=np.concatenate(turns),
        turn_offsets=offsets_of([len(starts) for starts in turns]),
        prompt_keys=np.repeat(np.array(shard.keys, np.str_), counts),
        sample_index=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        finish_reason=np.array([FINISH_REASONS.index(r.finish_reason) for r in rollouts], np.int8),
        num_calls=np.array([r.num_calls for r in rollouts], np.int32),
        correct=np.full(len(rollouts), np.nan, np.float32),
        rewards={},
        judged={
            name: np.array([r.judged.get(name, np.nan) for r in rollouts], np.float32)
            for name in dict.fromkeys(name for r in rollouts for name in r.judged)
        },
    )


RolloutWorker = ray.remote(RolloutWorkerCore)
