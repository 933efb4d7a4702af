"""Reward objectives over whole groups: the critique reward model as published, and a scalar model without critiques.

  critique NLL + Bradley-Terry over all pairs of a group    https://arxiv.org/abs/2502.10391
  centring, (s_i + s_j)^2 of every pair                     https://arxiv.org/abs/2312.09244, as TRL has it
  ties, (s_i - s_j)^2                                       the released trainer's tie path, which crashes there

Where MM-RLHF's released trainer differs from its paper:
- It has one weight for Bradley-Terry and ties and leaves the centring term, which the paper does not have, outside it.
  Here every term has a weight of its own; `centre` is likewise scaled by no other.
- Its critique loss is a mean over pairs of CE(chosen) + CE(rejected), each a token mean over one sequence (template
  tokens included): a critique counts as often as its answer stands in a pair, and as much if it is short. Here it is
  one token mean over the critiques of the whole step, each answer's once.

All functions are pure; letters are B groups, K responses, S packed response slots. Pairs and ties of weight 0,
responses in neither and unscored slots may hold any values: they reach neither loss nor gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import Tokens, in_some_pair
from mmrlhf_jax.objectives.totals import StepTotals


@flax.struct.dataclass
class RewardInputs:
    """One micro-batch of groups, as a reward objective sees it."""

    score: jax.Array  # f32 [B, K], read at each branch's end
    logp: jax.Array  # f32 [B, S], log-prob of each token of a branch
    loss_weight: jax.Array  # f32 [B, S], 0 = not scored; the critique's tokens elsewhere
    pair_weight: jax.Array  # f32 [B, K, K], [i, j] > 0 iff i is preferred to j, else 0
    tie_weight: jax.Array  # f32 [B, K, K], [i, j] > 0 iff i and j are tied and i < j, else 0
    totals: StepTotals
    pair_margin: jax.Array | None = None  # f32 [B, K, K], how much better the data says i is; 0 where there is no pair
    token_score: jax.Array | None = None  # f32 [B, T], read at every token
    tokens: Tokens | None = None  # whose tokens they are; log-probs are not read
    output: jax.Array | None = None  # f32 [B, K, A, Q], all that a head of more than one output says of a response
    rating: jax.Array | None = None  # f32 [B, K, A], what each response was rated in each attribute
    rating_mask: jax.Array | None = None  # bool [B, K, A], where it was


@dataclass(frozen=True)
class CritiqueReward:
    """Bradley-Terry over all pairs, centring, ties, and the negative log-likelihood of the critiques.

    Formula: bradley_terry * -log sigmoid(r_i - r_j) + centre * (r_i + r_j)^2 + tie * (r_i - r_j)^2 over ties
    + critique * NLL(critiques).
    Source: https://arxiv.org/abs/2502.10391, section 3.
    """

    critique: float = 1.0
    """Weight of the token-mean negative log-likelihood of the critiques."""
    bradley_terry: float = 1.0
    """Weight of -log sigmoid(s_i - s_j), mean over pairs."""
    centre: float = 0.01
    """Weight of (s_i + s_j)^2, mean over pairs; holds scores around zero, which pairs alone leave open."""
    tie: float = 1.0
    """Weight of (s_i - s_j)^2, mean over tied pairs."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self, critique=self.critique, bradley_terry=self.bradley_terry, centre=self.centre, tie=self.tie)

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        terms, metrics = score_terms(inputs)
        logp_per_token = per_total(scored_sum(inputs.logp, inputs.loss_weight), inputs.totals.tokens)
        loss = (
            self.bradley_terry * terms.bradley_terry
            + self.centre * terms.centre
            + self.tie * terms.tie
            - self.critique * logp_per_token
        )
        return loss, {**metrics, "loss/critique": -logp_per_token, "logps/token": logp_per_token}


@dataclass(frozen=True)
class ScalarReward:
    """Bradley-Terry over all pairs, centring and ties: a reward model that writes no critique.

    Formula: -log sigmoid(r_i - r_j) + centre * (r_i + r_j)^2 + tie * (r_i - r_j)^2 over ties.
    Source: Bradley-Terry as https://arxiv.org/abs/2203.02155 trains it; centring https://arxiv.org/abs/2312.09244.
    """

    centre: float = 0.01
    """Weight of (s_i + s_j)^2, mean over pairs; holds scores around zero, which pairs alone leave open."""
    tie: float = 1.0
    """Weight of (s_i - s_j)^2, mean over tied pairs."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self, centre=self.centre, tie=self.tie)

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step. `logp` and `loss_weight` are
        not read."""
        terms, metrics = score_terms(inputs)
        return terms.bradley_terry + self.centre * terms.centre + self.tie * terms.tie, metrics


@flax.struct.dataclass
class ScoreTerms:
    """What the scores alone are trained by, each f32 [] and unweighted."""

    bradley_terry: jax.Array
    centre: jax.Array
    tie: jax.Array


def score_terms(inputs: RewardInputs) -> tuple[ScoreTerms, dict[str, jax.Array]]:
    """The terms over pairs and ties, and the metrics of the scores; a step without pairs (or ties) has 0 for theirs."""
    # Selected before any arithmetic: differences of padding could overflow, and 0 * inf is NaN in loss and gradient.
    present = in_some_pair(inputs.pair_weight) | in_some_pair(inputs.tie_weight)
    score = jnp.where(present, inputs.score, 0)
    better, worse = score[:, :, None], score[:, None, :]
    difference = better - worse

    def mean(per_pair: jax.Array) -> jax.Array:
        return per_total((inputs.pair_weight * per_pair).sum(), inputs.totals.pair_weight)

    terms = ScoreTerms(
        bradley_terry=mean(-jax.nn.log_sigmoid(difference)),
        centre=mean((better + worse) ** 2),
        tie=per_total((inputs.tie_weight * difference**2).sum(), inputs.totals.ties),
    )
    metrics = {
        "loss/bradley_terry": terms.bradley_terry,
        "loss/centre": terms.centre,
        "loss/tie": terms.tie,
        "rewards/accuracies": mean((difference > 0).astype(score.dtype)),
        "rewards/margins": mean(difference),
        "rewards/chosen": mean(better),
        "rewards/rejected": mean(worse),
    }
    return terms, metrics


def scored_sum(logp: jax.Array, loss_weight: jax.Array) -> jax.Array:
    """Sum [] of loss_weight * logp over the scored slots of [B, S]."""
    return (loss_weight * jnp.where(loss_weight != 0, logp, 0)).sum()


def per_total(value: jax.Array, total: jax.Array | float) -> jax.Array:
    """`value / total`, and 0 for a step that has none of it: without ties it still trains on its pairs."""
    # Divided by a safe number first: the gradient of a division by 0 is NaN even where it is not selected.
    there = total > 0
    return jnp.where(there, value / jnp.where(there, total, 1), 0)


def check_weights(objective: object, **weights: float) -> None:
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{type(objective).__name__}: {name} must be at least 0 and finite, got {value}")
