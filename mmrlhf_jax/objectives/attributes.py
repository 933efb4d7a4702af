"""Reward models that predict what responses were rated in several attributes: each rating's mean, or its quantiles.

Letters are B groups, K responses, A attributes, Q outputs of an attribute. Losses are means over the ratings of the
whole step; a response that was not rated in an attribute costs nothing there. What a trained head is read as (a
direction, a risk measure) is chosen when it scores (inference/reading.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.reward import RewardInputs, check_weights, per_total, score_terms
from mmrlhf_jax.objectives.reward_heads import pinball, quantile_levels


@dataclass(frozen=True)
class MultiObjectiveReward:
    """One output an attribute, regressed on the ratings there are.

    Formula: mean over ratings of (r_a - rating_a)^2 + bradley_terry * -log sigmoid(r_i - r_j), r = mean_a r_a.
    Source: the multi-objective reward of DPA, https://arxiv.org/abs/2402.18571; the second term is ours.
    reward.attributes names the attributes.
    """

    bradley_terry: float = 0.0
    """Weight of Bradley-Terry over pairs, every attribute counting the same."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self, bradley_terry=self.bradley_terry)

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        output, rating, mask = rated(inputs)
        if output.shape[-1] != 1:
            raise ValueError(f"MultiObjectiveReward trains one output an attribute, not {output.shape[-1]}")
        error = jnp.where(mask, output[..., 0] - rating, 0)
        squares = per_total((error**2).sum(), inputs.totals.ratings)
        absolute = per_total(jnp.abs(error).sum(), inputs.totals.ratings)
        terms, metrics = score_terms(dataclasses.replace(inputs, score=_even(output)))
        extra = {"loss/squares": squares, "ratings/absolute_error": absolute}
        return squares + self.bradley_terry * terms.bradley_terry, {**metrics, **extra}


@dataclass(frozen=True)
class QuantileReward:
    """Q outputs an attribute, the quantiles q / (Q + 1) of what it would be rated.

    Formula: mean over ratings and quantiles of (tau_q - 1[u < 0]) u, u = rating_a - r_aq, + bradley_terry *
    -log sigmoid(r_i - r_j), r = mean_aq r_aq.
    Source: QRM, https://arxiv.org/abs/2409.10164, step 1; its gate over attributes is a direction that is chosen when
    scoring. reward.attributes names the attributes, reward.quantiles is Q.
    """

    bradley_terry: float = 0.0
    """Weight of Bradley-Terry over pairs, every attribute and quantile counting the same."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self, bradley_terry=self.bradley_terry)

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        output, rating, mask = rated(inputs)
        count = output.shape[-1]

        def mean(values: jax.Array) -> jax.Array:
            return per_total(jnp.where(mask, values, 0).sum(), inputs.totals.ratings)

        cost = mean(pinball(output, rating, quantile_levels(count)).mean(axis=-1))
        extra = {
            "loss/pinball": cost,
            # shares of ratings: below the lowest quantile, 1 / (Q + 1) where it is right; above the highest, the same;
            # of neighbouring quantiles that cross
            "ratings/below": mean(rating < output.min(axis=-1)),
            "ratings/above": mean(rating > output.max(axis=-1)),
            "ratings/crossing": mean((jnp.diff(output, axis=-1) < 0).astype(output.dtype).mean(axis=-1)),
            "ratings/absolute_error": mean(jnp.abs(rating - output.mean(axis=-1))),
        }
        terms, metrics = score_terms(dataclasses.replace(inputs, score=_even(output)))
        return cost + self.bradley_terry * terms.bradley_terry, {**metrics, **extra}


def rated(inputs: RewardInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs [B, K, A, Q], ratings [B, K, A] and where there are any, bool [B, K, A]; outputs and ratings are 0
    elsewhere, whatever they held.

    Raises ValueError where the inputs bring none.
    """
    output, rating, mask = inputs.output, inputs.rating, inputs.rating_mask
    if output is None or rating is None or mask is None:
        raise ValueError("this objective reads ratings: RewardInputs.output, .rating and .rating_mask must be given")
    return jnp.where(_present(inputs)[..., None, None], output, 0), jnp.where(mask, rating, 0), mask


def _present(inputs: RewardInputs) -> jax.Array:
    """Responses that are rated, or stand in a pair or tie: bool [B, K]."""
    assert inputs.rating_mask is not None
    compared = (inputs.pair_weight > 0) | (inputs.tie_weight > 0)
    return inputs.rating_mask.any(axis=-1) | compared.any(axis=-1) | compared.any(axis=-2)


def _even(output: jax.Array) -> jax.Array:
    """The score [B, K] in which everything counts the same."""
    return output.mean(axis=(-2, -1))
