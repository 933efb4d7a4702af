"""Preference objectives over whole groups: DPO, and MM-DPO as published and in the two ways it was released.

Every one is -log sigmoid(beta * z) over the pairs of each group, z_ij = (logp_i - ref_i) - (logp_j - ref_j), plus
gamma * NLL(chosen); they differ in where beta comes from.

  DPO                  https://arxiv.org/abs/2305.18290, equation 7; label smoothing is "conservative DPO"
                       (https://github.com/eric-mitchell/direct-preference-optimization), as in TRL's smoothed losses
  MM-DPO               https://arxiv.org/abs/2502.10391, section 4.2
  batch-level beta     https://arxiv.org/abs/2407.08639, as MM-RLHF's released trainer runs it

All functions are pure; letters are B groups, K responses. Pairs whose weight is 0 and responses in no pair may hold
any values: they reach neither loss nor gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmrlhf_jax.objectives.totals import StepTotals, wins

RELEASED_BETA_FLOOR = 1e-3


@flax.struct.dataclass
class PreferenceInputs:
    """One micro-batch of groups, as a preference objective sees it."""

    logp: jax.Array  # f32 [B, K], policy log-prob of each response: sum of loss_weight * token logp
    reference_logp: jax.Array  # f32 [B, K], the same under the reference
    length: jax.Array  # f32 [B, K], scored tokens of each response
    pair_weight: jax.Array  # f32 [B, K, K], [i, j] > 0 iff i is preferred to j, else 0
    pair_margin: jax.Array  # f32 [B, K, K], reward margin of the pair; 0 where pair_weight is 0
    totals: StepTotals
    key: jax.Array  # the step's PRNG key


class PreferenceObjective(Protocol):
    """A frozen, hashable set of hyper-parameters that turns arrays into a loss: a static argument of `jax.jit`.

    The loss and every metric are weighted sums already divided by the step's totals: summed over the micro-batches of
    a step they are the step's values.
    """

    needs_margin: ClassVar[bool]
    """`pair_margin` must hold real margins."""
    needs_reference: ClassVar[bool]
    """`reference_logp` must hold real log-probs."""
    needs_step_statistics: ClassVar[bool]
    """The loss is no sum over pairs: a micro-batch must be the whole step."""

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@dataclass(frozen=True)
class DPO:
    """Sigmoid DPO over all pairs of a group, plus gamma * NLL(chosen)."""

    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    label_smoothing: float = 0.0
    """Probability that a preference is flipped (conservative DPO); 0 trusts every preference."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_common(self, self.beta, self.gamma)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"DPO: label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        pair_beta = jnp.full_like(inputs.pair_weight, self.beta)
        return _loss_and_metrics(
            inputs, pair_beta, beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class MMDPO:
    """MM-DPO as published: a pair's beta grows with its reward margin, beta (1 + w (1 - exp(-k margin)))."""

    beta: float = 0.1
    """Beta of a pair without margin; a pair's beta lies in [beta, (1 + w) beta]."""
    w: float = 0.5
    """How far a large margin raises beta."""
    k: float = 0.5
    """How fast a margin raises beta, in one over reward units."""
    gamma: float = 0.25
    """Weight of the token-mean negative log-likelihood of the chosen responses."""

    needs_margin: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_common(self, self.beta, self.gamma)
        _check_at_least_zero(self, "w", self.w)
        if not (0 < self.k < math.inf):
            raise ValueError(f"MMDPO: k must be positive and finite, got {self.k}")

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        margin = paired(inputs.pair_margin, inputs.pair_weight)
        pair_beta = margin_beta(margin, self.beta, self.w, self.k)
        return _loss_and_metrics(inputs, pair_beta, beta=self.beta, gamma=self.gamma, margin=margin)


@dataclass(frozen=True)
class MMDPOReleasedFactor:
    """MM-DPO as the released trainer's per-pair path: beta linear in a stored factor, max(beta (1 + w factor), 1e-3).

    The factor (`ls_factor` in the released code) is read from `pair_margin` as it stands. With the factor
    1 - exp(-k max(margin, 0)) this is the published objective.
    """

    beta: float = 0.1
    """Beta of a pair whose factor is 0."""
    w: float = 0.1
    """Slope of beta in the factor."""
    gamma: float = 0.25
    """Weight of the token-mean negative log-likelihood of the chosen responses."""

    needs_margin: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_common(self, self.beta, self.gamma)
        _check_at_least_zero(self, "w", self.w)

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        factor = paired(inputs.pair_margin, inputs.pair_weight)
        pair_beta = factor_beta(factor, self.beta, self.w)
        return _loss_and_metrics(inputs, pair_beta, beta=self.beta, gamma=self.gamma, margin=factor)


@dataclass(frozen=True)
class MMDPOReleasedBatch:
    """MM-DPO as the released trainer really runs: one random beta a batch, from the policy's own log-ratios.

    With z of all pairs (detached), mean mu and unbiased deviation sd: int(selected * pairs) pairs are drawn without
    replacement, in proportion to exp(-((z - mu) / (sd + 1e-7))^2 / 2), and
    beta_batch = max(beta (1 + w (mean z of the drawn - mu)), 1e-3). The draw chooses beta only; every pair is trained.
    Where it draws nobody (one pair at the default share) the released code crashes; here beta stays as given.
    The draw depends on the key and on the shape [B, K, K], so the same pairs padded differently draw differently.
    """

    beta: float = 0.1
    """Beta of a batch whose drawn pairs are average."""
    w: float = 0.1
    """Slope of beta in the mean log-ratio of the drawn pairs."""
    gamma: float = 0.25
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    selected: float = 0.8
    """Share of the batch's pairs that is drawn, rounded down."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_common(self, self.beta, self.gamma)
        _check_at_least_zero(self, "w", self.w)
        if not 0 < self.selected <= 1:
            raise ValueError(f"MMDPOReleasedBatch: selected must lie in (0, 1], got {self.selected}")

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 [] of the whole step."""
        z = jax.lax.stop_gradient(pair_log_ratio(log_ratio(inputs)))
        valid = inputs.pair_weight > 0
        drawn = draw_pairs(inputs.key, z, valid, self.selected)
        pair_beta = jnp.broadcast_to(drawn_beta(z, valid, drawn, self.beta, self.w), z.shape)
        return _loss_and_metrics(inputs, pair_beta, beta=self.beta, gamma=self.gamma)


def paired(values: jax.Array, pair_weight: jax.Array) -> jax.Array:
    """`values` [B, K, K] where there is a pair, 0 elsewhere."""
    return jnp.where(pair_weight > 0, values, 0)


def in_some_pair(pair_weight: jax.Array) -> jax.Array:
    """Which responses stand in at least one pair: [B, K, K] -> bool [B, K]."""
    valid = pair_weight > 0
    return valid.any(axis=-1) | valid.any(axis=-2)


def log_ratio(inputs: PreferenceInputs) -> jax.Array:
    """log policy / reference of each response [B, K]; 0 for responses in no pair."""
    # Selected before any arithmetic: differences of padding could overflow, and 0 * inf is NaN in loss and gradient.
    present = in_some_pair(inputs.pair_weight)
    return jnp.where(present, inputs.logp, 0) - jnp.where(present, inputs.reference_logp, 0)


def pair_log_ratio(ratio: jax.Array) -> jax.Array:
    """z_ij = ratio_i - ratio_j: [B, K] -> [B, K, K]."""
    return ratio[:, :, None] - ratio[:, None, :]


def margin_beta(margin: jax.Array, beta: float, w: float, k: float) -> jax.Array:
    """beta (1 + w (1 - exp(-k d))) with d = max(margin, 0), hence in [beta, (1 + w) beta]; shape of `margin`."""
    return beta * (1 - w * jnp.expm1(-k * jnp.maximum(margin, 0)))


def factor_beta(factor: jax.Array, beta: float, w: float) -> jax.Array:
    """max(beta (1 + w factor), 1e-3), without an upper bound; shape of `factor`."""
    return jnp.maximum(beta * (1 + w * factor), RELEASED_BETA_FLOOR)


def draw_pairs(key: jax.Array, z: jax.Array, valid: jax.Array, selected: float) -> jax.Array:
    """Draws int(selected * pairs) of the valid pairs without replacement, Gaussian-weighted around their mean.

    Args:
      key: PRNG key.
      z: f32 [B, K, K], log-ratio of each pair.
      valid: bool [B, K, K], where there is a pair.
      selected: share drawn.

    Returns:
      bool [B, K, K], the drawn pairs.
    """
    count = valid.sum()
    mean = jnp.where(valid, z, 0).sum() / jnp.maximum(count, 1)
    centred = jnp.where(valid, z - mean, 0)
    deviation = jnp.sqrt((centred**2).sum() / jnp.maximum(count - 1, 1))
    log_weight = -0.5 * (centred / (deviation + 1e-7)) ** 2
    # The largest n of log-weight + Gumbel noise are n draws without replacement (https://arxiv.org/abs/1903.06059).
    perturbed = jnp.where(valid, log_weight + jax.random.gumbel(key, z.shape, z.dtype), -jnp.inf).ravel()
    place = jnp.argsort(jnp.argsort(-perturbed)).reshape(z.shape)
    # A table, since int(0.8 * n) in float32 need not be what Python's double arithmetic says.
    draws = np.array([int(selected * n) for n in range(z.size + 1)])
    return valid & (place < jnp.asarray(draws)[count])


def drawn_beta(z: jax.Array, valid: jax.Array, drawn: jax.Array, beta: float, w: float) -> jax.Array:
    """The batch's beta [], max(beta (1 + w (mean z of drawn - mean z of valid)), 1e-3); `beta` if none is drawn.

    Args:
      z: f32 [B, K, K], log-ratio of each pair.
      valid: bool [B, K, K], where there is a pair.
      drawn: bool [B, K, K], a subset of `valid`.
      beta: beta at an average draw.
      w: slope.
    """
    mean = jnp.where(valid, z, 0).sum() / jnp.maximum(valid.sum(), 1)
    above = jnp.where(drawn, z - mean, 0).sum() / jnp.maximum(drawn.sum(), 1)
    return jnp.where(drawn.any(), jnp.maximum(beta * (1 + w * above), RELEASED_BETA_FLOOR), beta)


def sigmoid_loss(z: jax.Array, beta: jax.Array, label_smoothing: float) -> jax.Array:
    """-(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z) of each pair; shape of `z`."""
    agree = -jax.nn.log_sigmoid(beta * z)
    if label_smoothing == 0:
        return agree
    return (1 - label_smoothing) * agree - label_smoothing * jax.nn.log_sigmoid(-beta * z)


def chosen_nll(logp: jax.Array, pair_weight: jax.Array, totals: StepTotals) -> jax.Array:
    """Token-mean negative log-likelihood [] of the chosen responses, each counted as often as it wins.

    Equal to the mean over the chosen rows of the expanded pairs laid end to end.
    """
    return -(wins(pair_weight) * logp).sum() / totals.chosen_tokens


def _loss_and_metrics(
    inputs: PreferenceInputs,
    pair_beta: jax.Array,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    margin: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What all objectives share, given the beta [B, K, K] of every pair; rewards are shown at the base `beta`."""

    def mean(per_pair: jax.Array) -> jax.Array:
        return (inputs.pair_weight * per_pair).sum() / inputs.totals.pair_weight

    ratio = log_ratio(inputs)
    z = pair_log_ratio(ratio)
    present = in_some_pair(inputs.pair_weight)
    logp, length = jnp.where(present, inputs.logp, 0), jnp.where(present, inputs.length, 0)
    preference = mean(sigmoid_loss(z, pair_beta, label_smoothing))
    nll = chosen_nll(logp, inputs.pair_weight, inputs.totals)
    reward = beta * ratio  # not at pair_beta, so that runs whose betas differ can be compared
    metrics = {
        "rewards/chosen": mean(reward[:, :, None]),
        "rewards/rejected": mean(reward[:, None, :]),
        "rewards/margins": mean(beta * z),
        "rewards/accuracies": mean((z > 0).astype(z.dtype)),
        "logps/chosen": mean(logp[:, :, None]),
        "logps/rejected": mean(logp[:, None, :]),
        "length/chosen": mean(length[:, :, None]),
        "length/rejected": mean(length[:, None, :]),
        "loss/preference": preference,
        "loss/nll": nll,
        "beta/mean": mean(pair_beta),
    }
    if margin is not None:
        metrics["margin/mean"] = mean(margin)
    return preference + gamma * nll, metrics


def _check_common(objective: object, beta: float, gamma: float) -> None:
    if not (0 < beta < math.inf):
        raise ValueError(f"{type(objective).__name__}: beta must be positive and finite, got {beta}")
    _check_at_least_zero(objective, "gamma", gamma)


def _check_at_least_zero(objective: object, name: str, value: float) -> None:
    if not (0 <= value < math.inf):
        raise ValueError(f"{type(objective).__name__}: {name} must be at least 0 and finite, got {value}")
