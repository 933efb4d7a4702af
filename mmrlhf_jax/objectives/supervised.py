"""Supervised fine-tuning: the negative log-likelihood of the scored tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.totals import StepTotals


@flax.struct.dataclass
class SupervisedInputs:
    """One micro-batch of scored tokens; S counts the packed response slots of a group."""

    logp: jax.Array  # f32 [B, S], log-probability of each response token
    loss_weight: jax.Array  # f32 [B, S], 0 = not scored
    totals: StepTotals
    output: jax.Array | None = None  # f32 [V], sum over tokens of loss_weight * predicted distribution
    averages: Mapping[str, jax.Array] | None = None  # what the objective keeps over steps, as the last one left it


@dataclass(frozen=True)
class Supervised:
    """Supervised fine-tuning: the token mean over the whole step, not a mean of row means.

    Formula: -sum(loss_weight * log policy) / sum(loss_weight).
    Source: maximum likelihood.
    """

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __call__(self, inputs: SupervisedInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        # Selected before it is multiplied: 0 * inf is NaN, and an unscored slot may hold anything.
        scored = jnp.where(inputs.loss_weight != 0, inputs.logp, 0)
        logp_per_token = (inputs.loss_weight * scored).sum() / inputs.totals.tokens
        return -logp_per_token, {"loss/nll": -logp_per_token, "logps/token": logp_per_token}
