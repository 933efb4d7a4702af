"""DPO whose labels are probabilities, taken from what the data knows about each pair: a margin, or visit counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import Pairs, check_at_least_zero, sigmoid_loss
from mmrlhf_jax.objectives.pairwise import Pairwise


@dataclass(frozen=True)
class MMPO(Pairwise):
    """Margin-matching preference optimisation: the model's preference is to be as strong as the data's.

    Formula: -p log sigmoid(beta z) - (1 - p) log sigmoid(-beta z), p = sigmoid(sharpness margin).
    Source: https://arxiv.org/abs/2410.03145; `sharpness` is its gamma (`bt_beta` in the released code: 2.2
    for most models, 0.3 for Gemma-7B, 1.1 on SHP). 0 carries no signal, infinity is DPO.
    """

    beta: float = 0.01
    """How strongly the policy is held to the reference."""
    sharpness: float = 2.2
    """How certain a label is, in one over units of the margin."""

    needs_margin: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self, "sharpness", self.sharpness)

    def per_pair(self, pairs: Pairs) -> jax.Array:
        return sigmoid_loss(pairs.ratio.difference, self.beta, jax.nn.sigmoid(-self.sharpness * pairs.margin))


@dataclass(frozen=True)
class VisitDPO(Pairwise):
    """DPO on siblings of a search tree, the less smoothed the more often the better one was visited.

    Formula: -(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z), e = min(1 - 1 / (1 + N_j / max(1, N_i)), 1/2);
    N = visits, the responses' scores.
    Source: MCTS-DPO, https://arxiv.org/abs/2405.00451, and its released code's conservative mode. There sums begin
    where two branches part; what they share cancels in z, so the plain sums here are the same.
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        if pairs.score is None:
            raise ValueError("VisitDPO reads visit counts: PreferenceInputs.score must be given")
        flipped = visit_smoothing(pairs.score.chosen, pairs.score.rejected)
        return sigmoid_loss(pairs.ratio.difference, self.beta, flipped)


def visit_smoothing(better: jax.Array, worse: jax.Array) -> jax.Array:
    """Label smoothing from visit counts of both sides: min(1 - 1 / (1 + worse / max(1, better)), 1/2)."""
    return jnp.minimum(1 - 1 / (1 + worse / jnp.maximum(1, better)), 0.5)
