"""Tokens and operations of a run's steps, and the share of a chip's peak they are."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.models.llava_onevision.cost import GroupShape, group_flops
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.nn.devices import ACCELERATORS
from mmrlhf_jax.nn.sharding import MeshConfig, batch_share, make_mesh
from mmrlhf_jax.objectives import DPO, ScalarReward, Supervised
from mmrlhf_jax.training import work as work_module
from mmrlhf_jax.training.data import measure_data, plan_data
from mmrlhf_jax.training.recipe import DataConfig, LoraConfig, Recipe
from mmrlhf_jax.training.work import Work, work_of


def planned(small_world, objective, pairing="groups", **changes):
    """(work, measured data, the model's configuration) of one epoch, five items a step."""
    data = DataConfig(groups_per_step=5, pairing=pairing)
    recipe = Recipe(objective=objective, dataset=small_world.dataset, data=data, **changes)
    mesh, renderer = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), load_renderer(small_world.model)
    measured = measure_data(recipe, open_dataset(small_world.dataset), renderer)
    data = plan_data(recipe, measured, renderer.config, batch_share(mesh))
    return work_of(recipe, renderer.config, data, measured.lengths, mesh), measured, renderer.config


def test_an_epoch_s_steps_hold_every_group_once(small_world):
    work, measured, config = planned(small_world, DPO())
    lengths = measured.lengths
    assert len(work.tokens) == 3  # 12 groups, 5 a step
    assert work.tokens.sum() == sum(one.prompt + sum(one.responses) for one in lengths)
    shapes = [GroupShape(one.tiles, one.prompt, one.responses) for one in lengths]
    assert work.flops.sum() == pytest.approx(sum(group_flops(config, shape).total for shape in shapes))


def test_what_a_run_does_more_or_less_is_counted(small_world):
    whole = planned(small_world, DPO())[0].flops.sum()
    assert planned(small_world, DPO(), reference="online")[0].flops.sum() > 1.2 * whole
    assert planned(small_world, DPO(), lora=LoraConfig(rank=2))[0].flops.sum() < whole
    assert planned(small_world, ScalarReward())[0].flops.sum() < whole


def test_pairs_mode_forwards_each_prompt_twice_a_pair(small_world):
    work, measured, _ = planned(small_world, DPO(), "pairs")
    expected = sum(
        2 * one.prompt + one.responses[pair.chosen] + one.responses[pair.rejected]
        for one, group in zip(measured.lengths, measured.groups, strict=True)
        for pair in group.pairs
    )
    assert work.tokens.sum() == expected


def test_mfu_is_operations_over_peak_and_time():
    work = Work(np.array([10.0, 20.0]), np.array([3e12, 6e12]), np.array([4.0, 5.0]), peak=2e12)
    assert work.rates(2, 4.0) == {
        "tokens_per_second": 5.0,
        "pairs_per_second": 1.25,
        "model_tflops_per_second": 1.5,
        "mfu": 0.75,
    }
    assert "mfu" not in dataclasses.replace(work, peak=None).rates(2, 4.0)


def test_a_listed_chip_s_peak_is_counted_for_every_device(small_world, monkeypatch):
    monkeypatch.setattr(work_module, "accelerator", {"cpu": ACCELERATORS["v5e"]}.get)
    assert planned(small_world, Supervised())[0].peak == ACCELERATORS["v5e"].bf16_flops
