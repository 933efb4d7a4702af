"""What a recipe leaves open is filled in from the memory of a device: as little recomputed as fits."""

import dataclasses
import itertools

import jax
import pytest
from tiny import TINY

from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.shapes import SHAPES
from mmrlhf_jax.nn.devices import GIB
from mmrlhf_jax.nn.remat import remat
from mmrlhf_jax.nn.sharding import MeshConfig, shape_of_mesh
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.fit import ROOM, SLOTS, Fitted, device_memory, fit
from mmrlhf_jax.training.memory import footprint
from mmrlhf_jax.training.recipe import ComputeConfig, DataConfig, OptimizerConfig, Recipe

OPEN = Recipe(objective=DPO(), optimizer=OptimizerConfig(first_moment="bfloat16"))
MESH = shape_of_mesh(MeshConfig(), 8)


def shapes(recipe):
    """One bucket of 4,000 slots a group, as many groups on each of 8 devices as the recipe's slots take."""
    return [Bucket(8 * max(1, recipe.data.slots // 4000), 5, 3072, 768)], 4


def fitted(memory, recipe=OPEN):
    return fit(recipe, SHAPES["7b"], MESH, shapes, platform="gpu", memory=memory)


def needs(recipe):
    (bucket,), responses = shapes(recipe)
    return footprint(recipe, SHAPES["7b"], bucket, MESH, responses=responses, platform="gpu").total


def test_the_first_that_fits_is_taken_and_less_memory_recomputes_more():
    seen = [fitted(gib * GIB).recipe for gib in (300, 80, 50, 35, 24)]
    assert (seen[0].compute.remat, seen[0].data.slots_per_device) == ("none", SLOTS[0])
    assert all(needs(a) >= needs(b) for a, b in itertools.pairwise(seen))
    assert seen[-1].compute.remat == "full"
    for gib, recipe in zip((300, 80, 50, 35, 24), seen, strict=True):
        assert needs(recipe) <= ROOM * gib * GIB


def test_what_the_recipe_says_stays():
    said = dataclasses.replace(OPEN, compute=ComputeConfig(remat="attention"))
    chosen = fitted(40 * GIB, said).recipe
    assert chosen.compute.remat == "attention"
    assert chosen.data.slots_per_device in SLOTS
    both = dataclasses.replace(said, data=DataConfig(slots_per_device=5000))
    assert fitted(GIB, both).recipe == both


def test_where_nothing_fits_the_leanest_runs_and_says_so():
    result = fitted(8 * GIB)
    assert result.recipe.compute.remat == "full"
    assert shapes(result.recipe)[0][0].groups == 8
    assert "may run out" in str(result)
    assert "may run out" not in str(fitted(200 * GIB))


def test_a_cpu_is_not_filled():
    assert device_memory() is None
    result = fit(OPEN, TINY, MESH, shapes, platform="cpu", memory=None)
    assert result == Fitted(result.recipe, None, None)
    assert (result.recipe.compute.remat, result.recipe.data.slots_per_device) == ("full", 8192)


@dataclasses.dataclass
class Device:
    device_kind: str
    limit: float | None
    platform: str = "gpu"

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit}


@pytest.mark.parametrize(
    ("kind", "limit", "memory"),
    [
        ("NVIDIA H200", 150e9, 141e9),  # as its sheet says
        ("NVIDIA H200", 70e9, 70e9),  # XLA_PYTHON_CLIENT_MEM_FRACTION=.5
        ("NVIDIA H200", None, 141e9),
        ("another", 20e9, 20e9),
        ("another", None, None),
    ],
)
def test_a_device_has_what_it_says_and_its_sheet_allows(monkeypatch, kind, limit, memory):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(kind, limit)])
    assert device_memory() == memory


def test_a_layer_takes_no_open_choice():
    with pytest.raises(ValueError, match="not a rung"):
        remat(jax.numpy.sin, "auto")
