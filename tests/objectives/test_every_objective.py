"""What every objective of the family must do: sum over micro-batches, ignore padding and the order of responses, have
the gradient that finite differences say. Everything runs in float64."""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_samples import permuted, random_step, reward_step, with_token_logps

from mmrlhf_jax.objectives import (
    AOT,
    BCO,
    DDPO,
    DPO,
    EXO,
    IPO,
    MMPO,
    MPO,
    NCA,
    OBJECTIVES,
    REFUEL,
    SELM,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    AttributeObjective,
    BetaDPO,
    ChosenNLL,
    ClassificationReward,
    CritiqueReward,
    DiscoPOP,
    Hinge,
    LLaVARLHFReward,
    MarginReward,
    MinAvgOut,
    Objective,
    PlackettLuce,
    RobustDPO,
    ScalarReward,
    SigmoidNorm,
    StepDPO,
    TokenwiseReward,
    VisitDPO,
)

SUMS = [
    DPO(gamma=0.25, label_smoothing=0.1, ld_alpha=0.3),
    DPO(wpo=True),
    DPO(divergence="js_divergence", ld_alpha=0.5),
    SigmoidNorm(divergence="alpha_divergence", divergence_alpha=0.7),
    Hinge(gamma=0.1),
    IPO(divergence="forward_kl"),
    EXO(label_smoothing=0.05),
    RobustDPO(),
    DiscoPOP(tau=0.3),
    NCA(),
    BCO(ld_alpha=0.5),
    SPPO(),
    APOZero(),
    APODown(),
    MPO(),
    ChosenNLL(),
    MMPO(beta=0.2, sharpness=0.6),
    VisitDPO(),
    StepDPO(gamma=0.1),
    DDPO(),
    DDPO(average=False, weight=3.0, beta=0.1),
    PlackettLuce(gamma=0.2),
    REFUEL(eta=3.0),
    SELM(alpha=0.1),
]
STEP_WIDE = [BetaDPO(kept=1.0, threshold=0.4, momentum=0.0), AOT(label_smoothing=0.1), AOTUnpaired(ld_alpha=0.4)]
REWARDS = [MarginReward(scale=0.5), ClassificationReward(), TokenwiseReward()]
CANCELS = (DPO, Hinge, EXO, RobustDPO, DiscoPOP, MMPO, VisitDPO, PlackettLuce, REFUEL, BetaDPO)


def named(objective) -> str:
    changed = [f.name for f in dataclasses.fields(objective) if getattr(objective, f.name) != f.default]
    return "-".join([type(objective).__name__, *changed])


separable = pytest.mark.parametrize("objective", SUMS, ids=named)
preference = pytest.mark.parametrize("objective", SUMS + STEP_WIDE, ids=named)
rewards = pytest.mark.parametrize("objective", [*REWARDS, LLaVARLHFReward(centre=0.3)], ids=lambda o: type(o).__name__)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss_of(objective, inputs) -> float:
    return float(objective(inputs)[0])


def gradient_of(objective, inputs) -> np.ndarray:
    """With respect to the log-prob of every slot."""
    return np.asarray(jax.grad(lambda logp: objective(with_token_logps(inputs, logp))[0])(inputs.tokens.logp))


def test_the_lists_above_are_all_of_them():
    """Those that law 9, test_reward.py, test_attributes.py and test_averages.py hold to the same are left out here."""
    tested = {type(o) for o in SUMS + STEP_WIDE + REWARDS} | {LLaVARLHFReward, CritiqueReward, ScalarReward}
    earlier = {OBJECTIVES[n] for n in ("supervised", "mmdpo", "mmdpo_released_factor", "mmdpo_released_batch")}
    earlier |= {*typing.get_args(AttributeObjective), MinAvgOut}
    assert tested | earlier == set(OBJECTIVES.values())
    assert set(typing.get_args(Objective)) == set(OBJECTIVES.values())


@pytest.mark.parametrize("lower", ["policy", "reference"])
@pytest.mark.parametrize("objective", [*SUMS, *STEP_WIDE, DPO(divergence="forward_kl"), DiscoPOP(beta=1.0)], ids=named)
def test_far_from_the_reference_a_gradient_is_still_a_number(objective, lower):
    """In fp32, where exp(89) is infinite: a response 400 nats from where it was before training."""
    if isinstance(objective, IPO) and objective.divergence == "forward_kl" and lower == "policy":
        pytest.skip("the square of such an exponential is infinite: the step is named and not saved")
    with jax.enable_x64(False):
        inputs = random_step()
        assert inputs.tokens.logp.dtype == jnp.float32
        logp, reference = inputs.tokens.logp, inputs.tokens.reference_logp
        if lower == "policy":
            logp = logp.at[1, 0].add(-400)
        else:
            low = with_token_logps(inputs, reference.at[1, 0].add(-400))
            inputs = inputs.replace(
                reference_logp=low.logp, tokens=inputs.tokens.replace(reference_logp=low.tokens.logp)
            )
        loss, gradient = jax.value_and_grad(lambda logp: objective(with_token_logps(inputs, logp))[0])(logp)
        assert jnp.isfinite(loss)
        assert jnp.isfinite(gradient).all()


@separable
def test_micro_batches_sum_to_the_step(objective):
    whole = random_step()
    parts = [jax.tree.map(lambda x, b=b: x[b : b + 1], whole.replace(totals=None, key=None)) for b in range(3)]
    results = [objective(part.replace(totals=whole.totals, key=whole.key)) for part in parts]
    summed = jax.tree.map(lambda *x: sum(x), *results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), summed, objective(whole))


@preference
def test_the_order_of_responses_does_not_matter(objective):
    inputs, order = random_step(), [2, 0, 3, 1]
    other = permuted(inputs, order)
    assert loss_of(objective, other) == pytest.approx(loss_of(objective, inputs), rel=1e-11)
    np.testing.assert_allclose(gradient_of(objective, other), gradient_of(objective, inputs), rtol=1e-9, atol=1e-13)


@preference
def test_a_constant_on_a_whole_prompt_cancels_where_only_differences_count(objective):
    inputs = random_step()
    gammaless = {"gamma": 0.0} if any(f.name == "gamma" for f in dataclasses.fields(objective)) else {}
    objective = dataclasses.replace(objective, **gammaless)
    if getattr(objective, "ld_alpha", 1) != 1:
        objective = dataclasses.replace(objective, ld_alpha=1.0)
    shifted = inputs.replace(logp=inputs.logp + jnp.array([[3.0], [-11.0], [0.5]]))
    plain = getattr(objective, "divergence", "reverse_kl") == "reverse_kl"
    by_token = isinstance(objective, DDPO | StepDPO)  # a constant is not that of a token
    same = loss_of(objective, shifted) == pytest.approx(loss_of(objective, inputs), rel=1e-11)
    assert same == (by_token or (plain and isinstance(objective, (*CANCELS, AOT))))


@preference
@pytest.mark.parametrize("garbage", [-1e300, np.nan])
def test_padding_may_hold_anything(objective, garbage):
    clean = random_step()
    tokens, member = clean.tokens, clean.tokens.response < 4
    alone = ~((clean.pair_weight > 0).any(-1) | (clean.pair_weight > 0).any(-2))
    assert alone.any()

    def bad(values, here):
        return jnp.where(here, garbage, values)

    dirty = clean.replace(
        logp=bad(clean.logp, alone),
        reference_logp=bad(clean.reference_logp, alone),
        length=bad(clean.length, alone),
        score=bad(clean.score, alone),
        pair_margin=bad(clean.pair_margin, clean.pair_weight == 0),
        tokens=tokens.replace(
            logp=bad(tokens.logp, ~member),
            reference_logp=bad(tokens.reference_logp, ~member),
            collision=bad(tokens.collision, ~member),
            token=jnp.where(member, tokens.token, 7),
            changed=tokens.changed | ~member[:, None],
        ),
    )
    jax.tree.map(np.testing.assert_array_equal, objective(dirty), objective(clean))
    gradient = jax.grad(
        lambda logp, t: objective(dirty.replace(logp=logp, tokens=dirty.tokens.replace(logp=t)))[0], (0, 1)
    )
    for slope in gradient(dirty.logp, dirty.tokens.logp):
        assert np.isfinite(slope).all()


@preference
def test_gradients_are_finite_differences(objective):
    inputs, step = random_step(), 1e-5
    here = inputs.tokens.logp
    rows = jnp.array([[b, t] for b in range(3) for t in (0, 4, 9, 13)])  # of every group a few tokens
    ways = jnp.zeros((len(rows), *here.shape)).at[jnp.arange(len(rows)), rows[:, 0], rows[:, 1]].set(step)

    def loss(logp):
        return objective(with_token_logps(inputs, logp))[0]

    expected = jax.vmap(lambda way: loss(here + way) - loss(here - way))(ways) / (2 * step)
    if getattr(objective, "wpo", False) or isinstance(objective, BetaDPO):  # weights and betas pass no gradient
        held = jax.grad(loss)(here)[rows[:, 0], rows[:, 1]]
        assert np.abs(held - expected).max() > 1e-6
        return
    found = jax.grad(loss)(here)[rows[:, 0], rows[:, 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@rewards
def test_a_reward_sums_over_micro_batches_where_it_may(objective):
    whole = reward_step()
    parts = [jax.tree.map(lambda x, b=b: x[b : b + 1], whole.replace(totals=None)) for b in range(3)]
    summed = sum(float(objective(part.replace(totals=whole.totals))[0]) for part in parts)
    assert (summed == pytest.approx(loss_of(objective, whole), rel=1e-11)) == (not objective.needs_step_statistics)


@rewards
def test_a_rewards_gradient_is_that_of_finite_differences_and_of_nothing_else(objective):
    inputs, step = reward_step(), 1e-5
    of = "token_score" if isinstance(objective, TokenwiseReward) else "score"
    here = getattr(inputs, of)

    def loss(values):
        return objective(inputs.replace(**{of: values}))[0]

    ways = step * jnp.eye(here.size).reshape(here.size, *here.shape)
    expected = (jax.vmap(lambda way: loss(here + way) - loss(here - way))(ways) / (2 * step)).reshape(here.shape)
    slope = np.asarray(jax.grad(loss)(here))
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-9)
    alone = ~np.asarray((inputs.pair_weight > 0).any(-1) | (inputs.pair_weight > 0).any(-2))
    dead = alone if of == "score" else np.asarray(inputs.tokens.response == 4)
    assert not slope[dead].any()
    dirty = objective(inputs.replace(**{of: jnp.where(dead, jnp.nan, here)}))
    jax.tree.map(np.testing.assert_array_equal, dirty, objective(inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hinge(divergence="kl"), r"Hinge: divergence must be one of reverse_kl, .*, got 'kl'"),
        (lambda: DPO(divergence_alpha=0.3), "DPO: divergence_alpha is read by divergence = 'alpha_divergence' only"),
        (lambda: IPO(ld_alpha=1.5), r"IPO: ld_alpha must lie in \[0, 1\], got 1.5"),
        (lambda: EXO(label_smoothing=0.0), r"EXO: label_smoothing must lie in \(0, 0.5\), got 0.0"),
        (lambda: RobustDPO(label_smoothing=0.5), r"RobustDPO: label_smoothing must lie in \[0, 0.5\)"),
        (lambda: DiscoPOP(tau=0.0), "DiscoPOP: tau must be positive"),
        (lambda: MPO(bco=-1.0), "MPO: bco must be at least 0"),
        (lambda: MMPO(sharpness=-1.0), "MMPO: sharpness must be at least 0"),
        (lambda: DDPO(segments="difflib"), "DDPO: segments must be one of exact, released"),
        (lambda: DDPO(weight=float("inf")), "DDPO: weight must be at least 0 and finite"),
        (lambda: SELM(visited="mine"), "SELM: visited must be one of both, chosen, rejected"),
        (lambda: REFUEL(eta=0.0), "REFUEL: eta must be positive"),
        (lambda: REFUEL(scaling="code"), "REFUEL: scaling must be one of paper, released"),
        (lambda: BetaDPO(kept=0.0), r"BetaDPO: kept must lie in \(0, 1\]"),
        (lambda: AOT(beta=-1.0), "AOT: beta must be positive"),
        (lambda: MarginReward(scale=-1.0), "MarginReward: scale must be at least 0"),
        (lambda: StepDPO(labels=1), "unexpected keyword argument 'labels'"),
    ],
)
def test_a_senseless_or_unknown_option_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
