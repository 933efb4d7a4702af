"""DPO's batch and margin relatives that MM-RLHF brought: MM-DPO as published and in the two ways it was released.

Every one is -log sigmoid(beta * z) over the pairs of each group, z_ij = (logp_i - ref_i) - (logp_j - ref_j), plus
gamma * NLL(chosen); they differ in where beta comes from.

  DPO                  pairwise.py
  MM-DPO               https://arxiv.org/abs/2502.10391, section 4.2
  batch-level beta     https://arxiv.org/abs/2407.08639, as MM-RLHF's released trainer runs it

All functions are pure; letters are B groups, K responses. Pairs whose weight is 0 and responses in no pair may hold
any values: they reach neither loss nor gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mmrlhf_jax.objectives.pairs import (
    PreferenceInputs,
    check_at_least_zero,
    check_common,
    log_ratio,
    loss_and_metrics,
    pair_log_ratio,
    pair_mean,
    paired,
    pairs_of,
    sigmoid_loss,
)

RELEASED_BETA_FLOOR = 1e-3


@dataclass(frozen=True)
class MMDPO:
    """MM-DPO as published: a pair's beta grows with its reward margin.

    Formula: -log sigmoid(beta_ij z), beta_ij = beta (1 + w (1 - exp(-k max(margin, 0)))).
    Source: https://arxiv.org/abs/2502.10391, section 4.2.
    """

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
        check_common(self, self.beta, self.gamma)
        check_at_least_zero(self, "w", self.w)
        if not (0 < self.k < math.inf):
            raise ValueError(f"MMDPO: k must be positive and finite, got {self.k}")

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        margin = paired(inputs.pair_margin, inputs.pair_weight)
        pair_beta = margin_beta(margin, self.beta, self.w, self.k)
        return _at_beta(inputs, pair_beta, beta=self.beta, gamma=self.gamma, margin=margin)


@dataclass(frozen=True)
class MMDPOReleasedFactor:
    """MM-DPO as the released trainer's per-pair path: beta linear in a stored factor.

    Formula: -log sigmoid(beta_ij z), beta_ij = max(beta (1 + w factor), 1e-3).
    Source: the released code of https://arxiv.org/abs/2502.10391, with implicit_beta off.

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
        check_common(self, self.beta, self.gamma)
        check_at_least_zero(self, "w", self.w)

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        factor = paired(inputs.pair_margin, inputs.pair_weight)
        pair_beta = factor_beta(factor, self.beta, self.w)
        return _at_beta(inputs, pair_beta, beta=self.beta, gamma=self.gamma, margin=factor)


@dataclass(frozen=True)
class MMDPOReleasedBatch:
    """MM-DPO as the released trainer really runs: one random beta a batch, from the policy's own log-ratios.

    Formula: -log sigmoid(beta_batch z), beta_batch from a random draw of pairs as below.
    Source: the released code of https://arxiv.org/abs/2502.10391, after https://arxiv.org/abs/2407.08639.

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
        check_common(self, self.beta, self.gamma)
        check_at_least_zero(self, "w", self.w)
        if not 0 < self.selected <= 1:
            raise ValueError(f"MMDPOReleasedBatch: selected must lie in (0, 1], got {self.selected}")

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 [] of the whole step."""
        z = jax.lax.stop_gradient(pair_log_ratio(log_ratio(inputs)))
        valid = inputs.pair_weight > 0
        drawn = draw_pairs(inputs.key, z, valid, self.selected)
        pair_beta = jnp.broadcast_to(drawn_beta(z, valid, drawn, self.beta, self.w), z.shape)
        return _at_beta(inputs, pair_beta, beta=self.beta, gamma=self.gamma)


def margin_beta(margin: jax.Array, beta: float, w: float, k: float) -> jax.Array:
    """beta (1 + w (1 - exp(-k d))) with d = max(margin, 0), hence in [beta, (1 + w) beta]; shape of `margin`."""
    return beta * (1 - w * jnp.expm1(-k * jnp.maximum(margin, 0)))


def factor_beta(factor: jax.Array, beta: float, w: float) -> jax.Array:
    """max(beta (1 + w factor), 1e-3), without an upper bound; shape of `factor`."""
    return jnp.maximum(beta * (1 + w * factor), RELEASED_BETA_FLOOR)


def mean_and_deviation(z: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the valid ones of z f32 [B, K, K]: their mean [] and unbiased standard deviation []."""
    count = valid.sum()
    mean = jnp.where(valid, z, 0).sum() / jnp.maximum(count, 1)
    centred = jnp.where(valid, z - mean, 0)
    return mean, jnp.sqrt((centred**2).sum() / jnp.maximum(count - 1, 1))


def draw_pairs(
    key: jax.Array,
    z: jax.Array,
    valid: jax.Array,
    selected: float,
    around: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Draws int(selected * pairs) of the valid pairs without replacement, Gaussian-weighted around their mean.

    Args:
      key: PRNG key.
      z: f32 [B, K, K], log-ratio of each pair.
      valid: bool [B, K, K], where there is a pair.
      selected: share drawn.
      around: mean [] and deviation [] of the Gaussian; None: those of the valid pairs.

    Returns:
      bool [B, K, K], the drawn pairs.
    """
    count = valid.sum()
    mean, deviation = around or mean_and_deviation(z, valid)
    log_weight = -0.5 * (jnp.where(valid, z - mean, 0) / (deviation + 1e-7)) ** 2
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


def _at_beta(
    inputs: PreferenceInputs, pair_beta: jax.Array, *, beta: float, gamma: float, margin: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics given the beta [B, K, K] of every pair."""
    pairs = pairs_of(inputs)
    preference = pair_mean(sigmoid_loss(pairs.ratio.difference, pair_beta), inputs)
    extra = None if margin is None else {"margin/mean": pair_mean(margin, inputs)}
    return loss_and_metrics(inputs, pairs, preference, beta=beta, gamma=gamma, pair_beta=pair_beta, extra=extra)
