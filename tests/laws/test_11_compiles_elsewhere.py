"""Law 11: the train step compiles for a TPU topology with splash, and lowers for cuda with XLA, on a machine that has
neither; what it must not hold in memory, it does not hold."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import TINY

from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.inference.decoding import Shape, programs
from mmrlhf_jax.inference.sample import SamplingConfig
from mmrlhf_jax.models.llava_onevision.model import Compute, declare
from mmrlhf_jax.models.qwen2.config import Qwen2Config
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import BATCH_AXES, MESH_AXES, MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import MMDPO
from mmrlhf_jax.training.planning import lower_accumulate
from mmrlhf_jax.training.recipe import ComputeConfig, Recipe

# head size and layer count of Qwen2-0.5B's shape, small elsewhere
SMALL = dataclasses.replace(
    TINY, decoder=Qwen2Config(vocab=1024, embed=128, layers=1, heads=2, kv_heads=2, head_dim=64, mlp=256, tied=True)
)
PROMPT = 1280


def with_vocab(vocab):
    return dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, vocab=vocab))


@pytest.fixture(scope="module")
def tpu_mesh():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the `parity` extra")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    return Mesh(np.array(devices).reshape(1, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parity
def test_the_step_compiles_for_a_tpu_with_splash_and_holds_no_prompt_by_prompt_matrix(tpu_mesh):
    recipe = Recipe(objective=MMDPO(), compute=ComputeConfig(attention="splash"))
    lowered = lower_accumulate(recipe, SMALL, Bucket(2, 2, PROMPT, 256), tpu_mesh)
    assert lowered.as_text().count("tpu_custom_call") >= 2  # forward and backward kernels
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    assert not re.search(rf"\[[\d,]*{PROMPT},{PROMPT}[\d,]*\]", compiled.as_text())


@pytest.mark.parity
def test_auto_means_splash_on_a_tpu(tpu_mesh):
    recipe = Recipe(objective=MMDPO(), compute=ComputeConfig(attention="auto"))
    lowered = lower_accumulate(recipe, SMALL, Bucket(2, 2, PROMPT, 256), tpu_mesh)
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parity
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_compiles_for_a_tpu_and_holds_no_second_cache(tpu_mesh, temperature):
    """Over fsdp 2 x tensor 2: weights are gathered inside two nested loops."""
    declared = nn_params.map_params(lambda p: dataclasses.replace(p, dtype=jnp.bfloat16), declare(SMALL))
    params = nn_params.abstract(declared, tpu_mesh, ShardingRules())
    sampling = SamplingConfig(61, temperature, top_p=0.9 if temperature else 1.0)
    compute = Compute(dtype="bfloat16", platform="tpu")
    shape = Shape(
        SMALL, compute, sampling, (5,), (), None, shards=2, rows=2, slots=4, prefix=PROMPT, responses=4, samples=4
    )
    made = programs(shape, tpu_mesh)
    split, whole = NamedSharding(tpu_mesh, P(BATCH_AXES)), NamedSharding(tpu_mesh, P())
    arguments = [
        jax.ShapeDtypeStruct((2,), bool, sharding=split),
        *[jax.ShapeDtypeStruct((), np.int32, sharding=whole)] * 2,
    ]
    with jax.set_mesh(tpu_mesh):
        placed = made.blank.lower().compile().output_shardings
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(made.blank), placed
        )
        memory = made.run.lower(params, state, *arguments).compile().memory_analysis()
    prefix = 2 * 2 * 1 * PROMPT * SMALL.decoder.head_dim * 2  # keys and values of a device's two rows and one head
    assert memory.alias_size_in_bytes >= prefix
    assert memory.temp_size_in_bytes < 4 * prefix


def test_the_step_lowers_for_cuda_with_xla():
    recipe = Recipe(objective=MMDPO(), compute=ComputeConfig(attention="xla"))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    lowered = lower_accumulate(recipe, SMALL, Bucket(1, 2, PROMPT, 256), mesh, platform="cuda")
    assert "stablehlo.dot_general" in lowered.as_text()


def temporary_bytes(vocab, prompt):
    recipe = Recipe(objective=MMDPO(), compute=ComputeConfig(dtype="float32", vocab_chunk=1024))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    lowered = lower_accumulate(recipe, with_vocab(vocab), Bucket(1, 1, prompt, 128), mesh)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_temporary_memory_does_not_grow_with_vocabulary_times_prompt():
    small, large = 1024, 16384
    at_short = temporary_bytes(large, 256) - temporary_bytes(small, 256)
    at_long = temporary_bytes(large, 1024) - temporary_bytes(small, 1024)
    # logits of the prompt's extra 768 positions over 15,360 more tokens would be 47 MB
    assert at_long - at_short < 2**20
    assert at_short < 4 * 4 * (large - small) * SMALL.decoder.embed  # a few copies of the table, no logits


def test_scores_of_a_long_prompt_are_never_whole():
    """Attention in blocks: doubling the prompt doubles what is held, where whole score matrices would make it
    fourfold."""
    once, twice = temporary_bytes(1024, 2048), temporary_bytes(1024, 4096)
    assert twice < 3 * once
