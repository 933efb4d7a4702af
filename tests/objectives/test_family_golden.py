"""Every golden vector of the family's systems, by name, through this project's own code. Everything runs in float64.

TRL's cases are in test_trl_golden.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_samples import inputs_of, tokens_of

from mmrlhf_jax.evaluation.diversity import ead
from mmrlhf_jax.objectives import (
    DDPO,
    DPO,
    MMDPO,
    MMPO,
    REFUEL,
    SELM,
    ClassificationReward,
    LLaVARLHFReward,
    PreferenceInputs,
    RewardInputs,
    ScalarReward,
    VisitDPO,
    step_totals,
)
from mmrlhf_jax.objectives.exploration import average_output, avgout
from mmrlhf_jax.objectives.preference import drawn_beta
from mmrlhf_jax.objectives.reward_heads import along, pinball, unit_direction
from mmrlhf_jax.objectives.shaping import claim_score, generalised_advantages, length_penalty
from mmrlhf_jax.objectives.soft_labels import visit_smoothing

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "data" / "family_golden.json").read_text())["vectors"]
ONE_PAIR = [[[0.0, 1.0], [0.0, 0.0]]]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def pair(margin=0.0, score=(0.0, 0.0)) -> PreferenceInputs:
    weight, length = jnp.array(ONE_PAIR), jnp.array([[4.0, 4.0]])
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


def loss(objective, inputs):
    return objective(inputs)[0]


def mm_dpo(delta):
    value, metrics = MMDPO(beta=0.1, w=0.5, k=0.5, gamma=0.0)(pair(delta))
    return [metrics["beta/mean"], value]


def raw_beta(delta):
    """What the published formula would give unclipped: from its bound (1 + w) beta0 down by w beta0 exp(-k delta)."""
    (bound, _), (least, _) = mm_dpo(1e9), mm_dpo(0.0)
    return bound - (bound - least) * np.exp(-0.5 * delta)


def batch_rule():
    z = jnp.array([0.5, 1.0, 1.5, 2.0])[:, None, None] * jnp.array(ONE_PAIR)
    valid = jnp.array(ONE_PAIR * 4) > 0
    return [drawn_beta(z, valid, valid & (z > 0.6), beta=0.1, w=0.1)]


def mmpo():
    with_label = jax.grad(lambda z: loss(MMPO(sharpness=2.2, beta=1.0), pair(1.0).replace(logp=jnp.array([[z, 0.0]]))))
    p = 0.5 - with_label(-11.0 + 11.5)  # at h = 0 the slope is 1/2 - p
    return [p, *(loss(MMPO(sharpness=2.2, beta=beta), pair(1.0)) for beta in (0.01, 0.1))]


def visits():
    """The smoothing, and that the objective uses it: the loss between those of both labels."""
    epsilon = visit_smoothing(jnp.array(6.0), jnp.array(2.0))
    agree, against = loss(DPO(), pair()), loss(DPO(), pair().replace(pair_weight=jnp.array(ONE_PAIR).swapaxes(1, 2)))
    smoothed = loss(VisitDPO(), pair(score=(6.0, 2.0)))
    return [1 - epsilon, (smoothed - agree) / (against - agree)]


def rewards():
    weight, nothing = jnp.array(ONE_PAIR), jnp.zeros((1, 2))
    totals = step_totals(weight, nothing, nothing)
    inputs = RewardInputs(jnp.array([[1.2, -0.3]]), nothing, nothing, weight, 0 * weight, totals)
    objectives = (ScalarReward(centre=0.0), ClassificationReward(), LLaVARLHFReward(), ScalarReward(centre=0.01))
    return [loss(objective, inputs) for objective in objectives]


def ddpo():
    tokens = tokens_of([[[5, 6, 7, 8], [5, 6, 9, 8]]], [[[-1, -2, -3, -4], [-1, -1, -1, -1]]], [[[0] * 4, [0] * 4]])
    inputs = inputs_of(tokens, ONE_PAIR)
    return [DDPO(weight=5.0, average=average)(inputs)[1]["logps/chosen"] for average in (False, True)]


def diversity():
    output = average_output(jnp.array([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]]), jnp.ones((1, 2)))
    penalty, moved = avgout(output, jnp.full(3, 1 / 3), 0.9)
    return [*output, *moved, penalty]


FOUND = {
    "dpo, beta .1": lambda: [loss(DPO(), pair())],
    "conservative dpo, beta .1, epsilon .1": lambda: [loss(DPO(label_smoothing=0.1), pair())],
    "mm-dpo, beta0 .1, w .5, k .5, delta 0: beta, loss": lambda: mm_dpo(0.0),
    "mm-dpo, delta 1: beta, loss": lambda: mm_dpo(1.0),
    "mm-dpo, delta 4: beta, loss": lambda: mm_dpo(4.0),
    "mm-dpo, delta -1: raw beta, clipped beta, loss": lambda: [raw_beta(-1.0), *mm_dpo(-1.0)],
    "beta-dpo's batch rule, A .5 1 1.5 2, the last three selected, w .1: beta": batch_rule,
    "mmpo, m 1, gamma 2.2: p, loss at beta .01, loss at beta .1": mmpo,
    "selm, beta .01, alpha 1e-3, log-ratio of the self-response 1": lambda: [
        loss(SELM(beta=0.01, alpha=1e-3, visited="chosen"), pair())
    ],
    "refuel, eta 1e3, dR .3: paper's form, code's form": lambda: [
        loss(REFUEL(eta=1e3, scaling=scaling), pair(0.3)) for scaling in ("paper", "released")
    ],
    "mcts-dpo, 6 better, 2 worse: confidence, epsilon": visits,
    "rewards 1.2 and -.3: bt, clf, llava-rlhf, mm-rlhf": rewards,
    "pinball, y 2, q 0 1 3, tau .1 .5 .9": lambda: pinball(
        jnp.array([0.0, 1.0, 3.0]), jnp.array(2.0), jnp.array([0.1, 0.5, 0.9])
    ),
    "ddpo, lp -1 -2 -3 -4, the third changed, gamma 5: sum, average": ddpo,
    "ead, 'a b a c', unigrams, V 50257": lambda: [ead([["a", "b", "a", "c"]], 1)],
    "gae, r 0 0 1, v .1 .2 .3, gamma 1, lambda .95": lambda: generalised_advantages(
        jnp.array([0.0, 0.0, 1.0]), jnp.array([0.1, 0.2, 0.3]), 1.0, 0.95
    ),
    "dpa, -15 degrees, (80, 90) and (75, 40)": lambda: along(
        jnp.array(unit_direction(-15)), jnp.array([[80.0, 90.0], [75.0, 40.0]])
    ),
    "factscore's length penalty, n 5, gamma 10": lambda: [length_penalty(jnp.array(5.0), 10.0)],
    "avgout, P [.7 .2 .1] [.1 .8 .1], uniform average, decay .9: D, average, D . average": diversity,
}
DECIMALS = {"dpa": 5e-4, "ead": 5e-11, "factscore": 5e-9}  # written down with as many; the others in full


def test_every_vector_is_here():
    assert FOUND.keys() == GOLDEN.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vector(name):
    rounding = next((value for word, value in DECIMALS.items() if name.startswith(word)), 0.0)
    found = [float(value) for value in FOUND[name]()]
    np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-12, atol=rounding + 1e-15)


def test_claims_are_counted_and_few_of_them_cost():
    supported, claims = jnp.array([3.0, 5.0, 9.0, 0.0, 12.0]), jnp.array([5.0, 5.0, 10.0, 0.0, 16.0])
    expected = [0.6 * np.exp(-1), np.exp(-1), 0.9, 0.0, 0.75]
    np.testing.assert_allclose(claim_score(supported, claims), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="enough must be positive"):
        claim_score(supported, claims, 0.0)


def test_advantages_are_discounted_returns_where_nothing_is_expected():
    reward = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)))
    found = generalised_advantages(reward, jnp.zeros_like(reward), 0.9, 1.0)
    expected = [[sum(0.9 ** (s - t) * row[s] for s in range(t, 5)) for t in range(5)] for row in np.asarray(reward)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_prepared_numbers_are_those_of_the_shared_oracle():
    """Where the shared folder beside the repository is: TRL's numbers were copied whole."""
    shared = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracles" / "dpo_golden.json"
    if not shared.exists():
        pytest.skip("the shared folder beside the repository is not here")
    here = json.loads((Path(__file__).resolve().parents[1] / "data" / "trl_dpo_golden.json").read_text())
    there = json.loads(shared.read_text())
    assert here["cases"].keys() == there["cases"].keys()
    for name in here.keys() & there.keys() - {"provenance"}:
        assert here[name] == there[name], name
    assert {"cases", "lens", "policy_per_token_logps", "ref_per_token_logps"} <= here.keys()
