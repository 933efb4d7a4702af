"""The family's objectives in closed form: golden vectors computed by hand from the papers' equations, and what each
becomes in a limit. Everything runs in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_samples import inputs_of, random_step, reward_step, tokens_of

from mmrlhf_jax.objectives import (
    DDPO,
    DPO,
    MMDPO,
    MMPO,
    REFUEL,
    SELM,
    BetaDPO,
    ClassificationReward,
    LLaVARLHFReward,
    MarginReward,
    PlackettLuce,
    PreferenceInputs,
    RewardInputs,
    ScalarReward,
    StepDPO,
    TokenwiseReward,
    VisitDPO,
    step_totals,
)
from mmrlhf_jax.objectives.divergence import derivative
from mmrlhf_jax.objectives.exploration import average_output, avgout
from mmrlhf_jax.objectives.listwise import ranking_nll
from mmrlhf_jax.objectives.reward_heads import (
    conditional_value_at_risk,
    expected,
    expected_utility,
    exponential_utility,
    gated_quantiles,
    masked_mse,
    masked_pinball,
    pinball,
    quantile_levels,
)
from mmrlhf_jax.objectives.soft_labels import visit_smoothing


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def pair(margin=0.0, score=(0.0, 0.0)) -> PreferenceInputs:
    """lp_c = -10, lp_r = -12, ref_c = -11, ref_r = -11.5: z = 1.5, and s_c = 1."""
    weight = jnp.array([[[0.0, 1.0], [0.0, 0.0]]])
    length = jnp.array([[4.0, 4.0]])
    return PreferenceInputs(
        logp=jnp.array([[-10.0, -12.0]]),
        reference_logp=jnp.array([[-11.0, -11.5]]),
        length=length,
        pair_weight=weight,
        pair_margin=margin * weight,
        totals=step_totals(weight, length, jnp.ones((1, 8))),
        key=jax.random.key(0),
        score=jnp.array([score], float),
    )


def loss_of(objective, inputs):
    return float(objective(inputs)[0])


@pytest.mark.parametrize(
    ("objective", "inputs", "loss"),
    [
        (DPO(), {}, 0.6209570477895321),
        (DPO(label_smoothing=0.1), {}, 0.6359570477895321),
        (MMDPO(gamma=0.0), {"margin": 1.0}, 0.6074146726687079),
        (MMPO(sharpness=2.2), {"margin": 1.0}, 0.6871715626330728),
        (MMPO(sharpness=2.2, beta=0.1), {"margin": 1.0}, 0.6359196211574849),
        (SELM(beta=0.01, alpha=1e-3, visited="chosen"), {}, 0.6856853052962774),
        (REFUEL(eta=1e3), {"margin": 0.3}, 0.08910225),
        (REFUEL(eta=1e3, scaling="released"), {"margin": 0.3}, 89102.25),
        (VisitDPO(), {"score": (6.0, 2.0)}, -0.75 * log_sigmoid(0.15) - 0.25 * log_sigmoid(-0.15)),
        (PlackettLuce(), {}, 0.6209570477895321),
    ],
    ids=lambda value: type(value).__name__ if callable(value) else "",
)
def test_golden_pair(objective, inputs, loss):
    assert loss_of(objective, pair(**{"margin": 0.0, **inputs})) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    ("better", "worse", "smoothing"), [(6, 2, 0.25), (2, 6, 0.5), (0, 0, 0.0), (0, 3, 0.5), (9, 1, 0.1)]
)
def test_a_label_is_the_less_certain_the_more_the_worse_one_was_visited(better, worse, smoothing):
    assert float(visit_smoothing(jnp.array(1.0 * better), jnp.array(1.0 * worse))) == pytest.approx(smoothing)


def test_a_margin_of_nothing_carries_no_signal_and_a_certain_one_is_dpo():
    inputs = random_step()
    z = inputs.replace(pair_margin=jnp.where(inputs.pair_weight > 0, 5.0, 0))
    assert loss_of(MMPO(sharpness=1e3, beta=0.1), z) == pytest.approx(loss_of(DPO(), z), rel=1e-12)

    def loss(shift):
        return MMPO(sharpness=0.0)(inputs.replace(logp=inputs.reference_logp.at[0, 0].add(shift)))[0]

    assert float(jax.grad(loss)(0.0)) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("visited", ["both", "chosen", "rejected"])
def test_optimism_lowers_what_was_visited(visited):
    inputs = pair()
    slope = jax.grad(lambda logp: SELM(visited=visited)(inputs.replace(logp=logp))[0] - SELM(alpha=0.0)(
        inputs.replace(logp=logp))[0])(inputs.logp)  # fmt: skip
    share = {"both": [0.5, 0.5], "chosen": [1, 0], "rejected": [0, 1]}[visited]
    np.testing.assert_allclose(slope[0], np.multiply(share, 1e-3 * 0.01), rtol=1e-9, atol=1e-18)


def test_both_scalings_of_the_regression_differ_by_eta_squared():
    inputs = random_step()
    paper, released = (loss_of(REFUEL(eta=7.0, scaling=s), inputs) for s in ("paper", "released"))
    assert released == pytest.approx(49 * paper, rel=1e-12)


# --- listwise -------------------------------------------------------------------------------------------------------


def test_a_ranking_is_drawn_from_the_top():
    value = jnp.array([[0.5, -1.0, 2.0, 0.0]])
    order = [2, 0, 3, 1]  # best first
    worse = np.zeros((1, 4, 4), bool)
    for place, i in enumerate(order):
        worse[0, i, order[place + 1 :]] = True
    weight = np.exp(np.asarray(value[0]))
    left, probability = sum(weight), 1.0
    for i in order:
        probability *= weight[i] / left
        left -= weight[i]
    assert float(ranking_nll(value, jnp.asarray(worse))[0]) == pytest.approx(-math.log(probability), rel=1e-12)


def test_all_rankings_together_are_certain():
    import itertools

    value = jnp.array([[0.3, -0.7, 1.1]])
    total = 0.0
    for order in itertools.permutations(range(3)):
        worse = np.zeros((1, 3, 3), bool)
        for place, i in enumerate(order):
            worse[0, i, list(order[place + 1 :])] = True
        total += math.exp(-float(ranking_nll(value, jnp.asarray(worse))[0]))
    assert total == pytest.approx(1.0, rel=1e-12)


def test_tied_responses_do_not_compete():
    value = jnp.array([[1.0, 0.2, -0.5]])
    worse = jnp.array([[[False, False, True], [False, False, True], [False, False, False]]])  # 0 and 1 tied above 2
    written = -log_sigmoid(1.5) - log_sigmoid(0.7)
    assert float(ranking_nll(value, worse)[0]) == pytest.approx(written, rel=1e-12)


def test_the_listwise_loss_is_a_mean_over_groups_whatever_pairs_weigh():
    inputs = random_step()
    even = inputs.replace(pair_weight=(inputs.pair_weight > 0).astype(float))
    even = even.replace(totals=step_totals(even.pair_weight, even.length, even.tokens.weight))
    assert loss_of(PlackettLuce(), inputs) == pytest.approx(loss_of(PlackettLuce(), even), rel=1e-12)
    ratio = np.asarray(inputs.logp - inputs.reference_logp)
    nll = [
        float(ranking_nll(jnp.asarray(0.1 * ratio[b : b + 1]), inputs.pair_weight[b : b + 1] > 0)[0]) for b in range(3)
    ]
    assert loss_of(PlackettLuce(), inputs) == pytest.approx(np.mean(nll), rel=1e-12)


# --- single tokens ---------------------------------------------------------------------------------------------------


def golden_segments() -> PreferenceInputs:
    """Chosen log-probs -1 -2 -3 -4 whose third token alone differs from the rejected response's."""
    tokens = tokens_of([[[5, 6, 7, 8], [5, 6, 9, 8]]], [[[-1, -2, -3, -4], [-1, -1, -1, -1]]], [[[0] * 4, [0] * 4]])
    return inputs_of(tokens, [[[0, 1], [0, 0]]])


def test_golden_segment_weights():
    inputs = golden_segments()
    summed = DDPO(weight=5.0, average=False)(inputs)[1]
    averaged = DDPO(weight=5.0)(inputs)[1]
    assert float(summed["logps/chosen"]) == pytest.approx(-22)
    assert float(averaged["logps/chosen"]) == pytest.approx(-2.75)
    assert float(averaged["changed/chosen"]) == 1
    assert loss_of(DDPO(weight=5.0), inputs) == pytest.approx(-log_sigmoid(0.5 * (-2.75 + 1)), rel=1e-12)


def test_an_average_is_over_the_weights_however_small():
    """All tokens differ and weigh 0.1: averaged, they say what they do at weight 1."""
    tokens = tokens_of([[[1, 2, 3], [7, 8]]], [[[-1.0, -2.0, -6.0], [-4.0, -2.0]]], [[[0.0] * 3, [0.0] * 2]])
    inputs = inputs_of(tokens, [[[0, 1], [0, 0]]])
    values = [loss_of(DDPO(weight=weight), inputs) for weight in (0.1, 1.0)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[1] == pytest.approx(-log_sigmoid(0.5 * (-3 + 3)), rel=1e-12)


def test_segments_depend_on_the_response_compared_with():
    """One answer, corrected in two places by two others: each pair weighs its own place."""
    texts = [[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 8, 8]]
    logp = [[-1.0, -2.0, -4.0, -8.0], [-1.0] * 4, [-1.0] * 5]
    tokens = tokens_of([texts], [logp], [[np.zeros(len(t)) for t in texts]])
    first = inputs_of(tokens, [[[0, 1, 0], [0, 0, 0], [0, 0, 0]]])
    second = inputs_of(tokens, [[[0, 0, 1], [0, 0, 0], [0, 0, 0]]])
    objective = DDPO(weight=3.0, average=False)
    assert float(objective(first)[1]["logps/chosen"]) == pytest.approx(-15 - 2 * 1)
    assert float(objective(second)[1]["logps/chosen"]) == pytest.approx(-15 - 2 * 8)
    assert float(objective(second)[1]["changed/rejected"]) == 2


@pytest.mark.parametrize("objective", [DDPO(weight=1.0, average=False, beta=0.1), StepDPO(average=False)])
def test_sums_without_extra_weight_are_dpo(objective):
    inputs = random_step()
    assert loss_of(objective, inputs) == pytest.approx(loss_of(DPO(), inputs), rel=1e-12)


def test_a_step_is_averaged_from_where_two_responses_part():
    texts = [[1, 2, 3, 4], [1, 2, 9]]
    tokens = tokens_of([texts], [[[-1.0, -2, -3, -6], [-1, -2, -0.5]]], [[[0.0] * 4, [0.0] * 3]])
    z = (-3 - 6) / 2 + 0.5
    assert loss_of(StepDPO(), inputs_of(tokens, [[[0, 1], [0, 0]]])) == pytest.approx(-log_sigmoid(0.1 * z), rel=1e-12)


def test_a_response_that_only_begins_the_other_has_no_step_of_its_own():
    tokens = tokens_of([[[1, 2], [1, 2, 3, 4]]], [[[-1.0, -2], [-1, -2, -3, -5]]], [[[0.0] * 2, [0.0] * 4]])
    value = loss_of(StepDPO(), inputs_of(tokens, [[[0, 1], [0, 0]]]))
    assert value == pytest.approx(-log_sigmoid(0.1 * 4), rel=1e-12)


def test_what_needs_tokens_says_so():
    for objective, words in (
        (StepDPO(), "PreferenceInputs.tokens must be given"),
        (DPO(ld_alpha=0.5), "PreferenceInputs.tokens must be given"),
        (DDPO(), "PreferenceInputs.tokens must be given"),
    ):
        with pytest.raises(ValueError, match=words):
            objective(pair())
    bare = random_step()
    bare = bare.replace(tokens=bare.tokens.replace(changed=None, collision=None))
    with pytest.raises(ValueError, match=r"Tokens\.changed must be given"):
        DDPO()(bare)
    with pytest.raises(ValueError, match=r"Tokens\.collision must be given"):
        DPO(wpo=True)(bare)


# --- a batch's statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_beta_dpo_restated_from_its_draw(threshold):
    from mmrlhf_jax.objectives.preference import draw_pairs

    inputs = random_step(weights=False)
    objective = BetaDPO(alpha=0.3, threshold=threshold, kept=0.6, momentum=0.0)
    valid = np.asarray(inputs.pair_weight) > 0
    ratio = np.asarray(inputs.logp - inputs.reference_logp)
    z = ratio[:, :, None] - ratio[:, None, :]
    drawn = np.asarray(draw_pairs(inputs.key, jnp.asarray(z * valid), jnp.asarray(valid), 0.6))
    assert 0 < drawn.sum() == int(0.6 * valid.sum())
    beta = max(0.1 * (1 + 0.3 * (z[drawn].mean() - (z[valid].mean() if threshold is None else threshold))), 1e-3)
    loss, metrics = objective(inputs)
    assert float(metrics["beta/mean"]) == pytest.approx(beta, rel=1e-12)
    assert float(metrics["kept"]) == pytest.approx(drawn.sum() / valid.sum())
    assert float(loss) == pytest.approx(np.mean([-log_sigmoid(beta * h) for h in z[drawn]]), rel=1e-12)


def test_of_one_pair_beta_dpo_leaves_none_out():
    loss, metrics = BetaDPO(momentum=0.0)(pair())
    assert float(metrics["beta/mean"]) == pytest.approx(0.1, rel=1e-12)
    assert float(loss) == pytest.approx(0.6209570477895321, rel=1e-12)


# --- f-divergences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("reverse_kl", lambda t: t * jnp.log(t)),
        ("forward_kl", lambda t: -jnp.log(t)),
        ("js_divergence", lambda t: t * jnp.log(2 * t / (1 + t)) + jnp.log(2 / (1 + t))),
        ("alpha_divergence", lambda t: (t**0.3 - 0.3 * t - 0.7) / (0.3 * (0.3 - 1))),
    ],
)
def test_a_divergence_is_derived_from_its_f(name, f):
    """Up to a constant, which cancels between two responses."""
    log_t = jnp.array([-2.0, -0.3, 0.0, 1.7])
    slope = jax.vmap(jax.grad(lambda x: f(jnp.exp(x))))(log_t) / jnp.exp(log_t)
    ours = derivative(log_t, name, 0.3)
    np.testing.assert_allclose(ours - ours[2], slope - slope[2], rtol=1e-12, atol=1e-14)


# --- rewards ---------------------------------------------------------------------------------------------------------


def scored(score=(1.2, -0.3), margin=0.0) -> RewardInputs:
    weight = jnp.array([[[0.0, 1.0], [0.0, 0.0]]])
    nothing = jnp.zeros((1, 2))
    totals = step_totals(weight, nothing, nothing)
    return RewardInputs(jnp.array([score]), nothing, nothing, weight, 0 * weight, totals, margin * weight)


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (ScalarReward(centre=0.0), 0.2014132779827524),
        (ScalarReward(centre=0.01), 0.2095132779827524),
        (ClassificationReward(), 0.8176377118065583),
        (LLaVARLHFReward(), 0.2023132779827524),
    ],
    ids=lambda value: type(value).__name__ if callable(value) else "",
)
def test_golden_rewards(objective, loss):
    assert loss_of(objective, scored()) == pytest.approx(loss, rel=1e-12)


def test_a_margin_asks_for_distance():
    assert loss_of(MarginReward(centre=0.0), scored(margin=1.0)) == pytest.approx(-log_sigmoid(0.5), rel=1e-12)
    assert loss_of(MarginReward(centre=0.0, scale=2.0), scored(margin=1.0)) == pytest.approx(-log_sigmoid(-0.5))
    plain = reward_step()
    still = plain.replace(pair_margin=jnp.zeros_like(plain.pair_margin))
    assert loss_of(MarginReward(), still) == pytest.approx(loss_of(ScalarReward(), plain), rel=1e-12)


def test_tokens_are_compared_place_by_place_from_the_first_difference():
    tokens = tokens_of([[[1, 2, 3, 4], [1, 9]]], [[[0.0] * 4, [0.0] * 2]], [[[0.0] * 4, [0.0] * 2]])
    token_score = jnp.array([[9.0, 1.0, 2.0, 3.0, -7.0, 0.5]])
    inputs = scored().replace(tokens=tokens, token_score=token_score)
    # the first place is shared; the shorter response keeps its last score
    written = np.mean([-log_sigmoid(d) for d in (1 - 0.5, 2 - 0.5, 3 - 0.5)])
    assert loss_of(TokenwiseReward(), inputs) == pytest.approx(written, rel=1e-12)


def test_golden_pinball_and_the_quantile_it_fits():
    loss = pinball(jnp.array([0.0, 1.0, 3.0]), jnp.array(2.0), jnp.array([0.1, 0.5, 0.9]))
    np.testing.assert_allclose(loss, [0.2, 0.5, 0.1], rtol=1e-12)
    label = jnp.asarray(np.random.default_rng(0).normal(size=999))
    grid = jnp.linspace(-2, 2, 801)
    cost = pinball(grid[:, None, None], label, jnp.array([0.2])).mean((1, 2))
    assert float(grid[jnp.argmin(cost)]) == pytest.approx(float(jnp.quantile(label, 0.2)), abs=0.01)
    np.testing.assert_allclose(quantile_levels(3), [0.25, 0.5, 0.75])


def test_unlabelled_attributes_cost_nothing_whatever_they_hold():
    prediction, mask = jnp.array([[1.0, 4.0], [0.0, jnp.inf]]), jnp.array([[True, True], [True, False]])
    label = jnp.array([[0.0, 2.0], [3.0, jnp.nan]])
    assert float(masked_mse(prediction, label, mask)) == pytest.approx((1 + 4 + 9) / 3)
    assert float(masked_mse(prediction, label, mask & False)) == 0
    quantiles = jnp.stack([prediction, prediction], -1)
    levels = jnp.array([0.5, 0.5])
    assert float(masked_pinball(quantiles, label, levels, mask)) == pytest.approx(0.5 * (1 + 2 + 3) / 3)
    slope = jax.grad(lambda p: masked_mse(p, label, mask))(prediction)
    assert np.isfinite(slope).all()
    assert float(slope[1, 1]) == 0


def test_risk_measures_lie_between_the_worst_and_the_mean():
    q = jnp.array([3.0, -1.0, 0.0, 2.0])
    assert float(expected(q)) == 1.0
    assert float(conditional_value_at_risk(q, 1.0)) == pytest.approx(1.0)
    assert float(conditional_value_at_risk(q, 0.25)) == -1.0
    assert float(conditional_value_at_risk(q, 0.375)) == pytest.approx((-1 + 0.5 * 0) / 1.5)
    assert float(exponential_utility(q, 1e-6)) == pytest.approx(1.0, abs=1e-5)
    assert -1 < float(exponential_utility(q, 2.0)) < 1
    assert float(exponential_utility(q, 500.0)) == pytest.approx(-1.0, abs=0.01)
    assert float(expected_utility(q, 1.0)) == pytest.approx(-np.mean(np.exp([-3, 1, 0, -2])))
    for call, words in (
        (lambda: conditional_value_at_risk(q, 0.0), "alpha"),
        (lambda: exponential_utility(q, 0), "av"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_gated_quantiles_are_those_of_one_distribution():
    quantiles = jnp.array([[0.0, 2.0, 1.0], [1.0, 3.0, 5.0]])  # the first two cross
    np.testing.assert_allclose(gated_quantiles(quantiles, jnp.array([0.5, 0.5])), [0.5, 2.5, 3.0])


# --- diversity -------------------------------------------------------------------------------------------------------


def test_golden_avgout():
    probability = jnp.array([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [jnp.nan] * 3]])
    output = average_output(probability, jnp.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(output, [0.4, 0.5, 0.1], rtol=1e-12)
    penalty, moved = avgout(output, jnp.full(3, 1 / 3), 0.9)
    np.testing.assert_allclose(moved, [0.34, 0.35, 0.31], rtol=1e-12)
    assert float(penalty) == pytest.approx(0.342, rel=1e-12)


def test_the_moving_average_passes_no_gradient():
    output, average = jnp.array([0.4, 0.5, 0.1]), jnp.full(3, 1 / 3)
    slope = jax.grad(lambda d: avgout(d, average, 0.9)[0])(output)
    np.testing.assert_allclose(slope, avgout(output, average, 0.9)[1], rtol=1e-12)
