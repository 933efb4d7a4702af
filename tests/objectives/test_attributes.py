"""Reward objectives that read ratings: closed forms, sums over micro-batches, what is not rated, finite differences.
Everything runs in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_samples import reward_step

from mmrlhf_jax.objectives import MultiObjectiveReward, QuantileReward, ScalarReward, step_totals
from mmrlhf_jax.objectives.reward_heads import masked_mse, masked_pinball, quantile_levels

OBJECTIVES = [
    MultiObjectiveReward(),
    MultiObjectiveReward(bradley_terry=0.7),
    QuantileReward(),
    QuantileReward(bradley_terry=0.3),
]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{o.bradley_terry}")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def step(objective, attributes=3):
    """Three ragged groups: the last response of the first is missing; about half of what could be rated is."""
    plain, rng = reward_step(), np.random.default_rng(5)
    shape, quantiles = plain.score.shape, 4 if isinstance(objective, QuantileReward) else 1
    mask = rng.random((*shape, attributes)) < 0.5
    mask[0, -1] = False
    totals = step_totals(plain.pair_weight, jnp.ones(shape), plain.loss_weight, plain.tie_weight, jnp.asarray(mask))
    return plain.replace(
        output=jnp.asarray(rng.normal(size=(*shape, attributes, quantiles))),
        rating=jnp.asarray(np.where(mask, rng.normal(size=mask.shape), 0)),
        rating_mask=jnp.asarray(mask),
        totals=totals,
    )


def loss_of(objective, inputs):
    return float(objective(inputs)[0])


def test_the_losses_are_the_masked_means():
    inputs = step(MultiObjectiveReward())
    expected = float(masked_mse(inputs.output[..., 0], inputs.rating, inputs.rating_mask))
    assert loss_of(MultiObjectiveReward(), inputs) == pytest.approx(expected, rel=1e-12)
    inputs = step(QuantileReward())
    expected = float(masked_pinball(inputs.output, inputs.rating, quantile_levels(4), inputs.rating_mask))
    assert loss_of(QuantileReward(), inputs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [MultiObjectiveReward, QuantileReward])
def test_bradley_terry_is_over_the_mean_of_all_outputs(kind):
    inputs = step(kind())
    scored = inputs.replace(score=inputs.output.mean((-2, -1)))
    beside = loss_of(kind(bradley_terry=2.0), inputs) - loss_of(kind(), inputs)
    assert beside == pytest.approx(2 * loss_of(ScalarReward(centre=0.0, tie=0.0), scored), rel=1e-11)
    assert float(kind()(inputs)[1]["rewards/margins"]) == pytest.approx(
        float(ScalarReward()(scored)[1]["rewards/margins"]), rel=1e-12
    )


@every
def test_micro_batches_sum_to_the_step(objective):
    whole = step(objective)
    parts = [jax.tree.map(lambda x, b=b: x[b : b + 1], whole.replace(totals=None)) for b in range(3)]
    summed = jax.tree.map(lambda *x: sum(x), *(objective(part.replace(totals=whole.totals)) for part in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), summed, objective(whole))


@every
def test_the_order_of_responses_does_not_matter(objective):
    inputs, order = step(objective), np.array([2, 0, 3, 1])
    other = inputs.replace(
        output=inputs.output[:, order], rating=inputs.rating[:, order], rating_mask=inputs.rating_mask[:, order],
        pair_weight=inputs.pair_weight[:, order][:, :, order], tie_weight=inputs.tie_weight[:, order][:, :, order],
    )  # fmt: skip
    assert loss_of(objective, other) == pytest.approx(loss_of(objective, inputs), rel=1e-11)


@every
def test_gradients_are_finite_differences(objective):
    inputs, size = step(objective), 1e-6
    here = inputs.output

    def loss(output):
        return objective(inputs.replace(output=output))[0]

    ways = size * jnp.eye(here.size).reshape(here.size, *here.shape)
    expected = (jax.vmap(lambda way: loss(here + way) - loss(here - way))(ways) / (2 * size)).reshape(here.shape)
    np.testing.assert_allclose(jax.grad(loss)(here), expected, rtol=1e-6, atol=1e-8)


@every
@pytest.mark.parametrize("garbage", [np.nan, -1e300])
def test_what_is_not_rated_or_not_there_may_hold_anything(objective, garbage):
    clean = step(objective)
    gone = np.zeros(clean.score.shape, bool)
    gone[0, -1] = True  # in no pair, and not rated
    dirty = clean.replace(
        rating=jnp.where(clean.rating_mask, clean.rating, garbage),
        output=jnp.where(jnp.asarray(gone)[..., None, None], garbage, clean.output),
    )
    jax.tree.map(np.testing.assert_array_equal, objective(dirty), objective(clean))
    slope = jax.grad(lambda output: objective(dirty.replace(output=output))[0])(dirty.output)
    assert np.isfinite(slope).all()
    assert not np.asarray(slope)[gone].any()
    if not objective.bradley_terry:
        assert not np.asarray(slope)[~np.asarray(clean.rating_mask)].any()


@every
def test_a_step_without_ratings_still_trains_on_its_pairs(objective):
    inputs = step(objective)
    bare = inputs.replace(rating_mask=inputs.rating_mask & False)
    bare = bare.replace(totals=dataclasses.replace(inputs.totals, ratings=jnp.zeros(())))
    loss, slope = jax.value_and_grad(lambda output: objective(bare.replace(output=output))[0])(bare.output)
    assert np.isfinite(slope).all()
    assert (float(loss) > 0) == (objective.bradley_terry > 0)


def test_quantiles_say_how_much_lies_outside_and_what_crosses():
    inputs = step(QuantileReward())
    low = inputs.replace(output=jnp.tile(jnp.arange(4.0)[::-1], (*inputs.output.shape[:-1], 1)) + 10)
    metrics = QuantileReward()(low)[1]
    assert [float(metrics[f"ratings/{name}"]) for name in ("below", "above", "crossing")] == [1, 0, 1]
    assert float(QuantileReward()(low.replace(output=-low.output))[1]["ratings/crossing"]) == 0


def test_the_best_constant_quantiles_are_those_of_the_ratings():
    """What the loss is minimal at is what the head is read as."""
    rating = jnp.asarray(np.random.default_rng(0).gamma(2.0, size=(1, 999, 1)))
    weight = jnp.zeros((1, 999, 999))
    blank, mask = jnp.zeros((1, 999)), jnp.ones((1, 999, 1), bool)
    inputs = reward_step().replace(
        score=blank, pair_weight=weight, tie_weight=weight, pair_margin=None, tokens=None, token_score=None,
        rating=rating, rating_mask=mask, totals=step_totals(weight, blank, blank, None, mask),
    )  # fmt: skip

    def loss(quantiles):
        return QuantileReward()(inputs.replace(output=jnp.broadcast_to(quantiles, (1, 999, 1, 3))))[0]

    best = jnp.quantile(rating, quantile_levels(3))
    for way in np.concatenate([np.eye(3), -np.eye(3)]):
        assert float(loss(best)) < float(loss(best + 0.05 * way))


def test_what_is_missing_or_senseless_is_refused():
    with pytest.raises(ValueError, match=r"RewardInputs\.output, \.rating and \.rating_mask must be given"):
        QuantileReward()(reward_step())
    with pytest.raises(ValueError, match="one output an attribute, not 4"):
        MultiObjectiveReward()(step(QuantileReward()))
    for kind in (MultiObjectiveReward, QuantileReward):
        with pytest.raises(ValueError, match="bradley_terry must be at least 0"):
            kind(bradley_terry=-1.0)
