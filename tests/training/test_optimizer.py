"""What the optimizer does to a parameter depends on its name, and on nothing else about it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_params

from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.training.recipe import OptimizerConfig, PartRates, Recipe
from mmrlhf_jax.training.state import make_optimizer


def test_norms_and_biases_do_not_decay_and_all_else_does():
    """As transformers' Trainer has it: with no gradient at all, decay alone moves a parameter."""
    params = random_params()
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup=0.0, weight_decay=0.1, rates=PartRates(tower=1.0)
    )
    optimizer = make_optimizer(config, steps=1)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    still = {name for name, update in named_leaves(updates) if not jnp.any(update)}
    assert still == {name for name, _ in named_leaves(params) if "norm" in name or name.endswith("bias")}
    assert {"newline", "tower.position", "decoder.embedding", "decoder.unembedding"}.isdisjoint(still)


def factored_by_hand(gradients: list[np.ndarray], rate: float, b1: float) -> np.ndarray:
    """Adafactor's update (arXiv 1804.04235, algorithm 4 with the decay of its section 7.2 and clipping of its section
    6), averaged as Adam's first moment, of one matrix in float64: where it stands after these gradients."""
    row, column, average, moved = 0.0, 0.0, 0.0, 0.0
    for step, g in enumerate(gradients, start=1):
        decay = 1 - step**-0.8
        row = decay * row + (1 - decay) * np.mean(g**2 + 1e-30, axis=1)
        column = decay * column + (1 - decay) * np.mean(g**2 + 1e-30, axis=0)
        update = g / np.sqrt(np.outer(row, column) / np.mean(row))
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        average = b1 * average + (1 - b1) * update
        moved = moved - rate * average / (1 - b1**step)
    return moved


def test_a_factored_second_moment_is_adafactors():
    config = OptimizerConfig(
        learning_rate=0.01, schedule="constant", warmup=0.0, clip_norm=math.inf, second_moment="factored", b1=0.8
    )
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(129, 160)) * rng.uniform(0.1, 3, size=(129, 1)) for _ in range(4)]
    params = {"decoder": {"kernel": jnp.zeros((129, 160))}}
    optimizer = make_optimizer(config, steps=4)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"decoder": {"kernel": jnp.asarray(gradient, jnp.float32)}}, state, params)
        params = optax.apply_updates(params, updates)
    expected = factored_by_hand(gradients, 0.01, 0.8)
    np.testing.assert_allclose(params["decoder"]["kernel"], expected, rtol=2e-5, atol=1e-7)


def test_a_factored_second_moment_is_a_row_and_a_column():
    shape = jax.eval_shape(
        make_optimizer(OptimizerConfig(second_moment="factored", first_moment="bfloat16"), steps=1).init,
        {"decoder": {"kernel": jax.ShapeDtypeStruct((4096, 1024), jnp.float32)}},
    )
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(shape) if leaf.ndim)
    assert sizes == [1, 1024, 4096, 4096 * 1024]  # a place not used, column, row, the first moment


def test_adams_settings_are_refused_where_nothing_reads_them():
    with pytest.raises(ValueError, match="a factored second moment has a decay of its own"):
        Recipe(optimizer=OptimizerConfig(second_moment="factored", b2=0.98))
