"""Losses of one pair at a time: everything TRL 1.16's DPO trainer calls a `loss_type`, under TRL's names, over all
pairs of a group.

With s = log policy / reference of a response, z_ij = s_i - s_j for a pair "i is preferred to j" (under another
f-divergence: of f'(exp s)), n = scored tokens. Each loss is a mean over pairs, plus gamma * NLL(chosen), which is TRL's
"sft" beside it. TRL's `ld_alpha` and `use_weighting` are options of every loss here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.divergence import LARGEST_EXPONENT, Divergent
from mmrlhf_jax.objectives.pairs import (
    Pairs,
    PreferenceInputs,
    Sides,
    check_at_least_zero,
    check_common,
    check_label_smoothing,
    loss_and_metrics,
    nll_of,
    pair_mean,
    pairs_of,
    per_token,
    sides_of,
    sigmoid_loss,
    tokens_of,
)
from mmrlhf_jax.objectives.token_weights import beyond_shorter


@dataclass(frozen=True)
class Pairwise:
    """What the losses of one pair at a time share; each says in `per_pair` what a pair costs."""

    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    gamma: float = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    ld_alpha: float = 1.0
    """Weight of tokens beyond the length of the other response (LD-DPO, arXiv 2409.06411); 1: that of all others."""
    wpo: bool = False
    """Weigh a pair by how likely its responses are under the policy now (WPO, arXiv 2406.11827, its aligned form)."""

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_step_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_common(self, self.beta, self.gamma)
        if isinstance(self, Divergent):
            self.check_divergence()
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"{type(self).__name__}: ld_alpha must lie in [0, 1], got {self.ld_alpha}")

    def per_pair(self, pairs: Pairs) -> jax.Array:
        """What each pair costs, [B, K, K]; finite where there is none."""
        raise NotImplementedError

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        pairs = shortened(inputs, self.ld_alpha)
        preference = pair_mean(weighted(self.per_pair(pairs), inputs, self.wpo), inputs)
        return loss_and_metrics(inputs, pairs, preference, beta=self.beta, gamma=self.gamma)


def shortened(inputs: PreferenceInputs, ld_alpha: float) -> Pairs:
    """The pairs, with LD-DPO's weights on what the longer response has more."""
    if ld_alpha == 1:
        return pairs_of(inputs)
    return pairs_of(inputs, beyond_shorter(tokens_of(inputs), inputs.pair_weight.shape[1], ld_alpha))


def weighted(per_pair: jax.Array, inputs: PreferenceInputs, wpo: bool) -> jax.Array:
    """`per_pair` [B, K, K] times WPO's weight of both responses, where asked for."""
    if not wpo:
        return per_pair
    likelihood = sides_of(aligned_likelihood(inputs), inputs.pair_weight)
    return per_pair * likelihood.chosen * likelihood.rejected


def aligned_likelihood(inputs: PreferenceInputs) -> jax.Array:
    """exp(mean over scored tokens of (log p(token) - log sum_v p(v)^2)) of each response [B, K], without gradient.

    Source: https://arxiv.org/abs/2406.11827, equation 2, sampled alignment; TRL's `use_weighting`.
    """
    tokens = tokens_of(inputs)
    if tokens.collision is None:
        raise ValueError("wpo weighs by whole distributions: Tokens.collision must be given")
    mine = (tokens.response[:, None, :] == jnp.arange(inputs.logp.shape[1])[:, None]) & (tokens.weight != 0)[:, None]
    aligned = jax.lax.stop_gradient(tokens.logp - tokens.collision)[:, None, :]
    return jnp.exp(jnp.where(mine, aligned, 0).sum(axis=-1) / jnp.maximum(mine.sum(axis=-1), 1))


@dataclass(frozen=True)
class DPO(Divergent, Pairwise):
    """Sigmoid DPO over all pairs of a group.

    Formula: -(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z), e = label_smoothing.
    Source: https://arxiv.org/abs/2305.18290, equation 7; label smoothing is "conservative DPO"
    (https://github.com/eric-mitchell/direct-preference-optimization), which TRL's "sigmoid" does not have.
    """

    label_smoothing: float = 0.0
    """Probability that a preference is flipped (conservative DPO); 0 trusts every preference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_smoothing(self, self.label_smoothing)

    def per_pair(self, pairs: Pairs) -> jax.Array:
        return sigmoid_loss(self.score(pairs).difference, self.beta, self.label_smoothing)


@dataclass(frozen=True)
class SigmoidNorm(Divergent, Pairwise):
    """DPO on log-ratios per token.

    Formula: -log sigmoid(beta (s_i / n_i - s_j / n_j)).
    Source: TRL's "sigmoid_norm", the length-normalised DPO of Tulu 3 (https://arxiv.org/abs/2411.15124).
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        return sigmoid_loss(per_token(self.score(pairs), pairs.length).difference, self.beta)


@dataclass(frozen=True)
class Hinge(Divergent, Pairwise):
    """A margin of 1 / beta between log-ratios, and nothing beyond it.

    Formula: max(0, 1 - beta z).
    Source: SLiC, https://arxiv.org/abs/2305.10425, on DPO's log-ratios as RSO has it
    (https://arxiv.org/abs/2309.06657); TRL's "hinge".
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        return jax.nn.relu(1 - self.beta * self.score(pairs).difference)


@dataclass(frozen=True)
class IPO(Divergent, Pairwise):
    """Regression of the log-ratio per token on a fixed gap, which cannot be over-fitted to certain preferences.

    Formula: (s_i / n_i - s_j / n_j - 1 / (2 beta))^2; beta is the paper's tau.
    Source: https://arxiv.org/abs/2310.12036, equation 17; per token as its authors told TRL ("ipo"), the paper sums.
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        return (per_token(self.score(pairs), pairs.length).difference - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class EXO(Divergent, Pairwise):
    """Reverse KL from the policy's preference to a smoothed label, where DPO has the forward one.

    Formula: q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = sigmoid(beta z), e = label_smoothing.
    Source: https://arxiv.org/abs/2402.00856, equation 16 for two responses; TRL's "exo_pair".
    """

    label_smoothing: float = 1e-3
    """Probability of the rejected response in the label; must be positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.label_smoothing < 0.5:
            raise ValueError(f"EXO: label_smoothing must lie in (0, 0.5), got {self.label_smoothing}")

    def per_pair(self, pairs: Pairs) -> jax.Array:
        z = self.beta * self.score(pairs).difference
        agree = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - math.log1p(-self.label_smoothing))
        return agree + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - math.log(self.label_smoothing))


@dataclass(frozen=True)
class RobustDPO(Divergent, Pairwise):
    """DPO whose expectation under labels flipped with a known rate is that of clean labels.

    Formula: (-(1 - e) log sigmoid(beta z) + e log sigmoid(-beta z)) / (1 - 2 e), e = label_smoothing.
    Source: https://arxiv.org/abs/2403.00409; TRL's "robust".
    """

    label_smoothing: float = 0.1
    """Probability that a preference is flipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_smoothing(self, self.label_smoothing)

    def per_pair(self, pairs: Pairs) -> jax.Array:
        z = self.beta * self.score(pairs).difference
        e = self.label_smoothing
        return (e * jax.nn.log_sigmoid(-z) - (1 - e) * jax.nn.log_sigmoid(z)) / (1 - 2 * e)


@dataclass(frozen=True)
class DiscoPOP(Divergent, Pairwise):
    """The loss a language model discovered: logistic where a pair is wrong, exponential where it is right.

    Formula: -(1 - m) log sigmoid(beta z) + m exp(-beta z), m = sigmoid(beta z / tau).
    Source: https://arxiv.org/abs/2406.08414, equation 5; TRL's "discopop".
    """

    tau: float = 0.05
    """How sharply one form takes over from the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < math.inf:
            raise ValueError(f"DiscoPOP: tau must be positive and finite, got {self.tau}")

    def per_pair(self, pairs: Pairs) -> jax.Array:
        z = self.beta * self.score(pairs).difference
        # m exp(-z) as one exponential: where z is far below 0, m is 0 and exp(-z) infinite in fp32
        exponential = jnp.exp(jnp.minimum(jax.nn.log_sigmoid(z / self.tau) - z, LARGEST_EXPONENT))
        return -jax.nn.sigmoid(-z / self.tau) * jax.nn.log_sigmoid(z) + exponential


@dataclass(frozen=True)
class NCA(Pairwise):
    """Noise-contrastive: the chosen response's likelihood itself is trained, not only its lead.

    Formula: -log sigmoid(beta s_i) - (log sigmoid(-beta s_i) + log sigmoid(-beta s_j)) / 2.
    Source: https://arxiv.org/abs/2402.05369, for pairs; TRL's "nca_pair".
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        chosen, rejected = _rewards(self.beta, pairs)
        log_sigmoid = jax.nn.log_sigmoid
        return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@dataclass(frozen=True)
class BCO(Pairwise):
    """A classifier of single responses whose logit is the reward.

    Formula: -log sigmoid(beta s_i) - log sigmoid(-beta s_j).
    Source: https://arxiv.org/abs/2404.04656 without its running shift of the reward, as TRL's "bco_pair".
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        return binary(*_rewards(self.beta, pairs))


@dataclass(frozen=True)
class SPPO(Pairwise):
    """Self-play towards an equilibrium: log-ratios regressed on what a sure win and a sure loss are worth.

    Formula: (s_i - 1 / (2 beta))^2 + (s_j + 1 / (2 beta))^2.
    Source: https://arxiv.org/abs/2405.00675, equation 4.7 with probabilities 1 and 0; TRL's "sppo_hard".
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        ratio = pairs.ratio
        return (ratio.chosen - 0.5 / self.beta) ** 2 + (ratio.rejected + 0.5 / self.beta) ** 2


@dataclass(frozen=True)
class APOZero(Pairwise):
    """Chosen up, rejected down: for answers better than the model's own.

    Formula: 1 - sigmoid(beta s_i) + sigmoid(beta s_j).
    Source: https://arxiv.org/abs/2408.06266, equation 7; TRL's "apo_zero".
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        chosen, rejected = _rewards(self.beta, pairs)
        return 1 - jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(Pairwise):
    """Chosen down, rejected further down: for answers worse than the model's own.

    Formula: sigmoid(beta s_i) + 1 - sigmoid(beta z).
    Source: https://arxiv.org/abs/2408.06266, equation 8; TRL's "apo_down".
    """

    def per_pair(self, pairs: Pairs) -> jax.Array:
        chosen, rejected = _rewards(self.beta, pairs)
        return jax.nn.sigmoid(chosen) + 1 - jax.nn.sigmoid(chosen - rejected)


@dataclass(frozen=True)
class MPO(Pairwise):
    """Mixed preference optimisation: which is better, how good each is, and how to write the better one.

    Formula: sigmoid * DPO + bco * BCO + gamma * NLL(chosen).
    Source: https://arxiv.org/abs/2411.10442; TRL's loss_type ["sigmoid", "bco_pair", "sft"].
    """

    gamma: float = 1.0
    """Weight of the token-mean negative log-likelihood of the chosen responses."""
    sigmoid: float = 0.8
    """Weight of DPO's loss."""
    bco: float = 0.2
    """Weight of BCO's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self, "sigmoid", self.sigmoid)
        check_at_least_zero(self, "bco", self.bco)

    def per_pair(self, pairs: Pairs) -> jax.Array:
        return self.sigmoid * sigmoid_loss(pairs.ratio.difference, self.beta) + self.bco * binary(
            *_rewards(self.beta, pairs)
        )


@dataclass(frozen=True)
class ChosenNLL:
    """Supervised fine-tuning on the preferred responses of pairs, each as often as it wins.

    Formula: -sum(wins * log policy) / sum(wins * tokens).
    Source: TRL's "sft" by itself; over best answers only, once each, it is `Supervised` with data.responses = "best".
    """

    needs_margin: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_step_statistics: ClassVar[bool] = False

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss f32 [] and metrics f32 []; both add up over the micro-batches of a step."""
        nll = nll_of(inputs)
        logp, length = (sides_of(values, inputs.pair_weight) for values in (inputs.logp, inputs.length))
        return nll, {
            "loss/nll": nll,
            "logps/chosen": pair_mean(logp.chosen, inputs),
            "logps/rejected": pair_mean(logp.rejected, inputs),
            "length/chosen": pair_mean(length.chosen, inputs),
            "length/rejected": pair_mean(length.rejected, inputs),
        }


def binary(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """-log sigmoid(chosen) - log sigmoid(-rejected): both classified by themselves."""
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def _rewards(beta: float, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    ratio: Sides = pairs.ratio
    return beta * ratio.chosen, beta * ratio.rejected
