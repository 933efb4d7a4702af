"""What a token counts for when its response is compared with another: weights [B, K, T] for `pairs_of`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmrlhf_jax.objectives.pairs import Tokens, members


def beyond_shorter(tokens: Tokens, responses: int, alpha: float) -> jax.Array:
    """LD-DPO's weights f32 [B, K, T]: 1 up to the length of the response compared with, `alpha` beyond it.

    Source: https://arxiv.org/abs/2409.06411.
    """
    scored = members(tokens, responses) & (tokens.weight != 0)[:, None, :]
    place = _own(jnp.cumsum(scored, axis=-1), scored)  # counts from 1
    shared = place[:, None, :] <= scored.sum(axis=-1)[:, :, None]
    return jnp.where(shared, 1.0, alpha)


def from_divergence(tokens: Tokens, responses: int) -> jax.Array:
    """Bool [B, K, T]: the tokens of a response from the first on that differs from the response compared with, or that
    the other no longer has. A response that is a prefix of the other has none.

    Source: https://arxiv.org/abs/2405.00451, whose step-level loss starts where two branches of the tree part.
    """
    member = members(tokens, responses)
    place = places(member)
    first = first_divergence(tokens, member, place)
    mine = jnp.sum(jnp.where(member[:, None, :, :], first[:, :, :, None], 0), axis=2)  # [B, j, T]
    return (place[:, None, :] >= mine) & member.any(axis=1)[:, None, :]


def first_divergence(tokens: Tokens, member: jax.Array, place: jax.Array) -> jax.Array:
    """Where responses part, i32 [B, K, K]: at [j, i] the place of response i's first token that response j does not
    have there; T where j has all of them."""
    count, start, slots = member.sum(axis=-1), jnp.argmax(member, axis=-1), tokens.token.shape[-1]
    at = jnp.minimum(start[:, :, None] + place[:, None, :], slots - 1)
    other = jnp.take_along_axis(jnp.broadcast_to(tokens.token[:, None, :], at.shape), at, axis=-1)
    same = (other == tokens.token[:, None, :]) & (place[:, None, :] < count[:, :, None])
    departs = jnp.where(same, slots, place[:, None, :])  # [B, j, T]
    return jnp.min(jnp.where(member[:, None, :, :], departs[:, :, None, :], slots), axis=-1)


def places(member: jax.Array) -> jax.Array:
    """Place of each slot within its response, i32 [B, T], counted from 0; -1 for padding."""
    return _own(jnp.cumsum(member, axis=-1), member) - 1


def _own(values: jax.Array, member: jax.Array) -> jax.Array:
    """[B, K, T] -> [B, T]: at each slot the value of the response whose it is, 0 for padding."""
    return jnp.sum(jnp.where(member, values, 0), axis=1)
