"""Other losses for a reward model that reads one score, or one at every token, and writes no critique.

Letters are B groups, K responses, T token slots. As in reward.py each is a mean over pairs, of sums divided by the
step's totals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import Tokens, members, paired
from mmrlhf_jax.objectives.reward import RewardInputs, check_weights, per_total, score_terms
from mmrlhf_jax.objectives.token_weights import first_divergence, places


@dataclass(frozen=True)
class MarginReward:
    """Bradley-Terry that asks for as much distance as the data says there is.

    Formula: -log sigmoid(r_i - r_j - scale * margin) + centre * (r_i + r_j)^2 + tie * (r_i - r_j)^2 over ties.
    Source: Llama 2, https://arxiv.org/abs/2307.09288; TRL's reward trainer with a margin column.
    """

    scale: float = 1.0
    """Score units a unit of the data's margin is worth."""
    centre: float = 0.01
    """Weight of (r_i + r_j)^2, mean over pairs; holds scores around zero, which pairs alone leave open."""
    tie: float = 1.0
    """Weight of (r_i - r_j)^2, mean over tied pairs."""

    needs_margin: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self, scale=self.scale, centre=self.centre, tie=self.tie)

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        if inputs.pair_margin is None:
            raise ValueError("MarginReward reads margins: RewardInputs.pair_margin must be given")
        terms, metrics = score_terms(inputs)
        margin = self.scale * paired(inputs.pair_margin, inputs.pair_weight)
        chosen, rejected = _sides(inputs)
        loss = _mean(-jax.nn.log_sigmoid(chosen - rejected - margin), inputs)
        extra = {"loss/margin": loss, "margin/mean": _mean(margin, inputs)}
        return loss + self.centre * terms.centre + self.tie * terms.tie, {**metrics, **extra}


@dataclass(frozen=True)
class ClassificationReward:
    """Was this response preferred? Each asked by itself; the logit is the reward, which keeps the order as well.

    Formula: -log sigmoid(r_i) - log sigmoid(-r_j).
    Source: https://arxiv.org/abs/2411.04991, the classification surrogate of Bradley-Terry.
    """

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        _, metrics = score_terms(inputs)
        chosen, rejected = _sides(inputs)
        loss = _mean(-jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected), inputs)
        return loss, {**metrics, "loss/classification": loss}


@dataclass(frozen=True)
class LLaVARLHFReward:
    """Bradley-Terry, centred as a batch: its mean score is held at zero, not each pair's.

    Formula: -log sigmoid(r_i - r_j) + centre * |mean over pairs of (r_i + r_j)|.
    Source: the released code of LLaVA-RLHF, https://arxiv.org/abs/2309.14525.
    """

    centre: float = 1e-3
    """Weight of the absolute mean."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weights(self, centre=self.centre)

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 [] of the whole step."""
        terms, metrics = score_terms(inputs)
        chosen, rejected = _sides(inputs)
        centre = jnp.abs(_mean(chosen + rejected, inputs))
        return terms.bradley_terry + self.centre * centre, {**metrics, "loss/batch_centre": centre}


@dataclass(frozen=True)
class TokenwiseReward:
    """Bradley-Terry at every place from where two responses part: a reward for each token, ready for dense use.

    Formula: mean over places t from the first differing token to the end of the longer response of
    -log sigmoid(r_i[t] - r_j[t]); a response that has ended keeps the score of its last token.
    Source: DeepSpeed-Chat's reward model (https://arxiv.org/abs/2308.01320), used by Zhongjing
    (https://arxiv.org/abs/2308.03549), where padding has a score of its own; what is read at a response's end is what
    other programs take for its reward.
    """

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __call__(self, inputs: RewardInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        if inputs.tokens is None or inputs.token_score is None:
            raise ValueError("TokenwiseReward reads every token: RewardInputs.tokens and .token_score must be given")
        _, metrics = score_terms(inputs)
        per_pair = tokenwise_bradley_terry(inputs.token_score, inputs.tokens, inputs.pair_weight > 0)
        loss = _mean(per_pair, inputs)
        return loss, {**metrics, "loss/tokenwise": loss}


def tokenwise_bradley_terry(score: jax.Array, tokens: Tokens, valid: jax.Array) -> jax.Array:
    """Mean over places from the first difference on of -log sigmoid(r_i[t] - r_j[t]): [B, K, K], 0 without a pair.

    `score` f32 [B, T] of every slot; `valid` bool [B, K, K], where there is a pair.
    """
    responses, slots = valid.shape[1], score.shape[1]
    member = members(tokens, responses)
    count = member.sum(axis=-1)
    start = jnp.argmax(member, axis=-1)
    place = jnp.arange(slots)
    at = start[:, :, None] + jnp.minimum(place, jnp.maximum(count - 1, 0)[:, :, None])
    score = jnp.where(member.any(axis=1), score, 0)
    by_place = jnp.take_along_axis(jnp.broadcast_to(score[:, None, :], at.shape), at, axis=-1)  # [B, K, T]
    first = first_divergence(tokens, member, places(member))  # [B, j, i]; the shorter of equal beginnings ends there
    since = jnp.minimum(first, first.swapaxes(1, 2))[..., None]
    longer = jnp.maximum(count[:, :, None], count[:, None, :])[..., None]
    counted = (place >= since) & (place < longer) & valid[..., None]
    cost = -jax.nn.log_sigmoid(by_place[:, :, None, :] - by_place[:, None, :, :])
    return jnp.where(counted, cost, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)


def _sides(inputs: RewardInputs) -> tuple[jax.Array, jax.Array]:
    """Scores of both sides [B, K, K], 0 where there is no pair."""
    score, weight = inputs.score, inputs.pair_weight
    return (
        paired(jnp.broadcast_to(score[:, :, None], weight.shape), weight),
        paired(jnp.broadcast_to(score[:, None, :], weight.shape), weight),
    )


def _mean(per_pair: jax.Array, inputs: RewardInputs) -> jax.Array:
    return per_total((inputs.pair_weight * per_pair).sum(), inputs.totals.pair_weight)
