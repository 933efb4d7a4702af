"""Objectives that keep averages over steps: beta-DPO's of the log-ratios, MinAvgOut's of what the policy says.
Everything runs in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_samples import random_step

from mmrlhf_jax.nn.token_logps import summed_distribution
from mmrlhf_jax.objectives import BetaDPO, MinAvgOut, StepTotals, Supervised, SupervisedInputs
from mmrlhf_jax.objectives.preference import draw_pairs


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


# --- beta-DPO ------------------------------------------------------------------------------------------------------


def test_beta_dpo_over_three_steps_restated():
    """Averages start at 0, take in a step before it is trained, and are what its draw and its beta hang on."""
    objective, mean, deviation = BetaDPO(alpha=0.3, kept=0.6, momentum=0.7), 0.0, 0.0
    averages = objective.initial_averages(11)
    for seed in range(3):
        inputs = random_step(seed, weights=False).replace(averages=averages)
        valid = np.asarray(inputs.pair_weight) > 0
        ratio = np.asarray(inputs.logp - inputs.reference_logp)
        z = ratio[:, :, None] - ratio[:, None, :]
        mean = 0.7 * mean + 0.3 * z[valid].mean()
        deviation = 0.7 * deviation + 0.3 * z[valid].std(ddof=1)
        around = jnp.array(mean), jnp.array(deviation)
        drawn = np.asarray(draw_pairs(inputs.key, jnp.asarray(z * valid), jnp.asarray(valid), 0.6, around))
        beta = max(0.1 * (1 + 0.3 * (z[drawn].mean() - mean)), 1e-3)
        loss, metrics = objective(inputs)
        averages = objective.moved_averages(inputs)
        assert float(metrics["beta/mean"]) == pytest.approx(beta, rel=1e-12)
        assert float(loss) == pytest.approx(np.mean([-log_sigmoid(beta * h) for h in z[drawn]]), rel=1e-12)
        assert {k: float(v) for k, v in averages.items()} == pytest.approx({"mean": mean, "deviation": deviation})
        assert float(metrics["margin/average"]) == pytest.approx(mean)


def test_the_draw_is_around_what_it_is_told():
    """Of pairs far below the average the nearest are drawn."""
    z = jnp.linspace(-10.0, -1.0, 10).reshape(1, 10, 1) * jnp.ones((1, 10, 10))
    valid = (jnp.arange(10) == 0)[None, None, :] & jnp.ones((1, 10, 10), bool)
    drawn = draw_pairs(jax.random.key(0), z, valid, 0.3, (jnp.array(0.0), jnp.array(0.1)))
    assert np.flatnonzero(np.asarray(drawn[0, :, 0])).tolist() == [7, 8, 9]


def test_without_momentum_nothing_is_kept():
    objective, inputs = BetaDPO(momentum=0.0), random_step()
    assert objective.initial_averages(5) == objective.moved_averages(inputs) == {}
    kept = inputs.replace(averages={"mean": jnp.array(3.0), "deviation": jnp.array(1.0)})
    assert float(objective(inputs)[0]) == float(objective(kept)[0])


# --- MinAvgOut -----------------------------------------------------------------------------------------------------


def spoken(seed=0, vocab=7):
    rng = np.random.default_rng(seed)
    weight = jnp.asarray(rng.integers(0, 2, (2, 5)), float).at[0, 0].set(1)
    logits = jnp.asarray(rng.normal(size=(2, 5, vocab)))
    logp = jax.nn.log_softmax(logits)[..., 0]
    output = jnp.einsum("btv,bt->v", jax.nn.softmax(logits), weight)
    zero = jnp.zeros(())
    totals = StepTotals(zero, zero, weight.sum(), zero)
    return SupervisedInputs(logp, weight, totals, output, MinAvgOut().initial_averages(vocab))


def test_min_avgout_is_likelihood_and_the_product_of_both_averages():
    objective, average = MinAvgOut(alpha=0.6, decay=0.8), np.full(7, 1 / 7)
    inputs = spoken()
    averages = inputs.averages
    for seed in range(3):
        inputs = spoken(seed).replace(averages=averages)
        output = np.asarray(inputs.output) / float(inputs.totals.tokens)
        average = 0.8 * average + 0.2 * output
        loss, metrics = objective(inputs)
        averages = objective.moved_averages(inputs)
        assert float(metrics["loss/avgout"]) == pytest.approx(output @ average, rel=1e-6)
        assert float(loss) == pytest.approx(float(Supervised()(inputs)[0]) + 0.6 * output @ average, rel=1e-6)
        np.testing.assert_allclose(averages["output"], average, rtol=1e-6)
        assert float(averages["output"].sum()) == pytest.approx(1, rel=1e-6)


def test_the_penalty_pushes_away_from_what_is_common():
    inputs = spoken().replace(averages={"output": jnp.array([0.9] + 6 * [0.1 / 6])})
    slope = jax.grad(lambda output: MinAvgOut(decay=0.9)(inputs.replace(output=output))[0])(inputs.output)
    assert int(jnp.argmax(slope)) == 0
    moved = MinAvgOut(decay=0.9).moved_averages(inputs)["output"]
    np.testing.assert_allclose(slope, moved / inputs.totals.tokens, rtol=1e-12)  # the average passes none


@pytest.mark.parametrize(("chunk", "shards"), [(5, 1), (4, 2), (64, 1)])
def test_a_summed_distribution_is_the_softmax_in_value_and_gradient(chunk, shards):
    rng = np.random.default_rng(0)
    hidden, table = jnp.asarray(rng.normal(size=(2, 4, 3))), jnp.asarray(rng.normal(size=(13, 3)))
    weight = jnp.asarray([[1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 0.5]])
    values = jnp.asarray(rng.normal(size=13))

    def ours(hidden, table):
        return summed_distribution(hidden, table, weight, chunk=chunk, shards=shards) @ values

    def whole(hidden, table):
        return jnp.einsum("bsv,bs,v->", jax.nn.softmax(hidden @ table.T), weight, values)

    assert float(ours(hidden, table)) == pytest.approx(float(whole(hidden, table)), rel=1e-5)
    for one, other in zip(*(jax.grad(f, (0, 1))(hidden, table) for f in (ours, whole)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    nothing = jnp.where(weight[..., None] != 0, hidden, jnp.nan)
    np.testing.assert_array_equal(ours(nothing, table), ours(hidden, table))
    assert np.isfinite(jax.grad(ours)(nothing, table)).all()


def test_what_is_missing_or_senseless_is_refused():
    for make, message in (
        (lambda: MinAvgOut()(spoken().replace(output=None)), "SupervisedInputs.output and .averages must be given"),
        (lambda: MinAvgOut()(spoken().replace(averages=None)), "SupervisedInputs.output and .averages must be given"),
        (lambda: BetaDPO()(random_step()), r"give PreferenceInputs\.averages, or momentum 0"),
        (lambda: MinAvgOut(decay=1.0), r"MinAvgOut: decay must lie in \[0, 1\)"),
        (lambda: MinAvgOut(alpha=-1.0), "MinAvgOut: alpha must be at least 0"),
        (lambda: BetaDPO(momentum=-0.1), r"BetaDPO: momentum must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
