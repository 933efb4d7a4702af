"""In bf16 a kernel's gradient comes in bf16, whatever else is fp32, and is the one that fp32 parameters would get."""

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
from mmrlhf_jax.training.step import loss_and_metrics, multiplied_in_compute_dtype, rounded


def gradients(dtype, round_first):
    rng = np.random.default_rng(0)
    entries = [
        random_groups.entry(rng, random_groups.rendered(rng, TINY, tiles=1, text=8, lengths=(5, 3, 6)), row)
        for row in range(2)
    ]
    batch = pack(
        entries,
        Bucket(2, 1, 24, 16),
        random_groups.totals(entries),
        responses=3,
        tokens_per_tile=TINY.tokens_per_tile,
        tile_size=TINY.tower.image_size,
    )
    params = jax.tree.map(jnp.asarray, random_params())

    def loss(params):
        return loss_and_metrics(
            params, None, batch, jax.random.key(0), config=TINY, compute=Compute(dtype=dtype), objective=DPO(gamma=0.25)
        )[0]

    return jax.grad(loss)(rounded(params, dtype) if round_first else params)


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
