"""Regression on differences of rewards: how much better, not only which is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax

from mmrlhf_jax.objectives.pairs import (
    PreferenceInputs,
    check_at_least_zero,
    check_choice,
    check_positive,
    loss_and_metrics,
    pair_mean,
    pairs_of,
)

Scaling = Literal["paper", "released"]


@dataclass(frozen=True)
class REFUEL:
    """The log-ratio's difference regressed on the rewards'; over one turn it is REBEL, over the last of many REFUEL.

    Formula: (z / eta - margin)^2, scaling "paper"; (z - eta margin)^2, "released": eta^2 times as much, hence the same
    minimiser under another learning rate. z sums the scored tokens, those of a group's last turn.
    Source: REFUEL, https://arxiv.org/abs/2410.04612, and its code (eta 1e3); REBEL,
    https://arxiv.org/abs/2404.16767. Rewards are shown at beta = 1 / eta.
    """

    eta: float = 1.0
    """Nats a unit of reward is worth: one over DPO's beta."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    scaling: Scaling = "paper"
    """Which of both published forms."""

    needs_margin: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "eta", self.eta)
        check_at_least_zero(self, "gamma", self.gamma)
        check_choice(self, "scaling", self.scaling, get_args(Scaling))

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        pairs = pairs_of(inputs)
        z, eta = pairs.ratio.difference, self.eta
        error = z / eta - pairs.margin if self.scaling == "paper" else z - eta * pairs.margin
        preference = pair_mean(error**2, inputs)
        extra = {"margin/mean": pair_mean(pairs.margin, inputs)}
        return loss_and_metrics(inputs, pairs, preference, beta=1 / eta, gamma=self.gamma, extra=extra)
