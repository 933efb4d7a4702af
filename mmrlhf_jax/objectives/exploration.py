"""What keeps a policy from settling: SELM's optimism in online rounds, and AvgOut's measure of diversity in likelihood
training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import Pairs, check_at_least_zero, check_choice, check_decay, sigmoid_loss
from mmrlhf_jax.objectives.pairwise import Pairwise
from mmrlhf_jax.objectives.supervised import Supervised, SupervisedInputs

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


@dataclass(frozen=True)
class MinAvgOut(Supervised):
    """Supervised fine-tuning, and away from the words that all answers share.

    Formula: NLL + alpha D . D_bar; D = the mean of the predicted distributions over the scored tokens of the step,
    D_bar = decay D_bar + (1 - decay) D without gradient, uniform before the first step.
    Source: MinAvgOut of https://arxiv.org/abs/2001.05467. It states neither alpha nor decay where we could read it:
    both defaults are ours. Held-out groups are evaluated by their likelihood.
    """

    alpha: float = 1.0
    """Weight of the penalty, which lies between 1 / vocabulary and 1."""
    decay: float = 0.99
    """How much of the average a step keeps."""

    needs_step_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least_zero(self, "alpha", self.alpha)
        check_decay(self, "decay", self.decay)

    def initial_averages(self, vocab: int) -> dict[str, jax.Array]:
        """Before the first step: D_bar f32 [V] of a vocabulary."""
        return {"output": jnp.full(vocab, 1 / vocab, jnp.float32)}

    def moved_averages(self, inputs: SupervisedInputs) -> dict[str, jax.Array]:
        """What the step leaves behind."""
        return {"output": self._penalty(inputs)[1]}

    def __call__(self, inputs: SupervisedInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 [] of the whole step."""
        nll, metrics = super().__call__(inputs)
        penalty, _ = self._penalty(inputs)
        return nll + self.alpha * penalty, {**metrics, "loss/avgout": penalty}

    def _penalty(self, inputs: SupervisedInputs) -> tuple[jax.Array, jax.Array]:
        if inputs.output is None or inputs.averages is None:
            raise ValueError("MinAvgOut reads distributions: SupervisedInputs.output and .averages must be given")
        return avgout(inputs.output / inputs.totals.tokens, inputs.averages["output"], self.decay)


def average_output(probability: jax.Array, weight: jax.Array) -> jax.Array:
    """AvgOut's D [V]: the mean of the predicted distributions [B, T, V] over tokens of weight [B, T]."""
    scored = jnp.where(weight[..., None] != 0, probability, 0)
    return jnp.einsum("btv,bt->v", scored, weight, precision=jax.lax.Precision.HIGHEST) / weight.sum()


def avgout(output: jax.Array, average: jax.Array, decay: float) -> tuple[jax.Array, jax.Array]:
    """MinAvgOut's penalty [] on a batch's `average_output` [V], and the moving average [V] to hand to the next batch.

    The penalty D . D_bar is small where the policy's distributions are spread; D_bar = decay average + (1 - decay) D
    passes no gradient. The moving average is the caller's to keep, uniform at first.

    Source: https://arxiv.org/abs/2001.05467, MinAvgOut.
    """
    moved = jax.lax.stop_gradient(decay * average + (1 - decay) * output)
    return (output * moved).sum(), moved
