"""What the optimizer does to a parameter depends on its name, and on nothing else about it."""

import jax
import jax.numpy as jnp
from tiny import random_params

from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.training.recipe import OptimizerConfig, PartRates
from mmrlhf_jax.training.state import make_optimizer


def test_norms_and_biases_do_not_decay_and_all_else_does():
    """As transformers' Trainer has it: with no gradient at all, decay alone moves a parameter."""
    params = random_params()
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup=0.0, weight_decay=0.1, rates=PartRates(tower=1.0)
    )
    optimizer = make_optimizer(config, steps=1)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    still = {name for name, update in named_leaves(updates) if not jnp.any(update)}
    assert still == {name for name, _ in named_leaves(params) if "norm" in name or name.endswith("bias")}
    assert {"newline", "tower.position", "decoder.embedding", "decoder.unembedding"}.isdisjoint(still)
