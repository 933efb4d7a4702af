"""Objectives as the trainer and the command line meet them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from mmrlhf_jax.objectives import (
    DPO,
    MMDPO,
    OBJECTIVES,
    MMDPOReleasedBatch,
    MMDPOReleasedFactor,
    PreferenceInputs,
    step_totals,
)
from mmrlhf_jax.objectives.listing import described, listing


def ranked(logp, reference_logp=None, pair_weight=None, length=None) -> PreferenceInputs:
    """One group, best response first, all pairs unless weights are given."""
    logp = jnp.asarray([logp], jnp.float32)
    responses = logp.shape[1]
    pair_weight = jnp.triu(jnp.ones((1, responses, responses)), 1) if pair_weight is None else jnp.asarray(pair_weight)
    length = jnp.ones_like(logp) if length is None else jnp.asarray([length], jnp.float32)
    return PreferenceInputs(
        logp=logp,
        reference_logp=jnp.zeros_like(logp) if reference_logp is None else jnp.asarray([reference_logp], jnp.float32),
        length=length,
        pair_weight=pair_weight,
        pair_margin=jnp.zeros_like(pair_weight),
        totals=step_totals(pair_weight, length, jnp.ones((1, 1))),
        key=jax.random.key(0),
    )


def test_names_are_stable_since_recipes_and_checkpoints_hold_them():
    assert {name: kind.__name__ for name, kind in OBJECTIVES.items()} == {
        "supervised": "Supervised",
        "dpo": "DPO",
        "mmdpo": "MMDPO",
        "mmdpo_released_factor": "MMDPOReleasedFactor",
        "mmdpo_released_batch": "MMDPOReleasedBatch",
        "critique_reward": "CritiqueReward",
        "scalar_reward": "ScalarReward",
        "sigmoid_norm": "SigmoidNorm",
        "hinge": "Hinge",
        "ipo": "IPO",
        "exo_pair": "EXO",
        "nca_pair": "NCA",
        "robust": "RobustDPO",
        "bco_pair": "BCO",
        "sppo_hard": "SPPO",
        "aot": "AOT",
        "aot_unpaired": "AOTUnpaired",
        "apo_zero": "APOZero",
        "apo_down": "APODown",
        "discopop": "DiscoPOP",
        "sft": "ChosenNLL",
        "mpo": "MPO",
        "beta_dpo": "BetaDPO",
        "mmpo": "MMPO",
        "visit_dpo": "VisitDPO",
        "step_dpo": "StepDPO",
        "ddpo": "DDPO",
        "plackett_luce": "PlackettLuce",
        "refuel": "REFUEL",
        "selm": "SELM",
        "margin_reward": "MarginReward",
        "classification_reward": "ClassificationReward",
        "llava_rlhf_reward": "LLaVARLHFReward",
        "tokenwise_reward": "TokenwiseReward",
        "min_avgout": "MinAvgOut",
        "multi_objective_reward": "MultiObjectiveReward",
        "quantile_reward": "QuantileReward",
    }


def test_what_each_objective_asks_of_the_trainer():
    def those_that(need):
        return {name for name, kind in OBJECTIVES.items() if getattr(kind, need)}

    assert those_that("needs_margin") == {"mmdpo", "mmdpo_released_factor", "mmpo", "refuel", "margin_reward"}
    assert OBJECTIVES.keys() - those_that("needs_reference") == {
        "supervised", "sft", "critique_reward", "scalar_reward", "margin_reward", "classification_reward",
        "llava_rlhf_reward", "tokenwise_reward", "min_avgout", "multi_objective_reward", "quantile_reward",
    }  # fmt: skip
    step_wide = {"mmdpo_released_batch", "beta_dpo", "aot", "aot_unpaired", "llava_rlhf_reward", "min_avgout"}
    assert those_that("needs_step_statistics") == step_wide


def test_the_listing_gives_name_options_formula_and_source_of_each():
    page = listing()
    for name, kind in OBJECTIVES.items():
        here = described(name)
        assert here in page
        assert here.startswith(f"{name}  ({kind.__name__})\n    options: ")
        assert "\n    Formula: " in here, name
        assert "\n    Source: " in here, name
        for field in dataclasses.fields(kind):
            assert f"{field.name} = {field.default!r}" in here


@pytest.mark.parametrize("name", ["dpo", "mmdpo", "mmdpo_released_factor", "mmdpo_released_batch"])
def test_objectives_are_static_arguments_of_jit(name):
    inputs = ranked([-3.0, -1.0, -2.0])
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(objective, inputs):
        traces.append(objective)
        return objective(inputs)

    loss, metrics = step(OBJECTIVES[name](), inputs)
    again, _ = step(OBJECTIVES[name](), inputs)
    assert len(traces) == 1
    assert again == loss
    np.testing.assert_allclose(loss, OBJECTIVES[name]()(inputs)[0], rtol=1e-6)
    assert {(value.shape, value.dtype) for value in (loss, *metrics.values())} == {((), jnp.dtype("float32"))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0.0), "DPO: beta must be positive and finite, got 0.0"),
        (lambda: DPO(beta=float("nan")), "DPO: beta must be positive and finite, got nan"),
        (lambda: DPO(gamma=-1.0), "DPO: gamma must be at least 0 and finite, got -1.0"),
        (lambda: DPO(label_smoothing=0.5), r"DPO: label_smoothing must lie in \[0, 0.5\), got 0.5"),
        (lambda: MMDPO(w=-0.1), "MMDPO: w must be at least 0 and finite, got -0.1"),
        (lambda: MMDPO(k=0.0), "MMDPO: k must be positive and finite, got 0.0"),
        (lambda: MMDPOReleasedFactor(w=float("inf")), "MMDPOReleasedFactor: w must be at least 0 and finite, got inf"),
        (lambda: MMDPOReleasedBatch(selected=0.0), r"MMDPOReleasedBatch: selected must lie in \(0, 1\], got 0.0"),
    ],
)
def test_a_senseless_hyperparameter_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_hyperparameter_is_a_flag_with_help(capsys):
    assert tyro.cli(MMDPO, args=["--w", "0.25"]) == MMDPO(w=0.25)
    with pytest.raises(SystemExit):
        tyro.cli(MMDPOReleasedBatch, args=["--help"])
    text = capsys.readouterr().out
    for flag, words in {"--beta": "drawn pairs are average", "--selected": "Share of the batch's pairs"}.items():
        assert flag in text
        assert words in text
    assert "needs-margin" not in text


def test_every_objective_is_built_from_its_flags(capsys):
    for kind in OBJECTIVES.values():
        assert tyro.cli(kind, args=[]) == kind()
    flags = ["--divergence", "alpha_divergence", "--divergence-alpha", "0.3", "--wpo", "--ld-alpha", "0.5"]
    assert tyro.cli(DPO, args=flags) == DPO(divergence="alpha_divergence", divergence_alpha=0.3, wpo=True, ld_alpha=0.5)
    with pytest.raises(SystemExit):
        tyro.cli(DPO, args=["--divergence", "kl"])


def test_a_reward_tie_is_no_win():
    _, metrics = DPO()(ranked([-2.0, -2.0, -5.0]))
    assert float(metrics["rewards/accuracies"]) == pytest.approx(2 / 3)


def test_an_untrained_policy_starts_at_log_two():
    reference = [-3.0, -1.0, -2.0]
    loss, metrics = MMDPO(gamma=0.0)(ranked(reference, reference))
    assert float(loss) == pytest.approx(np.log(2))
    assert float(metrics["rewards/margins"]) == 0


def test_nll_weighs_a_response_by_its_wins():
    _, metrics = DPO()(ranked([-3.0, -8.0, -100.0], length=[2, 5, 7]))
    assert float(metrics["loss/nll"]) == pytest.approx((3 + 3 + 8) / (2 + 2 + 5))


def test_the_mean_over_groups_is_a_choice_of_pair_weights():
    logp = jnp.asarray([[-1.0, -2.0, -4.0], [-3.0, -1.0, 0.0]])
    all_pairs = jnp.triu(jnp.ones((3, 3)), 1)
    one_pair = jnp.zeros((3, 3)).at[0, 1].set(1.0)
    weight = jnp.stack([all_pairs / 3, one_pair])
    inputs = PreferenceInputs(
        logp=logp,
        reference_logp=jnp.zeros_like(logp),
        length=jnp.ones_like(logp),
        pair_weight=weight,
        pair_margin=jnp.zeros_like(weight),
        totals=step_totals(weight, jnp.ones_like(logp), jnp.ones((2, 1))),
        key=jax.random.key(0),
    )
    assert float(inputs.totals.pair_weight) == pytest.approx(2)
    separate = [float(DPO()(ranked(logp[b], pair_weight=w[None]))[0]) for b, w in enumerate([all_pairs, one_pair])]
    assert float(DPO()(inputs)[0]) == pytest.approx(np.mean(separate))


def test_totals_count_what_is_scored():
    pair_weight = np.zeros((2, 3, 3), np.float32)
    pair_weight[0, 0, 1], pair_weight[0, 0, 2] = 1.0, 0.5
    totals = step_totals(pair_weight, np.full((2, 3), 4.0, np.float32), np.array([[1, 1, 0.5], [0, 0, 0]], np.float32))
    assert [float(x) for x in jax.tree.leaves(totals)] == [1.5, 6.0, 2.5, 1.0, 0.0, 0.0]


def test_a_step_that_scores_nothing_is_not_a_quiet_zero():
    assert np.isnan(float(DPO()(ranked([-1.0, -2.0], pair_weight=jnp.zeros((1, 2, 2))))[0]))
