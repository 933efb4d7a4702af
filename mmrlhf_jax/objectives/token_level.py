"""DPO that knows where two responses differ: dense DPO on corrected segments, and step-level DPO from where they part.

A token's weight depends on which response its own is compared with, so a group of K responses has K - 1 weightings of
each; `pairs_of` sums them in one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import (
    PreferenceInputs,
    check_at_least_zero,
    check_choice,
    check_common,
    loss_and_metrics,
    pair_mean,
    pairs_of,
    sigmoid_loss,
    tokens_of,
)
from mmrlhf_jax.objectives.token_weights import from_divergence

Segments = Literal["exact", "released"]


@dataclass(frozen=True)
class DDPO:
    """Dense DPO: tokens of corrected segments weigh more than those that both responses share.

    Formula: -log sigmoid(beta z) on log p = sum(w_t log p_t) / sum(w_t), w_t = `weight` in a corrected segment, else 1;
    without `average` the sum alone.
    Source: RLHF-V, https://arxiv.org/abs/2312.00849: weight 5, average, beta 0.5. Its released
    script sums, with weight 3, beta 0.1 and difflib's segments: average = False, segments = "released".
    """

    beta: float = 0.5
    """How strongly the policy is held to the reference."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    weight: float = 5.0
    """What a token of a corrected segment counts for; the paper's gamma."""
    average: bool = True
    """Log-probs per weighted token, as published; else sums, as released."""
    segments: Segments = "exact"
    """exact: whatever is not in the longest common subsequence, insertions and deletions included; released: difflib's
    blocks of at least three tokens, replacements only (data/diff.py)."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_common(self, self.beta, self.gamma)
        check_at_least_zero(self, "weight", self.weight)
        check_choice(self, "segments", self.segments, get_args(Segments))

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        tokens = tokens_of(inputs)
        if tokens.changed is None:
            raise ValueError("DDPO weighs corrected segments: Tokens.changed must be given")
        pairs = pairs_of(inputs, jnp.where(tokens.changed, self.weight, 1.0), average=self.average)
        plain = pairs_of(inputs, tokens.changed.astype(tokens.logp.dtype)).weight_sum
        preference = pair_mean(sigmoid_loss(pairs.ratio.difference, self.beta), inputs)
        changed = {
            "changed/chosen": pair_mean(plain.chosen, inputs),
            "changed/rejected": pair_mean(plain.rejected, inputs),
        }
        return loss_and_metrics(inputs, pairs, preference, beta=self.beta, gamma=self.gamma, extra=changed)


@dataclass(frozen=True)
class StepDPO:
    """DPO on what follows the first token in which two responses differ, per token where asked for.

    Formula: -log sigmoid(beta (S_i - S_j)), S = sum of log policy / reference from the first differing token on,
    divided by the number of these tokens with `average`.
    Source: MCTS-DPO's step loss, https://arxiv.org/abs/2405.00451, whose code has both. Without `average` this is DPO:
    what two responses share cancels.
    """

    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses, all of their tokens."""
    average: bool = True
    """Log-ratios per token."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_common(self, self.beta, self.gamma)

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        since = from_divergence(tokens_of(inputs), inputs.pair_weight.shape[1])
        pairs = pairs_of(inputs, since.astype(inputs.logp.dtype), average=self.average)
        preference = pair_mean(sigmoid_loss(pairs.ratio.difference, self.beta), inputs)
        return loss_and_metrics(inputs, pairs, preference, beta=self.beta, gamma=self.gamma)
