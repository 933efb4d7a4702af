"""One forward over groups: how long a batch may take is learnt from those of its shape alone."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from mmrlhf_jax.data.datasets import open_dataset
from mmrlhf_jax.inference.forward import Forward, ForwardConfig, forward_parts
from mmrlhf_jax.models.llava_onevision.render import RenderOptions, load_renderer
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh
from mmrlhf_jax.training import metrics, peers
from mmrlhf_jax.training.model import load_model
from mmrlhf_jax.training.recipe import INFERENCE


def test_a_new_bucket_may_take_any_time_to_load_and_compile_and_the_next_batches_may_not(small_world, monkeypatch):
    monkeypatch.setattr(peers, "_here", here := peers._Here())
    peers.set_limits(peers.StuckConfig(step=40.0, other=3600.0))
    waits = []

    def doing(what: str, **more: bool) -> None:
        peers.doing(what, **more)
        if what == "waiting for data":
            waits.append(here.place.limit)

    monkeypatch.setattr(metrics, "doing", doing)
    dataset, mesh = open_dataset(small_world.dataset), make_mesh(MeshConfig(), jax.devices()[:1])
    model = load_model(small_world.model, mesh, ShardingRules(), rates=INFERENCE)
    forward = Forward(
        dataset, list(dataset.groups()), load_renderer(str(model.assets), RenderOptions()), model, mesh,
        ForwardConfig(max_buckets=3, slots_per_device=1),
        lambda params, batch: jnp.sum(batch.token, axis=1),
    )  # fmt: skip
    shapes, limits = [], []
    for done in forward_parts(forward, range(small_world.groups)):
        shapes.append(done.batch.token.shape + done.batch.tiles.shape)
        limits.append(here.place.limit)
    runs = [len(list(same)) for _, same in itertools.groupby(shapes)]
    assert len(runs) == 3
    assert max(runs) > 2
    # the first batch of a shape compiles, and teaches nothing; the second is the first that does
    assert limits == [limit for length in runs for limit in ([3600.0, 3600.0] + [40.0] * length)[:length]]
    assert waits[: sum(runs)] == limits
    assert here.place == peers.Place(small_world.groups, peers.BEHIND, 3600.0)
