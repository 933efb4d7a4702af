"""Parameters are declared once; initial values, shardings and the fingerprint follow from the declaration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.params import Param
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

RULES = ShardingRules()
DECLARED = {
    "up": nn_params.stack({"kernel": Param((16, 32), ("embed", "mlp"), fan_in=16)}, 2),
    "table": Param((24, 16), ("vocab", "embed"), fan_in=4),
    "bias": Param((16,), ("embed",), "zeros"),
    "norm": Param((16,), ("embed",), "ones", dtype=jnp.bfloat16),
}


def mesh(devices: int = 1, **sizes: int):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def drawn():
    return jax.device_get(nn_params.initialise(DECLARED, 0, mesh(), RULES))


# --- initial values -----------------------------------------------------------------------------------------------


def test_initial_values_follow_the_declaration(drawn):
    assert nn_params.count(DECLARED) == 2 * 16 * 32 + 24 * 16 + 16 + 16
    assert (drawn["bias"] == 0).all()
    assert (drawn["norm"] == 1).all()
    assert drawn["norm"].dtype == ml_dtypes.bfloat16
    assert drawn["up"]["kernel"].std() == pytest.approx(1 / 4, rel=0.1)
    assert drawn["table"].std() == pytest.approx(1 / 2, rel=0.1)
    assert not (drawn["up"]["kernel"][0] == drawn["up"]["kernel"][1]).any()


def test_a_draw_depends_on_name_and_key_only(drawn):
    alone = {"table": DECLARED["table"]}
    again = nn_params.initialise(alone, 0, mesh(8, fsdp=4, tensor=2), RULES)
    np.testing.assert_array_equal(again["table"], drawn["table"])
    renamed = nn_params.initialise({"other": DECLARED["table"]}, 0, mesh(), RULES)
    rekeyed = nn_params.initialise(alone, 1, mesh(), RULES)
    assert not (np.asarray(renamed["other"]) == drawn["table"]).any()
    assert not (np.asarray(rekeyed["table"]) == drawn["table"]).any()


def test_a_declaration_names_every_axis():
    with pytest.raises(ValueError, match="differ in length"):
        Param((4, 4), ("embed",))


# --- shardings ----------------------------------------------------------------------------------------------------


def test_logical_axes_become_mesh_axes():
    placed = nn_params.shardings(DECLARED, mesh(8, fsdp=4, tensor=2), RULES)
    assert placed["up"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert placed["table"].spec == P("tensor", "fsdp")
    assert placed["table"].shard_shape((24, 16)) == (12, 4)


def test_a_mesh_that_does_not_divide_is_refused_by_parameter():
    uneven = {**DECLARED, "odd": {"kernel": Param((16, 30), ("embed", "mlp"))}}
    with pytest.raises(ValueError) as error:
        nn_params.shardings(uneven, mesh(8, fsdp=2, tensor=4), RULES)
    assert "odd.kernel: axis 'mlp' of size 30 does not divide over 'tensor' = 4" in str(error.value)
    assert "table" not in str(error.value)


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match=r"put two of the axes \('embed', 'mlp'\) on one mesh axis"):
        ShardingRules(mlp="fsdp").spec(("embed", "mlp"))


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"tensor": 16}])
def test_a_mesh_that_is_not_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        mesh(8, **sizes)


# --- the fingerprint ----------------------------------------------------------------------------------------------


@pytest.fixture
def values() -> dict:
    """Exact in bf16, so that a dtype changes nothing."""
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(16, 8)).astype(ml_dtypes.bfloat16).astype(np.float32),
        "b": rng.normal(size=(2, 16, 8)).astype(ml_dtypes.bfloat16).astype(np.float32),
    }


def test_a_fingerprint_is_32_hex_digits_of_the_values(values):
    name = nn_params.fingerprint(values)
    assert len(name) == 32
    assert int(name, 16)
    assert name == nn_params.fingerprint({"b": values["b"], "a": values["a"]})


def test_the_fingerprint_is_blind_to_sharding_and_dtype(values):
    name = nn_params.fingerprint(values)
    over = mesh(8, fsdp=4, tensor=2)
    axes = {"a": P("fsdp", "tensor"), "b": P(None, "tensor", "fsdp")}
    sharded = {k: jax.device_put(v, jax.NamedSharding(over, axes[k])) for k, v in values.items()}
    assert nn_params.fingerprint(sharded) == name
    assert nn_params.fingerprint({k: v.astype(ml_dtypes.bfloat16) for k, v in values.items()}) == name


def one_value(v):
    v["a"][3, 5] *= 1.01


def one_sign(v):
    v["b"][1, 0, 0] *= -1


def two_values_swapped(v):
    v["a"][0, 0], v["a"][9, 4] = v["a"][9, 4], v["a"][0, 0]


def two_neighbours_swapped(v):
    v["a"][0, 0], v["a"][0, 1] = v["a"][0, 1], v["a"][0, 0]


def two_rows_swapped(v):
    v["a"][[2, 3]] = v["a"][[3, 2]]


def two_layers_swapped(v):
    v["b"][[0, 1]] = v["b"][[1, 0]]


def a_leaf_renamed(v):
    v["c"] = v.pop("a")


def a_leaf_reshaped(v):
    v["b"] = v["b"].reshape(16, 16)


CHANGES = [one_value, one_sign, two_values_swapped, two_neighbours_swapped, two_rows_swapped, two_layers_swapped]
CHANGES += [a_leaf_renamed, a_leaf_reshaped]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_fingerprint_sees_a_change(values, change):
    name = nn_params.fingerprint(values)
    changed = {k: v.copy() for k, v in values.items()}
    change(changed)
    assert nn_params.fingerprint(changed) != name
