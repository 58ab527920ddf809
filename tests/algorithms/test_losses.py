"""Losses against slow definitions, and the same whatever the micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thornback.algorithms.losses import LOSSES, BatchTotals, TokenBatch, kl_penalty, policy_loss

LENGTHS = (3, 1, 6, 4)
OPTIONS = {"clip_low": 0.1, "clip_high": 0.15, "kl_weight": 0.05, "importance_cap": 1.2}


def made(seed: int = 0, spread: float = 0.3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(total, generator=g, dtype=torch.float64) * scale

    old = -noise(1.0).abs()
    index = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = torch.ones(total, dtype=torch.float64)
    mask[[1, 7]] = 0
    return {
        "logprobs": old + noise(spread),
        "old_logprobs": old,
        "sampling_logprobs": old + noise(0.2),
        "advantages": torch.tensor([0.8, -0.3, 1.1, -0.9], dtype=torch.float64)[index],
        "mask": mask,
        "sequence_index": index,
        "reference_logprobs": old + noise(0.3),
    }


def piece(tensors: dict[str, torch.Tensor], sequences: list[int]) -> dict[str, torch.Tensor]:
    rows = torch.cat([torch.nonzero(tensors["sequence_index"] == s)[:, 0] for s in sequences])
    part = {name: value[rows] for name, value in tensors.items()}
    lengths = torch.tensor([LENGTHS[s] for s in sequences])
    return {**part, "sequence_index": torch.repeat_interleave(torch.arange(len(sequences)), lengths)}


def totals_of(tensors: dict[str, torch.Tensor]) -> BatchTotals:
    return BatchTotals(tokens=int(tensors["mask"].sum()), sequences=len(LENGTHS), max_tokens=10)


def slow(tensors: dict[str, torch.Tensor], loss: str, aggregation: str) -> float:
    """The definition, token by token."""
    t = {name: value.numpy() for name, value in tensors.items()}
    low, high = 1 - OPTIONS["clip_low"], 1 + OPTIONS["clip_high"]
    means = []
    for s in range(len(LENGTHS)):
        rows = np.flatnonzero((t["sequence_index"] == s) & (t["mask"] > 0))
        ratios = np.exp(t["logprobs"][rows] - t["old_logprobs"][rows])
        if loss == "gspo":
            ratios = np.full(len(rows), np.exp(np.mean(t["logprobs"][rows] - t["old_logprobs"][rows])))
        losses = []
        for i, ratio in zip(rows, ratios, strict=True):
            a = t["advantages"][i]
            if loss == "cispo":
                value = -np.clip(ratio, low, high) * a * t["logprobs"][i]
            else:
                value = -min(ratio * a, np.clip(ratio, low, high) * a)
            value *= min(np.exp(t["old_logprobs"][i] - t["sampling_logprobs"][i]), OPTIONS["importance_cap"])
            x = t["logprobs"][i] - t["reference_logprobs"][i]
            losses.append(value + OPTIONS["kl_weight"] * (np.exp(-x) - 1 + x))
        means.append(losses)
    if aggregation == "token":
        return sum(map(sum, means)) / sum(map(len, means))
    if aggregation == "sequence":
        return float(np.mean([np.mean(m) if m else 0.0 for m in means]))
    return sum(map(sum, means)) / (len(LENGTHS) * 10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_the_definition(loss, aggregation) -> None:
    tensors = made()
    out = policy_loss(TokenBatch(**tensors), totals_of(tensors), loss=loss, aggregation=aggregation, **OPTIONS)
    assert float(out.loss) == pytest.approx(slow(tensors, loss, aggregation))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[3, 0], [2, 1]], [[1, 2, 3], [0]]])
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(loss, aggregation, cut) -> None:
    tensors = made(seed=1)
    totals = totals_of(tensors)

    def run(parts: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, float], float]:
        outputs = [policy_loss(TokenBatch(**p), totals, loss=loss, aggregation=aggregation, **OPTIONS) for p in parts]
        sums = {name: sum(float(o.sums[name]) for o in outputs) for name in outputs[0].sums}
        return sum(float(o.loss) for o in outputs), sums, max(float(o.maxima["mismatch"]) for o in outputs)

    whole, cut_up = run([tensors]), run([piece(tensors, s) for s in cut])
    assert whole[0] == pytest.approx(cut_up[0])
    assert whole[1] == pytest.approx(cut_up[1])
    assert whole[2] == pytest.approx(cut_up[2])

    leaf = tensors["logprobs"].clone().requires_grad_()
    live = {**tensors, "logprobs": leaf}
    policy_loss(TokenBatch(**live), totals, loss=loss, aggregation=aggregation, **OPTIONS).loss.backward()
    expected, leaf.grad = leaf.grad.clone(), None
    for s in cut:
        policy_loss(TokenBatch(**piece(live, s)), totals, loss=loss, aggregation=aggregation, **OPTIONS).loss.backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_tokens_of_an_environment_are_not_trained() -> None:
    tensors = made()
    leaf = tensors["logprobs"].clone().requires_grad_()
    policy_loss(TokenBatch(**{**tensors, "logprobs": leaf}), totals_of(tensors), kl_weight=0.1).loss.backward()
    assert (leaf.grad[tensors["mask"] == 0] == 0).all()
    assert (leaf.grad[tensors["mask"] == 1] != 0).all()


def gradient(loss: str, ratio: float, advantage: float) -> float:
    leaf = torch.tensor([np.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    batch = TokenBatch(leaf, zero, zero, advantage * one, one, torch.zeros(1, dtype=torch.int64))
    policy_loss(batch, BatchTotals(1, 1, 1), loss=loss, clip_low=0.2, clip_high=0.28).loss.backward()
    return float(leaf.grad)


@pytest.mark.parametrize("loss", ["clip", "gspo"])
def test_where_the_bounds_take_the_gradient_away(loss) -> None:
    assert gradient(loss, 1.3, 1.0) == 0  # far enough up
    assert gradient(loss, 1.27, 1.0) == pytest.approx(-1.27)  # above 1.2: the upper bound is its own
    assert gradient(loss, 0.7, -1.0) == 0  # far enough down
    assert gradient(loss, 1.3, -1.0) == pytest.approx(1.3)  # the wrong way: pulled back
    assert gradient(loss, 0.7, 1.0) == pytest.approx(-0.7)


def test_cispo_keeps_every_gradient() -> None:
    assert gradient("cispo", 3.0, 1.0) == pytest.approx(-1.28)
    assert gradient("cispo", 0.1, -1.0) == pytest.approx(0.8)


def test_clipping_and_mismatch_are_counted() -> None:
    tensors = made()
    out = policy_loss(TokenBatch(**tensors), totals_of(tensors), clip_low=0.1, clip_high=0.1)
    ratio = (tensors["logprobs"] - tensors["old_logprobs"]).exp()
    kept = tensors["mask"] == 1
    assert float(out.sums["tokens"]) == kept.sum()
    assert float(out.sums["clipped_low"]) == ((ratio < 0.9) & (tensors["advantages"] < 0) & kept).sum() > 0
    assert float(out.sums["clipped_high"]) == ((ratio > 1.1) & (tensors["advantages"] > 0) & kept).sum() > 0
    difference = (tensors["old_logprobs"] - tensors["sampling_logprobs"]).abs()[kept]
    assert float(out.sums["mismatch"]) == pytest.approx(float(difference.sum()))
    assert float(out.maxima["mismatch"]) == pytest.approx(float(difference.max()))


def test_kl_estimators_against_the_exact_divergence() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(8, dtype=torch.float64).log_softmax(0)
    p = logits.log_softmax(0)
    exact = (p.exp() * (p - reference)).sum()
    for kind in ("k1", "k3"):  # unbiased as values
        assert (p.exp() * kl_penalty(p, reference, kind)).sum().item() == pytest.approx(exact.item())
    assert (kl_penalty(p, reference, "k3") >= 0).all()

    def expected_gradient(kind: str) -> torch.Tensor:
        """Of the loss that sampling sees: the samples' probabilities are constants."""
        p = logits.log_softmax(0)
        return torch.autograd.grad((p.detach().exp() * kl_penalty(p, reference, kind)).sum(), logits)[0]

    q = logits.log_softmax(0)
    forward = torch.autograd.grad((q.exp() * (q - reference)).sum(), logits)[0]
    q = logits.log_softmax(0)
    backward = torch.autograd.grad((reference.exp() * (reference - q)).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient("k2"), forward)
    torch.testing.assert_close(expected_gradient("k3"), backward)


def test_errors_name_what_is_wrong() -> None:
    tensors = made()
    with pytest.raises(ValueError, match="advantages has shape"):
        TokenBatch(**{**tensors, "advantages": torch.zeros(2)})
    with pytest.raises(ValueError, match="no KL estimator k4"):
        policy_loss(TokenBatch(**tensors), totals_of(tensors), kl_weight=1.0, kl_kind="k4")
    with pytest.raises(ValueError, match="no aggregation mean"):
        policy_loss(TokenBatch(**tensors), totals_of(tensors), aggregation="mean")  # type: ignore[arg-type]
