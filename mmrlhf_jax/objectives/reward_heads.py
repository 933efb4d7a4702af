"""What reward heads with more than one output are trained by and read as: attributes, and quantiles of a reward.

Pure functions of a head's outputs. Letters are D attributes, Q quantiles.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def masked_mse(prediction: jax.Array, label: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean [] over labelled attributes of (prediction - label)^2, all [..., D]; mask False = not labelled.

    Source: the multi-objective reward of DPA, https://arxiv.org/abs/2402.18571, whose data sets label different
    attributes. 0 where none is labelled.
    """
    error = jnp.where(mask, prediction - jnp.where(mask, label, 0), 0)
    return (error**2).sum() / jnp.maximum(mask.sum(), 1)


def unit_direction(degrees: float) -> tuple[float, float]:
    """(cos, sin) of an angle: how much each of two attributes counts.

    Source: DPA, https://arxiv.org/abs/2402.18571, of helpfulness and verbosity; there up to 45 degrees to either side.
    """
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def along(direction: jax.Array, attributes: jax.Array) -> jax.Array:
    """The score [...] that attributes [..., D] have in a direction [D] or [..., D]: v . r, source as above."""
    return jnp.einsum("...d,...d->...", attributes, direction, precision=jax.lax.Precision.HIGHEST)


def quantile_levels(quantiles: int) -> jax.Array:
    """tau_q = q / (Q + 1), q = 1..Q: f [Q]."""
    return jnp.arange(1, quantiles + 1) / (quantiles + 1)


def pinball(prediction: jax.Array, label: jax.Array, levels: jax.Array) -> jax.Array:
    """Quantile regression's loss (tau - 1[u < 0]) u, u = label - prediction: prediction [..., Q], label [...].

    Source: https://arxiv.org/abs/2409.10164 (QRM), step 1, for each attribute.
    """
    under = label[..., None] - prediction
    return (levels - (under < 0)) * under


def masked_pinball(prediction: jax.Array, label: jax.Array, levels: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean [] of `pinball` over quantiles and labelled attributes: prediction [..., D, Q], label and mask [..., D]."""
    loss = pinball(jnp.where(mask[..., None], prediction, 0), jnp.where(mask, label, 0), levels).mean(axis=-1)
    return jnp.where(mask, loss, 0).sum() / jnp.maximum(mask.sum(), 1)


def gated_quantiles(quantiles: jax.Array, gate: jax.Array) -> jax.Array:
    """One distribution of D: [..., Q] = sum_d gate[d] quantiles[d], of quantiles [..., D, Q] and gate [..., D].

    Lines that are fitted independently may cross; the sum is sorted, so that it is a distribution's.

    Source: https://arxiv.org/abs/2409.10164, step 2.
    """
    return jnp.sort(jnp.einsum("...d,...dq->...q", gate, quantiles, precision=jax.lax.Precision.HIGHEST), axis=-1)


def expected(quantiles: jax.Array) -> jax.Array:
    """The reward [...] as the mean of a distribution's quantiles [..., Q]."""
    return quantiles.mean(axis=-1)


def conditional_value_at_risk(quantiles: jax.Array, alpha: float) -> jax.Array:
    """Mean [...] of the lowest share `alpha` of a distribution given by equally likely quantiles [..., Q].

    A share that ends within a quantile takes that part of it; 1 is the mean. Raises ValueError outside (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
    count = quantiles.shape[-1]
    part = jnp.clip(alpha * count - jnp.arange(count), 0, 1)
    return (jnp.sort(quantiles, axis=-1) * part).sum(axis=-1) / part.sum()


def exponential_utility(quantiles: jax.Array, aversion: float) -> jax.Array:
    """Certainty equivalent [...] under U(r) = -exp(-aversion r): -log mean exp(-aversion r) / aversion.

    Between mean (aversion towards 0) and minimum (towards infinity). Raises ValueError for an aversion that is not
    positive.
    """
    if not aversion > 0:
        raise ValueError(f"aversion must be positive, got {aversion}")
    mean = jax.nn.logsumexp(-aversion * quantiles, axis=-1) - jnp.log(quantiles.shape[-1])
    return -mean / aversion


def expected_utility(quantiles: jax.Array, aversion: float) -> jax.Array:
    """Mean [...] of the concave U(r) = -exp(-aversion r), risk-aware training's reward.

    Source: https://arxiv.org/abs/2409.10164, section on risk-aware policies; the utility's form is ours.
    """
    return -jnp.exp(-aversion * quantiles).mean(axis=-1)
