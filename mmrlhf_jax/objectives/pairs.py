"""What objectives over pairs share: their inputs, both sides of every pair, and the loss and metrics made of them.

Letters are B groups, K responses, T token slots of a group (its responses end to end). A value of both sides of a pair
is [B, K, K] twice, not [B, K]: what a response counts for may depend on whom it is compared with, since some objectives
weigh a token by whether the other response has it too.

Pairs whose weight is 0, responses in no pair and slots that are not scored may hold any values: they are selected away
before any arithmetic, so they reach neither loss nor gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.totals import StepTotals, wins


@flax.struct.dataclass
class Tokens:
    """The tokens behind the responses of a micro-batch. A response's slots follow each other."""

    token: jax.Array  # i32 [B, T]
    response: jax.Array  # i32 [B, T], 0..K-1: whose slot this is; K = padding
    weight: jax.Array  # f32 [B, T], 0 = not scored
    logp: jax.Array  # f32 [B, T], under the policy
    reference_logp: jax.Array  # f32 [B, T]
    changed: jax.Array | None = None  # bool [B, K, T], [j, t]: what the slot's response does not share with response j
    collision: jax.Array | None = None  # f32 [B, T], log sum_v p(v)^2 of the distribution the token was drawn from


@flax.struct.dataclass
class PreferenceInputs:
    """One micro-batch of groups, as a preference objective sees it."""

    logp: jax.Array  # f32 [B, K], policy log-prob of each response: sum of loss_weight * token logp
    reference_logp: jax.Array  # f32 [B, K], the same under the reference
    length: jax.Array  # f32 [B, K], scored tokens of each response
    pair_weight: jax.Array  # f32 [B, K, K], [i, j] > 0 iff i is preferred to j, else 0
    pair_margin: jax.Array  # f32 [B, K, K], reward margin of the pair; 0 where pair_weight is 0
    totals: StepTotals
    key: jax.Array  # the step's PRNG key
    score: jax.Array | None = None  # f32 [B, K], the data's own number for each response
    tokens: Tokens | None = None
    averages: Mapping[str, jax.Array] | None = None  # what the objective keeps over steps, as the last one left it


class PreferenceObjective(Protocol):
    """A frozen, hashable set of hyper-parameters that turns arrays into a loss: a static argument of `jax.jit`.

    The loss and every metric are weighted sums already divided by the step's totals: summed over the micro-batches of
    a step they are the step's values.
    """

    needs_margin: ClassVar[bool]
    """`pair_margin` must hold real margins."""
    needs_reference: ClassVar[bool]
    """`reference_logp` must hold real log-probs."""
    needs_step_statistics: ClassVar[bool]
    """The loss is no sum over pairs: a micro-batch must be the whole step."""

    def __call__(self, inputs: PreferenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@flax.struct.dataclass
class Sides:
    """One number of each side of every pair: at [i, j] of i, which is preferred, and of j; 0 where there is no pair."""

    chosen: jax.Array  # [B, K, K]
    rejected: jax.Array  # [B, K, K]

    @property
    def difference(self) -> jax.Array:
        return self.chosen - self.rejected


@flax.struct.dataclass
class Pairs:
    """All pairs of a micro-batch; everything is 0 where there is no pair."""

    logp: Sides
    reference: Sides
    length: Sides  # scored tokens
    weight_sum: Sides  # what the tokens count for, together: their number, where each counts 1
    margin: jax.Array  # [B, K, K]
    score: Sides | None = None

    @property
    def ratio(self) -> Sides:
        """log policy / reference."""
        return Sides(self.logp.chosen - self.reference.chosen, self.logp.rejected - self.reference.rejected)


def paired(values: jax.Array, pair_weight: jax.Array) -> jax.Array:
    """`values` [B, K, K] where there is a pair, 0 elsewhere."""
    return jnp.where(pair_weight > 0, values, 0)


def in_some_pair(pair_weight: jax.Array) -> jax.Array:
    """Which responses stand in at least one pair: [B, K, K] -> bool [B, K]."""
    valid = pair_weight > 0
    return valid.any(axis=-1) | valid.any(axis=-2)


def log_ratio(inputs: PreferenceInputs) -> jax.Array:
    """log policy / reference of each response [B, K]; 0 for responses in no pair."""
    # Selected before any arithmetic: differences of padding could overflow, and 0 * inf is NaN in loss and gradient.
    present = in_some_pair(inputs.pair_weight)
    return jnp.where(present, inputs.logp, 0) - jnp.where(present, inputs.reference_logp, 0)


def pair_log_ratio(ratio: jax.Array) -> jax.Array:
    """z_ij = ratio_i - ratio_j: [B, K] -> [B, K, K]."""
    return ratio[:, :, None] - ratio[:, None, :]


def sides_of(values: jax.Array, pair_weight: jax.Array) -> Sides:
    """Both sides of every pair, of values [B, K] of responses or [B, K, K] of response i when compared with j."""
    if values.ndim == 2:
        values = jnp.broadcast_to(values[:, :, None], pair_weight.shape)
    return Sides(paired(values, pair_weight), paired(values.swapaxes(1, 2), pair_weight))


def pairs_of(inputs: PreferenceInputs, against: jax.Array | None = None, *, average: bool = False) -> Pairs:
    """The pairs of a micro-batch.

    Args:
      against: f32 [B, K, T], [j, t]: what slot t's token counts for when its response is compared with j; None: 1.
        It multiplies the token's own weight in policy and reference alike.
      average: divide the log-probs by the weight of their tokens.
    """
    weight = inputs.pair_weight
    logp, reference, length = inputs.logp, inputs.reference_logp, inputs.length
    if against is not None:
        tokens = tokens_of(inputs)
        logp, reference, length = (
            pair_sums(tokens, against, values, weight.shape[1])
            for values in (tokens.logp, tokens.reference_logp, jnp.ones_like(tokens.logp))
        )
    logps, references, lengths = (sides_of(values, weight) for values in (logp, reference, length))
    if average:
        logps, references = per_token(logps, lengths), per_token(references, lengths)
    return Pairs(
        logp=logps,
        reference=references,
        length=sides_of(inputs.length, weight),
        weight_sum=lengths,
        margin=paired(inputs.pair_margin, weight),
        score=None if inputs.score is None else sides_of(inputs.score, weight),
    )


def tokens_of(inputs: PreferenceInputs) -> Tokens:
    """Raises ValueError where the caller brought sums only."""
    if inputs.tokens is None:
        raise ValueError("this objective weighs single tokens: PreferenceInputs.tokens must be given")
    return inputs.tokens


def members(tokens: Tokens, responses: int) -> jax.Array:
    """Whose slot each is: bool [B, K, T]."""
    return tokens.response[:, None, :] == jnp.arange(responses)[:, None]


def pair_sums(tokens: Tokens, against: jax.Array, values: jax.Array, responses: int) -> jax.Array:
    """[B, K, K]: at [i, j] the sum of weight * against[j] * values over the scored tokens of response i."""
    scored = tokens.weight != 0
    values = jnp.where(scored, tokens.weight * jnp.where(scored, values, 0), 0)
    mine = jnp.where(members(tokens, responses), values[:, None, :], 0)
    # in full: accelerators multiply fp32 in less unless told, and losses are differences of these sums
    return jnp.einsum("bit,bjt->bij", mine, against.astype(mine.dtype), precision=jax.lax.Precision.HIGHEST)


def per_token(values: Sides, length: Sides) -> Sides:
    """Divided by the number of tokens, or the sum of their weights; 0 where there are none."""

    def divided(values: jax.Array, length: jax.Array) -> jax.Array:
        return jnp.where(length > 0, values / jnp.where(length > 0, length, 1), 0)

    return Sides(divided(values.chosen, length.chosen), divided(values.rejected, length.rejected))


def pair_mean(per_pair: jax.Array, inputs: PreferenceInputs) -> jax.Array:
    """The part [] of this micro-batch in the step's weighted mean over pairs of [B, K, K]."""
    return (inputs.pair_weight * per_pair).sum() / inputs.totals.pair_weight


def chosen_nll(logp: jax.Array, pair_weight: jax.Array, totals: StepTotals) -> jax.Array:
    """Token-mean negative log-likelihood [] of the chosen responses, each counted as often as it wins.

    Equal to the mean over the chosen rows of the expanded pairs laid end to end.
    """
    return -(wins(pair_weight) * logp).sum() / totals.chosen_tokens


def nll_of(inputs: PreferenceInputs) -> jax.Array:
    """`chosen_nll` of a micro-batch, every token of weight 1 whatever an objective makes of them."""
    logp = jnp.where(in_some_pair(inputs.pair_weight), inputs.logp, 0)
    return chosen_nll(logp, inputs.pair_weight, inputs.totals)


def loss_and_metrics(
    inputs: PreferenceInputs,
    pairs: Pairs,
    preference: jax.Array,
    *,
    beta: float,
    gamma: float,
    pair_beta: jax.Array | None = None,
    extra: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`preference` [] + gamma * NLL(chosen), and the metrics of every objective over pairs.

    Rewards are shown at the base `beta`, not at `pair_beta` [B, K, K], so that runs whose betas differ can be compared.
    """

    def mean(per_pair: jax.Array) -> jax.Array:
        return pair_mean(per_pair, inputs)

    ratio = pairs.ratio
    z = ratio.difference
    nll = nll_of(inputs)
    pair_beta = jnp.full_like(inputs.pair_weight, beta) if pair_beta is None else pair_beta
    metrics = {
        "rewards/chosen": mean(beta * ratio.chosen),
        "rewards/rejected": mean(beta * ratio.rejected),
        "rewards/margins": mean(beta * z),
        "rewards/accuracies": mean((z > 0).astype(z.dtype)),
        "logps/chosen": mean(pairs.logp.chosen),
        "logps/rejected": mean(pairs.logp.rejected),
        "length/chosen": mean(pairs.length.chosen),
        "length/rejected": mean(pairs.length.rejected),
        "loss/preference": preference,
        "loss/nll": nll,
        "beta/mean": mean(pair_beta),
    }
    return preference + gamma * nll, {**metrics, **(extra or {})}


def sigmoid_loss(z: jax.Array, beta: jax.Array | float, label_smoothing: jax.Array | float = 0.0) -> jax.Array:
    """-(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z) of each pair; shape of `z`."""
    agree = -jax.nn.log_sigmoid(beta * z)
    if isinstance(label_smoothing, int | float) and label_smoothing == 0:
        return agree
    return (1 - label_smoothing) * agree - label_smoothing * jax.nn.log_sigmoid(-beta * z)


def check_common(objective: object, beta: float, gamma: float) -> None:
    check_positive(objective, "beta", beta)
    check_at_least_zero(objective, "gamma", gamma)


def check_positive(objective: object, name: str, value: float) -> None:
    if not (0 < value < math.inf):
        raise ValueError(f"{type(objective).__name__}: {name} must be positive and finite, got {value}")


def check_at_least_zero(objective: object, name: str, value: float) -> None:
    if not (0 <= value < math.inf):
        raise ValueError(f"{type(objective).__name__}: {name} must be at least 0 and finite, got {value}")


def check_label_smoothing(objective: object, value: float) -> None:
    if not 0 <= value < 0.5:
        raise ValueError(f"{type(objective).__name__}: label_smoothing must lie in [0, 0.5), got {value}")


def check_decay(objective: object, name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{type(objective).__name__}: {name} must lie in [0, 1), got {value}")


def check_choice(objective: object, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{type(objective).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}")
