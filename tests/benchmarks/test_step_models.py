"""The random models of the step benchmark: what both sides load, written a tensor at a time."""

from __future__ import annotations

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from tiny import TINY

from mmrlhf_jax.benchmarks.models import pinned_config, shape_config, write_models
from mmrlhf_jax.command import UsageError
from mmrlhf_jax.models.llava_onevision.config import read_config
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.models.llava_onevision.shapes import SHAPES
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.lora import Adapted
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training.model import load_adapters, load_model
from mmrlhf_jax.training.recipe import INFERENCE

NOTHING = dict.fromkeys(("decoder_layers", "embed", "vocab", "tower_layers"))


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def test_real_shapes_are_the_published_ones_and_the_pinned_one_is_what_its_flags_say():
    assert shape_config("7b", NOTHING) is SHAPES["7b"]
    assert shape_config("pinned", NOTHING) == pinned_config(decoder_layers=8, embed=512, vocab=32000, tower_layers=6)
    small = shape_config("pinned", {**NOTHING, "embed": 128})
    assert (small.decoder.embed, small.decoder.layers, small.image_token) == (128, 8, 31998)


def test_a_size_of_the_pinned_shape_is_refused_with_another():
    with pytest.raises(UsageError, match=r"--decoder-layers, --vocab change the pinned shape; 0.5b has sizes of its"):
        shape_config("0.5b", {**NOTHING, "decoder_layers": 2, "vocab": 512})


def test_policy_and_reference_differ_but_for_the_tower_and_hold_what_a_model_starts_from(tmp_path, mesh):
    written = write_models(TINY, tmp_path, "bfloat16", 0)
    assert read_config(written.policy) == TINY
    assert written.adapter is None
    for seed, directory in enumerate((written.policy, written.reference)):
        loaded = load_model(directory, mesh, ShardingRules(), rates=INFERENCE).params
        assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"bfloat16"}
        policy, other = (nn_params.initialise(declare(TINY), s, mesh, ShardingRules()) for s in (0, seed))
        started = dataclasses.replace(other, tower=policy.tower)
        wanted = jax.tree.map(lambda p: p.astype("bfloat16"), started)
        jax.tree.map(np.testing.assert_array_equal, loaded, wanted)


def test_an_adapter_stands_on_every_kernel_and_neither_half_is_zero(tmp_path, mesh):
    written = write_models(TINY, tmp_path, "bfloat16", 3)
    assert written.reference is None
    loaded = load_adapters(written.adapter, mesh, ShardingRules()).params
    layer = loaded.decoder.layers
    kernels = [getattr(layer, f"{name}_kernel") for name in ("query", "key", "value", "out", "gate", "up", "down")]
    for kernel in (*kernels, loaded.projector.in_kernel, loaded.projector.out_kernel):
        assert isinstance(kernel, Adapted)
        assert (kernel.a.shape[-1], kernel.base.dtype, kernel.b.dtype) == (3, "bfloat16", "float32")
        assert min(float(abs(kernel.a).mean()), float(abs(kernel.b).mean())) > 1e-3
    assert not isinstance(loaded.tower.blocks.up_kernel, Adapted)


def test_a_model_is_never_whole_in_memory(tmp_path):
    config = pinned_config(decoder_layers=12, embed=256, vocab=1024, tower_layers=8)
    whole = 4 * nn_params.count(declare(config))
    tracemalloc.start()
    write_models(config, tmp_path, "float32", 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < whole / 5
