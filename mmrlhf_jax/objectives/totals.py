"""What every loss is divided by: the totals of the whole optimizer step."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@flax.struct.dataclass
class StepTotals:
    """Totals of the WHOLE optimizer step, the same on every device and in every micro-batch of the step.

    Losses and metrics are sums over a micro-batch divided by these, so those of the micro-batches ADD UP to the
    step's and no split of the step can change it. A total that supervised and preference objectives divide by must be
    positive: a step in which nothing is scored has no loss, and comes out as NaN rather than as a quiet zero. Reward
    objectives are sums of several terms, and one of which a step has nothing is 0.
    """

    pair_weight: jax.Array  # f32 [], sum of pair_weight
    chosen_tokens: jax.Array  # f32 [], sum over responses of wins * scored tokens
    tokens: jax.Array  # f32 [], sum of loss_weight
    groups: jax.Array  # f32 [], groups with a scored token
    ties: jax.Array | float = 0.0  # f32 [], sum of tie_weight
    ratings: jax.Array | float = 0.0  # f32 [], ratings of responses in attributes


def wins(pair_weight: jax.Array) -> jax.Array:
    """Weight with which each response is the chosen one: [B, K, K] -> [B, K]."""
    return pair_weight.sum(axis=-1)


def step_totals(
    pair_weight: ArrayLike,
    length: ArrayLike,
    loss_weight: ArrayLike,
    tie_weight: ArrayLike | None = None,
    rating_mask: ArrayLike | None = None,
) -> StepTotals:
    """Totals of one micro-batch; `jax.tree.map(operator.add, ...)` over a step's micro-batches gives the step's.

    Args:
      pair_weight: f32 [B, K, K], [i, j] > 0 iff response i is preferred to j.
      length: f32 [B, K], scored tokens of each response; any finite value where a response is padding.
      loss_weight: f32 [B, S], weight of each response token; 0 = not scored.
      tie_weight: f32 [B, K, K], [i, j] > 0 iff responses i and j are tied and i < j; None where ties are not read.
      rating_mask: bool [B, K, A], which responses are rated in which attributes; None where ratings are not read.
    """
    pair_weight, length, loss_weight = jnp.asarray(pair_weight), jnp.asarray(length), jnp.asarray(loss_weight)
    response_wins = wins(pair_weight)
    return StepTotals(
        pair_weight=pair_weight.sum(),
        chosen_tokens=(response_wins * jnp.where(response_wins > 0, length, 0)).sum(),
        tokens=loss_weight.sum(),
        groups=(loss_weight != 0).any(axis=-1).sum().astype(loss_weight.dtype),
        ties=0.0 if tie_weight is None else jnp.asarray(tie_weight).sum(),
        ratings=0.0 if rating_mask is None else jnp.asarray(rating_mask, loss_weight.dtype).sum(),
    )
