"""Law 9: objectives equal TRL 1.16 and closed forms; gradients equal TRL's and finite differences.

Everything runs in float64, so that tolerances measure the formulas and not the arithmetic.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrlhf_jax.objectives import (
    DPO,
    MMDPO,
    MMDPOReleasedBatch,
    MMDPOReleasedFactor,
    PreferenceInputs,
    Supervised,
    SupervisedInputs,
    step_totals,
)
from mmrlhf_jax.objectives.pairs import log_ratio, pair_log_ratio
from mmrlhf_jax.objectives.preference import draw_pairs, drawn_beta

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "data" / "trl_dpo_golden.json").read_text())
CASES = GOLDEN["cases"]
PAIRS = 5
SEPARABLE = [DPO(gamma=0.25, label_smoothing=0.1), MMDPO(w=0.5, k=0.7, gamma=0.25), MMDPOReleasedFactor(w=0.4)]
EVERY = [*SEPARABLE, MMDPOReleasedBatch(w=0.3)]
by_name = pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
separable = pytest.mark.parametrize("objective", SEPARABLE, ids=lambda o: type(o).__name__)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def preference_inputs(logp, reference_logp, length, pair_weight, pair_margin=None, totals=None) -> PreferenceInputs:
    """One micro-batch that is the whole step, unless the step's totals are given."""
    pair_weight = jnp.asarray(pair_weight, float)
    return PreferenceInputs(
        logp=jnp.asarray(logp, float),
        reference_logp=jnp.asarray(reference_logp, float),
        length=jnp.asarray(length, float),
        pair_weight=pair_weight,
        pair_margin=jnp.zeros_like(pair_weight) if pair_margin is None else jnp.asarray(pair_margin, float),
        totals=totals or step_totals(pair_weight, length, jnp.ones((len(logp), 1))),
        key=jax.random.key(0),
    )


def random_groups(seed: int = 0, groups: int = 3, responses: int = 4) -> PreferenceInputs:
    """Groups with ties, partial orders, uneven pair weights, and margins of both signs."""
    rng = np.random.default_rng(seed)
    order = rng.integers(0, 3, (groups, responses))
    order[:, :2] = [0, 2]  # every group has a pair
    weight = (order[:, :, None] < order[:, None, :]) * rng.uniform(0.2, 2.0, (groups, responses, responses))
    return preference_inputs(
        logp=rng.normal(-20, 4, (groups, responses)),
        reference_logp=rng.normal(-20, 4, (groups, responses)),
        length=rng.integers(1, 30, (groups, responses)),
        pair_weight=weight,
        pair_margin=rng.normal(1, 2, weight.shape) * (weight > 0),
    )


def loss_of(objective, inputs: PreferenceInputs) -> float:
    return float(objective(inputs)[0])


def logp_gradient(objective, inputs: PreferenceInputs) -> np.ndarray:
    return np.asarray(jax.grad(lambda logp: objective(inputs.replace(logp=logp))[0])(inputs.logp))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# --- TRL 1.16 -------------------------------------------------------------------------------------------------------


def golden_rows(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Policy and reference log-prob, length, and summed token weight of the 10 rows (5 chosen, then 5 rejected).

    LD-DPO and length normalisation are weights on tokens, aot is another choice of pairs: all are inputs to the same
    sigmoid, so these TRL losses are golden numbers for DPO as well.
    """
    policy, reference = np.array(GOLDEN["policy_per_token_logps"]), np.array(GOLDEN["ref_per_token_logps"])
    length = np.array(GOLDEN["lens"])
    column = np.arange(policy.shape[1])
    weight = (column < length[:, None]).astype(float)
    if case == "sigmoid_ld_alpha0.5":
        shared = np.tile(np.minimum(length[:PAIRS], length[PAIRS:]), 2)
        weight *= np.where(column < shared[:, None], 1.0, 0.5)
    if case == "sigmoid_norm":
        weight /= length[:, None]
    return (policy * weight).sum(1), (reference * weight).sum(1), length, weight.sum(1)


def as_pairs(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(2, PAIRS).T  # K = 2 groups: chosen, rejected


def as_one_group(rows: np.ndarray) -> np.ndarray:
    return rows[None]  # K = 10, five disjoint pairs


def golden_inputs(case: str, arrange) -> tuple[PreferenceInputs, np.ndarray]:
    logp, reference_logp, length, token_weight = golden_rows(case)
    if arrange is as_pairs:
        pair_weight = np.tile([[0.0, 1.0], [0.0, 0.0]], (PAIRS, 1, 1))
    else:
        pair_weight = np.zeros((1, 2 * PAIRS, 2 * PAIRS))
        pair_weight[0, np.arange(PAIRS), np.arange(PAIRS) + PAIRS] = 1
    return preference_inputs(arrange(logp), arrange(reference_logp), arrange(length), pair_weight), token_weight


def row_gradient(objective, inputs: PreferenceInputs, arrange, token_weight: np.ndarray) -> np.ndarray:
    """Gradient with respect to every token of a row, summed, as the golden file has it."""
    gradient = logp_gradient(objective, inputs)
    return (gradient.T.ravel() if arrange is as_pairs else gradient.ravel()) * token_weight


@pytest.mark.parametrize("arrange", [as_pairs, as_one_group])
@pytest.mark.parametrize(
    ("case", "gamma"),
    [("sigmoid", 0.0), ("mm_rlhf_like_sigmoid1_sft0.25", 0.25), ("sigmoid_ld_alpha0.5", 0.0), ("sigmoid_norm", 0.0)],
)
def test_dpo_is_trls_in_loss_and_gradient(case, gamma, arrange):
    inputs, token_weight = golden_inputs(case, arrange)
    objective = DPO(beta=GOLDEN["beta"], gamma=gamma)
    assert loss_of(objective, inputs) == pytest.approx(CASES[case]["loss"], rel=1e-12)
    gradient = row_gradient(objective, inputs, arrange, token_weight)
    np.testing.assert_allclose(gradient, CASES[case]["grad_sum_per_row"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("arrange", [as_pairs, as_one_group])
@pytest.mark.parametrize("case", ["sigmoid", "sigmoid_ld_alpha0.5"])
def test_metrics_are_trls_under_trls_names(case, arrange):
    metrics = DPO(beta=GOLDEN["beta"])(golden_inputs(case, arrange)[0])[1]
    expected = CASES[case]["metrics"]
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("arrange", [as_pairs, as_one_group])
def test_nll_is_trls_sft_loss(arrange):
    inputs, token_weight = golden_inputs("sft", arrange)
    assert float(DPO()(inputs)[1]["loss/nll"]) == pytest.approx(CASES["sft"]["loss"], rel=1e-12)

    def nll(inputs):
        _, metrics = DPO()(inputs)
        return metrics["loss/nll"], metrics

    np.testing.assert_allclose(
        row_gradient(nll, inputs, arrange, token_weight), CASES["sft"]["grad_sum_per_row"], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("case", ["aot", "aot_ls0.1", "aot_unpaired"])
def test_label_smoothing_is_that_of_trls_aot(case):
    # aot is this loss after the n-th smallest policy ratio has been paired with the n-th smallest reference ratio
    # (aot_unpaired: the n-th smallest chosen with the n-th smallest rejected), so the golden file has no plainer case.
    logp, reference_logp, length, _ = golden_rows(case)
    chosen, rejected = np.arange(PAIRS), np.arange(PAIRS) + PAIRS
    if case == "aot_unpaired":
        ratio = logp - reference_logp
        policy_row = np.stack([chosen[np.argsort(ratio[:PAIRS])], rejected[np.argsort(ratio[PAIRS:])]], axis=1)
        reference_row = policy_row
    else:
        by_policy, by_reference = (np.argsort(x[:PAIRS] - x[PAIRS:]) for x in (logp, reference_logp))
        policy_row = np.stack([chosen[by_policy], rejected[by_policy]], axis=1)
        reference_row = np.stack([chosen[by_reference], rejected[by_reference]], axis=1)
    inputs = preference_inputs(
        logp[policy_row],
        reference_logp[reference_row],
        length[policy_row],
        np.tile([[0.0, 1.0], [0.0, 0.0]], (PAIRS, 1, 1)),
    )
    objective = DPO(beta=GOLDEN["beta"], label_smoothing=CASES[case]["args"].get("label_smoothing", 0.0))
    assert loss_of(objective, inputs) == pytest.approx(CASES[case]["loss"], rel=1e-12)
    gradient = np.zeros(2 * PAIRS)
    gradient[policy_row] = logp_gradient(objective, inputs)
    np.testing.assert_allclose(gradient * length, CASES[case]["grad_sum_per_row"], rtol=1e-10, atol=1e-14)


# --- groups -----------------------------------------------------------------------------------------------------


@by_name
def test_a_ranked_group_of_four_is_its_six_pairs(objective):
    rng = np.random.default_rng(1)
    logp, reference_logp = rng.normal(-20, 3, (2, 4))
    length = np.array([7, 3, 12, 5])
    margin = rng.normal(1, 2, (4, 4))
    ranked = np.triu(np.ones((4, 4)), 1)
    group = preference_inputs(logp[None], reference_logp[None], length[None], ranked[None], margin[None])
    rows = np.argwhere(ranked)
    pair = np.tile([[0.0, 1.0], [0.0, 0.0]], (6, 1, 1))
    pairs = preference_inputs(
        logp[rows], reference_logp[rows], length[rows], pair, pair * margin[tuple(rows.T)][:, None, None]
    )
    if isinstance(objective, MMDPOReleasedBatch):
        objective = dataclasses.replace(objective, selected=1.0)  # the only draw that is the same in both shapes
    (loss, metrics), (expected, expected_metrics) = objective(group), objective(pairs)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    for name in expected_metrics:
        assert float(metrics[name]) == pytest.approx(float(expected_metrics[name]), rel=1e-12), name


@separable
def test_the_loss_of_a_group_is_the_sum_written_out(objective):
    inputs = random_groups()
    logp, reference_logp, weight, margin = map(
        np.asarray, (inputs.logp, inputs.reference_logp, inputs.pair_weight, inputs.pair_margin)
    )
    smoothing = getattr(objective, "label_smoothing", 0.0)
    preference = nll = tokens = 0.0
    for b, i, j in np.argwhere(weight > 0):
        beta = {
            DPO: lambda d: objective.beta,
            MMDPO: lambda d: objective.beta * (1 + objective.w * (1 - math.exp(-objective.k * max(d, 0)))),
            MMDPOReleasedFactor: lambda d: max(objective.beta * (1 + objective.w * d), 1e-3),
        }[type(objective)](margin[b, i, j])
        h = beta * (logp[b, i] - reference_logp[b, i] - logp[b, j] + reference_logp[b, j])
        preference -= weight[b, i, j] * ((1 - smoothing) * log_sigmoid(h) + smoothing * log_sigmoid(-h))
        nll -= weight[b, i, j] * logp[b, i]
        tokens += weight[b, i, j] * float(inputs.length[b, i])
    assert loss_of(objective, inputs) == pytest.approx(
        preference / weight.sum() + objective.gamma * nll / tokens, rel=1e-12
    )


@by_name
def test_the_order_of_responses_does_not_matter(objective):
    inputs = random_groups()
    order = np.array([2, 0, 3, 1])
    permuted = inputs.replace(
        logp=inputs.logp[:, order],
        reference_logp=inputs.reference_logp[:, order],
        length=inputs.length[:, order],
        pair_weight=inputs.pair_weight[:, order][:, :, order],
        pair_margin=inputs.pair_margin[:, order][:, :, order],
    )
    if isinstance(objective, MMDPOReleasedBatch):
        objective = dataclasses.replace(objective, selected=1.0)
    assert loss_of(objective, permuted) == pytest.approx(loss_of(objective, inputs), rel=1e-12)
    np.testing.assert_allclose(
        logp_gradient(objective, permuted), logp_gradient(objective, inputs)[:, order], rtol=1e-10, atol=1e-14
    )


@by_name
def test_a_constant_on_a_whole_prompt_cancels(objective):
    objective = dataclasses.replace(objective, gamma=0.0)
    inputs = random_groups()
    shifted = inputs.replace(logp=inputs.logp + jnp.array([[3.0], [-11.0], [0.5]]))
    assert loss_of(objective, shifted) == pytest.approx(loss_of(objective, inputs), rel=1e-12)


@separable
@pytest.mark.parametrize("cuts", [[1], [2], [1, 2]])
def test_micro_batches_sum_to_the_step(objective, cuts):
    whole = random_groups(groups=3)
    arrays = {n: getattr(whole, n) for n in ("logp", "reference_logp", "length", "pair_weight", "pair_margin")}
    parts = [
        preference_inputs(**dict(zip(arrays, piece)))
        for piece in zip(*(np.split(np.asarray(a), cuts) for a in arrays.values()))
    ]
    totals = jax.tree.map(lambda *x: sum(x), *(part.totals for part in parts))
    results = [objective(part.replace(totals=totals)) for part in parts]
    summed = jax.tree.map(lambda *x: sum(x), *results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), summed, objective(whole))
    gradient = np.concatenate([logp_gradient(objective, part.replace(totals=totals)) for part in parts])
    np.testing.assert_allclose(gradient, logp_gradient(objective, whole), rtol=1e-12, atol=1e-15)


@by_name
@pytest.mark.parametrize("garbage", [-1e300, 1.7e308, np.nan])
def test_padding_may_hold_anything(objective, garbage):
    inputs = random_groups()
    empty = 3  # the last response stands in no pair; the middle group is a filler
    weight = inputs.pair_weight.at[:, empty].set(0).at[:, :, empty].set(0).at[1].set(0)
    length = inputs.length.at[:, empty].set(0)
    clean = inputs.replace(
        pair_weight=weight,
        pair_margin=jnp.where(weight > 0, inputs.pair_margin, 0),
        totals=step_totals(weight, length, jnp.ones((3, 1))),
    )
    slot = jnp.zeros((3, 4), bool).at[:, empty].set(True).at[1].set(True)
    sign = jnp.array([1, -1, 1, -1])  # differences of garbage overflow
    dirty = clean.replace(
        logp=jnp.where(slot, garbage * sign, clean.logp),
        reference_logp=jnp.where(slot, -garbage * sign, clean.reference_logp),
        length=jnp.where(slot, garbage, clean.length),
        pair_margin=jnp.where(weight > 0, clean.pair_margin, -garbage),
        totals=step_totals(weight, jnp.where(slot, garbage, length), jnp.ones((3, 1))),
    )
    jax.tree.map(np.testing.assert_array_equal, objective(dirty), objective(clean))
    gradient = logp_gradient(objective, dirty)
    np.testing.assert_array_equal(gradient, logp_gradient(objective, clean))
    assert not gradient[np.asarray(slot)].any()
    assert gradient[~np.asarray(slot)].all()


# --- gradients --------------------------------------------------------------------------------------------------


def central_difference(function, x: jax.Array, step: float = 1e-5) -> np.ndarray:
    directions = jnp.eye(x.size).reshape(x.size, *x.shape) * step
    rise = jax.vmap(lambda d: function(x + d) - function(x - d))(directions)
    return np.asarray(rise / (2 * step)).reshape(x.shape)


@separable
def test_gradients_are_finite_differences(objective):
    inputs = random_groups()
    expected = central_difference(lambda logp: objective(inputs.replace(logp=logp))[0], inputs.logp)
    np.testing.assert_allclose(logp_gradient(objective, inputs), expected, rtol=1e-7, atol=1e-10)


def test_the_batch_beta_passes_no_gradient():
    inputs = random_groups()
    objective = MMDPOReleasedBatch(w=0.3)
    beta = float(objective(inputs)[1]["beta/mean"])
    assert beta != pytest.approx(objective.beta, rel=1e-3)
    fixed = DPO(beta=beta, gamma=objective.gamma)
    assert loss_of(objective, inputs) == pytest.approx(loss_of(fixed, inputs), rel=1e-12)
    expected = central_difference(lambda logp: fixed(inputs.replace(logp=logp))[0], inputs.logp)
    np.testing.assert_allclose(logp_gradient(objective, inputs), expected, rtol=1e-7, atol=1e-10)


def test_extreme_log_ratios_stay_finite():
    one_pair = [[[0.0, 1.0], [0.0, 0.0]]]
    for logp, slope in [([[-1e6, 0.0]], -0.1), ([[0.0, -1e6]], 0.0)]:
        inputs = preference_inputs(logp, [[0.0, 0.0]], [[1, 1]], one_pair)
        assert np.isfinite(loss_of(DPO(), inputs))
        np.testing.assert_allclose(logp_gradient(DPO(), inputs), [[slope, -slope]], atol=1e-12)


# --- MM-DPO, published and released -------------------------------------------------------------------------------


def pair_with_margin(margin: float) -> PreferenceInputs:
    """One pair whose log-ratio is 1.5."""
    return preference_inputs(
        [[-10.0, -12.0]], [[-11.0, -11.5]], [[4, 4]], [[[0.0, 1.0], [0.0, 0.0]]], [[[0.0, margin], [0.0, 0.0]]]
    )


@pytest.mark.parametrize(
    ("margin", "beta", "loss"),
    [
        (0.0, 0.1, 0.6209570477895321),
        (1.0, 0.11967346701436835, 0.6074146726687079),
        (4.0, 0.14323323583816935, 0.5914812473173431),
        (-1.0, 0.1, 0.6209570477895321),  # the formula alone would give 0.0676
        (-1e300, 0.1, 0.6209570477895321),
        (1e300, 0.15, -log_sigmoid(0.15 * 1.5)),
    ],
)
def test_beta_follows_the_margin_within_its_bounds(margin, beta, loss):
    value, metrics = MMDPO(gamma=0.0)(pair_with_margin(margin))
    assert float(metrics["beta/mean"]) == pytest.approx(beta, rel=1e-14)
    assert float(metrics["margin/mean"]) == margin
    assert float(value) == pytest.approx(loss, rel=1e-14)


def test_conservative_dpo_in_closed_form():
    assert loss_of(DPO(), pair_with_margin(0.0)) == pytest.approx(0.6209570477895321, rel=1e-14)
    assert loss_of(DPO(label_smoothing=0.1), pair_with_margin(0.0)) == pytest.approx(0.6359570477895321, rel=1e-14)


def test_mmdpo_without_width_is_dpo():
    inputs = random_groups()
    assert loss_of(MMDPO(w=0.0), inputs) == pytest.approx(loss_of(DPO(gamma=0.25), inputs), rel=1e-14)


def test_the_released_factor_can_carry_the_published_beta():
    inputs = random_groups()
    factor = 1 - jnp.exp(-0.5 * jnp.maximum(inputs.pair_margin, 0))
    published, released = MMDPO(w=0.5, k=0.5), MMDPOReleasedFactor(w=0.5)
    assert loss_of(released, inputs.replace(pair_margin=factor)) == pytest.approx(loss_of(published, inputs), rel=1e-13)


@pytest.mark.parametrize(("factor", "beta"), [(1.0, 0.11), (-3.0, 0.07), (-1e9, 1e-3), (100.0, 1.1)])
def test_the_released_factor_is_bounded_below_only(factor, beta):
    _, metrics = MMDPOReleasedFactor(w=0.1)(pair_with_margin(factor))
    assert float(metrics["beta/mean"]) == pytest.approx(beta, rel=1e-14)


def chain_of_log_ratios(z) -> PreferenceInputs:
    """One K = 2 group for each log-ratio."""
    z = np.asarray(z, float)
    pair_weight = np.tile([[0.0, 1.0], [0.0, 0.0]], (len(z), 1, 1))
    return preference_inputs(np.stack([z, 0 * z], 1), np.zeros((len(z), 2)), np.ones((len(z), 2)), pair_weight)


@pytest.mark.parametrize(("z", "drawn", "beta"), [([0.5, 1, 1.5, 2], [1, 2, 3], 0.1025), ([-900, 100, 0], [0], 1e-3)])
def test_the_batch_beta_given_the_draw(z, drawn, beta):
    inputs = chain_of_log_ratios(z)
    valid = inputs.pair_weight > 0
    mask = jnp.zeros_like(valid).at[jnp.asarray(drawn), 0, 1].set(True)
    value = drawn_beta(pair_log_ratio(log_ratio(inputs)), valid, mask, beta=0.1, w=0.1)
    assert float(value) == pytest.approx(beta, rel=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_the_batch_objective_restated_from_its_draw(seed):
    inputs = random_groups(seed).replace(key=jax.random.key(seed))
    objective = MMDPOReleasedBatch(w=0.2, gamma=0.0)
    weight = np.asarray(inputs.pair_weight)
    ratio = np.asarray(inputs.logp - inputs.reference_logp)
    z = ratio[:, :, None] - ratio[:, None, :]
    valid = weight > 0
    drawn = np.asarray(draw_pairs(inputs.key, jnp.asarray(z), jnp.asarray(valid), objective.selected))
    assert not (drawn & ~valid).any()
    assert drawn.sum() == int(0.8 * valid.sum())
    beta = max(0.1 * (1 + 0.2 * (z[drawn].mean() - z[valid].mean())), 1e-3)
    loss, metrics = objective(inputs)
    assert float(metrics["beta/mean"]) == pytest.approx(beta, rel=1e-12)
    expected = sum(w * -log_sigmoid(beta * h) for w, h in zip(weight[valid], z[valid])) / weight.sum()
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_of_two_pairs_one_is_drawn():
    inputs = chain_of_log_ratios([1.0, 4.0])
    betas = {
        round(float(MMDPOReleasedBatch()(inputs.replace(key=jax.random.key(seed)))[1]["beta/mean"]), 12)
        for seed in range(20)
    }
    assert betas == {0.085, 0.115}  # 0.1 (1 -+ 0.1 * 1.5): which of the two is chance


@pytest.mark.parametrize("beta", [0.1, 5e-4])
def test_of_one_pair_none_is_drawn_and_beta_stays(beta):
    loss, metrics = MMDPOReleasedBatch(beta=beta)(chain_of_log_ratios([7.0]))
    assert float(metrics["beta/mean"]) == pytest.approx(beta, rel=1e-14)
    assert np.isfinite(float(loss))


@pytest.mark.parametrize("pairs", [2, 3, 5, 10, 15, 25])
@pytest.mark.parametrize("selected", [0.1, 0.7, 0.8, 1.0])
def test_the_number_drawn_is_pythons(pairs, selected):
    inputs = chain_of_log_ratios(np.linspace(-1, 1, pairs))
    drawn = draw_pairs(jax.random.key(0), pair_log_ratio(log_ratio(inputs)), inputs.pair_weight > 0, selected)
    assert int(drawn.sum()) == int(selected * pairs)


def test_pairs_are_drawn_in_proportion_without_replacement():
    z = np.array([-1.0, 0.0, 0.5, 4.0])
    density = np.exp(-0.5 * ((z - z.mean()) / (z.std(ddof=1) + 1e-7)) ** 2)
    expected = np.zeros(4)
    for order in itertools.permutations(range(4), 3):  # int(0.8 * 4) draws, one after the other
        probability, left = 1.0, density.sum()
        for i in order:
            probability, left = probability * density[i] / left, left - density[i]
        expected[list(order)] += probability
    inputs = chain_of_log_ratios(z)
    trials = 4000
    drawn = jax.vmap(lambda key: draw_pairs(key, pair_log_ratio(log_ratio(inputs)), inputs.pair_weight > 0, 0.8))(
        jax.random.split(jax.random.key(3), trials)
    )
    deviation = np.sqrt(expected * (1 - expected) / trials)
    assert (np.abs(np.asarray(drawn.mean(0))[:, 0, 1] - expected) < 4 * deviation).all()
    assert expected.min() < 0.65  # far from uniform, 0.75 each


# --- supervised -------------------------------------------------------------------------------------------------


def test_supervised_is_trls_sft_loss_on_the_chosen_rows():
    logp = jnp.asarray(GOLDEN["policy_per_token_logps"])[:PAIRS]
    weight = (jnp.arange(logp.shape[1]) < jnp.asarray(GOLDEN["lens"])[:PAIRS, None]).astype(float)
    totals = step_totals(jnp.zeros((PAIRS, 1, 1)), weight.sum(1, keepdims=True), weight)

    def loss(logp):
        return Supervised()(SupervisedInputs(logp, weight, totals))[0]

    assert float(loss(logp)) == pytest.approx(CASES["sft"]["loss"], rel=1e-12)
    gradient = np.asarray(jax.grad(loss)(logp)).sum(1)
    np.testing.assert_allclose(gradient, CASES["sft"]["grad_sum_per_row"][:PAIRS], rtol=1e-12)


def test_supervised_micro_batches_sum_to_the_step_and_ignore_padding():
    rng = np.random.default_rng(0)
    logp, weight = jnp.asarray(rng.normal(-2, 1, (4, 6))), jnp.asarray(rng.choice([0, 1, 0.5], (4, 6)))
    none = jnp.zeros((1, 1, 1))
    totals = [step_totals(none, jnp.zeros((1, 1)), w[None]) for w in weight]
    step = jax.tree.map(lambda *x: sum(x), *totals)
    assert jax.tree.all(jax.tree.map(operator.eq, step, step_totals(none, jnp.zeros((1, 1)), weight)))
    dirty = jnp.where(weight > 0, logp, jnp.inf)
    parts = [Supervised()(SupervisedInputs(dirty[b : b + 1], weight[b : b + 1], step)) for b in range(4)]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    whole = Supervised()(SupervisedInputs(logp, weight, step))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), summed, whole)
    assert float(whole[0]) == pytest.approx(float(-(weight * logp).sum() / weight.sum()), rel=1e-12)
