"""What keeps a policy from settling: SELM's optimism in online rounds, and AvgOut's measure of diversity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import Pairs, check_at_least_zero, check_choice, sigmoid_loss
from mmrlhf_jax.objectives.pairwise import Pairwise

Visited = Literal["both", "chosen", "rejected"]


@dataclass(frozen=True)
class SELM(Pairwise):
    """DPO, and away from what the last iterate said itself: responses not yet seen may be better.

    Formula: -log sigmoid(beta z) + alpha beta s_y, y = a response of the last iterate.
    Source: https://arxiv.org/abs/2405.19332; the sign is the released code's, minimised.
    """

    beta: float = 0.01
    """How strongly the policy is held to the reference."""
    alpha: float = 1e-3
    """Weight of optimism: 1e-3 for Zephyr-7B and Phi-3, 1e-4 for Llama-3-8B."""
    visited: Visited = "both"
    """Which side of a pair the last iterate wrote. both: all, as in rounds that rank the policy's own samples; s_y is
    then their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self, "alpha", self.alpha)
        check_choice(self, "visited", self.visited, get_args(Visited))

    def per_pair(self, pairs: Pairs) -> jax.Array:
        ratio = pairs.ratio
        own = {
            "both": (ratio.chosen + ratio.rejected) / 2,
            "chosen": ratio.chosen,
            "rejected": ratio.rejected,
        }[self.visited]
        return sigmoid_loss(ratio.difference, self.beta) + self.alpha * self.beta * own


def average_output(probability: jax.Array, weight: jax.Array) -> jax.Array:
    """AvgOut's D [V]: the mean of the predicted distributions [B, T, V] over tokens of weight [B, T]."""
    scored = jnp.where(weight[..., None] != 0, probability, 0)
    return jnp.einsum("btv,bt->v", scored, weight, precision=jax.lax.Precision.HIGHEST) / weight.sum()


def avgout(output: jax.Array, average: jax.Array, decay: float) -> tuple[jax.Array, jax.Array]:
    """MinAvgOut's penalty [] on a batch's `average_output` [V], and the moving average [V] to hand to the next batch.

    The penalty D . D_bar is small where the policy's distributions are spread; D_bar = decay average + (1 - decay) D
    passes no gradient. The moving average is the caller's to keep, uniform at first.

    Source: https://arxiv.org/abs/2001.05467, MinAvgOut: added to a likelihood loss with a weight of its own. Neither
    decay nor weight is stated where we could read it.
    """
    moved = jax.lax.stop_gradient(decay * average + (1 - decay) * output)
    return (output * moved).sum(), moved
