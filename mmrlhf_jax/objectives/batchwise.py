"""Losses that are no sum over pairs: what a pair costs depends on the others of its step, which is one micro-batch.

Held-out groups are evaluated as DPO at the same beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import (
    Pairs,
    PreferenceInputs,
    check_at_least_zero,
    check_common,
    check_decay,
    check_label_smoothing,
    loss_and_metrics,
    pairs_of,
    sigmoid_loss,
)
from mmrlhf_jax.objectives.pairwise import shortened
from mmrlhf_jax.objectives.preference import RELEASED_BETA_FLOOR, draw_pairs, mean_and_deviation


@dataclass(frozen=True)
class BetaDPO:
    """beta-DPO: one beta a batch, from how far apart the policy holds its pairs, after outliers are left out.

    Formula: M = z (no gradient) of all pairs; mu and sd are averages over steps of M's mean and deviation,
    mu = momentum mu + (1 - momentum) mean M with this step's, both 0 before the first; int(kept pairs) pairs are drawn
    in proportion to exp(-((M - mu) / sd)^2 / 2) and trained on, the others are not, with
    beta_batch = max(beta (1 + alpha (mean M of the drawn - mu)), 1e-3).
    Source: https://arxiv.org/abs/2407.08639 and its released code, whose M is a difference of log-ratios and whose
    momentum is 0.9. MM-RLHF's copy of the rule (MMDPOReleasedBatch) has no averages, draws for beta only and trains on
    every pair. Where the draw leaves nobody, all pairs are trained.
    """

    beta: float = 0.1
    """Beta of a batch whose drawn pairs are at the threshold."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    alpha: float = 0.6
    """Slope of beta in the mean log-ratio of the drawn pairs."""
    kept: float = 0.8
    """Share of the batch's pairs that is trained on, rounded down."""
    threshold: float | None = None
    """Log-ratio at which beta is `beta`; None: the average mu."""
    momentum: float = 0.9
    """How much of both averages a step keeps; 0: they are the step's own."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_common(self, self.beta, self.gamma)
        check_at_least_zero(self, "alpha", self.alpha)
        if not 0 < self.kept <= 1:
            raise ValueError(f"BetaDPO: kept must lie in (0, 1], got {self.kept}")
        check_decay(self, "momentum", self.momentum)

    def initial_averages(self, vocab: int) -> dict[str, jax.Array]:
        """Before the first step: mu and sd, f32 []; `vocab` is not read."""
        del vocab
        return {"mean": jnp.zeros(()), "deviation": jnp.zeros(())} if self.momentum else {}

    def moved_averages(self, inputs: PreferenceInputs) -> dict[str, jax.Array]:
        """What the step leaves behind."""
        if not self.momentum:
            return {}
        mean, deviation = self._averages(inputs)
        return {"mean": mean, "deviation": deviation}

    def _averages(self, inputs: PreferenceInputs) -> tuple[jax.Array, jax.Array]:
        """mu and sd with this step's pairs in them."""
        seen = jax.lax.stop_gradient(pairs_of(inputs).ratio.difference)
        own = mean_and_deviation(seen, inputs.pair_weight > 0)
        if not self.momentum:
            return own
        if inputs.averages is None:
            raise ValueError("BetaDPO keeps averages over steps: give PreferenceInputs.averages, or momentum 0")
        kept = inputs.averages["mean"], inputs.averages["deviation"]
        mean, deviation = (self.momentum * old + (1 - self.momentum) * new for old, new in zip(kept, own, strict=True))
        return mean, deviation

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 [] of the whole step."""
        pairs, valid = pairs_of(inputs), inputs.pair_weight > 0
        z = pairs.ratio.difference
        seen = jax.lax.stop_gradient(z)
        mean, deviation = self._averages(inputs)
        drawn = draw_pairs(inputs.key, seen, valid, self.kept, (mean, deviation))
        drawn = jnp.where(drawn.any(), drawn, valid)
        threshold = mean if self.threshold is None else self.threshold
        above = jnp.where(drawn, seen, 0).sum() / drawn.sum() - threshold
        beta = jnp.maximum(self.beta * (1 + self.alpha * above), RELEASED_BETA_FLOOR)
        weight = jnp.where(drawn, inputs.pair_weight, 0)
        preference = (weight * sigmoid_loss(z, beta)).sum() / weight.sum()
        pair_beta = jnp.broadcast_to(beta, z.shape)
        extra = {"kept": drawn.sum() / valid.sum(), "margin/average": mean, "margin/deviation": deviation}
        return loss_and_metrics(
            inputs, pairs, preference, beta=self.beta, gamma=self.gamma, pair_beta=pair_beta, extra=extra
        )


@dataclass(frozen=True)
class Transport:
    """What both losses by optimal transport share; each says in `compared` which distributions they compare."""

    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    ld_alpha: float = 1.0
    """Weight of tokens beyond the length of the other response (LD-DPO, arXiv 2409.06411); 1: that of all others."""
    label_smoothing: float = 0.0
    """Probability that a preference is flipped."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_transport(self)

    def compared(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        """The values [B, K, K] that are to dominate, and those they are to dominate."""
        raise NotImplementedError

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 [] of the whole step."""
        pairs = shortened(inputs, self.ld_alpha)
        preference = _transport(self, *self.compared(pairs), inputs.pair_weight > 0)
        return loss_and_metrics(inputs, pairs, preference, beta=self.beta, gamma=self.gamma)


@dataclass(frozen=True)
class AOT(Transport):
    """Alignment by optimal transport: the policy's distribution of log-ratios is to dominate the reference's.

    Formula: -(1 - e) log sigmoid(beta d_n) - e log sigmoid(-beta d_n), e = label_smoothing; d_n = the n-th smallest
    log p_i - log p_j of the policy less the n-th smallest of the reference, over all pairs of the step.
    Source: https://arxiv.org/abs/2406.05882; TRL's "aot". Every pair counts the same.
    """

    def compared(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        return pairs.logp.difference, pairs.reference.difference


@dataclass(frozen=True)
class AOTUnpaired(Transport):
    """Alignment by optimal transport without pairs: chosen log-ratios as a whole are to dominate rejected ones.

    Formula: as AOT's; d_n = the n-th smallest s_i of the chosen sides less the n-th smallest s_j of the rejected ones.
    Source: https://arxiv.org/abs/2406.05882; TRL's "aot_unpaired". Every pair counts the same.
    """

    def compared(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        ratio = pairs.ratio
        return ratio.chosen, ratio.rejected


def in_order(values: jax.Array, valid: jax.Array) -> jax.Array:
    """The valid ones of `values` in ascending order, then the others, flat."""
    key = jnp.where(valid, jax.lax.stop_gradient(values), jnp.inf).ravel()
    return values.ravel()[jnp.argsort(key)]


def _transport(objective: Transport, upper: jax.Array, lower: jax.Array, valid: jax.Array) -> jax.Array:
    """The loss [] of the sorted differences of two samples [B, K, K]."""
    difference = in_order(upper, valid) - in_order(lower, valid)
    cost = sigmoid_loss(difference, objective.beta, objective.label_smoothing)
    return jnp.where(jnp.arange(valid.size) < valid.sum(), cost, 0).sum() / valid.sum()


def _check_transport(objective: Transport) -> None:
    check_common(objective, objective.beta, objective.gamma)
    check_label_smoothing(objective, objective.label_smoothing)
    if not 0 <= objective.ld_alpha <= 1:
        raise ValueError(f"{type(objective).__name__}: ld_alpha must lie in [0, 1], got {objective.ld_alpha}")
