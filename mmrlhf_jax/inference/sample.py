"""Choosing the next token from logits: greedy, or drawn after temperature, top-k and top-p.

A branch's random numbers hang on the run's seed, its request's name, its response, its sample number and how many of
its tokens stand before, and on nothing else: not on who else is decoded, where, or in what order.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class SamplingConfig:
    """What is drawn. The order is temperature, top-k, top-p, and each means what it does in transformers, except that
    tokens as likely as the last one kept by top-p are all kept."""

    max_new_tokens: int = 512
    """a branch that has not ended by then is given as it stands; the token that ends it counts"""
    temperature: float = 0.0
    """logits are divided by it; 0: the likeliest token, always"""
    top_k: int = 0
    """only the this many likeliest tokens; 0: all"""
    top_p: float = 1.0
    """only the fewest likeliest tokens whose probabilities reach this sum; 1: all"""
    seed: int = 0
    """other answers for another seed, the same for the same"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be a number from 0 (greedy) on")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p choose among tokens to draw from, temperature 0 draws nothing: set one")


def request_key(seed: int, name: str) -> np.ndarray:
    """u32 [2]: where the random numbers of a request begin."""
    return np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], np.uint32)


def branch_keys(request: jax.Array, response: jax.Array, sample: jax.Array, age: jax.Array) -> jax.Array:
    """Keys [B, W] for request u32 [B, 2] and, i32 [B, W] each, response, sample number and tokens so far."""

    def one(data: jax.Array, *places: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        for place in places:
            key = jax.random.fold_in(key, place)
        return key

    return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0, 0)))(request, response, sample, age)


def pick(logits: jax.Array, key: jax.Array | None, config: SamplingConfig) -> jax.Array:
    """The next token i32 [...] for logits f32 [..., V] and keys [...]; greedy needs no keys."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert key is not None
    kept = warp(logits, config)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(key.reshape(-1))
    return jnp.argmax(kept + noise.reshape(logits.shape), axis=-1).astype(jnp.int32)


def warp(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """The logits f32 [..., V] that are drawn from, the highest 0: divided by the temperature, -inf where ruled out."""
    # shifted first: a small temperature must not make an infinity of the likeliest
    x = (logits - jnp.max(logits, axis=-1, keepdims=True)) / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        x = _likeliest(x, jnp.ones_like(x), jnp.float32(config.top_k))
    if config.top_p < 1:
        weight = jnp.exp(x)
        x = _likeliest(x, weight, config.top_p * jnp.sum(weight, axis=-1))
    return x


def _likeliest(x: jax.Array, weight: jax.Array, most: jax.Array) -> jax.Array:
    """x where the weights of all tokens that are likelier sum to less than `most`, else -inf.

    No sort: that sum falls as a threshold on x rises, so the least threshold at which it is below `most` is found by
    bisection. Mapped to unsigned integers in the order of the floats, thresholds have 32 bits, settled from the highest
    down: 32 masked sums over the vocabulary, and the result is exact.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def settle(i: jax.Array, threshold: jax.Array) -> jax.Array:
        bit = jnp.uint32(1 << 31) >> i.astype(jnp.uint32)
        highest = threshold | (bit - 1)  # of the thresholds that leave this bit 0
        above = jnp.sum(jnp.where(order > highest[..., None], weight, 0.0), axis=-1)
        return jnp.where(above < most, threshold, threshold | bit)

    threshold = jax.lax.fori_loop(0, 32, settle, jnp.zeros(x.shape[:-1], jnp.uint32))
    return jnp.where(order >= threshold[..., None], x, -jnp.inf)
