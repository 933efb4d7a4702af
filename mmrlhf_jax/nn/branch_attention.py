"""Attention of one new token a branch: to its group's prompt and forced prefix, to its own past, to itself.

Branches of a group share the keys of the prompt, which are never copied: for the prefix, a key head's query heads and
the branches are the rows of one matrix product, so that the prefix is read once for all of them. The three parts are
never concatenated either: one softmax is taken over their scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

MASKED = -1e30  # finite, so that what sees nothing of a part gets weight 0, not NaN


@struct.dataclass
class BranchCache:
    """Keys and values W branches of each of B groups see, of one layer; a leading layers axis where stacked.

    prefix_key, prefix_value [B, G, C, H] are shared by a group's branches; own_key, own_value [B, G, W, T, H] are not.
    Heads stand before tokens: no product needs a transpose.
    """

    prefix_key: jax.Array
    prefix_value: jax.Array
    own_key: jax.Array
    own_value: jax.Array


@struct.dataclass
class BranchRule:
    """Who may look at what: `position` i32 [B, W] of the new tokens, and 0 or MASKED to add to the scores of the
    prefix f32 [B, W, C] and of the own past f32 [B, W, T]."""

    position: jax.Array
    prefix: jax.Array
    own: jax.Array


def branch_rule(
    position: jax.Array, response: jax.Array, age: jax.Array, now: jax.Array, prefix_branch: jax.Array, columns: int
) -> BranchRule:
    """A branch of response `response` i32 [B, W] sees the prefix where `prefix_branch` i32 [B, C] is -1 or its own.

    The own past is a ring of `columns` that all branches write in lock step, column `now` modulo `columns` next (`now`
    i32 []): one that is `age` i32 [B, W] tokens old sees the last `age` columns, age < columns.
    """
    seen = (prefix_branch[:, None] == -1) | (prefix_branch[:, None] == response[:, :, None])
    behind = jnp.mod(now - jnp.arange(columns), columns)  # steps since a column was written; 0: the one written next
    past = (behind > 0) & (behind <= age[:, :, None])
    return BranchRule(position, jnp.where(seen, 0.0, MASKED), jnp.where(past, 0.0, MASKED))


def branch_attention(q: jax.Array, k: jax.Array, v: jax.Array, cache: BranchCache, rule: BranchRule) -> jax.Array:
    """q [B, W, N, H] and the new tokens' own k, v [B, W, G, H], N a multiple of G -> [B, W, N, H]. Softmax in fp32."""
    batch, width, heads, dim = q.shape
    groups, shared = k.shape[2], heads // k.shape[2]
    q = (q * dim**-0.5).reshape(batch, width, groups, shared, dim).transpose(0, 2, 1, 3, 4)  # [B, G, W, N/G, H]
    rows = q.reshape(batch, groups, width * shared, dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, G, W, H]

    prefix = jnp.einsum("bgmh,bgch->bgmc", rows, cache.prefix_key, preferred_element_type=jnp.float32)
    prefix = prefix.reshape(batch, groups, width, shared, -1) + rule.prefix[:, None, :, None]
    own = jnp.einsum("bgwnh,bgwth->bgwnt", q, cache.own_key, preferred_element_type=jnp.float32)
    own = own + rule.own[:, None, :, None]
    new = jnp.einsum("bgwnh,bgwh->bgwn", q, k, preferred_element_type=jnp.float32)[..., None]

    peak = jnp.maximum(jnp.maximum(jnp.max(prefix, -1, keepdims=True), jnp.max(own, -1, keepdims=True)), new)
    prefix, own, new = jnp.exp(prefix - peak), jnp.exp(own - peak), jnp.exp(new - peak)
    total = jnp.sum(prefix, -1, keepdims=True) + jnp.sum(own, -1, keepdims=True) + new

    weight = prefix.astype(v.dtype).reshape(batch, groups, width * shared, -1)
    out = jnp.einsum("bgmc,bgch->bgmh", weight, cache.prefix_value, preferred_element_type=jnp.float32)
    out = out.reshape(batch, groups, width, shared, dim)
    out += jnp.einsum("bgwnt,bgwth->bgwnh", own.astype(v.dtype), cache.own_value, preferred_element_type=jnp.float32)
    out = (out + new * v[:, :, :, None].astype(jnp.float32)) / total
    return out.astype(v.dtype).transpose(0, 2, 1, 3, 4).reshape(batch, width, heads, dim)
