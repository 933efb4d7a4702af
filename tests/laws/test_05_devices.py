"""Law 5: 1 device == 8 devices == 2 processes x 4; each device holds its share of the bytes, and never a full copy of
a sharded parameter."""

import re
import shutil

import jax
import numpy as np
import pytest
from small_world import ROOT, metrics, run, run_hosts
from tiny import TINY

from mmrlhf_jax.data.annotations import find
from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.groups import Bucket
from mmrlhf_jax.models.llava_onevision.model import declare
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.planning import lower_accumulate
from mmrlhf_jax.training.recipe import ComputeConfig, Recipe
from mmrlhf_jax.training.state import PartRates

MIXED = ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)
# name: processes, devices of each, mesh
LAYOUTS = {
    "one": (1, 1, ()),
    "fsdp": (1, 8, ()),
    "mixed": (1, 8, MIXED),
    "two hosts": (2, 4, MIXED),
    "four hosts": (4, 2, ("--mesh.data", 4, "--mesh.tensor", 2)),
    "layers split across hosts": (2, 1, ("--mesh.fsdp", 1, "--mesh.tensor", 2)),
    "two slices": (2, 2, ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.slices", 2)),
}
SLOW = {"two hosts", "four hosts", "layers split across hosts", "two slices"}


def train(world, name):
    processes, devices, mesh = LAYOUTS[name]
    output = world.directory / f"law-5-{name}"
    arguments = (
        "train", ROOT / "configs" / "tiny.py", "--model", world.model, "--dataset", world.dataset, "--output", output,
        "--reference", "online", "--data.max-steps", 3, "--data.max-buckets", 1, "--optimizer.learning-rate", 1e-3,
        *mesh,
    )  # fmt: skip
    if processes == 1:
        run(*arguments, devices=devices)
    else:
        printed = run_hosts(*arguments, processes=processes, devices=devices)
        assert ["done: 3 steps" in text for text in printed] == [True] + [False] * (processes - 1)  # one speaks
    return output


@pytest.fixture(scope="module")
def on_one_device(small_world):
    return metrics(train(small_world, "one"))


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS if n != "one"]
)
def test_many_devices_train_as_one(small_world, on_one_device, layout):
    there = metrics(train(small_world, layout))
    for one, many in zip(on_one_device, there, strict=True):
        assert one["rows"] == many["rows"]
        # Adam's first steps are nearly signs of the gradient: rounding of a gradient near 0 moves a parameter by 2 lr
        close = 2e-6 if one["step"] == 1 else 3e-5
        for name in ("loss", "loss/preference", "loss/nll", "rewards/margins", "grad_norm", "logps/chosen"):
            assert many[name] == pytest.approx(one[name], rel=10 * close, abs=close), name


@pytest.mark.slow
def test_hosts_share_the_work_of_annotating(small_world, tmp_path):
    """Two hosts store every row once, with the log-probs one host finds."""
    stored = {}
    for hosts in (1, 2):
        data = shutil.copytree(small_world.dataset, tmp_path / str(hosts), ignore=shutil.ignore_patterns("annotations"))
        arguments = ("annotate", "--dataset", data, "--model", small_world.model, "--with", "reference",
                     "--dtype", "float32", "--rows-per-part", 2)  # fmt: skip
        if hosts == 1:
            run(*arguments)
        else:
            mesh = ("--mesh.data", 2, "--mesh.fsdp", 1, "--mesh.tensor", 2)
            printed = run_hosts(*arguments, *mesh, processes=2, devices=2)
            assert f"{small_world.groups} groups scored" in printed[0]
        (store,) = find(data, "reference")
        stored[hosts] = store.read(open_dataset(data))
    assert stored[2].keys() == stored[1].keys() == set(range(small_world.groups))
    for row, arrays in stored[1].items():
        np.testing.assert_allclose(stored[2][row]["logp"], arrays["logp"], atol=2e-5)


def test_each_device_holds_its_share_from_the_moment_of_loading(small_world):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = load_model(small_world.model, mesh, ShardingRules(), rates=PartRates()).params
    held = dict.fromkeys(jax.devices(), 0)
    for _, leaf in nn_params.named_leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    total = sum(leaf.nbytes for _, leaf in nn_params.named_leaves(params))
    # what is not split over all 8 devices: norms and biases over 4 or 2, SigLIP's positions over 4
    assert max(held.values()) < 0.2 * total
    embedding = params.decoder.embedding
    assert {s.data.shape for s in embedding.addressable_shards} == {(embedding.shape[0] // 2, embedding.shape[1] // 4)}


def test_the_compiled_step_gathers_a_layer_at_a_time():
    """No buffer of the program has the shape of a whole stacked parameter, nor of the whole embedding gradient."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    recipe = Recipe(objective=DPO(), compute=ComputeConfig(dtype="float32"))
    text = lower_accumulate(recipe, TINY, Bucket(8, 1, 128, 128), mesh).compile().as_text()
    shapes = {tuple(int(n) for n in found.split(",")) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    stacked = [leaf.shape for name, leaf in nn_params.named_leaves(declare(TINY)) if name.startswith("decoder.layers.")]
    kernels = {shape for shape in stacked if np.prod(shape) >= 2 * 32 * 32}
    assert kernels
    assert not kernels & shapes
