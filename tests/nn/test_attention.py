"""Group attention equals a dense mask; the choice of its backend is a pure function that refuses with reasons."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrlhf_jax.nn import attention
from mmrlhf_jax.nn.attention import GroupRule, choose_backend, group_attention

# --- which backend ------------------------------------------------------------------------------------------------

SERVES = [  # asked, platform, prompt slots, head size -> what runs
    ("auto", "cpu", 128, 64, "xla"),
    ("auto", "gpu", 128, 64, "cudnn"),
    ("auto", "gpu", 100, 128, "cudnn"),
    ("auto", "gpu", 128, 72, "cudnn"),
    ("auto", "gpu", 128, 100, "xla"),  # not a multiple of 8
    ("auto", "gpu", 128, 256, "xla"),  # larger than 128
    ("auto", "tpu", 256, 128, "splash"),
    ("auto", "tpu", 200, 128, "xla"),  # not a multiple of the block
    ("auto", "another", 128, 64, "xla"),
    ("xla", "cpu", 1, 1, "xla"),
    ("xla", "gpu", 128, 64, "xla"),
    ("xla", "tpu", 128, 64, "xla"),
    ("cudnn", "gpu", 128, 64, "cudnn"),
    ("splash", "tpu", 128, 64, "splash"),
]
REFUSES = [
    ("cudnn", "cpu", 128, 64, "needs a GPU, this is cpu"),
    ("cudnn", "tpu", 128, 64, "needs a GPU, this is tpu"),
    ("cudnn", "gpu", 128, 100, "multiples of 8 up to 128, not 100"),
    ("cudnn", "gpu", 128, 256, "multiples of 8 up to 128, not 256"),
    ("splash", "cpu", 128, 64, "needs a TPU, this is cpu"),
    ("splash", "gpu", 128, 64, "needs a TPU, this is gpu"),
    ("splash", "tpu", 200, 64, "multiples of 128, not 200"),
]


@pytest.mark.parametrize(("asked", "platform", "prompt", "head_dim", "runs"), SERVES)
def test_the_backend_that_runs(asked, platform, prompt, head_dim, runs):
    assert choose_backend(asked, platform, prompt, head_dim) == runs


@pytest.mark.parametrize(("asked", "platform", "prompt", "head_dim", "reason"), REFUSES)
def test_a_backend_asked_for_by_name_that_cannot_serve_is_refused(asked, platform, prompt, head_dim, reason):
    with pytest.raises(ValueError, match=rf"attention backend '{asked}': .*{reason}; ask for 'auto' or 'xla'"):
        choose_backend(asked, platform, prompt, head_dim)


def test_the_forward_itself_refuses():
    x, rule = jnp.zeros((1, 4, 1, 8)), GroupRule(*jnp.zeros((2, 1, 4), jnp.int32), jnp.ones(1, jnp.int32), prompt=2)
    with pytest.raises(ValueError, match="needs a GPU, this is cpu"):
        group_attention(x, x, x, rule, backend="cudnn", platform="cpu")


# --- what it computes ---------------------------------------------------------------------------------------------

PROMPT, LENGTH = 13, 24
BRANCHES = [(13, (4, 6)), (5, (1, 1, 9)), (7, (11,)), (0, ())]  # prompt tokens, branch tokens; the last is filler
PADDING = 9


def rule_of() -> tuple[GroupRule, np.ndarray]:
    """(the rule, seen [B, T, T] in so many words)."""
    position = np.zeros((len(BRANCHES), LENGTH), np.int32)
    position[:, :PROMPT] = np.arange(PROMPT)
    branch = np.full((len(BRANCHES), LENGTH), PADDING, np.int32)
    for b, (prompt, lengths) in enumerate(BRANCHES):
        branch[b, :prompt] = -1
        at = PROMPT
        for k, length in enumerate(lengths):
            branch[b, at : at + length] = k
            position[b, at : at + length] = prompt + np.arange(length)
            at += length
    seen = np.zeros((len(BRANCHES), LENGTH, LENGTH), bool)
    for b, q, k in np.ndindex(seen.shape):
        mine = branch[b, k] in (-1, branch[b, q]) and branch[b, k] != PADDING
        seen[b, q, k] = mine and position[b, k] <= position[b, q]
    lengths = np.array([prompt for prompt, _ in BRANCHES], np.int32)
    return GroupRule(jnp.asarray(position), jnp.asarray(branch), jnp.asarray(lengths), prompt=PROMPT), seen


def dense(q, k, v, seen):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weight = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", weight, v)


@pytest.mark.parametrize(("block", "tiers"), [(512, 4), (4, 100), (2, 4), (5, 1)])
def test_blocks_and_tiers_equal_a_dense_mask(monkeypatch, block, tiers):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention, "TIERS", tiers)
    rule, seen = rule_of()
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(len(BRANCHES), LENGTH, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    slope = rng.normal(size=q.shape).astype(np.float32)
    real = (np.asarray(rule.branch) != PADDING)[..., None, None]

    def value_and_gradients(function):
        return jax.value_and_grad(lambda *x: (jnp.where(real, function(*x), 0) * slope).sum(), (0, 1, 2))(q, k, v)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what takes time
    def both():
        ours = value_and_gradients(lambda *x: group_attention(*x, rule, backend="xla", platform="cpu"))
        return ours, value_and_gradients(lambda *x: dense(*x, seen))

    ours, wanted = both()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, wanted)


def test_padding_stays_finite():
    rule, _ = rule_of()
    x = jnp.ones((len(BRANCHES), LENGTH, 2, 8))
    attend = jax.jit(partial(group_attention, rule=rule, backend="xla", platform="cpu"))
    assert np.isfinite(np.asarray(attend(x, x, x))).all()


# --- what accelerators run, as far as a CPU can say -----------------------------------------------------------------


def long_rule(prompt: int, lengths: list[int]) -> GroupRule:
    """Prompts of `lengths` in `prompt` slots, two answers of 20 and 9 tokens behind each."""
    position, branch = (np.zeros((len(lengths), prompt + 32), np.int32) for _ in range(2))
    branch[:] = PADDING
    position[:, :prompt] = np.arange(prompt)
    for row, length in enumerate(lengths):
        branch[row, :length] = -1
        for k, (start, count) in enumerate([(0, 20), (20, 9)]):
            at = slice(prompt + start, prompt + start + count)
            position[row, at], branch[row, at] = length + np.arange(count), k
    return GroupRule(jnp.asarray(position), jnp.asarray(branch), jnp.asarray(lengths, jnp.int32), prompt=prompt)


def interpreted_splash(monkeypatch):
    """The TPU kernel itself, its program run by pallas' interpreter."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    monkeypatch.setattr(splash, "make_splash_mha_single_device", partial(splash.make_splash_mha, interpret=True,
                        head_shards=1, q_seq_shards=1))  # fmt: skip


def cudnn_by_xla(monkeypatch):
    """What is asked of cuDNN, answered by jax's own form of the same function."""
    asked = jax.nn.dot_product_attention

    def answer(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return asked(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)


@pytest.mark.parametrize(
    ("backend", "platform", "stand_in", "head_dim"),
    [("splash", "tpu", interpreted_splash, 64), ("splash", "tpu", interpreted_splash, 128),
     ("cudnn", "gpu", cudnn_by_xla, 64)],
)  # fmt: skip
def test_what_accelerators_run_equals_xla_forward_and_backward(monkeypatch, backend, platform, stand_in, head_dim):
    stand_in(monkeypatch)
    rule = long_rule(256, [256, 131])
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 288, heads, head_dim)).astype(np.float32) for heads in (4, 2, 2))
    slope = rng.normal(size=q.shape).astype(np.float32)
    real = (np.asarray(rule.branch) != PADDING)[..., None, None]

    def value_and_gradients(backend, platform):
        def total(*x):
            return (jnp.where(real, group_attention(*x, rule, backend=backend, platform=platform), 0) * slope).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    ours, wanted = value_and_gradients(backend, platform), value_and_gradients("xla", "cpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), ours, wanted)
