"""Where a loaded model's parameters lie while it decodes."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from mmrlhf_jax.models.families import declare
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.resharding import Layout, reshard, rules_of
from mmrlhf_jax.nn.sharding import ShardingRules
from mmrlhf_jax.training.distributed import say
from mmrlhf_jax.training.model import LoadedModel


def in_layout(model: LoadedModel, layout: Layout, mesh: Mesh) -> LoadedModel:
    """`model`, which was loaded as it trains, in `layout`; says what moving it took. `model` is used up.

    Loading it split and moving it reads each byte from storage once, however many devices want it.
    """
    if layout == "split":
        return model
    targets = nn_params.shardings(declare(model.config), mesh, rules_of(layout, ShardingRules()))
    params, moved = reshard(model.params, targets)
    say(str(moved))
    return dataclasses.replace(model, params=params)
