"""A whole ranking at once, where pairs count a group of K responses K (K - 1) / 2 times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import PreferenceInputs, check_common, log_ratio, loss_and_metrics, pairs_of


@dataclass(frozen=True)
class PlackettLuce:
    """Listwise DPO: the likelihood of the ranking, drawn from the top, best response first.

    Formula: sum over responses i of -log(exp(beta s_i) / (exp(beta s_i) + sum over all j worse than i of
    exp(beta s_j))), a mean over groups whatever data.mean says. Two responses: DPO. Tied responses do not compete with
    each other; of a partial order "worse" is what its pairs say.
    Source: https://arxiv.org/abs/2305.18290, its appendix on Plackett-Luce; the same form in PRO,
    https://arxiv.org/abs/2306.17492.
    """

    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_common(self, self.beta, self.gamma)

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        per_group = ranking_nll(self.beta * log_ratio(inputs), inputs.pair_weight > 0)
        preference = per_group.sum() / inputs.totals.groups
        return loss_and_metrics(inputs, pairs_of(inputs), preference, beta=self.beta, gamma=self.gamma)


def ranking_nll(value: jax.Array, worse: jax.Array) -> jax.Array:
    """Negative log-likelihood [B] of rankings under values [B, K]; `worse` bool [B, K, K]: [i, j] iff j is below i."""
    rivals = worse | jnp.eye(value.shape[-1], dtype=bool)
    # finite at -1e30: minus infinity would make the gradient of a lone response's stage NaN
    best = jax.nn.logsumexp(jnp.where(rivals, value[:, None, :], -1e30), axis=-1)
    return jnp.where(worse.any(axis=-1), best - value, 0).sum(axis=-1)
