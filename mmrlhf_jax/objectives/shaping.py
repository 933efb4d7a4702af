"""Rewards made of counts, and what is made of rewards that come a token at a time. Pure functions.

The trainer has no objective of its own for either: scores made here are stored or mapped like any others (`--map
score=...`), and advantages are for whoever trains a policy on `TokenwiseReward`'s scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def claim_score(supported: jax.Array, claims: jax.Array, enough: float = 10.0) -> jax.Array:
    """FactScore [...]: the share of an answer's claims that are supported, times `length_penalty`; 0 without claims.

    Source: FActScore, https://arxiv.org/abs/2305.14251, the reward of https://arxiv.org/abs/2311.08401.
    """
    return supported / jnp.maximum(claims, 1) * length_penalty(claims, enough)


def length_penalty(claims: jax.Array, enough: float = 10.0) -> jax.Array:
    """exp(1 - enough / n) [...] for answers of n <= enough claims, else 1; 0 for those that claim nothing.

    Raises ValueError where `enough` is not positive.
    """
    if not enough > 0:
        raise ValueError(f"enough must be positive, got {enough}")
    few = (claims > 0) & (claims <= enough)
    return jnp.where(few, jnp.exp(1 - enough / jnp.where(few, claims, enough)), claims > 0)


def generalised_advantages(reward: jax.Array, value: jax.Array, discount: float, decay: float) -> jax.Array:
    """GAE [..., T]: A_t = d_t + discount decay A_(t+1), d_t = r_t + discount v_(t+1) - v_t; nothing comes after T.

    `reward` and `value` f [..., T]. Source: https://arxiv.org/abs/1506.02438, equations 11 and 16.
    """
    error = reward + discount * jnp.concatenate([value[..., 1:], jnp.zeros_like(value[..., :1])], axis=-1) - value

    def back(after: jax.Array, here: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = here + discount * decay * after
        return advantage, advantage

    _, found = jax.lax.scan(back, jnp.zeros_like(error[..., 0]), jnp.moveaxis(error, -1, 0), reverse=True)
    return jnp.moveaxis(found, 0, -1)
