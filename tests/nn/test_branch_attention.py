"""A new token of a branch sees prompt, its own prefix, its own past and itself: against attention with a dense mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mmrlhf_jax.nn.branch_attention import BranchCache, branch_attention, branch_rule

B, W, N, G, H, C, T = 2, 3, 4, 2, 8, 11, 5


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(q, k, v, keys, values, seen) -> np.ndarray:
    """One branch, in fp64: q [N, H] over keys [S, G, H] where seen [S], and itself."""
    keys = np.concatenate([keys[seen], k[None]]).astype(np.float64).repeat(N // G, axis=1)
    values = np.concatenate([values[seen], v[None]]).repeat(N // G, axis=1)
    scores = np.einsum("nh,snh->ns", q, keys) / np.sqrt(H)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ns,snh->nh", weight / weight.sum(-1, keepdims=True), values)


def test_branches_see_what_a_dense_mask_says_while_the_ring_turns():
    q, k, v = draw(B, W, N, H, seed=1) * 3, draw(B, W, G, H, seed=2), draw(B, W, G, H, seed=3)
    cache = BranchCache(*(draw(B, G, C, H, seed=s) for s in (4, 5)), *(draw(B, G, W, T, H, seed=s) for s in (6, 7)))
    prefix_branch = np.array([[-1] * 4 + [2] * 2 + [0, 0, 1, 1, 2]] * B)  # two slots of padding: K = 2
    response = np.array([[0, 1, 1], [1, 0, 0]])
    age = np.array([[0, T - 1, 2], [3, 1, 0]])
    step = jax.jit(lambda now: branch_attention(q, k, v, cache, branch_rule(age, response, age, now, prefix_branch, T)))
    for now in (3, 4, 5, 12):
        found = step(jnp.int32(now))
        for b in range(B):
            for w in range(W):
                own = [(now - back) % T for back in range(1, age[b, w] + 1)]
                keys = np.concatenate([cache.prefix_key[b], cache.own_key[b, :, w]], axis=1).swapaxes(0, 1)
                values = np.concatenate([cache.prefix_value[b], cache.own_value[b, :, w]], axis=1).swapaxes(0, 1)
                seen = np.concatenate([np.isin(prefix_branch[b], (-1, response[b, w])), np.isin(np.arange(T), own)])
                wanted = dense(q[b, w], k[b, w], v[b, w], keys, values, seen)
                np.testing.assert_allclose(found[b, w], wanted, atol=2e-6)


def test_what_sees_nothing_else_sees_itself():
    cache = BranchCache(*[jnp.ones((1, G, C, H))] * 2, *[jnp.ones((1, G, 1, T, H))] * 2)
    rule = branch_rule(*jnp.zeros((3, 1, 1), jnp.int32), jnp.int32(0), jnp.full((1, C), 2), T)
    v = draw(1, 1, G, H, seed=0)
    found = branch_attention(draw(1, 1, N, H, seed=1), draw(1, 1, G, H, seed=2), v, cache, rule)
    np.testing.assert_allclose(found, v.repeat(N // G, axis=2), rtol=1e-6)
