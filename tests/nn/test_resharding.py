"""Parameters between layouts on 8 virtual devices: the same values, and as many bytes as blocks differ."""

import jax
import numpy as np
import pytest
from tiny import TINY

from mmrlhf_jax.models.families import declare
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.resharding import describe, received_bytes, reshard, rules_of
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

RULES = ShardingRules()


def made(mesh):
    return nn_params.initialise(declare(TINY), 0, mesh, RULES)


def blocks(array):
    """Elements that each device holds, as sets of flat indices."""
    numbers = np.arange(array.size).reshape(array.shape)
    found = array.sharding.devices_indices_map(array.shape)
    return {device.id: set(numbers[index].ravel().tolist()) for device, index in found.items()}


@pytest.mark.parametrize("config", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=4)])
def test_whole_and_back_again(config):
    mesh = make_mesh(config)
    split = made(mesh)
    before = {name: np.asarray(leaf) for name, leaf in nn_params.named_leaves(split)}
    held = {name: blocks(leaf) for name, leaf in nn_params.named_leaves(split)}
    whole, moved = reshard(split, nn_params.shardings(declare(TINY), mesh, rules_of("whole", RULES)))
    due = dict.fromkeys((device.id for device in jax.devices()), 0)
    for name, leaf in nn_params.named_leaves(whole):
        np.testing.assert_array_equal(np.asarray(leaf), before[name])
        assert "fsdp" not in str(leaf.sharding.spec)
        for device, wanted in blocks(leaf).items():
            due[device] += len(wanted - held[name][device]) * leaf.dtype.itemsize
    assert moved.received == due  # counted element by element
    assert moved.bytes == sum(due.values()) > 0
    back, freed = reshard(whole, nn_params.shardings(declare(TINY), mesh, RULES))
    assert freed.bytes == 0  # each device keeps a part of what it has
    for name, leaf in nn_params.named_leaves(back):
        np.testing.assert_array_equal(np.asarray(leaf), before[name])
        assert blocks(leaf) == held[name]


def test_a_whole_copy_costs_what_is_missing():
    mesh = make_mesh(MeshConfig(fsdp=8))
    (split, one) = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    x = jax.device_put(np.arange(64, dtype=np.float32), split)
    assert set(received_bytes({"x": x}, {"x": one}).values()) == {56 * 4}
    moved, told = reshard({"x": x}, {"x": one})
    np.testing.assert_array_equal(moved["x"], np.arange(64))
    assert str(told).startswith("parameters moved from split over fsdp 8 to whole: 0.0 MiB over 8 devices")
    assert x.is_deleted()  # there are not two copies


def test_what_lies_there_already_is_not_touched():
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = made(mesh)
    again, moved = reshard(params, nn_params.shardings(declare(TINY), mesh, RULES))
    assert moved.bytes == 0
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_layouts_are_told_by_the_axes_that_split_anything():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    declared = declare(TINY)
    assert describe(nn_params.shardings(declared, mesh, RULES)) == "split over fsdp 2 and tensor 2"
    assert describe(nn_params.shardings(declared, mesh, rules_of("whole", RULES))) == "split over tensor 2"
