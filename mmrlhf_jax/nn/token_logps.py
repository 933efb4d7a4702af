"""Log-probabilities of given tokens without ever holding the logits of a batch.

The vocabulary is walked in chunks: each chunk's logits are a matrix product accumulated in fp32 whose maximum, sum of
exponentials and target entry are folded into running values, then thrown away and computed again in the backward pass.
DPO's loss is a difference of sums of these numbers, so the log-sum-exp is fp32 throughout.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLogps(NamedTuple):
    """`logp` f32 [B, S] of the targets; `entropy` f32 [B, S] of the predicted distributions, without gradient."""

    logp: jax.Array
    entropy: jax.Array


def token_logps(
    hidden: jax.Array, unembed: jax.Array, target: jax.Array, *, chunk: int = 8192, shards: int = 1
) -> TokenLogps:
    """log p(target) under softmax(hidden @ unembed.T), in nats.

    hidden [B, S, D] (already normalised), unembed [V, D] of the same dtype, target i32 [B, S] in [0, V). `chunk` bounds
    the vocabulary rows whose logits exist at once; `shards` is how many devices split the vocabulary axis, so that a
    chunk takes an equal part from each of them. Temporary memory: B * S * chunk * 4 bytes.
    """
    vocab = unembed.shape[0]
    table, token = _split(unembed, chunk, shards)
    logp, entropy = _chunked(hidden, table, target, token, vocab)
    return TokenLogps(logp, jax.lax.stop_gradient(entropy))


def log_collisions(hidden: jax.Array, unembed: jax.Array, *, chunk: int = 8192, shards: int = 1) -> jax.Array:
    """log sum_v p(v)^2 f32 [B, S] under softmax(hidden @ unembed.T): how likely two draws are the same token. Without
    gradient; arguments and memory as in `token_logps`, and a pass over the vocabulary of its own."""
    vocab, hidden = unembed.shape[0], jax.lax.stop_gradient(hidden)
    table, token = _split(jax.lax.stop_gradient(unembed), chunk, shards)

    def fold(carry, chunk):
        peak, total, squares = carry
        rows, ids = chunk
        logits = _logits(hidden, rows, ids, vocab)
        higher = jnp.maximum(peak, jnp.max(logits, axis=(-2, -1)))
        shrink = jnp.exp(peak - higher)
        weight = jnp.exp(logits - higher[..., None, None])
        return (
            higher,
            total * shrink + jnp.sum(weight, axis=(-2, -1)),
            squares * shrink**2 + jnp.sum(weight**2, axis=(-2, -1)),
        ), None

    zero = jnp.zeros(hidden.shape[:-1], jnp.float32)
    (_, total, squares), _ = jax.lax.scan(fold, (jnp.full_like(zero, -1e30), zero, zero), (table, token))
    return jnp.log(squares) - 2 * jnp.log(total)


def summed_distribution(
    hidden: jax.Array, unembed: jax.Array, weight: jax.Array, *, chunk: int = 8192, shards: int = 1
) -> jax.Array:
    """sum over tokens of weight * p f32 [V], p = softmax(hidden @ unembed.T), with gradient.

    `weight` f32 [B, S]; where it is 0 hidden states may be anything. Other arguments and memory as in `token_logps`;
    two passes over the vocabulary, each computed again in the backward pass.
    """
    vocab = unembed.shape[0]
    table, token = _split(unembed, chunk, shards)
    hidden = jnp.where(weight[..., None] != 0, hidden, 0)

    @jax.checkpoint
    def fold(carry, chunk):
        peak, total = carry
        rows, ids = chunk
        logits = _logits(hidden, rows, ids, vocab)
        higher = jnp.maximum(peak, jax.lax.stop_gradient(jnp.max(logits, axis=(-2, -1))))
        weights = jnp.exp(logits - higher[..., None, None])
        return (higher, total * jnp.exp(peak - higher) + jnp.sum(weights, axis=(-2, -1))), None

    zero = jnp.zeros(weight.shape, jnp.float32)
    (peak, total), _ = jax.lax.scan(fold, (jnp.full_like(zero, -1e30), zero), (table, token))
    normaliser = peak + jnp.log(total)

    @jax.checkpoint
    def spread(_, chunk):
        rows, ids = chunk
        probability = jnp.exp(_logits(hidden, rows, ids, vocab) - normaliser[..., None, None])
        return None, jnp.einsum("bskr,bs->kr", probability, weight, precision=jax.lax.Precision.HIGHEST)

    _, parts = jax.lax.scan(spread, None, (table, token))  # [chunks, shards, rows]
    return parts.swapaxes(0, 1).reshape(-1)[:vocab]


def _split(unembed: jax.Array, chunk: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """The table [chunks, shards, rows, D], and which token each of its rows unembeds, i32 [chunks, shards, rows]."""
    vocab = unembed.shape[0]
    least = -(-vocab // chunk)
    # a count that divides the vocabulary saves a padded copy of the whole table
    chunks = next((n for n in range(least, 2 * least) if vocab % (n * shards) == 0), least)
    rows = -(-vocab // (shards * chunks))  # of one chunk on one shard
    padded = shards * chunks * rows
    if padded != vocab:
        unembed = jnp.pad(unembed, ((0, padded - vocab), (0, 0)))
    # [chunks, shards, rows, D]: scanning over chunks leaves every shard's rows where they are
    table = unembed.reshape(shards, chunks, rows, -1).swapaxes(0, 1)
    first = (jnp.arange(chunks) * rows)[:, None] + jnp.arange(shards) * chunks * rows
    return table, first[:, :, None] + jnp.arange(rows)


def _logits(hidden: jax.Array, rows: jax.Array, token: jax.Array, vocab: int) -> jax.Array:
    logits = jnp.einsum("bsd,krd->bskr", hidden, rows, preferred_element_type=jnp.float32)
    return jnp.where(token < vocab, logits, -jnp.inf)  # rows beyond the vocabulary are padding


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden, table, target, token, vocab):
    return _forward(hidden, table, target, token, vocab)[0]


def _forward(hidden, table, target, token, vocab):
    def fold(carry, chunk):
        peak, total, moment, found = carry
        rows, ids = chunk
        logits = _logits(hidden, rows, ids, vocab)
        higher = jnp.maximum(peak, jnp.max(logits, axis=(-2, -1)))
        shrink = jnp.exp(peak - higher)
        weight = jnp.exp(logits - higher[..., None, None])
        finite = jnp.where(ids < vocab, logits, 0.0)
        hit = ids == target[..., None, None]
        return (
            higher,
            total * shrink + jnp.sum(weight, axis=(-2, -1)),
            moment * shrink + jnp.sum(weight * finite, axis=(-2, -1)),
            found + jnp.sum(jnp.where(hit, finite, 0.0), axis=(-2, -1)),
        ), None

    zero = jnp.zeros(target.shape, jnp.float32)
    start = (jnp.full(target.shape, -1e30, jnp.float32), zero, zero, zero)
    (peak, total, moment, found), _ = jax.lax.scan(fold, start, (table, token))
    normaliser = peak + jnp.log(total)
    return (found - normaliser, normaliser - moment / total), (hidden, table, target, token, normaliser)


def _backward(vocab, saved, cotangents):
    hidden, table, target, token, normaliser = saved
    slope, _ = cotangents  # the entropy carries no gradient

    def unfold(grad_hidden, chunk):
        rows, ids = chunk
        logits = _logits(hidden, rows, ids, vocab)
        probability = jnp.exp(logits - normaliser[..., None, None])
        hit = (ids == target[..., None, None]).astype(jnp.float32)
        grad_logits = (slope[..., None, None] * (hit - probability)).astype(hidden.dtype)
        grad_hidden += jnp.einsum("bskr,krd->bsd", grad_logits, rows, preferred_element_type=jnp.float32)
        grad_rows = jnp.einsum("bskr,bsd->krd", grad_logits, hidden, preferred_element_type=jnp.float32)
        return grad_hidden, grad_rows.astype(rows.dtype)

    grad_hidden, grad_table = jax.lax.scan(unfold, jnp.zeros(hidden.shape, jnp.float32), (table, token))
    return grad_hidden.astype(hidden.dtype), grad_table, None, None


_chunked.defvjp(_forward, _backward)
