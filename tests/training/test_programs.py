"""Any picture size runs through a handful of compiled programs: nothing but the bucket shapes the compiler's work."""

import io

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import TINY, write_tiny_directory

from mmrlhf_jax.batch import EMPTY, Entry, Totals, pack
from mmrlhf_jax.data.buckets import ItemLengths, plan_buckets
from mmrlhf_jax.data.media import decode
from mmrlhf_jax.data.plan import deal
from mmrlhf_jax.groups import Bucket, Group, Media, Response, Turn
from mmrlhf_jax.models.llava_onevision.model import Compute, declare, response_logps
from mmrlhf_jax.models.llava_onevision.render import load_renderer
from mmrlhf_jax.nn import params as nn_params
from mmrlhf_jax.nn.sharding import MeshConfig, ShardingRules, make_mesh

SIZES = 200


def group_with_picture(rng: np.random.Generator, i: int) -> Group:
    size = tuple(int(x) for x in np.exp(rng.uniform(0, np.log(400), 2)))
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(buffer, "PNG")
    return Group(
        id=str(i),
        prompt=(Turn("user", "What is it?"),),
        media=(Media("image", f"{i}.png", (size,), "", (buffer.getvalue(),)),),
        responses=(Response("a cat"), Response("no cat at all" * (i % 3 + 1))),
        pairs=(),
        origins=(),
    )


def test_200_random_picture_sizes_run_through_at_most_a_dozen_programs(tmp_path):
    write_tiny_directory(tmp_path)
    renderer = load_renderer(str(tmp_path))
    rng = np.random.default_rng(0)
    rendered = [renderer.render(group_with_picture(rng, i), decode) for i in range(SIZES)]
    lengths = [r.lengths for r in rendered]
    assert len({(length.tiles, length.prompt) for length in lengths}) > 30  # many shapes come in
    plan = plan_buckets(
        ItemLengths(
            *(np.array(x) for x in zip(*[(n.tiles, n.prompt, sum(n.responses)) for n in lengths], strict=True))
        ),
        max_buckets=4,
        multiple=128,
        slots_per_shard=4096,
        shards=1,
        groups_per_step=SIZES,
        tile_cost=9.0,
    )
    traces = []

    @jax.jit
    def score(params, batch):
        traces.append(batch.token.shape)
        return response_logps(params, TINY, batch, Compute()).logp

    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    params = nn_params.initialise(declare(TINY), 0, mesh, ShardingRules())
    none = np.zeros((2, 2), np.float32)
    seen = []
    for index, items in deal(range(SIZES), plan):
        entries = [
            None if i == EMPTY else Entry(i, rendered[i], none, none, np.zeros(2, np.int32), np.zeros(2, np.float32))
            for i in items
        ]
        batch = pack(entries, plan.buckets[index], Totals(1, 1, 1, 1), responses=2, tokens_per_tile=9, tile_size=42)
        assert np.isfinite(np.asarray(score(params, batch))).all()
        seen += [row for row in batch.row if row != EMPTY]
    assert sorted(seen) == list(range(SIZES))
    assert len(traces) <= len(plan.buckets) <= 12


def test_a_group_that_does_not_fit_is_refused_not_cut(tmp_path):
    write_tiny_directory(tmp_path)
    rendered = load_renderer(str(tmp_path)).render(group_with_picture(np.random.default_rng(0), 7), decode)
    none = np.zeros((2, 2), np.float32)
    entry = Entry(7, rendered, none, none, np.zeros(2, np.int32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"row 7: .* do not fit bucket"):
        pack([entry], Bucket(1, 37, 64, 16), Totals(1, 1, 1, 1), responses=2, tokens_per_tile=9, tile_size=42)
