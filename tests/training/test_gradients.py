"""In bf16 a kernel's gradient comes in bf16, whatever else is fp32, and is the one that fp32 parameters would get."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_groups
from tiny import TINY, random_params

from mmrlhf_jax.batch import Bucket, pack
from mmrlhf_jax.models.llava_onevision.model import Compute
from mmrlhf_jax.nn.params import named_leaves
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import OptimizerConfig, PartRates, Recipe
from mmrlhf_jax.training.state import combine, partition, sharing_tower
from mmrlhf_jax.training.step import loss_and_metrics, multiplied_in_compute_dtype, rounded

# compiling is what takes time
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    entries = [
        random_groups.entry(rng, random_groups.rendered(rng, TINY, tiles=1, text=8, lengths=(5, 3, 6)), row)
        for row in range(2)
    ]
    return pack(
        entries,
        Bucket(2, 1, 24, 16),
        random_groups.totals(entries),
        responses=3,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
    )


def loss(params, dtype, reference=None):
    compute, objective = Compute(dtype=dtype), DPO(gamma=0.25)
    return loss_and_metrics(
        params, reference, batch(), jax.random.key(0), config=TINY, compute=compute, objective=objective
    )[0]


def gradients(dtype, round_first):
    params = jax.tree.map(jnp.asarray, random_params())
    gradient = quick(jax.grad(functools.partial(loss, dtype=dtype)))
    return gradient(rounded(params, dtype) if round_first else params)


def test_kernels_have_gradients_in_the_compute_dtype_and_tables_norms_and_biases_in_fp32():
    dtypes = {name: leaf.dtype for name, leaf in named_leaves(gradients("bfloat16", True))}
    assert {name for name, dtype in dtypes.items() if dtype == jnp.bfloat16} == {
        name for name in dtypes if name.endswith("_kernel")
    }
    assert {dtypes[name] for name in dtypes if not name.endswith("_kernel")} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("dtype", "room"), [("float32", 0.0), ("bfloat16", 2**-7)])
def test_rounding_first_changes_no_gradient(dtype, room):
    """Not at all in fp32; in bf16 by how XLA rounds on the way, less than a bit of the largest entry."""
    plain, first = (dict(named_leaves(gradients(dtype, round_first))) for round_first in (False, True))
    for name, one in plain.items():
        other = np.asarray(first[name], np.float32)
        np.testing.assert_allclose(other, one, atol=room * np.abs(one).max(), rtol=0, err_msg=name)


def test_a_heads_kernel_is_read_in_fp32():
    assert not multiplied_in_compute_dtype("head.dense_kernel")
    assert not multiplied_in_compute_dtype("decoder.layers.query_kernel.a")
    assert multiplied_in_compute_dtype("decoder.layers.query_kernel")


def test_a_reference_without_a_tower_sees_through_the_policys():
    """Where the tower is frozen both have the same one: loss and gradients change by rounding at most."""
    policy, reference = (jax.tree.map(jnp.asarray, random_params(seed=seed)) for seed in (0, 1))
    reference = dataclasses.replace(reference, tower=policy.tower)
    trainable, frozen = partition(policy, lambda name: not name.startswith("tower."))

    def value(trainable, reference):
        return loss(combine(trainable, frozen), "float32", reference)

    apart = quick(jax.value_and_grad(value))(trainable, reference)
    shared = quick(jax.value_and_grad(value))(trainable, sharing_tower(Recipe(), reference))
    assert sharing_tower(Recipe(), reference).tower is None
    for one, other in zip(jax.tree.leaves(apart), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_a_tower_that_trains_is_not_shared():
    reference = random_params(seed=1)
    moving = Recipe(optimizer=OptimizerConfig(rates=PartRates(tower=1.0)))
    assert sharing_tower(moving, reference) is reference
