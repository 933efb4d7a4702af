"""Chunked log-probabilities equal the plain ones in value, entropy and gradient, whatever the chunks and shards."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrlhf_jax.nn.token_logps import token_logps

VOCAB, EMBED = 300, 16
HIDDEN = np.random.default_rng(0).normal(size=(2, 5, EMBED)).astype(np.float32)
TABLE = np.random.default_rng(1).normal(size=(VOCAB, EMBED)).astype(np.float32)
TARGET = np.random.default_rng(2).integers(0, VOCAB, (2, 5)).astype(np.int32)
TARGET[0, 0], TARGET[1, 4] = 0, VOCAB - 1
SLOPE = np.random.default_rng(3).normal(size=(2, 5)).astype(np.float32)


def plain(hidden, table):
    return jax.nn.log_softmax(jnp.einsum("bsd,vd->bsv", hidden, table, precision="highest"))


def plain_logps(hidden, table):
    return jnp.take_along_axis(plain(hidden, table), TARGET[..., None], -1)[..., 0]


# one chunk; chunks that divide; a count raised until it divides; none that divides, so rows are padded; one row a chunk
@pytest.mark.parametrize(("chunk", "shards"), [(8192, 1), (100, 1), (64, 2), (37, 4), (299, 1), (1, 1)])
def test_chunks_and_shards_change_nothing(chunk, shards):
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes time
    def ours(hidden, table):
        out, pull = jax.vjp(lambda h, w: token_logps(h, w, TARGET, chunk=chunk, shards=shards), hidden, table)
        return out, pull(type(out)(jnp.asarray(SLOPE), jnp.zeros_like(SLOPE)))

    out, (grad_hidden, grad_table) = ours(HIDDEN, TABLE)
    logits = plain(HIDDEN, TABLE)
    np.testing.assert_allclose(out.logp, plain_logps(HIDDEN, TABLE), atol=1e-5)
    np.testing.assert_allclose(out.entropy, -(jnp.exp(logits) * logits).sum(-1), atol=5e-5)
    wanted = jax.grad(lambda h, w: (plain_logps(h, w) * SLOPE).sum(), (0, 1))(HIDDEN, TABLE)
    np.testing.assert_allclose(grad_hidden, wanted[0], atol=1e-5)
    np.testing.assert_allclose(grad_table, wanted[1], atol=1e-5)


def test_the_entropy_carries_no_gradient():
    gradient = jax.grad(lambda hidden: token_logps(hidden, TABLE, TARGET, chunk=64).entropy.sum())(HIDDEN)
    assert not np.asarray(gradient).any()


def test_huge_logits_stay_finite():
    """exp(1e4) is no number: the running maximum must carry it, also when it grows from chunk to chunk."""
    table = TABLE * np.linspace(1, 1e4, VOCAB, dtype=np.float32)[:, None]
    logp, entropy = token_logps(HIDDEN, table, TARGET, chunk=50)
    np.testing.assert_allclose(logp, plain_logps(HIDDEN, table), rtol=1e-5, atol=0.1)
    assert np.isfinite(np.asarray(entropy)).all()


def test_bf16_inputs_lose_nothing_in_the_sum():
    """A thousand equal logits: the log-sum-exp must be fp32 however coarse the inputs."""
    hidden, table = jnp.ones((1, 1, 2), jnp.bfloat16), jnp.ones((1000, 2), jnp.bfloat16)
    logp, entropy = token_logps(hidden, table, jnp.zeros((1, 1), jnp.int32), chunk=7)
    assert logp.dtype == jnp.float32
    assert float(logp[0, 0]) == pytest.approx(-np.log(1000), abs=1e-5)
    assert float(entropy[0, 0]) == pytest.approx(np.log(1000), abs=1e-5)


def test_no_array_of_all_logits_is_ever_made():
    vocab, tokens, chunk = 4096, 64, 128
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, tokens, EMBED), (vocab, EMBED))]
    target = jnp.zeros((1, tokens), jnp.int32)

    def temporary(function) -> int:
        gradient = jax.jit(jax.grad(lambda h, w: function(h, w).sum(), (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole = temporary(lambda h, w: jnp.take_along_axis(plain(h, w), target[..., None], -1))
    chunked = temporary(partial(lambda h, w, c: token_logps(h, w, target, chunk=c).logp, c=chunk))
    assert whole >= vocab * tokens * 4
    assert chunked < vocab * tokens * 4 / 2
