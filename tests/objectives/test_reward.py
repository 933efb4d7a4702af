"""Reward objectives: closed forms, TRL's formula, finite differences, and what padding and empty terms may not do.

Everything runs in float64, so that tolerances measure the formulas and not the arithmetic.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from mmrlhf_jax.objectives import CritiqueReward, RewardInputs, ScalarReward, StepTotals, step_totals

CRITIQUE = CritiqueReward(critique=0.7, bradley_terry=1.3, centre=0.05, tie=0.4)
SCALAR = ScalarReward(centre=0.05, tie=0.4)
both = pytest.mark.parametrize("objective", [CRITIQUE, SCALAR], ids=lambda o: type(o).__name__)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def reward_inputs(score, pair_weight, tie_weight=None, logp=None, loss_weight=None) -> RewardInputs:
    """One micro-batch that is the whole step; without critiques where none are given."""
    pair_weight = jnp.asarray(pair_weight, float)
    tie_weight = jnp.zeros_like(pair_weight) if tie_weight is None else jnp.asarray(tie_weight, float)
    logp = jnp.zeros((len(score), 1)) if logp is None else jnp.asarray(logp, float)
    loss_weight = jnp.zeros_like(logp) if loss_weight is None else jnp.asarray(loss_weight, float)
    score = jnp.asarray(score, float)
    totals = step_totals(pair_weight, jnp.zeros_like(score), loss_weight, tie_weight)
    return RewardInputs(score, logp, loss_weight, pair_weight, tie_weight, totals)


def random_step(seed: int = 0, groups: int = 3) -> RewardInputs:
    """K = 4 with pairs, ties and critiques; every response stands in some pair."""
    rng = np.random.default_rng(seed)
    upper = np.triu(np.ones((4, 4)), 1)
    ties = rng.random((groups, 4, 4)) < 0.3
    pairs = np.where(ties, 0, upper) * rng.uniform(0.5, 2, (groups, 4, 4))
    pairs[:, 0, 3], pairs[:, 1, 2], ties[:, 0, 3], ties[:, 1, 2] = 1, 1, False, False
    return reward_inputs(
        rng.normal(0, 2, (groups, 4)),
        pairs,
        ties * upper * rng.uniform(0.5, 2, (groups, 4, 4)),
        rng.normal(-2, 1, (groups, 9)),
        rng.choice([0, 1, 0.5], (groups, 9)),
    )


def loss_of(objective, inputs: RewardInputs) -> float:
    return float(objective(inputs)[0])


def gradients(objective, inputs: RewardInputs) -> tuple[np.ndarray, np.ndarray]:
    """With respect to scores and token log-probs."""

    def loss(score, logp):
        return objective(inputs.replace(score=score, logp=logp))[0]

    return tuple(map(np.asarray, jax.grad(loss, argnums=(0, 1))(inputs.score, inputs.logp)))


# --- closed forms -------------------------------------------------------------------------------------------------


def test_one_group_by_hand():
    """Scores 2, 1, .5, -1; the first beats the others, the middle two are tied and both beat the last."""
    pairs = np.zeros((1, 4, 4))
    pairs[0][[0, 0, 0, 1, 2], [1, 2, 3, 3, 3]] = 1
    ties = np.zeros((1, 4, 4))
    ties[0, 1, 2] = 1
    inputs = reward_inputs([[2.0, 1.0, 0.5, -1.0]], pairs, ties, [[-1.0, -3.0, 7.0, -2.0]], [[1, 1, 0, 0.5]])
    loss, metrics = CritiqueReward(critique=2.0, bradley_terry=3.0, centre=0.1, tie=5.0)(inputs)
    softplus = [math.log1p(math.exp(-d)) for d in (2 - 1, 2 - 0.5, 2 + 1, 1 + 1, 0.5 + 1)]
    expected = {
        "loss/bradley_terry": sum(softplus) / 5,
        "loss/centre": (3**2 + 2.5**2 + 1**2 + 0**2 + 0.5**2) / 5,
        "loss/tie": 0.5**2,
        "loss/critique": (1 + 3 + 0.5 * 2) / 2.5,
        "logps/token": -(1 + 3 + 0.5 * 2) / 2.5,
        "rewards/accuracies": 1.0,
        "rewards/margins": (1 + 1.5 + 3 + 2 + 1.5) / 5,
        "rewards/chosen": (2 + 2 + 2 + 1 + 0.5) / 5,
        "rewards/rejected": (1 + 0.5 - 1 - 1 - 1) / 5,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-12)
    total = 3 * expected["loss/bradley_terry"] + 0.1 * expected["loss/centre"] + 5 * 0.25 + 2 * 2.0
    assert float(loss) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("centre", [0.0, 0.01, 0.3])
def test_pairs_cost_what_trls_reward_trainer_says(centre):
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(0, 2, (2, 6))
    pairs = np.tile([[0.0, 1.0], [0.0, 0.0]], (6, 1, 1))
    trl = np.mean(np.log1p(np.exp(-(chosen - rejected)))) + centre * np.mean((chosen + rejected) ** 2)
    assert loss_of(ScalarReward(centre=centre), reward_inputs(np.stack([chosen, rejected], 1), pairs)) == pytest.approx(
        trl, rel=1e-12
    )


def test_a_group_is_its_pairs():
    scores = np.array([1.5, 0.2, -0.3, 0.1])
    ranked = np.triu(np.ones((4, 4)), 1)
    rows = np.argwhere(ranked)
    pairs = np.tile([[0.0, 1.0], [0.0, 0.0]], (6, 1, 1))
    (loss, metrics) = SCALAR(reward_inputs(scores[None], ranked[None]))
    (expected, expected_metrics) = SCALAR(reward_inputs(scores[rows], pairs))
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, expected_metrics), rel=1e-12)


def test_without_critiques_the_critique_objective_is_the_scalar_one():
    inputs = random_step()
    silent = inputs.replace(
        loss_weight=jnp.zeros_like(inputs.loss_weight), totals=inputs.totals.replace(tokens=jnp.zeros(()))
    )
    assert loss_of(CritiqueReward(centre=0.05, tie=0.4), silent) == loss_of(SCALAR, inputs)


def test_the_scalar_objective_reads_no_critique():
    inputs = random_step()
    assert loss_of(SCALAR, inputs) == loss_of(SCALAR, inputs.replace(logp=inputs.logp * jnp.nan))
    assert "loss/critique" not in SCALAR(inputs)[1]


def test_equal_scores_count_as_wrong_and_cost_log_two():
    loss, metrics = ScalarReward()(reward_inputs([[0.0, 0.0]], [[[0, 1], [0, 0]]]))
    assert float(loss) == pytest.approx(math.log(2), rel=1e-12)
    assert float(metrics["rewards/accuracies"]) == 0


def test_a_tie_is_drawn_together():
    score, _ = gradients(ScalarReward(centre=0.0), reward_inputs([[3.0, 1.0]], np.zeros((1, 2, 2)), [[[0, 1], [0, 0]]]))
    np.testing.assert_allclose(score, [[4.0, -4.0]])


def test_a_constant_on_all_scores_moves_the_centre_alone():
    inputs = random_step()
    before, after = (SCALAR(inputs.replace(score=inputs.score + shift))[1] for shift in (0.0, 7.0))
    for name in ("loss/bradley_terry", "loss/tie", "rewards/margins", "rewards/accuracies"):
        assert float(after[name]) == pytest.approx(float(before[name]), rel=1e-12)
    assert float(after["loss/centre"]) != pytest.approx(float(before["loss/centre"]), rel=1e-3)


@both
def test_the_order_of_responses_does_not_matter(objective):
    inputs = random_step()
    order = np.array([2, 0, 3, 1])
    ties = inputs.tie_weight + inputs.tie_weight.swapaxes(1, 2)
    permuted = inputs.replace(
        score=inputs.score[:, order],
        pair_weight=inputs.pair_weight[:, order][:, :, order],
        tie_weight=jnp.triu(ties[:, order][:, :, order]),
    )
    assert loss_of(objective, permuted) == pytest.approx(loss_of(objective, inputs), rel=1e-12)


# --- steps ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("cuts", [[1], [2], [1, 2]])
def test_micro_batches_sum_to_the_step(objective, cuts):
    whole = random_step()
    arrays = [whole.score, whole.pair_weight, whole.tie_weight, whole.logp, whole.loss_weight]
    parts = [reward_inputs(*piece) for piece in zip(*(np.split(np.asarray(a), cuts) for a in arrays))]
    totals = jax.tree.map(lambda *x: sum(x), *(part.totals for part in parts))
    results = [objective(part.replace(totals=totals)) for part in parts]
    summed = jax.tree.map(lambda *x: sum(x), *results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), summed, objective(whole))
    each = [gradients(objective, part.replace(totals=totals)) for part in parts]
    for split, expected in zip(zip(*each), gradients(objective, whole)):
        np.testing.assert_allclose(np.concatenate(split), expected, rtol=1e-12, atol=1e-15)


@both
@pytest.mark.parametrize("missing", ["pairs", "ties", "critiques", "all"])
def test_a_term_of_which_a_step_has_nothing_is_zero(objective, missing):
    inputs = random_step()
    gone = {
        "pairs": {"pair_weight": jnp.zeros_like(inputs.pair_weight)},
        "ties": {"tie_weight": jnp.zeros_like(inputs.tie_weight)},
        "critiques": {"loss_weight": jnp.zeros_like(inputs.loss_weight)},
    }
    fields = {k: v for name in gone if missing in (name, "all") for k, v in gone[name].items()}
    inputs = inputs.replace(**fields)
    totals = step_totals(inputs.pair_weight, jnp.zeros((3, 4)), inputs.loss_weight, inputs.tie_weight)
    loss, metrics = objective(inputs.replace(totals=totals))
    names = {
        "pairs": ["loss/bradley_terry", "loss/centre", "rewards/accuracies"],
        "ties": ["loss/tie"],
        "critiques": ["loss/critique", "logps/token"],
    }
    for name in (n for key in names if missing in (key, "all") for n in names[key]):
        assert float(metrics.get(name, 0.0)) == 0, name
    assert np.isfinite(float(loss))
    for gradient in gradients(objective, inputs.replace(totals=totals)):
        assert np.isfinite(gradient).all()
        assert missing != "all" or not gradient.any()


def test_totals_without_ties_serve_a_step_without_ties():
    inputs = reward_inputs([[1.0, 0.0]], [[[0, 1], [0, 0]]])
    bare = StepTotals(*(jnp.asarray(x) for x in (1.0, 0.0, 0.0, 0.0)))
    assert loss_of(SCALAR, inputs.replace(totals=bare)) == loss_of(SCALAR, inputs)


@both
@pytest.mark.parametrize("garbage", [-1e300, 1.7e308, np.nan, np.inf])
def test_padding_may_hold_anything(objective, garbage):
    inputs = random_step()
    empty = 3  # the last response stands in no pair and no tie; the middle group is a filler
    pairs = inputs.pair_weight.at[:, empty].set(0).at[:, :, empty].set(0).at[1].set(0)
    ties = inputs.tie_weight.at[:, empty].set(0).at[:, :, empty].set(0).at[1].set(0)
    clean = reward_inputs(inputs.score, pairs, ties, inputs.logp, inputs.loss_weight.at[1].set(0))
    slot = jnp.zeros((3, 4), bool).at[:, empty].set(True).at[1].set(True)
    unscored = clean.loss_weight == 0
    sign = jnp.array([1, -1, 1, -1])  # differences of garbage overflow
    dirty = clean.replace(
        score=jnp.where(slot, garbage * sign, clean.score), logp=jnp.where(unscored, garbage, clean.logp)
    )
    jax.tree.map(np.testing.assert_array_equal, objective(dirty), objective(clean))
    for found, expected, padding in zip(
        gradients(objective, dirty), gradients(objective, clean), (slot, unscored), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
        assert not found[np.asarray(padding)].any()


@both
def test_gradients_are_finite_differences(objective):
    inputs = random_step()
    for name, found in zip(("score", "logp"), gradients(objective, inputs)):
        x, step = getattr(inputs, name), 1e-5
        rise = jax.vmap(
            lambda d, name=name, x=x: (
                objective(inputs.replace(**{name: x + d}))[0] - objective(inputs.replace(**{name: x - d}))[0]
            )
        )(jnp.eye(x.size).reshape(x.size, *x.shape) * step)
        np.testing.assert_allclose(found, np.asarray(rise / (2 * step)).reshape(x.shape), rtol=1e-7, atol=1e-10)


def test_extreme_scores_stay_finite():
    for score, slope in [([[-1e6, 0.0]], -1.0), ([[0.0, -1e6]], 0.0)]:
        inputs = reward_inputs(score, [[[0, 1], [0, 0]]])
        objective = ScalarReward(centre=0.0)
        assert np.isfinite(loss_of(objective, inputs))
        np.testing.assert_allclose(gradients(objective, inputs)[0], [[slope, -slope]], atol=1e-12)


# --- as the trainer and the command line meet them ------------------------------------------------------------------


@both
def test_objectives_are_static_arguments_of_jit_and_keep_the_dtype(objective):
    inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_step())
    step = jax.jit(lambda objective, inputs: objective(inputs), static_argnums=0)
    loss, metrics = step(objective, inputs)
    assert {(v.shape, v.dtype) for v in (loss, *metrics.values())} == {((), jnp.dtype("float32"))}
    np.testing.assert_allclose(loss, objective(inputs)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CritiqueReward(critique=-1.0), "CritiqueReward: critique must be at least 0 and finite, got -1.0"),
        (lambda: CritiqueReward(bradley_terry=float("nan")), "CritiqueReward: bradley_terry must be at least 0"),
        (lambda: ScalarReward(centre=float("inf")), "ScalarReward: centre must be at least 0 and finite, got inf"),
        (lambda: ScalarReward(tie=-0.5), "ScalarReward: tie must be at least 0 and finite, got -0.5"),
    ],
)
def test_a_senseless_weight_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_weight_is_a_flag():
    assert tyro.cli(CritiqueReward, args=["--centre", "0.1"]) == CritiqueReward(1.0, 1.0, 0.1, 1.0)
