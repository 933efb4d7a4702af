"""Buckets and steps: every item fits, every item is seen once an epoch, and nothing about it depends on the devices."""

import numpy as np
import pytest

from mmrlhf_jax.batch import EMPTY
from mmrlhf_jax.data.buckets import ItemLengths, plan_buckets
from mmrlhf_jax.data.pipeline import Item, Selection, pair_weights
from mmrlhf_jax.data.plan import ItemWeights, plan_steps
from mmrlhf_jax.groups import Group, Pair, Response, Turn


def lengths(count, tiles=38, seed=0):
    rng = np.random.default_rng(seed)
    return ItemLengths(rng.integers(0, tiles, count), rng.integers(20, 7000, count), rng.integers(5, 2000, count))


def buckets(items, *, shards=1, max_buckets=6):
    return plan_buckets(
        items, max_buckets=max_buckets, multiple=128, slots_per_shard=16384, shards=shards, groups_per_step=32
    )


def steps(items, plan, **changes):
    ones = np.ones(len(items))
    settings = {"groups_per_step": 32, "epochs": 2.0, "max_steps": None, "seed": 0, **changes}
    return plan_steps(plan, ItemWeights(ones, ones, ones, 0 * ones), **settings)


@pytest.mark.parametrize("tiles", [38, 5000], ids=["pictures", "more tile counts than cells"])
def test_every_item_fits_its_bucket_and_buckets_are_few(tiles):
    items = lengths(1500, tiles)
    plan = buckets(items, shards=4)
    assert len(plan.buckets) <= 6
    for item, index in enumerate(plan.assignment):
        bucket = plan.buckets[index]
        assert bucket.tiles >= items.tiles[item]
        assert bucket.prompt >= items.prompt[item]
        assert bucket.response >= items.response[item]
    for bucket in plan.buckets:
        assert bucket.prompt % 128 == bucket.response % 128 == bucket.groups % 4 == 0
    assert 0 < plan.padding_share < 0.6


def test_one_shape_is_one_bucket_without_padding():
    same = ItemLengths(*(np.full(10, n) for n in (3, 256, 128)))
    plan = buckets(same)
    assert len(plan.buckets) == 1
    assert plan.padding_share == 0


def test_every_item_is_seen_once_an_epoch_and_steps_count_what_they_hold():
    items = lengths(100)
    plan = steps(items, buckets(items))
    assert plan.steps == 8  # 32 + 32 + 32 + 4, twice
    for epoch in (range(4), range(4, 8)):
        seen = [i for m in plan.micro_batches if m.step in epoch for i in m.items if i != EMPTY]
        assert sorted(seen) == list(range(100))
    for step in range(8):
        mine = plan.micro_batches[plan.first_of_step[step] : plan.first_of_step[step + 1]]
        assert [m.last for m in mine] == [False] * (len(mine) - 1) + [True]
        assert {m.totals.groups for m in mine} == {sum(i != EMPTY for m in mine for i in m.items)}


def test_the_order_depends_on_the_seed_not_on_devices_or_buckets():
    items = lengths(100)
    one = steps(items, buckets(items))
    assert steps(items, buckets(items, shards=8, max_buckets=2)).fingerprint == one.fingerprint
    assert steps(items, buckets(items), seed=1).fingerprint != one.fingerprint


@pytest.mark.parametrize("epochs", [1.1, 0.07, 0.3, 2.0])
def test_parts_of_epochs_are_no_step_more_for_the_rounding_of_a_product(epochs):
    """100 * 1.1 is 110.00000000000001 in floats."""
    items = lengths(100)
    assert steps(items, buckets(items), groups_per_step=1, epochs=epochs).steps == round(100 * epochs)


def test_max_steps_decides_whatever_the_epochs_say():
    items = lengths(100)
    assert [steps(items, buckets(items), max_steps=n).steps for n in (3, 11)] == [3, 11]


def test_a_mean_over_groups_shares_one_weight_among_a_groups_pairs():
    responses = tuple(Response(text, rank) for rank, text in enumerate("abc"))
    group = Group("g", (Turn("user", "?"),), (), responses, (Pair(0, 1), Pair(0, 2), Pair(1, 2)), ())
    item = Item(0, (0, 1, 2))
    upper = np.triu(np.ones((3, 3)), 1)
    np.testing.assert_array_equal(pair_weights(group, item, Selection(preferences=True)), upper)
    over_groups = pair_weights(group, item, Selection(preferences=True, mean="groups"))
    np.testing.assert_allclose(over_groups, upper / 3, rtol=1e-6)
