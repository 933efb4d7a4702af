"""As many pairs as cost what whole groups do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from small_world import SmallWorld

from mmrlhf_jax.data.dataset import PreparedDataset
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.llava_onevision.cost import GroupShape, group_flops
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.study.cost import pairs_of_equal_cost
from mmrlhf_jax.training.model import assets_of
from mmrlhf_jax.training.recipe import DataConfig, Recipe


def test_pairs_of_a_step_cost_what_its_groups_do(small_world: SmallWorld) -> None:
    groups = Recipe(objective=DPO(), data=DataConfig(groups_per_step=50))
    pairs = dataclasses.replace(groups, data=DataConfig(groups_per_step=50, pairing="pairs"))
    found = pairs_of_equal_cost(groups, pairs, Path(small_world.model), Path(small_world.dataset))

    config, renderer = read_config(assets_of(small_world.model)), load_renderer(small_world.model)
    whole, single = [], []
    for group in PreparedDataset(small_world.dataset).groups():
        lengths = renderer.measure(group)
        shape = GroupShape(lengths.tiles, lengths.prompt, lengths.responses)
        listed = [(pair.chosen, pair.rejected) for pair in group.pairs]
        if listed:
            whole.append(group_flops(config, shape).total)
            alone = [  # each answer as a sequence of its own, of its own length
                group_flops(config, GroupShape(lengths.tiles, lengths.prompt, (length,))).total
                for length in lengths.responses
            ]
            single += [alone[chosen] + alone[rejected] for chosen, rejected in listed]
    ratio = found * np.mean(single) / (50 * np.mean(whole))
    assert abs(ratio - 1) < 0.5 * np.mean(single) / (50 * np.mean(whole)) + 1e-9  # to the nearest pair
    assert found < 50 * len(single) / len(whole)  # fewer pairs than the groups hold
