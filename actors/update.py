"""One batch of rollouts into weight updates: micro-batches, old log-probabilities, gradients, optimizer steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from thornback.actors.microbatches import cut_microbatches
from thornback.actors.optimizer import Optimizer
from thornback.actors.policy import Policy
from thornback.actors.specs import UpdateReport, UpdateSpec
from thornback.algorithms.losses import BatchTotals, TokenBatch, policy_loss
from thornback.contracts import CACHED_VERSION, RolloutBatch


@dataclass(slots=True)
class _MicroBatch:
    """What one forward pass needs. Tensors are per response token, `[sum T]`, on the policy's device.

    `old_logprobs` is None until they are known: the policy's own, before this batch moves it.
    """

    sequences: list[np.ndarray]
    starts: list[int]
    sequence_index: Tensor
    advantages: Tensor
    sampling_logprobs: Tensor
    mask: Tensor
    cached: Tensor | None
    old_logprobs: Tensor | None = None


class _Tally:
    """Sums and maxima over micro-batches and ranks; one exchange at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.maxima: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value.detach().cpu().double()
        for name, value in maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def collect(self, num_ranks: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
        sums = torch.stack(list(self.sums.values())).to(device)
        maxima = torch.stack(list(self.maxima.values())).double().to(device)
        if num_ranks > 1:
            distributed.all_reduce(sums)
            distributed.all_reduce(maxima, op=distributed.ReduceOp.MAX)
        return dict(zip(self.sums, sums.tolist(), strict=True)), dict(zip(self.maxima, maxima.tolist(), strict=True))


class Updater:
    """Trains on batches, on one rank. All ranks call `run` with the same arguments; each takes its own share."""

    def __init__(self, policy: Policy, optimizer: Optimizer, spec: UpdateSpec, rank: int, num_ranks: int) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.spec = spec
        self.rank = rank
        self.num_ranks = num_ranks

    def run(self, batch: RolloutBatch, advantages: np.ndarray, step: int) -> UpdateReport:
        """All epochs and updates of one batch; `advantages` float `[R]`; `step` sets the learning rate.

        Rollouts with advantage 0 have no gradient, unless there is a KL: they count in the loss's denominators, but
        are not computed. Each update sees its part of the batch once an epoch.
        """
        parts = self._parts(batch, advantages, step)
        for _, microbatches in parts[1:]:  # the first part is met before the policy moves
            for micro in microbatches:
                with torch.no_grad():
                    self._set_old(micro, self.policy.logprobs(micro.sequences, micro.starts)[0])
        if self.spec.epochs_per_batch * len(parts) == 0:
            return UpdateReport({}, 0, 0, 0)
        tally, norms = _Tally(), []
        for _ in range(self.spec.epochs_per_batch):
            for totals, microbatches in parts:
                norms.append(self._update(totals, microbatches, step, tally))
        sums, maxima = tally.collect(self.num_ranks, self.policy.device)
        finite = [n for n in norms if np.isfinite(n)]
        metrics = _metrics(sums, maxima, len(norms)) | {"grad_norm": float(np.mean(finite)) if finite else float("nan")}
        num_trained = len(batch) if self.spec.needs_reference else int((advantages != 0).sum())
        return UpdateReport(metrics, len(norms), len(norms) - len(finite), num_trained)

    def _update(self, totals: BatchTotals, microbatches: list[_MicroBatch], step: int, tally: _Tally) -> float:
        """Gradients of all micro-batches, then one optimizer step; the gradient's norm."""
        for number, micro in enumerate(microbatches):
            with self.policy.no_sync(last=number == len(microbatches) - 1):
                logprobs, entropies = self.policy.logprobs(micro.sequences, micro.starts)
                if micro.old_logprobs is None:
                    self._set_old(micro, logprobs.detach())
                assert micro.old_logprobs is not None
                tokens = TokenBatch(
                    logprobs=logprobs,
                    old_logprobs=micro.old_logprobs,
                    sampling_logprobs=micro.sampling_logprobs,
                    advantages=micro.advantages,
                    mask=micro.mask,
                    sequence_index=micro.sequence_index,
                    reference_logprobs=self._reference(micro),
                )
                output = policy_loss(tokens, totals, **self.spec.loss_options)  # type: ignore[arg-type]
                (output.loss * self.num_ranks).backward()  # DDP and FSDP2 average over ranks
            assert entropies is not None
            tally.add({**output.sums, "loss": output.loss, "entropy": (entropies * micro.mask).sum()}, output.maxima)
        return self.optimizer.step(step)

    def _reference(self, micro: _MicroBatch) -> Tensor | None:
        return self.policy.reference_logprobs(micro.sequences, micro.starts) if self.spec.needs_reference else None

    def _set_old(self, micro: _MicroBatch, logprobs: Tensor) -> None:
        """The ratio's denominators: the policy's own; of a cached trajectory, those of the model that wrote it."""
        micro.old_logprobs = (
            logprobs if micro.cached is None else torch.where(micro.cached, micro.sampling_logprobs, logprobs)
        )

    def _parts(
        self, batch: RolloutBatch, advantages: np.ndarray, step: int
    ) -> list[tuple[BatchTotals, list[_MicroBatch]]]:
        """This rank's micro-batches of each update, with the update's totals over all ranks."""
        order = np.arange(len(batch))
        if self.spec.updates_per_epoch > 1:
            order = np.random.default_rng(step).permutation(order)
        parts = []
        for rollouts in map(np.sort, np.array_split(order, self.spec.updates_per_epoch)):
            trained = rollouts if self.spec.needs_reference else rollouts[advantages[rollouts] != 0]
            if len(trained) == 0:
                continue
            totals = BatchTotals(_mask_sum(batch, rollouts), len(rollouts), self.spec.max_tokens)
            cut = cut_microbatches(
                np.diff(batch.prompt_offsets)[trained],
                batch.response_lengths[trained],
                np.cumsum(batch.sample_index == 0)[trained],
                self.num_ranks,
                self.spec.tokens_per_microbatch,
            )
            parts.append((totals, [self._microbatch(batch, advantages, trained, share) for share in cut[self.rank]]))
        return parts

    def _microbatch(
        self, batch: RolloutBatch, advantages: np.ndarray, trained: np.ndarray, share: np.ndarray
    ) -> _MicroBatch:
        """An empty share still takes part in the ranks' exchanges: it computes one rollout, with mask 0."""
        rollouts = trained[share] if len(share) else trained[:1]
        lengths = batch.response_lengths[rollouts]
        starts = batch.response_offsets[rollouts]
        rows = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        mask = batch.loss_mask[rows].astype(np.float32) if len(share) else np.zeros(len(rows), np.float32)
        cached = batch.versions[rows] == CACHED_VERSION
        device = self.policy.device
        return _MicroBatch(
            sequences=[np.concatenate([batch.prompt(i), batch.response(i)]) for i in rollouts],
            starts=np.diff(batch.prompt_offsets)[rollouts].tolist(),
            sequence_index=torch.from_numpy(np.repeat(np.arange(len(rollouts)), lengths)).to(device),
            advantages=torch.from_numpy(np.repeat(advantages[rollouts].astype(np.float32), lengths)).to(device),
            sampling_logprobs=torch.from_numpy(batch.logprobs[rows]).to(device),
            mask=torch.from_numpy(mask).to(device),
            cached=torch.from_numpy(cached).to(device) if cached.any() else None,
        )


def _mask_sum(batch: RolloutBatch, rollouts: np.ndarray) -> int:
    """Tokens of these rollouts that the model wrote."""
    written = np.concatenate([[0], np.cumsum(batch.loss_mask, dtype=np.int64)])
    return int((written[batch.response_offsets[rollouts + 1]] - written[batch.response_offsets[rollouts]]).sum())


def _metrics(sums: Mapping[str, float], maxima: Mapping[str, float], num_updates: int) -> dict[str, float]:
    tokens = max(sums["tokens"], 1.0)
    metrics = {
        "loss": sums["loss"] / num_updates,
        "clip_fraction": (sums["clipped_low"] + sums["clipped_high"]) / tokens,
        "entropy": sums["entropy"] / tokens,
        "mismatch/mean_abs": sums["mismatch"] / tokens,
        "mismatch/max_abs": maxima["mismatch"],
        "mismatch/weight_mean": sums["importance_weight"] / tokens,
    }
    return metrics | ({"kl": sums["kl"] / tokens} if "kl" in sums else {})
