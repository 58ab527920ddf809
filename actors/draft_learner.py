"""The draft learner: keeps the head that guesses rollouts in step with the policy (RASD, papers.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ray
import torch
from torch import Tensor

from thornback.actors.locations import exists, join, local_model, resolve
from thornback.actors.optimizer import Optimizer
from thornback.actors.specs import DraftLearnerSpec, DraftReport, OptimizerSpec
from thornback.actors.supervision import Home, use_threads
from thornback.actors.tensor_file import read_tensors, write_tensors
from thornback.contracts import DataError, RolloutBatch, TensorSpec, WeightView
from thornback.data import read_rollouts, write_rollouts
from thornback.engine import bind_weights, flatten_parameters, load_model
from thornback.engine.draft_head import load_draft_head
from thornback.engine.draft_training import losses
from thornback.engine.weights import mapped, tensor_in, unbind_weights

STATE_FILE, ROLLOUTS_FILE = "draft.safetensors", "draft_rollouts.parquet"  # of a checkpoint
_PARTS = ("weight", "exp_avg", "exp_avg_sq")  # of the state: the parameters, and AdamW's moments of them
_DEPTH = 3  # guesses in a row that are trained, as `thornback draft` does
_SEQUENCES = 16  # of an optimizer step, at most
_LOGITS = 1 << 28  # numbers: a step's tokens times the vocabulary, at most; the loss keeps about ten such tensors
_JUDGED = 4  # batches that say how good the head is before it learns
_WARMUP_STEPS = 10  # AdamW knows nothing of the head at first
_SMALLEST = 8  # tokens of a rollout that is worth learning from


class DraftLearnerCore:
    """Makes a head and rollouts into a better head. The actor is `DraftLearner`; this is its class.

    What a head is at any time, its state, is three flat buffers of one layout: its parameters and AdamW's two moments
    of them, uint8 `[bytes]`. They come with a call and go with its answer, and nothing is kept in between: an actor
    that is lost is replaced by another, whose work is the same, bit for bit.
    """

    def __init__(self, spec: DraftLearnerSpec) -> None:
        self.spec = spec

    def setup(self) -> Home:
        """Load the policy's architecture and the head; raises `ModelError` if they do not fit."""
        use_threads(self.spec.num_threads)
        self.target = load_model(local_model(self.spec.model), dtype="float32").requires_grad_(False)
        self.head = load_draft_head(local_model(self.spec.draft), self.target, 0).train()
        unbind_weights(self.target)  # the weights that count come with each refresh
        self._weights, self._index = flatten_parameters(self.head)
        self._moments = self._weights.new_zeros(2, len(self._weights))
        self._first = self._weights.clone()
        self.optimizer = Optimizer(
            self.head.parameters(),
            OptimizerSpec(learning_rate=self.spec.learning_rate, warmup_steps=_WARMUP_STEPS),
        )
        return Home.here()

    @ray.method(num_returns=5)
    def restore(
        self, location: str | None
    ) -> tuple[np.ndarray, tuple[TensorSpec, ...], np.ndarray, RolloutBatch | None, DraftReport]:
        """A checkpoint's state: parameters, their layout, moments `[2, bytes]`, and the rollouts that the head has not
        learned from yet. `location` None: those of the head that the run begins with. Raises `DataError` for the state
        of another head."""
        self._weights.copy_(self._first)
        self._moments.zero_()
        num_updates, rollouts = 0, None
        if location is not None:
            num_updates = self._read(location)
            filesystem, path = resolve(join(location, ROLLOUTS_FILE))
            rollouts = read_rollouts(join(location, ROLLOUTS_FILE)) if exists(filesystem, path) else None
        report = DraftReport(num_updates, 0 if rollouts is None else len(rollouts))
        return _copied(self._weights), self._index, _copied(self._moments), rollouts, report

    def save(
        self, location: str, num_updates: int, weights: np.ndarray, moments: np.ndarray, *batches: RolloutBatch
    ) -> None:
        """Write what `restore` reads into the directory `location`."""
        buffers = (weights, *moments)
        tensors = {
            f"{part}/{spec.name}": tensor_in(mapped(buffer), spec)
            for part, buffer in zip(_PARTS, buffers, strict=True)
            for spec in self._index
        }
        filesystem, path = resolve(join(location, STATE_FILE))
        write_tensors(filesystem, path, tensors, {"num_updates": str(num_updates)})
        if batches:
            write_rollouts(RolloutBatch.concat(batches), join(location, ROLLOUTS_FILE))

    @ray.method(num_returns=3)
    def refresh(
        self,
        seed: int,
        num_updates: int,
        weights: np.ndarray,
        moments: np.ndarray,
        policy: np.ndarray,
        index: tuple[TensorSpec, ...],
        *batches: RolloutBatch,
    ) -> tuple[np.ndarray, np.ndarray, DraftReport]:
        """The parameters and moments of a head that has learned what the policy says of these rollouts, from the head
        that `num_updates` optimizer steps have made. `policy` and `index`: published weights, which are mapped, not
        copied. Everything random derives from `seed`."""
        rollouts = _newest(batches, self.spec.max_tokens)
        if not rollouts:
            return weights, moments, DraftReport(num_updates, 0)
        self._take(num_updates, weights, moments)
        rng = np.random.default_rng(seed)
        bind_weights(self.target, WeightView(policy, index))
        try:
            with torch.no_grad():
                agreement = float(np.mean([self._losses(rollouts, rng)[1][0] for _ in range(_JUDGED)]))
            for _ in range(self.spec.updates):
                self._losses(rollouts, rng)[0].backward()
                self.optimizer.step(self._num_updates)
        finally:
            unbind_weights(self.target)  # a version that the store has dropped needs no memory
        report = DraftReport(self._num_updates, len(rollouts), agreement)
        return _copied(self._weights), _copied(self._moments), report

    def _losses(self, rollouts: list[tuple[np.ndarray, int]], rng: np.random.Generator) -> tuple[Tensor, list[float]]:
        """What some of the rollouts, which are drawn, say of the head."""
        room = max(_LOGITS // self.target.config.get_text_config().vocab_size, _SMALLEST)
        sequences: list[np.ndarray] = []
        starts: list[int] = []
        for i in rng.permutation(len(rollouts))[:_SEQUENCES]:
            ids, start = rollouts[i]
            if len(ids) > room and sequences:
                break
            cut = int(rng.integers(0, max(len(ids) - room, 0) + 1))  # a long one alone: some part of it
            sequences.append(ids[cut : cut + room])
            starts.append(min(max(start - cut, 1), len(sequences[-1])))
            room -= len(sequences[-1])
        return losses(self.head, self.target, sequences, _DEPTH, rng, starts)

    @property
    def _num_updates(self) -> int:
        """Those that moved the head: AdamW counts no step whose gradient was not finite."""
        return int(next(iter(self.optimizer.adamw.state.values()))["step"])

    def _take(self, num_updates: int, weights: np.ndarray, moments: np.ndarray) -> None:
        """Go on from a state."""
        self._weights.copy_(mapped(weights))
        self._moments.copy_(mapped(moments))
        parameters = dict(self.head.named_parameters())
        for spec in self._index:
            parameter = parameters[spec.name]
            self.optimizer.adamw.state[parameter] = {
                "step": torch.tensor(float(num_updates), device=parameter.device),
                **{part: tensor_in(of, spec) for part, of in zip(_PARTS[1:], self._moments, strict=True)},
            }

    def _read(self, location: str) -> int:
        """Take over a checkpoint's state; returns the optimizer steps behind it."""
        filesystem, path = resolve(join(location, STATE_FILE))
        metadata, tensors = read_tensors(filesystem, path)
        buffers = dict(zip(_PARTS, (self._weights, *self._moments), strict=True))
        wanted = {f"{part}/{s.name}": tensor_in(of, s) for part, of in buffers.items() for s in self._index}
        for name, tensor in tensors:
            place = wanted.pop(name, None)
            if place is None or place.shape != tensor.shape:
                wanted[name] = tensor
                break
            place.copy_(tensor)
        if wanted:
            raise DataError(
                f"The checkpoint {location} holds the state of another draft head than {self.spec.draft} (its "
                f"{next(iter(wanted))} differs); take that head back, or start the run in another directory."
            )
        return int(metadata["num_updates"])


def _newest(batches: Sequence[RolloutBatch], max_tokens: int) -> list[tuple[np.ndarray, int]]:
    """The newest rollouts of so many tokens in all that are worth learning from, the oldest first: token ids of prompt
    and response, int64, and where the response begins."""
    found: list[tuple[np.ndarray, int]] = []
    for batch in reversed(batches):
        for i in reversed(range(len(batch))):
            ids = np.concatenate([batch.prompt(i), batch.response(i)]).astype(np.int64)
            max_tokens -= len(ids)
            if max_tokens < 0:
                return found[::-1]
            if len(ids) >= _SMALLEST:
                found.append((ids, len(batch.prompt(i))))
    return found[::-1]


def _copied(buffer: Tensor) -> np.ndarray:
    return buffer.to("cpu", copy=True).numpy()


DraftLearner = ray.remote(DraftLearnerCore)
