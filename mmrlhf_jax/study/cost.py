"""How many pairs, each as two full sequences, cost what a step over whole groups does."""

from __future__ import annotations

from pathlib import Path

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.data.pipeline import select
from mmrlhf_jax.models.families import read_config
from mmrlhf_jax.models.llava_onevision.config import LlavaOnevisionConfig
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.training.data import Measured, measure_data, selection_of
from mmrlhf_jax.training.model import assets_of
from mmrlhf_jax.training.recipe import Recipe
from mmrlhf_jax.training.work import item_cost


def pairs_of_equal_cost(groups: Recipe, pairs: Recipe, model: Path, dataset: Path) -> int:
    """The --data.groups-per-step of `pairs` (its items are pairs) at which a mean step costs the operations that one of
    `groups` does, at least 1; by the formulas of models/llava_onevision/cost.py, on the data's own lengths."""
    assets = assets_of(str(model))
    config = read_config(assets)
    measured = measure_data(pairs, open_dataset(str(dataset)), load_renderer(str(assets), pairs.render))
    step = groups.data.groups_per_step * _mean_operations(groups, measured, config)
    return max(1, round(step / _mean_operations(pairs, measured, config)))


def _mean_operations(recipe: Recipe, measured: Measured, config: LlavaOnevisionConfig) -> float:
    """Of an item of the recipe."""
    items = select(measured.groups, measured.lengths, selection_of(recipe), measured.train).items
    return sum(item_cost(recipe, config, measured.lengths[i.row], i.responses)[1] for i in items) / len(items)
